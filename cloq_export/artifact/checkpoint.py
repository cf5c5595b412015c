"""A quantized checkpoint folder in any layout, read without trusting it; `checkpoint_writer` makes them."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.gptq_version import StoredFiles, version_by_content
from cloq_export.artifact.quantization_description import CONFIG_NAME, QUANTIZE_CONFIG_NAME, find_quantization
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import natural_order
from cloq_export.artifact.weight_headers import read_headers
from cloq_export.errors import FormatError
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.safe_tensors import MAX_NAME, TensorFile
from cloq_export.formats.layout import Headers, StoredGrids
from cloq_export.formats.registry import LAYOUTS, read_quantization_config
from cloq_export.models.fetched_code import refuse_fetched_code
from cloq_export.models.rope_statements import refuse_two_ropes
from cloq_export.types import QuantizedLayer, QuantSpec

# Names of tensors that occur only beside codes, in any layout.
_CODED_PARTS = frozenset({part for layout in LAYOUTS.values() for part in layout.roles} | {"weight_g_idx"})


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint folder whose headers are read and checked, and whose tensors are not read yet.

    Args:
        folder: the folder.
        config: content of config.json.
        grids: what its `quantization_config` says.
        specs: quantized module -> its grid, in the order of the model's blocks.
        files: tensor name -> the file that holds it, opened.
        headers: tensor name -> (dtype code of safetensors, shape).
        stored: tensor name -> its name in the file, where that is another one; all other names are those in memory.
        notes: where the content decided against the label.
    """

    folder: Path
    config: Mapping[str, Any]
    grids: StoredGrids
    specs: Mapping[str, QuantSpec]
    files: Mapping[str, TensorFile]
    headers: Mapping[str, tuple[str, tuple[int, ...]]]
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_as: str | None = None) -> Checkpoint:
        """Open a checkpoint folder, or the checkpoint of a run.

        Args:
            path: a checkpoint folder or a run directory.
            read_as: name of the layout to read it in, where its label is wrong; None believes the label.

        Returns:
            The checkpoint.

        Raises:
            UnsupportedModelError: the config would make transformers fetch code.
            FormatError: the folder is missing, of another kind, or a file of it is missing, damaged or disagrees.
        """
        folder = checkpoint_folder(path)
        config = read_json(require_inside(folder, folder / CONFIG_NAME))
        refuse_fetched_code(config, str(folder / CONFIG_NAME))
        refuse_two_ropes(config, str(folder / CONFIG_NAME))
        described = find_quantization(folder, config)
        if described is None:
            _refuse_undescribed(folder)
            raise FormatError(
                f"{folder / CONFIG_NAME} has no quantization_config, so {folder} is not a quantized checkpoint; make "
                f"one with: cloq run {folder} --out RUN"
            )
        source = described.source
        files, headers = read_headers(folder)
        renamed = _names_in_memory(folder, config, described.config, headers)
        files = {renamed.get(name, name): file for name, file in files.items()}
        grids, by_memory = _read_grids(described.config, headers, renamed, source=source)
        headers = {renamed.get(name, name): header for name, header in headers.items()}
        stored = {name: file_name for file_name, name in renamed.items()}
        notes: list[str] = []
        if read_as is not None:
            grids = _relabelled(grids, read_as)
        modules = grids.modules
        main = next(part for part, role in grids.layout.roles.items() if role == "codes")
        if modules is None:
            modules = tuple(sorted(name.removesuffix(f".{main}") for name in headers if name.endswith(f".{main}")))
        # Messages carry these texts; one that runs over lines or screens would hide what they say.
        for text in (*modules, *([grids.base_fingerprint] if grids.base_fingerprint else [])):
            if not text.isprintable() or len(text) > MAX_NAME:
                raise FormatError(f"{source} holds the name {text!r:.80}; the config is damaged.")
        specs: dict[str, QuantSpec] = {}
        for module in sorted(modules, key=natural_order):
            in_files = stored.get(f"{module}.{main}", f"{module}.{main}").removesuffix(f".{main}")
            spec = _agreed_spec(grids, by_memory, in_files, module, source=source)
            if spec is None:
                raise FormatError(f"{source} lists {module} as quantized and as float; the config is damaged.")
            for name in grids.layout.parts(spec):
                if f"{module}.{name}" not in headers:
                    raise FormatError(f"{folder} lacks the tensor {module}.{name}; a file is missing or damaged.")
            specs[module] = spec
        if not specs:
            raise FormatError(f"{folder} holds no quantized module; the checkpoint is damaged.")
        _refuse_strangers(folder, specs, grids, headers)
        if read_as is None and grids.modules is None:
            grids, notes = version_by_content(folder, grids, specs, StoredFiles(files, stored))
        checkpoint = cls(folder, config, grids, specs, files, headers, stored, tuple(notes))
        checkpoint._refuse_small_floats()
        return checkpoint

    @property
    def is_ours(self) -> bool:
        """Return whether this package wrote the checkpoint."""
        return self.grids.modules is not None

    @property
    def needs_adapter(self) -> bool:
        """Return whether the codes were made for what their adapter leaves of the weights, so that alone they fail."""
        return self.grids.needs_adapter

    @property
    def noted_fingerprint(self) -> str | None:
        """Return the base fingerprint that the config carries, whatever the tensors are; None if it carries none."""
        return self.grids.base_fingerprint

    @property
    def layout_name(self) -> str:
        """Return the name of the layout."""
        return self.grids.layout.name

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as it is stored.

        Raises:
            FormatError: its file was damaged since the checkpoint was opened.
        """
        return self.files[name].read(self.stored.get(name, name))

    def stored_module(self, module: str) -> str:
        """Return what the files call a quantized module."""
        for part in self.grids.layout.roles:
            name = self.stored.get(f"{module}.{part}")
            if name is not None:
                return name.removesuffix(f".{part}")
        return module

    def read_layer(self, module: str) -> QuantizedLayer:
        """Return one quantized module in its canonical form.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        return self.unpack(module, self.read_parts(module))

    def read_layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (module, layer) for every quantized module, one in memory at a time.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        for module in self.specs:
            yield module, self.read_layer(module)

    def read_parts(self, module: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a quantized module as they are stored, without the module's name."""
        names = {part: f"{module}.{part}" for part in self.grids.layout.roles}
        return {part: self.read(name) for part, name in names.items() if name in self.headers}

    def float_names(self) -> list[str]:
        """Return the names of the tensors that belong to no quantized module, sorted."""
        return sorted(name for name in self.headers if self._module_of(name) is None)

    def _refuse_small_floats(self) -> None:
        """Refuse float tensors in less than half precision, which lack the scales that they would need."""
        for name in self.float_names():
            if (code := self.headers[name][0]).startswith("F8_"):
                raise FormatError(
                    f"{self.folder} holds {name} as {code}; what is not quantized is read in float32, float16 and "
                    "bfloat16: write the checkpoint again in one of them."
                )

    def _module_of(self, name: str) -> str | None:
        module, _, part = name.rpartition(".")
        return module if module in self.specs and part in self.grids.layout.roles else None

    def features(self, module: str) -> tuple[int, int]:
        """Return (out, in) of a quantized module, from its headers.

        Raises:
            FormatError: no layer of its grid has such headers.
        """
        parts = {part: self.headers[f"{module}.{part}"] for part in self.grids.layout.parts(self.specs[module])}
        return self.grids.layout.features(
            parts, self.specs[module], name=f"{self.folder}: {module}", read=lambda part: self.read(f"{module}.{part}")
        )

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedLayer:
        """Return a layer from its packed tensors.

        Args:
            module: full module name.
            tensors: its parts, without the module's name.

        Returns:
            The layer.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        return self.grids.layout.unpack_layer(tensors, self.specs[module], name=f"{self.folder}: {module}")

    def computed_fingerprint(self) -> str:
        """Return the base fingerprint of the tensors themselves, whatever the config says.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        return combine_digests({module: layer_digest(layer) for module, layer in self.read_layers()})

    @functools.cached_property
    def fingerprint(self) -> str:
        """The base fingerprint that the config carries, or the computed one, which reads everything, where it has none.

        Raises:
            FormatError: it has to be computed and a tensor holds what the layout does not allow.
        """
        return self.grids.base_fingerprint or self.computed_fingerprint()


def _names_in_memory(
    folder: Path, config: Mapping[str, Any], quantization: Mapping[str, Any], headers: Headers
) -> dict[str, str]:
    """Return stored name -> name in memory of the tensors for which they differ.

    A checkpoint of ours lists its modules as they are called in memory, and only a class with names of its own has
    others in its files.
    """
    from cloq_export.artifact.stored_names import has_names_of_its_own, names_in_memory

    ours = quantization.get("cloq")
    listed = ours.get("modules") if isinstance(ours, Mapping) else None
    if isinstance(listed, list) and not has_names_of_its_own(config):
        held = {name.rpartition(".")[0] for name in headers}
        if held.issuperset(module for module in listed if isinstance(module, str)):
            return {}
    return names_in_memory(folder, config, headers)


def _read_grids(
    quantization: Mapping[str, Any], headers: Headers, renamed: Mapping[str, str], *, source: str
) -> tuple[StoredGrids, StoredGrids]:
    """Return the grids as the config gives them to names in files, and to names in memory.

    Writers differ in which of the two their rules mean, so both are asked; where one cannot be answered, the other
    counts.

    Raises:
        FormatError: neither can.
    """
    if not renamed:
        grids = read_quantization_config(quantization, headers, source=source)
        return grids, grids
    both = headers, {renamed.get(name, name): header for name, header in headers.items()}
    read: list[StoredGrids] = []
    refusals: list[FormatError] = []
    for named in both:
        try:
            read.append(read_quantization_config(quantization, named, source=source))
        except FormatError as error:
            refusals.append(error)
    if not read:
        raise refusals[0]
    return read[0], read[-1]


def _agreed_spec(
    in_files: StoredGrids, in_memory: StoredGrids, stored: str, module: str, *, source: str
) -> QuantSpec | None:
    """Return the grid of a module whose rule may be written for its name in the files or in memory."""
    if in_memory.modules is not None:
        return in_memory.spec_for(module)
    candidates = [in_files.spec_for(stored), in_memory.spec_for(module)]
    own = [spec for spec in candidates if spec != in_memory.default] or candidates[:1]
    if any(spec != own[0] for spec in own):
        raise FormatError(
            f"{source} gives {stored} one grid under this name and another as {module}; the config is damaged."
        )
    return own[0]


def _refuse_undescribed(folder: Path) -> None:
    """Refuse a folder whose tensors are quantized although nothing says how."""
    try:
        _, headers = read_headers(folder)
    except FormatError:
        return
    coded = [name for name in headers if name.rpartition(".")[2] in _CODED_PARTS]
    if coded:
        raise FormatError(
            f"{folder / CONFIG_NAME} has no quantization_config, so {folder} is not a quantized checkpoint that can be "
            f"read, although it holds {coded[0]:.200}; fetch the {QUANTIZE_CONFIG_NAME} that its tool wrote beside it."
        )


def _refuse_strangers(
    folder: Path,
    specs: Mapping[str, QuantSpec],
    grids: StoredGrids,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    """Refuse tensors beside codes that change what the codes mean, and parts of a quantized layer without codes."""
    for name in headers:
        module, _, part = name.rpartition(".")
        if module in specs:
            if part not in grids.layout.roles and part != "bias":
                what = "a float weight too" if part == "weight" else "more than its layout"
                raise FormatError(
                    f"{folder} holds {name:.200} beside the codes of {module:.200}: {what}, and readers differ in "
                    "what they make of that; find out what the checkpoint is with `cloq inspect`."
                )
        elif part in _CODED_PARTS:
            raise FormatError(
                f"{folder} holds {name:.200}, a part of a quantized layer, but its config and codes do not make "
                f"{module:.200} one; fetch or write the checkpoint again."
            )


def _relabelled(grids: StoredGrids, layout: str) -> StoredGrids:
    """Return grids that are read in another layout of the same family than their label says."""
    family = {name: known for name, known in LAYOUTS.items() if known.quant_method == grids.layout.quant_method}
    if layout not in family:
        raise FormatError(
            f"the checkpoint is labelled {grids.layout.name} and cannot be read as {layout!r}; allowed are "
            f"{', '.join(family)}."
        )
    return dataclasses.replace(grids, layout=family[layout])


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint folder that a path means: the folder itself, or the one inside a run directory.

    Args:
        path: a checkpoint folder or a run directory.

    Returns:
        The folder that holds config.json.

    Raises:
        FormatError: there is no folder, the run has no checkpoint yet, or it is a folder of another kind.
    """
    folder = Path(path)
    if RunDirectory.is_run(folder):
        inside = RunDirectory.open(folder).checkpoint_path
        if not inside.is_dir():
            raise FormatError(f"{folder} is a run without a checkpoint yet; write it with: cloq export {folder}")
        folder = inside
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FormatError(f"{folder} {what}; give a run directory or a checkpoint folder.")
    if not (folder / CONFIG_NAME).is_file():
        raise FormatError(
            f"{folder} holds no {CONFIG_NAME}, so it is neither a run directory nor a checkpoint folder; check the "
            "path."
        )
    return folder


def report_labels(checkpoint: Checkpoint) -> None:
    """Warn where the content of a checkpoint counted and not its label."""
    for note in checkpoint.notes:
        warnings.warn(f"{checkpoint.folder}: {note}", stacklevel=3)
