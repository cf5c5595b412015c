"""What the benchmarks share: the machine in words, and the measured model as a folder that any tool can read.

The module needs nothing beyond the standard library until a function is called, because the other side of a comparison
runs in an environment without this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def describe_hardware() -> dict[str, Any]:
    """Return what this process runs on; see `cloq_export.process.hardware`."""
    from cloq_export.process.hardware import describe_hardware as describe

    return describe()


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """Return the hardware in one line."""
    from cloq_export.process.hardware import hardware_line as line

    return line(hardware)


def put_into(page: Path | None, name: str, text: str) -> None:
    """Print a text, or put it between the marks `<!-- NAME table: begin -->` and `<!-- NAME table: end -->` of a page.

    Raises:
        SystemExit: the page lacks the marks.
    """
    if page is None:
        print(text)
        return
    begin, end = f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the lines {begin} and {end}, between which the table belongs.")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def model_folder(name: str, spare: Path) -> Path:
    """Return a folder in Hugging Face form that holds a model: where it lies already, or `spare`, written from GGUF.

    Args:
        name: as `cloq run` takes it.
        spare: a folder that does not exist yet; written only if the model's source is a GGUF file.

    Returns:
        Path: config.json, safetensors and tokenizer stand there.
    """
    from cloq_export.models.saving import save_plain
    from cloq_export.models.source import find_source, load_source

    source = find_source(name)
    if source.kind == "folder":
        return source.folder.resolve()
    loaded = load_source(source)
    spare.mkdir(parents=True)
    save_plain(loaded, spare)
    return spare.resolve()


def perturbed_adapters(source: Path, place: Path, count: int, *, share: float = 0.2) -> dict[str, Path]:
    """Write copies of an adapter with noise added to B, each with a seed of its own, and return name -> folder.

    Args:
        source: the adapter.
        place: where the copies are put.
        count: how many.
        share: size of the noise beside that of B.
    """
    import dataclasses

    import torch

    from cloq_export.formats.peft import read_adapter, write_adapter
    from cloq_export.verbs.recording import note_adapter

    adapter = read_adapter(source)
    folders = {}
    for seed in range(1, count + 1):
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for module, pair in adapter.pairs.items():
            b = pair.lora_B.to(torch.float32)
            noise = torch.randn(b.shape, generator=generator) * (share * b.std())
            pairs[module] = dataclasses.replace(pair, lora_B=(b + noise).to(pair.lora_B.dtype))
        folders[f"noisy{seed}"] = place / f"noisy{seed}"
        bound = str(adapter.base_fingerprint or "")
        write_adapter(
            folders[f"noisy{seed}"],
            pairs,
            base_model=str(adapter.config.get("base_model_name_or_path") or ""),
            base_fingerprint=bound,
            # An adapter of its own, so with a record of its own: the gate takes none without.
            extra=note_adapter(f"noisy{seed}", pairs, base_fingerprint=bound),
        )
    return folders
