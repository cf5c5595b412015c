"""Where nothing can be judged the gate is missed, and says why."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jsonschema
import pytest
from parity_reports import missed
from rich.console import Console

from cloq_export.errors import (
    GateMissedError,
)
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.parity.gate import GATES
from cloq_export.parity.report import Judged, missed_gates, schema
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import planned_gates, verify


@pytest.mark.parametrize("limit", [None, pytest.param(1e308, marks=pytest.mark.slow), -1e308])
def test_a_gate_that_unlimits_everything_judges_nothing(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console, limit: float | None
) -> None:
    wide = {
        name: None if limit is None else math.copysign(1e308, 1 if GATES[name].bound == "at most" else -1)
        for name in planned_gates(exported, options)
    }
    if limit == -1e308:  # as far as shares and counts go
        wide |= {"certificate": 0, "live_modules": 0, "greedy_flips": 6, "greedy_agreement": 0, "perplexity_ratio": 1e6}
    (tmp_path / "gate.yaml").write_text(json.dumps(wide))
    report = verify(exported, dataclasses.replace(options, gate=tmp_path / "gate.yaml"), console=silent)
    assert not report.passed
    assert missed(report) == {"judged"}
    assert report.judged == Judged(False, ("every limit is dropped, or so wide that nothing can miss it",))
    assert str(missed_gates(report)).startswith("nothing was judged: every limit is dropped")
    jsonschema.validate(report.to_json(), schema())


def test_without_prompts_nothing_that_adapters_write_is_judged(
    exported: Path, options: VerifyOptions, silent: Console
) -> None:
    report = verify(exported, dataclasses.replace(options, prompts=0), console=silent)
    assert missed(report) == {"judged", "greedy_flips", "decode_gap_max", "mixed_decode_gap_max"}
    assert "no prompt was continued (`prompts=0`)" in str(missed_gates(report))


def test_a_text_shorter_than_a_window_judges_nothing(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(GateMissedError, match=r"nothing was judged: the evaluation text has 3 tokens") as raised:
        verify(exported, dataclasses.replace(options, text=str(tmp_path / "short.txt")), console=silent)
    assert raised.value.exit_code == 3


def test_an_adapter_of_zeros_is_not_live(
    tmp_path: Path, exported: Path, options: VerifyOptions, silent: Console
) -> None:
    read = read_adapter(exported / "adapters" / "second")
    zeros = {name: dataclasses.replace(pair, lora_B=0 * pair.lora_B) for name, pair in read.pairs.items()}
    write_adapter(tmp_path / "zero", zeros, base_model="m", base_fingerprint=str(read.base_fingerprint))
    report = verify(exported, dataclasses.replace(options, adapters=(str(tmp_path / "zero"),)), console=silent)
    # Beside an export that carries records, an adapter without one is not proven either.
    assert missed(report) == {"live_modules", "provenance"}
    assert "the products of all its modules are zero" in str(missed_gates(report))
