"""Fused experts as the linear layers that they are: one expert after the other, with weights that can be exchanged.

transformers keeps the experts of a mixture in one tensor for all gates and ups and one for all downs, and computes them
by a function of its table `ALL_EXPERTS_FUNCTIONS`. What a class may store differently (transposed, gate and up row by
row, biases, no gate, clamps) its decorator `use_experts_implementation` writes on every module, and that is all that is
read here: no architecture is known by name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import nn

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.placeholders import is_placeholder

# Which experts are called, and with which tokens: "routed" calls those that the router chose, with their tokens; so
# does "visited", and calls the others with no token, so that hooks see every expert in order; "all" calls every expert
# with every token. What the mixture puts out is the same.
Calls = Literal["routed", "visited", "all"]

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_GATE_UP = "gate_up_proj"
_BIAS = "_bias"

# Of the largest output, where a mixture is computed split and fused.
_ALLOWED, _ALLOWED_NARROW = 1e-4, 3e-2
_TRIED_TOKENS = 5


@dataclasses.dataclass(frozen=True)
class ExpertStorage:
    """How a module holds its experts.

    Args:
        experts: how many.
        gated: there is a gate beside each up.
        transposed: weights are (experts, in, out).
        interleaved: gate and up alternate row by row; otherwise all gates come first.
        biased: every linear has a bias.
        sorted_tokens: the module is called with the tokens of each expert one after the other, and no routing.
    """

    experts: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    sorted_tokens: bool

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return fused tensor -> the projections that it holds."""
        return {_GATE_UP: (GATE, UP), DOWN: (DOWN,)} if self.gated else {UP: (UP,), DOWN: (DOWN,)}

    def cut(self, tensor: torch.Tensor, number: int, parts: tuple[str, ...], *, weight: bool) -> list[torch.Tensor]:
        """Return the tensors of one expert's projections, views of the fused one where rows lie together."""
        mine = tensor.detach()[number]
        if weight and self.transposed:
            mine = mine.T
        if len(parts) == 1:
            cut = [mine]
        elif self.interleaved:
            cut = [mine[0::2], mine[1::2]]
        else:
            cut = list(mine.chunk(2))
        # What stands for experts that are left on disk stays one number.
        return [piece if is_placeholder(piece) else piece.contiguous() for piece in cut]

    def join(self, pieces: list[list[torch.Tensor]], *, weight: bool) -> torch.Tensor:
        """Return the fused tensor of all experts' pieces, what `cut` was given."""
        return torch.stack([self._join_one(of_expert, weight=weight) for of_expert in pieces])

    def _join_one(self, pieces: list[torch.Tensor], *, weight: bool) -> torch.Tensor:
        if len(pieces) == 1:
            joined = pieces[0]
        elif self.interleaved:
            joined = torch.stack(pieces, 1).flatten(0, 1)
        else:
            joined = torch.cat(pieces)
        return joined.T if weight and self.transposed else joined


class Expert(nn.Module):
    """One expert: `down_proj(activation(gate_proj(x), up_proj(x)))`, with the activation of its family.

    Args:
        linears: projection -> linear layer.
        family: the module that the expert was stored in, which holds no tensor any more; it gives the activation.
        interleaved: the family's activation takes gate and up alternately.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, linears: dict[str, nn.Linear], family: nn.Module, *, interleaved: bool) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        # Held in a tuple: it is no part of the model any more, and its names must not show up.
        self._family = (family,)
        self._interleaved = interleaved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the expert puts out, (tokens, hidden)."""
        return self.down_proj(self.activated(x))  # type: ignore[no-any-return]

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `down_proj` is given for the expert's inputs."""
        family: Any = self._family[0]
        if not hasattr(self, GATE):
            return family.act_fn(self.up_proj(x))  # type: ignore[no-any-return]
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not hasattr(family, "_apply_gate"):
            return family.act_fn(gate) * up  # type: ignore[no-any-return]
        both = torch.stack((gate, up), -1).flatten(-2) if self._interleaved else torch.cat((gate, up), -1)
        return family._apply_gate(both)  # type: ignore[no-any-return]


