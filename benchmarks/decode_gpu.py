"""Time decoding of a 1B-shaped packed model on a GPU: no adapter, one for all texts, and one for each of eight.

The weights and the adapters are random, every linear of the blocks is packed and has pairs of rank 64. A step is one
token for every text, with keys and values kept, as a loaded model takes it; the figure is the median over steps, the
host's part included. Before a time is taken, a text among others with other adapters is held against the same text
alone.

    python benchmarks/decode_gpu.py --json benchmarks/results/decode_gpu.json

Without a GPU, `--shape tiny --device cpu --steps 2` shows that the script works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_clock import describe_device, device_of, release, synchronize
from gpu_init import SHAPES
from train_gpu import LINEARS, make_base

from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.packed_lora import PackedLoraLinear
from cloq_export.files.atomic import write_json

_PROMPT = 16
# Of the largest logit: sums of one text come in another order among others.
_ALLOWED = 0.05


def make_adapted(name: str, bits: int, device: torch.device, adapters: int) -> Any:
    """Return a packed model with so many random adapters, in evaluation mode."""
    import peft

    model = make_base(name, "packed", bits, device)
    if adapters:
        rank = 4 if name == "tiny" else 64
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS)
        config._register_custom_module({PackedLinear: PackedLoraLinear})
        model = peft.get_peft_model(model, config, adapter_name="adapter0")
        for number in range(1, adapters):
            model.add_adapter(f"adapter{number}", config)
        generator = torch.Generator(device=device).manual_seed(0)
        with torch.no_grad():
            for layer in model.modules():
                for second in getattr(layer, "lora_B", {}).values():
                    second.weight.normal_(0.0, 0.01, generator=generator)
                for kind in ("lora_A", "lora_B"):
                    for factor in getattr(layer, kind, {}).values():
                        # As checkpoints hold them; PEFT keeps them in float32.
                        factor.weight.copy_(factor.weight.to(torch.float16))
    return model.requires_grad_(False).eval()


def step_seconds(model: Any, prompts: torch.Tensor, names: list[str] | None, steps: int) -> tuple[float, torch.Tensor]:
    """Return the median time of a step, and the logits of the last one.

    Args:
        model: the model.
        prompts: token ids, (texts, length); the same tokens are taken again as those that follow.
        names: an adapter for each text; None where the model has none, or one for all.
        steps: so many are timed, after two.
    """
    chosen = {} if names is None else {"adapter_names": names}
    cache = model(input_ids=prompts, use_cache=True, **chosen).past_key_values
    seconds = []
    for step in range(steps + 2):
        token = prompts[:, step % prompts.shape[1], None]
        synchronize(prompts.device)
        started = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True, **chosen)
        synchronize(prompts.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:]), output.logits[:, -1].to(torch.float32)


def checked(model: Any, prompts: torch.Tensor, names: list[str], logits: torch.Tensor, steps: int) -> float:
    """Return how far the last text alone is from itself among others, or end the run: nothing wrong is timed."""
    _, alone = step_seconds(model, prompts[-1:], names[-1:], steps)
    error = float((alone[0] - logits[-1]).abs().max() / logits[-1].abs().max())
    if not error <= _ALLOWED:
        raise SystemExit(f"a text alone is {error:.3g} from itself among others with other adapters; nothing was timed")
    return error


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=[*SHAPES])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--texts", default="1,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = device_of(options.device)
    rows: list[dict[str, Any]] = []
    plain: dict[int, float] = {}
    with torch.no_grad():
        for adapters in (0, 1, 8):
            model = make_adapted(options.shape, options.bits, device, adapters)
            vocabulary = model.get_input_embeddings().num_embeddings
            for texts in map(int, options.texts.split(",")):
                if adapters > max(1, texts):
                    continue
                generator = torch.Generator().manual_seed(0)
                prompts = torch.randint(0, vocabulary, (texts, _PROMPT), generator=generator).to(device)
                names = [f"adapter{number % adapters}" for number in range(texts)] if adapters > 1 else None
                seconds, logits = step_seconds(model, prompts, names, options.steps)
                error = None if names is None else checked(model, prompts, names, logits, options.steps)
                plain.setdefault(texts, seconds)
                over = seconds / plain[texts]
                rows.append(
                    {"adapters": adapters, "texts": texts, "seconds": seconds, "over_plain": over, "error": error}
                )
                print(
                    f"{adapters} adapters, {texts} texts: {seconds * 1e3:.2f} ms a step, {over:.2f}x none", flush=True
                )
                if options.json:
                    write_json(options.json, {"device": describe_device(device), "rows": rows}, sort_keys=False)
            del model
            release(device)


if __name__ == "__main__":
    main()
