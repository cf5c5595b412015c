"""What a run takes of a GPU, and how long, counted for models of known shapes; nothing is computed."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from cloq_export.compress.block_shape import BlockShape, experts_per_token
from cloq_export.compress.cards import CARDS
from cloq_export.compress.device_memory import Placement
from cloq_export.compress.device_time import CardTime, run_work
from cloq_export.compress.strategies import TOKENS_PER_BATCH
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.experts import split_experts
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import Recipe

_COMMON: dict[str, Any] = {"vocab_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 4096}
BLOCKS = {"7B": 32, "13B": 40, "70B": 80, "30B-A3B": 48}
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
    call, states = stream.arguments(0), stream.hidden[0]
    shape = BlockShape.of(blocks.modules[0], call, states, ranks, experts_per_token(model))
    return dataclasses.replace(shape, alike=BLOCKS[name])


def print_memory(shapes: Mapping[tuple[str, str], tuple[BlockShape, Recipe]], card: float) -> None:
    """Print what each shape takes of a card's memory, gigabytes."""
    free = int(card * 10**9)
    print(f"| shape | preset | forward and statistics | solve | windows on {card:g} GB | batches wait in |")
    print("|---|---|---|---|---|---|")
    for (name, preset), (shape, recipe) in shapes.items():
        placement = Placement.of(shape, recipe, max(1, TOKENS_PER_BATCH // recipe.seqlen), free)
        sizes = [f"{stage.bytes / 10**9:.1f} GB" for stage in placement.stages]
        about = "" if shape.traced else " (estimated)"
        waiting = "host" if placement.parks else "device" if recipe.error_aware else "nowhere"
        windows = placement.windows_per_batch or "none fit"
        print(f"| {name}{about} | {preset} | {' | '.join(sizes)} | {windows} | {waiting} |")


def print_times(shapes: Mapping[tuple[str, str], tuple[BlockShape, Recipe]]) -> None:
    """Print the least seconds of each shape on known cards, and what takes most of them."""
    print(f"| shape | preset | {' | '.join(card.name for card in CARDS)} |")
    print(f"|---|---|{'---|' * len(CARDS)}")
    for (name, preset), (shape, recipe) in shapes.items():
        works = run_work([shape], recipe, narrow=True)
        times = [CardTime.of(works, card) for card in CARDS]
        cells = [f"{time.seconds:.0f} s, {time.dominating} {time.share:.0%}" for time in times]
        print(f"| {name}{'' if shape.traced else ' (estimated)'} | {preset} | {' | '.join(cells)} |")


def print_stages(name: str, shape: BlockShape, recipe: Recipe) -> None:
    """Print the least seconds of each stage of one shape on known cards."""
    works = run_work([shape], recipe, narrow=True)
    times = [CardTime.of(works, card) for card in CARDS]
    print(f"| stage of {name} | {' | '.join(card.name for card in CARDS)} |")
    print(f"|---|{'---|' * len(CARDS)}")
    for stage in times[0].stages:
        print(f"| {stage} | {' | '.join(f'{time.stages[stage]:.1f}' for time in times)} |")


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--card", type=float, default=80.0, help="free memory of the card, GB")
    parser.add_argument("--stages", default="7B", help="shape whose stages are printed")
    arguments = parser.parse_args()
    shapes = {}
    for name in SHAPES:
        for preset in ("default", "paper"):
            recipe = Recipe.from_mapping({"model": name}, preset=preset)
            shapes[name, preset] = shape_of(name, recipe), recipe
    print_memory(shapes, arguments.card)
    print()
    print_times(shapes)
    for preset in ("default", "paper"):
        print()
        print_stages(f"{arguments.stages}, {preset}", *shapes[arguments.stages, preset])


if __name__ == "__main__":
    main()
