"""The versions that the package declares, checks and installs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from cloq_export.cli import main
from cloq_export.errors import MissingPackageError
from cloq_export.files import versions
from cloq_export.files.versions import LOWEST, LOWEST_OF_EXTRAS, require_versions

tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest(lines: Iterable[str]) -> dict[str, str]:
    """Return package -> lower bound of requirements, each of which has one."""
    found = {}
    for requirement in map(Requirement, lines):
        (found[requirement.name],) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    return found


def test_what_is_declared_is_what_is_checked():
    assert lowest(PROJECT["dependencies"]) == LOWEST
    extras = PROJECT["optional-dependencies"]
    assert {name: lowest(extras[name]) for name in LOWEST_OF_EXTRAS} == LOWEST_OF_EXTRAS
    assert set(extras) - set(LOWEST_OF_EXTRAS) == {"test", "dev", "all"}  # of these, and of what only developers run


def test_what_make_installs_is_not_older():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = Version(version)
    for name, bound in {**LOWEST, **{k: v for of in LOWEST_OF_EXTRAS.values() for k, v in of.items()}}.items():
        found = pinned.get(name.replace("_", "-"))
        assert found is None or found >= Version(bound), name


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Return a mapping of versions that stand in for those that are installed; None is a package that is not there."""
    own: dict[str, str | None] = {}
    real_version, real_find = importlib.metadata.version, importlib.util.find_spec

    def version(name: str) -> str:
        found = own[name] if name in own else real_version(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(
        versions.importlib.util, "find_spec", lambda name: None if own.get(name, "") is None else real_find(name)
    )
    require_versions.cache_clear()
    yield own
    require_versions.cache_clear()


def test_an_older_package_is_refused_with_the_command_that_mends_it(installed):
    installed |= {"transformers": "5.9.0", "safetensors": "0.5.3", "peft": None}
    with pytest.raises(MissingPackageError) as caught:
        require_versions()
    text = str(caught.value)
    assert "this environment has no peft (0.20 or newer is needed), safetensors 0.5.3 (0.8 or newer is needed)" in text
    assert "transformers 5.9.0 (5.18 or newer is needed)" in text
    assert text.endswith("-m pip install 'peft>=0.20' 'safetensors>=0.8' 'transformers>=5.18'")


@pytest.mark.parametrize("version", ["5.18.0", "5.18.0.dev0", "5.18", "5.23.0rc1", "5.23.1+local", "not a version"])
def test_versions_that_are_taken(installed, version):
    installed["transformers"] = version
    require_versions()


def test_two_packages_that_pip_puts_together_although_they_do_not_work_together(installed):
    installed |= {"transformers": "5.24.0", "peft": "0.21.2"}
    with pytest.raises(MissingPackageError, match=r"has peft 0\.21\.2 \(0\.22 or newer is needed\)"):
        require_versions()
    require_versions.cache_clear()
    installed["peft"] = "0.22.0"
    require_versions()


def test_a_package_of_an_extra_is_checked_where_it_is_used(installed):
    installed |= {"gguf": "0.10.0", "datasets": None}
    require_versions()
    require_versions("hub")  # that it is not there is said where it is imported
    with pytest.raises(MissingPackageError, match=r"has gguf 0\.10\.0 \(0\.18 or newer is needed\)"):
        require_versions("demo")


def test_the_command_line_says_it_in_one_line_before_anything_is_read(installed, capsys):
    installed["transformers"] = "5.9.0"
    assert main(["inspect", "nothing"]) == 1
    assert capsys.readouterr().err.splitlines()[0].startswith("error: this environment has transformers 5.9.0 (5.18 or")
    assert main(["inspect", "--help"]) == 0


@pytest.mark.slow
@pytest.mark.network
def test_the_lowest_versions_work_together(tmp_path: Path):
    """Installs the lowest versions over the torch of this environment, and runs tests that use each of them."""
    python = tmp_path / "lowest" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "lowest")], check=True, timeout=300)
    site = next((tmp_path / "lowest").glob("lib/python3*/site-packages"))
    here = Path(importlib.metadata.distribution("torch").locate_file(""))
    # Behind what is installed there; with the .pth files of this environment, which may lead to the package itself.
    line = f"import site; site.addsitedir({str(here)!r})\n"
    (site / "zz-torch.pth").write_text(line, encoding="utf-8")
    wanted = {**LOWEST, **LOWEST_OF_EXTRAS["demo"]}
    pins = [f"{name}=={version}" for name, version in wanted.items() if name != "torch"]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *pins], check=True, timeout=900)
    chosen = ("models/test_source.py", "verbs/running", "verbs/finetuning", "artifact/test_model_card.py")
    files = [str(ROOT / "tests" / name) for name in chosen]
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files],
        # In the project's root transformers would take our `kernels` for the library of that name.
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
