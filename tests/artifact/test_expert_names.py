"""Single experts are called in files as the model's own files call them, in every family, and are found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny_mixtures import MIXTURES, build_mixture

from cloq_export.artifact.stored_names import renamed_in, stored_names
from cloq_export.models.experts import SplitExperts, split_experts

# Files of these families hold all experts in one tensor, or transformers reads no others.
FUSED_IN_FILES = {"gpt-oss", "llama4", "granite-moe", "granite-hybrid"}
W = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def expert_modules(model: Any) -> list[str]:
    return [
        f"{name}.{number}.{part}"
        for name, mixture in model.named_modules()
        if isinstance(mixture, SplitExperts)
        for number in range(len(mixture))
        for parts in mixture.parts.values()
        for part in parts
    ]


def held_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", MIXTURES)
def test_single_experts_have_the_names_of_the_models_own_files(family: str, tmp_path: Path) -> None:
    model = build_mixture(family)
    model.save_pretrained(tmp_path)
    held = held_in(tmp_path)
    split_experts(model)
    modules = expert_modules(model)
    stored = stored_names(model, [], modules)
    in_files = {module: stored.get(module, module) for module in modules}
    if family in FUSED_IN_FILES:
        assert in_files == {module: module for module in modules}
    else:
        assert {f"{name}.weight" for name in in_files.values()} <= held
    packed = {f"{in_files[module]}.qweight": f"{module}.qweight" for module in modules}
    renamed = renamed_in(model, packed)
    assert {name: renamed.get(name, name) for name in packed} == packed


@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", "block_sparse_moe.experts"),
        ("minimax-m2", "block_sparse_moe.experts"),
        ("lfm2-moe", "feed_forward.experts"),
    ],
)
def test_gate_up_and_down_are_not_exchanged(family: str, experts: str) -> None:
    model = build_mixture(family)
    split_experts(model)
    name = next(name for name in expert_modules(model) if ".3." in name).rpartition(".3.")[0]
    stored = stored_names(model, [], expert_modules(model))
    for part, short in W.items():
        assert stored[f"{name}.3.{part}"] == f"{name.rpartition('.')[0].rpartition('.')[0]}.{experts}.3.{short}"
