"""Options of the fuzz test; a longer run is `pytest tests/fuzz -m slow --fuzz-cases 100000 --fuzz-seed 7`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-cases", type=int, default=10_000, help="mutated folders in the slow fuzz test")
    group.addoption("--fuzz-seed", type=int, default=1, help="seed that the cases of both fuzz tests are made from")
    group.addoption("--fuzz-first", type=int, default=0, help="number of the first case, to replay one")


@pytest.fixture
def fuzz_option(request: pytest.FixtureRequest):
    """Return the value of an option, also where pytest was not started with this folder and does not know it."""

    def value(name: str, default: int) -> int:
        return request.config.getoption(f"--fuzz-{name}", default=default)

    return value
