"""The packages that ONNX needs besides torch."""

from __future__ import annotations

import importlib.util

from cloq_export.errors import MissingPackageError
from cloq_export.files.versions import require_versions

PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")


def require_packages() -> None:
    """Refuse to go on where a package of the extra `onnx` is missing.

    Raises:
        MissingPackageError: one is; the message names the extra.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"ONNX exports need {', '.join(name.replace('_', '-') for name in missing)}, which is not installed; "
            "install it with `pip install cloq-export[onnx]`."
        )
    require_versions("onnx")
