"""What vLLM's CUDA kernels are handed is the weight that was stored; only the launch is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_marlin_and_machete_are_given_the_weights_that_are_stored(probe: Callable[..., Any]) -> None:
    handed = probe("cuda_kernels.py")
    assert len(handed) == 24
    assert {case: one["off"] for case, one in handed.items() if one["off"]} == {}
    chosen = {case: (one["kernel"], one["bits"]) for case, one in handed.items()}
    # Hopper has Machete; 2 and 3 bits go into codes of 4 where no kernel of their own is installed.
    assert chosen["8.0 2 False"] == chosen["12.0 3 True"] == ("MarlinLinearKernel", 4)
    assert chosen["9.0 2 False"] == chosen["9.0 4 True"] == ("MacheteLinearKernel", 4)
    # Beside Machete vLLM has none for 8 bits with zeros of their own.
    assert chosen["8.0 8 False"] == chosen["12.0 8 False"] == ("ours", 8)
    assert {bits for case, (_, bits) in chosen.items() if " 8 " in case} == {8}
