"""Transformers models from files alone: with packed linears, or dense as the float32 reference."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cloq_export.errors import BindingError, FormatError, NonFiniteError, RunDirectoryError, ShapeError
from cloq_export.formats.gptq import GPTQ_V2
from cloq_export.formats.peft.codec import Adapter, is_adapter, read_adapter
from cloq_export.kernels import cpu
from cloq_export.run.directory import RunDirectory
from cloq_export.run.versions import require_versions
from cloq_export.runtimes.checkpoint import ADAPTERS_NAME, Checkpoint
from cloq_export.runtimes.checkpoint_writer import linears_beside
from cloq_export.runtimes.packed_linear import PackedLinear
from cloq_export.types import QuantizedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tensors that other writers leave in their files and that models compute for themselves.
_COMPUTED_BY_MODELS = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
)


def load(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    force: bool = False,
) -> PreTrainedModel:
    """Load a quantized checkpoint as a transformers model whose linears hold the packed codes and compute from them.

    Quantized linears are `PackedLinear`: no dequantized copy of any of them is kept. On the CPU they compute with the
    native library; where there is none, with plain torch, and a warning says so. The adapter is attached by PEFT under
    the name "default"; it is held in float32 and switched off and on with the model's own `disable_adapters()` and
    `enable_adapters()`.

    Args:
        path: a run directory or a checkpoint folder.
        adapter: the name of an adapter in the run, or an adapter folder; None attaches none.
        device: where the model is put.
        dtype: of the float tensors and the activations; None means the one that the checkpoint is stored in. Codes
            and scales stay as they are.
        trainable: let gradients reach the adapter; otherwise all parameters are frozen.
        force: attach the adapter even if it is bound to another base.

    Returns:
        PreTrainedModel: in evaluation mode.

    Raises:
        FormatError: a file is missing or damaged, or does not fit the model or the adapter.
        BindingError: the adapter is bound to another base, or to none.
        RunDirectoryError: the run has no adapter of that name.
    """
    checkpoint = Checkpoint.open(path)
    found = None if adapter is None else find_adapter(path, adapter)
    read = None if found is None else read_bound_adapter(found, checkpoint, force=force)
    model = _build_model(checkpoint, dtype, _place_packed)
    # PEFT and transformers ask for this word before they merge into, or cast, a model whose weights are packed.
    model.quantization_method = "gptq"
    if found is not None and read is not None:
        _attach(model, found, read, trainable=trainable)
    model.requires_grad_(False)
    if trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    model = model.to(torch.device(device)).eval()
    _report_slow_layers(model)
    return model


def dequantized_model(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    merged: bool = True,
    force: bool = False,
) -> PreTrainedModel:
    """Load a quantized checkpoint as an ordinary float32 model: the reference that every runtime is compared with.

    Each quantized linear becomes a `torch.nn.Linear` with weight `Q + (alpha / rank) * B A`, computed in float32.
    Merging rounds each weight once more than serving does, which a badly conditioned model (2 bits without training)
    amplifies; `merged=False` leaves Q and the pair apart, the arithmetic of a runtime that serves adapters.

    Args:
        path: a run directory or a checkpoint folder.
        adapter: the name of an adapter in the run, or an adapter folder; None takes none.
        device: where the model is put.
        merged: add B A to Q; False attaches the pair with PEFT as `load` does.
        force: take the adapter even if it is bound to another base.

    Returns:
        PreTrainedModel: in evaluation mode; merged, it can be saved with `save_pretrained` like any other.

    Raises:
        FormatError: a file is missing or damaged, or does not fit the model or the adapter.
        BindingError: the adapter is bound to another base, or to none.
        RunDirectoryError: the run has no adapter of that name.
    """
    checkpoint = Checkpoint.open(path)
    found = None if adapter is None else find_adapter(path, adapter)
    read = None if found is None else read_bound_adapter(found, checkpoint, force=force)
    model = _build_model(checkpoint, torch.float32, _place_dense)
    del model.config.quantization_config
    if found is not None and read is not None and not merged:
        _attach(model, found, read, trainable=False)
    elif found is not None and read is not None:
        _check_pairs(model, found, read)
        with torch.no_grad():
            for module, pair in read.pairs.items():
                model.get_submodule(module).weight += pair.product()
    return model.to(torch.device(device)).eval()


@dataclasses.dataclass(frozen=True)
class _PackedTensors:
    """The tensors of one quantized module as read, checked against the linear that they replace."""

    checkpoint: Checkpoint
    module: str
    linear: nn.Linear
    tensors: dict[str, torch.Tensor]

    def layer(self) -> QuantizedLayer:
        """Return the layer in its canonical form."""
        return self.checkpoint.unpack(self.module, self.tensors)


def _place_packed(packed: _PackedTensors, dtype: torch.dtype) -> nn.Linear:
    """Return the packed linear of a module; words in the kernels' own order are taken as they lie in the file."""
    tensors, spec = packed.tensors, packed.checkpoint.specs[packed.module]
    if packed.checkpoint.grids.layout is not GPTQ_V2:
        tensors = GPTQ_V2.pack_layer(packed.layer(), name=packed.module)
    expected = torch.arange(packed.linear.in_features, dtype=torch.int32) // spec.columns_per_group(
        packed.linear.in_features
    )
    if not torch.equal(tensors["g_idx"], expected):
        raise FormatError(
            f"g_idx is not sequential (an act-order checkpoint, or another group size than {spec.group_size}); "
            "quantize again with desc_act=false."
        )
    if tensors["scales"].dtype != torch.float16:
        raise FormatError(f"scales are {tensors['scales'].dtype}; expected torch.float16.")
    return PackedLinear(tensors["qweight"], tensors["qzeros"], tensors["scales"], bits=spec.bits, dtype=dtype)


