"""Whether what is not quantized equals the float model: tensors, config, tokenizer, templates, generation settings."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import copies_of_codes
from cloq_export.artifact.empty_model import tie_entries
from cloq_export.artifact.probe_record import TokenizerRecord
from cloq_export.errors import CloqError
from cloq_export.models.library_calls import NO_CODE, quiet_transformers
from cloq_export.models.source import LoadedModel
from cloq_export.models.tied_head import config_of_json
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.models.weights_on_disk import tensor_of
from cloq_export.parity.provenance import CONTRADICTED, PROVEN, Finding, join_some, judge_tokenizer

if TYPE_CHECKING:
    from cloq_export.formats.onnx.reading import OnnxExport

# Keys of a config that say how a model is stored or run, and not what it computes. Whether the head is tied shows in
# the tensors.
_NO_FUNCTION = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config"),
        *("tie_word_embeddings", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_experts_implementation"),
        *("torchscript", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    }
)
_NOT_GENERATION = frozenset({"transformers_version", "_from_model_config"})
# What rounding to a dtype once changes at most: half a unit in the last place, and the smallest numbers absolutely.
_ONE_ROUNDING = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-9, 0.0)}
# Dtypes that models are stored in, and read from.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# What of a tokenizer's file makes ids and texts.
_TOKENIZER_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens")
_TOKENIZER_SETTINGS = (
    "model_max_length",
    "truncation_side",
    "padding_side",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
)
_SHOWN = 3


def compare_tensors(checkpoint: Checkpoint, loaded: LoadedModel, *, exact: bool = False) -> Finding:
    """Compare every float tensor of a checkpoint with the float model's own, and what config.json says of a tied head.

    A tensor that is stored in the dtype of its source, or in float32, is the same number for number; one that was
    stored in half precision may be off by one rounding to it, unless `exact`.

    Args:
        checkpoint: the export.
        loaded: the float model in float32.
        exact: whether whoever wrote the checkpoint rounds nothing that is not quantized.
    """
    state = loaded.model.state_dict()
    faults: list[str] = []
    held: set[str] = set()
    for name in checkpoint.float_names():
        wanted = state.get(name)
        if wanted is None:
            continue  # a reader of the checkpoint refuses what its model has no place for
        held.add(name)
        whole = tensor_of(loaded.model, name, wanted)
        fault = _tensor_fault(checkpoint.read(name), whole, loaded.source.dtype, exact=exact)
        if fault:
            faults.append(f"{name} {fault}")
    faults += _gaps(state, held, {*checkpoint.specs, *copies_of_codes(loaded.model, checkpoint.specs)})
    if tie_entries(checkpoint):
        faults.append("config.json ties the head to the embeddings, and the files hold two matrices that differ")
    if not faults:
        return Finding("float tensors", PROVEN)
    return Finding("float tensors", CONTRADICTED, join_some(faults, "; "))


def compare_vocabulary(export: OnnxExport, loaded: LoadedModel) -> Finding:
    """Compare embeddings and head of a graph with the float model's: rows of rare tokens show in no text.

    Args:
        export: the graph with its integers.
        loaded: the float model in float32.
    """
    layer = loaded.model.get_input_embeddings()
    shape = tuple(layer.weight.shape)
    state = loaded.model.state_dict()
    known: dict[str, torch.Tensor] = {}
    for name, held in state.items():
        if tuple(held.shape) in (shape, shape[::-1]):
            matrix = tensor_of(loaded.model, name, held)
            known[name] = matrix if tuple(matrix.shape) == shape else matrix.T
    found: set[str] = set()
    faults = []
    for name, stored in export.float_matrices(*shape):
        same = [own for own, matrix in known.items() if torch.equal(matrix, stored)]
        found.update(same)
        if not same:
            faults.append(f"{name} of the graph is no matrix of the float model")
    module = next(name for name, each in loaded.model.named_modules() if each is layer)
    if module not in export.record.modules and f"{module}.weight" not in found and not faults:
        faults.append(f"{module}.weight is missing from the graph")
    if not faults:
        return Finding("vocabulary matrices", PROVEN)
    return Finding("vocabulary matrices", CONTRADICTED, join_some(faults, "; "))


def compare_config(config: Mapping[str, Any], model: Any, source: str) -> Finding:
    """Compare what config.json says with the float model's configuration, defaults filled in on both sides.

    Args:
        config: content of config.json of the export.
        model: the float model.
        source: the file, for messages.
    """
    theirs = dict(_flat(model.config.to_dict()))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with quiet_transformers():
            mine = dict(_flat(config_of_json(type(model.config), plain).to_dict()))
    except Exception as error:  # a config may raise any exception
        return Finding("config", CONTRADICTED, f"{source} cannot be read ({' '.join(str(error).split())[:200]})")
    # What a reader of the file uses, independent of the class that reads it here.
    names = config.get("architectures")
    known = {type(model).__name__, *(model.config.architectures or ())}
    if isinstance(names, list) and not known & set(map(str, names)):
        mine["architectures"], theirs["architectures"] = names, [type(model).__name__]
    mine["model_type"], theirs["model_type"] = config.get("model_type"), model.config.model_type
    differing = [
        f"{key} is {mine.get(key)!r:.60}, the float model's is {theirs.get(key)!r:.60}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]
    if not differing:
        return Finding("config", PROVEN)
    return Finding("config", CONTRADICTED, join_some(differing, "; "))


def compare_tokenizer(folder: Path, loaded: LoadedModel) -> list[Finding]:
    """Compare tokenizer, chat templates and special tokens of an export with the float model's, on fixed texts.

    Args:
        folder: the export.
        loaded: the float model with its tokenizer.
    """
    try:
        own = read_tokenizer(folder)
    except CloqError as error:
        return [Finding("tokenizer", CONTRADICTED, str(error))]
    against = "with the float model's tokenizer"
    findings = [
        judge_tokenizer(
            TokenizerRecord.of(loaded.tokenizer), TokenizerRecord.of(own), what="tokenizer", against=against
        )
    ]
    if findings[0].verdict == PROVEN:
        if own.get_vocab() != loaded.tokenizer.get_vocab():
            findings[0] = Finding("tokenizer", CONTRADICTED, "its vocabulary is not the float model's")
        elif differing := _differing_parts(own, loaded.tokenizer):
            findings[0] = Finding("tokenizer", CONTRADICTED, f"its {', '.join(differing)} is not the float model's")
    templates = [_templates(each) for each in (own, loaded.tokenizer)]
    if templates[0] == templates[1]:
        findings.append(Finding("chat template", PROVEN))
    else:
        mine, theirs = templates
        names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        findings.append(Finding("chat template", CONTRADICTED, f"{', '.join(names)} is not the float model's"))
    return findings


def compare_generation(folder: Path, model: Any) -> Finding:
    """Compare the generation settings of an export with the float model's.

    Args:
        folder: the export.
        model: the float model.
    """
    from transformers import GenerationConfig

    try:
        with quiet_transformers():
            if (folder / "generation_config.json").is_file():
                own = GenerationConfig.from_pretrained(folder, **NO_CODE)
            else:
                own = GenerationConfig.from_model_config(model.config)
    except Exception as error:  # as above
        return Finding(
            "generation settings", CONTRADICTED, f"they cannot be read ({' '.join(str(error).split())[:200]})"
        )
    mine, theirs = (
        {key: value for key, value in each.to_dict().items() if key not in _NOT_GENERATION}
        for each in (own, model.generation_config)
    )
    differing = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
    if not differing:
        return Finding("generation settings", PROVEN)
    shown = ", ".join(f"{key} is {mine.get(key)!r:.40}, not {theirs.get(key)!r:.40}" for key in differing[:_SHOWN])
    return Finding("generation settings", CONTRADICTED, shown)


def _tensor_fault(stored: torch.Tensor, wanted: torch.Tensor, source: torch.dtype, *, exact: bool) -> str | None:
    """Return what is wrong with a stored tensor, as the end of a sentence; None if it is the float model's."""
    if tuple(stored.shape) != tuple(wanted.shape):
        return f"has the shape {tuple(stored.shape)}, the float model's {tuple(wanted.shape)}"
    if wanted.is_floating_point() and stored.dtype not in _FLOATS:
        return f"is stored as {str(stored.dtype).removeprefix('torch.')}, which holds no numbers of the float model"
    if torch.equal(stored.to(wanted.dtype), wanted):
        return None
    if not stored.is_floating_point():
        return "has other numbers than the float model's"
    if not exact and torch.equal(wanted.to(stored.dtype), stored):
        return None
    difference = (stored.to(torch.float32) - wanted.to(torch.float32)).abs()
    size = wanted.to(torch.float32).abs()
    if not exact and stored.dtype != source and stored.dtype in _ONE_ROUNDING:
        share, least = _ONE_ROUNDING[stored.dtype]
        if bool((difference <= share * size + least).all()):
            return None
    relative = float(difference.max() / size.max().clamp(min=torch.finfo(torch.float32).tiny))
    return f"differs from the float model's by up to {relative:.1e} of its largest number"


