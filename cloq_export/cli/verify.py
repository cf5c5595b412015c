"""`cloq verify`: the parity gate, from bytes to served answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cloq_export.cli.options import PATH, json_option, options_of
from cloq_export.errors import GateMissedError
from cloq_export.verbs.verification.options import VerifyOptions


@click.command(name="verify")
@click.argument("export", type=PATH)
@options_of(VerifyOptions)
@json_option()
def command(export: Path, as_json: bool, **named: Any) -> None:
    """Measure whether what is served of EXPORT equals what was trained, and judge it by a gate.

    Exit code 3 if a gate is missed; what could not be measured has missed.
    """
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.parity_table import render_parity
    from cloq_export.parity.report import missed_gates
    from cloq_export.verbs.verify import verify

    with progress_console(as_json=as_json) as console:
        report = verify(export, VerifyOptions(**named), console=console)
        missed = missed_gates(report)
    emit(report.to_json(), render_parity, as_json=as_json)
    if missed:
        raise GateMissedError(f"gate missed: {missed}")
