"""Pairs of experts in PEFT's form for models that hold all experts of a mixture in one tensor; SPEC.md section 6.

PEFT adapts such a tensor by its name (`target_parameters`), with one A and one B for each expert: gate and up, which
lie in one tensor, share the A. Two pairs that do not share theirs are one pair of both ranks, whose B is zero where the
one's outputs meet the other's A.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from cloq_export.errors import FormatError
from cloq_export.types import LoraPair

_INSIDE = ".base_layer"
# PEFT takes linear layers of these names for projections of fused experts, in families that have such.
_TAKEN_FOR_EXPERTS = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """One tensor of a model that holds the same projections of all experts of a mixture.

    Args:
        parameter: its full name, e.g. "model.layers.0.mlp.experts.gate_up_proj".
        experts: how many.
        parts: the projections that it holds, in order.
        interleaved: outputs of two projections alternate; otherwise all of the first come first.
        ranks: of each projection's own rows of A; None if every projection uses all rows.
        turned: it holds weights as (in, out), and its class does not say so; for PEFT the product then is `A^T B^T`.
    """

    parameter: str
    experts: int
    parts: tuple[str, ...]
    interleaved: bool = False
    ranks: tuple[int, ...] | None = None
    turned: bool = False

    @property
    def mixture(self) -> str:
        """Return the name of the module that has the tensor."""
        return self.parameter.rpartition(".")[0]

    def linears(self, expert: int) -> list[str]:
        """Return what the projections of one expert are called as linear layers of their own."""
        return [f"{self.mixture}.{expert}.{part}" for part in self.parts]

    def to_json(self) -> dict[str, Any]:
        """Return it as an object of the binding file."""
        return {**dataclasses.asdict(self), "parts": list(self.parts), "ranks": self.ranks and list(self.ranks)}

    @classmethod
    def of_json(cls, fields: Any, source: str) -> ExpertStack:
        """Return it from such an object.

        Raises:
            FormatError: the object is another.
        """
        try:
            parameter, experts, parts, ranks = (fields[name] for name in ("parameter", "experts", "parts", "ranks"))
            numbers = [experts, *(ranks or [])]
            if not (
                isinstance(parameter, str)
                and all(isinstance(part, str) for part in parts)
                and all(type(number) is int and 1 <= number < 2**20 for number in numbers)
                and len(parts) in (1, 2)
                and (ranks is None or len(ranks) == len(parts))
            ):
                raise ValueError
            interleaved, turned = (fields[name] is True for name in ("interleaved", "turned"))
            stack = cls(parameter, experts, tuple(parts), interleaved, ranks and tuple(ranks), turned)
        except (KeyError, TypeError, ValueError):
            raise FormatError(f"{source}: stacked_experts is damaged; copy the adapter again.") from None
        return stack


@dataclasses.dataclass(frozen=True)
class StackedPair:
    """The pairs of all experts for one tensor.

    Args:
        lora_A: (experts * rank, in), the rows of one expert together; out in the place of in where the tensor is
            turned.
        lora_B: (out, rank * experts), the columns of one rank together.
        rank: of one expert.
        alpha: of one expert; its product is scaled by alpha / rank.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    rank: int
    alpha: float


def stack_pairs(stack: ExpertStack, pairs: Mapping[str, LoraPair]) -> tuple[ExpertStack, StackedPair] | None:
    """Return the pairs of a tensor's projections as one, and how they lie in it; None if none of them has a pair.

    Nothing is lost: an expert without a pair gets zeros, and so does one of a lower rank; a B is multiplied only where
    scalings differ.

    Args:
        stack: the tensor.
        pairs: full module name -> pair, of any modules.
    """
    found = [[pairs.get(name) for name in stack.linears(expert)] for expert in range(stack.experts)]
    known = [pair for of_expert in found for pair in of_expert if pair is not None]
    if not known:
        return None
    if len(stack.parts) > 1 and any(None in of_expert and any(of_expert) for of_expert in found):
        raise FormatError(
            f"some experts of {stack.parameter} have a pair for one of {' and '.join(stack.parts)} alone, whose "
            "outputs are as many as are not known here; give both a pair, or neither."
        )
    scaling = known[0].alpha / known[0].rank
    dtype = known[0].lora_A.dtype
    for one in known:
        dtype = torch.promote_types(dtype, one.lora_A.dtype)
    own = {tuple(pair.rank for pair in of_expert if pair is not None) for of_expert in found if any(of_expert)}
    shared = len(stack.parts) == 1 or all(_share(of_expert) for of_expert in found)
    outputs = [
        next(of[part].lora_B.shape[0] for of in found if of[part] is not None)  # type: ignore[union-attr]
        for part in range(len(stack.parts))
    ]
    rank = max(max(ranks) if shared else sum(ranks) for ranks in own)
    inputs = known[0].lora_A.shape[1]
    lora_a = torch.zeros(stack.experts, rank, inputs, dtype=dtype)
    lora_b = torch.zeros(sum(outputs), rank, stack.experts, dtype=dtype)
    for expert, of_expert in enumerate(found):
        first = 0
        for part, pair in enumerate(of_expert):
            if pair is None:
                continue
            mine = slice(first, first + pair.rank)
            lora_a[expert, mine] = pair.lora_A.to(dtype)
            factor = pair.alpha / pair.rank / scaling
            given = pair.lora_B.to(dtype) if factor == 1 else (pair.lora_B.to(torch.float64) * factor).to(dtype)
            _rows(lora_b[..., expert], part, outputs, interleaved=stack.interleaved)[:, mine] = given
            first = first if shared else mine.stop
    ranks = next(iter(own)) if not shared and len(own) == 1 else None
    if stack.turned:
        lora_a, lora_b = lora_b.permute(2, 1, 0), lora_a.permute(2, 1, 0)
    stacked = StackedPair(lora_a.flatten(0, 1).contiguous(), lora_b.flatten(1, 2).contiguous(), rank, scaling * rank)
    return dataclasses.replace(stack, ranks=ranks), stacked