def _gaps(state: Mapping[str, torch.Tensor], held: set[str], specs: Collection[str]) -> Iterator[str]:
    """Yield what the float model has and the checkpoint has nowhere, tied tensors under another name left out."""
    kept = {_place(state[name]) for name in held}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        quantized = module in specs and part == "weight"
        if not quantized and name not in held and _place(tensor) not in kept:
            yield f"{name} is missing"


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _flat(values: Mapping[str, Any], front: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in _NO_FUNCTION:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{front}{key}.")
        else:
            yield f"{front}{key}", list(value) if isinstance(value, tuple) else value


def _differing_parts(own: Any, reference: Any) -> list[str]:
    """Return which parts of two tokenizers differ, though both make the same ids of the probes."""
    backends: list[Any] = [getattr(each, "backend_tokenizer", None) for each in (own, reference)]
    parts: list[str] = []
    if all(hasattr(backend, "to_str") for backend in backends):
        mine, theirs = (json.loads(backend.to_str()) for backend in backends)
        parts = [name for name in _TOKENIZER_PARTS if mine.get(name) != theirs.get(name)]
    return parts + [name for name in _TOKENIZER_SETTINGS if getattr(own, name, None) != getattr(reference, name, None)]


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return {str(name): text for name, text in template.items()}
    return {} if template is None else {"default": template}
