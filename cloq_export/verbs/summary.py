"""What `run`, `quantize` and `adapt` say of what they have made."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.compress.session import Session
from cloq_export.files.spelled_paths import command_line
from cloq_export.parity.perplexity import PerplexityTable
from cloq_export.process.host_memory import MemoryUse
from cloq_export.recipe import Recipe
from cloq_export.types import LayerCertificate

_SHOWN_WARNINGS = 5


@dataclasses.dataclass(frozen=True)
class LayersSummary:
    """The layers of a run in a few figures.

    Args:
        count: how many there are.
        worst_error_adapted: the largest relative error, with the adapter.
        worst_module: the layer that has it.
        bits: width -> how many layers have it.
        group_size: the same.
        rank: the same.
        warnings: what certificates note, the first of many.
    """

    count: int
    worst_error_adapted: float
    worst_module: str
    bits: Mapping[str, int]
    group_size: Mapping[str, int]
    rank: Mapping[str, int]
    warnings: Sequence[str]

    @classmethod
    def of(cls, certificates: Sequence[LayerCertificate], report: str) -> LayersSummary:
        """Return the summary of certificates; `report` is the file that holds all of their notes."""
        worst = max(certificates, key=lambda c: c.error_adapted if math.isfinite(c.error_adapted) else math.inf)
        warnings = [f"{c.module}: {note}" for c in certificates for note in c.notes]
        shown = warnings[:_SHOWN_WARNINGS]
        if len(warnings) > len(shown):
            shown.append(f"and {len(warnings) - len(shown)} more, in {report}")
        return cls(
            count=len(certificates),
            worst_error_adapted=worst.error_adapted,
            worst_module=worst.module,
            bits=_counted(c.bits for c in certificates),
            group_size=_counted(c.group_size for c in certificates),
            rank=_counted(c.rank for c in certificates),
            warnings=tuple(shown),
        )


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What a verb has made of a run.

    Args:
        run: the run directory.
        recipe: with what was chosen for it.
        perplexity: what was measured; None if nothing was.
        seconds: stage -> time.
        memory: of the calibration; None if nothing was left to do.
        stored: what lies on disk, in bytes and bits per weight; empty as long as there is no checkpoint.
        layers: the layers in a few figures.
        files: name -> path.
        next: commands that suggest themselves.
        notes: what did not go the ordinary way.
    """

    run: str
    recipe: Recipe
    perplexity: PerplexityTable | None
    seconds: Mapping[str, float]
    memory: MemoryUse | None
    stored: Mapping[str, float | None]
    layers: LayersSummary
    files: Mapping[str, str]
    next: Sequence[str]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq run --json` prints."""
        return {
            "run": self.run,
            "model": self.recipe.model,
            "bits": self.recipe.bits,
            "group_size": self.recipe.group_size,
            "rank": self.recipe.rank,
            "preset": self.recipe.preset_name,
            "perplexity": self.perplexity.to_json() if self.perplexity is not None else None,
            "seconds": dict(self.seconds),
            "peak_memory_bytes": self.memory.peak if self.memory else None,
            "memory_beyond_model_bytes": self.memory.beyond_start if self.memory else None,
            "stored": dict(self.stored),
            "layers": dataclasses.asdict(self.layers),
            "files": dict(self.files),
            "next": list(self.next),
            "notes": list(self.notes),
        }


def summarize_run(
    session: Session,
    directory: RunDirectory,
    recipe: Recipe,
    *,
    perplexity: PerplexityTable | None = None,
    certificates: Sequence[LayerCertificate] | None = None,
    next: Sequence[str] | None = None,
) -> RunSummary:
    """Return the summary of a run whose layers are finished.

    Args:
        session: of the call.
        directory: the run.
        recipe: of the call; its adapter is the one whose size counts.
        perplexity: what was measured.
        certificates: of an adapter that was made apart from the codes; None takes the run's own.
        next: commands that suggest themselves; None is to inspect, measure and load the run.
    """
    adapters = directory.adapters.folders
    adapter = recipe.adapter_name if recipe.adapter_name in adapters else None
    stored: dict[str, float | None] = {}
    files = {"run": str(directory.path), "recipe": str(directory.path / "run.json")}
    if directory.checkpoint_path.exists():
        sizes = stored_sizes(directory.path, adapter)
        stored = {
            "bits_per_weight_base": sizes.bits_per_weight,
            "bits_per_weight_with_adapter": sizes.bits_per_weight_with_adapter,
            "checkpoint_bytes": sizes.checkpoint_bytes,
            "adapter_bytes": sizes.adapter_bytes,
            "float_bytes": sizes.float_bytes,
        }
        files["checkpoint"] = str(directory.checkpoint_path)
    files |= {f"adapter {name}": str(folder) for name, folder in adapters.items()}
    if next is None:
        quoted = json.dumps(str(directory.path), ensure_ascii=False)
        load = f"cloq_export.load({quoted}" + (f', adapter="{adapter}")' if adapter else ")")
        next = (
            command_line("cloq", "inspect", directory.path),
            command_line("cloq", "eval", directory.path, "--windows", 64),
            command_line("python", "-c", f"import cloq_export; model = {load}"),
        )
    report = str(directory.path / "reports" / "layers.json")
    return RunSummary(
        run=str(directory.path),
        recipe=recipe,
        perplexity=perplexity,
        seconds=session.seconds,
        memory=session.memory,
        stored=stored,
        layers=LayersSummary.of(directory.certificates() if certificates is None else certificates, report),
        files=files,
        next=next,
        notes=session.notes,
    )


def _counted(values: Iterable[int]) -> dict[str, int]:
    """Return how many layers have each value, as JSON holds it."""
    return {str(value): count for value, count in sorted(collections.Counter(values).items())}
