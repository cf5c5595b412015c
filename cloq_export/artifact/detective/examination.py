"""Which layout a quantized checkpoint of any origin has, by its label and by its content, and what is suspicious."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.detective.case import (
    LAYER_BYTES,
    Case,
    Confidence,
    FamilyVerdict,
    Level,
    Suspicion,
    modules_with,
    whole_number,
)
from cloq_export.artifact.detective.foreign import (
    UNREAD_COMPRESSED_TENSORS,
    UNREAD_GPTQ_FORMATS,
    UNREAD_METHODS,
    method_by_tensors,
)
from cloq_export.artifact.detective.gptq import examine_gptq, gptq_label, has_gptq_shape
from cloq_export.artifact.detective.packed import examine_packed
from cloq_export.artifact.quantization_description import CONFIG_NAME, find_quantization
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.weight_headers import read_headers
from cloq_export.errors import CloqError, FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.shards import WEIGHTS_NAME
from cloq_export.formats import auto_round
from cloq_export.formats.registry import read_quantization_config


@dataclasses.dataclass(frozen=True)
class Examination:
    """What a quantized checkpoint is, as its label says and as its content shows.

    Args:
        path: the folder.
        quant_method: as the config names it, or None.
        producer: the program that wrote it, as the file says, or None.
        label: the layout that the file says it has, or None.
        content: the layout that its tensors show, or None where they leave it open.
        confidence: how sure `content` is: "certain" where names, shapes or constants decide, "likely" where statistics
            do, "open" where nothing does.
        readable: whether this package reads it.
        reading: the layout in which this package reads it, or None.
        refusal: why it does not, or None.
        bits: width of most codes, from the shapes; None if unknown.
        group_size: of most modules, from the shapes; -1 is one group per output channel.
        symmetric: whether all zeros seen are the middle.
        quantized_modules: their number.
        sampled_modules: of how many the tensors were looked at.
        suspicions: what to know, the worst first.
        figures: the statistics.
    """

    path: str
    quant_method: str | None
    producer: str | None
    label: str | None
    content: str | None
    confidence: Confidence
    readable: bool
    reading: str | None
    refusal: str | None
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    quantized_modules: int
    sampled_modules: int
    suspicions: tuple[Suspicion, ...]
    figures: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the examination as a JSON object."""
        return dataclasses.asdict(self)


def examine(path: str | os.PathLike[str]) -> Examination:
    """Say what a quantized checkpoint is and what is suspicious about it.

    Args:
        path: a checkpoint folder of any origin, or a run directory.

    Returns:
        Examination: what was found; at most 64 MiB of tensors are read.

    Raises:
        FormatError: there is no quantized checkpoint at the path, or a file of it is missing or damaged.
    """
    folder = Path(path)
    if not RunDirectory.is_run(folder) and folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        gguf = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".gguf"))
        if gguf:
            return _unread(Case(folder, {}, {}, {}), "gguf", f"the folder holds {gguf[0][:80]}", modules=0)
    folder = checkpoint_folder(folder)
    config = read_json(require_inside(folder, folder / CONFIG_NAME))
    files, headers = read_headers(folder)
    case = Case(folder, {}, files, headers)
    case.quantization = _find_quantization(case, config)
    _note_file_names(case)
    families = {part: modules_with(headers, part) for part in ("qweight", "weight_packed")}
    packed = [module for module in families["weight_packed"] if headers[f"{module}.weight_packed"][0] == "I32"]
    shown = method_by_tensors(headers)
    method = case.text("quant_method")
    if not case.quantization and not shown and not families["qweight"] and not packed:
        raise FormatError(
            f"{folder} has no quantization_config and no tensor of a quantized layout, so it is no quantized "
            f"checkpoint; make one with: cloq run {folder} --out RUN"
        )
    shaped = [module for module in families["qweight"] if has_gptq_shape(headers, module)]
    if shaped and (method is None or method in ("gptq", auto_round.METHOD)):
        return _conclude(case, method, shaped, examine_gptq)
    if packed and method in (None, "compressed-tensors"):
        return _conclude(case, method, packed, examine_packed)
    count = len(families["qweight"]) or len(families["weight_packed"])
    if method in ("gptq", "compressed-tensors"):
        return _examine_other(case, method, shown, count)
    if method is not None and method not in UNREAD_METHODS and shown is None:
        return _unread(case, method, f"quant_method is {method!r}", modules=count)
    seen = shown or ("awq" if families["qweight"] else "compressed-tensors")
    if method is not None and method in UNREAD_METHODS:
        seen = method
    evidence = f"quant_method is {method!r}" if method else "the names and shapes of the tensors"
    if shaped and method is not None:
        case.suspect(
            "label",
            "doubtful",
            f"the file is labelled {method!r}, but its tensors have the shapes of GPTQ",
            f"{len(shaped)} modules have qweight (in * bits / 32, out)",
            "find out which program wrote it before you trust either.",
        )
    return _unread(case, seen, evidence, modules=count)


