"""The package itself: what it imports, and what lands on disk when it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cloq_export

ROOT = Path(__file__).parent.parent
FOLDERS = {"cloq_export": "cloq_export", "kernels": "cloq_export/kernels", "formats": "cloq_export/formats"}


def python_files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]


def test_importing_the_package_imports_no_torch():
    code = "import sys, cloq_export\nfrom cloq_export import Recipe\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_resolve():
    for name in cloq_export.__all__:
        assert getattr(cloq_export, name) is not None
    assert dir(cloq_export) == sorted(cloq_export.__all__)
    with pytest.raises(AttributeError, match="module 'cloq_export' has no attribute 'nothing'"):
        cloq_export.nothing  # noqa: B018


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_code_is_a_package(folder):
    folders = {path.parent for path in python_files(folder) if path.parent.name != "golden"}  # golden bytes are data
    bare = {path for path in folders if not (path / "__init__.py").exists()}
    assert bare == set(), "a folder without __init__.py is left out of the wheel"


@pytest.mark.slow
def test_a_wheel_holds_every_file_and_installs_nothing_beside_the_package(tmp_path: Path):
    source = tmp_path / "source"
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = (source / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    wanted = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(p.startswith(".") for p in path.parts)
    }
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names} == {"cloq_export", f"cloq_export-{cloq_export.__version__}.dist-info"}

    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(target)!r})\n"
        "import importlib.util, cloq_export, cloq_export.kernels, cloq_export.formats\n"
        f"assert all(m.__file__.startswith({str(target)!r}) "
        "for m in (cloq_export, cloq_export.kernels, cloq_export.formats))\n"
        "assert importlib.util.find_spec('kernels') is None and importlib.util.find_spec('formats') is None\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
