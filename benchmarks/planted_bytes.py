"""Faults that come behind the certificate: bytes, names and links of an export that was whole when it was certified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from planted_scene import Fault, Scene, edit_json

CERTIFICATE = "cloq_certificate.json"


def _flip(name: str, place: float) -> Callable[[Scene], None]:
    """Flip one bit of a file, at a share of its length."""

    def plant(scene: Scene) -> None:
        path = scene.export / name
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return plant


def _tensor_bit(name: str) -> Callable[[Scene], None]:
    """Flip one bit inside one tensor of the weights."""

    def plant(scene: Scene) -> None:
        import json

        path = scene.export / "model.safetensors"
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
        content[8 + length + (start + end) // 2] ^= 1
        path.write_bytes(content)

    return plant


def _text(name: str, change: Callable[[str], str]) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        path = scene.export / name
        path.write_bytes(change(path.read_text(encoding="utf-8")).encode())

    return plant


def _new(name: str, content: bytes = b"{}") -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        path = scene.export / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return plant


def _certificate(change: Callable[[dict], object]) -> Callable[[Scene], None]:
    return lambda scene: edit_json(scene.export / CERTIFICATE, change)


def _renamed(name: str, other: str) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        (scene.export / name).rename(scene.export / other)

    return plant


def _linked(name: str) -> Callable[[Scene], None]:
    """Move a file or folder out and leave a link to it."""

    def plant(scene: Scene) -> None:
        shutil.move(scene.export / name, scene.place / "moved")
        (scene.export / name).symlink_to(scene.place / "moved")

    return plant


def _truncated(scene: Scene) -> None:
    path = scene.export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _appended(scene: Scene) -> None:
    with open(scene.export / "model.safetensors", "ab") as file:
        file.write(b"\0")


def _second_adapter(scene: Scene) -> None:
    shutil.copytree(scene.one, scene.export / "adapters" / "three")


def _swapped_certificates(scene: Scene) -> None:
    other = scene.other.export(scene.place / "other")
    shutil.copyfile(other / CERTIFICATE, scene.export / CERTIFICATE)


def _swapped_adapters(scene: Scene) -> None:
    """The whole folder of an adapter of another export with the same sizes."""
    other = scene.other.export(scene.place / "other")
    shutil.rmtree(scene.one)
    shutil.copytree(other / "adapters" / "one", scene.one)


def _run_file(pattern: str) -> Callable[[Scene], dict[str, object]]:
    """Flip a bit of a file of the run, which is verified in the export's place."""

    def plant(scene: Scene) -> dict[str, object]:
        run = Path(shutil.copytree(scene.subject.run, scene.place / "run"))
        path = sorted(run.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        return {"export": run}

    return plant


def _hub_link(scene: Scene) -> None:
    """A snapshot as the hub lays it out, one of whose links leads to a blob of another file."""
    blobs = scene.place / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(scene.export.glob("*.json"))):
        target = blobs / f"{number:040x}"
        shutil.move(path, target)
        path.symlink_to(os.path.relpath(target, path.parent))


_MODULE = "model.layers.1.mlp.gate_proj"
FAULTS = [
    *(
        Fault(f"a bit of {part} of one module", "certificate", plant=_tensor_bit(f"{_MODULE}.{part}"))
        for part in ("qweight", "scales", "qzeros")
    ),
    Fault("a bit of the embeddings", "certificate", plant=_tensor_bit("model.embed_tokens.weight")),
    Fault("a bit of the final norm", "certificate", plant=_tensor_bit("model.norm.weight")),
    Fault("a bit of lora_B of an adapter", "certificate", plant=_flip("adapters/two/adapter_model.safetensors", 0.9)),
    Fault("weights cut short by one byte", "certificate", "model.safetensors", plant=_truncated),
    Fault("a byte behind the weights", "certificate", "model.safetensors", plant=_appended),
    Fault("a line end added to tokenizer.json", "certificate", plant=_text("tokenizer.json", lambda text: text + "\n")),
    Fault(
        "config.json with other line ends",
        "certificate",
        plant=_text("config.json", lambda text: text.replace("\n", "\r\n")),
    ),
    Fault(
        "a byte order mark before config.json", "certificate", plant=_text("config.json", lambda text: "\ufeff" + text)
    ),
    Fault("blanks in the record", "certificate", plant=_text("cloq_provenance.json", lambda text: text + " ")),
    Fault(
        "a blank in an adapter's side file",
        "certificate",
        plant=_text("adapters/one/cloq_adapter.json", lambda t: t + " "),
    ),
    Fault(
        "an adapter's configuration",
        "certificate",
        plant=lambda scene: edit_json(scene.one / "adapter_config.json", lambda content: content.update(revision="x")),
    ),
    Fault("code of a model added", "certificate", "modeling_own.py", plant=_new("modeling_own.py", b"import os\n")),
    Fault("an index of weights added", "certificate", plant=_new("model.safetensors.index.json")),
    Fault("a second weight file added", "certificate", plant=_new("model-00002-of-00002.safetensors", b"x")),
    Fault("pickled weights added", "certificate", "pytorch_model.bin", plant=_new("pytorch_model.bin", b"x")),
    Fault("generation settings added beside", "certificate", plant=_new("generation_config.bak")),
    Fault("a chat template added", "certificate", "chat_template.jinja", plant=_new("chat_template.jinja", b"{{ 1 }}")),
    Fault("an editor's hidden file", "certificate", ".config.json.swp", plant=_new(".config.json.swp", b"x")),
    Fault("a file in a hidden folder", "certificate", plant=_new("adapters/one/.git/HEAD", b"x")),
    Fault("a file name with an invisible letter", "certificate", plant=_new("config\u200b.json")),
    Fault("an adapter added", "certificate", "three", plant=_second_adapter),
    Fault("an adapter of another export in its place", "certificate", plant=_swapped_adapters),
    Fault("a file under another case", "certificate", plant=_renamed("tokenizer_config.json", "Tokenizer_config.json")),
    Fault("a link to a moved file", "certificate", plant=_linked("tokenizer.json")),
    Fault("a link to a moved adapter", "certificate", plant=_linked("adapters/two")),
    Fault("a pipe", "certificate", plant=lambda scene: os.mkfifo(scene.export / "pipe")),
    Fault("the card is a link", "certificate", "README.md", plant=_linked("README.md")),
    Fault("links as the hub's, in a folder that is no snapshot", "certificate", plant=_hub_link),
    Fault("the certificate is gone", "certificate", plant=lambda scene: (scene.export / CERTIFICATE).unlink()),
    Fault("the certificate of another export", "certificate", plant=_swapped_certificates),
    Fault(
        "the certificate of another version",
        "certificate",
        "version 99",
        plant=_certificate(lambda c: c.update(format_version=99)),
    ),
    Fault(
        "a file taken out of the certificate",
        "certificate",
        plant=_certificate(lambda c: c["files"].pop("config.json")),
    ),
    Fault(
        "a module taken out of the certificate", "certificate", plant=_certificate(lambda c: c["modules"].pop(_MODULE))
    ),
    Fault(
        "another base in the certificate",
        "certificate",
        plant=_certificate(lambda c: c.update(base_fingerprint="sha256:0")),
    ),
    Fault("a bit of a run's checkpoint", "certificate", plant=_run_file("checkpoint/model*.safetensors")),
    Fault("a bit of a run's layer", "certificate", plant=_run_file("layers/*.safetensors")),
]
