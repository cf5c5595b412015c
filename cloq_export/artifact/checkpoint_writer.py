"""Write a quantized checkpoint folder in any layout: whole or not at all, one layer in memory at a time."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_names import stored_names
from cloq_export.errors import FormatError
from cloq_export.files.atomic import translate_os_errors, write_folder, write_json
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.shards import ShardWriter
from cloq_export.files.tensor_writer import tensor_header
from cloq_export.formats.gptq import GPTQ_V2
from cloq_export.formats.layout import Layout
from cloq_export.models.tied_head import correct_config, corrected_entries, embeddings_in, is_tied, untied_entries
from cloq_export.models.weights_on_disk import tensor_of
from cloq_export.types import QuantizedLayer, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
_Written = TypeVar("_Written")


@dataclasses.dataclass(frozen=True)
class WriteSettings(Generic[_Written]):
    """How a checkpoint folder is written.

    Args:
        max_shard_bytes: largest weight file; one layer or tensor that is larger has a file of its own.
        base_fingerprint: of the layers, if known; another one than theirs is refused.
        finish: called with the filled folder and what was written before the folder gets its name; what it raises
            leaves nothing behind.
        progress: called with (layers written, layers in all).
    """

    max_shard_bytes: int = 5 * 10**9
    base_fingerprint: str | None = None
    finish: Callable[[Path, _Written], Any] | None = None
    progress: Progress | None = None

    def refuse_other_layers(self, fingerprint: str) -> None:
        """Refuse layers of another fingerprint than was promised.

        Raises:
            FormatError: they have one.
        """
        if self.base_fingerprint is not None and self.base_fingerprint != fingerprint:
            raise FormatError(
                f"the layers have the fingerprint {fingerprint}, but {self.base_fingerprint} was promised; they were "
                "changed since: run the command again."
            )


@dataclasses.dataclass(frozen=True)
class LayerSource:
    """The quantized layers of a base, read one at a time and as often as needed.

    Args:
        specs: full module name -> its grid, in the order in which the layers are written.
        shapes: full module name -> (out, in).
        read: gives one layer.
        needs_adapter: the codes were made for what their adapter leaves of the weights.
    """

    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str], QuantizedLayer]
    needs_adapter: bool = False

    @classmethod
    def of_run(cls, run: RunDirectory) -> LayerSource:
        """Return the finished layers of a run."""
        files = run.layer_files()
        specs = {name: file.spec for name, file in files.items()}
        shapes = {name: file.shape for name, file in files.items()}
        needs_adapter = any(file.certificate is not None and file.certificate.needs_adapter for file in files.values())
        return cls(specs, shapes, run.read_codes, needs_adapter)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> LayerSource:
        """Return the layers of a checkpoint, unpacked from its layout."""
        shapes = {name: checkpoint.features(name) for name in checkpoint.specs}
        return cls(checkpoint.specs, shapes, checkpoint.read_layer, checkpoint.needs_adapter)

    @classmethod
    def of_mapping(cls, layers: Mapping[str, QuantizedLayer]) -> LayerSource:
        """Return layers that lie in memory."""
        specs = {name: layer.spec for name, layer in layers.items()}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        return cls(specs, shapes, layers.__getitem__)


@dataclasses.dataclass(frozen=True)
class FloatPart:
    """What a quantized checkpoint holds besides its quantized modules, read one tensor at a time.

    Args:
        headers: tensor name -> (dtype code of safetensors, shape), in the order in which they are written.
        read: gives one tensor.
        config: entries of config.json that replace those that `save_files` writes.
        skipped: linear modules that stay float, the head left out.
        save_files: writes config.json, tokenizer and the like into the folder it is given.
        embeddings: quantized modules that are embeddings.
        stored: tensor or quantized module -> its name in files, where that is another one than in memory.
        tied: tensor that the files do not hold -> the one that it is tied to, as far as it may be written apart.
    """

    headers: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], torch.Tensor]
    config: Mapping[str, Any]
    skipped: tuple[str, ...]
    save_files: Callable[[Path], Any]
    embeddings: tuple[str, ...] = ()
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_model(
        cls,
        model: PreTrainedModel,
        layers: LayerSource,
        *,
        dtype: torch.dtype | None = None,
        save_files: Callable[[Path], Any] | None = None,
    ) -> FloatPart:
        """Return the float part of a model in memory; of tied tensors one is kept.

        Args:
            model: the float model that the layers were made from.
            layers: its quantized layers.
            dtype: dtype that float tensors had in the source; each is written in it if that loses nothing, and
                otherwise as the model holds it. None writes all as the model holds them.
            save_files: as in the class; None writes the model's config.

        Returns:
            The float part, which refers to the model's tensors.

        Raises:
            FormatError: a module is not a linear layer of the model, or a tensor has no numbers.
        """
        for module, shape in layers.shapes.items():
            check_target(model, module, shape)
        tensors = dict(float_tensors(model, layers.specs))

        def read(name: str) -> torch.Tensor:
            return _narrowed(tensor_of(model, name, tensors[name]), dtype)

        headers = {name: tensor_header(name, read(name)) for name in tensors}
        return cls(
            headers,
            read,
            {
                "architectures": [type(model).__name__],
                "dtype": str(dtype or model.dtype).removeprefix("torch."),
                **untied_entries(model, layers.specs),
            },
            linears_beside(model, layers.specs),
            save_files or (lambda folder: _save_config(model, folder)),
            embeddings_in(model, layers.specs),
            stored_names(model, headers, layers.specs),
        )

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        skipped: Iterable[str],
        embeddings: tuple[str, ...],
        save_files: Callable[[Path], Any],
        idle: Container[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> FloatPart:
        """Return the float part of a checkpoint as its files hold it, idle tensors left out; `config` as above."""
        headers = {name: checkpoint.headers[name] for name in checkpoint.float_names() if name not in idle}
        stored = {name: checkpoint.stored[name] for name in headers if name in checkpoint.stored}
        stored |= {module: checkpoint.stored_module(module) for module in checkpoint.specs}
        stored = {name: file_name for name, file_name in stored.items() if name != file_name}
        return cls(headers, checkpoint.read, config or {}, tuple(sorted(skipped)), save_files, embeddings, stored)

    def name_in_files(self, name: str, part: str = "") -> str:
        """Return what files call a tensor, or a part of a quantized module."""
        name_in_files = self.stored.get(name, name)
        return f"{name_in_files}.{part}" if part else name_in_files


def export_checkpoint(
    folder: str | os.PathLike[str],
    layers: LayerSource,
    floats: FloatPart,
    *,
    layout: Layout = GPTQ_V2,
    settings: WriteSettings[str] | None = None,
) -> str:
    """Write a quantized checkpoint folder, whole or not at all, with one layer in memory at a time.

    Args:
        folder: the folder to make; an earlier checkpoint of ours there is replaced.
        layers: the quantized layers.
        floats: everything besides them.
        layout: how each layer is stored.
        settings: how the folder is written; what is written is the fingerprint of the layers.

    Returns:
        The base fingerprint of the layers.

    Raises:
        FormatError: a name is taken twice, or the layers are bound to another fingerprint.
        ShapeError: a layer does not fit the layout.
        RunDirectoryError: the folder holds other files, the disk is full, or it cannot be written.
    """
    from cloq_export import __version__

    settings = settings or WriteSettings()
    if floats.embeddings and not layout.holds_embeddings:
        raise FormatError(
            f"the layout {layout.name} cannot hold {floats.embeddings[0]}, the codes of embeddings; choose "
            "`format=compressed_tensors`."
        )
    bundles: list[Mapping[str, tuple[str, tuple[int, ...]]]] = []
    for module, spec in layers.specs.items():
        out_features, in_features = layers.shapes[module]
        layout.check_packable(out_features, in_features, spec, name=module)
        headers = layout.headers(out_features, in_features, spec)
        bundles.append({floats.name_in_files(module, part): header for part, header in headers.items()})
    bundles += [{floats.name_in_files(name): header} for name, header in floats.headers.items()]
    digests: dict[str, str] = {}
    with write_folder(folder, owned=is_ours) as filling:
        with ShardWriter(filling, bundles, settings.max_shard_bytes) as shards:
            for done, module in enumerate(layers.specs, start=1):
                layer = layers.read(module)
                digests[module] = layer_digest(layer)
                packed = layout.pack_layer(layer, name=module)
                shards.write({floats.name_in_files(module, part): tensor for part, tensor in packed.items()})
                if settings.progress is not None:
                    settings.progress(done, len(layers.specs))
            for name in floats.headers:
                shards.write({floats.name_in_files(name): floats.read(name)})
        fingerprint = combine_digests(digests)
        settings.refuse_other_layers(fingerprint)
        with translate_os_errors(Path(folder)):
            floats.save_files(filling)
        quantization = layout.quantization_config(
            layers.specs,
            base_fingerprint=fingerprint,
            # Some readers match names in memory, others those in the files.
            skipped={*floats.skipped, *(_module_in_files(floats, name) for name in floats.skipped)},
            producer=f"cloq_export:{__version__}",
            needs_adapter=layers.needs_adapter,
            embeddings=floats.embeddings,
        )
        config = {**read_json(filling / CONFIG_NAME), **floats.config}
        drop_private(config)
        write_json(filling / CONFIG_NAME, {**config, "quantization_config": quantization})
        if settings.finish is not None:
            settings.finish(filling, fingerprint)
    return fingerprint


def _module_in_files(floats: FloatPart, module: str) -> str:
    name = floats.name_in_files(f"{module}.weight")
    return name.removesuffix(".weight") if name.endswith(".weight") else module


def float_tensors(model: PreTrainedModel, specs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the quantized modules leave of the model's state, tied tensors once and under their source's name.

    What is on disk comes as it stands in the model; `tensor_of` reads it.

    Args:
        model: the float model.
        specs: the quantized modules.

    Raises:
        FormatError: a tensor has no numbers.
    """
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    quantized = {*copies_of_codes(model, specs), *specs}
    seen: set[tuple[Any, ...]] = set()
    for name in sorted(state, key=lambda key: key in tied):
        tensor = state[name]
        module, _, part = name.rpartition(".")
        if module in quantized and part == "weight":
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