class SplitExperts(nn.ModuleList):
    """The experts of one mixture, in the place of the module of its family that held them fused.

    Its linears are ordinary ones (`experts.3.gate_proj`), so they can be hooked, exchanged for packed ones and given
    adapters. It is called as the family's module is.

    Args:
        family: the fused module; it is emptied.
    """

    def __init__(self, family: nn.Module) -> None:
        storage = storage_of(family)
        if isinstance(storage, str):
            raise UnsupportedModelError(f"the experts of {type(family).__name__} cannot be split: {storage}.")
        experts: list[dict[str, nn.Linear]] = [{} for _ in range(storage.experts)]
        for fused, parts in storage.parts.items():
            weight, bias = getattr(family, fused), getattr(family, fused + _BIAS, None)
            for number, linears in enumerate(experts):
                weights = storage.cut(weight, number, parts, weight=True)
                biases = storage.cut(bias, number, parts, weight=False) if bias is not None else [None] * len(parts)
                for part, of_part, bias_of_part in zip(parts, weights, biases, strict=True):
                    linears[part] = _linear(of_part, bias_of_part, trainable=weight.requires_grad)
        family._parameters.clear()
        in_order = (GATE, UP, DOWN)
        ordered = ({name: linears[name] for name in in_order if name in linears} for linears in experts)
        super().__init__(Expert(linears, family, interleaved=storage.interleaved) for linears in ordered)
        self._family = (family,)
        self.storage = storage
        self.calls: Calls = "routed"

    def expert(self, number: int) -> Expert:
        """Return one expert."""
        return cast(Expert, self[number])

    @property
    def family(self) -> nn.Module:
        """Return the module of the family, without its tensors."""
        return self._family[0]

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Return fused tensor of the family -> the projections that it holds, in order."""
        return self.storage.parts

    def forward(self, hidden_states: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """Return the sum of the chosen experts' outputs, weighted as the router says, in the shape of the input.

        Args:
            hidden_states: (tokens, hidden); where the family sorts tokens by expert, (experts * tokens, hidden) with
                zeros for tokens of others.
            args: the chosen experts, (tokens, chosen) int64, and their weights, same shape; nothing of sorted tokens.
            kwargs: the same by name.
        """
        if self.storage.sorted_tokens:
            return self._forward_sorted(hidden_states)
        given = (*args, *kwargs.values())
        chosen = next(tensor for tensor in given if not tensor.is_floating_point())
        weights = next(tensor for tensor in given if tensor.is_floating_point())
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        per_token = chosen.shape[-1]
        chosen, weights = chosen.reshape(-1), weights.reshape(-1)
        # Stable, so that the tokens of an expert come in order. Numbers beyond the experts are ignored, as in the
        # family's own function.
        order = torch.argsort(chosen, stable=True)
        ends = torch.searchsorted(chosen[order], torch.arange(len(self), device=chosen.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        result = torch.zeros(tokens.shape, dtype=torch.promote_types(tokens.dtype, weights.dtype), device=tokens.device)
        end = 0
        for expert, count in zip(self, counts, strict=True):
            places = order[end : end + count]
            end += count
            if not count and self.calls == "routed":
                continue
            rows = places // per_token
            put_out = expert(tokens)[rows] if self.calls == "all" else expert(tokens[rows])
            result.index_add_(0, rows, (put_out * weights[places, None]).to(result.dtype))
        return result.to(hidden_states.dtype).view_as(hidden_states)

    def _forward_sorted(self, hidden_states: torch.Tensor) -> torch.Tensor:
        stacks = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        every = self._any_input(stacks) if self.calls == "all" else None
        result = torch.zeros_like(stacks)
        for number, expert in enumerate(self):
            # A token of another expert was multiplied by zero, and an expert without biases makes zero of it.
            mine = (stacks[number] != 0).any(-1)
            if every is not None:
                result[number, mine] = expert(torch.where(mine[:, None], stacks[number], every))[mine].to(result.dtype)
            elif self.calls == "visited" or bool(mine.any()):
                result[number, mine] = expert(stacks[number, mine]).to(result.dtype)
        return result.view_as(hidden_states)

    @staticmethod
    def _any_input(stacks: torch.Tensor) -> torch.Tensor:
        """Return each token as its own experts are given it."""
        return stacks.sum(0) / (stacks != 0).any(-1).sum(0).clamp(min=1)[:, None]

    def inputs_of_all(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the mixture, (tokens, hidden), as an expert that all are sent to is given them."""
        if self.storage.sorted_tokens:
            return self._any_input(hidden_states.view(len(self), -1, hidden_states.shape[-1]))
        return hidden_states.reshape(-1, hidden_states.shape[-1])

    def fused(self) -> nn.Module:
        """Return the family's module with copies of all weights, as it was before the split."""
        family = copy.copy(self._family[0])
        family._parameters = {}
        for fused, parts in self.parts.items():
            linears = [[getattr(expert, part) for part in parts] for expert in self]
            weights = self.storage.join([[one.weight.detach() for one in of] for of in linears], weight=True)
            family.register_parameter(fused, nn.Parameter(weights.contiguous(), requires_grad=False))
            if self.storage.biased:
                biases = self.storage.join([[one.bias.detach() for one in of] for of in linears], weight=False)
                family.register_parameter(fused + _BIAS, nn.Parameter(biases.contiguous(), requires_grad=False))
        return family


