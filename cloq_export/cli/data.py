"""`cloq data`: generated word problems as JSON lines, to look at, to train on or to test with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH
from cloq_export.cli.streams import write_line
from cloq_export.errors import UsageError


@click.command(name="data")
@click.argument("name", type=click.Choice(["word-problems"]))
@click.option("--out", type=PATH, metavar="FILE", help="Unless given, standard output.")
@click.option("--count", type=int, default=2000, show_default=True, help="How many.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--most-steps", type=int, default=4, show_default=True, help="Calculations in a solution, 1 to 4.")
def command(name: str, out: Path | None, **named: Any) -> None:
    """Write generated examples, one JSON object a line, with `question` and `answer` as GSM8K has them."""
    from cloq_export.files.atomic import write_bytes
    from cloq_export.texts.word_problems import generate

    if out is not None and out.suffix.lower() != ".jsonl":
        raise UsageError(f"{out} is no name for JSON lines; end it with .jsonl.")
    rows = [{"question": each.question, "answer": each.answer} for each in generate(named.pop("count"), **named)]
    text = "\n".join(json.dumps(row) for row in rows)
    if out is None:
        write_line(text)
        return
    write_bytes(out, (text + "\n").encode("utf-8"))
    write_line(f"{len(rows)} {name} ({named['split']}) in {out}")
