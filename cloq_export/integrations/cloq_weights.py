"""LoRA weights of a PEFT model over a packed base, replaced by those of CLoQ's closed form, in PEFT's own manner."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from cloq_export.adapt import CloqOptions, GramRoot, cholesky_root, eigen_root, init_cloq
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.provenance import read_base_record
from cloq_export.calibrate.gram import GramAccumulator
from cloq_export.engines.packed_linear import PackedLinear
from cloq_export.errors import CalibrationError, ShapeError, UsageError
from cloq_export.models.blocks import find_blocks
from cloq_export.models.devices import device_of
from cloq_export.models.experts import split_experts
from cloq_export.models.source import open_model
from cloq_export.models.stream import BlockStream
from cloq_export.models.weights_on_disk import tensor_of
from cloq_export.quantize.damping import damp_gram
from cloq_export.recipe import Recipe

Callback = Callable[[peft.PeftModel, str], bool]
Batch = torch.Tensor | Mapping[str, torch.Tensor]


def replace_lora_weights_cloq(
    peft_model: peft.PeftModel,
    data: torch.Tensor | Iterable[Batch],
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callback | None = None,
) -> dict[str, float]:
    """Replace the LoRA weights over packed linears by those that repair the quantized model best on some text.

    For each layer, with W the original weight, Q the packed one, x its inputs on the data, `H = sum x x^T` damped by
    1 % of its mean diagonal, r the rank and s the scaling of the adapter (alpha / r in PEFT), A and B become

        argmin ||(W - Q - s B A) H^(1/2)||_F        (CLoQ, Theorem 3.1; B of the closed form is divided by s)

    block by block from the first on, so that later blocks are solved on what the mended ones put out; the layers of
    one block see each other as they were. Two times the data's hidden states and one block's H are held in memory; the
    original is read matrix by matrix where it does not
    fit into memory. The counterpart for bitsandbytes is PEFT's `replace_lora_weights_loftq`.

    Args:
        peft_model: LoRA over a base that `from_pretrained` (after `cloq_export.register()`) or `cloq_export.load` gave;
            it is changed in place. Layers outside of the blocks, such as a head, keep their weights, with a warning.
        data: token ids, (rows, tokens) int64, or an iterable of such batches or of mappings with `input_ids`; all rows
            are equally long and not padded.
        model_path: the float model, a folder or hub id; unless given, the one that the export's record names.
        adapter_name: the adapter whose weights are replaced.
        callback: called after each module with the model and the module's name; False puts its old weights back.

    Returns:
        dict: module -> share of `||(W - Q) H^(1/2)||_F` that is left, 0 to 1; without the modules that no token
        reached and those that the callback refused.

    Raises:
        UsageError: there is no adapter of that name or no packed LoRA layer, or the float model is not known.
        CalibrationError: the data is empty, its rows differ in length, or one is padded.
        ShapeError: the float model has other layers.
        SourceError: the float model cannot be read.
    """
    base = peft_model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if _is_packed_lora(module, adapter_name)}
    if not layers:
        raise UsageError(
            f"the model has no LoRA layer {adapter_name!r} over a packed linear; its adapters are "
            f"{', '.join(peft_model.peft_config)}: load the base with from_pretrained after cloq_export.register(), "
            "wrap it with get_peft_model, and name the adapter with `adapter_name`."
        )
    windows = _windows_of(data)
    loaded = open_model(_source_of(base, model_path), dtype=torch.float32, stream="auto")
    split_experts(loaded.model)
    blocks = find_blocks(base)
    outside = [name for name in layers if not name.startswith(f"{blocks.name}.")]
    if outside:
        warnings.warn(f"outside of the blocks weights stay as they are: {', '.join(outside)}.", stacklevel=2)
    was_training, left = peft_model.training, {}
    try:
        stream = BlockStream(base, blocks, windows, device=device_of(base))
        hidden = stream.hidden
        for index in range(len(blocks)):
            own = {name: layer for name, layer in layers.items() if name.startswith(f"{blocks.prefix(index)}.")}
            sums = _collect(own, functools.partial(_run_block, stream, index, hidden)) if own else []
            for names, gram in sums:
                root = _root_of(gram)
                if root is None:
                    warnings.warn(f"no token of the data reached {', '.join(names)}; the weights stay.", stacklevel=2)
                    continue
                for name in names:
                    factors = layers[name].lora_A[adapter_name].weight, layers[name].lora_B[adapter_name].weight
                    before = [factor.detach().clone() for factor in factors]
                    share = _replace(layers[name], adapter_name, _weight_of(loaded.model, name, layers[name]), root)
                    if callback is None or callback(peft_model, name):
                        left[name] = share
                        continue
                    with torch.no_grad():
                        for factor, kept in zip(factors, before, strict=True):
                            factor.copy_(kept)
            hidden = stream.forward_block(index, hidden)
    finally:
        peft_model.train(was_training)
    return left


def _is_packed_lora(module: nn.Module, adapter: str) -> bool:
    return (
        isinstance(module, LoraLayer)
        and isinstance(module.get_base_layer(), PackedLinear)
        and adapter in module.lora_A
        and adapter in module.lora_B
    )


def _source_of(base: nn.Module, model_path: str | None) -> str:
    if model_path is not None:
        return model_path
    checkpoint: Checkpoint | None = getattr(base, "quantized_base", None)
    record = None if checkpoint is None else read_base_record(checkpoint.folder)
    if record is None or not record.model:
        raise UsageError("nothing says which float model the base was made from; name it with `model_path`.")
    return record.model


def _windows_of(data: torch.Tensor | Iterable[Batch]) -> torch.Tensor:
    """Return token ids, (rows, tokens) int64."""
    batches = [data] if isinstance(data, torch.Tensor) else list(data)
    rows = []
    for batch in batches:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise CalibrationError("a row of the data is padded; cut the text into rows of one length instead.")
        ids = torch.as_tensor(batch["input_ids"] if isinstance(batch, Mapping) else batch)
        rows.append(ids if ids.ndim == 2 else ids.view(1, -1))
    lengths = sorted({row.shape[1] for row in rows})
    if len(lengths) != 1 or not lengths[0]:
        raise CalibrationError(
            f"the rows of the data have {', '.join(map(str, lengths)) or 'no'} tokens; rows of one length are needed."
        )
    return torch.cat(rows).to(torch.int64).cpu()


def _collect(
    layers: Mapping[str, LoraLayer], run: Callable[[int | None], object]
) -> list[tuple[list[str], GramAccumulator]]:
    """Return the sums of the inputs of layers; those that read the very same tensors share one.

    Args:
        layers: name -> layer of one block.
        run: runs the block over so many batches, None over all.
    """
    read: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    # Tensors are held, so that none takes the place of another in memory.
    with _watching(layers, lambda name, x: read[name].append(x)):
        run(1)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensors in read.items():
        # One that the first batch does not reach shares with none.
        groups.setdefault(tuple(map(id, tensors)) or (name,), []).append(name)
    read.clear()
    first = {names[0]: layers[names[0]] for names in groups.values()}
    sums = {name: GramAccumulator(layer.in_features, device=device_of(layer)) for name, layer in first.items()}
    with _watching(first, lambda name, x: sums[name].add(x)):
        run(None)
    return [(names, sums[names[0]]) for names in groups.values()]


def _run_block(stream: BlockStream, index: int, hidden: Sequence[torch.Tensor], count: int | None) -> None:
    stream.forward_block(index, hidden[:count])


@contextlib.contextmanager
def _watching(layers: Mapping[str, LoraLayer], see: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    """Show each layer's name and inputs for a while."""
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(functools.partial(_see, see, name)).remove)
        yield


