"""Whether what is not quantized equals the float model: tensors, config, tokenizer, templates, generation settings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import CloqError
from cloq_export.models.source import NO_CODE, LoadedModel, quiet_transformers, read_tokenizer
from cloq_export.parity.provenance import CONTRADICTED, PROVEN, Finding, judge_tokenizer
from cloq_export.runtimes.checkpoint import Checkpoint
from cloq_export.runtimes.provenance import TokenizerRecord

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
# Half precision stores 8 bits of a number or more: a tensor that went through it differs by no more than this.
_ONE_ROUNDING = 2.0**-8
_SHOWN = 3


def compare_tensors(checkpoint: Checkpoint, model: Any) -> Finding:
    """Compare every float tensor of a checkpoint with the float model's own.

    A tensor that is stored in the dtype of its source is the same number for number; one that went through another
    dtype may be off by one rounding.

    Args:
        checkpoint: the export.
        model: the float model in float32.
    """
    state = model.state_dict()
    faults: list[str] = []
    held: set[str] = set()
    for name in checkpoint.float_names():
        wanted = state.get(name)
        if wanted is None:
            continue  # a reader of the checkpoint refuses what its model has no place for
        held.add(name)
        fault = _tensor_fault(checkpoint.read(name), wanted)
        if fault:
            faults.append(f"{name} {fault}")
    faults += _gaps(state, held, checkpoint.specs)
    if not faults:
        return Finding("float tensors", PROVEN)
    more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return Finding("float tensors", CONTRADICTED, "; ".join(faults[:_SHOWN]) + more)


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
            mine = dict(_flat(type(model.config).from_dict(plain).to_dict()))
    except Exception as error:  # a config raises whatever its values lead to
        return Finding("config", CONTRADICTED, f"{source} cannot be read ({' '.join(str(error).split())[:200]})")
    differing = [
        f"{key} is {mine.get(key)!r:.60}, the float model's is {theirs.get(key)!r:.60}"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]
    if not differing:
        return Finding("config", PROVEN)
    more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return Finding("config", CONTRADICTED, "; ".join(differing[:_SHOWN]) + more)


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
    if findings[0].verdict == PROVEN and own.get_vocab() != loaded.tokenizer.get_vocab():
        findings[0] = Finding("tokenizer", CONTRADICTED, "its vocabulary is not the float model's")
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


def _tensor_fault(stored: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Return what is wrong with a stored tensor, as the end of a sentence; None if it is the float model's."""
    if tuple(stored.shape) != tuple(wanted.shape):
        return f"has the shape {tuple(stored.shape)}, the float model's {tuple(wanted.shape)}"
    if torch.equal(wanted.to(stored.dtype), stored):
        return None
    if not stored.is_floating_point():
        return "has other numbers than the float model's"
    difference = (stored.to(torch.float32) - wanted.to(torch.float32)).abs()
    size = wanted.to(torch.float32).abs()
    # Below the smallest ordinary number of float16 rounding is absolute.
    if stored.dtype != torch.float32 and bool((difference <= _ONE_ROUNDING * size + 2.0**-24).all()):
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


def _templates(tokenizer: Any) -> dict[str, str]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        return {str(name): text for name, text in template.items()}
    return {} if template is None else {"default": template}
