"""A checkpoint folder in the GPTQ layout: written from quantized layers, and read back without trusting it."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cloq_export.errors import FormatError
from cloq_export.formats.gptq.codec import (
    TENSOR_NAMES,
    GptqConfig,
    Version,
    pack_layer,
    parse_quantization_config,
    quantization_config,
    unpack_layer,
)
from cloq_export.run.atomic import translate_os_errors, write_folder, write_json, write_safetensors
from cloq_export.run.directory import RunDirectory
from cloq_export.run.fingerprint import combine_digests, layer_digest
from cloq_export.run.safe_json import read_json
from cloq_export.run.safe_tensors import read_safetensors, read_safetensors_header
from cloq_export.types import QuantizedLayer, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "gptq_model.pt")


def export_checkpoint(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    layers: Iterable[tuple[str, QuantizedLayer]],
    *,
    skipped: Iterable[str] = (),
    version: Version = 2,
    float_dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    base_fingerprint: str | None = None,
    save_files: Callable[[Path], Any] | None = None,
) -> str:
    """Write a GPTQ checkpoint folder, whole or not at all, with one layer and one shard in memory at a time.

    Tensors that are not quantized are taken from the model under its own names; of tied tensors one is written.

    Args:
        folder: the folder to make; an earlier checkpoint of ours there is replaced.
        model: the float model that the layers were made from.
        layers: (full module name, layer), each module once; read once.
        skipped: linear modules of the blocks that stay float.
        version: 2 writes `gptq_v2`, 1 writes `gptq`.
        float_dtype: dtype that float tensors had in the source; each is written in it if that loses nothing, and
            otherwise as the model holds it. None writes all as the model holds them.
        max_shard_bytes: largest weight file; one layer or tensor that is larger has a file of its own.
        base_fingerprint: of the layers, if known; another one than theirs is refused.
        save_files: writes config, tokenizer and the like into the folder it is given; None writes the model's config.

    Returns:
        The base fingerprint of the layers.

    Raises:
        FormatError: a module is not a linear layer of the model, comes twice, or is bound to another fingerprint.
        ShapeError: a layer does not fit the layout.
        RunDirectoryError: the folder holds other files, the disk is full, or it cannot be written.
    """
    digests: dict[str, str] = {}
    specs: dict[str, QuantSpec] = {}
    # The float tensors can be told only when all quantized modules are known, so they are written last.
    with write_folder(folder, owned=_is_ours) as filling:
        shards = _ShardWriter(filling, max_shard_bytes)
        for module, layer in layers:
            if module in digests:
                raise FormatError(f"the module {module} comes twice; a checkpoint holds each layer once.")
            _check_target(model, module, layer)
            digests[module] = layer_digest(layer)
            specs[module] = layer.spec
            packed = pack_layer(layer, version=version, name=module)
            shards.add({f"{module}.{name}": tensor for name, tensor in packed.items()})
        fingerprint = combine_digests(digests)
        if base_fingerprint is not None and base_fingerprint != fingerprint:
            raise FormatError(
                f"the layers have the fingerprint {fingerprint}, but {base_fingerprint} was promised; they were "
                "changed since: run the command again."
            )
        for name, tensor in _float_tensors(model, specs):
            shards.add({name: _narrowed(tensor, float_dtype)})
        with translate_os_errors(Path(folder)):
            shards.close()
            if save_files is None:
                model.config.save_pretrained(filling)
            else:
                save_files(filling)
        _add_quantization(filling / CONFIG_NAME, model, specs, skipped, version, fingerprint, float_dtype)
    return fingerprint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A GPTQ checkpoint folder whose headers are read and checked, and whose tensors are not read yet.

    Args:
        folder: the folder.
        config: content of config.json.
        gptq: what its `quantization_config` says.
        specs: quantized module -> its grid, sorted by name.
        files: tensor name -> the file that holds it.
        headers: tensor name -> (dtype code of safetensors, shape).
    """

    folder: Path
    config: Mapping[str, Any]
    gptq: GptqConfig
    specs: Mapping[str, QuantSpec]
    files: Mapping[str, Path]
    headers: Mapping[str, tuple[str, tuple[int, ...]]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint folder, or the checkpoint of a run.

        Args:
            path: a checkpoint folder or a run directory.

        Returns:
            The checkpoint.

        Raises:
            FormatError: the folder is missing, of another kind, or a file of it is missing, damaged or disagrees.
        """
        folder = checkpoint_folder(path)
        config = read_json(folder / CONFIG_NAME)
        source = str(folder / CONFIG_NAME)
        quantization = config.get("quantization_config")
        if not isinstance(quantization, Mapping):
            raise FormatError(
                f"{source} has no quantization_config, so {folder} is not a quantized checkpoint; make one with: "
                f"cloq run {folder} --out RUN"
            )
        gptq = parse_quantization_config(quantization, source=source)
        files, headers = _read_headers(folder)
        modules = gptq.modules
        if modules is None:
            modules = tuple(sorted(name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")))
        specs: dict[str, QuantSpec] = {}
        for module in modules:
            spec = gptq.spec_for(module)
            if spec is None:
                raise FormatError(f"{source} lists {module} as quantized and as float; the config is damaged.")
            for name in TENSOR_NAMES:
                if f"{module}.{name}" not in headers:
                    raise FormatError(f"{folder} lacks the tensor {module}.{name}; a file is missing or damaged.")
            specs[module] = spec
        if not specs:
            raise FormatError(f"{folder} holds no quantized module; the checkpoint is damaged.")
        return cls(folder, config, gptq, specs, files, headers)

    @property
    def is_ours(self) -> bool:
        """Return whether this package wrote the checkpoint."""
        return self.gptq.modules is not None

    def read_files(self) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
        """Yield the weight files with their tensors, one file in memory at a time.

        Raises:
            FormatError: a file was damaged since the checkpoint was opened.
        """
        for path in sorted(set(self.files.values())):
            yield path, read_safetensors(path)[0]

    def read_layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """Yield (module, layer) for every quantized module, file by file.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
        for _, tensors in self.read_files():
            for name, tensor in tensors.items():
                module, _, part = name.rpartition(".")
                if module in self.specs and part in TENSOR_NAMES:
                    waiting[module][part] = tensor
            for module in [name for name, parts in waiting.items() if len(parts) == len(TENSOR_NAMES)]:
                yield module, self.unpack(module, waiting.pop(module))

    def unpack(self, module: str, tensors: Mapping[str, torch.Tensor]) -> QuantizedLayer:
        """Return a layer from its packed tensors.

        Args:
            module: full module name.
            tensors: qweight, qzeros, scales and g_idx.

        Returns:
            The layer.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        return unpack_layer(tensors, self.specs[module], version=self.gptq.version, name=f"{self.folder}: {module}")

    def computed_fingerprint(self) -> str:
        """Return the base fingerprint of the tensors themselves, whatever the config says.

        Raises:
            FormatError: a tensor holds what the layout does not allow.
        """
        return combine_digests({module: layer_digest(layer) for module, layer in self.read_layers()})

    def fingerprint(self) -> str:
        """Return the base fingerprint that the config carries, or the computed one where it carries none.

        Raises:
            FormatError: it has to be computed and a tensor holds what the layout does not allow.
        """
        return self.gptq.base_fingerprint or self.computed_fingerprint()


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


class _ShardWriter:
    """Collects tensors into weight files of bounded size, named as transformers names them."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors that belong into one file."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending |= tensors
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left, give the files their final names, and the index if there are several."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = WEIGHTS_NAME if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            os.replace(self._folder / _unnumbered(number), self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            write_json(
                self._folder / INDEX_NAME, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            )

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(list(self._pending))
            write_safetensors(self._folder / _unnumbered(len(self._shards)), self._pending, {"format": "pt"})
            self._pending, self._pending_bytes = {}, 0


