"""`cloq run`: calibrate, quantize, adapt, write and measure, in one go."""

from __future__ import annotations

import importlib
from typing import Any

import click

from cloq_export.cli.gates import gate_option, judge_gates, parse_gates, raise_if_missed
from cloq_export.cli.options import build_recipe, json_option, recipe_options
from cloq_export.errors import UsageError


@click.command(name="run")
@recipe_options
@gate_option()
@json_option()
def command(gate_texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """From MODEL to a measured 2/3/4-bit checkpoint with its adapter.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. The same command continues a run that was interrupted.
    """
    gates = parse_gates(gate_texts)
    recipe, out = build_recipe(options)
    if recipe.rank == 0 and "adapter_perplexity" in gates:
        raise UsageError(
            "--gate adapter_perplexity needs an adapter, and rank is 0; gate quantized_perplexity instead."
        )

    from cloq_export.cli.output import emit, progress_console, to_plain
    from cloq_export.cli.render import render_summary

    with progress_console(as_json=as_json) as console:
        pipeline = importlib.import_module("cloq_export.pipeline")
        summary = to_plain(pipeline.run(recipe, out, demo=options["demo"], console=console))
    if gates:
        summary["gates"] = judge_gates(gates, summary.get("perplexity") or {})
    emit(summary, render_summary, as_json=as_json)
    raise_if_missed(summary.get("gates", []))
