"""What an export says of itself: how it was made and measured, how engines load it, its model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export import __version__
from cloq_export.artifact.adapters import ADAPTERS_NAME
from cloq_export.artifact.base_license import License, base_license
from cloq_export.artifact.certificate import CERTIFICATE_NAME, Certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.model_card import CardFacts, EngineLines, Figure, MadeFrom, write_model_card
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.formats.registry import LAYOUTS
from cloq_export.formats.targets.snippets import load_snippets
from cloq_export.formats.targets.table import Exported
from cloq_export.models.source import ModelSource
from cloq_export.recipe import Recipe
from cloq_export.verbs.export_adapters import PreparedAdapter

# The report of a run that holds what its exports say of its float model.
SOURCE_REPORT = "source"
# An export may be moved, so its card names no path.
_PLACEHOLDER = "PATH/TO/EXPORT"
_MODELS = {"float": "float model", "quantized": "codes alone", "adapter": "codes with adapter, before fine-tuning"}


def facts_of_run(directory: RunDirectory, recipe: Recipe) -> MadeFrom:
    """Return what the card may say of a run: how it was made, and what was measured of it."""
    reports = directory.reports()
    return MadeFrom(
        base_model=public_name(recipe.model),
        method="codes of another checkpoint, unchanged, with a CLoQ adapter"
        if recipe.codes_from
        else f"{recipe.method} with a CLoQ adapter (preset {recipe.preset_name})",
        rank=recipe.rank,
        license=License.from_json(directory.read_report(SOURCE_REPORT).get("license"))
        if SOURCE_REPORT in reports
        else None,
        figures=tuple(_figures(directory.read_report("evaluation"), recipe)) if "evaluation" in reports else (),
    )


def _figures(report: Mapping[str, Any], recipe: Recipe) -> Iterator[Figure]:
    text = str(report.get("text"))
    if Path(text).is_absolute():
        text = public_name(recipe.eval_text)
    conditions = (
        f"{report.get('tokens')} tokens of {text} in windows of {recipe.eval_window}, "
        f"sha256 {str(report.get('text_sha256'))[:12]}"
    )
    for key, label in _MODELS.items():
        if isinstance(report.get(key), Mapping):
            measured = report[key]
            yield Figure("perplexity", measured["perplexity"], conditions, label, measured.get("standard_error"))


def loading_lines(format: str, exported: Exported, adapters: Sequence[PreparedAdapter]) -> tuple[EngineLines, ...]:
    """Return how each engine loads an export, ours first.

    Args:
        format: of the export; one that is a checkpoint.
        exported: what engines are given.
        adapters: that lie in it.
    """
    names = [adapter.name for adapter in adapters]
    inside = f"{_PLACEHOLDER}/{ADAPTERS_NAME}/{names[0]}" if names else _PLACEHOLDER
    lines: list[EngineLines] = []
    if format in LAYOUTS:
        served = f'cloq_export.load("{_PLACEHOLDER}"' + (f', adapter="{names[0]}")' if names else ")")
        note = "checks that the adapter belongs to this base"
        lines.append(EngineLines("cloq_export", f"import cloq_export\n\nmodel = {served}", __version__, note))
    for entry in load_snippets(format, exported, folder=_PLACEHOLDER, adapter=inside):
        note = f"on {entry['device']}" + (f"; needs {entry['needs']}" if entry["needs"] else "")
        lines.append(EngineLines(entry["engine"], entry["snippet"], entry["version"], note, entry["language"]))
    return tuple(lines)


def write_card(folder: Path, facts: CardFacts, checkpoint: Checkpoint) -> None:
    """Write the model card of an export.

    Args:
        folder: of the export.
        facts: what only this export knows.
        checkpoint: what it was made of, which knows widths, groups and, if nothing else does, the licence.
    """
    made_from, main = facts.made_from, checkpoint.grids.default
    stated = made_from.license or base_license(checkpoint.folder)
    facts = dataclasses.replace(
        facts,
        made_from=dataclasses.replace(made_from, license=stated),
        bits=tuple(sorted({spec.bits for spec in checkpoint.specs.values()})),
        group_size=main.group_size,
        symmetric=main.symmetric,
    )
    write_model_card(folder, facts)


def certificate_row(certificate: Certificate) -> dict[str, Any]:
    """Return what the card says of the certificate."""
    return {"file": CERTIFICATE_NAME, "modules": len(certificate.modules), "files": len(certificate.files)}


def license_of(source: ModelSource) -> License | None:
    """Return the licence of a float model, None if it does not say."""
    if source.kind == "gguf":
        return License(source.gguf_license) if source.gguf_license else None
    return base_license(source.folder)


def public_name(name: str) -> str:
    """Return what an export may say of a model or a text: a hub id as it is, of a path only the last part."""
    if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        return Path(name).name
    return name
