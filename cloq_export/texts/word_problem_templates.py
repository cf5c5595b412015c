"""Templates of grade-school word problems: the story, the question, and the steps of the solution."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


class Draw:
    """Random choices; of the standard generator only `random()` is promised to stay the same between Pythons."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)

    def between(self, least: int, most: int) -> int:
        """Return a whole number of `least..most`, both included."""
        return least + int(self._generator.random() * (most - least + 1))

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Return one of several items."""
        return items[self.between(0, len(items) - 1)]

    def two(self, items: Sequence[_Item]) -> tuple[_Item, _Item]:
        """Return two items that differ."""
        first = self.between(0, len(items) - 1)
        second = self.between(0, len(items) - 2)
        return items[first], items[second + (second >= first)]


@dataclasses.dataclass(frozen=True)
class _Person:
    name: str
    they: str
    them: str

    @property
    def starting(self) -> str:
        """Return the pronoun as the first word of a sentence."""
        return self.they.capitalize()


@dataclasses.dataclass(frozen=True)
class Draft:
    """A problem before its split is known: its numbers, its text, and (what a line says, calculation, unit)."""

    numbers: tuple[int, ...]
    question: str
    steps: tuple[tuple[str, str, str], ...]


_PEOPLE = (
    *(_Person(name, "she", "her") for name in ("Anna", "Maria", "Lily", "Grace", "Nora", "Emma", "Zoe", "Ruth", "Mei")),
    *(_Person(name, "he", "him") for name in ("Tom", "Ben", "Omar", "Jack", "Leo", "Sam", "Noah", "Raj", "Luis")),
)
_THINGS = ("apples", "marbles", "stickers", "books", "pencils", "shells", "coins", "cards", "beads", "stamps")
_GOODS = ("notebook", "cup", "toy car", "plate", "candle", "puzzle", "ticket", "plant")
_PACKS = ("box", "bag", "basket", "pack")
_PACK_PLURALS = {"box": "boxes", "bag": "bags", "basket": "baskets", "pack": "packs"}
_BAKED = ("muffins", "cookies", "rolls", "buns")


def _gain(draw: Draw) -> Draft:
    who, thing = draw.pick(_PEOPLE), draw.pick(_THINGS)
    has, more = draw.between(3, 40), draw.between(2, 30)
    verb = draw.pick(("finds", "buys", "wins", "gets"))
    return Draft(
        (has, more),
        f"{who.name} has {has} {thing}. Then {who.they} {verb} {more} more. How many {thing} does {who.name} have now?",
        ((f"{who.name} has", f"{has}+{more}", f"{thing} now"),),
    )


def _loss(draw: Draw) -> Draft:
    (who, other), thing = draw.two(_PEOPLE), draw.pick(_THINGS)
    given, kept = draw.between(2, 25), draw.between(2, 30)
    has = given + kept
    return Draft(
        (has, given),
        f"{who.name} had {has} {thing} and gave {given} of them to {other.name}. How many {thing} does {who.name} have "
        "left?",
        ((f"{who.name} has", f"{has}-{given}", f"{thing} left"),),
    )


def _packs(draw: Draw) -> Draft:
    pack, thing = draw.pick(_PACKS), draw.pick(_THINGS)
    packs, each = draw.between(2, 12), draw.between(3, 12)
    return Draft(
        (packs, each),
        f"There are {packs} {_PACK_PLURALS[pack]} on the table with {each} {thing} in each {pack}. How many {thing} "
        "are there in total?",
        (("There are", f"{packs}*{each}", f"{thing} in total"),),
    )


def _share(draw: Draw) -> Draft:
    who, thing = draw.pick(_PEOPLE), draw.pick(_THINGS)
    friends, each = draw.between(2, 10), draw.between(2, 12)
    has = friends * each
    return Draft(
        (has, friends),
        f"{who.name} shares {has} {thing} equally among {friends} friends. How many {thing} does each friend get?",
        (("Each friend gets", f"{has}/{friends}", thing),),
    )


def _more_than(draw: Draw) -> Draft:
    (who, other), thing = draw.two(_PEOPLE), draw.pick(_THINGS)
    has, more = draw.between(3, 30), draw.between(2, 20)
    return Draft(
        (has, more),
        f"{who.name} has {has} {thing}. {other.name} has {more} more {thing} than {who.name}. How many {thing} do they "
        "have together?",
        (
            (f"{other.name} has", f"{has}+{more}", thing),
            ("Together they have", f"{has}+{has + more}", thing),
        ),
    )


def _times_as_many(draw: Draw) -> Draft:
    (who, other), thing = draw.two(_PEOPLE), draw.pick(_THINGS)
    has, times = draw.between(3, 15), draw.between(2, 5)
    return Draft(
        (has, times),
        f"{who.name} has {has} {thing}. {other.name} has {times} times as many {thing} as {who.name}. How many {thing} "
        "do they have together?",
        (
            (f"{other.name} has", f"{times}*{has}", thing),
            ("Together they have", f"{has}+{times * has}", thing),
        ),
    )


def _change(draw: Draw) -> Draft:
    who, good = draw.pick(_PEOPLE), draw.pick(_GOODS)
    count, price, change = draw.between(2, 8), draw.between(2, 9), draw.between(2, 20)
    paid = count * price + change
    return Draft(
        (count, price, paid),
        f"{who.name} buys {count} {good}s for ${price} each and pays with ${paid}. How many dollars does {who.they} "
        "get back?",
        (
            (f"The {good}s cost", f"{count}*{price}", "dollars"),
            (f"{who.name} gets back", f"{paid}-{count * price}", "dollars"),
        ),
    )


def _packs_left(draw: Draw) -> Draft:
    who, thing, pack = draw.pick(_PEOPLE), draw.pick(_THINGS), draw.pick(_PACKS)
    packs, each = draw.between(2, 9), draw.between(3, 12)
    sold = draw.between(2, packs * each - 2)
    return Draft(
        (packs, each, sold),
        f"{who.name} fills {packs} {_PACK_PLURALS[pack]} with {each} {thing} each. {who.starting} sells {sold} "
        f"{thing}. How many {thing} does {who.name} still have?",
        (
            (f"{who.name} has", f"{packs}*{each}", thing),
            ("Still there are", f"{packs * each}-{sold}", thing),
        ),
    )


def _wages(draw: Draw) -> Draft:
    who = draw.pick(_PEOPLE)
    hours, days, wage = draw.between(2, 8), draw.between(2, 6), draw.between(2, 12)
    return Draft(
        (hours, days, wage),
        f"{who.name} works {hours} hours a day for {days} days and earns ${wage} an hour. How many dollars does "
        f"{who.they} earn?",
        (
            (f"{who.name} works", f"{hours}*{days}", "hours"),
            (f"{who.starting} earns", f"{hours * days}*{wage}", "dollars"),
        ),
    )


def _bus(draw: Draw) -> Draft:
    off, kept, on = draw.between(2, 20), draw.between(2, 25), draw.between(2, 20)
    start = off + kept
    return Draft(
        (start, off, on),
        f"A bus has {start} passengers. At the next stop {off} of them get off and {on} new passengers get on. How "
        "many passengers are on the bus now?",
        (
            ("After the others get off there are", f"{start}-{off}", "passengers"),
            ("Now there are", f"{kept}+{on}", "passengers"),
        ),
    )


def _ages(draw: Draw) -> Draft:
    who, other = draw.two(_PEOPLE)
    age, older, years = draw.between(4, 30), draw.between(2, 20), draw.between(2, 15)
    return Draft(
        (age, older, years),
        f"{who.name} is {age} years old. {other.name} is {older} years older than {who.name}. How old will "
        f"{other.name} be in {years} years?",
        (
            (f"{other.name} is now", f"{age}+{older}", "years old"),
            (f"In {years} years {other.they} will be", f"{age + older}+{years}", "years old"),
        ),
    )


def _half_used(draw: Draw) -> Draft:
    who, thing = draw.pick(_PEOPLE), draw.pick(_THINGS)
    half, more = draw.between(3, 25), draw.between(2, 20)
    return Draft(
        (2 * half, more),
        f"{who.name} has {2 * half} {thing} and gives half of them away. Then {who.they} buys {more} more. How many "
        f"{thing} does {who.name} have now?",
        (
            (f"{who.name} keeps", f"{2 * half}/2", thing),
            (f"Now {who.they} has", f"{half}+{more}", thing),
        ),
    )


def _two_kinds(draw: Draw) -> Draft:
    who, (thing, other_thing) = draw.pick(_PEOPLE), draw.two(_THINGS)
    packs, each = draw.between(2, 7), draw.between(3, 10)
    other_packs, other_each = draw.between(2, 7), draw.between(3, 10)
    first, second = packs * each, other_packs * other_each
    return Draft(
        (packs, each, other_packs, other_each),
        f"{who.name} buys {packs} bags with {each} {thing} each and {other_packs} boxes with {other_each} "
        f"{other_thing} each. How many things does {who.they} buy in total?",
        (
            ("The bags hold", f"{packs}*{each}", thing),
            ("The boxes hold", f"{other_packs}*{other_each}", other_thing),
            (f"In total {who.they} buys", f"{first}+{second}", "things"),
        ),
    )


def _reading(draw: Draw) -> Draft:
    who = draw.pick(_PEOPLE)
    pages, days, sunday, left = draw.between(4, 12), draw.between(2, 6), draw.between(3, 20), draw.between(5, 40)
    read = pages * days + sunday
    return Draft(
        (read + left, pages, days, sunday),
        f"A book has {read + left} pages. {who.name} reads {pages} pages a day for {days} days and {sunday} pages on "
        "Sunday. How many pages are left to read?",
        (
            (f"In {days} days {who.name} reads", f"{pages}*{days}", "pages"),
            (f"With Sunday {who.they} has read", f"{pages * days}+{sunday}", "pages"),
            ("There are", f"{read + left}-{read}", "pages left"),
        ),
    )


def _pooled(draw: Draw) -> Draft:
    (who, other), thing = draw.two(_PEOPLE), draw.pick(_THINGS)
    friends, each = draw.between(2, 6), draw.between(4, 12)
    first = draw.between(2, friends * each - 2)
    second, lost = friends * each - first, draw.between(2, each - 2)
    return Draft(
        (first, second, friends, lost),
        f"{who.name} has {first} {thing} and {other.name} has {second} {thing}. They share all of them equally among "
        f"{friends} children. Each child then loses {lost} of them. How many {thing} does each child have left?",
        (
            ("Together they have", f"{first}+{second}", thing),
            ("Each child gets", f"{first + second}/{friends}", thing),
            ("Each child has", f"{each}-{lost}", f"{thing} left"),
        ),
    )


def _shopping(draw: Draw) -> Draft:
    who, (good, other_good) = draw.pick(_PEOPLE), draw.two(_GOODS)
    count, price = draw.between(2, 6), draw.between(2, 9)
    other_count, other_price = draw.between(2, 6), draw.between(2, 9)
    first, second, left = count * price, other_count * other_price, draw.between(2, 30)
    return Draft(
        (first + second + left, count, price, other_count, other_price),
        f"{who.name} has ${first + second + left}. {who.starting} buys {count} {good}s for ${price} each and "
        f"{other_count} {other_good}s for ${other_price} each. How many dollars does {who.name} have left?",
        (
            (f"The {good}s cost", f"{count}*{price}", "dollars"),
            (f"The {other_good}s cost", f"{other_count}*{other_price}", "dollars"),
            ("Together they cost", f"{first}+{second}", "dollars"),
            (f"{who.name} has", f"{first + second + left}-{first + second}", "dollars left"),
        ),
    )


def _bakery(draw: Draw) -> Draft:
    who, baked = draw.pick(_PEOPLE), draw.pick(_BAKED)
    trays, each = draw.between(2, 6), draw.between(4, 12)
    more_trays, more_each = draw.between(2, 6), draw.between(4, 12)
    first, second = trays * each, more_trays * more_each
    sold = draw.between(2, first + second - 2)
    return Draft(
        (trays, each, more_trays, more_each, sold),
        f"In the morning {who.name} bakes {trays} trays of {each} {baked}. In the afternoon {who.they} bakes "
        f"{more_trays} trays of {more_each} {baked}. {who.starting} sells {sold} {baked}. How many {baked} are left?",
        (
            (f"In the morning {who.name} bakes", f"{trays}*{each}", baked),
            (f"In the afternoon {who.they} bakes", f"{more_trays}*{more_each}", baked),
            ("In total there are", f"{first}+{second}", baked),
            ("There are", f"{first + second}-{sold}", f"{baked} left"),
        ),
    )


# Template -> (calculations of its solution, what draws one).
TEMPLATES: dict[str, tuple[int, Callable[[Draw], Draft]]] = {
    "gain": (1, _gain),
    "loss": (1, _loss),
    "packs": (1, _packs),
    "share": (1, _share),
    "more than": (2, _more_than),
    "times as many": (2, _times_as_many),
    "change": (2, _change),
    "packs left": (2, _packs_left),
    "wages": (2, _wages),
    "bus": (2, _bus),
    "ages": (2, _ages),
    "half used": (2, _half_used),
    "two kinds": (3, _two_kinds),
    "reading": (3, _reading),
    "pooled": (3, _pooled),
    "shopping": (4, _shopping),
    "bakery": (4, _bakery),
}
