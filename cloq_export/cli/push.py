"""`cloq push`: an export onto the model hub, if its certificate holds."""

from __future__ import annotations

from pathlib import Path

import click

from cloq_export.cli.options import PATH, json_option


@click.command(name="push")
@click.argument("folder", type=PATH)
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Branch to put it on; unless given, the main one.")
@click.option(
    "--token", envvar="HF_TOKEN", metavar="TOKEN", help="Of the hub; unless given, the one you logged in with."
)
@json_option()
def command(
    folder: Path, repository: str, private: bool, revision: str | None, token: str | None, as_json: bool
) -> None:
    """Upload FOLDER, an export with a certificate, as the model OWNER/NAME."""
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.render import render_facts
    from cloq_export.verbs.push import push

    with progress_console(as_json=as_json):
        result = push(folder, repository, private=private, token=token, revision=revision)
    emit(result.to_json(), render_facts, as_json=as_json)
