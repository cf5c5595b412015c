"""Provenance: what a run and a training made, written down where it was made, so that it can be found again as served.

A run writes a `BaseRecord` (RUN/reports/provenance.json), which every export carries as cloq_provenance.json. Every
adapter carries an `AdapterRecord` in the side file of its own folder, wherever that folder is copied to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from cloq_export.artifact.pair_record import PairRecord
from cloq_export.errors import FormatError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside

PROVENANCE_NAME = "cloq_provenance.json"
PROVENANCE_FORMAT = "cloq-provenance"
FORMAT_VERSION = 1
# Key of the record in the side file of an adapter.
ADAPTER_KEY = "provenance"
# Beside it: relative Frobenius error of the product that an export's form of the pairs cost, the largest of a module.
LARGEST_PRODUCT_ERROR = "largest_product_error"

# Letters of several scripts, digits, blanks, line ends, code: what tokenizers differ in.
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asked why it did so twice before breakfast.",
    "  def area(radius: float) -> float:\n\treturn 3.14159 * radius ** 2  # square metres\n\n",
    "Größe, naïveté, Ελλάδα, Москва, 東京, 🙂 e\u0301; 1234567890 + 0.5e-3 = ?",
    "Question: Ann has 12 apples and gives 5 of them to Bob. How many apples does she keep?\nAnswer: 7",
)
PROBE_CHAT = (
    {"role": "user", "content": "Name three colours."},
    {"role": "assistant", "content": "Red, green and blue."},
    {"role": "user", "content": "And a fourth?"},
)
# Tokens of each probe text on which log-probabilities are kept: a handful that one forward pass gives.
_PROBE_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class ProbeRecord:
    """Log-probabilities on fixed token ids.

    Args:
        precision: of the activations: "float32", "bfloat16" or "float16".
        token_ids: sequences of two or more tokens.
        logprobs: log p(x_i | x_1..x_{i-1}) of each, i = 2..n.
    """

    precision: str
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """What a tokenizer and its chat template make of fixed texts.

    Args:
        texts: token ids of each of `PROBE_TEXTS`, special tokens as the tokenizer adds them by itself.
        chat: token ids of `PROBE_CHAT`; None without a template, or where it refuses the chat.
        special: name of a special token -> its id.
    """

    texts: tuple[tuple[int, ...], ...]
    chat: tuple[int, ...] | None
    special: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerRecord:
        """Return the record of a transformers tokenizer."""
        texts = tuple(tuple(tokenizer(text, verbose=False)["input_ids"]) for text in PROBE_TEXTS)
        chat: tuple[int, ...] | None = None
        if getattr(tokenizer, "chat_template", None):
            try:
                rendered = tokenizer.apply_chat_template(list(PROBE_CHAT), tokenize=False, add_generation_prompt=True)
                chat = tuple(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
            except Exception:  # a template raises whatever its author wrote
                chat = None
        special = {
            name: tokenizer.convert_tokens_to_ids(token)
            for name, token in sorted(tokenizer.special_tokens_map.items())
            if isinstance(token, str)
        }
        return cls(texts, chat, special)

    def probes(self) -> list[list[int]]:
        """Return the token ids on which models are probed."""
        return [list(ids[:_PROBE_TOKENS]) for ids in self.texts if len(ids) >= 2]


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
        found = _unsealed(content, source)
        with _damaged(source):
            return cls(
                name=_text(found["name"]),
                base_fingerprint=_text(found["base_fingerprint"]),
                pairs={module: PairRecord.from_json(entry) for module, entry in found["pairs"].items()},
                probe=None if found["probe"] is None else _read_probe(found["probe"]),
                training=None if found["training"] is None else _read_training(found["training"]),
            )


@dataclasses.dataclass(frozen=True)
class Quality:
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

    # Of two different questions among ten million one pair in a few would agree by chance.
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
    quality: Quality | None = None
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
        found = _unsealed(content, source)
        with _damaged(source):
            tokenizer, quality = found["tokenizer"], found["quality"]
            if len(tokenizer["texts"]) != len(PROBE_TEXTS):
                raise ValueError
            return cls(
                model=_text(found["model"]),
                source_fingerprint=_text(found["source_fingerprint"]),
                base_fingerprint=_text(found["base_fingerprint"]),
                layers={module: _text(digest) for module, digest in found["layers"].items()},
                tokenizer=TokenizerRecord(
                    tuple(map(tuple, tokenizer["texts"])),
                    None if tokenizer["chat"] is None else tuple(tokenizer["chat"]),
                    dict(tokenizer["special"]),
                ),
                probes={name: _read_probe(probe) for name, probe in found["probes"].items()},
                quality=None if quality is None else _read_quality(quality),
                adapters=dict(found["adapters"]),
                tasks={name: _read_answers(entry) for name, entry in found.get("tasks", {}).items()},
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


def probe_record(
    precision: torch.dtype, token_ids: Sequence[Sequence[int]], logprobs: Sequence[torch.Tensor]
) -> ProbeRecord:
    """Return the record of measured log-probabilities.

    Args:
        precision: of the activations.
        token_ids: the sequences.
        logprobs: (n - 1,) for each.
    """
    return ProbeRecord(
        str(precision).removeprefix("torch."),
        tuple(map(tuple, token_ids)),
        tuple(tuple(float(value) for value in values) for values in logprobs),
    )


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps({"format": PROVENANCE_FORMAT, "format_version": FORMAT_VERSION, **content}))
    return {**plain, "seal": _seal(plain)}


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _unsealed(content: Any, source: str) -> dict[str, Any]:
    if not isinstance(content, Mapping) or content.get("format") != PROVENANCE_FORMAT:
        raise FormatError(f"{source}: the record of provenance is none; export or train again.")
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
    return plain


@contextlib.contextmanager
def _damaged(source: str) -> Iterator[None]:
    """Turn what a malformed record leads to into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"{source}: the record of provenance is damaged; export or train again.") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError
    return value


def _read_probe(entry: Mapping[str, Any]) -> ProbeRecord:
    lengths = [(len(ids), len(values)) for ids, values in zip(entry["token_ids"], entry["logprobs"], strict=True)]
    if not lengths or any(ids < 2 or values != ids - 1 for ids, values in lengths):
        raise ValueError
    return ProbeRecord(
        _text(entry["precision"]),
        tuple(tuple(map(int, ids)) for ids in entry["token_ids"]),
        tuple(tuple(map(float, values)) for values in entry["logprobs"]),
    )


def _read_training(entry: Mapping[str, Any]) -> TrainingRecord:
    read = TrainingRecord(**entry)
    losses = [value for value in (read.kept_loss, read.last_loss) if value is not None]
    numbers = (read.steps, read.kept_step, read.learning_rate, read.seed, *losses)
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise ValueError
    for text in (read.data_sha256, read.start, read.questions):
        _text(text)
    return read


def _read_quality(entry: Mapping[str, Any]) -> Quality:
    read = Quality(**entry)
    if not all(isinstance(value, (int, float)) and value > 0 for value in read.ratio.values()):
        raise ValueError
    return read


def _read_answers(entry: Mapping[str, Any]) -> AnswerRecord:
    read = AnswerRecord(int(entry["shots"]), _text(entry["version"]), _text(entry["questions"]), dict(entry["right"]))
    count, rest = divmod(len(read.questions), AnswerRecord.DIGITS)
    if rest or any(len(flags) != count or set(flags) - {"0", "1"} for flags in read.right.values()):
        raise ValueError
    return read
