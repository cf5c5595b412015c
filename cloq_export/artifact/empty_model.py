"""The transformers model that a checkpoint describes, without weights, and the place of each tensor in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, linears_beside
from cloq_export.artifact.expert_names import expert_names_in_files
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.errors import FormatError, ShapeError, UnsupportedModelError
from cloq_export.files.safe_paths import require_inside
from cloq_export.models.companions import companion_files, copy_companions
from cloq_export.models.experts import SplitExperts, split_experts
from cloq_export.models.library_calls import NO_CODE
from cloq_export.models.model_class import model_class
from cloq_export.models.tied_head import correct_config, corrected_entries, embeddings_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_IN_BLOCKS = re.compile(r"(^|\.)\d+\.")
# Tensors that other writers leave in their files and that models compute for themselves.
_COMPUTED_BY_MODELS = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
)


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model that config.json describes, with parameters that hold no memory and buffers that do."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    source = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, **NO_CODE)
        opened = model_class(str(checkpoint.folder), config)
        wanted = dtype or _stored_dtype(config)
        with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            model = opened._from_config(config, dtype=wanted)
        split_experts(model)
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers may raise anything for a malformed configuration
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(
            f"{source} does not describe a causal language model that transformers can build ({reason}); check the "
            "file, or update transformers."
        ) from error
    return model


def float_part(checkpoint: Checkpoint) -> FloatPart:
    """Return what a checkpoint holds besides its quantized modules, with a config that says whether the head is tied.

    Tensors of zeros that the model has no place for, such as the biases that GPTQ tools write everywhere, are left out.

    Args:
        checkpoint: the checkpoint.

    Raises:
        FormatError: config.json describes no model that transformers can build, or a tensor has no place in it.
    """
    companions = companion_files(checkpoint.folder)

    def save_files(folder: Path) -> None:
        config = require_inside(checkpoint.folder, checkpoint.folder / CONFIG_NAME)
        copy_companions(checkpoint.folder, [config, *companions], folder)

    model = empty_model(checkpoint, None)
    targeted_linears(checkpoint, model)
    _, idle = float_places(checkpoint, model)
    return FloatPart.of_checkpoint(
        checkpoint,
        skipped=linears_beside(model, checkpoint.specs),
        embeddings=embeddings_in(model, checkpoint.specs),
        save_files=save_files,
        idle=idle,
        config=_tie_entries(checkpoint, model),
    )


def refuse_single_experts(checkpoint: Checkpoint) -> None:
    """Refuse to write the experts of a checkpoint as plain weights where their class reads them only fused.

    Args:
        checkpoint: quantized, its experts one by one.

    Raises:
        UnsupportedModelError: nothing could read the plain weights.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = empty_model(checkpoint, None)
    readable = expert_names_in_files(model, get_model_conversion_mapping(model, add_legacy=False))
    mixtures = [f"{name}." for name, module in model.named_modules() if isinstance(module, SplitExperts)]
    for module in checkpoint.specs:
        if module.startswith(tuple(mixtures)) and module not in readable:
            raise UnsupportedModelError(
                f"{type(model).__name__} reads experts fused in one tensor, and a merged export would hold them one by "
                f"one, as {module}.weight; export the codes and the adapter apart, e.g. with `format=gptq_v2`."
            )


def tie_entries(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the entries of config.json that have to be others for it to say how head and embeddings are.

    Args:
        checkpoint: a checkpoint, e.g. one that an older version of this package wrote.

    Returns:
        dict: top-level name -> value; empty if config.json is right.

    Raises:
        FormatError: config.json describes no model that transformers can build.
    """
    return _tie_entries(checkpoint, empty_model(checkpoint, None))


def _tie_entries(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
    if not any(_held_apart(checkpoint, *pair) for pair in model.all_tied_weights_keys.items()):
        return {}
    correct_config(model.config, tied=False)
    return corrected_entries(checkpoint.config, model.config)


def _held_apart(checkpoint: Checkpoint, target: str, source: str) -> bool:
    """Return whether the files hold two tensors that differ where the config ties one to the other."""
    if target.rpartition(".")[0] in checkpoint.specs:
        return True
    if target not in checkpoint.headers or source not in checkpoint.headers:
        return False
    if checkpoint.headers[target][1] != checkpoint.headers[source][1]:
        return True
    return not torch.equal(checkpoint.read(target), checkpoint.read(source))


def tied_head(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the weight of a head that a checkpoint does not hold -> the one that it is tied to, if there is such.

    Raises:
        FormatError: config.json describes no model that transformers can build.
    """
    model = empty_model(checkpoint, None)
    head = model.get_output_embeddings()
    names = (f"{name}.weight" for name, module in model.named_modules() if module is head)
    return {
        name: model.all_tied_weights_keys[name]
        for name in names
        if name in model.all_tied_weights_keys and name not in checkpoint.headers
    }


def _stored_dtype(config: Any) -> torch.dtype:
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) and stored.is_floating_point else torch.float32


