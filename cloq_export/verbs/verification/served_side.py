"""The engine that serves: its scores and texts compared with the reference's, alone and in mixed batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from cloq_export.engines.alternatives import Alternatives
from cloq_export.engines.protocol import MOST_ALTERNATIVES, ServedModel
from cloq_export.parity import generation
from cloq_export.parity.answers import Respondent
from cloq_export.parity.gate import tie_gap
from cloq_export.parity.generation import AskedTexts, WrittenTexts
from cloq_export.parity.isolation import Isolation, measure_isolation
from cloq_export.parity.numerics import GreedyTexts, compare_greedy, compare_logprobs, measure_logprobs
from cloq_export.parity.provenance import ProbeDifferences, probe_differences
from cloq_export.parity.quality import PerplexityRow
from cloq_export.parity.report import DivergenceRow, NumericsRow
from cloq_export.parity.scales import (
    ALTERNATIVES,
    SCALE_LIMIT,
    ScaleErrors,
    ServedWindow,
    measure_scales,
    share_windows,
)
from cloq_export.verbs.verification.engines import DTYPES
from cloq_export.verbs.verification.float_side import Answered, FloatSide, ask_tasks
from cloq_export.verbs.verification.plan import Plan
from cloq_export.verbs.verification.progress import Progress
from cloq_export.verbs.verification.reference_side import ReferenceSide, divergence_rows, perplexity_rows

# The prompts that are continued in mixed batches.
_MIXED_PROMPTS = 4
# Tokens on which the scales of modules are measured, and tokens of each window on which modules are compared at first.
_SCALE_TOKENS = {"float32": 512}
_SCALE_TOKENS_HALF = 4096
# Each adapter and the base are judged by themselves too.
_SCALE_TOKENS_OF_EACH = 256
_SCREENED_TOKENS = 128
_KINDS = {"greedy": "greedy text", "longest": "text behind long prompts", "mixed": "text in a mixed batch"}
Judge = Callable[[AskedTexts, Sequence[Sequence[int]]], None]


class ServedSide:
    """What an engine answers, as it comes; what it does not answer is noted and stays missing.

    Args:
        plan: what was asked.
        known: of the float model.
        side: of the reference.
        progress: of the call.
    """

    def __init__(self, plan: Plan, known: FloatSide, side: ReferenceSide, progress: Progress) -> None:
        self.plan, self.known, self.side, self.progress = plan, known, side, progress
        self.texts = known.texts
        self.logprobs: dict[str | None, list[torch.Tensor]] = {}
        self.alternatives: dict[str | None, list[Alternatives]] = {}
        self.numerics: list[NumericsRow] = []
        self.divergence: list[DivergenceRow] = []
        self.perplexity: list[PerplexityRow] = []
        self.greedy: list[GreedyTexts] = []
        self.decoding: list[WrittenTexts] = []
        self.probes: list[ProbeDifferences] = []
        self.answers: dict[str | None, Answered] = {}
        self.isolation: Isolation | None = None
        self.scales: ScaleErrors | None = None

    def measure(self, served: ServedModel) -> None:
        """Ask an engine for everything but its modules one by one."""
        for number, adapter in enumerate(self.plan.subjects):
            of = adapter or "base"
            self._score(served, adapter)
            self._write_behind_long_prompts(served, adapter)
            self._write_greedily(served, adapter, number)
            with self.progress.attempt(f"tasks, {of}"):
                asked = Respondent(served, self.known.tokenizer, adapter)
                self.answers[adapter] = ask_tasks(self.plan, "served", asked, self.progress)
            with self.progress.attempt(f"probe of the last step, {of}"):
                self._probe_last_step(served, adapter)
        if self.plan.adapters:
            if None in self.plan.scored:
                self._score(served, None)
            with self.progress.attempt("isolation"), self.progress.phase("isolation"):
                self.isolation = measure_isolation(served, self.texts.isolated, self._mixed)
            self._write_mixed(served)
        if self.plan.options.dtype != "float32":
            with self.progress.attempt("alternatives"), self.progress.phase("scales"):
                for adapter, numbers in self._scale_windows().items():
                    rows = [self.texts.windows[number][: self._scale_length] for number in numbers]
                    listed = served.alternative_logprobs(rows, [adapter] * len(rows), MOST_ALTERNATIVES)
                    self.alternatives[adapter] = listed

    def measure_scales(self) -> None:
        """Measure the scale of every quantized module on windows that the adapters and the base share."""
        plan, options = self.plan, self.plan.options
        known = self.logprobs if options.dtype == "float32" else self.alternatives
        if plan.rounds_activations or set(known) != set(plan.scored):
            return
        with self.progress.attempt("scales of modules"), self.progress.phase("scales"):
            shared = self._scale_windows()
            windows = [window for adapter in shared for window in self._served_windows(adapter, shared[adapter])]
            self.scales = measure_scales(
                self.side.model,
                windows,
                list(plan.checkpoint.specs),
                screened=min(self._scale_length, _SCREENED_TOKENS),
                limit=plan.limits.get("scale_error_max", SCALE_LIMIT),
                seed=options.seed,
            )

    @property
    def _mixed(self) -> list[str | None]:
        """Return what a mixed batch holds, the base first."""
        return sorted(self.plan.scored, key=lambda name: name is not None)

    def _shared_windows(self) -> tuple[int, list[tuple[int, int]]]:
        subjects = len(self.plan.scored)
        tokens = max(_SCALE_TOKENS.get(self.plan.options.dtype, _SCALE_TOKENS_HALF), _SCALE_TOKENS_OF_EACH * subjects)
        return share_windows(len(self.texts.windows), tokens, self.plan.options.window, subjects)

    @property
    def _scale_length(self) -> int:
        """Return how many tokens of a window scales are measured on."""
        return self._shared_windows()[0]

    def _scale_windows(self) -> dict[str | None, list[int]]:
        """Return what is served -> numbers of the windows on which scales are measured with it."""
        names = self.plan.scored
        numbers: dict[str | None, list[int]] = {name: [] for name in names}
        for number, subject in self._shared_windows()[1]:
            adapter = names[subject]
            # In float32 what was scored is enough; of the base alone those are the first windows.
            scored = self.texts.windows_of(adapter) if self.plan.options.dtype == "float32" else self.texts.windows
            number = number if adapter in self.plan.subjects else number // len(names)
            if number < len(scored):
                numbers[adapter].append(number)
        return numbers

    def _served_windows(self, adapter: str | None, numbers: Sequence[int]) -> list[ServedWindow]:
        """Return windows as they were served, with what the reference says of the same tokens."""
        rows = [self.texts.windows[number][: self._scale_length] for number in numbers]
        if self.plan.options.dtype == "float32":
            served, expected = self.logprobs[adapter], self.side.logprobs[adapter]
            return [
                ServedWindow.of_next(ids, adapter, served[number], expected[number])
                for ids, number in zip(rows, numbers, strict=True)
            ]
        reference, modules = self.side.model, list(self.plan.checkpoint.specs)
        listed = reference.alternative_logprobs(rows, [adapter] * len(rows), ALTERNATIVES)
        rounded: Sequence[torch.Tensor | None] = [None] * len(rows)
        dtype = self.plan.options.dtype
        with (
            self.progress.attempt(f"the reference in {dtype}, {adapter or 'base'}"),
            reference.rounded(adapter, modules, DTYPES[dtype]),
        ):
            rounded = reference.logprobs_of(rows, adapter, [each.tokens for each in listed])
        return [
            ServedWindow.of_alternatives(ids, adapter, theirs, ours, near)
            for ids, theirs, ours, near in zip(rows, self.alternatives[adapter], listed, rounded, strict=True)
        ]

    def _score(self, served: ServedModel, adapter: str | None) -> None:
        """Score the longest text and the windows."""
        longest: torch.Tensor | None = None
        with self.progress.attempt(f"the longest text, {adapter or 'base'}"), self.progress.phase("longest"):
            [longest] = measure_logprobs(served, [self.texts.longest], [adapter])
            self._note("served at length", adapter, [longest], self.side.longest[adapter])
        with self.progress.attempt(f"served logits, {adapter or 'base'}"):
            logprobs = self.texts.scored_windows(served, adapter, longest, growing=True)
            self._note("served", adapter, logprobs, self.side.logprobs[adapter])
            if adapter in self.plan.subjects:
                self.perplexity += perplexity_rows(self.plan, self.known, "served", adapter, logprobs)
            self.logprobs[adapter] = logprobs
        if adapter in self.plan.subjects:
            with self.progress.attempt(f"served distributions, {adapter or 'base'}"):
                self.divergence += divergence_rows(self.known, self.side, ("served", served), adapter)

    def _note(
        self, measured: str, adapter: str | None, logprobs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
    ) -> None:
        self.numerics.append(NumericsRow(measured, "reference", adapter, compare_logprobs(logprobs, expected)))

    def _probe_last_step(self, served: ServedModel, adapter: str | None) -> None:
        """Ask for what the model said at its last step, when it was made."""
        recorded = self.plan.made.probe(adapter)
        if recorded is not None:
            measured = measure_logprobs(served, recorded.token_ids, [adapter] * len(recorded.token_ids))
            self.probes.append(probe_differences(adapter, recorded, measured))

    def _write_behind_long_prompts(self, served: ServedModel, adapter: str | None) -> None:
        longest = self.texts.longest
        new = min(self.plan.options.new_tokens, max(1, len(longest) - 1))
        prompts = generation.long_prompts(longest, new, self.texts.places) if self.plan.options.prompts else []
        with self._judging("longest", adapter) as judge, self.progress.phase("longest"):
            judge(self._asked(prompts, adapter, new), served.generate(prompts, [adapter] * len(prompts), new))

    def _write_greedily(self, served: ServedModel, adapter: str | None, number: int) -> None:
        prompts, new = self.texts.prompts_of(number), self.plan.options.new_tokens
        asked = self._asked(prompts, adapter, new)
        with self._judging("greedy", adapter) as judge, self.progress.phase("greedy"):
            texts = served.generate(prompts, [adapter] * len(prompts), new) if prompts else []
            # First: a token that no model knows is refused here.
            judge(asked, texts)
            if prompts:
                expected, tie = self.side.expected[adapter], tie_gap(self.plan.bits)
                self.greedy.append(compare_greedy(self.side.model, asked, expected, texts, tie))

    def _write_mixed(self, served: ServedModel) -> None:
        """Let all that is scored write in one batch, and judge what each has written."""
        names = self._mixed
        prompts, new = self.texts.prompts[:_MIXED_PROMPTS], self.plan.options.new_tokens
        written: Mapping[str | None, tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]] = {}
        if prompts:
            with self.progress.attempt("texts of a mixed batch"), self.progress.phase("isolation"):
                written = generation.mixed_texts(served, prompts, names, new)
        for name in names:
            with self._judging("mixed", name) as judge, self.progress.phase("isolation"):
                own, texts = written.get(name, ([], []))
                judge(self._asked(own, name, new), texts)

    def _asked(self, prompts: Sequence[Sequence[int]], adapter: str | None, new: int) -> AskedTexts:
        return AskedTexts(prompts, adapter, new, self.texts.ends)

    @contextlib.contextmanager
    def _judging(self, kind: str, adapter: str | None) -> Iterator[Judge]:
        """Note a row of texts even if judging it fails: a missing row makes its figures missing."""
        rows = []

        def judge(asked: AskedTexts, texts: Sequence[Sequence[int]]) -> None:
            rows.append(generation.judge_texts(self.side.model, asked, texts, kind=kind))

        with self.progress.attempt(f"{_KINDS[kind]}, {adapter or 'base'}"):
            yield judge
        self.decoding.append(rows[0] if rows else WrittenTexts(adapter, kind))
