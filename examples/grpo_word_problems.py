"""GRPO over a packed base: a small model at 2 bits learns word problems of one step.

    cloq run --demo --out demo-2bit
    cloq data word-problems --most-steps 1 --count 400 --seed 1 --out words.jsonl
    cloq finetune demo-2bit --data words.jsonl --name words --steps 10 --seqlen 128 --learning-rate 1e-3
    python examples/grpo_word_problems.py demo-2bit --adapter words --out grpo

A model that never answers in the wanted form gets no reward to learn from, so a few steps on worked solutions come
first; many would leave it with one answer to each problem, and nothing to choose from. The base stays packed and
frozen; the adapter is what learns. Rollouts come from the trainer's own model, or with `--server URL` from `cloq serve
demo-2bit`, which gets the adapter of each step alone. Either way a canary compares the trainer with what serves the
adapter. Killed or interrupted, the same command continues. `OUT/curve.json` has the rewards of every step, and those of
unseen problems before and after, with their standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import datasets
import peft
import pyarrow
import torch
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
from cloq_export.texts.examples import question_prompt
from cloq_export.texts.word_problems import WordProblem, generate

PROMPTS = 2000
NEW_TOKENS = 40
ASKED_TOGETHER = 16


def reward_of(completion: str, answer: str) -> float:
    """Return 1 for the right number behind "####", 0.2 for another one, and 0.3 more for the right calculation."""
    first = completion.split("\nQuestion:")[0]
    calculation = re.search(r"<<(.*?)=", answer)
    reward = 0.3 if calculation and f"<<{calculation[1]}=" in first else 0.0
    found = re.search(r"#### (-?\d+)", first)
    if found:
        reward += 1.0 if found[1] == answer.rpartition("#### ")[2] else 0.2
    return reward


def unseen_rewards(model: Any, tokenizer: Any, problems: list[WordProblem]) -> dict[str, float]:
    """Return what a model's likeliest answers to problems are worth: their mean, its standard error, and how many.

    Args:
        model: answers, without changing.
        tokenizer: its own.
        problems: two or more that it was not trained on.
    """
    rewards = []
    model.eval()
    for first in range(0, len(problems), ASKED_TOGETHER):
        asked = problems[first : first + ASKED_TOGETHER]
        prompts = [question_prompt(each.question) for each in asked]
        tokens = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            ids = model.generate(
                **tokens, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(ids[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        rewards += [reward_of(text, each.answer) for text, each in zip(texts, asked, strict=True)]
    model.train()
    error = statistics.stdev(rewards) / math.sqrt(len(rewards))
    return {"mean": statistics.mean(rewards), "standard_error": error, "problems": len(rewards)}


@dataclasses.dataclass
class Curve(transformers.TrainerCallback):
    """Prints the reward of every step and writes the curve; asks the canary every so many steps.

    Args:
        path: of the curve.
        canary: asked of the saved adapter, or None where rollouts ask one.
        every: steps between two questions.
        unseen: what unseen problems are worth, "before" and "after".
    """

    path: Path
    canary: SyncCanary | None
    every: int
    unseen: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def write(self, seed: int) -> None:
        """Write what is known."""
        write_json(self.path, {"seed": seed, "unseen": self.unseen, "steps": self.rows}, sort_keys=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write the curve as far as it goes."""
        self.rows = [
            {"step": row["step"], "reward": row["reward"], "reward_std": row["reward_std"]}
            for row in state.log_history
            if "reward" in row
        ]
        if self.rows and "reward" in (logs or {}):
            self.write(args.seed)
            print(json.dumps(self.rows[-1]), flush=True)

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


def make_trainer(options: argparse.Namespace) -> tuple[trl.GRPOTrainer, Curve]:
    """Return a trainer over the packed base of a run, with an adapter of the run to be trained, and its curve."""
    cloq_export.register()
    base_folder = checkpoint_folder(options.run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32")
    shelf = AdapterShelf.of(options.run).folders
    if options.adapter not in shelf:
        raise SystemExit(f"{options.run} has no adapter {options.adapter!r}; it has {', '.join(shelf) or 'none'}.")
    started = shelf[options.adapter]
    model = peft.PeftModel.from_pretrained(base, started, is_trainable=True)
    problems = generate(PROMPTS, seed=options.seed, most_steps=1)
    rows = [{"prompt": question_prompt(each.question), "answer": each.answer} for each in problems]
    probe = tokenizer(rows[0]["prompt"] + " " + rows[0]["answer"])["input_ids"]
    rollouts, canary = None, SyncCanary(model, packed_model(base_folder, Folders()), [probe], needs_weights=True)
    if options.server:
        server = ServerClient(options.server, options.base_name, [])
        asked = RolloutOptions(options.name, seed=options.seed)
        rollouts = AdapterRollouts(server, options.out / "sync", asked, SyncCanary(model, server, [probe]))
    curve = Curve(options.out / "curve.json", None if rollouts else canary, options.save_every)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, answer, **_: [
            reward_of(text, right) for text, right in zip(completions, answer, strict=True)
        ],
        # With a fingerprint of its own: pickling a table to make one fails with some pairs of dill and pyarrow.
        train_dataset=datasets.Dataset(pyarrow.Table.from_pylist(rows), fingerprint=f"word-problems-{options.seed}"),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[curve],
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
    return trainer, curve


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run directory or an export with an adapter")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and curve.json")
    parser.add_argument("--adapter", default="cloq", help="of the run, to start from (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=2, help="problems of a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="answers to each (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--unseen", type=int, default=64, help="problems asked before and after (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, help="steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--server", metavar="URL", help="of cloq serve; without it the trainer's own model samples")
    parser.add_argument("--base-name", default="demo-2bit-base", help="of the server's base (default: %(default)s)")
    parser.add_argument("--name", default="word-problems", help="of the adapters there (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train, from the last checkpoint if there is one, and ask problems of the test split before and after."""
    options = parse_arguments()
    trainer, curve = make_trainer(options)
    unseen = generate(options.unseen, split="test", most_steps=1)
    begun = any((options.out / "trainer").glob("checkpoint-*"))
    if begun and curve.path.exists():
        curve.unseen = json.loads(curve.path.read_text(encoding="utf-8"))["unseen"]
    if not begun:
        curve.unseen["before"] = unseen_rewards(trainer.model, trainer.processing_class, unseen)
        print(json.dumps(curve.unseen), flush=True)
    trainer.train(resume_from_checkpoint=begun or None)
    curve.unseen["after"] = unseen_rewards(trainer.model, trainer.processing_class, unseen)
    curve.write(options.seed)
    print(json.dumps(curve.unseen), flush=True)
    trainer.model.save_pretrained(options.out / "adapter")
    print(f"the adapter is in {options.out / 'adapter'}, the curve in {options.out / 'curve.json'}")


if __name__ == "__main__":
    main()
