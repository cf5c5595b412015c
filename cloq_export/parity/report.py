"""The parity report: what was measured of an export, from its bytes to served answers, and the verdict."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloq_export.files.atomic import make_folder, translate_os_errors, write_bytes, write_json
from cloq_export.files.safe_json import parse_json
from cloq_export.parity import liveness
from cloq_export.parity.divergence import Divergence
from cloq_export.parity.gate import Verdict, explain_miss
from cloq_export.parity.generation import WrittenTexts
from cloq_export.parity.isolation import Isolation
from cloq_export.parity.numerics import GreedyTexts, LogprobDifferences
from cloq_export.parity.page import render_html
from cloq_export.parity.plain import Result, plain
from cloq_export.parity.provenance import NOT_RECORDED, PROVEN, Finding, ProbeDifferences, RecordedRatio
from cloq_export.parity.quality import PerplexityRow
from cloq_export.parity.scales import ScaleErrors
from cloq_export.parity.task_report import VerifiedTask

JSON_NAME = "parity.json"
HTML_NAME = "parity.html"
REPORT_FORMAT = "cloq-parity"
FORMAT_VERSION = 1
_SCHEMA_FILE = "parity.schema.json"


@dataclasses.dataclass(frozen=True)
class Judged(Result):
    """Whether something was judged of the export; if not, no gate can make up for it."""

    passed: bool
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FloatModel(Result):
    """The float model, by its name and the fingerprint of its files."""

    name: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ServedAdapter(Result):
    """An adapter that was served.

    Args:
        name: that it is served under.
        folder: where it lies.
        modules: that it adapts.
        bound_to_this_base: whether it was made for these codes.
    """

    name: str
    folder: str
    modules: int
    bound_to_this_base: bool


@dataclasses.dataclass(frozen=True)
class Conditions(Result):
    """Under which conditions the figures were measured; those of the call unless said otherwise.

    Args:
        text: where the text is from.
        text_sha256: of it.
        window: tokens in a window.
        windows: how many there were.
        bos: what was asked of the begin of each window and prompt.
        begin_tokens: what each window and prompt began with.
        tasks: that were measured.
        prompts: how many there were.
        new_tokens: behind each of them.
        longest: tokens of the longest text.
        liveness_tokens: on which modules were shown to be live.
        seed: of the random signs that scales are screened with.
        device: of the transformers models.
        threads: of torch.
    """

    text: str
    text_sha256: str
    window: int
    windows: int
    bos: str
    begin_tokens: tuple[int, ...]
    tasks: tuple[str, ...]
    prompts: int
    new_tokens: int
    longest: int
    liveness_tokens: int
    seed: int
    device: str
    threads: int


@dataclasses.dataclass(frozen=True)
class CertificateCheck(Result):
    """What comes of repeating the equality certificate.

    Args:
        passed: whether it holds.
        files: that it covers.
        modules: that it covers.
        not_covered: files of the hub that lie beside those that were certified.
        reason: why it does not hold.
    """

    passed: bool
    files: int | None = None
    modules: int | None = None
    not_covered: tuple[str, ...] = ()
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Provenance(Result):
    """Codes, adapters and float model compared with what the run and the training recorded when they made them."""

    findings: tuple[Finding, ...]
    probes: tuple[ProbeDifferences, ...]
    recorded_ratios: tuple[RecordedRatio, ...]


@dataclasses.dataclass(frozen=True)
class ModelPair(Result):
    """Two models on the same tokens.

    Args:
        measured: the model in question.
        against: the model that it is compared with.
        adapter: with which adapter.
    """

    measured: str
    against: str
    adapter: str | None


@dataclasses.dataclass(frozen=True)
class NumericsRow(ModelPair):
    """Differences of the log-probabilities of two models, per token."""

    levelled = "differences"

    differences: LogprobDifferences


@dataclasses.dataclass(frozen=True)
class DivergenceRow(ModelPair):
    """Distance between the distributions of two models."""

    levelled = "divergence"

    divergence: Divergence


@dataclasses.dataclass(frozen=True)
class Quality(Result):
    """Perplexity of each model, and task -> what was answered with each adapter."""

    perplexity: tuple[PerplexityRow, ...]
    tasks: Mapping[str, tuple[VerifiedTask, ...]]


@dataclasses.dataclass(frozen=True)
class LayerErrors(Result):
    """What the run measured of a layer: relative errors of Q alone, of Q + BA, and their lower bound."""

    module: str
    bits: int
    rank: int
    error_quantized: float | None
    error_adapted: float | None
    error_bound: float | None


@dataclasses.dataclass(frozen=True)
class Missing(Result):
    """What could not be measured, and why."""

    what: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """What `verify` measured and judged; `to_json` gives the content of parity.json."""

    judged: Judged
    export: str
    layout: str
    bits: tuple[int, ...]
    base_fingerprint: str
    reference: FloatModel
    runtime: str
    dtype: str
    adapters: tuple[ServedAdapter, ...]
    conditions: Conditions
    certificate: CertificateCheck
    provenance: Provenance
    float_part: tuple[Finding, ...]
    noise_floor: LogprobDifferences
    numerics: tuple[NumericsRow, ...]
    divergence: tuple[DivergenceRow, ...]
    quality: Quality
    greedy: tuple[GreedyTexts, ...]
    decoding: tuple[WrittenTexts, ...]
    scales: ScaleErrors | None
    liveness: tuple[liveness.AdapterLiveness, ...]
    isolation: Isolation | None
    layers: tuple[LayerErrors, ...] | None
    metrics: Mapping[str, float | None]
    gates: tuple[Verdict, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    versions: Mapping[str, Any]
    needs_adapter: bool = False
    files: Mapping[str, str] | None = None

    @property
    def passed(self) -> bool:
        """Return whether every gate passed."""
        return bool(self.gates) and all(verdict.passed for verdict in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Return the content of parity.json, and which files were written if any were."""
        head = {"format": REPORT_FORMAT, "format_version": FORMAT_VERSION, "passed": self.passed}
        parts = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if self.files is None:
            del parts["files"]
        return head | parts