def _find_quantization(case: Case, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `quantization_config`, from config.json or from where other tools keep it."""
    described = find_quantization(case.folder, config)
    if described is None:
        return {}
    if described.elsewhere:
        case.suspect(
            "config-place",
            "doubtful",
            "config.json has no quantization_config at its usual place; "
            f"{described.source.removeprefix(str(case.folder) + os.sep)[:120]} has one, as older tools write it",
            "many readers do not look there",
            "put its content into config.json under quantization_config; cloq convert writes it there.",
        )
    return described.config


def _note_file_names(case: Case) -> None:
    names = sorted({file.path.name for file in case.files.values()})
    if names and not any(name in (WEIGHTS_NAME, "model-00001-of-" + name[-17:]) for name in names[:1]):
        case.suspect(
            "file-name",
            "note",
            "the weights are in files of another name than readers look for",
            ", ".join(names[:3]),
            f"it is read here; for other readers rename it to {WEIGHTS_NAME}, or write it again with cloq convert.",
        )


def _conclude(
    case: Case, method: str | None, modules: list[str], look: Callable[[Case, list[str]], FamilyVerdict]
) -> Examination:
    """Examine a family that is read, try to read it, and put both together."""
    reading, refusal, checkpoint = None, None, None
    try:
        checkpoint = Checkpoint.open(case.folder)
        case.grids, reading = checkpoint.grids, checkpoint.grids.layout.name
        read = {checkpoint.stored_module(module) for module in checkpoint.specs}
        others = [module for module in modules if module not in read]
        if others:
            case.suspect(
                "extra",
                "doubtful",
                f"{len(others)} modules have codes that the config does not speak of; they are not read",
                f"the first is {others[0][:120]}",
                "find out whether they are meant.",
            )
            modules = [module for module in modules if module in read]
    except CloqError as error:
        refusal = str(error)
        try:
            case.grids = read_quantization_config(
                case.quantization, case.headers, source=str(case.folder / CONFIG_NAME)
            )
        except CloqError:
            case.grids = None
    verdict = look(case, modules)
    if checkpoint is not None:
        refusal = _try_to_read(checkpoint) or _blocking(case)
        reading = None if refusal else reading
    order: Sequence[Level] = ("wrong", "doubtful", "note")
    return Examination(
        path=str(case.folder),
        quant_method=method,
        producer=_producer(case),
        label=verdict.label,
        content=verdict.content,
        confidence=verdict.confidence,
        readable=reading is not None,
        reading=reading,
        refusal=refusal,
        bits=verdict.bits,
        group_size=verdict.group_size,
        symmetric=verdict.symmetric,
        quantized_modules=verdict.modules,
        sampled_modules=verdict.sampled,
        suspicions=tuple(sorted(case.suspicions, key=lambda suspicion: order.index(suspicion.level))),
        figures=case.figures,
    )


def _unread(case: Case, method: str, evidence: str, *, modules: int) -> Examination:
    """Return the examination of a format that is not read."""
    what, remedy = UNREAD_METHODS.get(method, (f"of the method {method!r}, which is unknown here", ""))
    case.suspect("not-read", "note", f"the checkpoint is {what}; it is not read", evidence, remedy)
    return Examination(
        path=str(case.folder),
        quant_method=case.text("quant_method"),
        producer=_producer(case),
        label=case.text("packing_format") or case.text("checkpoint_format") or case.text("version"),
        content=method,
        confidence="certain" if method in UNREAD_METHODS else "open",
        readable=False,
        reading=None,
        refusal=f"{case.folder} is {what}, which is not read; {remedy or 'quantize the float model: cloq run MODEL'}.",
        bits=whole_number(case.quantization.get("bits")) or whole_number(case.quantization.get("w_bit")),
        group_size=whole_number(case.quantization.get("group_size")),
        symmetric=None,
        quantized_modules=modules,
        sampled_modules=0,
        suspicions=tuple(case.suspicions),
        figures=case.figures,
    )


def _examine_other(case: Case, method: str, shown: str | None, modules: int) -> Examination:
    """Return the examination of a file whose label is one that is read and whose tensors are not."""
    label = gptq_label(case)[0] if method == "gptq" else case.text("format") or "none"
    if method == "gptq" and label in UNREAD_GPTQ_FORMATS:
        what, remedy = UNREAD_GPTQ_FORMATS[label]
    elif method == "compressed-tensors" and label in UNREAD_COMPRESSED_TENSORS:
        what, remedy = UNREAD_COMPRESSED_TENSORS[label], "only its format pack-quantized is read"
    else:
        seen = UNREAD_METHODS[shown][0] if shown else "of no layout that is known here"
        if method == "gptq" and modules:
            seen = UNREAD_METHODS["awq"][0]
        what, remedy = seen, "ask its publisher which program wrote it"
        case.suspect(
            "label", "wrong", f"the file is labelled {method}, but its tensors are {seen}", "names and shapes", remedy
        )
    case.suspect("not-read", "note", f"the checkpoint is {what}; it is not read", f"the label is {label!r}", remedy)
    examination = _unread(case, shown or method, f"the label is {label!r}", modules=modules)
    return dataclasses.replace(
        examination,
        label=label,
        content=None if shown is None else shown,
        confidence="open" if shown is None else "certain",
        refusal=f"{case.folder} is {what}, which is not read; {remedy}.",
        suspicions=tuple(case.suspicions[:-1]),
    )


def _blocking(case: Case) -> str | None:
    """Return the first finding in a sampled layer that our reader refuses, although the file could be opened."""
    for suspicion in case.suspicions:
        if suspicion.kind in ("act-order", "scales") and suspicion.level == "wrong":
            return f"{case.folder}: {suspicion.finding} ({suspicion.evidence}); {suspicion.remedy}"
    return None


def _try_to_read(checkpoint: Checkpoint) -> str | None:
    """Compare all shapes and read the smallest layer, and return why one is refused, or None."""
    parts = checkpoint.grids.layout.roles

    def stored(module: str) -> int:
        return sum(math.prod(checkpoint.headers.get(f"{module}.{part}", ("", (0,)))[1]) for part in parts)

    try:
        for module in checkpoint.specs:
            checkpoint.features(module)
    except CloqError as error:
        return str(error)
    smallest = min(checkpoint.specs, key=stored)
    if 4 * stored(smallest) > 8 * LAYER_BYTES:
        return None
    try:
        checkpoint.read_layer(smallest)
    except CloqError as error:
        return str(error)
    return None


def _producer(case: Case) -> str | None:
    """Return the program that wrote a file, as the file says."""
    meta = case.quantization.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    if isinstance(quantizer, list) and quantizer:
        quantizer = quantizer[0]
    if isinstance(quantizer, str):
        return quantizer[:80]
    version = case.text("autoround_version")
    if version is not None:
        return f"auto_round:{version}"
    if case.text("quant_method") == "compressed-tensors" and case.text("version") is not None:
        return f"compressed-tensors:{case.text('version')}"
    return None
