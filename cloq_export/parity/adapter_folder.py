"""Whether other readers of an adapter's folder make of it what is read here: its settings, names and other files."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path

from cloq_export.artifact.adapters import carried_beside
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.formats.peft import WEIGHTS_NAME, Adapter, tensor_name
from cloq_export.parity.provenance import CONTRADICTED, Finding

_TASKS = (None, "CAUSAL_LM")


def judge_folder(name: str, folder: Path, adapter: Adapter, base: Path) -> list[Finding]:
    """Return what PEFT and engines would read otherwise than it was made, going by the files of its folder.

    Args:
        name: that it is served under.
        folder: its folder.
        adapter: as it was read from there; one whose making was recorded, so that nothing else lies there by right.
        base: folder of the checkpoint or graph that it is served on.
    """
    return [Finding(f"adapter {name}", CONTRADICTED, reason) for reason in _reasons(folder, adapter, base)]


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
