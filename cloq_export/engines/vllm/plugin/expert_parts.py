"""The experts of one layer as the files hold them: loaded one by one, cut to a rank, brought onto one grid.

A rank of a tensor-parallel engine holds a range of every expert's inner features: rows of gate and up, columns of down.
A rank of an expert-parallel one holds some of the experts whole. vLLM is not imported here, so that loading is tested
without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from cloq_export.engines.vllm.plugin.mixture import StackedWeight, stack_weights
from cloq_export.engines.vllm.plugin.parts import Fused, Part, Share, narrowed
from cloq_export.errors import FormatError
from cloq_export.kernels.bitpack import unpack_rows
from cloq_export.kernels.dispatch import native_takes_layer
from cloq_export.types import QuantSpec

GATE, DOWN, UP = "w1", "w2", "w3"
"""What vLLM calls the projections of an expert; an expert without a gate has its up in the place of the gate."""

_DTYPES = {"qweight": torch.int32, "qzeros": torch.uint8, "scales": torch.float32}
# What the files call the tensors of a module -> the parameter that holds them; None where nothing is kept.
GPTQ_NAMES: Mapping[str, str | None] = {
    "qweight": "qweight",
    "qzeros": "qzeros",
    "scales": "scales",
    "g_idx": None,
}
COMPRESSED_NAMES: Mapping[str, str | None] = {
    "weight_packed": "qweight",
    "weight_zero_point": "qzeros",
    "weight_scale": "scales",
    "weight_shape": None,
}


@dataclasses.dataclass(frozen=True)
class MixtureShare:
    """What one rank gets of a mixture.

    Args:
        experts: the numbers of its experts, in the order in which it holds them.
        hidden: inputs and outputs of every expert.
        inner: inner features of every expert on this rank.
        total_inner: inner features of every expert in the files.
        first_inner: where this rank's inner features begin in the files.
    """

    experts: tuple[int, ...]
    hidden: int
    inner: int
    total_inner: int
    first_inner: int = 0

    def of(self, projection: str) -> Share:
        """Return what this rank gets of one projection of an expert."""
        if projection == DOWN:
            return Share(self.hidden, self.inner, 0, self.first_inner, self.total_inner)
        return Share(self.inner, self.hidden, self.first_inner, 0, self.hidden)


class ExpertParts:
    """The modules of a mixture of which one rank holds a share.

    Args:
        modules: projection (`GATE`, `UP`, `DOWN`) -> name and grid of that module of every expert of this rank.
        share: what this rank gets.
        names: `GPTQ_NAMES` or `COMPRESSED_NAMES`.
        first_version: zeros are stored less one, as in the layout `gptq`.

    Raises:
        ShapeError: this rank's share does not begin and end at whole words.
    """

    def __init__(
        self,
        modules: Mapping[str, Sequence[tuple[str, QuantSpec]]],
        share: MixtureShare,
        names: Mapping[str, str | None] = GPTQ_NAMES,
        *,
        first_version: bool = False,
    ) -> None:
        self.share, self._names, self._first_version = share, names, first_version
        self._slots = {number: slot for slot, number in enumerate(share.experts)}
        self._parts: dict[tuple[str, int], Part] = {}
        for projection, named in modules.items():
            held = {role: f"{_group(projection)}_{part}" for part, role in names.items() if role is not None}
            for slot, (name, spec) in enumerate(named):
                self._parts[projection, slot] = Part(name, spec, share.of(projection), held)
        self._sizes: dict[str, int] = {}
        for (projection, _), part in self._parts.items():
            for role in part.shapes:
                place = f"{_group(projection)}_{role}"
                part.starts[role] = self._sizes.get(place, 0)
                self._sizes[place] = part.starts[role] + math.prod(part.shapes[role])

    def register(self, layer: nn.Module) -> None:
        """Make the parameters of a layer that the files are loaded into."""
        for group in ("w13", "w2"):
            for part, role in self._names.items():
                if role is None:
                    parameter = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)
                else:
                    dtype = _DTYPES[role]
                    # NaN until it is loaded, so that a missing tensor is noticed.
                    empty = math.nan if dtype.is_floating_point else 0
                    flat = torch.full((self._sizes[f"{group}_{role}"],), empty, dtype=dtype)
                    parameter = nn.Parameter(flat, requires_grad=False)
                parameter.weight_loader = self._loader(layer, part)  # type: ignore[attr-defined]
                layer.register_parameter(f"{group}_{part}", parameter)

    def _loader(self, layer: nn.Module, part: str) -> Callable[..., bool | None]:
        def load(
            param: nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            """Take a tensor of the file if this rank holds its expert; the signature is vLLM's."""
            slot = self._slots.get(expert_id)
            if slot is not None:
                self._load(layer, self._parts[shard_id, slot], part, loaded_weight)
            return slot is not None if return_success else None

        return load

    def _load(self, layer: nn.Module, part: Part, name: str, tensor: torch.Tensor) -> None:
        if name == "g_idx":
            part.check_order(tensor)
        elif name == "qzeros":
            part.load(layer, "qzeros", part.stored_zeros(tensor, first_version=self._first_version))
        elif name == "weight_packed":
            # Along the inputs in both layouts, a row of outputs after the other here.
            part.load(layer, "qweight", tensor.t())
        elif name == "weight_scale":
            part.load(layer, "scales", tensor.t())
        elif name == "weight_zero_point":
            # Along the outputs, padded to whole words.
            part.load(layer, "qzeros", unpack_rows(tensor.t().contiguous(), part.spec.bits))
        elif name != "weight_shape":
            part.load(layer, name, tensor)

    def stack(self, layer: nn.Module) -> tuple[StackedWeight, StackedWeight]:
        """Take the parameters off a layer, and return gate and up of all experts, and down.

        Raises:
            NonFiniteError: a scale is not a positive number, or was not in the files.
            FormatError: a symmetric module has another zero than the middle.
        """
        stacked = self._stacked(layer, (GATE, UP)), self._stacked(layer, (DOWN,))
        for group in ("w13", "w2"):
            for part in self._names:
                delattr(layer, f"{group}_{part}")
        self._parts = {}
        return stacked

    def _stacked(self, layer: nn.Module, projections: Sequence[str]) -> StackedWeight:
        # One grid for all, so that one computation serves them: the widest codes, and groups that fit into every one.
        parts = [part for (projection, _), part in self._parts.items() if projection in projections]
        bits = max(part.spec.bits for part in parts)
        columns = math.gcd(*(part.common_columns for part in parts))
        symmetric = all(part.spec.symmetric for part in parts)
        if self._names is COMPRESSED_NAMES:
            for part in parts:
                if part.spec.symmetric:  # such files hold no zeros
                    part.held(layer, "qzeros").fill_(2 ** (part.spec.bits - 1))

        def pieces(slot: int) -> Fused:
            own = [self._parts[one, slot] for one in projections if (one, slot) in self._parts]
            cut = [part.on_grid(layer, bits, columns, symmetric=symmetric) for part in own]
            return Fused(
                torch.cat([piece.codes for piece in cut]),
                scales_of(torch.cat([piece.scales for piece in cut])),
                torch.cat([piece.zeros for piece in cut]),
                bits,
                symmetric,
            )

        flat = narrowed(torch.cat([part.held(layer, "scales").flatten() for part in parts]))
        native = native_takes_layer(flat)
        half = flat.dtype == torch.float16

        def scales_of(scales: torch.Tensor) -> torch.Tensor:
            return scales.to(torch.float16) if half else scales

        count = len(self.share.experts)
        return stack_weights(map(pieces, range(count)), count, native=native)