def check_target(model: PreTrainedModel, module: str, shape: tuple[int, int]) -> None:
    """Refuse a quantized layer that has no linear layer of its shape (out, in) in the model.

    Raises:
        FormatError: the layers belong to another model.
    """
    try:
        linear = model.get_submodule(module)
    except AttributeError:
        raise FormatError(f"the model has no module {module}; the layers belong to another model.") from None
    if not isinstance(linear, (nn.Linear, nn.Embedding)) or tuple(linear.weight.shape) != shape:
        raise FormatError(f"{module} of the model is {linear}; the layer is {shape}: they belong to different models.")


def copies_of_codes(model: nn.Module, specs: Container[str]) -> dict[str, str]:
    """Return linear modules whose weight is tied to a quantized module's -> that module.

    Args:
        model: the model, with or without numbers.
        specs: the quantized modules.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    modules = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in tied.items()
        if target.endswith(".weight")
    }
    return {module: source for module, source in modules.items() if source in specs and module not in specs}


def linears_beside(model: nn.Module, specs: Container[str]) -> tuple[str, ...]:
    """Return the linear modules of a model that are not quantized, the head left out, sorted.

    Routers are among them, which are no `nn.Linear` in transformers, and linear layers to engines.

    Args:
        model: the model, with or without numbers.
        specs: the quantized modules.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    copies = copies_of_codes(model, specs)
    return tuple(
        sorted(
            name
            for name, module in model.named_modules()
            if _multiplies(module) and module is not head and name not in specs and name not in copies
        )
    )


def _multiplies(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix of its own: a linear layer, or a router."""
    if isinstance(module, nn.Linear):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def drop_private(config: dict[str, Any]) -> None:
    """Remove what is outdated from a config.json, and the local folder of the model."""
    config.pop("torch_dtype", None)
    # An export holds no code of a model, so its config must not ask for any.
    config.pop("auto_map", None)
    if Path(str(config.get("_name_or_path"))).is_absolute():
        del config["_name_or_path"]


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint that this package wrote."""
    try:
        quantization = read_json(folder / CONFIG_NAME).get("quantization_config")
    except FormatError:
        return False
    return isinstance(quantization, Mapping) and "cloq" in quantization


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's config, corrected where it disagrees with the model about tied embeddings."""
    model.config.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    if correct_config(config, tied=is_tied(model)):
        raw = read_json(folder / CONFIG_NAME)
        write_json(folder / CONFIG_NAME, {**raw, **corrected_entries(raw, config)})


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point() or dtype.itemsize >= tensor.element_size():
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