def unstack_pairs(stack: ExpertStack, pair: StackedPair, source: str) -> dict[str, LoraPair]:
    """Return the pair of each projection of each expert.

    Args:
        stack: the tensor.
        pair: its stacked pair.
        source: the file, for messages.

    Raises:
        FormatError: the pair is of another number of experts, or of other projections.
    """
    count, wide = len(stack.parts), stack.experts * pair.rank
    outputs = pair.lora_A.shape[1] if stack.turned else pair.lora_B.shape[0]
    if pair.lora_A.shape[0] != wide or pair.lora_B.shape[1] != wide or outputs % count:
        raise FormatError(
            f"{source}: {stack.parameter} has A {tuple(pair.lora_A.shape)} and B {tuple(pair.lora_B.shape)}, which is "
            f"no pair of rank {pair.rank} for {stack.experts} experts; it belongs to another model."
        )
    if stack.ranks is not None and sum(stack.ranks) != pair.rank:
        raise FormatError(f"{source}: {stack.parameter} has rank {pair.rank}, not {sum(stack.ranks)}; it is damaged.")
    lora_a = pair.lora_A.reshape(stack.experts, pair.rank, -1)
    lora_b = pair.lora_B.reshape(-1, pair.rank, stack.experts)
    if stack.turned:
        lora_a, lora_b = lora_b.permute(2, 1, 0), lora_a.permute(2, 1, 0)
    pairs: dict[str, LoraPair] = {}
    for expert in range(stack.experts):
        first = 0
        for part, name in enumerate(stack.linears(expert)):
            own = pair.rank if stack.ranks is None else stack.ranks[part]
            mine = slice(first, first + own)
            rows = _rows(lora_b[..., expert], part, [outputs // count] * count, interleaved=stack.interleaved)
            alpha = pair.alpha * own / pair.rank
            pairs[name] = LoraPair(lora_a[expert, mine].contiguous(), rows[:, mine].contiguous(), alpha)
            first = first if stack.ranks is None else mine.stop
    return pairs


def side_names(stacks: Sequence[ExpertStack]) -> dict[str, str]:
    """Return parameter -> what PEFT calls the module whose A and B are its: it nests those of one module.

    Args:
        stacks: all that have a pair, those of one module in the order in which it has them.
    """
    of_module: dict[str, list[str]] = collections.defaultdict(list)
    for stack in stacks:
        of_module[stack.mixture].append(stack.parameter)
    return {
        parameter: module + _INSIDE * (len(parameters) - 1 - place)
        for module, parameters in of_module.items()
        for place, parameter in enumerate(parameters)
    }


def named_as_parameters(modules: Iterable[str]) -> dict[str, str]:
    """Return linear layer beside experts -> the parameter by which PEFT finds it, where it mistakes the layer's name.

    In families whose files hold experts one by one, PEFT takes every `gate_proj` for a part of fused experts, those of
    dense layers and shared experts too.
    """
    return {module: f"{module}.weight" for module in modules if module.rpartition(".")[2] in _TAKEN_FOR_EXPERTS}


def _share(of_expert: Sequence[LoraPair | None]) -> bool:
    first, second = of_expert
    if first is None or second is None:
        return True
    same = first.rank == second.rank and first.alpha == second.alpha
    return same and torch.equal(first.lora_A, second.lora_A)


def _rows(both: torch.Tensor, part: int, outputs: Sequence[int], *, interleaved: bool) -> torch.Tensor:
    """Return the rows of one projection, a view."""
    if len(outputs) == 1:
        return both
    return both[part :: len(outputs)] if interleaved else both[sum(outputs[:part]) : sum(outputs[: part + 1])]
