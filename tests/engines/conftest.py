"""How the tests of loaded models compare them."""

from __future__ import annotations

import pytest

TOLERANCE = 1e-4  # of a log-probability, what the project promises in float32


@pytest.fixture(name="assert_same_model")
def _assert_same_model(log_probabilities):
    def check(model, reference):
        expected = log_probabilities(reference)
        assert expected.std() > 0.5, "a flat distribution would hide a wrong weight"
        assert (log_probabilities(model) - expected).abs().max() <= TOLERANCE

    return check
