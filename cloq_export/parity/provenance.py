"""Whether an export holds what a run and a training recorded when they made it, and which fault it is if not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from cloq_export.artifact.pair_record import PairRecord, pair_digest, pairs_digest, record_pairs
from cloq_export.artifact.probe_record import ProbeRecord, TokenizerRecord
from cloq_export.artifact.provenance import AdapterRecord, BaseRecord, seal_of
from cloq_export.parity.plain import Result
from cloq_export.types import LoraPair

PROVEN = "proven"
NOT_PROVEN = "not proven"
# No record was written, and nothing says that there is one: an older version, or another tool.
NOT_RECORDED = "not recorded"
CONTRADICTED = "contradicted"

# What float32 loses when a product is written in another form.
_SAME_PRODUCT = 1e-6
# A sketch exceeds the norm of a difference by a factor that stays below this.
_SKETCH_FACTOR = 4.0
# Above it the numbers are others; below it they were rounded.
_ROUNDED = 2e-2
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Finding(Result):
    """One thing that was looked for.

    Args:
        what: e.g. "codes", "adapter mine", "tokenizer".
        verdict: PROVEN, NOT_PROVEN, NOT_RECORDED or CONTRADICTED.
        reason: what was seen, for people; empty if proven.
    """

    what: str
    verdict: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class ProbeDifferences(Result):
    """How far log-probabilities are from those that were recorded when the model was made.

    Args:
        adapter: with which they were served.
        precision: in which they were recorded.
        tokens: how many.
        max: the largest difference; None if one is NaN or Inf.
        mean: of the differences.
    """

    adapter: str | None
    precision: str
    tokens: int
    max: float | None
    mean: float | None


@dataclasses.dataclass(frozen=True)
class RecordedRatio(Result):
    """A perplexity over the float model's that the run recorded; None where the text is another one by now."""

    adapter: str | None
    ratio: float | None


def join_some(entries: Sequence[str], between: str = ", ") -> str:
    """Return the first few of many entries, and how many more there are."""
    more = len(entries) - _SHOWN
    comma = "," if between == "; " else ""
    return between.join(entries[:_SHOWN]) + (f"{comma} and {more} more" if more > 0 else "")


def judge_codes(record: BaseRecord, fingerprint: str, digests: Mapping[str, str]) -> Finding:
    """Compare codes, scales and zeros with those that the run made.

    Args:
        record: of the run.
        fingerprint: of the export's base, computed from its tensors.
        digests: full module name -> `layer_digest` of what the export holds.
    """
    if fingerprint == record.base_fingerprint and dict(digests) == dict(record.layers):
        return Finding("codes", PROVEN)
    differing = sorted(
        module for module in {*digests, *record.layers} if digests.get(module) != record.layers.get(module)
    )
    return Finding(
        "codes",
        CONTRADICTED,
        f"{join_some(differing)} hold other codes, scales or zeros than the run made (base {record.base_fingerprint})"
        if differing
        else f"the record speaks of the base {record.base_fingerprint}",
    )


def judge_tokenizer(record: TokenizerRecord, found: TokenizerRecord, *, what: str, against: str) -> Finding:
    """Compare what two tokenizers make of the same texts.

    Args:
        record: of the one that counts.
        found: of the one in question.
        what: e.g. "tokenizer".
        against: what the record is of, for the message.
    """
    for number, (wanted, got) in enumerate(zip(record.texts, found.texts, strict=True)):
        if wanted != got:
            return Finding(what, CONTRADICTED, f"probe text {number + 1} becomes other token ids than {against}")
    if record.special != found.special:
        differing = sorted(
            name for name in {*record.special, *found.special} if record.special.get(name) != found.special.get(name)
        )
        return Finding(what, CONTRADICTED, f"{join_some(differing)} is another token than {against}")
    if record.chat != found.chat:
        return Finding(what, CONTRADICTED, f"the chat template makes another prompt than {against}")
    return Finding(what, PROVEN)


@dataclasses.dataclass(frozen=True)
class ServedOn:
    """What an adapter is served on, and what is served with it.

    Args:
        base_fingerprint: of the codes.
        others: name -> record of the other adapters that are known.
        base: record of the export, which names the adapters that it was written with.
    """

    base_fingerprint: str
    others: Mapping[str, AdapterRecord] = dataclasses.field(default_factory=dict)
    base: BaseRecord | None = None


