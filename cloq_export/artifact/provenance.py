"""Provenance: a record of what a run and a training made, written when it is made, to compare served models with.

A run writes a `BaseRecord` (RUN/reports/provenance.json), which every export carries as cloq_provenance.json. Every
adapter carries an `AdapterRecord` in the side file of its own folder, wherever that folder is copied to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from cloq_export.artifact.pair_record import PairRecord
from cloq_export.artifact.probe_record import ProbeRecord, TokenizerRecord, printable
from cloq_export.errors import FormatError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside

PROVENANCE_NAME = "cloq_provenance.json"
PROVENANCE_FORMAT = "cloq-provenance"
FORMAT_VERSION = 1
# Key of the record in the side file of an adapter.
ADAPTER_KEY = "provenance"
# Key beside it: largest relative Frobenius error of a module's product that the export's form of the pairs caused.
LARGEST_PRODUCT_ERROR = "largest_product_error"


@dataclasses.dataclass(frozen=True)
class TrainingRecord:
    """What a training says of itself.

    Args:
        steps: how many were made.
        kept_step: the step whose adapter was kept.
        kept_loss: held-out loss of that step in nats per token, or None.
        last_loss: loss of the last step in nats per token, or None.
        learning_rate: of the recipe.
        seed: of the recipe.
        data_sha256: of the examples.
        start: `pairs_digest` of the adapter that it began with.
        questions: hashes of the prompts that were learned from (`parity.questions.TrainedOn`); empty for plain text.
    """

    steps: int
    kept_step: int
    kept_loss: float | None
    last_loss: float | None
    learning_rate: float
    seed: int
    data_sha256: str
    start: str
    questions: str = ""


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
    """What an adapter was when it was made.

    Args:
        name: that it was made under.
        base_fingerprint: of the codes that it was made for.
        pairs: full module name -> its record.
        probe: what the model said with it at the last step; None where nothing was trained.
        training: None where nothing was trained.
    """

    name: str
    base_fingerprint: str
    pairs: Mapping[str, PairRecord]
    probe: ProbeRecord | None = None
    training: TrainingRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record, sealed."""
        return _sealed(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: Any, source: str) -> AdapterRecord:
        """Return the record that a side file holds.

        Args:
            content: the JSON value.
            source: the file, for messages.

        Raises:
            FormatError: it is of another version, was edited, or is damaged.
        """
        with _unsealed(content, source) as plain:
            return cls(
                name=printable(plain["name"]),
                base_fingerprint=printable(plain["base_fingerprint"]),
                pairs={module: PairRecord.from_json(entry) for module, entry in plain["pairs"].items()},
                probe=None if plain["probe"] is None else ProbeRecord.from_json(plain["probe"]),
                training=None if plain["training"] is None else _read_training(plain["training"]),
            )


@dataclasses.dataclass(frozen=True)
class QualityRecord:
    """Perplexities that a run measured of what it had written.

    Args:
        text: name of the text, of a path the last part.
        text_sha256: of the text.
        window: tokens in a window.
        windows: how many were asked for.
        bos: how windows began, as the recipe says it.
        ratio: name of an adapter, or "" for the codes alone -> perplexity over that of the float model.
    """

    text: str
    text_sha256: str
    window: int
    windows: int
    bos: str
    ratio: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class AnswerRecord:
    """Which questions of a task a run answered right when they were put to it.

    Args:
        shots: worked examples before each.
        version: of the task's definition.
        questions: the first digits of each question's hash, joined.
        right: seal of an adapter's record, or "" for the codes alone -> "1" or "0" for each question.
    """

    # Among ten million different questions, two agree by chance with a probability of one in six.
    DIGITS: ClassVar[int] = 12

    shots: int
    version: str
    questions: str
    right: Mapping[str, str]

    def answers(self, seal: str) -> dict[str, bool]:
        """Return the first digits of each question's hash -> whether it was answered right; empty if nobody asked."""
        step = self.DIGITS
        keys = [self.questions[start : start + step] for start in range(0, len(self.questions), step)]
        return {key: flag == "1" for key, flag in zip(keys, self.right.get(seal, ""), strict=False)}


