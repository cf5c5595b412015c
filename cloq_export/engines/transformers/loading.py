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

from cloq_export.artifact.adapters import AdapterShelf, read_bound_adapter
from cloq_export.artifact.checkpoint import Checkpoint, report_labels
from cloq_export.artifact.checkpoint_writer import copies_of_codes
from cloq_export.artifact.empty_model import (
    empty_model,
    float_places,
    holder_of,
    read_generation_config,
    targeted_linears,
)
from cloq_export.engines.packed_embedding import pack_embedding
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.engines.transformers.deterministic import make_deterministic
from cloq_export.errors import FormatError, NonFiniteError, ShapeError, UsageError
from cloq_export.files.versions import require_versions
from cloq_export.formats.gptq import GPTQ_V2, check_symmetric
from cloq_export.formats.peft.codec import Adapter
from cloq_export.formats.peft.config import adapter_config
from cloq_export.formats.scales import read_scales
from cloq_export.kernels import cpu
from cloq_export.kernels.bitpack import unpack_rows
from cloq_export.models.first_forward import require_forward
from cloq_export.models.library_calls import quiet_transformers
from cloq_export.models.tied_head import correct_config, is_tied
from cloq_export.types import QuantizedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    force: bool = False,
    deterministic: bool = False,
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
        deterministic: give a token the same bits whatever else its batch holds; docs/rl.md says how far.

    Returns:
        PreTrainedModel: in evaluation mode.

    Raises:
        UsageError: `deterministic` of a model that is trained, on another device, or without the native library.
        UnsupportedModelError: `deterministic` of a model that has other parts than linears, norms and attention.
        FormatError: a file is missing or damaged, or does not fit the model or the adapter.
        BindingError: the adapter is bound to another base, or to none.
        RunDirectoryError: the run has no adapter of that name.
    """
    if deterministic and (trainable or torch.device(device).type != "cpu"):
        raise UsageError("deterministic=True is for models that only serve, on the CPU; leave it out here.")
    checkpoint, bound = _opened(path, adapter, force=force)
    model = empty_model(checkpoint, dtype)
    fill_packed(model, checkpoint)
    read_generation_config(checkpoint, model)
    if bound is not None:
        attach_adapter(model, *bound, trainable=trainable)
    model.requires_grad_(False)
    if trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
    model = model.to(torch.device(device)).eval()
    if deterministic:
        make_deterministic(model)
    report_slow_layers(model)
    return model


def _opened(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, *, force: bool
) -> tuple[Checkpoint, tuple[Path, Adapter] | None]:
    """Return a checkpoint, and the folder and pairs of an adapter that is bound to it."""
    checkpoint = Checkpoint.open(path)
    bound: tuple[Path, Adapter] | None = None
    if adapter is not None:
        folder = AdapterShelf.of(path).find(adapter)
        bound = folder, read_bound_adapter(folder, checkpoint, force=force)
    report_labels(checkpoint)
    require_versions()
    return checkpoint, bound


def fill_packed(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Fill a model without weights from a checkpoint, with packed linears in the place of those that it quantizes.

    Args:
        model: of the class and config of the checkpoint, its experts split, its parameters without memory.
        checkpoint: gives the numbers, put on the CPU.

    Raises:
        FormatError: a file is damaged, or does not fit the model.
    """
    _fill(model, checkpoint, _place_packed)
    # PEFT and transformers ask for this word before they merge into, or cast, a model whose weights are packed.
    model.quantization_method = "gptq"
    # To which adapters over the model are bound.
    model.quantized_base = checkpoint


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
    checkpoint, bound = _opened(path, adapter, force=force)
    model = empty_model(checkpoint, torch.float32)
    _fill(model, checkpoint, _place_dense)
    read_generation_config(checkpoint, model)
    require_forward(model.eval(), str(checkpoint.folder))
    del model.config.quantization_config
    if bound is not None and not merged:
        attach_adapter(model, *bound, trainable=False)
    elif bound is not None:
        folder, read = bound
        _check_pairs(model, folder, read)
        with torch.no_grad():
            for module, pair in read.pairs.items():
                weight = _own_weight(model, module)
                weight += pair.product()
    return model.to(torch.device(device)).eval()