def judge_adapter(
    name: str,
    pairs: Mapping[str, LoraPair],
    record: AdapterRecord,
    served: ServedOn,
    *,
    declared_error: float = 0.0,
) -> Finding:
    """Compare the pairs of an adapter with those that were made.

    Args:
        name: that it is served under.
        pairs: full module name -> pair, as the folder holds it.
        record: what its folder records of it.
        served: what it is served on, and what is served with it.
        declared_error: relative Frobenius error of a product that the export says writing it cost.
    """
    what = f"adapter {name}"
    seal, base, others = seal_of(record), served.base, served.others
    if base is not None and base.adapters.get(name) not in (None, seal):
        meant = next((other for other, known in base.adapters.items() if known == seal), None)
        return Finding(
            what,
            CONTRADICTED,
            f"its folder holds the adapter that the export has as {meant}: the two were exchanged"
            if meant
            else f"the export was written with another adapter under this name than the {record.name} in its folder",
        )
    if record.name != name and record.name in others and seal_of(others[record.name]) != seal:
        return Finding(what, CONTRADICTED, f"its folder holds the adapter {record.name}, and {record.name} is another")
    if record.base_fingerprint != served.base_fingerprint:
        reason = f"it was made for the base {record.base_fingerprint}, and {served.base_fingerprint} is served"
        return Finding(what, CONTRADICTED, reason)
    served_records = record_pairs(pairs)
    if {module: pair.sha256 for module, pair in served_records.items()} == _digests(record):
        return Finding(what, PROVEN)
    missing, added = sorted(set(record.pairs) - set(served_records)), sorted(set(served_records) - set(record.pairs))
    if missing or added:
        verb = "lacks" if missing else "adds"
        return Finding(what, CONTRADICTED, f"it {verb} the pairs of {join_some(missing or added)}")
    digest = pairs_digest({module: pair.sha256 for module, pair in served_records.items()})
    if record.training is not None and digest == record.training.start:
        return Finding(what, CONTRADICTED, "its pairs are those that the training started from, not what it ended with")
    for other, known in others.items():
        if other != name and digest == pairs_digest(_digests(known)):
            return Finding(what, CONTRADICTED, f"its pairs are those of {other}")
    allowed = _SAME_PRODUCT + _SKETCH_FACTOR * declared_error
    wrong = {
        module: fault
        for module, pair in pairs.items()
        if (fault := _fault_of(pair, served_records[module], record.pairs[module], allowed))
    }
    if not wrong:
        return Finding(what, PROVEN)
    first = next(iter(wrong))
    more = f", and {len(wrong) - 1} more modules differ" if len(wrong) > 1 else ""
    return Finding(what, CONTRADICTED, f"{first} {wrong[first]}{more}")


def _fault_of(pair: LoraPair, found: PairRecord, record: PairRecord, allowed: float) -> str | None:
    """Return what is wrong with a pair, as the end of a sentence that its module begins; None if nothing is."""
    if found.sha256 == record.sha256:
        return None
    deviation = record.deviation(found)
    if deviation <= allowed:
        return None
    if pair_digest(LoraPair(pair.lora_B.T.contiguous(), pair.lora_A.T.contiguous(), pair.alpha)) == record.sha256:
        return "has A and B exchanged"
    factor = record.ratio(found)
    if factor is not None and abs(factor - 1) > 1e-4:
        return f"has {factor:.4g} times the product that was made (scaling {found.scaling:g}, then {record.scaling:g})"
    if found.norm == 0:
        return "has a product of zero"
    if deviation < _ROUNDED:
        kept = str(pair.lora_A.dtype).removeprefix("torch.")
        return f"was rounded after it was made (relative difference {deviation:.1e}, now {kept})"
    return f"has other numbers (relative difference {deviation:.1e})"


def probe_differences(adapter: str | None, recorded: ProbeRecord, measured: Sequence[torch.Tensor]) -> ProbeDifferences:
    """Return how far log-probabilities are from those that were recorded when the model was made.

    Args:
        adapter: with which they were served.
        recorded: what was said then.
        measured: (n - 1,) for each of its sequences.
    """
    wanted = torch.tensor([value for values in recorded.logprobs for value in values], dtype=torch.float64)
    got = torch.cat([values.double() for values in measured]) if measured else torch.empty(0, dtype=torch.float64)
    differences = (got - wanted).abs()
    known = bool(differences.numel()) and bool(torch.isfinite(differences).all())
    largest, mean = (float(differences.max()), float(differences.mean())) if known else (None, None)
    return ProbeDifferences(adapter, recorded.precision, differences.numel(), largest, mean)


def _digests(record: AdapterRecord) -> dict[str, str]:
    return {module: pair.sha256 for module, pair in record.pairs.items()}
