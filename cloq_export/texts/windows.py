"""Which stretches of a calibration text are solved on, trained on and judged by: no token that judges is in another."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from cloq_export.errors import CalibrationError
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import CalibrationText, check_room, sample_starts
from cloq_export.texts.tokens import TextTokens

# At most this share of a text judges: where it is short, training needs it more.
_JUDGING_SHARE = 4
# (first token, the one behind the last), in order and apart from each other.
Spans = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class WindowCounts:
    """How many windows a run draws.

    Args:
        solving: layers are solved on, and the blocks of a refinement trained.
        judging: judge a refinement; 0 where nothing is refined.
        refining: a refinement of the whole model trains on.
    """

    solving: int
    judging: int = 0
    refining: int = 0


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of one purpose.

    Args:
        ids: token ids, (windows, seqlen) int64.
        places: for each the number of its text, and its first token there; begin tokens are not counted.
    """

    ids: torch.Tensor
    places: tuple[tuple[int, int], ...]

    def spans(self, text: int, room: int) -> Spans:
        """Return the stretches of one text that the windows cover, `room` tokens each."""
        return union((start, start + room) for number, start in self.places if number == text)


@dataclasses.dataclass(frozen=True)
class DrawnWindows:
    """All windows of a run.

    Args:
        solving: layers are solved on.
        judging: judge a refinement; none where nothing is refined.
        refining: a refinement of the whole model trains on.
        texts: what they are cut from.
        sizes: tokens of each text, what is reserved counted.
        reserved: tokens at the end of each text that no window is drawn from.
        room: tokens of a text in a window.
        begin: tokens that stand before them in each window.
        notes: where a text was too short, and what was done.
    """

    solving: Windows
    judging: Windows
    refining: Windows
    texts: tuple[CalibrationText, ...]
    sizes: tuple[int, ...]
    reserved: int
    room: int
    begin: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def distinct(self, *of: Windows) -> int:
        """Return how many tokens of the texts are in some windows, each counted once."""
        return sum(length(self._spans(number, *of)) for number in range(len(self.texts)))

    def shared(self, one: Windows, other: Windows) -> int:
        """Return how many tokens of the texts are in windows of both kinds."""
        return self.distinct(one) + self.distinct(other) - self.distinct(one, other)

    def to_json(self) -> dict[str, Any]:
        """Return what a run's report says of its windows."""
        kinds = {"solved": self.solving, "judged": self.judging, "refined": self.refining}
        return {
            "windows": {
                name: {
                    "count": len(kind.places),
                    "tokens": len(kind.places) * self.room,
                    "distinct_tokens": self.distinct(kind),
                }
                for name, kind in kinds.items()
                if kind.places
            },
            "distinct_tokens": self.distinct(*kinds.values()),
            "judged_tokens_also_trained_on": (
                self.distinct(self.judging)
                + self.distinct(self.solving, self.refining)
                - self.distinct(self.judging, self.solving, self.refining)
            ),
            "refined_tokens_also_solved_on": self.shared(self.solving, self.refining),
            "begin_tokens": list(self.begin),
            "texts": [
                {
                    "origin": text.origin,
                    "sha256": text.sha256,
                    "tokens": self.sizes[number],
                    "reserved": self.reserved,
                    **{name: self._spans(number, kind) for name, kind in kinds.items() if kind.places},
                }
                for number, text in enumerate(self.texts)
            ],
            "notes": list(self.notes),
        }

    def _spans(self, text: int, *of: Windows) -> Spans:
        return union(itertools.chain.from_iterable(kind.spans(text, self.room) for kind in of))


def draw_windows(tokenizer: Any, calibration: CalibrationText, recipe: Recipe, counts: WindowCounts) -> DrawnWindows:
    """Return the windows of a run; of a mix, window i is from the text i modulo their number.

    Where nothing judges, windows lie anywhere in a text before its reserved end, each drawn by itself. Where a
    refinement is judged, its windows are the last of each text before that end, one behind the other, and nothing else
    is drawn from there. The rest of the text is cut into windows at a random offset; those that layers are solved on
    are drawn from them without repetition, then those that the model is refined on. Once a text has none left, windows
    lie anywhere in the rest, and a note says so.

    Args:
        tokenizer: a transformers tokenizer.
        calibration: one text or a mix.
        recipe: seqlen, seed, bos and reserve.
        counts: how many windows of each kind, at least one to solve on.

    Raises:
        CalibrationError: a text is too short for one window, or with a refinement for one to train on and one to judge
            by; or there are fewer windows than texts.
        UsageError: as `TextTokens.window_begin`, or a window has no room behind the begin tokens.
    """
    tokens = TextTokens(tokenizer)
    begin = tokens.window_begin(recipe.bos)
    check_room(begin, recipe.seqlen)
    texts = calibration.parts or (calibration,)
    if 1 <= counts.solving < len(texts):
        raise CalibrationError(
            f"{counts.solving} windows were asked for from a mix of {len(texts)} texts; at least one of each is needed "
            "(`samples`)."
        )
    room = recipe.seqlen - len(begin)
    ids = [torch.tensor(tokens.text_ids(text.text), dtype=torch.int64) for text in texts]
    stretches = [
        _Stretch(text.origin, len(own), recipe.reserve, room, recipe.seed) for text, own in zip(texts, ids, strict=True)
    ]
    # Every text judges, and none of them more than its share.
    judging = max(counts.judging, len(texts)) if counts.judging else 0
    starts = [
        stretch.draw(*(_turns(count, number, len(texts)) for count in (counts.solving, judging, counts.refining)))
        for number, stretch in enumerate(stretches)
    ]
    first = torch.tensor(begin, dtype=torch.int64)

    def windows(kind: int) -> Windows:
        places = _taken_in_turn([own[kind] for own in starts])
        rows = [torch.cat([first, ids[text][start : start + room]]) for text, start in places]
        return Windows(torch.stack(rows) if rows else torch.empty(0, recipe.seqlen, dtype=torch.int64), places)

    notes = tuple(note for stretch in stretches for note in stretch.notes)
    sizes = tuple(len(own) for own in ids)
    return DrawnWindows(windows(0), windows(1), windows(2), texts, sizes, recipe.reserve, room, begin, notes)


