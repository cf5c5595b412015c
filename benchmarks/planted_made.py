"""Faults of an exporter or a user that lie before the certificate, and faults of adapters outside the export."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planted_adapters import ADAPTED_LAYER, ADAPTER_FAULTS, NO_RECORD, inside, no_record, side_of_two
from planted_scene import Fault, Scene, edit_json, edit_pairs, edit_tensors


def _tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Scene], None]:
    return lambda scene: edit_tensors(scene.export / "model.safetensors", change)


def _exchanged(first: str, second: str) -> Callable[[Scene], None]:
    """Exchange all tensors whose names begin so."""

    def change(held: dict[str, Any]) -> None:
        for name in [name for name in held if name.startswith(first)]:
            there = name.replace(first, second, 1)
            held[name], held[there] = held[there], held[name]

    return _tensors(change)


def _tensor(name: str, change: Callable[[Any], Any]) -> Callable[[Scene], None]:
    return _tensors(lambda held: held.update({name: change(held[name])}))


def _first_scale(held: dict[str, Any]) -> None:
    held[f"{ADAPTED_LAYER}.scales"][0, 0] *= 2


def _config(**values: Any) -> Callable[[Scene], None]:
    return lambda scene: edit_json(scene.export / "config.json", lambda content: content.update(values))


def _file(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        path = scene.export / name
        if not path.exists():
            path.write_text("{}", encoding="utf-8")
        edit_json(path, change)

    return plant


def _whole_other_run(scene: Scene) -> None:
    """An export of another run, whole with its own records, in the place of this one."""
    shutil.rmtree(scene.export)
    scene.other.export(scene.export)


def _codes_of_other_run(scene: Scene) -> None:
    other = scene.other.export(scene.place / "other")
    shutil.copyfile(other / "model.safetensors", scene.export / "model.safetensors")


def _record_of_other_run(scene: Scene) -> None:
    other = scene.other.export(scene.place / "other")
    shutil.copyfile(other / "cloq_provenance.json", scene.export / "cloq_provenance.json")


def _to_bfloat16_and_back(held: dict[str, Any]) -> None:
    import torch

    name = "model.embed_tokens.weight"
    held[name] = held[name].to(torch.bfloat16).to(held[name].dtype)


def _to_float8(held: dict[str, Any]) -> None:
    import torch

    name = "model.embed_tokens.weight"
    held[name] = held[name].to(torch.float8_e4m3fn)


def _rare_row(held: dict[str, Any]) -> None:
    held["model.embed_tokens.weight"][0] *= -1


def _in_embeddings(weight: Any) -> Any:
    return weight[[0, 1, 2, 4, 3, *range(5, len(weight))]]


def _normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _adds_begin(content: dict[str, Any]) -> None:
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def _added_token(content: dict[str, Any]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": 90, "content": "w87", **flags})


def _float(name: str, says: str, plant: Callable[[Scene], Any]) -> Fault:
    return Fault(name, "float_part", says, plant, certified=True)


def _codes(name: str, plant: Callable[[Scene], Any]) -> Fault:
    return Fault(name, "provenance", "codes", plant, certified=True)


def _other_reference(scene: Scene) -> Mapping[str, Any]:
    return {"reference": str(scene.other.model)}


def _rounded_reference(scene: Scene) -> Mapping[str, Any]:
    """The same model in half precision: another revision, whatever its numbers."""
    import torch
    import transformers

    folder = Path(shutil.copytree(scene.subject.model, scene.place / "rounded"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return {"reference": str(folder)}


def _nudged_reference(scene: Scene) -> Mapping[str, Any]:
    """One number of the float model, one unit in the last place off."""
    import torch

    folder = Path(shutil.copytree(scene.subject.model, scene.place / "nudged"))

    def nudge(held: dict[str, Any]) -> None:
        weight = held[f"{ADAPTED_LAYER}.weight"]
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))

    edit_tensors(folder / "model.safetensors", nudge)
    return {"reference": str(folder)}


def _other_tokenizer_of_reference(scene: Scene) -> Mapping[str, Any]:
    folder = Path(shutil.copytree(scene.subject.model, scene.place / "retold"))

    def swap(content: dict[str, Any]) -> None:
        words = content["model"]["vocab"]
        words["w5"], words["w6"] = words["w6"], words["w5"]

    edit_json(folder / "tokenizer.json", swap)
    return {"reference": str(folder)}


def _stale_run(scene: Scene) -> Mapping[str, Any]:
    """The run went on behind the export: one of its adapters was scaled."""
    run = Path(shutil.copytree(scene.subject.run, scene.place / "newer"))
    edit_pairs(run / "adapters" / "two", lambda module, pair: dataclasses.replace(pair, alpha=1.5 * pair.alpha))
    return {"run": run}


def _other_run(scene: Scene) -> Mapping[str, Any]:
    return {"run": scene.other.run}


_TOKENIZER, _GENERATION = "tokenizer.json", "generation_config.json"
BEFORE = [
    *(inside(name, plant, says) for name, (plant, says) in ADAPTER_FAULTS.items()),
    inside("no record in an adapter", no_record, NO_RECORD["inside"]),
    inside("the side file of another adapter", side_of_two, "adapter one"),
    # codes
    _codes(
        "k and v of one layer exchanged",
        _exchanged("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
    ),
    _codes(
        "gate and up of one layer exchanged", _exchanged("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    ),
    _codes("two layers exchanged", _exchanged("model.layers.0.self_attn.", "model.layers.1.self_attn.")),
    _codes("one scale doubled", _tensors(_first_scale)),
    _codes("all zeros of a module one off", _tensor(f"{ADAPTED_LAYER}.qzeros", lambda zeros: zeros ^ 0x55555555)),
    _codes("all codes of a module turned round", _tensor(f"{ADAPTED_LAYER}.qweight", lambda codes: ~codes)),
    _codes(
        "scales of a module rounded", _tensor(f"{ADAPTED_LAYER}.scales", lambda scales: (scales * 256).round() / 256)
    ),
    _codes("the codes of another run", _codes_of_other_run),
    Fault(
        "a label of the other version of the layout",
        "provenance",
        "checkpoint_format is 'gptq'",
        _file("config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq")),
        certified=True,
    ),
    Fault("the export of another run in its place", "reference", "", _whole_other_run),
    # the float model
    Fault("another float model of the same sizes", "reference", "not the revision", _other_reference),
    Fault("the float model rounded to half precision", "reference", "not the revision", _rounded_reference),
    Fault("the float model one unit off in one number", "reference", "not the revision", _nudged_reference),
    Fault(
        "the float model with another tokenizer",
        "reference",
        "vocabulary is not the float model's",
        _other_tokenizer_of_reference,
    ),
    # the run beside it
    Fault("a run that went on behind the export", "provenance", "the export is stale", _stale_run),
    Fault("another run beside it", "provenance", "another run, or stale", _other_run),
    # what is not quantized
    _float("the row of a token that no text has", "model.embed_tokens.weight", _tensors(_rare_row)),
    _float(
        "two rows of the embeddings exchanged",
        "model.embed_tokens.weight",
        _tensor("model.embed_tokens.weight", _in_embeddings),
    ),
    _float("embeddings rounded and stored again", "model.embed_tokens.weight", _tensors(_to_bfloat16_and_back)),
    _float("the head stored in half precision", "lm_head.weight", _tensor("lm_head.weight", lambda w: w.bfloat16())),
    _float("the final norm in integers", "is stored as int8", _tensor("model.norm.weight", lambda w: w.char())),
    _float("embeddings in eight bits", "F8_E4M3", _tensors(_to_float8)),
    _float(
        "norms of two layers exchanged",
        "input_layernorm",
        _exchanged("model.layers.0.input_layernorm", "model.layers.1.input_layernorm"),
    ),
    _float(
        "both norms of a layer exchanged",
        "layernorm",
        _exchanged("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"),
    ),
    _float("one added to the final norm", "model.norm.weight", _tensor("model.norm.weight", lambda weight: weight + 1)),
    _float("a thousandth more of the head", "lm_head.weight", _tensor("lm_head.weight", lambda weight: weight * 1.001)),
    _float(
        "rope scaling", "rope", _config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    ),
    _float("a bias of attention", "q_proj.bias", _config(attention_bias=True)),
    _float("the begin token", "bos_token_id", _config(bos_token_id=3)),
    _float("the padding token", "pad_token_id", _config(pad_token_id=7)),
    _float("two end tokens", "eos_token_id", _config(eos_token_id=[2, 9])),
    _float("a sliding window", "sliding_window", _config(sliding_window=16)),
    _float("a normalizer of the tokenizer", "tokenizer", _file(_TOKENIZER, _normalizer)),
    _float("a begin token that the tokenizer adds", "tokenizer", _file(_TOKENIZER, _adds_begin)),
    _float("a word that became special", "tokenizer", _file(_TOKENIZER, _added_token)),
    _float("the word for what is unknown", "tokenizer", _file(_TOKENIZER, lambda c: c["model"].update(unk_token="w0"))),
    _float(
        "the tokenizer's longest text",
        "model_max_length",
        _file("tokenizer_config.json", lambda c: c.update(model_max_length=16)),
    ),
    _float(
        "a chat template in the tokenizer's settings",
        "chat template",
        _file("tokenizer_config.json", lambda c: c.update(chat_template="{{ 1 }}")),
    ),
    _float(
        "a repetition penalty", "repetition_penalty", _file(_GENERATION, lambda c: c.update(repetition_penalty=1.2))
    ),
    _float(
        "tokens that are never written", "suppress_tokens", _file(_GENERATION, lambda c: c.update(suppress_tokens=[5]))
    ),
    _float("texts that end early", "max_new_tokens", _file(_GENERATION, lambda c: c.update(max_new_tokens=3))),
    # the record
    Fault(
        "another float model in the record",
        "provenance",
        "was edited",
        _file("cloq_provenance.json", lambda c: c.update(model="x")),
        certified=True,
    ),
    Fault(
        "another perplexity in the record",
        "provenance",
        "was edited",
        _file("cloq_provenance.json", lambda c: c["quality"].update(ratio={"": 9.0})),
        certified=True,
    ),
    Fault(
        "a record of version 0",
        "provenance",
        "is of version 0",
        _file("cloq_provenance.json", lambda c: c.update(format_version=0)),
        certified=True,
    ),
    Fault(
        "a record that is empty",
        "provenance",
        "no record of provenance",
        _file("cloq_provenance.json", lambda c: c.clear()),
        certified=True,
    ),
    Fault(
        "the record of another run",
        "provenance",
        "",
        _record_of_other_run,
        certified=True,
    ),
]
