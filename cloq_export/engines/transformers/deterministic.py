"""Models whose tokens get the same bits whatever else is in the batch.

Packed layers have kernels for it. The other parts of a transformer whose numbers depend on the batch are float linears,
the head above all, which libraries multiply in an order that they pick by size, and activation functions, whose last
elements torch computes by other means than those before. Both are replaced. Norms and rotary embeddings are computed
row by row as they are, and attention text by text, in an order that depends on the lengths of what is read and what was
read before. So each text of a batch that is filled up to one length is attended to by itself, without what fills it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.errors import UnsupportedModelError, UsageError
from cloq_export.kernels import cpu
from cloq_export.kernels.cpu.dense import dense_linear

_ATTENTION = "cloq_deterministic_sdpa"
# From four on torch multiplies a text's queries and keys in one order.
_QUERIES = 8


def make_deterministic(model: nn.Module) -> None:
    """Let a model that only serves, on the CPU, give a token the same bits in every batch.

    Args:
        model: changed in place.

    Raises:
        UsageError: there is no native library for its layers.
        UnsupportedModelError: a part of the model is not known to allow it.
    """
    _refuse_unknown_parts(model)
    _replace_attention(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            if module.native is None:
                raise UsageError(
                    f"deterministic=True is for layers of the native library on the CPU. {cpu.describe()} Leave it out."
                )
            module.make_deterministic()
        elif type(module) is nn.Linear:
            module.__class__ = DeterministicLinear
        elif _name_of(module) in _ACTIVATIONS:
            function = _ACTIVATIONS[_name_of(module)]
            if function is not None:
                module.forward = function  # type: ignore[method-assign]


def _replace_attention(model: nn.Module) -> None:
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    for part in parts:
        if part.config._attn_implementation != "sdpa":
            raise UnsupportedModelError(
                f"{type(part).__name__} computes attention by {part.config._attn_implementation!r}, of which it is not "
                "known whether a token's numbers depend on its batch; load the model without deterministic=True."
            )
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    for part in parts[:1]:  # the model itself, which tells its parts
        part.set_attn_implementation(_ATTENTION)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention text by text, with few queries filled up: torch deals out the products of one to three.

    Args:
        module: the attention layer.
        query: (batch, heads, queries, width).
        key: (batch, key heads, tokens, width).
        value: (batch, key heads, tokens, width).
        attention_mask: (batch, 1, queries, tokens) bool, or None where all texts have one length.
        options: as transformers passes them.

    Returns:
        (outputs, None): (batch, queries, heads, width).

    Raises:
        UnsupportedModelError: keys and values differ in width, which torch computes in another way, or the mask or the
            cache does not say where a text begins and ends.
    """
    if query.shape[-1] != value.shape[-1]:
        raise UnsupportedModelError(
            f"keys of width {query.shape[-1]} with values of width {value.shape[-1]} are computed in an order that "
            "depends on the batch; load the model without deterministic=True."
        )
    causal = options.pop("is_causal", None)
    if attention_mask is None:
        causal = query.shape[2] > 1 and getattr(module, "is_causal", True) if causal is None else causal
        return _attend_alike(module, (query, key, value), None, causal, options), None
    if attention_mask.dtype != torch.bool:
        raise UnsupportedModelError(
            "a mask of numbers that are added does not say where a text ends; give an attention_mask of two dimensions "
            "or load the model without deterministic=True."
        )
    output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for number, mask in enumerate(attention_mask.expand(query.shape[0], -1, -1, -1)[:, 0]):
        rows, columns = _read_places(mask)
        seen = mask[rows][:, columns]
        whole = bool(seen.all())
        causal = not whole and torch.equal(seen, torch.ones_like(seen).tril())
        parts = query[number, :, rows][None], key[number, :, columns][None], value[number, :, columns][None]
        alone = None if whole or causal else seen[None, None]
        output[number, rows] = _attend_alike(module, parts, alone, causal, options)[0]
    return output, None


def _read_places(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries and the keys of a text that do not merely fill it up.

    Args:
        mask: (queries, tokens) bool, true where a query reads a key; the queries are the last of the tokens.

    Returns:
        (rows, columns): int64 each.

    Raises:
        UnsupportedModelError: the queries do not stand at the end of the keys.
    """
    rows = mask.diagonal(mask.shape[1] - mask.shape[0]).nonzero()[:, 0]
    columns = mask.any(0).nonzero()[:, 0]
    if len(columns) and not len(rows):
        raise UnsupportedModelError(
            "the new tokens of a text are not the last of its keys, as with a cache of fixed size; use a cache that "
            "grows, or load the model without deterministic=True."
        )
    return rows, columns


def _attend_alike(
    module: nn.Module,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    causal: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return (batch, queries, heads, width) for texts of one length, of which nothing is left out."""
    query, key, value = parts
    queries = query.shape[2]
    if queries < _QUERIES:
        query = _filled_up(query)
        attention_mask = None if attention_mask is None else _filled_up(attention_mask)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=causal, **options)
    return output[:, :queries]


def _filled_up(rows: torch.Tensor) -> torch.Tensor:
    """Return (batch, heads, _QUERIES, width) with the last row repeated."""
    last = rows[:, :, -1:].expand(-1, -1, _QUERIES - rows.shape[2], -1)
    return torch.cat([rows, last], 2)


class DeterministicLinear(nn.Linear):
    """A float linear layer with one order of addition; it only serves."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `x W^T + bias`.

        Raises:
            UsageError: gradients are asked for.
        """
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            raise UsageError("a deterministic model only serves; load it without deterministic=True to train it.")
        return dense_linear(input, self.weight, self.bias)


def _silu(input: torch.Tensor) -> torch.Tensor:
    return input / (1 + torch.exp(-input))


def _gelu_tanh(input: torch.Tensor) -> torch.Tensor:
    inner = 0.7978845608028654 * (input + 0.044715 * (input * input * input))
    return 0.5 * input * (1 + torch.tanh(inner))


def _sigmoid(input: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-input))


# Class of an activation function -> what computes it here; None where torch gives every element the same.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "SiLU": _silu,
    "SiLUActivation": _silu,
    "GELUTanh": _gelu_tanh,
    "PytorchGELUTanh": _gelu_tanh,
    "Sigmoid": _sigmoid,
    "GELU": None,
    "GELUActivation": None,
    "NewGELUActivation": None,
    "ReLU": None,
    "ReLUSquaredActivation": None,
    "Tanh": None,
}


def _name_of(module: nn.Module) -> str:
    return type(module).__name__


def _refuse_unknown_parts(model: nn.Module) -> None:
    """Refuse matrices that some other module multiplies by itself, and activation functions that are not known."""
    classes: set[Any] = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    for name, module in model.named_modules():
        matrices = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        activation = type(module) in classes and _name_of(module) not in _ACTIVATIONS
        if (matrices and not isinstance(module, (nn.Linear, nn.Embedding))) or activation:
            raise UnsupportedModelError(
                f"{name} is a {_name_of(module)}, of which it is not known whether a token's numbers depend on its "
                "batch; load the model without deterministic=True."
            )
