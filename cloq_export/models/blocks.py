"""Find the decoder blocks of a model and the linear layers in a block that may be quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.experts import holds_fused_experts, split_fault

_ROUTER_NAMES = ("gate", "router", "shared_expert_gate", "shared_experts_gate")
_REFUSED_TYPES = {"rwkv": "divides its own weights whenever it begins to compute"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)


@dataclasses.dataclass(frozen=True)
class BlockList:
    """The decoder blocks of a model, in order of execution.

    Args:
        name: dotted path of the list inside the model, e.g. "model.layers".
        modules: the blocks themselves.
        hidden_size: numbers of a token between blocks; 0 if the config does not say.
        model_type: the model's family, as its config names it.
    """

    name: str
    modules: Sequence[nn.Module]
    hidden_size: int = 0
    model_type: str = ""

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def prefix(self, index: int) -> str:
        """Return the dotted path of block `index` inside the model, e.g. "model.layers.3"."""
        return f"{self.name}.{index}"


def find_blocks(model: nn.Module, path: str = "") -> BlockList:
    """Return the decoder blocks of a causal language model.

    Without a path, the outermost module lists that hold linear layers are candidates; the one with as many members as
    the configuration has hidden layers is taken when there are several.

    Args:
        model: a transformers causal language model, or any module that looks like one.
        path: dotted path of the block list, e.g. "model.layers"; empty to search.

    Returns:
        BlockList: name and modules.

    Raises:
        UnsupportedModelError: the path leads nowhere, or the search finds no list, or several it cannot tell apart.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    return dataclasses.replace(
        _blocks_at(model, path) if path else _search_blocks(model, config),
        hidden_size=getattr(text_config, "hidden_size", None) or 0,
        model_type=getattr(config, "model_type", ""),
    )


def _search_blocks(model: nn.Module, config: object) -> BlockList:
    architecture = type(model).__name__
    reason = _REFUSED_TYPES.get(getattr(config, "model_type", ""))
    if reason:
        raise UnsupportedModelError(f"{architecture} {reason}, so codes cannot stand for them. Choose another model.")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{architecture} is an encoder-decoder; only decoder-only (causal) language models can be quantized. "
            "Choose a causal language model."
        )
    candidates = _candidates(model)
    if len(candidates) > 1:
        candidates = _of_decoder(candidates, model)
    if len(candidates) > 1:
        candidates = _of_configured_length(candidates, config)
    if len(candidates) == 1:
        return candidates[0]
    raise UnsupportedModelError(
        f"the decoder blocks of {architecture} were not recognised; {_describe_candidates(model)}. "
        "Name the list of blocks with `blocks`, e.g. `blocks=model.layers`."
    )


