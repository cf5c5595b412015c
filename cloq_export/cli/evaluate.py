"""`cloq eval`: perplexity and answers of the float model, of the codes alone and of codes with adapter."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from cloq_export.cli.gates import gate_option, judge_gates, parse_gates, raise_if_missed
from cloq_export.cli.options import PATH, json_option, parse_tasks
from cloq_export.recipe import CHOICES, FIELDS


@click.command(name="eval")
@click.argument("path", type=PATH)
@click.option(
    "--text",
    default=FIELDS["eval_text"].default,
    show_default=True,
    help="wikitext2, gsm8k, embedded, a file or a hub id.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=FIELDS["eval_window"].default,
    show_default=True,
    help="Tokens in a window; each window stands on its own.",
)
@click.option(
    "--windows",
    type=click.IntRange(min=1),
    default=FIELDS["eval_windows"].default,
    show_default=True,
    help="How many windows, from the start of the text.",
)
@click.option(
    "--bos",
    type=click.Choice(CHOICES["bos"]),
    help="Begin token before each window: where the tokenizer puts one by itself (auto), never, or always; unless "
    "given, as the run has it, else auto.",
)
@click.option("--reference", metavar="MODEL", help="The float model; unless given, the one that the run was made from.")
@click.option(
    "--adapter", metavar="NAME|FOLDER", help="Adapter to measure; unless given, the run's own or the only one there is."
)
@click.option("--force", is_flag=True, help="Take an adapter of another base; the result says so.")
@click.option(
    "--tasks",
    default="ppl",
    show_default=True,
    metavar="ppl,TASK[=FILE],...",
    help="What is measured: ppl, gsm8k, word-problems, svamp, mawps, aqua, boolq, ..., or the groups arithmetic and "
    "commonsense; docs/tasks.md has them all.",
)
@click.option(
    "--problems", type=click.IntRange(min=1), help="Questions of each task, from its start; unless given, all."
)
@click.option("--shots", type=click.IntRange(min=0), default=0, show_default=True, help="Worked examples before each.")
@click.option(
    "--out",
    type=PATH,
    metavar="FOLDER",
    help="For answers, from which an interrupted call goes on, and tasks.json.",
)
@gate_option()
@json_option()
def command(
    path: Path,
    text: str,
    window: int,
    windows: int,
    bos: str | None,
    reference: str | None,
    adapter: str | None,
    force: bool,
    tasks: str,
    problems: int | None,
    shots: int,
    out: Path | None,
    gate_texts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure PATH, a run or a checkpoint, beside its float model: perplexity, and answers to tasks."""
    gates = parse_gates(gate_texts)
    chosen = parse_tasks(tasks)

    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_evaluation

    with progress_console(as_json=as_json) as console:
        pipeline = importlib.import_module("cloq_export.verbs")
        measured = pipeline.evaluate(
            path,
            text,
            window,
            windows,
            reference,
            bos=bos,
            adapter=adapter,
            force=force,
            tasks=chosen,
            problems=problems,
            shots=shots,
            out=out,
            console=console,
        )
        result = to_plain(measured)
    if gates:
        result["gates"] = judge_gates(gates, result)
    emit(result, render_evaluation, as_json=as_json)
    raise_if_missed(result.get("gates", []))