def targeted_linears(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, nn.Linear | nn.Embedding]:
    """Return the linears and embeddings that the checkpoint quantizes, after checking the shapes of its headers."""
    linears: dict[str, nn.Linear | nn.Embedding] = {}
    tied = {name: model.all_tied_weights_keys.get(f"{name}.weight", f"{name}.weight") for name in checkpoint.specs}
    known: dict[Any, str] = {}
    for module, spec in checkpoint.specs.items():
        try:
            linear: nn.Module | None = model.get_submodule(module)
        except AttributeError:
            linear = None
        if isinstance(linear, nn.Embedding) and not checkpoint.grids.layout.holds_embeddings:
            raise FormatError(
                f"{checkpoint.folder} quantizes {module}, the embeddings of {type(model).__name__}; its layout "
                f"{checkpoint.layout_name} has no place for them: quantize again with float embeddings."
            )
        if isinstance(linear, nn.Embedding) and linear is not model.get_input_embeddings():
            raise FormatError(
                f"{checkpoint.folder} quantizes {module}, a table of {type(model).__name__} that is not its token "
                "embeddings; only these and linear layers are read: quantize again without it."
            )
        if not isinstance(linear, (nn.Linear, nn.Embedding)):
            raise FormatError(
                f"{checkpoint.folder} quantizes {module}, which is no linear layer of {type(model).__name__}; "
                "config.json and the weights belong to different models."
            )
        for one in (linear, tied[module]):
            if known.setdefault(one, module) != module:
                raise FormatError(
                    f"{checkpoint.folder} quantizes {known[one]} and {module}, which are one weight of "
                    f"{type(model).__name__}; weights that several layers share are not read quantized."
                )
        parts = {part: checkpoint.headers[f"{module}.{part}"] for part in checkpoint.grids.layout.parts(spec)}
        out_features, in_features = linear.weight.shape
        held = checkpoint.grids.layout.stored_grid(parts)
        if held is not None and held[2:] == (out_features, in_features):
            checkpoint.features(module)  # the right layer: if the config gives it another grid, that is said
        try:
            expected = checkpoint.grids.layout.headers(out_features, in_features, spec)
        except ShapeError as error:
            checkpoint.features(module)  # says what the tensors hold, if that is not what the config says
            raise FormatError(f"{checkpoint.folder}: {module}: {error}") from None
        for part, (_, shape) in expected.items():
            seen = checkpoint.headers[f"{module}.{part}"][1]
            if seen != shape:
                raise FormatError(
                    f"{checkpoint.files[f'{module}.{part}'].path}: {module}.{part} has shape {seen}; a layer with "
                    f"{in_features} inputs and {out_features} outputs at {spec.bits} bits needs {shape}."
                )
        linears[module] = linear
    return linears


def quantized_embeddings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the modules that a checkpoint quantizes and that are embeddings.

    Raises:
        FormatError: config.json describes no model that transformers can build.
    """
    if all(_IN_BLOCKS.search(module) for module in checkpoint.specs):
        return ()
    return embeddings_in(empty_model(checkpoint, None), checkpoint.specs)


def float_places(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[list[str], frozenset[str]]:
    """Return the tensors besides the codes that have a place in an empty model, and the zeros that have none.

    Raises:
        FormatError: a tensor has no place, and is neither zero nor one that models compute for themselves.
    """
    placed: list[str] = []
    idle: set[str] = set()
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name in checkpoint.float_names():
        if holder_of(model, name) is not None:
            placed.append(name)
        elif name.endswith(_COMPUTED_BY_MODELS) or any(pattern.search(name) for pattern in ignored):
            continue
        elif name.endswith(".bias") and not bool(checkpoint.read(name).any()):
            idle.add(name)
        else:
            raise FormatError(
                f"{checkpoint.files[name].path} holds {name}{_what_it_may_be(name)}, for which {type(model).__name__} "
                "has no place; config.json and the weights belong to different models, or to a tool that computes "
                "more than codes."
            )
    return placed, frozenset(idle)


def refuse_lost_biases(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse biases of quantized layers that a float model, whose other tensors are taken, has not.

    Args:
        checkpoint: gives codes, scales and zeros.
        model: gives everything else.

    Raises:
        FormatError: a bias holds other numbers than zeros, and the model has none.
    """
    for module in checkpoint.specs:
        name = f"{module}.bias"
        if name in checkpoint.headers and holder_of(model, name) is None and bool(checkpoint.read(name).any()):
            raise FormatError(
                f"{checkpoint.files[name].path} holds {name}{_what_it_may_be(name)}, which the original model has not; "
                "they belong to different models, or to a tool that computes more than codes."
            )


def _what_it_may_be(name: str) -> str:
    part = name.rpartition(".")[2]
    if part == "bias":
        return " (a bias with real numbers)"
    if part in ("k_scale", "v_scale", "q_scale", "kv_scale"):
        return " (a scale of a quantized cache)"
    return " (a scale)" if "scale" in part else ""


def holder_of(model: nn.Module, name: str) -> tuple[nn.Module, torch.Tensor] | None:
    """Return the module that holds a tensor of this name, and the tensor, or None."""
    owner_name, _, part = name.rpartition(".")
    try:
        owner = model.get_submodule(owner_name)
    except AttributeError:
        return None
    held: torch.Tensor | None = owner._parameters.get(part)
    if held is None and part not in owner._non_persistent_buffers_set:
        held = owner._buffers.get(part)
    return None if held is None else (owner, held)


def read_generation_config(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Give a model the generation_config.json of its checkpoint, if there is one.

    Raises:
        FormatError: it is damaged.
    """
    from transformers import GenerationConfig

    if (checkpoint.folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder, **NO_CODE)
        except (OSError, ValueError, TypeError) as error:
            raise FormatError(
                f"{checkpoint.folder / 'generation_config.json'} is damaged ({' '.join(str(error).split())[:200]}); "
                "fetch the file again, or delete it."
            ) from None
