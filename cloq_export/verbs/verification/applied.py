"""Is an adapter really applied, in every module? Asked of an engine on any base, without a float model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from cloq_export.artifact.adapters import AdapterShelf
from cloq_export.compress.session import Session
from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.any_base import AnyBase
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.errors import GateMissedError, UsageError
from cloq_export.files.versions import environment
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity import liveness
from cloq_export.parity.gate import MIXED_LIMIT, float32_limit
from cloq_export.parity.isolation import Isolation, measure_isolation
from cloq_export.parity.liveness import AdapterLiveness
from cloq_export.parity.numerics import compare_logprobs, measure_logprobs
from cloq_export.parity.plain import Result, plain
from cloq_export.parity.report import Missing, NumericsRow
from cloq_export.texts.corpora import evaluation_text, evaluation_tokens
from cloq_export.verbs.options import refuse_unmeant
from cloq_export.verbs.verification.engines import DTYPES
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verification.plan import adapter_folders
from cloq_export.verbs.verification.probe_texts import isolated_texts, liveness_sequences, liveness_tokens
from cloq_export.verbs.verification.progress import Progress
from cloq_export.verbs.verification.reference_side import leave_out

REPORT_FORMAT = "cloq-applied"


@dataclasses.dataclass(frozen=True)
class Check(Result):
    """One question about an adapter.

    Args:
        what: "weights", "live_modules", "logprob_difference_max" or "mixed_batch_difference_max".
        adapter: of which one; None asks it of all and the base.
        passed: the answer; None where it is not judged here, with the reason.
        value: that was measured.
        limit: that is allowed.
        reason: what was found, for people.
    """

    what: str
    adapter: str | None
    passed: bool | None
    value: float | None
    limit: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class AppliedReport(Result):
    """What `verify` says of adapters on a base that it knows nothing else of.

    Args:
        base: folder or hub id.
        layout: of a quantized base; None for a float one.
        runtime: that serves.
        dtype: of its activations.
        adapters: name -> folder.
        checks: the answers.
        liveness: of every module.
        numerics: differences of log-probabilities to the reference.
        isolation: of mixed batches.
        missing: what could not be measured.
        versions: of the environment.
    """

    base: str
    layout: str | None
    runtime: str
    dtype: str
    adapters: Mapping[str, str]
    checks: tuple[Check, ...]
    liveness: tuple[AdapterLiveness, ...]
    numerics: tuple[NumericsRow, ...]
    isolation: Isolation | None
    missing: tuple[Missing, ...]
    versions: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Return whether every adapter is applied, as far as it was asked, and all of it could be asked."""
        return not self.missing and all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq verify --json` prints."""
        return {"format": REPORT_FORMAT, "format_version": 1, "passed": self.passed, **plain(super().to_json())}

    def missed(self) -> str | None:
        """Return one line on what is not as it should be, None if all is."""
        lines = [
            f"{each.what} of {each.adapter or 'base and adapters'}: {each.reason}"
            for each in self.checks
            if each.passed is False
        ]
        lines += [f"{each.what}: {each.reason}" for each in self.missing]
        return "; ".join(lines) or None


Opener = Callable[[AnyBase, VerifyOptions], ServedModel]


def _open_hf(base: AnyBase, options: VerifyOptions) -> ServedModel:
    return base.served(DTYPES[options.dtype])


def _open_vllm(base: AnyBase, options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.vllm.engine import EngineStart, VllmModel
    from cloq_export.engines.vllm.options import EngineSettings

    settings = EngineSettings(dtype=options.dtype, trust_adapters=True)
    return VllmModel(base.folder, base.folders, settings, EngineStart(python=options.python))


# Runtime -> what opens it on any base.
OPENERS: dict[str, Opener] = {"hf": _open_hf, "vllm": _open_vllm}


def verify_applied(base: str, options: VerifyOptions, *, console: Console | None = None) -> AppliedReport:
    """Ask an engine whether adapters are applied on a base of any tool, in every module.

    Args:
        base: folder of a float model or of a quantized checkpoint, or the hub id of a float model.
        options: of `verify`; `adapters` names at least one, and `reference` none.
        console: where progress goes; None is standard error.

    Returns:
        AppliedReport: `passed` is the answer.

    Raises:
        UsageError: options that make no sense.
        GateMissedError: the text is shorter than one window.
        CloqError: the base or an adapter cannot be read, or the engine does not start.
    """
    refuse_unmeant(options)
    if not options.adapters:
        raise UsageError("no adapter was named; name the one in question with `adapters`.")
    if options.runtime not in OPENERS:
        raise UsageError(
            f"`runtime` is {options.runtime!r}; without a float model allowed are {', '.join(OPENERS)}. Name the float "
            "model with `reference`."
        )
    progress = Progress(Session(console or Console(stderr=True)))
    session = progress.session
    held = AnyBase(base, adapter_folders(AdapterShelf.of(base), options.adapters))
    texts = _Texts.cut(held, options)
    session.say(f"measure the reference with {', '.join(held.folders)}")
    reference = held.reference()
    session.say(f"serve with {options.runtime} in {options.dtype}")
    served = OPENERS[options.runtime](held, options)
    asked = _Questions(held, texts, reference, served, options, progress)
    try:
        asked.ask()
    finally:
        served.close()
    return AppliedReport(
        base=base,
        layout=None if held.checkpoint is None else held.checkpoint.layout_name,
        runtime=options.runtime,
        dtype=options.dtype,
        adapters={name: str(folder) for name, folder in held.folders.items()},
        checks=tuple(asked.checks),
        liveness=tuple(asked.rows),
        numerics=tuple(asked.numerics),
        isolation=asked.isolation,
        missing=tuple(progress.missing),
        versions=environment(),
    )


@dataclasses.dataclass(frozen=True)
class _Texts:
    """What is put to both models: windows, probes for liveness, texts for mixed batches."""

    windows: list[list[int]]
    probes: list[list[int]]
    isolated: list[Sequence[int]]

    @classmethod
    def cut(cls, base: AnyBase, options: VerifyOptions) -> _Texts:
        text = evaluation_text(options.text)
        tokens = evaluation_tokens(read_tokenizer(base.folder), text.text, options.window, options.bos)
        count = min(options.windows, tokens.numel() // options.window)
        if not count:
            raise GateMissedError(
                f"nothing was judged: the text has {tokens.numel()} tokens, one window needs {options.window}; give a "
                "longer text with `text`, or shorter windows with `window`."
            )
        windows = tokens[: count * options.window].view(count, options.window).tolist()
        probes = [window[: liveness_tokens(options)] for window in windows[: liveness_sequences(options.dtype)]]
        return cls(windows, probes, isolated_texts(windows))


@dataclasses.dataclass
class _Questions:
    """What is asked of the engine, and its answers as they come."""

    base: AnyBase
    texts: _Texts
    reference: ReferenceModel
    served: ServedModel
    options: VerifyOptions
    progress: Progress
    checks: list[Check] = dataclasses.field(default_factory=list)
    rows: list[AdapterLiveness] = dataclasses.field(default_factory=list)
    numerics: list[NumericsRow] = dataclasses.field(default_factory=list)
    isolation: Isolation | None = None

    def ask(self) -> None:
        for name in self.base.folders:
            with self.progress.attempt(f"log-probabilities, {name}"):
                self._compare(name)
            with self.progress.attempt(f"liveness, {name}"):
                self._show_modules(name)
            # After its first request: engines read an adapter when it is first used.
            with self.progress.attempt(f"weights, {name}"):
                self._compare_weights(name)
        with self.progress.attempt("mixed batches"):
            self._mix()

    def _compare(self, name: str) -> None:
        windows, names = self.texts.windows, [name] * len(self.texts.windows)
        expected = measure_logprobs(self.reference, windows, names)
        differences = compare_logprobs(measure_logprobs(self.served, windows, names), expected)
        self.numerics.append(NumericsRow("served", "reference", name, differences))
        if self.options.dtype != "float32":
            dtype, mean = self.options.dtype, differences.mean
            reason = f"in {dtype} single log-probabilities say little: {mean} is their mean difference"
            self.checks.append(Check("logprob_difference_max", name, None, differences.max, None, reason))
            return
        limit = self._limit()
        passed = differences.max is not None and differences.max <= limit
        on = f"on {differences.tokens} tokens"
        reason = f"{differences.max} is the largest difference from the reference {on}, {limit} is allowed"
        self.checks.append(Check("logprob_difference_max", name, passed, differences.max, limit, reason))

    def _limit(self) -> float:
        checkpoint = self.base.checkpoint
        return float32_limit(16 if checkpoint is None else min(spec.bits for spec in checkpoint.specs.values()))

    def _show_modules(self, name: str) -> None:
        pairs = self.base.adapters[name].pairs
        self.progress.session.say(f"leave out each of {len(pairs)} modules of {name} in turn")
        left = leave_out(self.reference, self.texts.probes, name, list(pairs))
        zero = liveness.zero_products(pairs)
        presences = liveness.served_presence(self.served, self.texts.probes, name, left.probed, left.without, zero=zero)
        share = liveness.live_share(presences)
        tokens = sum(len(ids) - 1 for ids in self.texts.probes)
        self.rows.append(AdapterLiveness(name, len(self.texts.probes), tokens, share, tuple(presences)))
        dead = [
            f"{each.module} is {each.verdict}"
            for each in presences
            if each.verdict not in (liveness.LIVE, liveness.ZERO)
        ]
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        reason = ", ".join(dead[:3]) + more if dead else f"all {len(presences)} modules are shown to be live"
        if share is None:
            reason = "the products of all its modules are zero, so there is nothing of it to see"
        self.checks.append(Check("live_modules", name, share == 1.0, share, 1.0, reason))

    def _compare_weights(self, name: str) -> None:
        tell = getattr(self.served, "held_adapter", None)
        held: HeldAdapter | None = None if tell is None else tell(name)
        if held is None:
            reason = "the engine does not tell which weights it holds; install cloq-export beside it"
            self.checks.append(Check("weights", name, None, None, None, reason))
            return
        pairs = self.base.adapters[name].pairs
        mine = HeldAdapter.of_pairs(pairs, held.dtype)
        wrong = mine.differing(held)
        share = 1 - len(wrong) / len(mine.modules)
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        reason = f"the engine holds A and B of all {len(pairs)} modules, bit for bit in {held.dtype}"
        if wrong:
            reason = f"the engine holds other weights than the files, or none, for {', '.join(wrong[:3])}{more}"
        self.checks.append(Check("weights", name, not wrong, share, 1.0, reason))

    def _mix(self) -> None:
        checkpoint = self.base.checkpoint
        alone = [] if checkpoint is not None and checkpoint.needs_adapter else [None]
        self.isolation = measure_isolation(self.served, self.texts.isolated, [*alone, *self.base.folders])
        value, half = self.isolation.max, self.options.dtype != "float32"
        passed = None if half else value is not None and value <= MIXED_LIMIT
        reason = f"{value} is the largest difference between a mixed batch and single requests"
        reason += f", not judged in {self.options.dtype}" if half else f", {MIXED_LIMIT} is allowed"
        limit = None if half else MIXED_LIMIT
        self.checks.append(Check("mixed_batch_difference_max", None, passed, value, limit, reason))