def split_experts(model: nn.Module) -> None:
    """Put `SplitExperts` in the place of every module that holds experts fused, as far as they compute the same.

    What cannot be split is left as it is; `find_linears` refuses it by name, with the reason of `split_fault`.

    Args:
        model: any module, with numbers or on the meta device.
    """
    tried: dict[tuple[Any, ...], str | None] = {}
    for name, module in [entry for entry in model.named_modules() if holds_fused_experts(entry[1])]:
        build = (type(module), *((key, tensor.shape) for key, tensor in module.named_parameters(recurse=False)))
        if build not in tried:
            tried[build] = split_fault(module)
        if tried[build] is None:
            model.set_submodule(name, SplitExperts(module))


@contextlib.contextmanager
def fused_experts(model: nn.Module) -> Iterator[None]:
    """Hold the experts as the family stores them for a while, e.g. to save the model as transformers does."""
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    for name, module in split.items():
        model.set_submodule(name, module.fused())
    try:
        yield
    finally:
        for name, module in split.items():
            model.set_submodule(name, module)


@contextlib.contextmanager
def calling_experts(model: nn.Module, calls: Calls) -> Iterator[None]:
    """Let every mixture of a model call its experts in another way for a while."""
    mixtures = [module for module in model.modules() if isinstance(module, SplitExperts)]
    before = [mixture.calls for mixture in mixtures]
    for mixture in mixtures:
        mixture.calls = calls
    try:
        yield
    finally:
        for mixture, was in zip(mixtures, before, strict=True):
            mixture.calls = was


