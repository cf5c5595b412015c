"""`verify`: one export through the float model, the reference, our runtime and an engine, and a verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from cloq_export.compress.session import Session
from cloq_export.files.atomic import make_folder
from cloq_export.parity.report import Judged, ParityReport, Provenance, Quality, write_report
from cloq_export.texts.corpora import evaluation_text
from cloq_export.verbs.verification import judging
from cloq_export.verbs.verification.engines import check_engine, served
from cloq_export.verbs.verification.float_side import measure_float
from cloq_export.verbs.verification.live_modules import find_presences, settle_presences
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verification.plan import Plan
from cloq_export.verbs.verification.progress import Progress
from cloq_export.verbs.verification.reference_side import measure_packed, measure_reference, perplexity_rows
from cloq_export.verbs.verification.served_side import ServedSide


def verify(export: Path, options: VerifyOptions, *, console: Console | None = None) -> ParityReport:
    """Measure whether what is served equals what was trained, and judge it by the gate.

    Args:
        export: an export or a checkpoint folder.
        options: what to measure and how.
        console: where progress goes; None is standard error.

    Returns:
        ParityReport: `passed` is the verdict, and `files` names what was written.

    Raises:
        UsageError: options that make no sense.
        GateMissedError: the text is shorter than one window, so that nothing can be judged.
        CloqError: the model, an adapter or the engine cannot be loaded, so that nothing can be measured.
    """
    plan = Plan.make(Path(export), options)
    check_engine(plan)
    if options.out is not None:
        make_folder(options.out)
    progress = Progress(Session(console or Console(stderr=True)))
    with tempfile.TemporaryDirectory(prefix="cloq-verify-") as place:
        report = judging.judged(plan, _measure(plan, Path(place), progress))
    return report if options.out is None else write_report(options.out, report)


def planned_gates(export: Path, options: VerifyOptions) -> Mapping[str, float]:
    """Return the limits that `verify` would judge by, from headers, records and questions alone.

    Args:
        export: as in `verify`.
        options: as in `verify`.

    Raises:
        CloqError: as `verify`, for what is wrong with options, gate file, export, adapters or questions.
    """
    return Plan.make(Path(export), options).limits


def _measure(plan: Plan, place: Path, progress: Progress) -> ParityReport:
    """Measure phase by phase, with one dense model in memory at a time beside the engine."""
    options, session = plan.options, progress.session
    with progress.phase("certificate"):
        certificate, digests = judging.check_certificate(plan)
    with progress.phase("provenance"):
        findings = plan.made.findings(digests)
    text = evaluation_text(options.text)
    with progress.phase("float"):
        known = measure_float(plan, text.text, place, progress)
    with progress.phase("reference"):
        side = measure_reference(plan, known, progress)
    packed_numerics, packed_divergence, packed_perplexity = measure_packed(plan, known, side, progress)
    session.say(f"serve with {options.runtime} in {options.dtype}")
    engine = ServedSide(plan, known, side, progress)
    with progress.phase("start"), served(plan, plan.folders) as model, progress.phase("served"):
        engine.measure(model)
        with progress.phase("liveness"):
            presences = find_presences(plan, known, side, model, progress)
    with progress.phase("liveness"):
        live = settle_presences(plan, known, presences, progress)
    engine.measure_scales()
    proven = (*findings, *known.findings)
    perplexity = perplexity_rows(plan, known, "float", None, known.logprobs)
    return ParityReport(
        judged=Judged(False, ()),
        export=str(plan.export),
        layout=plan.checkpoint.layout_name,
        bits=tuple(sorted({spec.bits for spec in plan.checkpoint.specs.values()})),
        base_fingerprint=plan.checkpoint.fingerprint,
        reference=known.source,
        runtime=options.runtime,
        dtype=options.dtype,
        adapters=judging.describe_adapters(plan),
        conditions=judging.conditions(plan, known, text),
        certificate=certificate,
        provenance=Provenance(proven, tuple(engine.probes), tuple(plan.made.recorded_ratios(options, text.sha256))),
        float_part=known.float_part,
        noise_floor=known.noise_floor,
        numerics=(*known.numerics, *side.numerics, *packed_numerics, *engine.numerics),
        divergence=(*side.divergence, *packed_divergence, *engine.divergence),
        quality=Quality(
            (*perplexity, *side.perplexity, *packed_perplexity, *engine.perplexity),
            judging.verified_tasks(plan, known, side, engine),
        ),
        greedy=tuple(engine.greedy),
        decoding=tuple(engine.decoding),
        scales=engine.scales,
        liveness=live,
        isolation=engine.isolation,
        layers=judging.layer_errors(plan),
        metrics={},
        gates=(),
        missing=tuple(progress.missing),
        notes=(*session.notes, *judging.notes_of(plan, (*proven, *known.float_part))),
        seconds=dict(session.seconds),
        versions={},
        needs_adapter=plan.checkpoint.needs_adapter,
    )
