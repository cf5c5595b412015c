"""What a run takes of a GPU, counted for models of known shapes: nothing is computed, and no GPU is needed."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers

from cloq_export.compress.device_memory import BlockShape, fitting_windows, walk_stages
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.experts import split_experts
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import Recipe

_COMMON: dict[str, Any] = {"vocab_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 4096}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "7B": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}),
    "13B": ("LlamaConfig", {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40}),
    "70B": (
        "LlamaConfig",
        {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    ),
    "30B-A3B": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
}


def shape_of(name: str, recipe: Recipe) -> BlockShape:
    """Return the shape of a block of a model, whose weights are zeros in bfloat16."""
    kind, sizes = SHAPES[name]
    config = getattr(transformers, kind)(**_COMMON, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    split_experts(model)
    blocks = find_blocks(model, "")
    stream = BlockStream(model, blocks, torch.zeros(1, recipe.seqlen, dtype=torch.int64), device="cpu")
    ranks = {name: 0 if ".experts." in name else recipe.rank for name in find_linears(blocks.modules[0], "")}
    return BlockShape.of(blocks.modules[0], stream.arguments(0), stream.hidden[0], ranks)


def main() -> None:
    """Print one line for each shape and preset, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", type=float, default=80.0, help="free memory of the card, GB")
    arguments = parser.parse_args()
    free = int(arguments.card * 10**9)
    print(f"| shape | preset | forward and statistics | solve | windows on {arguments.card:g} GB |")
    print("|---|---|---|---|---|")
    for name in SHAPES:
        for preset in ("default", "paper"):
            recipe = Recipe.from_mapping({"model": name}, preset=preset)
            usual = max(1, 4096 // recipe.seqlen)
            shape = shape_of(name, recipe)
            batch = fitting_windows(shape, recipe, usual, free)
            sizes = [f"{stage.bytes / 10**9:.1f} GB" for stage in walk_stages(shape, recipe, batch or 1, free)]
            about = "" if shape.traced else " (estimated)"
            print(f"| {name}{about} | {preset} | {' | '.join(sizes)} | {batch or 'none fit'} |", flush=True)


if __name__ == "__main__":
    main()
