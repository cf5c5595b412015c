"""Which version of GPTQ a checkpoint of another tool has, where its content says it and not only its label."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.formats.gptq import GptqLayout, version_of_symmetric
from cloq_export.formats.layout import StoredGrids
from cloq_export.types import QuantSpec


@dataclasses.dataclass(frozen=True)
class StoredFiles:
    """The files of a checkpoint's tensors, and what they call them.

    Args:
        files: tensor name -> the file that holds it.
        stored: tensor name -> its name in the file, where that is another one.
    """

    files: Mapping[str, TensorFile]
    stored: Mapping[str, str]

    def place(self, name: str) -> tuple[TensorFile, str]:
        """Return the file of a tensor, and its name there."""
        return self.files[name], self.stored.get(name, name)


def version_by_content(
    folder: Path, grids: StoredGrids, specs: Mapping[str, QuantSpec], held: StoredFiles
) -> tuple[StoredGrids, list[str]]:
    """Return grids whose version of GPTQ is the one of the content, and a note if the label is another.

    In a symmetric layer every zero is the middle, which proves the version; it then counts for all layers. Asymmetric
    layers prove nothing, but where their codes lie as only those of the other version do, the checkpoint is refused.

    Args:
        folder: of the checkpoint.
        grids: as the config says them.
        specs: quantized module -> its grid.
        held: its tensors.

    Raises:
        FormatError: the content of asymmetric layers speaks against the label.
    """
    layout = grids.layout
    if not isinstance(layout, GptqLayout):
        return grids, []
    symmetric = [module for module, spec in specs.items() if spec.symmetric]
    if not symmetric:
        _refuse_other_version(folder, layout, list(specs), held)
        return grids, []
    proven = set()
    for module in {symmetric[0], symmetric[len(symmetric) // 2], symmetric[-1]}:
        file, file_name = held.place(f"{module}.qzeros")
        code, shape = file.headers[file_name]
        if code != "I32" or len(shape) != 2:
            return grids, []
        proven.add(version_of_symmetric(file.read_rows(file_name, 0, 1), specs[module]))
    version = proven.pop()
    if proven or version is None or version == layout.version:
        return grids, []
    proven_layout = layout.in_version(version)
    note = (
        f"the label says {layout.name}, but the zeros of its symmetric layers are stored as in "
        f"{proven_layout.name}; read as {proven_layout.name}"
    )
    return dataclasses.replace(grids, layout=proven_layout), [note]


def _refuse_other_version(folder: Path, layout: GptqLayout, modules: Sequence[str], held: StoredFiles) -> None:
    # The detective opens checkpoints itself.
    from cloq_export.artifact.detective.contradiction import contradicted_version

    files = {name: file for file, name in map(held.place, held.files)}
    in_files = [held.place(f"{module}.qweight")[1].removesuffix(".qweight") for module in modules]
    evidence = contradicted_version(folder, files, in_files, layout.version)
    if evidence is not None:
        other = layout.in_version(1 if layout.version == 2 else 2).name
        raise FormatError(
            f"{folder} is labelled {layout.name}, but its codes lie as in {other} ({evidence}); write it again with "
            f"`cloq convert {folder} --read-as {other} --format gptq_v2 --out OUT`, or with `read_as={layout.name}` "
            "if the label is known to be right."
        )
