"""What is trained on and what judges have no token in common, and what is done where a text is short is said."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from cloq_export.errors import CalibrationError
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import CalibrationText, sample_windows
from cloq_export.texts.windows import DrawnWindows, WindowCounts, Windows, draw_windows, tokens_drawn_from, union


def _places(text: str, **options: Any) -> dict[str, list[int]]:
    """Tokenize so that no two tokens of two texts are alike: a token is its place, and thousands of its letter."""
    return {"input_ids": [place + 100_000 * (ord(text[0]) - 97) for place in range(len(text))] if text else []}


def _text(*lengths: int) -> CalibrationText:
    parts = tuple(
        CalibrationText.of(letter * length, f"text {letter}") for letter, length in zip("abc", lengths, strict=False)
    )
    if len(parts) == 1:
        return parts[0]
    whole = CalibrationText.of("".join(part.text for part in parts), "mix")
    return CalibrationText(whole.text, whole.origin, whole.sha256, parts)


def _drawn(text: CalibrationText, counts: WindowCounts, **options: Any) -> DrawnWindows:
    return draw_windows(
        _places, text, Recipe(model="m", **{"seqlen": 20, "seed": 3, "bos": "never", **options}), counts
    )


def _tokens(*kinds: Windows) -> list[int]:
    return list(itertools.chain.from_iterable(kind.ids.flatten().tolist() for kind in kinds))


@pytest.mark.parametrize("lengths", [(2000,), (1400, 1100), (900, 1300, 1700)])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_token_that_judges_is_trained_on_and_none_is_drawn_twice(lengths: tuple[int, ...], seed: int) -> None:
    drawn = _drawn(_text(*lengths), WindowCounts(30, 8, 25), seed=seed)
    judged, trained = _tokens(drawn.judging), _tokens(drawn.solving, drawn.refining)
    assert (len(judged), len(trained)) == (8 * 20, 55 * 20)
    assert len(set(judged) & set(trained)) == 0
    assert len(set(judged)) == len(judged)
    assert len(set(trained)) == len(trained)
    assert drawn.notes == ()
    # What judges is one stretch at the end of each text, which all of it lies behind.
    for number, length in enumerate(lengths):
        of_text = sorted(token - 100_000 * number for token in judged if token // 100_000 == number)
        assert of_text == list(range(of_text[0], length))
        assert of_text[0] > max(token - 100_000 * number for token in trained if token // 100_000 == number)
    report = drawn.to_json()
    assert report["judged_tokens_also_trained_on"] == 0
    assert report["refined_tokens_also_solved_on"] == 0
    assert report["distinct_tokens"] == 63 * 20
    assert report["windows"] == {
        "solved": {"count": 30, "tokens": 600, "distinct_tokens": 600},
        "judged": {"count": 8, "tokens": 160, "distinct_tokens": 160},
        "refined": {"count": 25, "tokens": 500, "distinct_tokens": 500},
    }
    told = {t + 100_000 * n for n, text in enumerate(report["texts"]) for a, b in text["solved"] for t in range(a, b)}
    assert told == set(_tokens(drawn.solving))


def test_what_is_solved_on_does_not_depend_on_what_follows() -> None:
    text = _text(2000, 1500)
    alone, refined = (_drawn(text, WindowCounts(12, 8, refining)) for refining in (0, 40))
    assert torch.equal(alone.solving.ids, refined.solving.ids)
    assert torch.equal(alone.judging.ids, refined.judging.ids)
    assert not torch.equal(alone.solving.ids, _drawn(text, WindowCounts(12, 8), seed=4).solving.ids)


def test_windows_that_nothing_is_judged_beside_lie_where_they_always_lay() -> None:
    text = _text(500, 300)
    drawn = _drawn(text, WindowCounts(7))
    expected = [
        sample_windows(torch.tensor(_places(part.text)["input_ids"]), 4 - n, 20, 3) for n, part in enumerate(text.parts)
    ]
    assert torch.equal(drawn.solving.ids, torch.stack([expected[i % 2][i // 2] for i in range(7)]))
    assert drawn.judging.ids.shape == (0, 20)
    # They may overlap, and the report counts what is distinct.
    assert drawn.to_json()["windows"]["solved"]["distinct_tokens"] == len(set(_tokens(drawn.solving)))


@pytest.mark.parametrize("counts", [WindowCounts(7), WindowCounts(7, 4), WindowCounts(7, 4, 6)])
def test_nothing_is_drawn_from_what_is_reserved(counts: WindowCounts) -> None:
    drawn = _drawn(_text(800, 700), counts, reserve=150)
    tokens = _tokens(drawn.solving, drawn.judging, drawn.refining)
    assert max(token for token in tokens if token < 100_000) < 650
    assert max(tokens) < 100_550
    assert [text["reserved"] for text in drawn.to_json()["texts"]] == [150, 150]


def test_a_text_too_short_for_all_says_what_was_done_and_still_judges_apart() -> None:
    drawn = _drawn(_text(310), WindowCounts(10, 2, 6))
    judged, trained = set(_tokens(drawn.judging)), set(_tokens(drawn.solving, drawn.refining))
    assert not judged & trained
    # 13 windows lie apart; three of those that the model is refined on overlap others.
    assert len(set(_tokens(drawn.solving))) == 200
    assert drawn.notes == (
        "the calibration text text a has 310 tokens, too few for all windows without overlap: of the 6 of 20 tokens "
        "that the model is refined on, 3 overlap other windows (none that judges)",
    )
    report = drawn.to_json()
    assert report["notes"] == list(drawn.notes)
    assert report["judged_tokens_also_trained_on"] == 0
    assert report["distinct_tokens"] == len(judged | trained)
    assert report["refined_tokens_also_solved_on"] == len(set(_tokens(drawn.solving)) & set(_tokens(drawn.refining)))


def test_a_short_text_judges_with_a_quarter_of_itself_at_most() -> None:
    drawn = _drawn(_text(180, 2000), WindowCounts(8, 16))
    assert len([1 for text, _ in drawn.judging.places if text == 0]) == 2
    assert len(drawn.judging.places) == 10
    assert drawn.notes[0] == (
        "the calibration text text a has 180 tokens: 2 windows of it judge the refinement, where 8 would"
    )
    assert not set(_tokens(drawn.judging)) & set(_tokens(drawn.solving))


def test_a_text_too_short_to_hold_anything_out_is_refused() -> None:
    message = (
        r"^the calibration text text a has 39 tokens, too few to hold any out: a refinement needs two windows of 20, "
        r"one to train on and one to judge by\. Give a longer text with `calibration`, shorter windows with `seqlen`, "
        r"or `refine=none`\.$"
    )
    with pytest.raises(CalibrationError, match=message):
        _drawn(_text(39), WindowCounts(1, 8))
    assert len(_drawn(_text(40), WindowCounts(1, 8)).judging.places) == 1
    with pytest.raises(
        CalibrationError, match=r"has 100 tokens, of which the last 85 are reserved, and one window needs"
    ):
        _drawn(_text(100), WindowCounts(1), reserve=85)
    with pytest.raises(CalibrationError, match="1 windows were asked for from a mix of 2 texts; at least one of each"):
        _drawn(_text(100, 100), WindowCounts(1))
    with pytest.raises(CalibrationError, match="the calibration text has 10 tokens, one window needs 20"):
        _drawn(_text(10), WindowCounts(1))


def test_each_window_begins_with_the_begin_token() -> None:
    def begins(text: str, *, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [*([9] if add_special_tokens else []), *_places(text)["input_ids"]]}

    recipe = Recipe(model="m", seqlen=2, seed=0)
    drawn = draw_windows(begins, _text(50), recipe, WindowCounts(3, 2))
    assert drawn.solving.ids[:, 0].tolist() == [9, 9, 9]
    assert drawn.begin == (9,)


def test_tokens_that_a_stretch_shares_with_a_run_are_counted() -> None:
    drawn = _drawn(_text(400), WindowCounts(5, 2, 4))
    report, sha256 = drawn.to_json(), drawn.texts[0].sha256
    trained = set(_tokens(drawn.solving, drawn.refining))
    for span in ((0, 400), (30, 90), (200, 201)):
        assert tokens_drawn_from(report, sha256, span) == len(trained.intersection(range(*span)))
    assert tokens_drawn_from(report, "another", (0, 400)) == 0
    assert union([(5, 9), (1, 3), (8, 12), (3, 4)]) == [(1, 4), (5, 12)]
