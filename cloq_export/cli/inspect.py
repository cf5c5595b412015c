"""`cloq inspect`: what an artefact is, without loading its model."""

from __future__ import annotations

from pathlib import Path

import click

from cloq_export.cli.options import PATH, json_option


@click.command(name="inspect")
@click.argument("path", type=PATH)
@click.option(
    "--verify",
    is_flag=True,
    help="Read every tensor, compute the fingerprint again, and repeat the certificate where there is one.",
)
@click.option(
    "--adapter",
    metavar="NAME|FOLDER",
    help="Check that this adapter belongs to the base at PATH.",
)
@click.option("--force", is_flag=True, help="With --adapter: report an adapter of another base instead of refusing it.")
@json_option()
def command(path: Path, verify: bool, adapter: str | None, force: bool, as_json: bool) -> None:
    """Explain PATH: a run, an export, an adapter, or a checkpoint of another tool."""
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_facts
    from cloq_export.verbs.inspect import inspect

    with progress_console(as_json=as_json):
        content = inspect(path, verify=verify, adapter=adapter, force=force).to_json()
    emit(content, render_facts, as_json=as_json)
