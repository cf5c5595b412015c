"""Perplexity against a loop in float64, its errors against resampling, and the table of several models."""

from __future__ import annotations

import math
import types

import pytest
import torch
from rich.console import Console
from torch import nn

from cloq_export.errors import CalibrationError, NonFiniteError, UsageError
from cloq_export.parity.perplexity import (
    TextWindows,
    compare_perplexities,
    perplexity,
    ratio_of_losses,
    summarize_losses,
    window_losses,
)
from cloq_export.texts.corpora import CalibrationText

VOCABULARY = 17
TEXT = CalibrationText("w", "a file", "ab")


class Bigram(nn.Module):
    """A causal model whose next-token distribution depends on the current token only."""

    def __init__(self, seed: int = 0, scale: float = 1.0, context: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.config = types.SimpleNamespace(max_position_embeddings=context)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> types.SimpleNamespace:
        assert not use_cache
        assert not torch.is_grad_enabled()
        assert not self.training
        self.calls.append(tuple(input_ids.shape))
        return types.SimpleNamespace(logits=self.table[input_ids])


def text(length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def slow_losses(model: Bigram, ids: torch.Tensor, window: int, windows: int) -> list[float]:
    logs = torch.log_softmax(model.table.detach().to(torch.float64), dim=1)
    result = []
    for start in range(0, window * windows, window):
        terms = [-float(logs[ids[t - 1], ids[t]]) for t in range(start + 1, start + window)]
        result.append(sum(terms) / len(terms))
    return result


@pytest.mark.parametrize(("window", "windows"), [(2, 3), (7, 5), (13, 1), (50, 2)])
def test_each_window_is_read_on_its_own_without_its_first_token(window, windows, monkeypatch):
    monkeypatch.setattr("cloq_export.parity.perplexity._LOGIT_ROWS", 5)
    model, ids = Bigram(), text(110)
    losses = window_losses(model, ids, window=window, windows=windows, label=None)
    assert losses.tolist() == pytest.approx(slow_losses(model, ids, window, windows), rel=1e-5)
    assert model.calls == [(1, window)] * windows

    measured = perplexity(model, ids, window=window, windows=windows, label=None)
    assert measured.tokens == windows * (window - 1)
    assert measured.perplexity == pytest.approx(math.exp(sum(losses.tolist()) / windows))


def test_a_short_text_gives_fewer_windows_and_drops_the_rest():
    measured = perplexity(Bigram(), text(25), window=10, windows=16, label=None)
    assert measured.tokens == 2 * 9


def test_training_mode_is_put_back():
    model = Bigram().train()
    perplexity(model, text(20), window=10, windows=1, label=None)
    assert model.training


def test_standard_error_is_that_of_resampled_texts():
    generator = torch.Generator().manual_seed(0)
    draws = 1.5 + 0.3 * torch.randn(4000, 24, generator=generator, dtype=torch.float64)
    values = [summarize_losses(draw, 512) for draw in draws]
    spread = float(torch.tensor([value.perplexity for value in values], dtype=torch.float64).std())
    stated = float(torch.tensor([value.standard_error for value in values], dtype=torch.float64).mean())
    # The spread of 4000 draws is known to 1 %; the delta method leaves out terms of the next order.
    assert stated == pytest.approx(spread, rel=0.05)


def test_ratio_is_paired():
    generator = torch.Generator().manual_seed(0)
    reference = 3 + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)
    losses = reference + 0.2 + 0.01 * torch.randn(40, generator=generator, dtype=torch.float64)
    ratio, error = ratio_of_losses(losses, reference)
    assert ratio == pytest.approx(math.exp(0.2), abs=4 * error)
    assert error < 0.05 * summarize_losses(losses, 512).standard_error


def test_one_window_has_no_standard_error():
    measured = perplexity(Bigram(), text(20), window=20, windows=4, label=None)
    assert math.isnan(measured.standard_error)
    table = compare_perplexities([("float", Bigram())], text(20), TextWindows(TEXT, window=20))
    assert table.models["float"].standard_error is None


def test_evaluate_puts_models_in_one_table():
    models = {"float": Bigram(0), "quantized": Bigram(1), "adapter": Bigram(0)}
    asked: list[str] = []

    def lazily():
        for name, model in models.items():
            asked.append(name)
            yield name, model
            assert model.calls, "a model is measured before the next one is asked for"

    table = compare_perplexities(lazily(), text(60), TextWindows(TEXT, 20, 8), begin_tokens=(1,)).to_json()
    assert asked == ["float", "quantized", "adapter"]
    facts = ["tokens", "windows", "window", "text", "text_sha256", "bos", "begin_tokens"]
    assert list(table) == [*models, *facts]
    assert (table["bos"], table["begin_tokens"]) == ("auto", [1])
    assert (table["tokens"], table["windows"], table["window"]) == (57, 3, 20)
    assert set(table["float"]) == {"perplexity", "standard_error"}
    assert table["adapter"]["ratio_to_float"] == 1.0
    assert table["adapter"]["ratio_standard_error"] == 0.0
    assert table["quantized"]["ratio_to_float"] == pytest.approx(
        table["quantized"]["perplexity"] / table["float"]["perplexity"]
    )


def test_progress_goes_to_the_console_given_and_only_if_asked(capsys, tmp_path):
    with open(tmp_path / "out", "w") as file:
        console = Console(file=file, force_terminal=True)
        perplexity(Bigram(), text(40), window=10, windows=4, console=console)
    assert "perplexity" in (tmp_path / "out").read_text()
    perplexity(Bigram(), text(40), window=10, windows=4, label=None)
    perplexity(Bigram(), text(40), window=10, windows=4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("length", "window", "windows", "error", "message"),
    [
        (9, 10, 1, CalibrationError, "the evaluation text has 9 tokens, one window needs 10; give a longer text"),
        (0, 10, 1, CalibrationError, "has 0 tokens"),
        (90, 1, 1, UsageError, "at least 1 window of 2 tokens is needed"),
        (90, 10, 0, UsageError, "0 windows of 10 tokens were asked for"),
        (90, 65, 1, UsageError, "reads at most 64; choose 64 or less as `window`"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(length, window, windows, error, message):
    with pytest.raises(error, match=message):
        perplexity(Bigram(), text(length), window=window, windows=windows, label=None)


def test_nan_logits_are_named():
    model = Bigram()
    with torch.no_grad():
        model.table[:] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf on window 1 of 2; run it in float32"):
        perplexity(model, text(20), window=10, windows=2, label=None)


def test_a_hopeless_model_has_a_perplexity_all_the_same():
    assert perplexity(Bigram(scale=1e5), text(20), window=10, windows=2, label=None).perplexity == math.inf
