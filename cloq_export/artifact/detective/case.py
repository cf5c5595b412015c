"""What is known about a checkpoint while it is examined, and what is suspicious in any family of layouts."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cloq_export.artifact.detective import statistics
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.formats.layout import Headers, StoredGrids
from cloq_export.types import PER_CHANNEL

Confidence = Literal["certain", "likely", "open"]
Level = Literal["wrong", "doubtful", "note"]

SAMPLED_LAYERS = 16
# Bytes of codes read of a layer; up to a fourth as many again are read of the zeros and scales of the same groups.
LAYER_BYTES = 2 << 20

_USUAL_GROUPS = (32, 64, 128, PER_CHANNEL)
_SMALLEST_NORMAL = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """One thing about a checkpoint that a user should know.

    Args:
        kind: a fixed name, for programs.
        level: "wrong" (readers that trust the file get other weights, or cannot read it), "doubtful" (it may be so),
            or "note".
        finding: what was seen, in plain words.
        evidence: the figures behind it.
        remedy: what to do; empty for a note that asks for nothing.
    """

    kind: str
    level: Level
    finding: str
    evidence: str
    remedy: str = ""


@dataclasses.dataclass
class Case:
    """What is known about a checkpoint while it is examined."""

    folder: Path
    quantization: Mapping[str, Any]
    files: Mapping[str, TensorFile]
    headers: Headers
    suspicions: list[Suspicion] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    grids: StoredGrids | None = None

    def suspect(self, kind: str, level: Level, finding: str, evidence: str, remedy: str = "") -> None:
        self.suspicions.append(Suspicion(kind, level, finding, evidence, remedy))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.headers[name][1]

    def text(self, key: str) -> str | None:
        """Return a text of the config, shortened, or None."""
        value = self.quantization.get(key)
        if not isinstance(value, str):
            return None
        return value[:80] if value[:80].isprintable() else repr(value)[:80]


@dataclasses.dataclass(frozen=True)
class FamilyVerdict:
    """What one family's examination found."""

    label: str | None
    content: str | None
    confidence: Confidence
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    modules: int
    sampled: int


def compare_grids(case: Case, seen: Mapping[str, tuple[int, int]]) -> None:
    """Compare the bits and groups that shapes show with those that the config says."""
    wrong: dict[str, tuple[str, str]] = {}
    for module, (bits, group_size) in seen.items():
        spec = case.grids.spec_for(module) if case.grids is not None else None
        said: tuple[int | None, int | None]
        if spec is not None:
            said = (spec.bits, spec.group_size)
        elif case.grids is None and not case.quantization.get("dynamic"):
            said = (whole_number(case.quantization.get("bits")), whole_number(case.quantization.get("group_size")))
        else:
            continue
        if said[0] is not None and said[0] != bits:
            wrong.setdefault("bits", (module, f"{said[0]} bits, but the shapes hold {bits}-bit codes"))
        one_group = group_size == PER_CHANNEL  # a group size of all inputs is the same thing
        if said[1] is not None and said[1] != group_size and not one_group:
            wrong.setdefault("group-size", (module, f"groups of {said[1]}, but the shapes hold groups of {group_size}"))
    for kind, (module, text) in wrong.items():
        case.suspect(kind, "wrong", f"the config says {text}", f"shapes of {module}", "correct the config.")
    unusual = sorted({group for _, group in seen.values() if group not in _USUAL_GROUPS})
    if unusual:
        case.suspect(
            "unusual-group",
            "note",
            f"groups of {', '.join(map(str, unusual[:4]))} are unusual; most kernels know 32, 64, 128 and per channel",
            "shapes of scales",
            "check that the engine you serve with reads it.",
        )
    heads = [module for module in seen if module.rpartition(".")[2] == "lm_head"]
    if heads:
        case.suspect(
            "lm-head",
            "note",
            "the output head is quantized too",
            f"{heads[0]} has codes",
            "check that the engine you serve with reads it; many take the head for float.",
        )
    if len(set(seen.values())) > 1:
        counts = collections.Counter(seen.values()).most_common(4)
        text = ", ".join(f"{count} with {bits} bits, groups of {group}" for (bits, group), count in counts)
        case.suspect("mixed", "note", "modules differ in bits or groups", text)


def modules_with(headers: Headers, part: str) -> list[str]:
    return sorted(name.removesuffix(f".{part}") for name in headers if name.endswith(f".{part}"))


def note_missing(case: Case, modules: Sequence[str], parts: Iterable[str]) -> None:
    for part in parts:
        lacking = [module for module in modules if f"{module}.{part}" not in case.headers]
        if lacking:
            case.suspect(
                "missing",
                "wrong",
                f"{counted(lacking, modules)} have no {part}",
                f"the first is {lacking[0][:120]}",
                "fetch or write the file again.",
            )


def note_extra(case: Case, modules: Sequence[str], parts: Sequence[str]) -> None:
    quantized = set(modules)
    extra: dict[str, str] = {}
    for name in case.headers:
        module, _, part = name.rpartition(".")
        if module in quantized and part not in (*parts, "bias"):
            extra.setdefault(part, name)
    for part, name in sorted(extra.items())[:4]:
        float_too = part == "weight"
        case.suspect(
            "extra",
            "doubtful" if float_too else "note",
            "quantized modules hold a float weight too; readers differ in which they serve"
            if float_too
            else f"quantized modules hold a {part[:80]!r}, which is not read",
            f"the first is {name[:120]}",
            "find out which is meant, and remove the other." if float_too else "",
        )


