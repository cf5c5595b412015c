"""Whether every module of every adapter reaches the engine's answers, shown enlarged where rounding hides it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.reference import reference_model
from cloq_export.formats.peft import write_adapter
from cloq_export.parity import liveness
from cloq_export.parity.liveness import AdapterLiveness, Presence
from cloq_export.parity.report import Missing
from cloq_export.verbs.verification.engines import served as serve
from cloq_export.verbs.verification.float_side import FloatSide
from cloq_export.verbs.verification.plan import Plan
from cloq_export.verbs.verification.progress import Progress
from cloq_export.verbs.verification.reference_side import ReferenceSide, leave_out


def find_presences(
    plan: Plan, known: FloatSide, side: ReferenceSide, served: ServedModel, progress: Progress
) -> dict[str, list[Presence]]:
    """Return adapter -> what an engine's answers to the probes say of its modules.

    Args:
        plan: what was asked.
        known: of the float model.
        side: of the reference.
        served: the engine.
        progress: of the call.
    """
    presences: dict[str, list[Presence]] = {}
    for adapter, left in side.left_out.items():
        presences[adapter] = []
        with progress.attempt(f"liveness, {adapter}"):
            zero = liveness.zero_products(plan.adapters[adapter].pairs)
            presences[adapter] = liveness.served_presence(
                served, known.texts.probes, adapter, left.probed, left.without, zero=zero
            )
    return presences


def settle_presences(
    plan: Plan, known: FloatSide, found: Mapping[str, Sequence[Presence]], progress: Progress
) -> tuple[AdapterLiveness, ...]:
    """Show modules whose effect is lost in rounding once more, enlarged, and return what was found of all.

    Args:
        plan: what was asked.
        known: of the float model.
        found: as `find_presences` gives it.
        progress: of the call.
    """
    unsettled = {
        name: undecided
        for name, presences in found.items()
        if (undecided := [each for each in presences if each.verdict == liveness.UNDECIDED])
    }
    again: dict[str, list[Presence]] = {}
    if unsettled:
        with progress.attempt("liveness of modules with little effect"):
            again = _probe_enlarged(plan, known, unsettled, progress)
    probes = known.texts.probes
    rows = []
    for name, presences in found.items():
        settled = liveness.merged_findings(presences, again.get(name, []))
        share = liveness.live_share(settled)
        if settled and share is None:
            reason = "the products of all its modules are zero, so there is nothing of it to see"
            progress.missing.append(Missing(f"liveness, {name}", reason))
        tokens = sum(len(ids) - 1 for ids in probes)
        rows.append(AdapterLiveness(name, len(probes), tokens, share, tuple(settled)))
    return tuple(rows)


def _probe_enlarged(
    plan: Plan, known: FloatSide, unsettled: Mapping[str, Sequence[Presence]], progress: Progress
) -> dict[str, list[Presence]]:
    count = sum(map(len, unsettled.values()))
    progress.session.say(f"the effect of {count} modules is lost in rounding; probe them enlarged")
    probes = known.texts.probes
    with tempfile.TemporaryDirectory(prefix="cloq-verify-") as place:
        folders, gains = {}, {}
        for name, undecided in unsettled.items():
            pairs, gains[name] = liveness.enlarged_pairs(plan.adapters[name].pairs, undecided)
            folders[name] = Path(place) / name
            base = str(plan.adapters[name].config.get("base_model_name_or_path") or "")
            write_adapter(folders[name], pairs, base_model=base, base_fingerprint=plan.checkpoint.fingerprint)
        reference = reference_model(known.base, folders, device=plan.options.device)
        presences = {}
        with progress.phase("start"), serve(plan, folders) as served, progress.phase("liveness"):
            for name in folders:
                left = leave_out(reference, probes, name, list(gains[name]))
                presences[name] = liveness.served_presence(
                    served, probes, name, left.probed, left.without, gains=gains[name]
                )
        return presences