def _see(see: Callable[[str, torch.Tensor], object], name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    see(name, inputs[0])


def _root_of(gram: GramAccumulator) -> GramRoot | None:
    """Return R with `R^T R = H`, damped as a run does by default; None where no token came."""
    summed = gram.stats().gram.to(torch.float64)
    if not gram.tokens or not bool(summed.diagonal().any()):
        return None
    damped = damp_gram(summed, Recipe().damping)
    # As in a run: a singular H has a pseudo-inverse, which more damping would blur.
    return eigen_root(summed) if damped.increases else cholesky_root(damped.lower)


def _weight_of(model: nn.Module, name: str, layer: LoraLayer) -> torch.Tensor:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    shape = (layer.out_features, layer.in_features)
    if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
        raise ShapeError(
            f"the float model has no linear {name} of {shape} (out, in); name the model that the base was made from "
            "with `model_path`."
        )
    return tensor_of(model, f"{name}.weight", linear.weight.detach())


def _replace(layer: LoraLayer, adapter: str, weight: torch.Tensor, root: GramRoot) -> float:
    """Put the closed form into a layer, and return the share of the error that it leaves."""
    quantized = layer.get_base_layer().dequantize().to(torch.float64)
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = weight.to(quantized.device)
    solved = init_cloq(weight, quantized, root, layer.r[adapter], CloqOptions(dtype=torch.float32))
    with torch.no_grad():
        a.copy_(solved.pair.lora_A)
        b.copy_(solved.pair.lora_B / layer.scaling[adapter])
    before = float(((weight.to(torch.float64) - quantized) @ root.matrix.t()).norm())
    return solved.bound / before if before else 0.0