def _unnumbered(number: int) -> str:
    return f"shard-{number}.safetensors"


def _check_target(model: PreTrainedModel, module: str, layer: QuantizedLayer) -> None:
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        raise FormatError(f"the model has no module {module}; the layers belong to another model.") from None
    shape = (layer.out_features, layer.in_features)
    if not isinstance(linear, torch.nn.Linear) or (linear.out_features, linear.in_features) != shape:
        raise FormatError(f"{module} of the model is {linear}; the layer is {shape}: they belong to different models.")


def _float_tensors(model: PreTrainedModel, specs: Mapping[str, QuantSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the quantized modules leave of the model's state, tied tensors once and under their source's name."""
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    seen: set[tuple[Any, ...]] = set()
    for name in sorted(state, key=lambda key: key in tied):
        tensor = state[name]
        module, _, part = name.rpartition(".")
        if module in specs and part == "weight":
            continue
        if tensor.device.type == "meta":
            raise FormatError(
                f"{name} of the model holds no numbers (it lies on the meta device); load the model whole."
            )
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if name in tied and place in seen:
            continue
        seen.add(place)
        yield name, tensor


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or dtype.itemsize >= tensor.element_size():
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _add_quantization(
    path: Path,
    model: PreTrainedModel,
    specs: Mapping[str, QuantSpec],
    skipped: Iterable[str],
    version: Version,
    fingerprint: str,
    float_dtype: torch.dtype | None,
) -> None:
    """Put into config.json what a reader needs beside what the source's config says."""
    from cloq_export import __version__

    config = read_json(path)
    config["architectures"] = [type(model).__name__]
    config.pop("torch_dtype", None)
    config["dtype"] = str(float_dtype or model.dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(
        specs,
        version=version,
        base_fingerprint=fingerprint,
        skipped=skipped,
        producer=f"cloq_export:{__version__}",
    )
    write_json(path, config)


def _is_ours(folder: Path) -> bool:
    try:
        quantization = read_json(folder / CONFIG_NAME).get("quantization_config")
    except FormatError:
        return False
    return isinstance(quantization, Mapping) and "cloq" in quantization


def _read_headers(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[str, tuple[int, ...]]]]:
    """Return the file and the header of every tensor of a folder."""
    weight_map = _read_index(folder)
    names = sorted(set(weight_map.values())) if weight_map is not None else [WEIGHTS_NAME]
    files: dict[str, Path] = {}
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        if not (folder / name).is_file():
            _explain_missing(folder, name, sharded=weight_map is not None)
    for name in names:
        path = folder / name
        for tensor, header in read_safetensors_header(path)[0].items():
            if tensor in files:
                raise FormatError(f"{path} and {files[tensor]} both hold {tensor}; the folder mixes two checkpoints.")
            if weight_map is not None and weight_map.get(tensor) != name:
                raise FormatError(
                    f"{path} holds {tensor}, but {INDEX_NAME} says {weight_map.get(tensor)!r}; the folder mixes two "
                    "checkpoints: write or fetch it again."
                )
            files[tensor], headers[tensor] = path, header
    for tensor in weight_map or {}:
        if tensor not in files:
            raise FormatError(f"{folder / INDEX_NAME} promises {tensor}, which no file holds; fetch or write it again.")
    return files, headers


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return tensor name -> file name from the index, or None if the folder has no index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map; the file is damaged: fetch or write it again.")
    for tensor, name in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(name, str) or _SHARD_NAME.fullmatch(name) is None:
            raise FormatError(
                f"{path} puts {tensor[:80]!r} into {str(name)[:80]!r}; expected the name of a .safetensors file in the "
                "same folder."
            )
    return weight_map


def _explain_missing(folder: Path, name: str, *, sharded: bool) -> None:
    if sharded:
        raise FormatError(f"{folder / name} does not exist, but {INDEX_NAME} names it; fetch or write it again.")
    pickles = [pickle for pickle in _PICKLES if (folder / pickle).exists()]
    if pickles:
        raise FormatError(
            f"{folder} holds {pickles[0]} but no {name}; only safetensors files are read, because a pickle can run "
            "any code. Convert the checkpoint first."
        )
    raise FormatError(f"{folder / name} does not exist; fetch or write the checkpoint again.")
