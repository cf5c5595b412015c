"""Faults that lie beside what is read here: files, names and settings that other readers of an export go by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planted_adapters import InFolder, inside, outside
from planted_scene import Fault, Scene, edit_config, edit_json, edit_tensors


def _new(name: str, content: bytes = b"{}") -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        (scene.export / name).write_bytes(content)

    return plant


def _other_weights(name: str) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        shutil.copyfile(scene.other.model / "model.safetensors", scene.export / name)

    return plant


def _adapter_on_top(scene: Scene) -> None:
    """Transformers puts an adapter that lies beside config.json on the model."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(scene.one / name, scene.export / name)


def _set(name: str, **values: Any) -> Callable[[Scene], None]:
    return lambda scene: edit_json(scene.export / name, lambda content: content.update(values))


def _quantization(**values: Any) -> Callable[[Scene], None]:
    return lambda scene: edit_json(
        scene.export / "config.json", lambda content: content["quantization_config"].update(values)
    )


def _renamed(front: str, ending: str) -> InFolder:
    def rename(held: dict[str, Any]) -> None:
        for name in list(held):
            bare = name.removeprefix("base_model.model.").removesuffix(".weight")
            held[f"{front}{bare}{ending}"] = held.pop(name)

    return lambda scene, folder: edit_tensors(folder / "adapter_model.safetensors", rename)


def _pickle_beside(scene: Scene, folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")


def _tokenizer_beside(scene: Scene, folder: Path) -> None:
    content = json.loads((scene.export / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["unk_token"] = "w0"
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


_TRUNCATED = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
_SETTINGS = "tokenizer_config.json"
_ADAPTERS: dict[str, tuple[InFolder, str]] = {
    "names that lack PEFT's prefix": (_renamed("", ".weight"), "a name that PEFT does not look for"),
    "names with an adapter's own": (
        _renamed("base_model.model.", ".default.weight"),
        "a name that PEFT does not look for",
    ),
    "pickled weights beside the others": (_pickle_beside, "adapter_model.bin"),
    "another tokenizer in its folder": (_tokenizer_beside, "tokenizer.json"),
    "an adapter of a classifier": (
        lambda scene, folder: edit_config(folder, task_type="SEQ_CLS"),
        "task_type 'SEQ_CLS'",
    ),
}


def _float(name: str, says: str, plant: Callable[[Scene], Any]) -> Fault:
    return Fault(name, "float_part", says, plant, certified=True)


BEFORE = [
    _float("weights under Mistral's name", "consolidated.safetensors", _other_weights("consolidated.safetensors")),
    _float("weights beside the index", "more.safetensors", _other_weights("more.safetensors")),
    _float("weights as a pickle", "pytorch_model.bin", _new("pytorch_model.bin", b"x")),
    _float("an adapter beside the config", "adapter_config.json", _adapter_on_top),
    _float("sizes under Mistral's name", "params.json", _new("params.json")),
    _float("a vocabulary for another reader", "tokenizer.model", _new("tokenizer.model", b"x")),
    _float("a chat template for processors", "chat_template.json", _new("chat_template.json")),
    _float(
        "texts that tokenizer.json cuts",
        "sets truncation for every text",
        _set("tokenizer.json", truncation=_TRUNCATED),
    ),
    _float("padding on the left", "padding_side", _set(_SETTINGS, padding_side="left")),
    _float("an end token that is added", "add_eos_token", _set(_SETTINGS, add_eos_token=True)),
    Fault(
        "a head that is said to be quantized",
        "float_part",
        "lm_head is true",
        _quantization(lm_head=True),
        certified=True,
    ),
    *(inside(name, plant, says) for name, (plant, says) in _ADAPTERS.items()),
]
OUTSIDE = [outside(name, plant, says) for name, (plant, says) in _ADAPTERS.items()]