def _place_dense(packed: _PackedTensors, dtype: torch.dtype) -> nn.Linear:
    """Return the dense linear of a module."""
    with torch.device("meta"):
        dense = nn.Linear(packed.linear.in_features, packed.linear.out_features, bias=False)
    dense.weight = nn.Parameter(packed.layer().dequantize(dtype))
    return dense


def _report_slow_layers(model: PreTrainedModel) -> None:
    """Warn once if layers on the CPU compute without the native library."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    slow = sum(module.native is None and module.packed_codes.device.type == "cpu" for module in packed)
    if slow:
        warnings.warn(f"{slow} packed layers compute with plain torch, slowly. {cpu.describe()}", stacklevel=3)


def _build_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, place: Callable[[_PackedTensors, torch.dtype], nn.Linear]
) -> PreTrainedModel:
    """Return the model of a checkpoint, with `place` making the quantized linears."""
    require_versions()
    model = _empty_model(checkpoint, dtype)
    for module, linear in _targeted_linears(checkpoint, model).items():
        try:
            packed = _PackedTensors(checkpoint, module, linear, checkpoint.read_parts(module))
            placed = place(packed, model.dtype)
        except (ShapeError, NonFiniteError, FormatError) as error:
            text = str(error)
            raise FormatError(text if module in text else f"{checkpoint.folder}: {module}: {text}") from None
        # Its numbers come with the float part.
        placed.bias = linear.bias
        model.set_submodule(module, placed)
    for name in checkpoint.float_names():
        _place_float(checkpoint, model, name, checkpoint.read(name), source=checkpoint.files[name].path)
    model.tie_weights()
    _refuse_gaps(checkpoint, model)
    _read_generation_config(checkpoint, model)
    return model


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model that config.json describes, with parameters that hold no memory and buffers that do."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    source = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        wanted = dtype or _stored_dtype(config)
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a malformed configuration leads to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(
            f"{source} does not describe a causal language model that transformers can build ({reason}); check the "
            "file, or update transformers."
        ) from error
    return model


def unquantized_linears(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the linear modules that a checkpoint leaves in float, the head left out, sorted.

    Raises:
        FormatError: config.json describes no model that transformers can build.
    """
    return linears_beside(_empty_model(checkpoint, None), checkpoint.specs)


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.float32


