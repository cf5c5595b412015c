"""Whether the layers that the native CPU library computes give a token the same bits in every batch."""

from __future__ import annotations

import os

from cloq_export.errors import UsageError

DETERMINISTIC_VARIABLE = "CLOQ_EXPORT_VLLM_DETERMINISTIC"


def is_deterministic() -> bool:
    """Return what the environment variable CLOQ_EXPORT_VLLM_DETERMINISTIC says.

    Raises:
        UsageError: it is neither 0 nor 1.
    """
    said = os.environ.get(DETERMINISTIC_VARIABLE, "")
    if said not in ("", "0", "1"):
        raise UsageError(f"{DETERMINISTIC_VARIABLE} is {said!r:.40}; allowed are 1 and 0.")
    return said == "1"
