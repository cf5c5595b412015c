"""`cloq verify`: the parity gate, from bytes to served answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option, split_values
from cloq_export.errors import GateMissedError, UsageError
from cloq_export.recipe import CHOICES, FIELDS


@click.command(name="verify")
@click.argument("export", type=PATH)
@click.option("--reference", metavar="MODEL", help="The float model: a folder, a hub id or a GGUF file.")
@click.option(
    "--runtime",
    type=click.Choice(["hf", "vllm", "vllm-server", "onnx"]),
    default="hf",
    show_default=True,
    help="What serves.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=FOLDER|NAME|FOLDER",
    help="Adapter to serve; can be repeated. Unless given, all that EXPORT has.",
)
@click.option(
    "--tasks",
    default="ppl",
    show_default=True,
    metavar="ppl,TASK[=FILE],...",
    help="What is measured beside the numbers; tasks as in `cloq eval`.",
)
@click.option("--gate", type=PATH, metavar="FILE", help="YAML file of limits.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the served activations.",
)
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]", help="Of transformers models.")
@click.option(
    "--text",
    default=FIELDS["eval_text"].default,
    show_default=True,
    help="wikitext2, gsm8k, embedded, a file or a hub id.",
)
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in a window.")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True, help="How many windows.")
@click.option(
    "--bos",
    type=click.Choice(CHOICES["bos"]),
    default=FIELDS["bos"].default,
    show_default=True,
    help="Begin token before each window and prompt of the text: as the tokenizer does by itself, never, or always.",
)
@click.option("--gsm8k", metavar="FILE", help="The same as --tasks gsm8k=FILE.")
@click.option(
    "--problems",
    type=click.IntRange(min=1),
    metavar="N",
    help="Questions of each task, which must be there; unless given, up to 100.",
)
@click.option("--shots", type=click.IntRange(min=0), default=0, show_default=True, help="Worked examples before each.")
@click.option("--prompts", type=click.IntRange(min=0), default=32, show_default=True, help="Greedy texts to compare.")
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Tokens in each of them.")
@click.option(
    "--longest",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens in the longest text; unless given, what is served, up to 2048.",
)
@click.option(
    "--liveness-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Tokens on which every module is shown to be live.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="The run that EXPORT was made from: its layers and adapters are compared too.",
)
@click.option(
    "--other-reference", is_flag=True, help="Take a float model that is not the revision that the run was made from."
)
@click.option("--force", is_flag=True, help="Take adapters of another base; the report says so.")
@click.option(
    "--python",
    type=PATH,
    metavar="PATH",
    help="Interpreter of the environment that has vLLM; unless given, this one.",
)
@click.option("--out", type=PATH, metavar="FOLDER", help="For parity.json and parity.html.")
@json_option()
def command(export: Path, reference: str | None, tasks: str, as_json: bool, **named: Any) -> None:
    """Measure whether what is served of EXPORT equals what was trained, and judge it by a gate.

    Exit code 3 if a gate is missed; what could not be measured has missed.
    """
    if not reference:
        raise UsageError("no float model was given; name the one that the export was made from with --reference MODEL.")
    chosen = split_values(tasks)

    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.parity_table import render_parity
    from cloq_export.parity.report import missed_gates
    from cloq_export.verbs.verification.options import VerifyOptions
    from cloq_export.verbs.verify import verify

    with progress_console(as_json=as_json) as console:
        options = VerifyOptions(reference=reference, tasks=chosen, **named)
        report = verify(export, options, console=console)
        missed = missed_gates(report)
    emit(report.to_json(), render_parity, as_json=as_json)
    if missed:
        raise GateMissedError(f"gate missed: {missed}")