def find_linears(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Return the linear layers of one block that may be quantized, in order of definition.

    The routers of a mixture of experts are left out: they are tiny, and a wrong routing decision costs more than any
    rounding. So are classes that use their weight otherwise than as one matrix. Token embeddings and the output head
    are not part of a block, so they are never returned.

    Args:
        block: one decoder block.
        prefix: dotted path of the block inside the model; it starts every returned name.

    Returns:
        dict: full module name -> linear layer.

    Raises:
        UnsupportedModelError: the block keeps weights in a form that is not a plain linear layer (fused expert
            tensors, GPT-2's Conv1D), or has no linear layer at all.
    """
    _refuse_other_weights(block, prefix)
    routers = set(_routers(block))
    linears = {
        f"{prefix}.{name}" if prefix else name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in routers and _multiplies_by_its_weight(module)
    }
    if not linears:
        raise UnsupportedModelError(
            f"{prefix or type(block).__name__} ({type(block).__name__}) holds no torch.nn.Linear; only linear layers "
            "can be quantized. Name another list of blocks with `blocks`, e.g. `blocks=model.layers`."
        )
    return linears


def _blocks_at(model: nn.Module, path: str) -> BlockList:
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module {path!r}; {_describe_candidates(model)}. "
            "Name one of them with `blocks`."
        ) from None
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) == 0:
        raise UnsupportedModelError(
            f"{path!r} is a {type(blocks).__name__}, not a list of blocks; {_describe_candidates(model)}. "
            "Name one of them with `blocks`."
        )
    return BlockList(path, list(blocks))


def _candidates(model: nn.Module) -> list[BlockList]:
    """Return the outermost module lists every member of which holds a weight that multiplies activations."""
    lists: list[BlockList] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer.name}.") for outer in lists):
            continue
        if all(any(_multiplies(part) for part in member.modules()) for member in module):
            lists.append(BlockList(name, list(module)))
    return lists


@torch.no_grad()
def _multiplies_by_its_weight(linear: nn.Linear) -> bool:
    """Return whether a linear layer computes `x W^T + b`, which a class of its own need not (DeepSeek V4's groups)."""
    if type(linear).forward is nn.Linear.forward:
        return True
    x = torch.linspace(-1.0, 1.0, 2 * linear.in_features).view(2, -1).to(linear.weight.device, linear.weight.dtype)
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    try:
        put_out = linear(x)
    except (RuntimeError, ValueError, IndexError):  # it takes tokens of another shape
        return False
    close = isinstance(put_out, torch.Tensor) and put_out.shape == expected.shape
    return close and bool(torch.allclose(put_out, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())))


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_gpt2_conv1d(module)


def _is_gpt2_conv1d(module: nn.Module) -> bool:
    # Recognised by name: importing transformers for one class would cost every caller a second.
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _of_decoder(candidates: list[BlockList], model: nn.Module) -> list[BlockList]:
    """Return the list that is the decoder's own, where the model says which of its parts that is."""
    find: Any = getattr(model, "get_decoder", None)
    decoder = None if find is None else find()
    name = next((name for name, module in model.named_modules() if module is decoder), None)
    if name is None:
        return candidates
    inside = [candidate for candidate in candidates if not name or candidate.name.startswith(f"{name}.")]
    children = [candidate for candidate in inside if candidate.name.rpartition(".")[0] == name]
    return next((chosen for chosen in (inside, children) if len(chosen) == 1), candidates)


def _of_configured_length(candidates: list[BlockList], config: object) -> list[BlockList]:
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    layers = getattr(text_config, "num_hidden_layers", None)
    matching = [candidate for candidate in candidates if len(candidate) == layers]
    return matching if len(matching) == 1 else candidates


def _describe_candidates(model: nn.Module) -> str:
    names = [f"{candidate.name} ({len(candidate)} blocks)" for candidate in _candidates(model)]
    return f"lists with linear layers: {', '.join(names)}" if names else "no list of modules with linear layers exists"


def _routers(block: nn.Module) -> Iterator[str]:
    """Yield the names of router linears: those beside or inside a gate of a module that owns `experts`."""
    for name, module in block.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        count = len(experts) if isinstance(experts, (nn.ModuleList, nn.ModuleDict)) else None
        for child_name, child in module.named_children():
            if child_name == "experts":
                continue
            for inner_name, inner in child.named_modules(prefix=child_name):
                if not isinstance(inner, nn.Linear):
                    continue
                if child_name in _ROUTER_NAMES or (inner is child and inner.out_features == count):
                    yield f"{name}.{inner_name}" if name else inner_name


def _refuse_other_weights(block: nn.Module, prefix: str) -> None:
    for name, module in block.named_modules():
        full = ".".join(part for part in (prefix, name) if part)
        if _is_gpt2_conv1d(module):
            raise UnsupportedModelError(
                f"{full} is a transformers Conv1D (GPT-2's transposed linear layer); only torch.nn.Linear can be "
                "quantized. Choose a model whose blocks are made of linear layers."
            )
        if isinstance(module, (nn.Linear, nn.Embedding, *_CONVOLUTIONS)):
            continue
        if holds_fused_experts(module) or _stacks_experts(name, module):
            fault = split_fault(module) or "split_experts was not called"
            raise UnsupportedModelError(
                f"{full} ({type(module).__name__}) holds all experts in one tensor, and they cannot be cut into linear "
                f"layers: {fault}. Choose a model of another architecture."
            )


def _stacks_experts(name: str, module: nn.Module) -> bool:
    # DBRX stacks its experts along the rows of a matrix.
    return "experts" in name.split(".") and any(weight.ndim > 1 for weight in module.parameters(recurse=False))
