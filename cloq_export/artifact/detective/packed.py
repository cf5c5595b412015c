"""The tensors of compressed-tensors: dense or padded 3-bit codes, zero points, and whether the config agrees."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

import torch

from cloq_export.artifact.detective import statistics
from cloq_export.artifact.detective.case import (
    LAYER_BYTES,
    SAMPLED_LAYERS,
    Case,
    Confidence,
    FamilyVerdict,
    compare_grids,
    counted,
    mean_text,
    most_common,
    note_act_order,
    note_codes,
    note_extra,
    note_missing,
    note_scales,
    read_scales,
    rounded,
    shown,
    whole_number,
)
from cloq_export.artifact.run_layers import natural_order
from cloq_export.formats.compressed_tensors.codec import word_count
from cloq_export.kernels.bitpack import unpack_rows
from cloq_export.types import PER_CHANNEL, SUPPORTED_BITS

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def examine_packed(case: Case, modules: list[str]) -> FamilyVerdict:
    label = case.text("format") or "pack-quantized"
    ours = case.quantization.get("cloq")
    if isinstance(ours, Mapping) and isinstance(ours.get("layout"), str):
        label = ours["layout"][:80]
    note_missing(case, modules, ("weight_packed", "weight_scale", "weight_shape"))
    note_extra(case, modules, _PARTS)
    indexed = [module for module in modules if f"{module}.weight_g_idx" in case.headers]
    looked_at = statistics.spread_evenly(indexed, SAMPLED_LAYERS)
    note_act_order(case, [module for module in looked_at if _is_permuted(case, module)], looked_at)
    said = _said(case, modules)
    asymmetric = [module for module in modules if said[module][2] is False]
    bare = [module for module in asymmetric if f"{module}.weight_zero_point" not in case.headers]
    if bare:
        case.suspect(
            "no-zeros",
            "wrong",
            f"the config says asymmetric, but {counted(bare, modules)} have no zero points",
            f"the first is {bare[0]}",
            "set symmetric to true if that is how it was quantized, or fetch the file again.",
        )
    idle = [m for m in modules if said[m][2] is True and f"{m}.weight_zero_point" in case.headers]
    if idle:
        case.suspect(
            "symmetric",
            "wrong",
            f"the config says symmetric, but {counted(idle, modules)} have zero points, which readers then ignore",
            f"the first is {idle[0]}",
            "set symmetric to false.",
        )
    seen: dict[str, tuple[int, int]] = {}
    forms: collections.Counter[str] = collections.Counter()
    shapes: dict[str, tuple[int, int]] = {}
    for module in statistics.spread_evenly(sorted(modules, key=natural_order), 256):
        grid = _grid(case, module, said[module][0])
        if grid is not None:
            shapes[module], seen[module] = grid[0], (grid[1], grid[2])
            forms[grid[3]] += 1
    compare_grids(case, seen)
    bits, group_size = most_common(seen.values())
    content, confidence = _form(case, forms, bits, label)
    dense = content != "compressed_tensors_padded"
    fitting = [module for module in shapes if seen[module][0] == bits and bits in SUPPORTED_BITS]
    sampled = statistics.spread_evenly(fitting, SAMPLED_LAYERS)
    offsets, counts, scales = [], [], []
    for module in sampled:
        rows = _rows(case, module, shapes[module])
        if rows is None:
            continue
        offset, count = _sample_layer(case, module, int(bits or 1), shapes[module], rows, dense=dense)
        counts.append(count)
        if offset is not None:
            offsets.append(offset)
        scale = read_scales(case, f"{module}.weight_scale", range(*rows))
        if scale is not None:
            scales.append((module, scale))
    note_scales(case, scales, sampled)
    found_offset = statistics.zero_offset(offsets)
    if found_offset is not None:
        case.figures["code_minus_zero"] = {
            "mean": rounded(found_offset.mean),
            "standard_error": rounded(found_offset.standard_error),
            "layers": found_offset.layers,
        }
        if found_offset.shift == 1 or not found_offset.explained:
            case.suspect(
                "zeros-and-codes",
                "doubtful",
                "the codes do not lie around their zeros",
                mean_text(found_offset),
                "compare a layer with the float original before you use it.",
            )
    if counts and bits is not None:
        note_codes(case, counts, bits)
    symmetric = not any(f"{module}.weight_zero_point" in case.headers for module in modules)
    return FamilyVerdict(label, content, confidence, bits, group_size, symmetric, len(modules), len(counts))


def _is_permuted(case: Case, module: str) -> bool:
    """Return whether the inputs of a module are not grouped as they follow each other."""
    name = f"{module}.weight_g_idx"
    code, shape = case.headers[name]
    groups = case.headers.get(f"{module}.weight_scale", ("", ()))[1]
    if code not in ("I32", "I64") or len(shape) != 1 or len(groups) != 2 or not groups[1] or shape[0] % groups[1]:
        return True
    if shape[0] * 8 > LAYER_BYTES:
        return False
    index = case.files[name].read(name).to(torch.int64)
    return not bool((index == -1).all() or torch.equal(index, torch.arange(shape[0]) // (shape[0] // groups[1])))


def _said(case: Case, modules: Iterable[str]) -> dict[str, tuple[int | None, int | None, bool | None]]:
    """Return module -> (bits, group size, symmetric) as the config says it."""
    said: dict[str, tuple[int | None, int | None, bool | None]] = {}
    groups = case.quantization.get("config_groups")
    only: tuple[int | None, int | None, bool | None] = (None, None, None)
    if isinstance(groups, Mapping) and len(groups) == 1:
        group = next(iter(groups.values()))
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            symmetric = weights.get("symmetric", True)
            only = (
                whole_number(weights.get("num_bits")),
                whole_number(weights.get("group_size")),
                symmetric if isinstance(symmetric, bool) else None,
            )
    for module in modules:
        spec = case.grids.spec_for(module) if case.grids is not None else None
        said[module] = only if spec is None else (spec.bits, spec.group_size, spec.symmetric)
    return said


def _grid(case: Case, module: str, said_bits: int | None) -> tuple[tuple[int, int], int, int, str] | None:
    """Return ((out, in), bits, group size, form) that the shapes of a module show, or None."""
    names = {part: f"{module}.{part}" for part in _PARTS}
    words, scales = (case.headers.get(names[part], ("", ()))[1] for part in ("weight_packed", "weight_scale"))
    code, shape = case.headers.get(names["weight_shape"], ("", ()))
    if len(words) != 2 or len(scales) != 2 or shape != (2,) or code not in ("I32", "I64") or 0 in (*words, *scales):
        return None
    out_features, in_features = case.files[names["weight_shape"]].read(names["weight_shape"]).tolist()
    groups = scales[1]
    problem = None
    if out_features != words[0] or scales[0] != out_features or in_features < 1 or in_features % groups:
        problem = f"weight_shape {out_features} x {in_features}, weight_packed {words}, weight_scale {scales}"
    fits = {
        (bits, form)
        for bits in range(1, 9)
        for form, padded in (("dense", False), ("padded", True))
        if word_count(in_features, bits, padded=padded) == words[1]
    }
    if problem is None and not fits:
        problem = f"{in_features} inputs in {words[1]} words"
    if problem is not None:
        if not any(suspicion.kind == "shapes" for suspicion in case.suspicions):
            case.suspect(
                "shapes",
                "wrong",
                f"the tensors of {module} do not fit together",
                problem,
                "fetch or write the file again.",
            )
        return None
    told = [bits for bits, _ in fits if bits == said_bits]
    common = [bits for bits, _ in fits if bits in SUPPORTED_BITS]
    bits = told[0] if told else min(common or [bits for bits, _ in fits])
    form = (
        "both" if {(bits, "dense"), (bits, "padded")} <= fits else next(form for width, form in fits if width == bits)
    )
    return (out_features, in_features), bits, PER_CHANNEL if groups == 1 else in_features // groups, form


def _form(case: Case, forms: collections.Counter[str], bits: int | None, label: str) -> tuple[str | None, Confidence]:
    """Decide between dense and padded from the shapes, and compare with the label."""
    names = {"dense": "compressed_tensors", "padded": "compressed_tensors_padded"}
    told = {names[form] for form in forms if form != "both"}
    case.figures["forms"] = dict(forms)
    if bits is None:
        return None, "open"
    if 32 % bits == 0:
        return "compressed_tensors", "certain"
    if len(told) != 1:
        if told:
            case.suspect(
                "order",
                "wrong",
                "some modules hold 3-bit codes densely and some padded; no reader takes both",
                shown(dict(forms)),
                "the folder mixes two checkpoints: fetch or write it again.",
            )
        else:
            case.suspect(
                "order-open",
                "doubtful",
                "the shapes fit both dense and padded 3-bit codes",
                f"the version in the config is {case.text('version')!r}",
                "name the layout: cloq convert --read-as compressed_tensors, or compressed_tensors_padded.",
            )
        return None, "open"
    content = next(iter(told))
    if label in names.values() and label != content:
        case.suspect(
            "order",
            "wrong",
            f"our own metadata say {label}, but the shapes are those of {content}",
            shown(dict(forms)),
            f"read it with: cloq convert --read-as {content}",
        )
    if content == "compressed_tensors_padded":
        case.suspect(
            "padded",
            "note",
            "3-bit codes are padded, ten to a word: readers of compressed-tensors 0.18 and newer, and vLLM, expect "
            "them dense",
            "shape of weight_packed",
            "cloq convert --format compressed_tensors writes them densely, with the same codes.",
        )
    return content, "certain"


def _rows(case: Case, module: str, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Return the output channels of a layer that are looked at."""
    if case.shape(f"{module}.weight_packed")[0] != shape[0]:
        return None
    row_bytes = case.shape(f"{module}.weight_packed")[1] * 4
    if row_bytes > LAYER_BYTES:
        return None
    most = LAYER_BYTES // row_bytes
    if most >= shape[0]:
        return 0, shape[0]
    # A run that begins and ends where zeros of both forms begin a word: ten and thirty-two to a step.
    unit = 160
    count = max(1, most // unit) * unit
    start = (shape[0] - count) // 2 // unit * unit
    return (start, start + count) if start >= 0 else None


def _sample_layer(
    case: Case, module: str, bits: int, shape: tuple[int, int], rows: tuple[int, int], *, dense: bool
) -> tuple[statistics.LayerOffset | None, torch.Tensor]:
    """Return the figures of some output channels of a layer."""
    out_features, in_features = shape
    start, stop = rows
    name, zeros_name = f"{module}.weight_packed", f"{module}.weight_zero_point"
    codes = _unpack_words(case.files[name].read_rows(name, start, stop), bits, in_features, dense=dense)
    groups = case.shape(f"{module}.weight_scale")[1]
    counts = statistics.position_counts(codes, bits)
    if zeros_name in case.headers:
        code, stored = case.headers[zeros_name]
        needed = (word_count(out_features, bits, padded=not dense), groups)
        if code != "I32" or stored != needed:
            return None, counts
        first, last = (word_count(row, bits, padded=not dense) for row in (start, stop))
        words = case.files[zeros_name].read_rows(zeros_name, first, last)
        zeros = _unpack_words(words.t().contiguous(), bits, stop - start, dense=dense).t()
    else:
        zeros = torch.full((stop - start, groups), 2 ** (bits - 1), dtype=torch.uint8)
    return statistics.layer_offset(codes.view(stop - start, groups, -1), zeros), counts


def _unpack_words(words: torch.Tensor, bits: int, columns: int, *, dense: bool) -> torch.Tensor:
    """Return the codes of rows of words, ignoring their other bits."""
    if dense or 32 % bits == 0:
        return unpack_rows(words, bits, columns)
    per_word = 32 // bits
    lanes = [(words >> (index * bits)) & (2**bits - 1) for index in range(per_word)]
    return torch.stack(lanes, dim=2).reshape(words.shape[0], -1)[:, :columns].to(torch.uint8)