@dataclasses.dataclass(frozen=True)
class BaseRecord:
    """What a run made: of which model, which codes, and what they said.

    Args:
        model: public name of the float model.
        source_fingerprint: of its files.
        base_fingerprint: of the codes.
        layers: full module name -> `layer_digest`.
        tokenizer: what the float model's tokenizer makes of the probes.
        probes: name of an adapter, or "" for the codes alone -> log-probabilities.
        quality: what was measured; None if nothing was.
        tasks: task -> what was answered; empty if nobody asked.
        adapters: of an export, name of an adapter in it -> seal of its record; None marks one without a record.
    """

    model: str
    source_fingerprint: str
    base_fingerprint: str
    layers: Mapping[str, str]
    tokenizer: TokenizerRecord
    probes: Mapping[str, ProbeRecord]
    quality: QualityRecord | None = None
    adapters: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, AnswerRecord] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the record, sealed."""
        content = dataclasses.asdict(self)
        if not self.tasks:
            del content["tasks"]
        return _sealed(content)

    @classmethod
    def from_json(cls, content: Any, source: str) -> BaseRecord:
        """Return the record that a file holds.

        Args:
            content: the JSON value.
            source: the file, for messages.

        Raises:
            FormatError: it is of another version, was edited, or is damaged.
        """
        with _unsealed(content, source) as plain:
            quality = plain["quality"]
            return cls(
                model=printable(plain["model"]),
                source_fingerprint=printable(plain["source_fingerprint"]),
                base_fingerprint=printable(plain["base_fingerprint"]),
                layers={module: printable(digest) for module, digest in plain["layers"].items()},
                tokenizer=TokenizerRecord.from_json(plain["tokenizer"]),
                probes={name: ProbeRecord.from_json(probe) for name, probe in plain["probes"].items()},
                quality=None if quality is None else _read_quality(quality),
                adapters=dict(plain["adapters"]),
                tasks={name: _read_answers(entry) for name, entry in plain.get("tasks", {}).items()},
            )


def write_base_record(folder: Path, record: BaseRecord) -> None:
    """Write the record of an export into its folder."""
    write_json(folder / PROVENANCE_NAME, record.to_json())


def read_base_record(folder: Path) -> BaseRecord | None:
    """Return the record that an export carries, None if it carries none.

    Raises:
        FormatError: it is of another version, was edited, or is damaged.
    """
    path = folder / PROVENANCE_NAME
    if not path.exists():
        return None
    return BaseRecord.from_json(read_json(require_inside(folder, path)), str(path))


def adapter_record(extra: Mapping[str, Any], source: str) -> AdapterRecord | None:
    """Return the record in what an adapter's writer noted, None if there is none.

    Args:
        extra: as `Adapter.extra` has it.
        source: the adapter's folder, for messages.

    Raises:
        FormatError: it is of another version, was edited, or is damaged.
    """
    return AdapterRecord.from_json(extra[ADAPTER_KEY], source) if ADAPTER_KEY in extra else None


def seal_of(record: AdapterRecord) -> str:
    """Return the hash that identifies a record."""
    return str(record.to_json()["seal"])


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps({"format": PROVENANCE_FORMAT, "format_version": FORMAT_VERSION, **content}))
    return {**plain, "seal": _seal(plain)}


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


@contextlib.contextmanager
def _unsealed(content: Any, source: str) -> Iterator[dict[str, Any]]:
    """Give the entries of a record; what a malformed one leads to becomes one line."""
    if not isinstance(content, Mapping) or content.get("format") != PROVENANCE_FORMAT:
        raise FormatError(f"{source}: this is no record of provenance; export or train again.")
    if content.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{source}: the record of provenance is of version {content.get('format_version')!r:.80}; this program "
            f"reads version {FORMAT_VERSION}. Update cloq_export."
        )
    plain = {key: value for key, value in content.items() if key != "seal"}
    try:
        seal = _seal(plain)
    except (TypeError, ValueError):
        seal = ""
    if content.get("seal") != seal:
        raise FormatError(f"{source}: the record of provenance was edited after it was written; export or train again.")
    try:
        yield plain
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"{source}: the record of provenance is damaged; export or train again.") from None


def _read_training(entry: Mapping[str, Any]) -> TrainingRecord:
    read = TrainingRecord(**entry)
    losses = [value for value in (read.kept_loss, read.last_loss) if value is not None]
    numbers = (read.steps, read.kept_step, read.learning_rate, read.seed, *losses)
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise ValueError
    for text in (read.data_sha256, read.start, read.questions):
        printable(text)
    return read


def _read_quality(entry: Mapping[str, Any]) -> QualityRecord:
    read = QualityRecord(**entry)
    if not all(isinstance(value, (int, float)) and value > 0 for value in read.ratio.values()):
        raise ValueError
    return read


def _read_answers(entry: Mapping[str, Any]) -> AnswerRecord:
    read = AnswerRecord(
        int(entry["shots"]), printable(entry["version"]), printable(entry["questions"]), dict(entry["right"])
    )
    count, rest = divmod(len(read.questions), AnswerRecord.DIGITS)
    if rest or any(len(flags) != count or set(flags) - {"0", "1"} for flags in read.right.values()):
        raise ValueError
    return read
