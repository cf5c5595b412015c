"""The token ids that all models are asked for: windows, prompts, probes and the longest text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cloq_export.engines.decoding import end_tokens
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import tokens_per_batch
from cloq_export.errors import CalibrationError, GateMissedError, UsageError
from cloq_export.models.context import context_length
from cloq_export.models.source import LoadedModel
from cloq_export.parity.divergence import windows_compared
from cloq_export.parity.numerics import measure_logprobs
from cloq_export.parity.perplexity import check_windows
from cloq_export.texts.corpora import evaluation_tokens, tokenize_text
from cloq_export.texts.tokens import TextTokens
from cloq_export.verbs.verification.engines import engine_length
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verification.plan import Plan

# Half precision hides a module's effect in rounding; more tokens average it out.
_LIVENESS_TOKENS = {"float32": 32}
_LIVENESS_TOKENS_HALF = 64
_LIVENESS_SEQUENCES = {"float32": 1}
_LIVENESS_SEQUENCES_HALF = 4
# Of sequences in mixed batches, which differ also where windows are shorter.
_ISOLATION_LENGTHS = (64, 48, 57)
_PROMPT_TOKENS = 32
# Prompts are cut to several lengths, so that what pads a batch of them shows; a prime step gives every subject several.
_PROMPT_STEP = 7
# Up to this size every batch of windows is asked for.
_SMALL_BATCH = 3
# The longest text that is served unless a length is typed.
_LONGEST = 2048
# Tokens on which the base is scored without its adapters, in whole windows, besides the longest text.
_BASE_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class ProbeTexts:
    """What is put to every model.

    Args:
        begin: tokens that each window and prompt begins with.
        windows: all equally long.
        compared: the windows on which whole distributions are compared.
        longest: one text, as long as the model is served with.
        prompts: that are continued.
        probes: on which modules are shown to be live.
        isolated: sequences of several lengths for mixed batches.
        places: lengths at which the model changes what it does.
        ends: tokens that end a text.
        subjects: what windows are all for: every adapter, or the base if there is none.
    """

    begin: Sequence[int]
    windows: Sequence[Sequence[int]]
    compared: Sequence[Sequence[int]]
    longest: Sequence[int]
    prompts: Sequence[Sequence[int]]
    probes: Sequence[Sequence[int]]
    isolated: Sequence[Sequence[int]]
    places: Sequence[int]
    ends: frozenset[int]
    subjects: Sequence[str | None]

    @classmethod
    def cut(cls, plan: Plan, loaded: LoadedModel, text: str) -> ProbeTexts:
        """Cut a text with the float model's tokenizer.

        Args:
            plan: what was asked.
            loaded: the float model.
            text: the text.

        Raises:
            GateMissedError: the text is shorter than one window.
            UsageError: the model reads no window, or no longest text, of this length.
        """
        options = plan.options
        begin = list(TextTokens(loaded.tokenizer).window_begin(options.bos))
        tokens = evaluation_tokens(loaded.tokenizer, text, options.window, options.bos)
        try:
            check_windows(loaded.model, tokens, window=options.window, windows=options.windows)
        except CalibrationError as error:
            raise GateMissedError(f"nothing was judged: {error}") from None
        bare = tokenize_text(loaded.tokenizer, text)
        length = _longest_length(plan, loaded.model, len(begin) + bare.numel())
        count = min(options.windows, tokens.numel() // options.window)
        windows = tokens[: count * options.window].view(count, options.window).tolist()
        width = min(_PROMPT_TOKENS, options.window) - len(begin)
        # Prompts are spread over the whole of what was read, so that they are not all of one page.
        flat = bare[: count * (options.window - len(begin))].tolist()
        step = max(1, (len(flat) - width) // max(1, options.prompts))
        starts = range(0, len(flat) - width + 1, step)[: options.prompts]
        probed = liveness_tokens(options)
        probes = liveness_sequences(options.dtype)
        return cls(
            begin=begin,
            windows=windows,
            compared=windows_compared(windows, loaded.config.get_text_config().vocab_size),
            # One text from the start, begun once.
            longest=[*begin, *bare[: length - len(begin)].tolist()],
            prompts=[
                begin + flat[start : start + width - _PROMPT_STEP * number % (1 + width // 3)]
                for number, start in enumerate(starts)
            ],
            probes=[window[:probed] for window in windows[:probes]],
            isolated=isolated_texts(windows),
            places=_changing_places(loaded.config),
            ends=end_tokens(loaded.model),
            subjects=plan.subjects,
        )

    def windows_of(self, adapter: str | None) -> Sequence[Sequence[int]]:
        """Return the windows that are scored: fewer of the base alone, where it is not what is meant to be served."""
        return self.windows if adapter in self.subjects else self.windows[: -(-_BASE_TOKENS // len(self.windows[0]))]

    def scored_windows(
        self,
        model: ServedModel,
        adapter: str | None,
        longest: torch.Tensor | None,
        *,
        known: Sequence[torch.Tensor] = (),
        growing: bool = False,
    ) -> list[torch.Tensor]:
        """Score the windows but for what is known; a first one that the longest text begins with is known by that.

        Args:
            model: that is asked.
            adapter: with which, None is the base.
            longest: what it said of the longest text, (n - 1,); None if it gave no answer.
            known: what is known of the first windows, as it is returned.
            growing: ask for one, two and three windows at once and then for all others, since an engine may take
                another path for each size; otherwise for all at once.

        Returns:
            list: one (window - 1,) float32 tensor per window.

        Raises:
            ShapeError: as `measure_logprobs`.
        """
        windows = self.windows_of(adapter)
        first, logprobs = windows[0], list(known)
        if not logprobs and longest is not None and list(self.longest[: len(first)]) == list(first):
            logprobs.append(longest[: len(first) - 1])
        # What is known by the longest text was asked for alone.
        size = 1 + len(logprobs) if growing else _SMALL_BATCH + 1
        while rest := windows[len(logprobs) :][: size if size <= _SMALL_BATCH else None]:
            logprobs += measure_logprobs(model, rest, [adapter] * len(rest))
            size += 1
        return logprobs

    def prompts_of(self, number: int) -> Sequence[Sequence[int]]:
        """Return the prompts of the subject of this number: they are dealt out in turn, and to each at least one."""
        count = len(self.prompts)
        return self.prompts[number :: len(self.subjects)] or self.prompts[number % max(1, count) :][:1]


def liveness_sequences(dtype: str) -> int:
    """Return on how many windows modules are shown to be live in a precision."""
    return _LIVENESS_SEQUENCES.get(dtype, _LIVENESS_SEQUENCES_HALF)


def liveness_tokens(options: VerifyOptions) -> int:
    """Return how many tokens of a window modules are shown to be live on."""
    return options.liveness_tokens or _LIVENESS_TOKENS.get(options.dtype, _LIVENESS_TOKENS_HALF)


def isolated_texts(windows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return texts of several lengths for mixed batches, from windows that are all equally long."""
    longest = max(_ISOLATION_LENGTHS)
    pieces = zip([*windows] * len(_ISOLATION_LENGTHS), _ISOLATION_LENGTHS, strict=False)
    return [window[: max(2, each * min(len(window), longest) // longest)] for window, each in pieces]


def _longest_length(plan: Plan, model: Any, tokens: int) -> int:
    """Return the length of the longest text: what was typed, or what is served as far as one can measure it."""
    options, context = plan.options, context_length(model)
    served = min(each for each in (context, engine_length(plan), tokens) if each is not None)
    if options.longest is not None:
        if options.longest > served:
            raise UsageError(
                f"`longest` is {options.longest}; the model is served with up to {context or 'any number of'} "
                f"tokens and the text has {tokens}: choose {served} or less, or a longer text."
            )
        return options.longest
    return min(served, max(options.window, min(_LONGEST, tokens_per_batch(model))))


def _changing_places(config: Any) -> list[int]:
    """Return the lengths at which a model changes what it does: a sliding window, or other rotary frequencies."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scaling = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    named = [getattr(text_config, name, None) for name in ("sliding_window", "original_max_position_embeddings")]
    if isinstance(scaling, Mapping):
        named.append(scaling.get("original_max_position_embeddings"))
    return [place for place in named if isinstance(place, int) and place > 0]
