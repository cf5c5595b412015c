"""Each kind of broken runtime misses the gate that is meant for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import torch
from parity_reports import missed
from passing_runtime import PassingRuntime
from rich.console import Console

from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import packed_model
from cloq_export.errors import (
    EngineError,
)
from cloq_export.parity import liveness
from cloq_export.parity.report import missed_gates, schema
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify

DEAD = "model.layers.1.mlp.up_proj"


def wrapped(kind: type[PassingRuntime]) -> Callable[..., ServedModel]:
    return lambda export, adapters, options: kind(packed_model(export, adapters))


class IgnoresModule(PassingRuntime):
    """Serves the second adapter without one of its modules."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        layer = inner.model("second").get_submodule(DEAD)
        layer.lora_B["default"].weight.data.zero_()


def test_a_silently_ignored_module_misses_the_gate(
    exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    serve(wrapped(IgnoresModule))
    report = verify(exported, options, console=silent)
    assert "live_modules" in missed(report)
    dead = [
        (row.adapter, entry.module)
        for row in report.liveness
        for entry in row.modules
        if entry.verdict != liveness.LIVE
    ]
    assert dead == [("second", DEAD)]
    assert f"{DEAD} of second is ignored" in str(missed_gates(report))


def test_an_ignored_module_misses_even_where_the_numbers_allow_it(
    tmp_path: Path, exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    gate = tmp_path / "gate.yaml"
    numbers = ("logprob_difference_max", "longest_difference_max", "decode_gap_max", "mixed_decode_gap_max")
    gate.write_text("".join(f"{name}: 100\n" for name in numbers) + "greedy_flips: null\n")
    serve(wrapped(IgnoresModule))
    report = verify(exported, dataclasses.replace(options, gate=gate), console=silent)
    assert missed(report) == {"live_modules"}


class Noisy(PassingRuntime):
    """Adds noise to every log-probability, the same to the same request."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        def noise(ids: Sequence[int]) -> torch.Tensor:
            return 5e-3 * torch.randn(len(ids) - 1, generator=torch.Generator().manual_seed(sum(ids)))

        answered = super().prompt_logprobs(token_ids, adapters)
        return [values + noise(ids) for values, ids in zip(answered, token_ids, strict=True)]


def test_noise_misses_the_numbers_alone(exported: Path, options: VerifyOptions, serve: Any, silent: Console) -> None:
    serve(wrapped(Noisy))
    report = verify(exported, options, console=silent)
    assert "logprob_difference_max" in missed(report)
    assert not missed(report) & {"certificate", "greedy_flips", "live_modules", "mixed_batch_difference_max"}


class Leaky(PassingRuntime):
    """Gives base requests of a mixed batch the last adapter of the batch."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        named = [adapter for adapter in adapters if adapter is not None]
        served = [adapter or named[-1] for adapter in adapters] if named else adapters
        return super().prompt_logprobs(token_ids, served)


def test_an_adapter_that_leaks_into_base_requests_misses_the_gate(
    exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    serve(wrapped(Leaky))
    report = verify(exported, options, console=silent)
    assert missed(report) == {"mixed_batch_difference_max"}
    rows = {row.adapter: row.max for row in report.isolation.by_adapter}
    assert rows[None] > 1e-2 > rows["cloq"]


class Mute(PassingRuntime):
    """Cannot generate."""

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> list[list[int]]:
        raise NotImplementedError("this engine scores only")


class Nan(PassingRuntime):
    """Gives NaN for one token."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        answered = super().prompt_logprobs(token_ids, adapters)
        answered[0][-1] = torch.nan
        return answered


class Short(PassingRuntime):
    """Drops the last token."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        return [values[:-1] for values in super().prompt_logprobs(token_ids, adapters)]


def test_a_missing_figure_misses_its_gate(exported: Path, options: VerifyOptions, serve: Any, silent: Console) -> None:
    serve(wrapped(Mute))
    report = verify(exported, options, console=silent)
    assert missed(report) == {"greedy_flips", "decode_gap_max", "mixed_decode_gap_max"}
    # Two adapters, each behind short and long prompts, and one batch of both.
    assert [entry.reason for entry in report.missing] == ["this engine scores only"] * 5
    assert "greedy_flips was not measured" in str(missed_gates(report))
    serve(wrapped(Nan))
    report = verify(exported, options, console=silent)
    assert missed(report) >= {"logprob_difference_max", "live_modules", "mixed_batch_difference_max"}
    serve(wrapped(Short))
    report = verify(exported, options, console=silent)
    assert missed(report) >= {"logprob_difference_max", "live_modules", "mixed_batch_difference_max"}
    assert "one for each token but the first" in report.missing[0].reason
    jsonschema.validate(report.to_json(), schema())


class FailsWith(PassingRuntime):
    """Scores the first adapter alone."""

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        if set(adapters) == {"second"}:
            raise EngineError("this engine has no second adapter")
        return super().prompt_logprobs(token_ids, adapters)


def test_one_adapter_that_is_not_served_makes_the_figures_missing(
    exported: Path, options: VerifyOptions, serve: Any, silent: Console
) -> None:
    serve(wrapped(FailsWith))
    report = verify(exported, options, console=silent)
    assert report.metrics["logprob_difference_max"] is None
    assert report.metrics["longest_difference_max"] is None
    assert {"logprob_difference_max", "longest_difference_max", "live_modules"} <= missed(report)