def _own_weight(model: PreTrainedModel, module: str) -> torch.Tensor:
    """Return the weight of a linear, after giving it one of its own where it shares it, as a head does with embeddings.

    A pair belongs to one module: apart from the weight it changes nothing else, so merged it must not either.
    """
    linear: Any = model.get_submodule(module)
    sharing = sum(held is linear.weight for _, held in model.named_parameters(remove_duplicate=False))
    if sharing > 1:
        linear.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)
        # Whoever saves the model, or ties it again, must be told.
        model.all_tied_weights_keys.pop(f"{module}.weight", None)
        if linear is model.get_output_embeddings():
            correct_config(model.config, tied=False)
    return linear.weight


@dataclasses.dataclass(frozen=True)
class _PackedTensors:
    """The tensors of one quantized module as read, checked against the linear that they replace."""

    checkpoint: Checkpoint
    module: str
    linear: nn.Linear | nn.Embedding
    tensors: dict[str, torch.Tensor]

    def layer(self) -> QuantizedLayer:
        """Return the layer in its canonical form."""
        return self.checkpoint.unpack(self.module, self.tensors)


def _place_packed(packed: _PackedTensors, dtype: torch.dtype) -> nn.Module:
    """Return the packed form of a module; words in the kernels' own order are taken as they lie in the file."""
    tensors, spec = packed.tensors, packed.checkpoint.specs[packed.module]
    if isinstance(packed.linear, nn.Embedding):
        return pack_embedding(packed.linear, packed.layer(), dtype)
    if packed.checkpoint.grids.layout is not GPTQ_V2:
        return PackedLinear.of_layer(packed.layer(), dtype=dtype)
    expected = torch.arange(packed.linear.in_features, dtype=torch.int32) // spec.columns_per_group(
        packed.linear.in_features
    )
    if not torch.equal(tensors["g_idx"], expected):
        raise FormatError(
            f"g_idx is not sequential (an act-order checkpoint, or another group size than {spec.group_size}); "
            "quantize again with desc_act=false, or with static groups."
        )
    if spec.symmetric:
        check_symmetric(unpack_rows(tensors["qzeros"], spec.bits), spec, packed.module)
    scales = read_scales(tensors, "scales", tuple(tensors["scales"].shape), name=packed.module)
    return PackedLinear(tensors["qweight"], tensors["qzeros"], scales, bits=spec.bits, dtype=dtype)


def _place_dense(packed: _PackedTensors, dtype: torch.dtype) -> nn.Module:
    """Return the dense form of a module."""
    if isinstance(packed.linear, nn.Embedding):
        packed.linear.weight = nn.Parameter(packed.layer().dequantize(dtype))
        return packed.linear
    with torch.device("meta"):
        dense = nn.Linear(packed.linear.in_features, packed.linear.out_features, bias=False)
    dense.weight = nn.Parameter(packed.layer().dequantize(dtype))
    return dense


