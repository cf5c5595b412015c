"""A quantized checkpoint folder in any layout, read without trusting it; `checkpoint_writer` makes them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.run_directory import RunDirectory, natural_order
from cloq_export.errors import FormatError
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.safe_tensors import MAX_NAME, TensorFile
from cloq_export.files.shards import INDEX_NAME, WEIGHTS_NAME
from cloq_export.formats.gptq import GptqLayout, version_of_symmetric
from cloq_export.formats.layout import Headers, StoredGrids
from cloq_export.formats.registry import LAYOUTS, read_quantization_config
from cloq_export.models.fetched_code import refuse_fetched_code
from cloq_export.types import QuantizedLayer, QuantSpec

CONFIG_NAME = "config.json"
ADAPTERS_NAME = "adapters"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors", re.ASCII)
# Files beside the weights that are none: adapters, and Mistral's own copy of them.
_NO_WEIGHTS = ("adapter_", "adapter.", "consolidated", "eora", "optimizer", "training_")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

# Where a quantization is described: keys of config.json, keys of a language model's config in it, and files of older
# tools and of ModelOpt. AutoGPTQ and GPTQModel write the same thing into a file and into config.json.
_KEYS = ("quantization_config", "compression_config")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
QUANTIZE_CONFIG_NAME = "quantize_config.json"
_CONFIG_FILES = (QUANTIZE_CONFIG_NAME, "quant_config.json", "hf_quant_config.json")
# What decides how the tensors are read: where two places differ in one of these, they describe two files.
_DECISIVE = (
    "quant_method",
    "bits",
    "group_size",
    "sym",
    "checkpoint_format",
    "format",
    "packing_format",
    "dynamic",
    "extra_config",
    "config_groups",
    "ignore",
)
# Parts that mean codes nearby, in any layout.
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
        notes: where content counted and not the label.
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
        found = find_quantization(folder, config)
        if found is None:
            _refuse_undescribed(folder)
            raise FormatError(
                f"{folder / CONFIG_NAME} has no quantization_config, so {folder} is not a quantized checkpoint; make "
                f"one with: cloq run {folder} --out RUN"
            )
        source = found.source
        files, headers = read_headers(folder)
        renamed = _names_in_memory(folder, config, found.config, headers)
        files = {renamed.get(name, name): file for name, file in files.items()}
        grids, by_memory = _read_grids(found.config, headers, renamed, source=source)
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
            grids, notes = _by_content(grids, specs, files, stored)
        return cls(folder, config, grids, specs, files, headers, stored, tuple(notes))

    @property
    def is_ours(self) -> bool:
        """Return whether this package wrote the checkpoint."""
        return self.grids.modules is not None

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
    found = [in_files.spec_for(stored), in_memory.spec_for(module)]
    own = [spec for spec in found if spec != in_memory.default] or found[:1]
    if any(spec != own[0] for spec in own):
        raise FormatError(
            f"{source} gives {stored} one grid under this name and another as {module}; the config is damaged."
        )
    return own[0]


@dataclasses.dataclass(frozen=True)
class FoundQuantization:
    """What a folder says about its quantization, wherever it stands.

    Args:
        config: as a `quantization_config` of config.json holds it.
        source: the place, for messages.
        elsewhere: whether config.json has none at its usual place.
    """

    config: Mapping[str, Any]
    source: str
    elsewhere: bool


def find_quantization(folder: Path, config: Mapping[str, Any]) -> FoundQuantization | None:
    """Find the description of a quantization in config.json, or where older and other tools keep it.

    Args:
        folder: the checkpoint folder.
        config: content of its config.json.

    Returns:
        What was found, with keys that only another place has added; None where there is nothing.

    Raises:
        FormatError: a place is damaged, or two of them disagree.
    """
    places = [*_places_in_config(folder, config), *_places_beside(folder)]
    if not places:
        return None
    source, main = places[0]
    for other, content in places[1:]:
        for key in _DECISIVE:
            if key in main and key in content and main[key] != content[key]:
                raise FormatError(
                    f"{source} says {key} {main[key]!r:.80}, but {other} says {content[key]!r:.80}; one of them "
                    "describes another checkpoint: remove the wrong one."
                )
        # A file of its own keeps the order of the rules; what transformers writes into config.json is sorted.
        added = {key: content[key] for key in _DECISIVE if key in content and (key not in main or key == "dynamic")}
        main = {**main, **added}
    return FoundQuantization(main, source, source != str(folder / CONFIG_NAME))


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


def _places_in_config(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    source = str(folder / CONFIG_NAME)
    for owner in (None, *_TEXT_CONFIGS):
        held = config if owner is None else config.get(owner)
        for key in _KEYS if isinstance(held, Mapping) else ():
            value = held.get(key)  # type: ignore[union-attr]
            if value is None:
                continue
            place = key if owner is None else f"{owner}.{key}"
            if not isinstance(value, Mapping):
                raise FormatError(f"{source}: {place} is a {type(value).__name__}; expected an object.")
            if not value:
                continue
            if key == "compression_config" and "quant_method" not in value:
                value = {"quant_method": "compressed-tensors", **value}
            yield (source if place == _KEYS[0] else f"{source} ({place})"), value


def _places_beside(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in _CONFIG_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content: Mapping[str, Any] = read_json(require_inside(folder, path))
        if name == "hf_quant_config.json":
            inner = content.get("quantization")
            content = {"quant_method": "modelopt", **(inner if isinstance(inner, Mapping) else content)}
        elif content and "quant_method" not in content:
            # AutoGPTQ's first versions named no method, and AWQ's first versions other keys.
            content = {"quant_method": "awq" if "w_bit" in content else "gptq", **content}
        if content:
            yield str(path), content


def _by_content(
    grids: StoredGrids, specs: Mapping[str, QuantSpec], files: Mapping[str, TensorFile], stored: Mapping[str, str]
) -> tuple[StoredGrids, list[str]]:
    """Return grids whose version of GPTQ is the one that symmetric layers prove, and a note if the label is another.

    Whether zeros are stored as they are or less one cannot be seen in an asymmetric file for certain; in a symmetric
    one every zero is the middle.
    """
    layout = grids.layout
    symmetric = [module for module, spec in specs.items() if spec.symmetric]
    if not isinstance(layout, GptqLayout) or not symmetric:
        return grids, []
    proven = set()
    for module in {symmetric[0], symmetric[len(symmetric) // 2], symmetric[-1]}:
        name = f"{module}.qzeros"
        file, file_name = files[name], stored.get(name, name)
        code, shape = file.headers[file_name]
        if code != "I32" or len(shape) != 2:
            return grids, []
        proven.add(version_of_symmetric(file.read_rows(file_name, 0, 1), specs[module]))
    version = proven.pop()
    if proven or version is None or version == layout.version:
        return grids, []
    found = layout.in_version(version)
    note = (
        f"the label says {layout.name}, but the zeros of its symmetric layers are stored as in {found.name}; read as "
        f"{found.name}"
    )
    return dataclasses.replace(grids, layout=found), [note]


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


def read_headers(folder: Path) -> tuple[dict[str, TensorFile], dict[str, tuple[str, tuple[int, ...]]]]:
    """Return the file and the header of every tensor of a folder, quantized or not.

    Args:
        folder: the checkpoint folder.

    Returns:
        (tensor name -> its file, tensor name -> (dtype code of safetensors, shape)).

    Raises:
        FormatError: a file is missing or damaged, lies elsewhere, or the files do not belong together.
    """
    index = _index_name(folder)
    weight_map = None if index is None else _read_index(folder, index)
    names = _weight_names(folder) if weight_map is None else sorted(set(weight_map.values()))
    files: dict[str, TensorFile] = {}
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        if not (folder / name).is_file():
            _explain_missing(folder, name, index=index)
    for name in names:
        path = require_inside(folder, folder / name)
        file = TensorFile(path)
        for tensor, header in file.headers.items():
            if tensor in files:
                raise FormatError(
                    f"{path} and {files[tensor].path} both hold {tensor}; the folder mixes two checkpoints."
                )
            if weight_map is not None and weight_map.get(tensor) != name:
                raise FormatError(
                    f"{path} holds {tensor}, but {index} says {weight_map.get(tensor)!r:.80}; the folder mixes "
                    "two checkpoints: write or fetch it again."
                )
            files[tensor], headers[tensor] = file, header
    for tensor in weight_map or {}:
        if tensor not in files:
            raise FormatError(
                f"{folder / str(index)} promises {tensor!r:.80}, which no file holds; fetch or write it again."
            )
    return files, headers


def _index_name(folder: Path) -> str | None:
    """Return the index of a folder's weight files: of the usual name, or the only other one."""
    if (folder / INDEX_NAME).exists() or (folder / WEIGHTS_NAME).exists():
        return INDEX_NAME if (folder / INDEX_NAME).exists() else None
    others = sorted(
        path.name for path in folder.glob("*.safetensors.index.json") if not path.name.startswith(_NO_WEIGHTS)
    )
    return others[0] if len(others) == 1 else None


