"""Say what an artefact is."""

from __future__ import annotations

from pathlib import Path

from cloq_export.artifact.inspection import describe
from cloq_export.artifact.inspection_result import Inspection


def inspect(path: Path, *, verify: bool = False, adapter: str | None = None, force: bool = False) -> Inspection:
    """Say what an artefact is: layout, bits, groups, fingerprint, sizes, bits per weight.

    Args:
        path: a run, an export, a checkpoint or an adapter folder.
        verify: read every tensor, compute the fingerprint again, and repeat the certificate where there is one.
        adapter: an adapter that is to be served on this base.
        force: describe an adapter of another base instead of refusing it.

    Raises:
        FormatError: nothing known is there, or it is damaged.
        BindingError: the adapter belongs to another base.
    """
    return describe(path, verify=verify, adapter=adapter, force=force)
