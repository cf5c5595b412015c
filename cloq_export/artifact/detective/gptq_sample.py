"""A sample of the tensors of GPTQ's layers: what grid their shapes show, and the figures of some blocks of columns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from cloq_export.artifact.detective import statistics
from cloq_export.artifact.detective.case import LAYER_BYTES, SAMPLED_LAYERS, Case, read_scales
from cloq_export.artifact.run_layers import natural_order
from cloq_export.kernels.bitpack import unpack_columns, unpack_rows
from cloq_export.types import PER_CHANNEL, SUPPORTED_BITS

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclasses.dataclass
class Sample:
    """Figures of one sampled layer, for each order in which its bits may lie."""

    offsets: dict[str, statistics.LayerOffset]
    counts: dict[str, torch.Tensor]
    zeros: dict[str, torch.Tensor]


def grid_of_shapes(case: Case, module: str) -> tuple[int, int] | None:
    """Return (bits, group size) that the shapes of a module show, or None where they fit no grid."""
    words, zeros, scales = (case.shape(f"{module}.{part}") for part in PARTS[:3])
    if any(len(shape) != 2 or 0 in shape for shape in (words, zeros, scales)):
        return None
    groups, out_features = scales
    if words[1] != out_features or zeros[0] != groups:
        return None
    bits, rest = divmod(zeros[1] * 32, out_features)
    if rest or not 1 <= bits <= 8 or (words[0] * 32) % bits:
        return None
    in_features = words[0] * 32 // bits
    index = case.headers.get(f"{module}.g_idx")
    if (index is not None and index[1] != (in_features,)) or in_features % groups:
        return None
    return bits, PER_CHANNEL if groups == 1 else in_features // groups


def sample_layers(
    case: Case, seen: Mapping[str, tuple[int, int]], bits: int | None, *, layer_bytes: int = LAYER_BYTES
) -> tuple[list[str], list[Sample], list[str], list[tuple[str, torch.Tensor]]]:
    """Read a sample of layers; return (modules, figures, those with act-order, scales)."""
    fitting = [module for module in seen if seen[module][0] == bits and bits in SUPPORTED_BITS]
    sampled = statistics.spread_evenly(sorted(fitting, key=natural_order), SAMPLED_LAYERS)
    samples, act_order, scales = [], [], []
    for module in sampled:
        width, (groups, out_features) = int(bits or 1), case.shape(f"{module}.scales")
        in_features = case.shape(f"{module}.qweight")[0] * 32 // width
        span = in_features // groups
        index = _read_index(case, module, in_features, span)
        if index is not None:
            act_order.append(module)
        layer = _PackedLayer(module, width, in_features, out_features, span, index)
        sample, scale = _sample_layer(case, layer, layer_bytes)
        if sample is not None:
            samples.append(sample)
        if scale is not None:
            scales.append((module, scale))
    return sampled, samples, act_order, scales


def _read_index(case: Case, module: str, in_features: int, span: int) -> torch.Tensor | None:
    """Return g_idx if it is not sequential, else None."""
    code, shape = case.headers.get(f"{module}.g_idx", ("", ()))
    if code not in ("I32", "I64") or shape != (in_features,) or in_features * 8 > LAYER_BYTES:
        return None
    index = case.files[f"{module}.g_idx"].read(f"{module}.g_idx").to(torch.int64)
    return None if torch.equal(index, torch.arange(in_features) // span) else index


@dataclasses.dataclass(frozen=True)
class _PackedLayer:
    """One layer as its shapes show it; `span` columns share a group, and `index` is g_idx unless it is sequential."""

    module: str
    bits: int
    in_features: int
    out_features: int
    span: int
    index: torch.Tensor | None


def _sample_layer(case: Case, layer: _PackedLayer, layer_bytes: int) -> tuple[Sample | None, torch.Tensor | None]:
    """Return the figures and the scales of one layer, from blocks of columns spread over its inputs."""
    module, bits, span, index = layer.module, layer.bits, layer.span, layer.index
    in_features, out_features = layer.in_features, layer.out_features
    # A block holds whole words, whole planes and whole groups, or lies inside one group.
    unit = 32 if index is not None or span % 32 == 0 else math.lcm(span, 32)
    if in_features % unit:
        unit = in_features
    each = unit if index is not None else min(unit, span)
    unit_bytes = unit * bits // 8 * out_features
    words_name, zeros_name = f"{module}.qweight", f"{module}.qzeros"
    if unit_bytes > layer_bytes or any(case.headers[name][0] != "I32" for name in (words_name, zeros_name)):
        return None, None
    chosen = statistics.spread_evenly(range(in_features // unit), layer_bytes // unit_bytes)
    starts = [place * unit + offset for place in chosen for offset in range(0, unit, each)]
    group_of = [start // span for start in starts]
    rows = sorted(set(group_of)) if index is None else list(range(in_features // span))
    if len(rows) * case.shape(zeros_name)[1] * 4 > layer_bytes:
        return None, None
    height = unit * bits // 32
    words = torch.cat(
        [case.files[words_name].read_rows(words_name, place * height, (place + 1) * height) for place in chosen]
    )
    stored = _read_some(case, zeros_name, rows)
    orders: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        "dense": (unpack_columns(words, bits), unpack_rows(stored, bits).t())
    }
    if bits == 3:
        orders["planar"] = (
            statistics.unpack_planar_columns(words),
            statistics.unpack_planar_columns(stored.t().contiguous()).t(),
        )
    sample = Sample({}, {}, {})
    place_of = {group: place for place, group in enumerate(rows)}
    for order, (codes, zeros) in orders.items():
        cut = codes.reshape(out_features, -1, each)
        if index is None:
            beside = zeros[:, [place_of[group] for group in group_of]]
        else:
            columns = torch.cat([torch.arange(start, start + each) for start in starts])
            of_columns = zeros.to(torch.float32)[:, index[columns].clamp(0, in_features // span - 1)]
            beside = of_columns.view(out_features, -1, each).mean(dim=2)
        sample.offsets[order] = statistics.layer_offset(cut, beside)
        sample.counts[order] = statistics.position_counts(codes, bits)
        sample.zeros[order] = torch.bincount(zeros.reshape(-1).to(torch.int64), minlength=1 << bits)
    return sample, read_scales(case, f"{module}.scales", rows)


def _read_some(case: Case, name: str, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows of a tensor, in order."""
    if len(rows) == case.shape(name)[0]:
        return case.files[name].read(name)
    return torch.cat([case.files[name].read_rows(name, row, row + 1) for row in rows])