def _targeted_linears(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linears that the checkpoint quantizes, after checking the shapes that its headers give."""
    linears: dict[str, nn.Linear] = {}
    for module, spec in checkpoint.specs.items():
        try:
            linear: nn.Module | None = model.get_submodule(module)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise FormatError(
                f"{checkpoint.folder} quantizes {module}, which is no linear layer of {type(model).__name__}; "
                "config.json and the weights belong to different models."
            )
        try:
            expected = checkpoint.grids.layout.headers(linear.out_features, linear.in_features, spec)
        except ShapeError as error:
            raise FormatError(f"{checkpoint.folder}: {module}: {error}") from None
        for part, (_, shape) in expected.items():
            seen = checkpoint.headers[f"{module}.{part}"][1]
            if seen != shape:
                raise FormatError(
                    f"{checkpoint.files[f'{module}.{part}'].path}: {module}.{part} has shape {seen}; a layer with "
                    f"{linear.in_features} inputs and {linear.out_features} outputs at {spec.bits} bits needs {shape}."
                )
        linears[module] = linear
    return linears


def _place_float(checkpoint: Checkpoint, model: PreTrainedModel, name: str, tensor: torch.Tensor, source: Path) -> None:
    """Put a tensor that is not quantized where its name says."""
    owner_name, _, part = name.rpartition(".")
    try:
        owner: nn.Module | None = model.get_submodule(owner_name)
    except AttributeError:
        owner = None
    held: torch.Tensor | None = None
    if owner is not None:
        held = owner._parameters.get(part)
        if held is None and part not in owner._non_persistent_buffers_set:
            held = owner._buffers.get(part)
    if owner is None or held is None:
        if not checkpoint.is_ours or name.endswith(_COMPUTED_BY_MODELS):
            return
        raise FormatError(
            f"{source} holds {name}, for which {type(model).__name__} has no place; config.json and the weights belong "
            "to different models."
        )
    if held.shape != tensor.shape:
        raise FormatError(
            f"{source}: {name} has shape {tuple(tensor.shape)}; {type(model).__name__} needs {tuple(held.shape)}."
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{source}: {name} holds NaN or Inf; fetch or write the file again.")
    cast = tensor.to(held.dtype)
    if isinstance(held, nn.Parameter):
        owner._parameters[part] = nn.Parameter(cast, requires_grad=held.requires_grad)
    else:
        owner._buffers[part] = cast


def _refuse_gaps(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    # Not the state dict, which would hold every packed layer a second time.
    tensors = itertools.chain(
        *(named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers))
    )
    missing = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(
            f"{checkpoint.folder} lacks the tensor {missing[0]}{more}, which {type(model).__name__} needs; fetch or "
            "write the checkpoint again."
        )


def _read_generation_config(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    from transformers import GenerationConfig

    if (checkpoint.folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        except (OSError, ValueError, TypeError) as error:
            raise FormatError(
                f"{checkpoint.folder / 'generation_config.json'} is damaged ({' '.join(str(error).split())[:200]}); "
                "fetch the file again, or delete it."
            ) from None


def find_adapter(path: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter.

    Args:
        path: a run directory or a checkpoint folder.
        adapter: the name of an adapter in it, or an adapter folder.

    Raises:
        RunDirectoryError: the run has no adapter of that name.
        FormatError: there is no adapter.
    """
    inside = Path(path) / ADAPTERS_NAME / os.fspath(adapter)
    if isinstance(adapter, str) and Path(adapter).name == adapter and is_adapter(inside):
        return inside
    if RunDirectory.is_run(path):
        run = RunDirectory.open(path)
        if isinstance(adapter, str) and adapter in run.adapters():
            return run.adapter_path(adapter)
        if not Path(adapter).is_dir():
            names = ", ".join(run.adapters()) or "none"
            raise RunDirectoryError(
                f"{path} has no adapter {os.fspath(adapter)!r}; it has {names}. Give one of these, or an adapter "
                "folder."
            )
    folder = Path(adapter)
    if not is_adapter(folder):
        raise FormatError(
            f"{folder} is no adapter folder; give the folder that holds adapter_config.json, or give the run "
            "directory as the path to name one of its adapters."
        )
    return folder


def read_bound_adapter(folder: Path, checkpoint: Checkpoint, *, force: bool) -> Adapter:
    """Return the adapter of a folder, refusing one that belongs to another base.

    Args:
        folder: the adapter folder.
        checkpoint: the base that it is to be served on.
        force: take it whatever it is bound to.

    Raises:
        BindingError: it is bound to another base, or to none.
        FormatError: a file is missing or damaged.
    """
    read = read_adapter(folder)
    if force:
        return read
    base = checkpoint.fingerprint
    if read.base_fingerprint is None:
        raise BindingError(
            f"{folder} does not say which quantized base it belongs to; {checkpoint.folder} is {base}. Only if it was "
            "trained on this base, load it with force=True."
        )
    if read.base_fingerprint != base:
        raise BindingError(
            f"{folder} is bound to the base {read.base_fingerprint}, but {checkpoint.folder} is {base}; an adapter is "
            "wrong on any other quantization. Make one for this base with `cloq adapt`, or load it with force=True."
        )
    return read


def _check_pairs(model: PreTrainedModel, folder: Path, adapter: Adapter) -> None:
    for module, pair in adapter.pairs.items():
        try:
            linear: nn.Module | None = model.get_submodule(module)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise FormatError(
                f"{folder} adapts {module}, which is no linear layer of {type(model).__name__}; it belongs to another "
                "model."
            )
        if (pair.lora_B.shape[0], pair.lora_A.shape[1]) != (linear.out_features, linear.in_features):
            raise FormatError(
                f"{folder}: A {tuple(pair.lora_A.shape)} and B {tuple(pair.lora_B.shape)} do not fit {module} with "
                f"{linear.in_features} inputs and {linear.out_features} outputs; it belongs to another model."
            )


def _attach(model: PreTrainedModel, folder: Path, adapter: Adapter, *, trainable: bool) -> None:
    """Let PEFT wrap the adapted linears, and fill in A and B as they are stored."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from cloq_export.runtimes.packed_lora import PackedLoraLinear

    _check_pairs(model, folder, adapter)
    config = LoraConfig.from_pretrained(str(folder))
    config.target_modules = set(adapter.pairs)
    config.inference_mode = not trainable
    config._register_custom_module({PackedLinear: PackedLoraLinear})
    # PEFT draws random numbers for A before the stored ones replace them: a load must not move anybody's seed.
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(config, "default")
    # Not PEFT's own loader: it asks for the state dict, which holds every packed layer a second time.
    for name, pair in adapter.pairs.items():
        layer = model.get_submodule(name)
        placed = isinstance(layer, LoraLayer) and "default" in layer.lora_A
        for kind, factor in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
            linear = getattr(layer, kind)["default"] if placed else None
            if linear is None or linear.weight.shape != factor.shape:
                raise FormatError(
                    f"PEFT found no place for {name}.{kind} of {folder}; update peft, or write the adapter again."
                )
            # As PEFT's loader does: float16 factors in a bfloat16 model would lose three bits.
            linear.to(torch.float32)
            with torch.no_grad():
                linear.weight.copy_(factor)


@contextlib.contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Give the model with its adapters switched off, and switch them on again afterwards.

    Args:
        model: a model from `load` with an adapter.

    Returns:
        A context whose value is the same model, serving Q alone.
    """
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()
