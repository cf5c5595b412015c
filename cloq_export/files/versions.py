"""Which software made a run, and which is too old for one, without importing any of it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import shlex
import sys

from packaging.version import InvalidVersion, Version

from cloq_export.errors import MissingPackageError

# The oldest versions that the fast tests were run with; pyproject.toml declares the same, and a test compares them.
LOWEST = {
    "accelerate": "1.3",
    "click": "8.4.2",
    "greenlet": "3.0",
    "httpx2": "2.0",
    "huggingface_hub": "1.31",
    "jinja2": "3.1",
    "markupsafe": "2.0",
    "numpy": "1.26",
    "packaging": "22.0",
    "peft": "0.20",
    "psutil": "5.9.4",
    "pyyaml": "6.0",
    "rich": "13.0",
    "safetensors": "0.8",
    "scipy": "1.15",
    "torch": "2.13",
    "transformers": "5.18",
}
# Of the extras, by their names in pyproject.toml.
LOWEST_OF_EXTRAS = {
    "demo": {"gguf": "0.18"},
    "hub": {"datasets": "3.0"},
    "onnx": {
        "onnx": "1.20",
        "onnx_ir": "1.1",
        "onnxruntime": "1.31",
        "onnxruntime-genai": "0.18",
        "onnxscript": "0.7",
    },
    "qlora": {"bitsandbytes": "0.46.1"},
    "ray": {"ray": "2.40"},
    "rl": {"datasets": "4.7", "trl": "1.16"},
}

# A package from a version on -> what it needs of another without declaring it, so that pip puts them together.
_TOGETHER = {("transformers", "5.24"): ("peft", "0.22")}

# Packages that are imported under another name than they are installed by.
_IMPORT_NAMES = {"pyyaml": "yaml"}
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

    return {
        "cloq_export": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        **_installed(),
    }


@functools.cache
def _installed() -> dict[str, str]:
    """Return the versions of the packages that are there; for each, the whole text that describes it is parsed."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def require_versions(extra: str | None = None) -> None:
    """Refuse an environment whose packages are older than what this package was tested with.

    Args:
        extra: check the packages of this extra, as far as they are installed; None checks those that are always needed.

    Raises:
        MissingPackageError: names every package that is too old or not there, and the command that mends it.
    """
    needed = dict(LOWEST if extra is None else LOWEST_OF_EXTRAS[extra])
    for (package, version), (other, lowest) in _TOGETHER.items():
        installed = _release(package)
        if other in needed and installed is not None and installed >= Version(version).release:
            needed[other] = lowest
    wrong = {name: fault for name, lowest in needed.items() if (fault := _fault(name, lowest, required=extra is None))}
    if wrong:
        wanted = " ".join(shlex.quote(f"{name}>={needed[name]}") for name in wrong)
        raise MissingPackageError(
            f"this environment has {', '.join(wrong.values())}; install newer versions with: "
            f"{shlex.quote(sys.executable)} -m pip install {wanted}"
        )


def _fault(package: str, lowest: str, *, required: bool) -> str:
    """Return what is wrong with an installed package, or nothing."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A package that was put there without its metadata cannot be judged.
        if not required or importlib.util.find_spec(_IMPORT_NAMES.get(package, package)) is not None:
            return ""
        return f"no {package} ({lowest} or newer is needed)"
    release = _release(package)
    too_old = release is not None and release < Version(lowest).release
    return f"{package} {installed} ({lowest} or newer is needed)" if too_old else ""


def _release(package: str) -> tuple[int, ...] | None:
    """Return the numbers of an installed version, 5.18.0 of 5.18.0.dev0; None where there are none to read."""
    try:
        return Version(importlib.metadata.version(package)).release
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None
