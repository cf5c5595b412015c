"""Perplexity of a model on the first windows of a text, with its standard error, and ratios between models."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.errors import CalibrationError, NonFiniteError, UsageError
from cloq_export.models.context import context_length, require_known_tokens
from cloq_export.models.devices import device_of
from cloq_export.models.rotary_switch import forget_lengths
from cloq_export.models.stream import BlockStream
from cloq_export.models.weights_on_disk import weights_on_disk
from cloq_export.parity.divergence import Divergence, Watch, WatchedDivergences
from cloq_export.process.progress import show_progress
from cloq_export.texts.corpora import CalibrationText, evaluation_tokens
from cloq_export.types import Perplexity

# Logits that one forward pass may make: windows are read several at a time, so that packed weights are unpacked less
# often, as long as their logits stay below half a gigabyte in float32.
_BATCH_LOGITS = 1 << 27

# Rows of logits that are turned to float32 log-probabilities at a time: a large vocabulary makes them expensive.
_LOGIT_ROWS = 128


def window_losses(
    model: nn.Module,
    token_ids: torch.Tensor,
    *,
    window: int = 512,
    windows: int = 16,
    label: str | None = "perplexity",
    console: Console | None = None,
) -> torch.Tensor:
    """Return the mean negative log-likelihood per predicted token of each window of a text.

    `loss_i = -1/(window - 1) * sum_{t=2..window} log p(x_t | x_1..x_{t-1})`, in nats, x the tokens of window i.
    Windows lie one behind the other from the start of the text and are read each on its own: nothing is put in front,
    and the first token of each is not predicted. A shorter text gives fewer windows than asked.

    Args:
        model: a causal language model; called as `model(input_ids=..., use_cache=False).logits`.
        token_ids: (tokens,) int64.
        window: tokens in a window, at least 2.
        windows: how many windows at most, at least 1.
        label: what the work is named on standard error, where it shows how far it is; None shows nothing.
        console: the console for that; None means a new one on standard error.

    Returns:
        Tensor: (windows,) float64 on the CPU.

    Raises:
        CalibrationError: the text is shorter than one window.
        NonFiniteError: the model gives NaN or Inf.
        UsageError: window or windows is too small, or the window is longer than the model's context.
    """
    check_windows(model, token_ids, window=window, windows=windows)
    return _losses_of(model, _cut_windows(token_ids, window, windows), label, console)


def _losses_of(
    model: nn.Module, rows: torch.Tensor, label: str | None, console: Console | None, watch: Watch | None = None
) -> torch.Tensor:
    """Return the loss of each window, (windows,); `watch` is shown the logits of each as they come."""
    window = rows.shape[1]
    device = device_of(model)
    losses = torch.empty(len(rows), dtype=torch.float64)
    silent = contextlib.nullcontext()
    shown = silent if label is None else show_progress(label, console, unit="windows", transient=True)
    with _evaluating(model), torch.no_grad(), shown as advance:
        start = 0
        for batch, logits in _logits_of(model, rows, _windows_per_batch(model, window)):
            ids = batch.to(device)
            for index, (predicted, row) in enumerate(zip(logits, ids, strict=True), start):
                loss = _mean_loss(predicted[:-1], row[1:])
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"the model gives NaN or Inf on window {index + 1} of {len(rows)}; run it in float32, or check "
                        "its weights with `cloq inspect --verify`."
                    )
                losses[index] = loss
                if watch is not None:
                    watch(index, predicted[:-1], row[1:])
                if advance is not None:
                    advance(index + 1, len(rows))
            start += len(ids)
    return losses


def _logits_of(model: nn.Module, rows: torch.Tensor, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield some windows and their logits at a time; each weight that is on disk is read once for all windows."""
    forget_lengths(model)
    weights = weights_on_disk(model)
    batches = rows.split(count)
    if weights is None:
        device = device_of(model)
        for batch in batches:
            yield batch, model(input_ids=batch.to(device), use_cache=False).logits
        return
    stream = BlockStream(model, weights.blocks, rows, device=device_of(model), batch=count)
    hidden = stream.hidden
    for index in range(len(weights.blocks)):
        hidden = stream.forward_block(index, hidden)
    for number, batch in enumerate(batches):
        yield batch, stream.differentiable_logits(number, hidden[number], slice(None))