def _weight_names(folder: Path) -> list[str]:
    """Return the weight files of a folder without an index: the usual one, or those that older tools wrote."""
    if (folder / WEIGHTS_NAME).exists():
        return [WEIGHTS_NAME]
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith(_NO_WEIGHTS))
    numbered = [match for name in found if (match := _NUMBERED.fullmatch(name)) is not None]
    if found and len(numbered) == len(found) and len({(match["stem"], match["count"]) for match in numbered}) == 1:
        stem, count = numbered[0]["stem"], numbered[0]["count"]
        whole = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        missing = [name for name in whole if name not in found]
        if missing:
            raise FormatError(f"{folder / missing[0]} does not exist, but {found[0]} is there; fetch it again.")
        return found
    if len(found) <= 1:
        return found or [WEIGHTS_NAME]
    named = _base_name(folder)
    if named in found:
        return [named]
    raise FormatError(
        f"{folder} holds {', '.join(found[:4])}{' and more' if len(found) > 4 else ''}, and nothing says which of them "
        f"are the weights; leave one, or rename it to {WEIGHTS_NAME}."
    )


def _base_name(folder: Path) -> str | None:
    """Return the weight file that AutoGPTQ's own config names, or None."""
    path = folder / QUANTIZE_CONFIG_NAME
    name = read_json(require_inside(folder, path)).get("model_file_base_name") if path.is_file() else None
    return f"{name}.safetensors" if isinstance(name, str) else None


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """Return tensor name -> file name from an index."""
    path = folder / name
    weight_map = read_json(require_inside(folder, path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map; the file is damaged: fetch or write it again.")
    for tensor, shard in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(shard, str) or _SHARD_NAME.fullmatch(shard) is None:
            raise FormatError(
                f"{path} puts {tensor[:80]!r} into {str(shard)[:80]!r}; expected the name of a .safetensors file in "
                "the same folder."
            )
    return weight_map


def _explain_missing(folder: Path, name: str, *, index: str | None) -> None:
    if index is not None:
        raise FormatError(f"{folder / name} does not exist, but {index} names it; fetch or write it again.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise FormatError(
            f"{folder} holds {pickles[0]:.80} but no {name}; only safetensors files are read, because a pickle can run "
            "any code. Convert the checkpoint first: load it where you trust it, with the tool that wrote it, and save "
            "it as safetensors."
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".npz"))
    if others:
        raise FormatError(
            f"{folder} holds {others[0]:.80}, but no weights under a name that transformers or GPTQ tools give them, "
            f"such as {name}; if these are the weights, with the names of transformers inside, rename the file."
        )
    raise FormatError(f"{folder / name} does not exist; fetch or write the checkpoint again.")
