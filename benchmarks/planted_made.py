"""Faults of an exporter or a user that lie before the certificate, and faults of adapters outside the export."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planted_scene import Fault, Scene, edit_config, edit_json, edit_pairs, edit_tensors

_LAYER = "model.layers.1.self_attn.v_proj"
# In a folder: an adapter's, that of `one`.
InFolder = Callable[[Scene, Path], None]


def _pairs(change: Callable[[str, Any], Any]) -> InFolder:
    return lambda scene, folder: edit_pairs(folder, change)


def _all_b(change: Callable[[Any], Any]) -> InFolder:
    return _pairs(lambda module, pair: dataclasses.replace(pair, lora_B=change(pair.lora_B).to(pair.lora_B.dtype)))


def _one_b(change: Callable[[Any], Any]) -> InFolder:
    def of_one(module: str, pair: Any) -> Any:
        return dataclasses.replace(pair, lora_B=change(pair.lora_B).contiguous()) if module == _LAYER else pair

    return _pairs(of_one)


def _noise(share: float) -> Callable[[Any], Any]:
    def noisy(tensor: Any) -> Any:
        import torch

        generator = torch.Generator().manual_seed(7)
        return tensor + share * tensor.float().std() * torch.randn(tensor.shape, generator=generator)

    return noisy


def _less_rank(module: str, pair: Any) -> Any:
    a, b = pair.lora_A[:-1].contiguous(), pair.lora_B[:, :-1].contiguous()
    return dataclasses.replace(pair, lora_A=a, lora_B=b, alpha=pair.alpha * (pair.rank - 1) / pair.rank)


def _integers(tensor: Any) -> Any:
    step = tensor.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (tensor.float() / step).round() * step


def _float8(tensor: Any) -> Any:
    import torch

    return tensor.to(torch.float8_e4m3fn).to(torch.float32)


def _average(scene: Scene, folder: Path) -> None:
    """The mean of two adapters, A with A and B with B, as tools that merge adapters do."""
    from cloq_export.formats.peft import read_adapter

    other = read_adapter(scene.export / "adapters" / "two").pairs

    def mean(module: str, pair: Any) -> Any:
        a, b = (pair.lora_A + other[module].lora_A) / 2, (pair.lora_B + other[module].lora_B) / 2
        return dataclasses.replace(pair, lora_A=a, lora_B=b)

    edit_pairs(folder, mean)


def _half_of_two(scene: Scene, folder: Path) -> None:
    from cloq_export.formats.peft import read_adapter

    other = read_adapter(scene.export / "adapters" / "two").pairs
    edit_pairs(folder, lambda module, pair: other[module] if ".1." in module else pair)


def _other_layers(scene: Scene, folder: Path) -> None:
    """Every pair in the layer beside its own."""
    from cloq_export.formats.peft import read_adapter

    pairs = read_adapter(folder).pairs
    moved = {"0": "1", "1": "0"}
    edit_pairs(
        folder,
        lambda module, pair: pairs[module.replace(f".{module.split('.')[2]}.", f".{moved[module.split('.')[2]]}.")],
    )


def _two_projections(scene: Scene, folder: Path) -> None:
    from cloq_export.formats.peft import read_adapter

    pairs = read_adapter(folder).pairs
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def moved(module: str, pair: Any) -> Any:
        front, _, last = module.rpartition(".")
        return pairs[f"{front}.{names.get(last, last)}"]

    edit_pairs(folder, moved)


def _start_of_run(scene: Scene, folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(scene.export / "adapters" / "cloq" / name, folder / name)


def _weights_of_other_run(scene: Scene, folder: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(scene.other.run / "adapters" / "one" / name, folder / name)


def _side_of_two(scene: Scene, folder: Path) -> None:
    shutil.copyfile(scene.export / "adapters" / "two" / "cloq_adapter.json", folder / "cloq_adapter.json")


def _record(change: Callable[[dict[str, Any]], Any]) -> InFolder:
    """Change what an adapter's record says."""
    return lambda scene, folder: edit_json(
        folder / "cloq_adapter.json", lambda content: change(content["extra"]["provenance"])
    )


def _no_record(scene: Scene, folder: Path) -> None:
    edit_json(folder / "cloq_adapter.json", lambda content: content["extra"].pop("provenance"))


def _set(**values: Any) -> InFolder:
    return lambda scene, folder: edit_config(folder, **values)


