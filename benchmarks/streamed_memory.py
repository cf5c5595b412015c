"""Peak memory and time of `cloq run` on a model of any shape with random weights, read from disk or held in memory.

The default shape is that of Llama 2 13B: 26 GB of bfloat16 in the folder. With `--experts` it is a mixture; a few
blocks of a Qwen3-30B-A3B are `--experts 128 --hidden 2048 --inner 768 --heads 32 --blocks 3`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from rich.console import Console

from cloq_export.compress import job
from cloq_export.files.atomic import write_json
from cloq_export.files.shards import ShardWriter
from cloq_export.files.tensor_writer import tensor_header
from cloq_export.process.hardware import describe_hardware
from cloq_export.process.host_memory import MemoryWatch
from cloq_export.recipe import Recipe
from cloq_export.verbs.run import run


def config_of(options: argparse.Namespace) -> transformers.PreTrainedConfig:
    """Return the configuration of the shape that was asked for: a Llama, or a Qwen3 mixture."""
    shape = {
        "hidden_size": options.hidden,
        "num_hidden_layers": options.blocks,
        "num_attention_heads": options.heads,
        "vocab_size": options.vocabulary,
    }
    if not options.experts:
        return transformers.LlamaConfig(**shape, intermediate_size=options.inner)
    mixture = {"num_experts": options.experts, "num_experts_per_tok": options.chosen, "head_dim": 128}
    return transformers.Qwen3MoeConfig(**shape, **mixture, num_key_value_heads=4, moe_intermediate_size=options.inner)


def stored_shapes(empty: torch.nn.Module) -> dict[str, torch.Size]:
    """Return name -> shape of what a folder of the hub holds: every matrix of an expert by itself."""
    shapes: dict[str, torch.Size] = {}
    for name, tensor in empty.state_dict().items():
        start, _, kind = name.rpartition(".")
        if tensor.ndim < 3:
            shapes[name] = tensor.shape
            continue
        experts, rows, columns = tensor.shape
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert in range(experts):
            shapes |= {f"{start}.{expert}.{part}.weight": torch.Size((rows // len(parts), columns)) for part in parts}
    return shapes


def write_model(folder: Path, config: transformers.PreTrainedConfig) -> None:
    """Write a model of random weights and a tokenizer of one word for each id, one tensor in memory at a time."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in stored_shapes(empty).items()
    }
    bundles = [{name: tensor_header(name, tensor)} for name, tensor in state.items()]
    with ShardWriter(folder, bundles, 5 * 10**9) as shards:
        for name, tensor in state.items():
            numbers = torch.ones(tensor.shape)
            if tensor.ndim > 1:
                numbers = torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5
            shards.write({name: numbers.to(torch.bfloat16)})
    config.architectures, config.dtype = [type(empty).__name__], torch.bfloat16
    config.save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def main() -> None:
    """Make the model if it is not there, run, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for the model, the text and the run")
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--inner", type=int, default=13824)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture, whose inner width is each expert's")
    parser.add_argument("--chosen", type=int, default=8, help="experts that a token is sent to")
    parser.add_argument("--samples", type=int, default=4, help="calibration windows of 512 tokens")
    parser.add_argument("--stream", choices=("auto", "always", "never"), default="always")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, text = options.work / "model", options.work / "text.txt"
    if not model.exists():
        write_model(model, config_of(options))
    drawn = torch.randint(options.vocabulary, (20_000,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{number}" for number in drawn.tolist()))
    recipe = Recipe.from_mapping(
        {
            "model": str(model),
            "calibration": str(text),
            "eval_text": str(text),
            "stream": options.stream,
            "bits": 3,
            "rank": 16,
            "samples": options.samples,
            "seqlen": 512,
            "eval_windows": 2,
        }
    )
    watch, started = MemoryWatch(), time.perf_counter()
    # Its own one would forget the peak while the model is opened.
    job.MemoryWatch = lambda: watch  # type: ignore[attr-defined,assignment]
    summary = run(recipe, options.work / f"run-{options.stream}", console=Console(file=sys.stderr))
    figures = {
        "stream": options.stream,
        "weights_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "seconds": time.perf_counter() - started,
        "memory": dataclasses.asdict(watch.stop()),
        "stages": dict(summary.seconds),
        "hardware": describe_hardware(),
    }
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        write_json(options.json, figures)


if __name__ == "__main__":
    main()