def report_slow_layers(model: PreTrainedModel) -> None:
    """Warn once if layers on the CPU compute without the native library."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    slow = sum(module.native is None and module.packed_codes.device.type == "cpu" for module in packed)
    if slow:
        warnings.warn(f"{slow} packed layers compute with plain torch, slowly. {cpu.describe()}", stacklevel=3)


def _fill(
    model: PreTrainedModel, checkpoint: Checkpoint, place: Callable[[_PackedTensors, torch.dtype], nn.Module]
) -> None:
    """Fill a model without weights, with `place` making the quantized linears."""
    linears = targeted_linears(checkpoint, model)
    placed_names, _ = float_places(checkpoint, model)
    copies, dtype = copies_of_codes(model, checkpoint.specs), model.dtype
    for module, linear in linears.items():
        try:
            packed = _PackedTensors(checkpoint, module, linear, checkpoint.read_parts(module))
            placed = place(packed, dtype)
        except (ShapeError, NonFiniteError, FormatError) as error:
            text = str(error)
            raise FormatError(text if module in text else f"{checkpoint.folder}: {module}: {text}") from None
        if isinstance(linear, nn.Linear):
            # Its numbers come with the float part.
            placed.bias = linear.bias
        for name in (module, *(copy for copy, first in copies.items() if first == module)):
            model.set_submodule(name, placed)
    for name in placed_names:
        _place_float(model, name, checkpoint.read(name), source=checkpoint.files[name].path)
    _tie_what_is_missing(checkpoint, model)
    _refuse_gaps(checkpoint, model)


def _tie_what_is_missing(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Tie head and embeddings as far as the checkpoint does not hold both, whatever its config says."""
    held_apart = {name for name in model.all_tied_weights_keys if name.rpartition(".")[0] in checkpoint.specs}
    # What shares codes is one module under several names.
    done = held_apart | {f"{copy}.weight" for copy in copies_of_codes(model, checkpoint.specs)}
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if target not in done
    }
    missing = {name for name, tensor in _tensors(model) if tensor.device.type == "meta"}
    with quiet_transformers():
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    correct_config(model.config, tied=False if held_apart else is_tied(model))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    # Not the state dict, which would hold every packed layer a second time.
    return itertools.chain(*(named(remove_duplicate=False) for named in (model.named_parameters, model.named_buffers)))


def _place_float(model: PreTrainedModel, name: str, tensor: torch.Tensor, source: Path) -> None:
    """Put a tensor that is not quantized where its name says."""
    part = name.rpartition(".")[2]
    place = holder_of(model, name)
    if place is None:
        raise FormatError(f"{source} holds {name}, for which {type(model).__name__} has no place.")
    owner, held = place
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
    missing = [name for name, tensor in _tensors(model) if tensor.device.type == "meta"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FormatError(
            f"{checkpoint.folder} lacks the tensor {missing[0]}{more}, which {type(model).__name__} needs; fetch or "
            "write the checkpoint again."
        )


def _check_pairs(model: PreTrainedModel, folder: Path, adapter: Adapter) -> None:
    first_names = {id(part): name for name, part in model.named_modules()}
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
        if first_names[id(linear)] != module:
            # PEFT knows a layer by its first name alone, and would leave the pair out.
            raise FormatError(
                f"{folder} adapts {module}, another name of the layer {first_names[id(linear)]} of "
                f"{type(model).__name__}; give the pair under that name, once."
            )
        if (pair.lora_B.shape[0], pair.lora_A.shape[1]) != (linear.out_features, linear.in_features):
            raise FormatError(
                f"{folder}: A {tuple(pair.lora_A.shape)} and B {tuple(pair.lora_B.shape)} do not fit {module} with "
                f"{linear.in_features} inputs and {linear.out_features} outputs; it belongs to another model."
            )


@contextlib.contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Keep PEFT from taking `gate_proj` and the like for names of fused experts in models that usually have them.

    It would look for fused tensors, which are split here, and leave out dense layers and shared experts of these names.
    """
    from peft.utils import transformers_weight_conversion as conversion

    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before


def attach_adapter(model: PreTrainedModel, folder: Path, adapter: Adapter, *, trainable: bool) -> None:
    """Let PEFT wrap the adapted linears, and fill in A and B as they are stored."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from cloq_export.engines.packed_lora import PackedLoraLinear

    _check_pairs(model, folder, adapter)
    # Not the file's own config: its rules may be patterns that PEFT never finishes matching, or name other modules.
    exact = adapter_config(adapter.pairs, str(adapter.config.get("base_model_name_or_path") or ""))
    del exact["peft_type"]
    dropout = adapter.config.get("lora_dropout")
    exact["lora_dropout"] = dropout if isinstance(dropout, float) and 0 <= dropout < 1 else 0.0
    exact["inference_mode"] = not trainable
    config = LoraConfig(**exact)
    config._register_custom_module({PackedLinear: PackedLoraLinear})
    # PEFT draws random numbers for A before the stored ones replace them: a load must not move anybody's seed.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _names_as_they_are():
        # Of a pair on a tied head; here it stays the head's own, merged or not.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
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
