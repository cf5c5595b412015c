"""GPTQ's tensors: version 1 or 2, dense or planar 3-bit codes, act-order, and whether label and content agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cloq_export.artifact.detective import statistics
from cloq_export.artifact.detective.case import (
    Case,
    Confidence,
    FamilyVerdict,
    compare_grids,
    constant_of,
    counted,
    mean_text,
    most_common,
    note_act_order,
    note_codes,
    note_extra,
    note_missing,
    note_scales,
    rounded,
    shown,
)
from cloq_export.artifact.detective.foreign import UNREAD_GPTQ_FORMATS
from cloq_export.artifact.detective.gptq_sample import PARTS, Sample, grid_of_shapes, sample_layers
from cloq_export.formats.auto_round import AUTO_ROUND, AUTO_ROUND_GPTQ, DEFAULT_PACKING, METHOD, PACKINGS
from cloq_export.formats.layout import Headers

# vLLM's and SGLang's reader for 2 and 3 bits, which reads all zeros as those of version 2, whatever the label.
HUMMING_ZEROS = (
    "vLLM and SGLang with --quantization humming take stored zeros as they lie, so every weight of this asymmetric "
    "file of version 1 comes out one step off there, without a word",
    "version 1 stores zeros less one",
    "serve it without that flag, or write version 2 with: cloq convert --format gptq_v2",
)
_AUTO_ROUND_ZEROS = (
    "vLLM, which asks Humming by itself for AutoRound's files of 2 and 3 bits, and every engine with "
    "--quantization humming take stored zeros as they lie, so every weight of this asymmetric file comes out one step "
    "off there, without a word",
    f"{DEFAULT_PACKING} stores zeros less one",
    f"write them as they are with: cloq convert --format gptq_v2, or --format {AUTO_ROUND.name}",
)
_LABELS = ("gptq", "gptq_v2", "gptq_p")
# AutoRound's layouts -> whose zeros they have.
_VERSIONS = {AUTO_ROUND.name: "gptq_v2", AUTO_ROUND_GPTQ.name: "gptq"}


def examine_gptq(case: Case, modules: list[str]) -> FamilyVerdict:
    label, spoken = gptq_label(case)
    note_missing(case, modules, ("qweight", "qzeros", "scales"))
    note_extra(case, modules, PARTS)
    whole = [module for module in modules if all(f"{module}.{part}" in case.headers for part in PARTS[:3])]
    lacking = [module for module in whole if f"{module}.g_idx" not in case.headers]
    # AutoRound leaves it out, groups being sequential, and its label says that the file is one of those.
    if lacking and not _is_auto_round(case):
        case.suspect(
            "no-index",
            "wrong",
            f"{counted(lacking, modules)} have no g_idx, which only AutoRound's own format may leave out",
            f"the first is {lacking[0]}",
            "add a g_idx of i // group_size to each module, or export again with GPTQModel.",
        )
    seen = {module: grid_of_shapes(case, module) for module in whole}
    fitting = {module: grid for module, grid in seen.items() if grid is not None}
    odd = [module for module in whole if module not in fitting]
    if odd:
        case.suspect(
            "shapes",
            "wrong",
            f"the tensors of {counted(odd, modules)} do not fit together",
            f"{odd[0]}: " + ", ".join(f"{part} {case.shape(f'{odd[0]}.{part}')}" for part in PARTS[:3]),
            "fetch or write the file again.",
        )
    compare_grids(case, fitting)
    bits, group_size = most_common(fitting.values())
    sampled, samples, act_order, scales = sample_layers(case, fitting, bits)
    note_act_order(case, act_order, sampled)
    note_scales(case, scales, sampled)
    labelled_symmetric = case.quantization.get("sym")
    order, order_confidence = _bit_order(case, samples, bits, label)
    constant = constant_of(sample.zeros[order] for sample in samples) if samples else None
    middle = None if bits is None else 2 ** (bits - 1)
    symmetric = None if not samples or middle is None else constant in (middle, middle - 1)
    content, confidence = _version(case, samples, order, constant, middle, labelled_symmetric is True)
    if order == "planar":
        content, confidence = "gptq_p", order_confidence
    _compare_label(case, label, spoken, content, confidence, bits)
    if samples and bits is not None and middle is not None:
        counts = torch.stack([sample.zeros[order] for sample in samples]).sum(dim=0)
        _note_stored_zeros(case, counts, bits, content or label, len(samples))
        _note_symmetry(case, counts, labelled_symmetric, symmetric, constant, len(samples))
        if labelled_symmetric is not True and (content or label) == "gptq":
            case.suspect("humming", "note", *(_AUTO_ROUND_ZEROS if _is_auto_round(case) else HUMMING_ZEROS))
        _note_offsets(case, [sample.offsets[order].slope for sample in samples])
        note_codes(case, [sample.counts[order] for sample in samples], bits)
    named, seen_as = _named(case, label), None if content is None else _named(case, content)
    return FamilyVerdict(named, seen_as, confidence, bits, group_size, symmetric, len(modules), len(samples))


def _is_auto_round(case: Case) -> bool:
    return case.text("quant_method") == METHOD


def _named(case: Case, version: str) -> str:
    """Return the layout of a file whose zeros are those of a version of GPTQ."""
    own = {zeros: name for name, zeros in _VERSIONS.items()} if _is_auto_round(case) else {}
    return own.get(version, version)


def gptq_label(case: Case) -> tuple[str, str]:
    """Return the version of GPTQ that the file says it has, and in which words it says so."""
    if _is_auto_round(case):
        packing = case.text("packing_format") or DEFAULT_PACKING
        return _VERSIONS[PACKINGS[packing]] if packing in PACKINGS else packing, f"packing_format {packing!r}"
    told = {key: case.text(key) for key in ("checkpoint_format", "format") if case.text(key) is not None}
    if len(set(told.values())) > 1:
        case.suspect(
            "two-labels",
            "wrong",
            "checkpoint_format and format name two layouts; readers differ in which of them they take",
            ", ".join(f"{key} {value!r}" for key, value in told.items()),
            "keep the one that the content shows.",
        )
    for key, value in told.items():
        return str(value), f"{key} {value!r}"
    return "gptq", "no checkpoint_format, which means gptq (version 1)"


def has_gptq_shape(headers: Headers, module: str) -> bool:
    """Return whether words run along the inputs, as GPTQ has them, and not along the outputs, as AWQ."""
    code, shape = headers[f"{module}.qweight"]
    scales = headers.get(f"{module}.scales", ("", ()))[1]
    if code != "I32" or len(shape) != 2:
        return False
    return len(scales) != 2 or scales[1] == shape[1]


def _bit_order(case: Case, samples: Sequence[Sample], bits: int | None, label: str) -> tuple[str, Confidence]:
    """Decide in which order 3-bit codes lie; other widths have one order."""
    if bits != 3 or not samples:
        return "dense", "certain"
    constants = {order: constant_of(sample.zeros[order] for sample in samples) for order in ("dense", "planar")}
    exact = [order for order, value in constants.items() if value in (3, 4)]
    entropies = {
        order: statistics.entropy_per_code(statistics.add_counts((sample.counts[order] for sample in samples), bits))
        for order in ("dense", "planar")
    }
    case.figures["entropy_per_code"] = {order: rounded(value) for order, value in entropies.items()}
    least = statistics.least_entropy(entropies)
    if len(exact) == 1:
        return exact[0], "certain"
    if least is not None:
        return least, "likely"
    said = "planar" if label == "gptq_p" else "dense"
    case.suspect(
        "order-open",
        "doubtful",
        "the content does not tell whether 3-bit codes lie densely or in planes (gptq_p), which have the same shapes",
        f"entropy per code: {shown(entropies)}",
        f"the label is believed: {said}; ask the producer if the model is garbage.",
    )
    return said, "open"


def _version(
    case: Case,
    samples: Sequence[Sample],
    order: str,
    constant: int | None,
    middle: int | None,
    labelled_symmetric: bool,
) -> tuple[str | None, Confidence]:
    """Decide whether zeros are stored as they are or less one."""
    offset = statistics.zero_offset([sample.offsets[order] for sample in samples])
    if offset is None or middle is None:
        return None, "open"
    case.figures["code_minus_zero"] = {
        "mean": rounded(offset.mean),
        "standard_error": rounded(offset.standard_error),
        "log_odds_as_they_are": rounded(offset.log_odds),
        "layers": offset.layers,
    }
    by_mean = None if offset.shift is None else ("gptq_v2", "gptq")[offset.shift]
    by_constant = {middle: "gptq_v2", middle - 1: "gptq"}.get(-1 if constant is None else constant)
    if by_constant is not None and by_mean in (None, by_constant):
        return by_constant, "certain" if labelled_symmetric else "likely"
    if by_constant is not None:
        case.suspect(
            "zeros-and-codes",
            "doubtful",
            f"all stored zeros are {constant}, as in symmetric layers of {by_constant}, but codes lie as in {by_mean}",
            mean_text(offset),
            "compare a layer with the float original before you use it.",
        )
        return None, "open"
    if not offset.explained:
        case.suspect(
            "zeros-and-codes",
            "doubtful",
            "the codes lie around neither reading of the zeros; bits may lie in another order, or be of another width",
            mean_text(offset),
            "compare a layer with the float original before you use it.",
        )
    return (by_mean, "likely") if by_mean is not None else (None, "open")


def _compare_label(
    case: Case, label: str, spoken: str, content: str | None, confidence: Confidence, bits: int | None
) -> None:
    # Planar words of 2, 4 and 8 bits are those of gptq_v2.
    meant = "gptq_v2" if label == "gptq_p" and bits in (2, 4, 8) else label
    if label not in _LABELS:
        what, remedy = UNREAD_GPTQ_FORMATS.get(label, ("a layout that is unknown here", "ask the producer"))
        case.suspect("label", "wrong", f"the label {label!r} means {what}, but the shapes are GPTQ's", spoken, remedy)
    elif content is None:
        if case.figures:
            case.suspect(
                "version-open",
                "doubtful",
                "the content does not tell whether zeros are stored as they are (gptq_v2) or less one (gptq)",
                f"{spoken}; " + shown(case.figures.get("code_minus_zero", {})),
                f"the label alone decides; it is read as {_named(case, meant)}.",
            )
    elif content != meant:
        remedy = f"read it with: cloq convert --read-as {_named(case, content)}"
        if content == "gptq_p":
            remedy = UNREAD_GPTQ_FORMATS["gptq_p"][1] + "; other readers will take it for noise."
        figures = {key: case.figures[key] for key in ("code_minus_zero", "entropy_per_code") if key in case.figures}
        case.suspect(
            "version" if content != "gptq_p" and meant != "gptq_p" else "order",
            "wrong",
            f"the label says {_named(case, label)}, but the content is {_named(case, content)} ({confidence})",
            f"{spoken}; " + "; ".join(f"{key.replace('_', ' ')}: {shown(value)}" for key, value in figures.items()),
            remedy,
        )


def _note_stored_zeros(case: Case, counts: torch.Tensor, bits: int, layout: str, layers: int) -> None:
    case.figures["stored_zeros"] = counts.tolist() if bits <= 4 else _sparse(counts)
    full, total = int(counts[-1]), int(counts.sum())
    if layout == "gptq" and full:
        case.suspect(
            "wrapped-zeros",
            "wrong",
            f"{full} of {total} stored zeros have all bits set: a zero of 0 that version 1 cannot hold. Readers take "
            f"it for 0 or for {2**bits}"
            + ("" if bits == 3 else ", and writers that subtract from whole words have lowered its neighbour too"),
            f"zeros of {layers} layers",
            "quantize again and write gptq_v2; a file of GPTQModel can be converted by GPTQModel itself.",
        )


def _note_symmetry(
    case: Case, counts: torch.Tensor, labelled: Any, symmetric: bool | None, constant: int | None, layers: int
) -> None:
    if labelled is True and symmetric is False:
        case.suspect(
            "symmetric",
            "wrong",
            "the config says sym, but the zeros differ"
            if constant is None
            else f"the config says sym, but all zeros are {constant}",
            f"{int((counts > 0).sum())} different zeros in {layers} layers",
            "set sym to false: engines for symmetric files ignore the zeros.",
        )
    elif labelled is False and symmetric:
        case.suspect(
            "symmetric",
            "note",
            "the config says asymmetric, but every zero seen is the middle",
            f"zeros of {layers} layers",
            "with sym set to true more engines read it, if the other layers are alike.",
        )


def _note_offsets(case: Case, of_layers: Sequence[float | None]) -> None:
    slopes = sorted(slope for slope in of_layers if slope is not None)
    if slopes:
        slope = slopes[len(slopes) // 2]
        case.figures["slope_of_codes_on_zeros"] = rounded(slope)
        if slope < 0.3:
            case.suspect(
                "zeros-order",
                "doubtful",
                "zeros do not move with the codes of their groups; zeros or codes may lie in another order",
                f"slope {slope:.2f} (median of {len(slopes)} layers) where 0.8 to 1 is usual",
                "compare a layer with the float original before you use it.",
            )


def _sparse(counts: torch.Tensor) -> dict[str, int]:
    return {str(int(value)): int(counts[value]) for value in counts.nonzero().flatten()}
