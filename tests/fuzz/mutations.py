"""All mutations, in the order that a seed chooses from."""

from __future__ import annotations

import importlib

from mutating import ALL, READ, REFUSED, Files, Link, NotApplicable

__all__ = ["ALL", "READ", "REFUSED", "Files", "Link", "NotApplicable"]

# Each enters its own in the list.
for kind in ("mutated_files", "mutated_json", "mutated_headers", "mutated_tensors"):
    importlib.import_module(kind)
