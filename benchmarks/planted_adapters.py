"""Faults that are planted in adapters, inside of an export or outside."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from planted_scene import Fault, Scene, edit_config, edit_json, edit_pairs, edit_tensors

ADAPTED_LAYER = "model.layers.1.self_attn.v_proj"
# In a folder: an adapter's, that of `one`.
InFolder = Callable[[Scene, Path], None]


def _pairs(change: Callable[[str, Any], Any]) -> InFolder:
    return lambda scene, folder: edit_pairs(folder, change)


def _all_b(change: Callable[[Any], Any]) -> InFolder:
    return _pairs(lambda module, pair: dataclasses.replace(pair, lora_B=change(pair.lora_B).to(pair.lora_B.dtype)))


def _one_b(change: Callable[[Any], Any]) -> InFolder:
    def of_one(module: str, pair: Any) -> Any:
        return dataclasses.replace(pair, lora_B=change(pair.lora_B).contiguous()) if module == ADAPTED_LAYER else pair

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


def side_of_two(scene: Scene, folder: Path) -> None:
    shutil.copyfile(scene.export / "adapters" / "two" / "cloq_adapter.json", folder / "cloq_adapter.json")


def _record(change: Callable[[dict[str, Any]], Any]) -> InFolder:
    """Change what an adapter's record says."""
    return lambda scene, folder: edit_json(
        folder / "cloq_adapter.json", lambda content: change(content["extra"]["provenance"])
    )


def no_record(scene: Scene, folder: Path) -> None:
    edit_json(folder / "cloq_adapter.json", lambda content: content["extra"].pop("provenance"))


def _set(**values: Any) -> InFolder:
    return lambda scene, folder: edit_config(folder, **values)


# What can be wrong with an adapter, wherever it lies: (what is planted, the gate, what must be said).
ADAPTER_FAULTS: dict[str, tuple[InFolder, str]] = {
    "a hundredth more alpha": (_set(lora_alpha=8.08), "has 1.01 times the product"),
    "alpha halved for one module": (_set(alpha_pattern={ADAPTED_LAYER: 4}), "has 0.5 times the product"),
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
        _pairs(lambda module, pair: None if module == ADAPTED_LAYER else pair),
        f"lacks the pairs of {ADAPTED_LAYER}",
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
NO_RECORD = {"inside": "holds no record", "outside": "carries no record"}


def inside(name: str, plant: InFolder, says: str) -> Fault:
    """Return the fault of an adapter in an export, which gets a fresh certificate."""
    return Fault(name, "provenance", says, lambda scene: plant(scene, scene.one), certified=True)


def outside(name: str, plant: InFolder, says: str, served_as: str = "mine") -> Fault:
    """Return the fault of an adapter that lies outside the export and is served under a name."""

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
    *(outside(name, plant, says) for name, (plant, says) in ADAPTER_FAULTS.items() if name not in _RATHER_INSIDE),
    outside("no record", no_record, NO_RECORD["outside"]),
    outside("the side file of another adapter", side_of_two, "adapter mine"),
    outside("a NaN", _nan, "adapter_model.safetensors"),
    outside("weights that are gone", _no_weights, "adapter_model.safetensors"),
    outside("no side file", _no_side, "carries no record"),
    outside("the other trained adapter's name", lambda scene, folder: None, "two", served_as="two"),
    Fault("three names in a ring", "provenance", "", _served(("cloq", "one"), ("one", "two"), ("two", "cloq"))),
    Fault("the run's own adapter under a trained one's name", "provenance", "", _served(("two", "cloq"))),
    Fault("an adapter of another base", "provenance", "base", _of_other_base),
    Fault("an adapter of another base, by force", "provenance", "base", _forced),
]
