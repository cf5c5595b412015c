"""`cloq run`: calibrate, quantize, adapt, write and measure, in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.gates import gate_option, judge_gates, parse_gates, raise_if_missed
from cloq_export.cli.options import build_recipe, json_option, recipe_options
from cloq_export.errors import GateMissedError, UsageError


@click.command(name="run")
@recipe_options
@click.option(
    "--finetune",
    is_flag=True,
    help="With --demo: train the adapter too, export and verify. A recipe with a finetune section needs no flag.",
)
@click.option(
    "--plan",
    is_flag=True,
    help="Only say what the run would do with each layer, and what it would take of the device; --out is not needed.",
)
@gate_option()
@json_option()
def command(finetune: bool, plan: bool, gate_texts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """From MODEL to a measured 2/3/4-bit checkpoint with its adapter.

    MODEL is a Hugging Face folder, a hub id or a GGUF file. The same command continues a run that was interrupted.
    """
    gates = parse_gates(gate_texts)
    if plan:
        _show_plan({**options, "out": options["out"] or Path()}, as_json=as_json)
        return
    recipe, out = build_recipe(options, finetune=finetune)
    if gates and not recipe.measure:
        raise UsageError("--gate judges what is measured; leave --no-measure out, or gate later with `cloq eval`.")
    if recipe.rank == 0 and "adapter_perplexity" in gates:
        raise UsageError(
            "--gate adapter_perplexity needs an adapter, and rank is 0; gate quantized_perplexity instead."
        )

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_summary
    from cloq_export.verbs.run import run
    from cloq_export.verbs.run_and_finetune import run_and_finetune

    with progress_console(as_json=as_json) as console:
        if recipe.finetune:
            whole = run_and_finetune(recipe, out, demo=options["demo"], console=console)
            content, missed = whole.to_json(), whole.missed
        else:
            content, missed = run(recipe, out, demo=options["demo"], console=console).to_json(), None
    verdicts = judge_gates(gates, content["perplexity"])
    if verdicts:
        content["gates"] = [verdict.to_json() for verdict in verdicts]
    emit(content, render_summary, as_json=as_json)
    raise_if_missed(verdicts)
    if missed:
        raise GateMissedError(f"gate missed: {missed}")


def _show_plan(options: dict[str, Any], *, as_json: bool) -> None:
    recipe, _ = build_recipe(options)

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.plan_table import render_plan
    from cloq_export.verbs.plan import plan_run

    with progress_console(as_json=as_json) as console:
        content = plan_run(recipe, console=console).to_json()
    emit(content, render_plan, as_json=as_json)
