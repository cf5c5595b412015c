"""Whether genai_config.json, by which ONNX Runtime GenAI serves a graph, says what the float model's files say."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cloq_export.engines.onnx.float_graph import GENAI_CONFIG, TENSOR_NAMES
from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.formats.onnx.record import GRAPH_NAME
from cloq_export.models.source import LoadedModel
from cloq_export.parity.provenance import CONTRADICTED, PROVEN, Finding, join_some

_WHAT = "GenAI settings"

# As the builder writes them where a model's generation settings say nothing.
_SEARCH = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "min_length": 0,
}
# Of these the builder takes the model's own; of the others it may write the default.
_TAKEN = ("do_sample", "temperature", "top_k", "top_p")


def compare_genai_settings(folder: Path, loaded: LoadedModel) -> Finding:
    """Compare genai_config.json of an export with the float model: sizes, lengths, tokens, search, names of files.

    Args:
        folder: the export.
        loaded: the float model with its tokenizer.
    """
    try:
        content = read_json(require_inside(folder, folder / GENAI_CONFIG))
    except FormatError as error:
        return Finding(_WHAT, CONTRADICTED, str(error))
    model, search = content.get("model"), content.get("search")
    decoder = model.get("decoder") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(decoder, Mapping) or not isinstance(search, Mapping):
        return Finding(_WHAT, CONTRADICTED, f"{GENAI_CONFIG} lacks its parts model, decoder and search")
    faults = [*_model_faults(model, loaded), *_decoder_faults(decoder, loaded), *_search_faults(search, loaded)]
    return Finding(_WHAT, CONTRADICTED, join_some(faults, "; ")) if faults else Finding(_WHAT, PROVEN)


def _model_faults(model: Mapping[str, Any], loaded: LoadedModel) -> Iterator[str]:
    config, generation = loaded.config.get_text_config(), loaded.model.generation_config
    tokens: dict[str, list[Any]] = {
        name: [getattr(each, f"{name}_token_id", None) for each in (generation, config, loaded.tokenizer)]
        for name in ("bos", "eos", "pad")
    }
    ends = [_ids(each) for each in tokens["eos"] if each is not None]
    yield from _fault("context_length", model.get("context_length"), [_context(config)])
    yield from _fault("vocab_size", model.get("vocab_size"), [config.vocab_size])
    # The builder adds the tokenizer's end to the model's own.
    named = _ids(model.get("eos_token_id"))
    if ends and named not in [*ends, *(each | ends[-1] for each in ends)]:
        yield f"eos_token_id is {sorted(named)}, the float model's {sorted(ends[0])}"
    if any(each is not None for each in tokens["bos"]):
        yield from _fault("bos_token_id", model.get("bos_token_id"), tokens["bos"])
    first_ends = [each[0] if isinstance(each, list) and each else each for each in tokens["eos"]]
    yield from _fault("pad_token_id", model.get("pad_token_id"), [*tokens["pad"], *first_ends, *sorted(named)[:1]])


def _decoder_faults(decoder: Mapping[str, Any], loaded: LoadedModel) -> Iterator[str]:
    config = loaded.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    yield from _fault("filename", decoder.get("filename"), [GRAPH_NAME])
    for name, wanted in (
        ("head_size", width),
        ("hidden_size", config.hidden_size),
        ("num_attention_heads", heads),
        ("num_hidden_layers", config.num_hidden_layers),
        ("num_key_value_heads", getattr(config, "num_key_value_heads", None) or heads),
    ):
        yield from _fault(name, decoder.get(name), [wanted])
    window = decoder.get("sliding_window")
    if window is not None:
        size = window.get("window_size") if isinstance(window, Mapping) else window
        wanted = getattr(config, "sliding_window", None)
        if size != wanted:
            yield f"sliding_window is {size!r:.60}, the float model's {wanted!r:.60}"
    for side, known in TENSOR_NAMES.items():
        names = decoder.get(side)
        for key, name in dict(names if isinstance(names, Mapping) else {}).items():
            yield from _fault(f"{side}.{key}", name, [known.get(key)])
    options = decoder.get("session_options")
    providers = options.get("provider_options") if isinstance(options, Mapping) else None
    yield from _fault("provider_options", providers, [[], None])


def _search_faults(search: Mapping[str, Any], loaded: LoadedModel) -> Iterator[str]:
    generation = loaded.model.generation_config
    # A graph that was traced is served greedily: its settings name no temperature.
    greedy = "temperature" not in search
    for name, default in _SEARCH.items():
        if name not in search:
            continue
        own = getattr(generation, name, None)
        allowed = [default if own is None else own]
        if name not in _TAKEN or (name == "do_sample" and greedy):
            allowed.append(default)
        yield from _fault(name, search[name], allowed)
    yield from _fault("max_length", search.get("max_length"), [_context(loaded.config.get_text_config())])


def _context(config: Any) -> int | None:
    return getattr(config, "seq_length", None) or getattr(config, "max_position_embeddings", None)


def _ids(found: Any) -> frozenset[Any]:
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _fault(name: str, found: Any, allowed: Collection[Any]) -> Iterator[str]:
    """Yield what is wrong with a value, if the float model has one to compare it with."""
    known = [each for each in allowed if each is not None]
    if known and found not in known and not (found is None and None in allowed):
        yield f"{name} is {found!r:.60}, the float model's {known[0]!r:.60}"