def holds_fused_experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of several experts in one tensor."""
    # DBRX and JetMoE give theirs other names, and DBRX stacks experts along the rows of a matrix.
    named = "Expert" in type(module).__name__
    stacked = {name: tensor for name, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3}
    return bool({_GATE_UP, UP, DOWN} & set(stacked)) or (named and bool(stacked))


def split_fault(module: nn.Module) -> str | None:
    """Return why a module's experts cannot be split into linear layers; None if they can.

    On the meta device only the shapes are looked at. Otherwise both forms are computed on a few tokens.

    Args:
        module: one that `holds_fused_experts`.
    """
    storage = storage_of(module)
    if isinstance(storage, str):
        return storage
    weight: torch.Tensor = getattr(module, DOWN)
    if weight.device.type == "meta":
        return None
    arguments = _tried_arguments(storage, weight, getattr(module, next(iter(storage.parts))))
    alone = copy.copy(module)
    alone._parameters = dict(module._parameters)
    with torch.no_grad():
        try:
            expected = module(*arguments)
        except Exception as error:  # a class that is called in an unexpected way may raise anything
            return f"its class is not called with tokens, chosen experts and weights ({type(error).__name__})"
        split = SplitExperts(alone)(*arguments)
    if expected.shape != split.shape:
        return f"its class puts out {tuple(expected.shape)}, the experts as linear layers {tuple(split.shape)}"
    allowed = _ALLOWED if weight.element_size() >= 4 else _ALLOWED_NARROW
    difference = float((split - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not difference <= allowed:
        return f"as linear layers they compute something else, {difference:.1e} apart where {allowed:g} is allowed"
    return None


def storage_of(module: nn.Module) -> ExpertStorage | str:
    """Return how a module holds its experts, or why that is not known."""
    tensors = dict(module.named_parameters(recurse=False))
    gated = bool(getattr(module, "has_gate", _GATE_UP in tensors))
    first = _GATE_UP if gated else UP
    biased = f"{DOWN}{_BIAS}" in tensors
    expected = {first, DOWN} | ({first + _BIAS, DOWN + _BIAS} if biased else set())
    inner = [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in expected]
    if set(tensors) != expected or inner:
        held = ", ".join([*tensors, *(name for name in inner if name not in tensors)])
        return f"its class holds {held}, and {_GATE_UP} or {UP}, and {DOWN} is what is known"
    up, down = tensors[first], tensors[DOWN]
    if up.ndim != 3 or down.ndim != 3 or len(up) != len(down):
        return f"{first} has shape {tuple(up.shape)} and {DOWN} {tuple(down.shape)}, which are not as many experts"
    width = 2 if gated else 1
    straight = (up.shape[1], up.shape[2]) == (width * down.shape[2], down.shape[1])
    turned = (up.shape[2], up.shape[1]) == (width * down.shape[1], down.shape[2])
    if not straight and not turned:
        return f"{first} of shape {tuple(up.shape)} does not fit {DOWN} of shape {tuple(down.shape)}"
    parameters = [one for name, one in inspect.signature(type(module).forward).parameters.items() if name != "self"]
    variadic = any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)
    return ExpertStorage(
        experts=len(down),
        gated=gated,
        transposed=bool(getattr(module, "is_transposed", not straight)),
        interleaved=not getattr(module, "is_concatenated", True),
        biased=biased,
        sorted_tokens=len(parameters) == 1 and not variadic and not biased,
    )


def _tried_arguments(storage: ExpertStorage, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a few tokens, and experts for each of them, whose outputs tell whether the split computes the same."""
    generator = torch.Generator().manual_seed(0)
    width = up.shape[1] if storage.transposed else up.shape[2]
    per_token = min(2, storage.experts)
    chosen = torch.stack(
        [torch.randperm(storage.experts, generator=generator)[:per_token] for _ in range(_TRIED_TOKENS)]
    )
    weights = torch.rand(chosen.shape, generator=generator)
    tokens = torch.randn(_TRIED_TOKENS, width, generator=generator)
    if storage.sorted_tokens:
        shares = torch.zeros(storage.experts, _TRIED_TOKENS).scatter_(0, chosen.T, weights.T)
        return ((shares[..., None] * tokens).reshape(-1, width).to(down.device, down.dtype),)
    return (tokens.to(down.device, down.dtype), chosen.to(down.device), weights.to(down.device, down.dtype))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, *, trainable: bool) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=trainable)
    return linear
