"""`cloq eval`: perplexity and answers of the float model, of the codes alone and of codes with adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.gates import gate_option, judge_gates, parse_gates, raise_if_missed
from cloq_export.cli.options import PATH, json_option, options_of
from cloq_export.verbs.options import EvaluateOptions


@click.command(name="eval")
@click.argument("path", type=PATH)
@options_of(EvaluateOptions)
@gate_option()
@json_option()
def command(path: Path, gate_texts: tuple[str, ...], as_json: bool, **named: Any) -> None:
    """Measure PATH, a run or a checkpoint, and its float model: perplexity, and answers to tasks."""
    gates = parse_gates(gate_texts)

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_evaluation
    from cloq_export.verbs.evaluate import evaluate

    with progress_console(as_json=as_json) as console:
        content = evaluate(path, EvaluateOptions(**named), console=console).to_json()
    verdicts = judge_gates(gates, content)
    if verdicts:
        content["gates"] = [verdict.to_json() for verdict in verdicts]
    emit(content, render_evaluation, as_json=as_json)
    raise_if_missed(verdicts)
