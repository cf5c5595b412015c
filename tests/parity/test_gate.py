"""The gate: files, defaults and verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cloq_export.errors import UsageError
from cloq_export.parity.gate import (
    GATES,
    binding_limits,
    default_limits,
    explain_miss,
    judge,
    merged_limits,
    read_gate_file,
)


def written(folder: Path, text: str) -> Path:
    path = folder / "gate.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path, "perplexity_ratio: 1.2\nlogprob_difference_max: 1e-3\ngreedy_flips: null\ncertificate: true"
    )
    assert read_gate_file(path) == {
        "perplexity_ratio": 1.2,
        "logprob_difference_max": 1e-3,  # a text to YAML
        "greedy_flips": None,
        "certificate": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity_ration: 1", r"'perplexity_ration', which is not measured; did you mean perplexity_ratio"),
        ("zzz: 1", r"'zzz', which is not measured; known are certificate, "),
        ("perplexity_ratio: low", r"sets perplexity_ratio to 'low'; a number is needed"),
        ("perplexity_ratio: .nan", r"sets perplexity_ratio to nan; a number is needed"),
        ("perplexity_ratio: true", r"sets perplexity_ratio to True; a number is needed"),
        ("perplexity_ratio: [1]", r"a number is needed"),
        ("perplexity_ratio: 1\nperplexity_ratio: 2", r"'perplexity_ratio' occurs twice"),
        ("- 1", r"holds no mapping"),
        ("", r"holds no mapping"),
        ("a: [", r"is not YAML"),
        ("!!python/object:os.system {}", r"is not YAML"),
        ("? [a, b]\n: 1", r"is not YAML|not measured"),
        ("[" * 5000, r"is not YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_gate_file(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.yaml cannot be read"):
        read_gate_file(tmp_path / "nowhere.yaml")


def test_defaults_follow_precision_and_width() -> None:
    def limits(dtype: str, bits: int, **options: int) -> dict[str, float]:
        return default_limits(
            dtype, bits, ("ppl",), adapters=options.get("adapters", 2), packed=bool(options.get("packed"))
        )

    assert limits("float32", 3)["logprob_difference_max"] == 1e-3
    assert limits("float32", 2)["logprob_difference_max"] == 1e-2
    assert limits("float32", 4)["mixed_batch_difference_max"] == 1e-4
    half = limits("bfloat16", 4, packed=1)
    assert not set(half) & {"logprob_difference_max", "mixed_batch_difference_max", "greedy_flips"}
    assert half["logprob_difference_over_float"] == 2
    assert half["packed_logprob_difference_max"] == 1e-3
    assert not set(limits("float32", 4, adapters=0)) & {"live_modules", "mixed_batch_difference_max"}
    assert "gsm8k_p_value" in default_limits("float32", 4, ("gsm8k",), adapters=1, packed=False)
    for found in (limits("float32", 3), half):
        assert set(found) <= set(GATES)


def test_chosen_limits_take_the_place_of_defaults() -> None:
    assert merged_limits(
        {"certificate": 1.0, "greedy_flips": 0.0}, {"greedy_flips": None, "perplexity_ratio": 2.0}
    ) == {
        "certificate": 1.0,
        "perplexity_ratio": 2.0,
    }


def test_something_must_be_judged_whatever_was_chosen() -> None:
    defaults = default_limits("float32", 3, ("ppl", "gsm8k"), adapters=1, packed=False)
    dropped = merged_limits(defaults, dict.fromkeys(defaults))
    assert dropped == {"judged": 1.0}
    assert binding_limits(dropped) == []
    (verdict,) = judge(dropped, {"judged": 0.0}, {"judged": "why"})
    assert explain_miss(verdict) == "nothing was judged: why"
    assert "certificate" in binding_limits(defaults)


@pytest.mark.parametrize(
    ("name", "limit", "binds"),
    [
        ("certificate", 1.0, True),
        ("certificate", 0.0, False),
        ("live_modules", 0.01, True),
        ("live_modules", -1e308, False),
        ("logprob_difference_max", 5.0, True),
        ("logprob_difference_max", 1e308, False),
        ("perplexity_ratio", 1.2, True),
        ("perplexity_ratio", 1e6, False),
        ("greedy_flips", 5.0, True),
        ("greedy_flips", 6.0, False),  # as many as there are prompts
        ("gsm8k_accuracy_drop", 1.0, False),
        ("gsm8k_p_value", 0.0, False),
        ("noise_floor_max", 0.0, False),  # of the float model alone
        ("gsm8k_questions_missing", 0.0, False),  # of the questions alone
    ],
)
def test_a_limit_that_nothing_can_miss_does_not_bind(name: str, limit: float, binds: bool) -> None:
    assert binding_limits({name: limit}, {"greedy_flips": 6.0}) == ([name] if binds else [])


def test_a_gate_that_could_not_be_missed_has_missed() -> None:
    (verdict,) = judge({"gsm8k_p_value": 0.01}, {"gsm8k_p_value": 1.0}, {"gsm8k_p_value": "too few"})
    assert not verdict.passed
    assert explain_miss(verdict) == "gsm8k_p_value says nothing: too few"


def test_nothing_is_rounded_and_what_is_missing_has_missed() -> None:
    limits = {"perplexity_ratio": 1.2, "live_modules": 1.0, "greedy_flips": 0.0, "noise_floor_max": 0.0}
    just_above = math.nextafter(1.2, 2)
    metrics = {"perplexity_ratio": just_above, "live_modules": 209 / 210, "greedy_flips": math.nan}
    verdicts = {verdict.gate: verdict for verdict in judge(limits, metrics)}
    assert not any(verdict.passed for verdict in verdicts.values())
    assert verdicts["greedy_flips"].value is None
    assert verdicts["noise_floor_max"].value is None
    assert explain_miss(verdicts["perplexity_ratio"]) == f"perplexity_ratio is {just_above}, at most 1.2 is allowed"
    assert explain_miss(verdicts["noise_floor_max"]) == "noise_floor_max was not measured (at most 0.0 is asked for)"
    equal = {"perplexity_ratio": 1.2, "live_modules": 1.0, "greedy_flips": 0.0, "noise_floor_max": 0.0}
    assert all(verdict.passed for verdict in judge(limits, equal))
    assert not judge({"perplexity_ratio": 1.2}, {"perplexity_ratio": math.inf})[0].passed
