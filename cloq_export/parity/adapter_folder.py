"""Whether other readers of an adapter's folder make of it what is read here: its settings, names and other files."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

from cloq_export.artifact.adapters import carried_beside
from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.formats.patterns import NamePattern
from cloq_export.formats.peft import WEIGHTS_NAME, Adapter, tensor_name
from cloq_export.parity.provenance import CONTRADICTED, NOT_PROVEN, Finding

_TASKS = (None, "CAUSAL_LM")


def judge_folder(name: str, folder: Path, adapter: Adapter, base: Path) -> list[Finding]:
    """Return what PEFT and engines would read otherwise than it was made, going by the files of its folder.

    Args:
        name: that it is served under.
        folder: its folder.
        adapter: as it was read from there; one whose making was recorded, so that nothing else lies there by right.
        base: folder of the checkpoint or graph that it is served on.
    """
    what = f"adapter {name}"
    try:
        left_out = modules_left_out(adapter)
    except FormatError as error:
        return [Finding(what, NOT_PROVEN, str(error))]
    reasons = [*_reasons(folder, adapter, base)]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        reasons.insert(0, f"adapter_config.json leaves out {left_out[0]}{more}, whose pairs the file holds")
    return [Finding(what, CONTRADICTED, reason) for reason in reasons]


def modules_left_out(adapter: Adapter) -> list[str]:
    """Return the modules that PEFT and engines would leave out, going by adapter_config.json alone.

    Raises:
        FormatError: it names modules by a pattern that is not read.
    """
    config = adapter.config
    named = config.get("target_modules")
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return sorted(adapter.pairs)
    if isinstance(named, str):
        # PEFT compares the whole name; of "all-linear" it takes every linear layer but the head.
        pattern = NamePattern(f"(?:{named})$", source="target_modules")
        return [] if named == "all-linear" else sorted(name for name in adapter.pairs if not pattern.matches(name))
    if not isinstance(named, list):
        return []  # nothing is said, and an engine goes by the file
    return sorted(module for module in adapter.pairs if not any(f".{module}".endswith(f".{name}") for name in named))


def _reasons(folder: Path, adapter: Adapter, base: Path) -> Iterator[str]:
    task = adapter.config.get("task_type")
    if task not in _TASKS:
        yield f"adapter_config.json says task_type {task!r:.40}, and the model is one of CAUSAL_LM"
    weights = folder / WEIGHTS_NAME
    if weights.is_file():
        expected = {tensor_name(module, side) for module in adapter.pairs for side in "AB"}
        if others := sorted({*TensorFile(weights).headers} - expected):
            yield f"{WEIGHTS_NAME} holds {others[0]!r:.120}, a name that PEFT does not look for"
    for beside in carried_beside(folder):
        if not _is_same_file(folder / beside, base / beside):
            yield f"its folder holds {beside!a:.80} too, which an engine may read, and which is not the base's"


def _is_same_file(own: Path, theirs: Path) -> bool:
    return own.is_file() and theirs.is_file() and filecmp.cmp(own, theirs, shallow=False)
