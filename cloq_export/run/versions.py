"""Which software made a run, without importing any of it."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = (
    "accelerate",
    "datasets",
    "gguf",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)


def environment() -> dict[str, str]:
    """Return the versions of Python, the platform, this package and the packages it builds on.

    Returns:
        Name -> version; packages that are not installed are left out.
    """
    from cloq_export import __version__

    versions = {
        "cloq_export": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
