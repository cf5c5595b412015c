"""Options as they are typed, in the messages of a library that only knows their names.

A message of the package puts an option in backticks: `seqlen`, or `device=cpu` with a value. On the command line it is
what a user types: --seqlen, --device cpu, or --set refine=block where no verb has such a flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from cloq_export.recipe import FIELDS, FINETUNE_PREFIX

_OPTION = re.compile(r"`([a-z][a-z0-9_.]*)(?:=('[^`']*'|[^`\s]+))?`")


def with_flags(message: str, command: click.Command) -> str:
    """Return a message with flags in place of option names.

    Args:
        message: of an error, or a note.
        command: the verb that was called. What only a recipe has is named as `cloq run` takes it; names that are
            neither an option of the verb nor of a recipe stay as they are.
    """
    # Imported when a message is shown, so that other verbs start without the options of `run`.
    from cloq_export.cli.run import command as run

    own, of_run = _flags(command), _flags(run)

    def typed(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        is_option = name in FIELDS or name.startswith(FINETUNE_PREFIX)
        flag = own.get(name) or (of_run.get(name) if is_option else None)
        if flag is not None:
            return _typed(flag, value)
        if is_option:
            return f"--set {name}" if value is None else f"--set {name}={value}"
        return match[0]

    return _OPTION.sub(typed, message)


def _flags(command: click.Command) -> dict[str | None, click.Option]:
    return {option.name: option for option in command.params if isinstance(option, click.Option)}


def _typed(option: click.Option, value: str | None) -> str:
    flag = max(option.opts, key=len)
    if option.is_flag and value in ("true", "false"):
        return flag if value == "true" else max(option.secondary_opts, key=len)
    return flag if value is None else f"{flag} {value}"


def notes_with_flags(content: Mapping[str, Any], command: click.Command) -> dict[str, Any]:
    """Return what a verb prints with flags in its notes."""
    if "notes" not in content:
        return dict(content)
    notes: Sequence[str] = content["notes"]
    return {**content, "notes": [with_flags(note, command) for note in notes]}
