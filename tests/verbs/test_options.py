"""Values that a verb cannot take are refused by their option's rules before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloq_export.cli import main
from cloq_export.errors import UsageError
from cloq_export.recipe.checks import Options, at_least, one_of
from cloq_export.verbs.options import EvaluateOptions, ExportOptions, ServeOptions, refuse_unmeant
from cloq_export.verbs.verification.options import VerifyOptions


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["eval", "x", "--window", "1"], "error: --window is 1; it must be at least 2."),
        (["eval", "x", "--shots", "-1"], "error: --shots is -1; it must be at least 0."),
        (["serve", "x", "--port", "70000"], "error: --port is 70000; it must be between 0 and 65535."),
        (["verify", "x", "--reference", "m", "--windows", "0"], "error: --windows is 0; it must be at least 1."),
    ],
)
def test_a_number_out_of_its_limits_is_named_by_its_flag(
    typed: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert main(typed) == 2
    assert message in capsys.readouterr().err


def test_a_library_call_names_the_option_and_the_nearest_choice() -> None:
    with pytest.raises(UsageError, match=r"`dtype` is 'float23'; allowed are .* \(did you mean 'float32'\?\)\.$"):
        refuse_unmeant(ServeOptions(dtype="float23"))
    refuse_unmeant(ServeOptions(dtype=None))


@pytest.mark.parametrize("kind", [EvaluateOptions, ExportOptions, ServeOptions, VerifyOptions])
def test_defaults_keep_their_own_rules(kind: type) -> None:
    refuse_unmeant(kind())
    assert all(field.metadata.get("help", ".").endswith(".") for field in Options(kind).fields.values())


def test_rules() -> None:
    assert at_least(2).holds(2)
    assert not at_least(2).holds(1)
    assert one_of(["a", "b"]).choices == ("a", "b")
    assert not one_of(["a", "b"]).holds("c")