class _Stretch:
    """One text before its reserved end.

    Args:
        origin: of the text, for messages.
        size: its tokens.
        reserve: tokens at its end that no window is drawn from.
        room: tokens of a window.
        seed: of the draw.
    """

    def __init__(self, origin: str, size: int, reserve: int, room: int, seed: int) -> None:
        self._origin, self._room, self._seed = origin, room, seed
        self._limit = size - reserve
        self._told = f"the calibration text {origin} has {size} tokens" + (
            f", of which the last {reserve} are reserved" if reserve else ""
        )
        if reserve and self._limit < room:
            raise CalibrationError(
                f"{self._told}, and one window needs {room}; give a longer text with `calibration`, shorter windows "
                "with `seqlen`, or a smaller `reserve`."
            )
        self.notes: list[str] = []

    def draw(self, solving: int, judging: int, refining: int) -> tuple[list[int], list[int], list[int]]:
        """Return the first tokens of windows of each kind."""
        if not judging:
            return sample_starts(self._limit, solving, self._room, self._seed).tolist(), [], []
        whole = self._limit // self._room
        if whole < 2:
            raise CalibrationError(
                f"{self._told}, too few to hold any out: a refinement needs two windows of {self._room}, one to train "
                "on and one to judge by. Give a longer text with `calibration`, shorter windows with `seqlen`, or "
                "`refine=none`."
            )
        judges = min(judging, max(1, whole // _JUDGING_SHARE))
        if judges < judging:
            self.notes.append(f"{self._told}: {judges} windows of it judge the refinement, where {judging} would")
        rest = self._limit - judges * self._room
        cells = rest // self._room
        generator = torch.Generator().manual_seed(self._seed)
        offset = int(torch.randint(rest - cells * self._room + 1, (1,), generator=generator))
        free = (torch.randperm(cells, generator=generator) * self._room + offset).tolist()

        def take(count: int, what: str) -> list[int]:
            taken, free[:] = free[:count], free[count:]
            missing = count - len(taken)
            if missing:
                self.notes.append(
                    f"{self._told}, too few for all windows without overlap: of the {count} of {self._room} tokens "
                    f"that {what}, {missing} overlap other windows (none that judges)"
                )
            return taken + torch.randint(rest - self._room + 1, (missing,), generator=generator).tolist()

        solved = take(solving, "layers are solved on")
        refined = take(refining, "the model is refined on")
        return solved, [rest + number * self._room for number in range(judges)], refined


def _turns(count: int, number: int, texts: int) -> int:
    """Return how many of so many windows come from one of the texts."""
    return len(range(number, count, texts))


def _taken_in_turn(starts: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Return (text, start) of all windows; a text that has no more is passed over."""
    longest = max(map(len, starts))
    return tuple((text, own[turn]) for turn in range(longest) for text, own in enumerate(starts) if turn < len(own))


def union(spans: Iterable[tuple[int, int]]) -> Spans:
    """Return what some stretches cover together, in order and apart from each other.

    Args:
        spans: (first token, the one behind the last), in any order.
    """
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def length(spans: Spans) -> int:
    """Return how many tokens stretches cover that are apart from each other."""
    return sum(end - start for start, end in spans)


def tokens_drawn_from(report: Mapping[str, Any], sha256: str, span: tuple[int, int]) -> int:
    """Return how many tokens of a stretch of a text a run was solved or trained on, by the report of its windows.

    Args:
        report: as `DrawnWindows.to_json` gives it.
        sha256: of the text; of another one that the report names, nothing is counted.
        span: the stretch.
    """
    drawn: list[tuple[int, int]] = []
    for text in report.get("texts", ()):
        if text.get("sha256") == sha256:
            drawn += [(start, end) for kind in ("solved", "refined") for start, end in text.get(kind, ())]
    return length(union((max(start, span[0]), min(end, span[1])) for start, end in union(drawn)))
