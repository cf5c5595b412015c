"""What a run is solved on, trained on and judged by, from its text to its report: what judges is apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiers import slow_but

import cloq_export.lab  # noqa: F401  # registers the start points
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.batches import Batches
from cloq_export.errors import CalibrationError
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import load_text, tokenize_text
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.run import run as make_run

RecipeFor = Callable[..., Recipe]
SMALL: dict[str, Any] = {"bits": 2, "samples": 8, "refine_steps": 4}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batches]:
    """What was walked through, one after the other."""
    made: list[Batches] = []
    plain = Batches.of

    def watched(*args: Any) -> Batches:
        made.append(plain(*args))
        return made[-1]

    monkeypatch.setattr(Batches, "of", watched)
    monkeypatch.setattr("cloq_export.compress.strategies.TOKENS_PER_STEP", 64)
    return made


def _rows(batches: Batches, judging: bool) -> list[tuple[int, ...]]:
    parts = batches.windows.split(list(batches.sizes))
    return [
        tuple(row)
        for number, part in enumerate(parts)
        if (number in batches.judging) == judging
        for row in part.tolist()
    ]


@pytest.mark.parametrize("refine", slow_but(["block", "model", "apiq-lw", "apiq-bw"], "block", "model"))
def test_what_judges_is_a_stretch_that_nothing_else_is_drawn_from(
    refine: str, tmp_path: Path, recipe_for: RecipeFor, silent: Console, batches: list[Batches]
) -> None:
    long = tmp_path / "long.txt"
    words = torch.randint(93, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    long.write_text(" ".join(f"w{word}" for word in words), encoding="utf-8")
    recipe = recipe_for("llama", **SMALL, refine=refine, calibration=str(long))
    summary = make_run(recipe, tmp_path / "run", console=silent)
    directory = RunDirectory.open(tmp_path / "run")
    report = directory.read_report("windows")
    (text,) = report["texts"]
    ids = tokenize_text(read_tokenizer(directory.checkpoint_path), load_text(recipe.calibration).text)
    assert text["tokens"] == len(ids)
    ((start, end),) = text["judged"]
    assert end == len(ids)
    assert max(end for kind in ("solved", "refined") for _, end in text.get(kind, [[0, 0]])) <= start
    assert report["judged_tokens_also_trained_on"] == 0
    assert ("refined" in text) == (refine == "model")

    judged = {tuple(row.tolist()) for row in ids[start:end].view(-1, recipe.seqlen)}
    trained = {
        tuple(ids[begin + recipe.seqlen * number : begin + recipe.seqlen * (number + 1)].tolist())
        for kind in ("solved", "refined")
        for begin, stop in text.get(kind, [])
        for number in range((stop - begin) // recipe.seqlen)
    }
    assert len(batches) == (2 if refine == "model" else 1)
    for made in batches:
        assert set(_rows(made, judging=True)) <= judged
        assert set(_rows(made, judging=False)) <= trained
        assert _rows(made, judging=True)
    # H is of the windows that layers are solved on, and of no others.
    assert {c.tokens for c in directory.certificates()} == {recipe.samples * recipe.seqlen}
    assert report["windows"]["solved"]["distinct_tokens"] == recipe.samples * recipe.seqlen
    assert not any("overlap" in note for note in summary.notes)


def test_a_run_that_is_not_refined_keeps_its_windows(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, batches: list[Batches]
) -> None:
    recipe = recipe_for("llama", bits=2, samples=8)
    make_run(recipe, tmp_path / "run", console=silent)
    report = RunDirectory.open(tmp_path / "run").read_report("windows")
    ids = tokenize_text(
        read_tokenizer(RunDirectory.open(tmp_path / "run").checkpoint_path), load_text(recipe.calibration).text
    )
    starts = torch.randint(len(ids) - recipe.seqlen + 1, (8,), generator=torch.Generator().manual_seed(recipe.seed))
    expected = [tuple(ids[start : start + recipe.seqlen].tolist()) for start in starts.tolist()]
    assert _rows(batches[0], judging=False) == expected
    assert list(batches[0].judging) == []
    distinct = len({place for start in starts.tolist() for place in range(start, start + recipe.seqlen)})
    assert report["windows"] == {"solved": {"count": 8, "tokens": 8 * recipe.seqlen, "distinct_tokens": distinct}}
    assert (report["bos"], report["begin_tokens"]) == ("auto", [])


def test_a_text_too_short_says_what_was_done_or_is_refused(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, batches: list[Batches]
) -> None:
    short = tmp_path / "short.txt"
    recipe = recipe_for("llama", **SMALL, refine="block", calibration=str(short))
    short.write_text(" ".join(f"w{number % 90}" for number in range(recipe.seqlen * 6)), encoding="utf-8")
    summary = make_run(recipe, tmp_path / "run", console=silent)
    told = [note for note in summary.notes if str(short) in note]
    assert len(told) == 2
    assert "1 windows of it judge the refinement, where" in told[0]
    assert f"of the 8 of {recipe.seqlen} tokens that layers are solved on, 3 overlap other windows" in told[1]
    report = RunDirectory.open(tmp_path / "run").read_report("windows")
    assert report["notes"] == told
    assert report["judged_tokens_also_trained_on"] == 0

    short.write_text(" ".join(["w1"] * (2 * recipe.seqlen - 1)), encoding="utf-8")
    with pytest.raises(
        CalibrationError, match=r"too few to hold any out: a refinement needs two windows of"
    ) as refused:
        make_run(recipe, tmp_path / "refused", console=silent)
    assert "\n" not in str(refused.value)


def test_an_adapter_that_is_made_later_keeps_the_report_of_its_own_windows(
    tmp_path: Path, recipe_for: RecipeFor, silent: Console, batches: list[Batches]
) -> None:
    make_run(recipe_for("llama", bits=2, samples=8), tmp_path / "run", console=silent)
    adapt(tmp_path / "run", {"rank": 2, "adapter_name": "small", "refine": "block", "refine_steps": 4}, console=silent)
    directory = RunDirectory.open(tmp_path / "run")
    assert "judged" not in directory.read_report("windows")["windows"]
    assert directory.read_report("windows-small")["judged_tokens_also_trained_on"] == 0
