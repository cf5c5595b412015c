"""Versions are listed without importing what they are of."""

import subprocess
import sys

import cloq_export
from cloq_export.files.versions import environment


def test_lists_versions() -> None:
    versions = environment()
    assert versions["cloq_export"] == cloq_export.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "safetensors", "platform"} <= set(versions)
    assert all(isinstance(value, str) for value in versions.values())


def test_imports_no_torch() -> None:
    code = (
        "import sys; from cloq_export.files import atomic, safe_json, versions; versions.environment(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
