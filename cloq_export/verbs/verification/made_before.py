"""What is known of an export from when it was made, for `verify` to hold against what is served."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloq_export.artifact.certificate import read_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.pair_record import pair_digest, record_pairs
from cloq_export.artifact.probe_record import ProbeRecord, TokenizerRecord
from cloq_export.artifact.provenance import (
    LARGEST_PRODUCT_ERROR,
    AdapterRecord,
    BaseRecord,
    adapter_record,
    read_base_record,
    seal_of,
)
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.errors import CloqError, FormatError
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.formats.peft import Adapter, read_adapter
from cloq_export.models.companions import is_legal
from cloq_export.models.source import LoadedModel
from cloq_export.parity.adapter_folder import judge_folder
from cloq_export.parity.gate import HALF_PROBE_LIMIT, float32_limit
from cloq_export.parity.provenance import (
    CONTRADICTED,
    NOT_PROVEN,
    NOT_RECORDED,
    PROVEN,
    Finding,
    RecordedRatio,
    ServedOn,
    judge_adapter,
    judge_codes,
    judge_tokenizer,
)
from cloq_export.parity.questions import TrainedOn
from cloq_export.parity.task_kinds import Questions, Task
from cloq_export.parity.tasks import PERPLEXITY
from cloq_export.verbs.recording import CODES_ALONE, run_record
from cloq_export.verbs.verification.options import VerifyOptions

if TYPE_CHECKING:
    from cloq_export.formats.onnx.reading import OnnxExport

# With fewer questions that are all lost the one-sided p-value does not fall below 0.01.
_FEWEST_RECORDED = 7
# Of the declared cost of an export's form: rounding both factors to bfloat16, 2u + u^2.
_LARGEST_DECLARED = 2 * 2.0**-8


@dataclasses.dataclass(frozen=True)
class MadeBefore:
    """The records that belong to what is verified, read before anything is measured.

    Args:
        checkpoint: the export.
        folders: name -> its folder.
        adapters: name -> adapter that is served.
        base: what the run recorded; None if nothing is known of it.
        records: name -> record of an adapter; those without one are absent.
        unread: why a record is missing or cannot be read: of the base, and of adapters.
        expected: whether the export says that it carries a record.
        run: the run directory that it is compared with, or None.
        serves_all: whether all adapters that lie there are served, and none was chosen.
        is_run: whether a run directory itself is verified.
    """

    checkpoint: Checkpoint | OnnxExport
    folders: Mapping[str, Path]
    adapters: Mapping[str, Adapter]
    base: BaseRecord | None
    records: Mapping[str, AdapterRecord]
    unread: tuple[Finding, ...]
    expected: bool
    run: RunDirectory | None
    serves_all: bool
    is_run: bool

    @classmethod
    def read(
        cls,
        export: Path,
        checkpoint: Checkpoint | OnnxExport,
        folders: Mapping[str, Path],
        adapters: Mapping[str, Adapter],
        *,
        run: Path | None,
        serves_all: bool,
    ) -> MadeBefore:
        """Read the records of an export and of its adapters.

        Args:
            export: what is verified: an export, a checkpoint folder, or a run directory.
            checkpoint: the same, opened.
            folders: name -> folder of an adapter.
            adapters: name -> adapter.
            run: the run that the export was made from, if it is at hand.
            serves_all: as in the class.

        Raises:
            RunDirectoryError: there is no run at `run`.
        """
        of_run = RunDirectory.open(run) if run is not None else None
        unread: list[Finding] = []
        own = RunDirectory.open(export) if RunDirectory.is_run(export) else None
        base = _attempt(
            unread, "codes", (lambda: run_record(own)) if own else (lambda: read_base_record(checkpoint.folder))
        )
        records = {}
        for name, adapter in adapters.items():
            source = str(folders[name])
            record = _attempt(unread, f"adapter {name}", functools.partial(adapter_record, adapter.extra, source))
            if record is not None:
                records[name] = record
        expected = bool(unread) or _promises_record(export)
        return cls(
            checkpoint, folders, adapters, base, records, tuple(unread), expected, of_run, serves_all, own is not None
        )

    @property
    def is_judged(self) -> bool:
        """Return whether there is, or should be, anything to compare with."""
        return self.expected or bool(self.records) or self.run is not None or bool(self.base)

    @property
    def _subjects(self) -> list[str | None]:
        """Return what is served: every adapter, or the codes alone if there is none."""
        return [*self.adapters] if self.adapters else [None]

    def limits(self, options: VerifyOptions, defaults: Mapping[str, float]) -> dict[str, float]:
        """Return the limits that hold by default in addition to those of the figures.

        Args:
            options: of the call.
            defaults: the other limits.
        """
        limits = {"float_part": 1.0}
        if self.is_judged:
            limits["provenance"] = 1.0
        if self.base is not None and not options.other_reference:
            limits["reference"] = 1.0
        probes = [probe for name in self._subjects if (probe := self.probe(name)) is not None]
        if probes:
            exact = options.dtype == "float32" and all(probe.precision == "float32" for probe in probes)
            exact = exact and "logprob_difference_max" in defaults
            bits = min(spec.bits for spec in self.checkpoint.specs.values())
            limits["last_step_difference_mean"] = float32_limit(bits) if exact else HALF_PROBE_LIMIT
        if self.recorded_ratios(options, None):
            limits["perplexity_over_recorded"] = 1.0
        return limits

    def probe(self, adapter: str | None) -> ProbeRecord | None:
        """Return what the model said with an adapter, or without, when it was made; None if nothing recorded it."""
        record = self.records.get(adapter) if adapter is not None else None
        if record is not None and record.probe is not None:
            return record.probe
        if self.base is None or (adapter is not None and record is None):
            return None
        return self.base.probes.get(CODES_ALONE if adapter is None else record.name)  # type: ignore[union-attr]

    def trained_on(self) -> dict[str, TrainedOn]:
        """Return what each adapter's training has seen, as far as it was recorded."""
        trained = {name: record.training for name, record in self.records.items() if record.training is not None}
        return {name: TrainedOn(training.questions) for name, training in trained.items() if training.questions}

    def recorded_ratios(self, options: VerifyOptions, text_sha256: str | None) -> list[RecordedRatio]:
        """Return what the run recorded of its perplexity under the conditions of this call; empty if under others.

        Args:
            options: of the call.
            text_sha256: of the text that is measured on; None does not compare it yet.
        """
        quality = self.base.quality if self.base is not None else None
        if quality is None or PERPLEXITY not in options.tasks or options.other_reference:
            return []
        now = (Path(options.text).name, options.window, options.windows, options.bos)
        if now != (quality.text, quality.window, quality.windows, quality.bos):
            return []
        same = text_sha256 in (None, quality.text_sha256)
        ratios = []
        for adapter in self._subjects:
            record = self.records.get(adapter) if adapter is not None else None
            name = CODES_ALONE if adapter is None else record.name if record and record.training is None else None
            if name is not None and name in quality.ratio:
                ratios.append(RecordedRatio(adapter, quality.ratio[name] if same else None))
        return ratios

    def recorded_answers(self, task: Task, questions: Questions) -> dict[str | None, dict[int, bool]]:
        """Return what is served -> number of a question -> whether it was answered right when the run recorded it.

        Args:
            task: the task.
            questions: that are put now.

        Returns:
            dict: without tasks that were never asked, or of which too few questions were asked to show a loss.
        """
        record = self.base.tasks.get(task.name) if self.base is not None else None
        if record is None or (record.shots, record.version) != (questions.shots, task.version):
            return {}
        answers = {}
        for adapter in self._subjects:
            made = self.records.get(adapter) if adapter is not None else None
            if adapter is not None and made is None:
                continue
            then = record.answers(CODES_ALONE if made is None else seal_of(made))
            keys = [key[: record.DIGITS] for key in questions.keys]
            common = {number: then[key] for number, key in enumerate(keys) if key in then}
            if len(common) >= _FEWEST_RECORDED:
                answers[adapter] = common
        return answers

    def findings(self, digests: Mapping[str, str] | None) -> list[Finding]:
        """Return what comes of comparing codes and adapters with their records.

        Args:
            digests: full module name -> `layer_digest` of what the export holds; None reads it.
        """
        findings = list(self.unread)
        if digests is None:
            digests = {module: layer_digest(layer) for module, layer in self.checkpoint.read_layers()}
        fingerprint = combine_digests(digests)
        if self.base is not None:
            findings.append(judge_codes(self.base, fingerprint, digests))
        elif not any(finding.what == "codes" for finding in findings):
            findings.append(
                Finding("codes", NOT_PROVEN, "the record that the certificate speaks of is missing")
                if self.expected
                else Finding("codes", NOT_RECORDED, "nothing recorded them when they were made")
            )
        findings += self._findings_of_names()
        for name, adapter in self.adapters.items():
            if name in self.records:
                findings.append(
                    judge_adapter(
                        name,
                        adapter.pairs,
                        self.records[name],
                        ServedOn(fingerprint, self.records, self.base),
                        declared_error=_declared_error(adapter),
                    )
                )
            elif not any(finding.what == f"adapter {name}" for finding in findings):
                findings.append(self._without_record(name))
        if self.run is not None:
            findings += self._findings_of_run(digests, fingerprint)
        return findings

    def findings_of_reference(self, loaded: LoadedModel, *, other: bool) -> list[Finding]:
        """Return what comes of comparing the float model with the one that the run was made from.

        Args:
            loaded: the float model.
            other: whether another one was allowed.
        """
        if self.base is None:
            return [Finding("reference", NOT_RECORDED, "nothing recorded which float model the codes were made from")]
        findings = [
            judge_tokenizer(
                self.base.tokenizer,
                TokenizerRecord.of(loaded.tokenizer),
                what="tokenizer of the reference",
                against="when the run was made",
            )
        ]
        made_from = self.base.source_fingerprint.partition("+")[0]
        if loaded.source.fingerprint == made_from:
            return [Finding("reference", PROVEN), *findings]
        reason = f"{loaded.source.name} is not the revision of {self.base.model} that the run was made from"
        added = loaded.source.added_files(made_from)
        if added and all(map(is_legal, added)):
            # A licence text beside the model changes nothing that it computes.
            return [Finding("reference", PROVEN), *findings]
        if added:
            reason += f": {loaded.source.folder} holds {' and '.join(added)}, which was not there then"
        if other:
            # It was asked for; what differs is judged by its tensors and its tokenizer.
            return [Finding("reference", NOT_PROVEN, reason)]
        return [
            Finding("reference", CONTRADICTED, f"{reason}; give that one, or take this one with `other_reference`"),
            *findings,
        ]

    def _findings_of_names(self) -> list[Finding]:
        """Return which adapters are gone, stand under another name, or would be read otherwise by others."""
        findings = []
        gone = sorted(set(self.base.adapters) - set(self.adapters)) if self.base is not None and self.serves_all else []
        for name in gone:
            reason = "the export was written with it, and it is not there"
            findings.append(Finding(f"adapter {name}", CONTRADICTED, reason))
        for name, adapter in self.adapters.items():
            record, what = self.records.get(name), f"adapter {name}"
            if record is not None and self.is_run and self.serves_all and record.name != name:
                findings.append(Finding(what, CONTRADICTED, f"its folder holds the adapter {record.name}"))
            if record is not None:
                findings += judge_folder(name, self.folders[name], adapter, self.checkpoint.folder)
        return findings

    def _without_record(self, name: str) -> Finding:
        what = f"adapter {name}"
        if self.base is not None and self.base.adapters.get(name) is not None:
            return Finding(what, CONTRADICTED, "its folder holds no record, and the export was written with one")
        if self.base is not None and name not in self.base.adapters:
            return Finding(what, NOT_PROVEN, "it carries no record of how it was made")
        return Finding(what, NOT_RECORDED, "nothing recorded it when it was made")

    def _findings_of_run(self, digests: Mapping[str, str], fingerprint: str) -> list[Finding]:
        """Compare with the artefacts of the run themselves."""
        run = self.run
        assert run is not None
        findings = [
            Finding("codes beside the run", PROVEN)
            if run.digests() == dict(digests)
            else Finding(
                "codes beside the run",
                CONTRADICTED,
                f"{run.path} holds other layers; the export is of another run, or stale",
            )
        ]
        for name, adapter in self.adapters.items():
            what = f"adapter {name} beside the run"
            if name not in run.adapters.folders:
                findings.append(Finding(what, NOT_PROVEN, f"{run.path} has no adapter of this name"))
                continue
            held = read_adapter(run.adapter_path(name))
            pairs = {module: pair_digest(pair) for module, pair in held.pairs.items()}
            if pairs == {module: pair_digest(pair) for module, pair in adapter.pairs.items()}:
                findings.append(Finding(what, PROVEN))
                continue
            record = AdapterRecord(name, fingerprint, record_pairs(held.pairs))
            judged = judge_adapter(
                name,
                adapter.pairs,
                record,
                ServedOn(fingerprint),
                declared_error=_declared_error(adapter),
            )
            reason = judged.reason and f"{judged.reason}; the export is stale, or of another run than {run.path}"
            findings.append(Finding(what, judged.verdict, reason))
        return findings


def _attempt(unread: list[Finding], what: str, read: Callable[[], Any]) -> Any:
    """Return a record; note why, where it cannot be read."""
    try:
        return read()
    except FormatError as error:
        unread.append(Finding(what, NOT_PROVEN, str(error)))
        return None


def _promises_record(export: Path) -> bool:
    """Return whether the certificate of an export says that it carries a record."""
    try:
        return bool(read_certificate(export).facts.get("provenance"))
    except CloqError:
        return False


def _declared_error(adapter: Adapter) -> float:
    value = adapter.extra.get(LARGEST_PRODUCT_ERROR, 0.0)
    changed = adapter.extra.get("split") or adapter.extra.get("uniform")
    # No form that an export writes costs more than rounding both factors to bfloat16 does.
    return float(value) if changed and isinstance(value, (int, float)) and 0 <= value <= _LARGEST_DECLARED else 0.0
