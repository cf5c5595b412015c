"""The definitions of an installed lm-evaluation-harness; nothing of it is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

_PACKAGE = "lm_eval"
# The release whose definitions are kept here.
RELEASE = f"{_PACKAGE} 0.4.13"


def installed_definition(file: str) -> Path | None:
    """Return the file of a task's definition in the installed harness, None where there is none.

    Args:
        file: below its folder of tasks.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    paths = (Path(folder) / "tasks" / file for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def installed_release() -> str:
    """Return the name of the installed harness with its version."""
    try:
        return f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{_PACKAGE} of unknown version"
