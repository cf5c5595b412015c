"""Options as they are typed, in the messages of a library that only knows their names.

A message of the package puts an option in backticks: `seqlen`, or `device=cpu` with a value. On the command line it is
what a user types: --seqlen, --device cpu, or --set refine=block where the verb has no such flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from cloq_export.recipe import FIELDS, FINETUNE_PREFIX

_OPTION = re.compile(r"`([a-z][a-z0-9_.]*)(?:=([^`\s]+))?`")


def with_flags(message: str, command: click.Command) -> str:
    """Return a message with flags in place of option names.

    Args:
        message: of an error, or a note.
        command: the verb that was called; names that are no option of it or of a recipe stay as they are.
    """
    flags = {
        parameter.name: max(parameter.opts, key=len)
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }

    def typed(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name in flags:
            return flags[name] if value is None else f"{flags[name]} {value}"
        if name in FIELDS or name.startswith(FINETUNE_PREFIX):
            return f"--set {name}" if value is None else f"--set {name}={value}"
        return match[0]

    return _OPTION.sub(typed, message)


def notes_with_flags(content: Mapping[str, Any], command: click.Command) -> dict[str, Any]:
    """Return what a verb prints with flags in its notes."""
    if "notes" not in content:
        return dict(content)
    notes: Sequence[str] = content["notes"]
    return {**content, "notes": [with_flags(note, command) for note in notes]}