def named_modules(
    prefix: str, experts: Sequence[int], names: Mapping[str, str | None], spec_of: Callable[[str], QuantSpec | None]
) -> dict[str, list[tuple[str, QuantSpec]]] | None:
    """Return the modules of a mixture by projection, or None if none of them is quantized.

    Args:
        prefix: of the experts, e.g. "model.layers.0.mlp.experts".
        experts: their numbers.
        names: projection -> what the files call it; None where an expert has none.
        spec_of: module -> its grid, or None for float.

    Raises:
        FormatError: some of them are quantized and others are not.
    """
    modules: dict[str, list[tuple[str, QuantSpec]]] = {}
    apart: list[str] = []
    for projection, name in names.items():
        if name is None:
            continue
        for number in experts:
            module = f"{prefix}.{number}.{name}"
            spec = spec_of(module)
            if spec is None:
                apart.append(module)
            else:
                modules.setdefault(projection, []).append((module, spec))
    if not modules:
        return None
    if apart:
        raise FormatError(
            f"vLLM computes the experts of {prefix} as one layer, but {apart[0]}"
            f"{f' and {len(apart) - 1} more are' if len(apart) > 1 else ' is'} not quantized; quantize all of them or "
            "none, with an override in the recipe."
        )
    return modules


def _group(projection: str) -> str:
    return "w2" if projection == DOWN else "w13"
