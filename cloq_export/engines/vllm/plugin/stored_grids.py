"""The grids of a checkpoint's modules under the names that vLLM has for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.formats.layout import StoredGrids

_USUAL_PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def grids_of_files(checkpoint: Checkpoint) -> StoredGrids:
    """Return the grids of a checkpoint's modules under their names in the files, by which vLLM goes."""
    specs = {checkpoint.stored_module(module): spec for module, spec in checkpoint.specs.items()}
    grids = checkpoint.grids
    own = {module: spec for module, spec in specs.items() if spec != grids.default}
    # What the config says of modules that stay float is kept: they are in no list.
    apart = {module: spec for module, spec in grids.overrides.items() if spec is None}
    return dataclasses.replace(grids, modules=tuple(sorted(specs)), overrides={**apart, **own}, rules=())


def mapped_grids(grids: StoredGrids, hf_to_vllm_mapper: Any) -> StoredGrids:
    """Return the same with modules renamed as the model of vLLM does."""
    modules = grids.modules
    return dataclasses.replace(
        grids,
        modules=None if modules is None else tuple(hf_to_vllm_mapper.apply_list(list(modules))),
        overrides=hf_to_vllm_mapper.apply_dict(dict(grids.overrides)),
    )


def modules_of(prefix: str, grids: StoredGrids, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the modules of a checkpoint that a linear layer of vLLM is made of.

    Args:
        prefix: name of the layer.
        grids: of the checkpoint.
        packed: vLLM's table for the model: last part of a fused layer's name -> those of its modules.
    """
    parent, dot, last = prefix.rpartition(".")
    # Some classes of vLLM add to their table after they have handed it over, as Qwen3-MoE does for dense layers.
    parts = packed.get(last) or _USUAL_PARTS.get(last)
    if not parts or grids.spec_for(prefix) is not None:
        # A layer that is fused in the checkpoint too is listed under its own name.
        return [prefix]
    return [f"{parent}{dot}{part}" for part in parts]
