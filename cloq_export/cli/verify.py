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

    Without --reference, EXPORT may be any base, a float model too, and it is asked whether each --adapter is applied,
    in every module. Exit code 3 if a gate is missed; what could not be measured has missed.
    """
    from cloq_export.cli.output import emit, progress_console
    from cloq_export.cli.parity_table import render_applied, render_parity
    from cloq_export.parity.report import missed_gates
    from cloq_export.verbs.verification.applied import verify_applied
    from cloq_export.verbs.verify import verify

    if named["reference"] is None and named["adapters"]:
        with progress_console(as_json=as_json) as console:
            applied = verify_applied(str(export), VerifyOptions(**named), console=console)
        emit(applied.to_json(), render_applied, as_json=as_json)
        if not applied.passed:
            raise GateMissedError(f"not shown to be applied: {applied.missed()}")
        return
    with progress_console(as_json=as_json) as console:
        report = verify(export, VerifyOptions(**named), console=console)
        missed = missed_gates(report)
    emit(report.to_json(), render_parity, as_json=as_json)
    if missed:
        raise GateMissedError(f"gate missed: {missed}")