def _windows_per_batch(model: nn.Module, window: int) -> int:
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    vocabulary = getattr(text_config, "vocab_size", None) or _BATCH_LOGITS
    return max(1, _BATCH_LOGITS // (vocabulary * window))


def perplexity(
    model: nn.Module,
    token_ids: torch.Tensor,
    *,
    window: int = 512,
    windows: int = 16,
    label: str | None = "perplexity",
    console: Console | None = None,
) -> Perplexity:
    """Return the perplexity of a model on the first windows of a text; see `window_losses` and `summarize_losses`.

    Args:
        model: a causal language model.
        token_ids: (tokens,) int64.
        window: tokens in a window, at least 2.
        windows: how many windows at most, at least 1.
        label: as in `window_losses`.
        console: the console for that; None means a new one on standard error.

    Returns:
        Perplexity: over all predicted tokens, `window - 1` of each window.

    Raises:
        CalibrationError: the text is shorter than one window.
        NonFiniteError: the model gives NaN or Inf.
        UsageError: window or windows is too small, or the window is longer than the model's context.
    """
    losses = window_losses(model, token_ids, window=window, windows=windows, label=label, console=console)
    return summarize_losses(losses, window)


def check_windows(model: nn.Module, token_ids: torch.Tensor, *, window: int, windows: int) -> None:
    """Check that a model can be measured on a text, which is cheap, before anything that is not.

    Args:
        model: a causal language model.
        token_ids: (tokens,) int64.
        window: tokens in a window, at least 2.
        windows: how many windows at most, at least 1.

    Raises:
        CalibrationError: the text is shorter than one window.
        DataError: a token is outside of the model's vocabulary.
        UsageError: window or windows is too small, or the window is longer than the model's context.
    """
    require_known_tokens(model, _cut_windows(token_ids, window, windows), "the evaluation tokens")
    limit = context_length(model)
    if limit is not None and window > limit:
        raise UsageError(
            f"an evaluation window has {window} tokens, but this model reads at most {limit}; choose {limit} or "
            "less as `window` (in a run `eval_window`)."
        )


def summarize_losses(losses: torch.Tensor, window: int) -> Perplexity:
    """Return the perplexity that window losses amount to.

    `ppl = exp(m)` with m the mean loss, and by the delta method `se(ppl) = ppl * sd(losses) / sqrt(n)`: windows are
    separate pieces of text and stand for independent draws, tokens inside one do not.

    Args:
        losses: (windows,) mean negative log-likelihood of each window, in nats; all windows are equally long.
        window: tokens in a window.

    Returns:
        Perplexity: its standard error is NaN if there is only one window.
    """
    value, error = _exponential(losses)
    return Perplexity(value, error, losses.numel() * (window - 1))


def ratio_of_losses(losses: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return the ratio of two models' perplexities on the same windows, and its standard error.

    `ratio = exp(mean d)` with `d = losses - reference` window by window. Taking the difference first removes how hard
    each window is, so the error is far smaller than that of either perplexity.

    Args:
        losses: (windows,) of the model in question.
        reference: (windows,) of the model it is compared with.

    Returns:
        (ratio, standard error), the error NaN if there is only one window.
    """
    return _exponential(losses - reference)


@dataclasses.dataclass(frozen=True)
class TextWindows:
    """What perplexity is measured on.

    Args:
        text: the text.
        window: tokens in a window, at least 2.
        windows: how many windows at most, at least 1, from the start of the text.
        bos: what each window begins with: "auto", "never" or "always".
    """

    text: CalibrationText
    window: int = 512
    windows: int = 16
    bos: str = "auto"

    def tokens(self, tokenizer: Any) -> torch.Tensor:
        """Return the token ids of the text, (tokens,) int64."""
        return evaluation_tokens(tokenizer, self.text.text, self.window, self.bos)


@dataclasses.dataclass(frozen=True)
class ModelPerplexity:
    """The perplexity of one model in a table.

    Args:
        perplexity: of the model.
        standard_error: of the perplexity; None for a single window.
        ratio_to_float: perplexity over that of the float model; None for that model, or where it was not measured.
        ratio_standard_error: of the ratio.
        to_float: distance of its distributions from the float model's; None as above.
        token_mult_prob_error: factor by which the probability of a token is off from the float model's in the mean,
            on the tokens of `to_float`.
    """

    perplexity: float
    standard_error: float | None
    ratio_to_float: float | None = None
    ratio_standard_error: float | None = None
    to_float: Divergence | None = None
    token_mult_prob_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures, those relative to the float model only where there are any."""
        content: dict[str, Any] = {"perplexity": self.perplexity, "standard_error": self.standard_error}
        if self.ratio_to_float is not None:
            content |= {"ratio_to_float": self.ratio_to_float, "ratio_standard_error": self.ratio_standard_error}
        if self.to_float is not None:
            content["to_float"] = {**self.to_float.to_json(), "token_mult_prob_error": self.token_mult_prob_error}
        return content


@dataclasses.dataclass(frozen=True)
class PerplexityTable:
    """Perplexities of several models on the same windows.

    Args:
        models: name -> what was measured; the names used are "float", "quantized", "adapter" and "merged".
        tokens: predicted tokens.
        windows: how many were measured.
        window: tokens in a window.
        text: where the text is from.
        text_sha256: of the text.
        bos: what each window begins with, as it was asked for.
        begin_tokens: the tokens that this means.
    """

    models: Mapping[str, ModelPerplexity]
    tokens: int
    windows: int
    window: int
    text: str
    text_sha256: str
    bos: str
    begin_tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the table as a JSON object in which each model stands under its name."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        models = {name: measured.to_json() for name, measured in self.models.items()}
        return models | facts | {"begin_tokens": list(self.begin_tokens)}


def compare_perplexities(
    models: Iterable[tuple[str, nn.Module]],
    token_ids: torch.Tensor,
    on: TextWindows,
    *,
    begin_tokens: tuple[int, ...] = (),
    console: Console | None = None,
) -> PerplexityTable:
    """Measure several models on the same windows and put them in one table.

    Models are taken from the iterable one at a time and no reference to them is kept, so that a generator may load
    each when it is needed, and may switch an adapter off between two items.

    Args:
        models: (name, model) pairs, named as in the table.
        token_ids: (tokens,) int64, what the models' common tokenizer makes of the text.
        on: the text and its windows.
        begin_tokens: with which each window begins.
        console: where progress is shown; None means a new one on standard error.

    Raises:
        CalibrationError: the text is shorter than one window.
        NonFiniteError: a model gives NaN or Inf.
        UsageError: window or windows is too small, or the window is longer than a model's context.
    """
    losses: dict[str, torch.Tensor] = {}
    watched = WatchedDivergences("float")
    for name, model in models:
        check_windows(model, token_ids, window=on.window, windows=on.windows)
        rows = _cut_windows(token_ids, on.window, on.windows)
        losses[name] = _losses_of(model, rows, f"perplexity, {name}", console, watched.watch(name))
        del model
    table: dict[str, ModelPerplexity] = {}
    for name, values in losses.items():
        measured = summarize_losses(values, on.window)
        beside_float: tuple[float, float | None] | tuple[()] = ()
        if "float" in losses and name != "float":
            ratio, of_ratio = ratio_of_losses(values, losses["float"])
            beside_float = (ratio, _or_none(of_ratio))
        row = ModelPerplexity(measured.perplexity, _or_none(measured.standard_error), *beside_float)
        if (found := watched.of(name)) is not None:
            row = dataclasses.replace(row, to_float=found[0], token_mult_prob_error=found[1])
        table[name] = row
    count = len(_cut_windows(token_ids, on.window, on.windows))
    return PerplexityTable(
        table, count * (on.window - 1), count, on.window, on.text.origin, on.text.sha256, on.bos, begin_tokens
    )


def _cut_windows(token_ids: torch.Tensor, window: int, windows: int) -> torch.Tensor:
    """Return the windows, (windows, window) int64."""
    if window < 2 or windows < 1:
        raise UsageError(
            f"{windows} windows of {window} tokens were asked for; at least 1 window of 2 tokens is needed "
            "(`windows`, `window`)."
        )
    available = token_ids.numel()
    if available < window:
        raise CalibrationError(
            f"the evaluation text has {available} tokens, one window needs {window}; give a longer text as `text`, "
            "or a smaller `window` (in a run `eval_text` and `eval_window`)."
        )
    count = min(windows, available // window)
    return token_ids.reshape(-1)[: count * window].view(count, window)


def _mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of targets (n,) under logits (n, vocabulary), summed in float64."""
    total = 0.0
    for first in range(0, len(targets), _LOGIT_ROWS):
        rows = slice(first, first + _LOGIT_ROWS)
        terms = nn.functional.cross_entropy(logits[rows].to(torch.float32), targets[rows], reduction="none")
        total += float(terms.sum(dtype=torch.float64))
    return total / len(targets)


def _exponential(values: torch.Tensor) -> tuple[float, float]:
    """Return exp of the mean of (n,) values and its standard error by the delta method."""
    mean = float(values.mean())
    result = math.exp(mean) if mean < 700 else math.inf
    if values.numel() < 2:
        return result, math.nan
    return result, result * float(values.std()) / math.sqrt(values.numel())


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for the block, and back on afterwards if it was on."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