# What can be wrong with an adapter, wherever it lies: (what is planted, the gate, what must be said).
_ADAPTERS: dict[str, tuple[InFolder, str]] = {
    "a hundredth more alpha": (_set(lora_alpha=8.08), "has 1.01 times the product"),
    "alpha halved for one module": (_set(alpha_pattern={_LAYER: 4}), "has 0.5 times the product"),
    "scaled as rsLoRA": (_set(use_rslora=True), "times the product"),
    "half a hundredth more of one module": (_one_b(lambda b: b * 1.005), "times the product"),
    "another sign in one module": (_one_b(lambda b: -b), "has -1 times the product"),
    "two rows of one module exchanged": (_one_b(lambda b: b[[1, 0, *range(2, len(b))]]), "has other numbers"),
    "columns of B exchanged without the rows of A": (_all_b(lambda b: b.flip(1)), "has other numbers"),
    "noise of a hundredth": (_all_b(_noise(0.01)), "relative difference"),
    "noise of a thousandth": (_all_b(_noise(0.001)), "was rounded after it was made"),
    "rounded to eight bits": (_all_b(_integers), "was rounded after it was made"),
    "rounded to an eight-bit float": (_all_b(_float8), "has other numbers"),
    "the last rank cut off": (_pairs(_less_rank), "has other numbers"),
    "the mean of two adapters": (_average, "has other numbers"),
    "one layer of another adapter": (_half_of_two, "has other numbers"),
    "every pair in another layer": (_other_layers, "has other numbers"),
    "gate and up exchanged": (_two_projections, "has other numbers"),
    "the pairs that the training started from": (_start_of_run, "that the training started from"),
    "the pairs of another run": (_weights_of_other_run, "the files come from two adapters"),
    "one module zeroed": (_one_b(lambda b: b * 0), "has a product of zero"),
    "one module left out": (
        _pairs(lambda module, pair: None if module == _LAYER else pair),
        f"lacks the pairs of {_LAYER}",
    ),
    "only one layer is named, by a pattern": (_set(target_modules=r"model\.layers\.1\..*"), "leaves out"),
    "only one layer is to be transformed": (_set(layers_to_transform=[1]), "leaves out"),
    "modules are excluded": (_set(exclude_modules=["v_proj"]), "leaves out"),
    "only one kind of module is named": (_set(target_modules=["v_proj"]), "leaves out"),
    "a weight-decomposed adapter": (_set(use_dora=True), "use_dora"),
    "layers that are repeated": (_set(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "a start that moves the base": (_set(init_lora_weights="pissa"), "init_lora_weights"),
    "active behind some tokens alone": (_set(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
    "the record of another version": (_record(lambda record: record.update(format_version=2)), "is of version 2"),
    "another name in the record": (_record(lambda record: record.update(name="three")), "was edited"),
    "other losses in the record": (_record(lambda record: record["training"].update(last_loss=0.1)), "was edited"),
    "a record without a seal": (_record(lambda record: record.pop("seal")), "was edited"),
    "a record that is none": (_record(lambda record: record.clear()), "no record of provenance"),
}
# Said otherwise where the adapter lies outside, or there alone.
_NO_RECORD = {"inside": "holds no record", "outside": "carries no record"}


def _inside(name: str, plant: InFolder, says: str) -> Fault:
    return Fault(name, "provenance", says, lambda scene: plant(scene, scene.one), certified=True)


def _outside(name: str, plant: InFolder, says: str, served_as: str = "mine") -> Fault:
    def planted(scene: Scene) -> Mapping[str, Any]:
        folder = Path(shutil.copytree(scene.subject.run / "adapters" / "one", scene.place / "mine"))
        plant(scene, folder)
        return {"adapters": (f"{served_as}={folder}",)}

    return Fault(name, "provenance", says, planted)


def _served(*pairs: tuple[str, str]) -> Callable[[Scene], Mapping[str, Any]]:
    """Serve adapters of the run under other names."""
    return lambda scene: {"adapters": tuple(f"{name}={scene.subject.run / 'adapters' / own}" for name, own in pairs)}


def _of_other_base(scene: Scene) -> Mapping[str, Any]:
    return {"adapters": (f"mine={scene.other.run / 'adapters' / 'one'}",)}


def _forced(scene: Scene) -> Mapping[str, Any]:
    return {**_of_other_base(scene), "force": True}


def _nan(scene: Scene, folder: Path) -> None:
    edit_tensors(folder / "adapter_model.safetensors", lambda held: next(iter(held.values())).fill_(float("nan")))


def _no_weights(scene: Scene, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _no_side(scene: Scene, folder: Path) -> None:
    (folder / "cloq_adapter.json").unlink()


_RATHER_INSIDE = ("modules are excluded", "another name in the record", "noise of a hundredth", "gate and up exchanged")
OUTSIDE = [
    *(_outside(name, plant, says) for name, (plant, says) in _ADAPTERS.items() if name not in _RATHER_INSIDE),
    _outside("no record", _no_record, _NO_RECORD["outside"]),
    _outside("the side file of another adapter", _side_of_two, "adapter mine"),
    _outside("a NaN", _nan, "adapter_model.safetensors"),
    _outside("weights that are gone", _no_weights, "adapter_model.safetensors"),
    _outside("no side file", _no_side, "carries no record"),
    _outside("the other trained adapter's name", lambda scene, folder: None, "two", served_as="two"),
    Fault("three names in a ring", "provenance", "", _served(("cloq", "one"), ("one", "two"), ("two", "cloq"))),
    Fault("the run's own adapter under a trained one's name", "provenance", "", _served(("two", "cloq"))),
    Fault("an adapter of another base", "provenance", "base", _of_other_base),
    Fault("an adapter of another base, by force", "provenance", "base", _forced),
]


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
    held[f"{_LAYER}.scales"][0, 0] *= 2


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
        weight = held[f"{_LAYER}.weight"]
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
    *(_inside(name, plant, says) for name, (plant, says) in _ADAPTERS.items()),
    _inside("no record in an adapter", _no_record, _NO_RECORD["inside"]),
    _inside("the side file of another adapter", _side_of_two, "adapter one"),
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
    _codes("all zeros of a module one off", _tensor(f"{_LAYER}.qzeros", lambda zeros: zeros ^ 0x55555555)),
    _codes("all codes of a module turned round", _tensor(f"{_LAYER}.qweight", lambda codes: ~codes)),
    _codes("scales of a module rounded", _tensor(f"{_LAYER}.scales", lambda scales: (scales * 256).round() / 256)),
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