def note_act_order(case: Case, ordered: Sequence[str], sampled: Sequence[str]) -> None:
    labelled = case.quantization.get("desc_act")
    if ordered:
        case.suspect(
            "act-order",
            "wrong",
            f"{counted(ordered, sampled)} looked at have groups that are not sequential (act-order)"
            + ("" if labelled is not False else ", though the config says desc_act false"),
            f"g_idx of {ordered[0][:120]}",
            "it is not read: quantize again with desc_act=false, or with static groups.",
        )
    elif labelled is True and sampled:
        case.suspect(
            "act-order",
            "note",
            "the config says desc_act, but the groups looked at are sequential",
            f"g_idx of {len(sampled)} modules",
            "it is read if all are; with desc_act set to false more engines read it.",
        )


def read_scales(case: Case, name: str, rows: Sequence[int]) -> torch.Tensor | None:
    """Return some rows of a layer's scales, or None where they are too many or no scales."""
    code, shape = case.headers[name]
    if code not in _SMALLEST_NORMAL or len(shape) != 2:
        case.suspect("scales", "wrong", f"scales are {code}", name[:120], "expected are F16, BF16 or F32.")
        return None
    if len(rows) * shape[1] * 4 > LAYER_BYTES:
        return None
    if len(rows) == shape[0]:
        return case.files[name].read(name)
    return torch.cat([case.files[name].read_rows(name, row, row + 1) for row in rows])


def note_scales(case: Case, scales: Sequence[tuple[str, torch.Tensor]], sampled: Sequence[str]) -> None:
    faults: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for module, values in scales:
        code = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[values.dtype]
        wide = values.to(torch.float32)
        tests = {
            "NaN or Inf": ~torch.isfinite(wide),
            "zero": wide == 0,
            "negative": wide < 0,
            "subnormal": (wide.abs() < _SMALLEST_NORMAL[code]) & (wide != 0),
        }
        for fault, faulty in tests.items():
            if bool(faulty.any()):
                faults[fault].append((module, int(faulty.sum())))
    remedies = {
        "NaN or Inf": "fetch or quantize the file again.",
        "zero": "such groups are all zero: quantize again with a smallest scale above 0.",
        "negative": "AutoRound writes such symmetric files; export it again as asymmetric.",
        "subnormal": "some kernels flush them to zero: quantize again with a larger smallest scale.",
    }
    for fault, found_in in faults.items():
        case.suspect(
            "scales",
            "note" if fault == "subnormal" else "wrong",
            f"{sum(count for _, count in found_in)} scales are {fault}",
            f"{len(found_in)} of {len(sampled)} modules looked at, the first is {found_in[0][0][:120]}",
            remedies[fault],
        )


def note_codes(case: Case, counts: Sequence[torch.Tensor], bits: int) -> None:
    """Report the histogram of the codes, and what is odd about it."""
    summed = statistics.add_counts(counts, bits)
    case.figures["code_shares"] = statistics.code_shares(summed) if bits <= 4 else None
    placed = statistics.entropy_per_code(summed)
    together = statistics.entropy_per_code(summed.sum(dim=0, keepdim=True))
    if placed is None or together is None:
        return
    case.figures["entropy"] = rounded(together)
    # The estimate from n codes falls short by about (places - 1)(codes - 1) / (2 n ln 2).
    short = 31 * (2**bits - 1) / (2 * int(summed.sum()) * math.log(2))
    striped = together - placed - short
    case.figures["entropy_by_place"] = rounded(placed)
    if striped > 0.02:
        case.suspect(
            "striped",
            "doubtful",
            "codes depend on their place in the words, as weights do not: the bits may lie in another order",
            f"{striped:.3f} bits of each code are told by its place among 32",
            "compare a layer with the float original before you use it.",
        )
    if bits > 2 and bits - together < 0.005:
        case.suspect(
            "uniform",
            "doubtful",
            "all codes are equally frequent, where weights give few far from zero: the bits may lie in another order",
            f"{together:.3f} of {bits} bits of entropy per code",
            "compare a layer with the float original before you use it.",
        )


def constant_of(histograms: Iterable[torch.Tensor]) -> int | None:
    """Return the only value that histograms hold, or None."""
    occurring = {int(value) for counts in histograms for value in counts.nonzero().flatten()}
    return occurring.pop() if len(occurring) == 1 else None


def most_common(grids: Iterable[tuple[int, int]]) -> tuple[int | None, int | None]:
    counts = collections.Counter(grids)
    return counts.most_common(1)[0][0] if counts else (None, None)


def whole_number(value: Any) -> int | None:
    return value if type(value) is int and -1 <= value < 1 << 31 else None


def counted(some: Sequence[str], of: Sequence[str]) -> str:
    return f"{len(some)} of {len(of)} modules"


def rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def mean_text(offset: statistics.ZeroOffset) -> str:
    return (
        f"mean of codes - stored zeros {offset.mean:.3f} +- {offset.standard_error:.3f} over {offset.layers} layers; "
        "0 is usual for zeros stored as they are, 1 for zeros stored less one"
    )


def shown(figures: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        for key, value in figures.items()
    )
