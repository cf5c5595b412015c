"""Untrusted texts as markdown: each stays one line, a cell, a code span or a block, whatever it holds."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

# At the start of a line these open a list, a rule or a heading: "-", "+", "=", "1." and "1)".
_BLOCK_START = re.compile(r"^(\d{0,9})([-+=.)])")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#$&])")


def label_of(key: Any) -> str:
    """Return the name of a fact as words."""
    return str(key).replace("_", " ")


def number_text(value: float) -> str:
    """Return a number as people read it: whole ones as they are, others to five digits."""
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def one_line(text: Any) -> str:
    """Return a text as one line of at most 300 characters, without control and direction characters."""
    spaced = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in str(text))
    return " ".join(spaced.split())[:300]


def prose(text: Any) -> str:
    """Return a text as one line that markdown shows as it is."""
    escaped = _MARKDOWN.sub(r"\\\1", one_line(text))
    return _BLOCK_START.sub(r"\1\\\2", escaped)


def table_cell(value: Any) -> str:
    """Return a value for a table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number_text(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(table_cell(item) for item in value)
    return code_span(value)


def code_span(text: Any) -> str:
    """Return a text as a code span, which also a table cell holds whole."""
    line = one_line(text)
    if not line:
        return ""
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}".replace("|", "\\|")


def fenced_block(text: str, language: str) -> str:
    """Return a text as a fenced block that it cannot leave."""
    lines = [
        "".join(sign for sign in line if sign == "\t" or sign.isprintable()) for line in text.strip("\n").splitlines()
    ]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    kind = language if re.fullmatch(r"[a-z]{1,20}", language) else ""
    return "\n".join([f"{fence}{kind}", *lines, fence])
