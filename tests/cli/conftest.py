"""Verbs that are recorded instead of done."""

from __future__ import annotations

import pytest
from recorded_verbs import RecordedVerbs


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> RecordedVerbs:
    recorded = RecordedVerbs()
    names = ("run", "quantize", "adapt", "adapt_checkpoint", "export", "convert", "push", "evaluate", "inspect")
    for name in names:
        recorded.replace(monkeypatch, name)
    return recorded
