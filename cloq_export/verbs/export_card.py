"""What an export says of itself: how it was made and measured, how engines load it, its model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloq_export import __version__
from cloq_export.artifact.adapters import ADAPTERS_NAME
from cloq_export.artifact.certificate import Certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import LayerSource
from cloq_export.artifact.model_card import base_license, write_model_card
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.formats.registry import LAYOUTS
from cloq_export.formats.targets.snippets import load_snippets
from cloq_export.formats.targets.table import Exported
from cloq_export.models.source import ModelSource
from cloq_export.recipe import Recipe
from cloq_export.verbs.export_adapters import PreparedAdapter

# The report of a run that says what it was made from, as far as its exports have to say it.
SOURCE_REPORT = "source"
# An export does not know where it will lie.
_PLACEHOLDER = "PATH/TO/EXPORT"
_MODELS = {"float": "float model", "quantized": "codes alone", "adapter": "codes with adapter, before fine-tuning"}


def facts_of_run(directory: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Return what the card may say of a run: how it was made, and what was measured of it."""
    facts: dict[str, Any] = {
        "base_model": public_name(recipe.model),
        "method": "codes of another checkpoint, unchanged, with a CLoQ adapter"
        if recipe.codes_from
        else f"{recipe.method} with a CLoQ adapter (preset {recipe.preset_name})",
        "rank": recipe.rank,
    }
    if SOURCE_REPORT in directory.reports():
        facts |= directory.read_report(SOURCE_REPORT).get("license") or {}
    if "evaluation" in directory.reports():
        facts["figures"] = list(_figures(directory.read_report("evaluation"), recipe))
    return facts


def _figures(report: Mapping[str, Any], recipe: Recipe) -> Iterator[dict[str, Any]]:
    text = str(report.get("text"))
    if Path(text).is_absolute():
        text = public_name(recipe.eval_text)
    conditions = (
        f"{report.get('tokens')} tokens of {text} in windows of {recipe.eval_window}, "
        f"sha256 {str(report.get('text_sha256'))[:12]}"
    )
    for key, label in _MODELS.items():
        if isinstance(report.get(key), Mapping):
            yield {
                "name": "perplexity",
                "of": label,
                "value": report[key]["perplexity"],
                "standard_error": report[key].get("standard_error"),
                "conditions": conditions,
            }


def loading_lines(
    format: str, layers: LayerSource, adapters: Sequence[PreparedAdapter], *, merged: bool
) -> list[dict[str, str]]:
    """Return how each engine loads an export, ours first, as `model_card` takes it.

    Args:
        format: of the export; one that is a checkpoint.
        layers: what it is made of.
        adapters: that lie in it.
        merged: there is one adapter, and it is in the weights.
    """
    names = [adapter.name for adapter in adapters]
    ranks = [] if merged else [pair.rank for adapter in adapters for pair in adapter.pairs.values()]
    inside = f"{_PLACEHOLDER}/{ADAPTERS_NAME}/{names[0]}" if names else _PLACEHOLDER
    lines: list[dict[str, str]] = []
    if format in LAYOUTS:
        served = f'cloq_export.load("{_PLACEHOLDER}"' + (f', adapter="{names[0]}")' if names else ")")
        lines.append(
            {
                "engine": "cloq_export",
                "version": __version__,
                "snippet": f"import cloq_export\n\nmodel = {served}",
                "language": "python",
                "note": "checks that the adapter belongs to this base",
            }
        )
    exported = Exported(layers.specs, layers.shapes, ranks, plugin=True)
    for entry in load_snippets(format, exported, folder=_PLACEHOLDER, adapter=inside):
        needs = f"; needs {entry['needs']}" if entry["needs"] else ""
        kept = {key: entry[key] for key in ("engine", "version", "snippet", "language")}
        lines.append({**kept, "note": f"on {entry['device']}{needs}"})
    return lines


def write_card(folder: Path, facts: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Write the model card of an export.

    Args:
        folder: of the export.
        facts: what only this export knows.
        checkpoint: what it was made of, which knows widths, groups and the licence.
    """
    main = checkpoint.grids.default
    of_checkpoint = {
        "bits": sorted({spec.bits for spec in checkpoint.specs.values()}),
        "group_size": main.group_size,
        "symmetric": main.symmetric,
        **base_license(checkpoint.folder),
    }
    write_model_card(folder, {**of_checkpoint, **facts})


def certificate_row(certificate: Certificate) -> dict[str, Any]:
    """Return what the card says of the certificate."""
    return {"file": "cloq_certificate.json", "modules": len(certificate.modules), "files": len(certificate.files)}


def license_of(source: ModelSource) -> dict[str, str]:
    """Return the licence of a float model, as `model_card` takes it; empty if the model does not say."""
    if source.kind == "gguf":
        return {"license": source.gguf_license} if source.gguf_license else {}
    return base_license(source.folder)


def public_name(name: str) -> str:
    """Return what an export may say of a model or a text: a hub id as it is, of a path only the last part."""
    if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        return Path(name).name
    return name