def schema() -> dict[str, Any]:
    """Return the JSON schema of parity.json."""
    data = importlib.resources.files("cloq_export.parity").joinpath(_SCHEMA_FILE).read_bytes()
    return parse_json(data, _SCHEMA_FILE)


def write_report(folder: Path, report: ParityReport) -> ParityReport:
    """Write parity.json and parity.html into a folder, and return the report with their paths.

    Args:
        folder: it is made if need be; other files in it stay.
        report: the report, complete.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    paths = {"json": folder / JSON_NAME, "html": folder / HTML_NAME}
    content = report.to_json()
    page = render_html(content)
    make_folder(folder)
    with translate_os_errors(folder):
        # A kill between the two must not leave a new file beside an old one.
        for path in paths.values():
            path.unlink(missing_ok=True)
    write_json(paths["json"], content, sort_keys=False)
    write_bytes(paths["html"], page.encode("utf-8", "replace"))
    return dataclasses.replace(report, files={name: str(path) for name, path in paths.items()})


def missed_gates(report: ParityReport) -> str | None:
    """Return one line on every gate that a report misses, None if it passes."""
    missed = [verdict for verdict in report.gates if not verdict.passed]
    return "; ".join([*map(explain_miss, missed), *_reasons(report, missed)]) if missed else None


def _reasons(report: ParityReport, missed: list[Verdict]) -> Iterator[str]:
    """Yield what lies behind the gates that were missed."""
    if report.certificate.reason:
        yield report.certificate.reason
    yield from (f"{entry.what}: {entry.reason}" for entry in report.missing)
    for finding in (*report.provenance.findings, *report.float_part):
        if finding.verdict not in (PROVEN, NOT_RECORDED):
            yield f"{finding.what}: {finding.reason}"
    dead = [
        f"{each.module} of {row.adapter} is {each.verdict}"
        for row in report.liveness
        for each in row.modules
        if each.verdict not in (liveness.LIVE, liveness.ZERO)
    ]
    if dead:
        yield ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
    known = {verdict.gate for verdict in missed if verdict.value is not None}
    if "scale_error_max" in known and report.scales is not None:
        worst = report.scales.candidates[0]
        yield (
            f"the scale of {worst.module} is off by {worst.error:+.2%} ± {worst.standard_error:.2%} "
            f"with {', '.join(name or 'the base' for name in worst.adapters)}"
        )
    for prefix, kinds in (("decode_gap", ("greedy", "longest")), ("mixed_decode_gap", ("mixed",))):
        rows = [row for row in report.decoding if row.kind in kinds and row.worst is not None]
        if any(gate.startswith(prefix) for gate in known) and rows:
            row = max(rows, key=lambda each: each.gap_max or 0.0)
            assert row.worst is not None
            yield (
                f"{row.kind} text of {row.adapter or 'the base'} is worst at token {row.worst.position} "
                f"behind prompt {row.worst.prompt}"
            )
