"""GRPO over a packed base: a small model at 2 bits learns word problems of one step.

    cloq run --demo --out demo-2bit
    python examples/grpo_word_problems.py demo-2bit --out grpo

The base stays packed and frozen; the run's CLoQ adapter is what learns. Rollouts come from the trainer's own model, or
with `--server URL` from `cloq serve demo-2bit`, which gets the adapter of each step alone. Either way a canary compares
the trainer with what serves the adapter. Killed or interrupted, the same command continues. `OUT/curve.json` has the
rewards of every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import peft
import pyarrow
import transformers
import trl

import cloq_export
from cloq_export.artifact.adapters import AdapterShelf
from cloq_export.artifact.checkpoint import checkpoint_folder
from cloq_export.engines.transformers.served import packed_model
from cloq_export.engines.vllm.client import ServerClient
from cloq_export.files.atomic import write_json
from cloq_export.integrations.trl import AdapterRollouts, RolloutOptions
from cloq_export.parity.canary import SyncCanary
from cloq_export.texts.word_problems import WordProblem, generate

PROMPTS = 2000
NEW_TOKENS = 40


def prompt_of(problem: WordProblem, shown: list[WordProblem]) -> str:
    """Return a problem behind others with their answers, which show the form that is wanted."""
    worked = "".join(f"Question: {each.question}\nAnswer: {each.answer}\n\n" for each in shown)
    return f"{worked}Question: {problem.question}\nAnswer:"


def reward_of(completion: str, answer: str) -> float:
    """Return 1 for the right number behind "####", 0.2 for another one, and 0.3 more for the right calculation."""
    first = completion.split("Question:")[0]
    calculation = re.search(r"<<(.*?)=", answer)
    reward = 0.3 if calculation and f"<<{calculation[1]}=" in first else 0.0
    found = re.search(r"#### (-?\d+)", first)
    if found:
        reward += 1.0 if found[1] == answer.rpartition("#### ")[2] else 0.2
    return reward


@dataclasses.dataclass
class Curve(transformers.TrainerCallback):
    """Prints the reward of every step and writes the curve; asks the canary every so many steps.

    Args:
        path: of the curve.
        canary: asked of the saved adapter, or None where rollouts ask one.
        every: steps between two questions.
    """

    path: Path
    canary: SyncCanary | None
    every: int

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write the curve as far as it goes."""
        rows = [
            {"step": row["step"], "reward": row["reward"], "reward_std": row["reward_std"]}
            for row in state.log_history
            if "reward" in row
        ]
        if rows and "reward" in (logs or {}):
            write_json(self.path, {"seed": args.seed, "steps": rows}, sort_keys=False)
            print(json.dumps(rows[-1]), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Load what was saved anew, and compare it with what is trained."""
        if self.canary is not None and state.global_step % self.every == 0:
            folder = self.path.parent / "served" / str(state.global_step)
            model.save_pretrained(folder)
            figures = self.canary.check(state.global_step, str(folder))
            print(f"canary: largest difference {figures.logprob_difference_max:.1e}", flush=True)


class Folders(dict[str, Path]):
    """Adapters by the path of their folder."""

    def __contains__(self, name: object) -> bool:
        """Return whether a folder holds an adapter."""
        return (Path(str(name)) / "adapter_config.json").is_file()

    def __missing__(self, name: str) -> Path:
        """Return the folder."""
        return Path(name)


def make_trainer(options: argparse.Namespace) -> trl.GRPOTrainer:
    """Return a trainer over the packed base of a run, with the run's first adapter to be trained."""
    cloq_export.register()
    base_folder = checkpoint_folder(options.run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32")
    started = next(iter(AdapterShelf.of(options.run).folders.values()))
    model = peft.PeftModel.from_pretrained(base, started, is_trainable=True)
    shown, *problems = generate(PROMPTS + 1, seed=options.seed, most_steps=1)
    rows = [{"prompt": prompt_of(each, [shown]), "answer": each.answer} for each in problems]
    probe = tokenizer(rows[0]["prompt"] + " " + rows[0]["answer"])["input_ids"]
    rollouts, canary = None, SyncCanary(model, packed_model(base_folder, Folders()), [probe], needs_weights=True)
    if options.server:
        server = ServerClient(options.server, options.base_name, [])
        asked = RolloutOptions(options.name, seed=options.seed)
        rollouts = AdapterRollouts(server, options.out / "sync", asked, SyncCanary(model, server, [probe]))
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, answer, **_: [
            reward_of(text, right) for text, right in zip(completions, answer, strict=True)
        ],
        # With a fingerprint of its own: pickling a table to make one fails with some pairs of dill and pyarrow.
        train_dataset=datasets.Dataset(pyarrow.Table.from_pylist(rows), fingerprint=f"word-problems-{options.seed}"),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[Curve(options.out / "curve.json", None if rollouts else canary, options.save_every)],
        args=trl.GRPOConfig(
            output_dir=str(options.out / "trainer"),
            seed=options.seed,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=options.samples,
            num_generations=options.samples,
            gradient_accumulation_steps=options.prompts,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=0.0,
            logging_steps=1,
            save_steps=options.save_every,
            save_total_limit=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
    )


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory or an export with an adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and curve.json")
    parser.add_argument("--steps", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="problems of a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="answers to each (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="(default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--server", metavar="URL", help="of cloq serve; without it the trainer's own model samples")
    parser.add_argument("--base-name", default="demo-2bit-base", help="of the server's base (default: %(default)s)")
    parser.add_argument("--name", default="word-problems", help="of the adapters there (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train, from the last checkpoint if there is one."""
    options = parse_arguments()
    trainer = make_trainer(options)
    begun = any((options.out / "trainer").glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun or None)
    trainer.model.save_pretrained(options.out / "adapter")
    print(f"the adapter is in {options.out / 'adapter'}, the curve in {options.out / 'curve.json'}")


if __name__ == "__main__":
    main()
