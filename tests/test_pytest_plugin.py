"""The pytest plugin in a pytest of its own, over a verification that is a stand-in."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import SourceError, UsageError
from cloq_export.parity.gate import judge
from cloq_export.parity.report import CertificateCheck
from cloq_export.verbs import verify as verify_module

pytest_plugins = ["pytester"]

LIMITS = {"certificate": 1.0, "live_modules": 1.0}
ARGUMENTS = ("--cloq-export", "folder", "--cloq-reference", "model")


class StandIn:
    """Stands in for `verify` and `planned_gates`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, Any]] = []
        self.metrics: dict[str, float | None] = {"certificate": 1.0, "live_modules": 1.0}
        self.raises: Exception | None = None

    def planned_gates(self, export: Path, options: Any) -> dict[str, float]:
        if isinstance(self.raises, UsageError):
            raise self.raises
        return LIMITS

    def verify(self, export: Path, options: Any) -> Any:
        self.calls.append((export, options))
        if self.raises is not None:
            raise self.raises
        gates = judge(LIMITS, self.metrics)
        return types.SimpleNamespace(gates=gates, missing=(), certificate=CertificateCheck(True))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(verify_module, "verify", stand_in.verify)
    monkeypatch.setattr(verify_module, "planned_gates", stand_in.planned_gates)
    return stand_in


def test_one_test_for_each_limit_and_one_measurement(pytester: pytest.Pytester, stand_in: StandIn) -> None:
    pytester.makepyfile("def test_own(): pass")
    outcome = pytester.runpytest_inprocess(
        *ARGUMENTS,
        "-v",
        "--cloq-tasks",
        "ppl, gsm8k",
        "--cloq-adapter",
        "a=b",
        "--cloq-dtype",
        "bfloat16",
        "--cloq-windows",
        "3",
    )
    outcome.assert_outcomes(passed=3)
    assert len(stand_in.calls) == 1
    export, options = stand_in.calls[0]
    assert (export, options.reference, options.tasks) == (Path("folder"), "model", ("ppl", "gsm8k"))
    assert (options.adapters, options.dtype, options.runtime) == (("a=b",), "bfloat16", "hf")
    assert (options.windows, options.window) == (3, 512)
    outcome.stdout.fnmatch_lines(["cloq_export::live_modules PASSED*"])


def test_a_missed_limit_fails_alone_and_says_why(pytester: pytest.Pytester, stand_in: StandIn) -> None:
    stand_in.metrics["live_modules"] = None
    outcome = pytester.runpytest_inprocess(*ARGUMENTS)
    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines(["*parity gate: live_modules*", "*live_modules was not measured*"])
    assert outcome.ret == 1


def test_a_model_that_cannot_be_read_fails_every_limit_with_its_line(
    pytester: pytest.Pytester, stand_in: StandIn
) -> None:
    stand_in.raises = SourceError("there is no model at 'model'.")
    outcome = pytester.runpytest_inprocess(*ARGUMENTS)
    outcome.assert_outcomes(failed=2)
    outcome.stdout.fnmatch_lines(["there is no model at 'model'."])
    outcome.stdout.no_fnmatch_line("*Traceback*")
    assert len(stand_in.calls) == 1


def test_misuse(pytester: pytest.Pytester, stand_in: StandIn) -> None:
    outcome = pytester.runpytest_inprocess("--cloq-gate", "x")
    assert outcome.ret == 4
    outcome.stderr.fnmatch_lines(["*--cloq-gate belongs to an export*"])
    outcome = pytester.runpytest_inprocess(*ARGUMENTS[:2])
    assert outcome.ret == 4
    outcome.stderr.fnmatch_lines(["*--cloq-export needs the float model*"])
    stand_in.raises = UsageError("x.yaml sets a limit on 'y', which is not measured; did you mean z?")
    outcome = pytester.runpytest_inprocess(*ARGUMENTS)
    assert outcome.ret == 4
    outcome.stderr.fnmatch_lines(["*did you mean z?*"])


def test_nothing_happens_without_the_option(pytester: pytest.Pytester, stand_in: StandIn) -> None:
    pytester.makepyfile("def test_own(): pass")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    assert stand_in.calls == []
