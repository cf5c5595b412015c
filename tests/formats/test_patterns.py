"""Regular expressions of foreign files: they mean what they mean to `re`, and cost little whatever they say."""

from __future__ import annotations

import random
import re

import pytest

from cloq_export.errors import FormatError
from cloq_export.formats import patterns
from cloq_export.formats.patterns import NamePattern, PatternBudget, literal_name

ATOMS = ["a", "b", "0", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "[0-9a.]", "[a-]", "-", "_", r"\b", "^", "$"]


def expression(draw: random.Random, depth: int = 0) -> str:
    """Return a random expression, which `re` may refuse."""
    parts = []
    for _ in range(draw.randrange(1, 4)):
        if depth < 3 and draw.random() < 0.4:
            opened = draw.choice(["(", "(", "(?:", "(?=", "(?!", "(?P<n>"])
            options = [expression(draw, depth + 1) for _ in range(draw.randrange(1, 3))]
            part = opened + "|".join(options) + ")"
        else:
            part = draw.choice(ATOMS)
        parts.append(part + draw.choice(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,1}", "{2,}", "*?"]))
    return "".join(parts)


def test_patterns_mean_what_they_mean_to_re() -> None:
    draw = random.Random(0)
    read = matched = 0
    for _ in range(6000):
        text = expression(draw)
        try:
            engine = re.compile(text)
            pattern = NamePattern(text, source="c")
        except (re.error, FormatError):
            continue
        read += 1
        for _ in range(3):
            name = "".join(draw.choice("ab0.-_") for _ in range(draw.randrange(1, 8)))
            expected = tuple(match(name) is not None for match in (engine.match, engine.search))
            found = (pattern.matches(name), pattern.found_in(name))
            assert found == expected, (text, name)
            matched += expected[0]
    assert read > 2500
    assert 1000 < matched < 3 * read - 1000


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (r".*\.(?:1[0-9]|2[01])\..*gate.*", "model.layers.17.mlp.gate_proj", True),
        (r"^(?!.*(?:lm_head|gate)).*$", "model.layers.17.mlp.gate_proj", False),
        (r".*(?<!shared)\.up_proj", "mlp.shared.up_proj", False),
        (r"model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj$", "model.layers.3.self_attn.o_proj", True),
        (r"(.*\.)?(layers\.[0-3]\.mlp)$", "model.layers.2.mlp", True),
    ],
)
def test_patterns_that_people_write(text: str, name: str, expected: bool) -> None:
    assert NamePattern(text, source="c").matches(name) is expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(?i)a", "groups such as"),
        ("(a)\\1", "is not known here"),
        ("a{1,1000000}", "is none up to 255"),
        ("a**", "a repetition is repeated"),
        ("a*+", "possessive"),
        ("*a", "nothing stands before"),
        ("{2}a", "nothing stands before"),
        ("^*a", "a place without a character is repeated"),
        ("[z-a]", "goes backwards"),
        ("[]", "a set is not closed"),
        ("(a", "a group is not closed"),
        ("a)", "closes nothing"),
        ("\\", "is not known here"),
        ("(" * 40 + ")" * 40, "nested more than"),
        ("a" * 3000, "3000 characters"),
    ],
)
def test_patterns_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(FormatError, match=r"c: the pattern .* is not read .*; name the modules in full") as caught:
        NamePattern(text, source="c")
    assert reason in str(caught.value)


def test_hostile_patterns_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine that goes back and tries again would never come to an end of these.
    assert not NamePattern(".*" * 900 + "z$", source="c").matches("a" * 512)
    assert not NamePattern("(a?|a*)" * 280 + "b$", source="c").matches("a" * 512)
    assert not NamePattern("(a+)+$", source="c").matches("a" * 400 + "b")
    monkeypatch.setattr(patterns, "_MAX_STEPS", 100_000)
    with pytest.raises(FormatError, match=r"c: its patterns take too long to compare .*; name the modules in full"):
        NamePattern(".*(?=.*(?=.*(?=.*z)))", source="c").matches("a" * 500)
    with pytest.raises(FormatError, match=r"the module name .* has 513 characters"):
        NamePattern("a", source="c").matches("a" * 513)


def test_patterns_of_one_file_share_a_budget() -> None:
    budget = PatternBudget("c")
    budget.spend(patterns._MAX_STEPS - 1, "x")
    assert NamePattern("a", source="c", budget=budget).matches("a")
    with pytest.raises(FormatError, match="take too long"):
        NamePattern("a", source="c", budget=budget).matches("a")


def test_patterns_for_one_name_are_told() -> None:
    assert literal_name(r"^model\.layers\.0\.up-proj$") == "model.layers.0.up-proj"
    assert literal_name(r"^model\.layers\.0") is None
    assert literal_name("^model.layers$") is None
    assert literal_name(r"^a\d$") is None
