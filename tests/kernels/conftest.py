"""Every test of a kernel runs on every instruction set that this machine can run, and the run says which those were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cloq_export.kernels import cpu


@pytest.fixture(params=["torch", *cpu.runnable_isas()])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compute with torch alone, or with one instruction set of the native library."""
    if request.param == "torch":
        monkeypatch.setattr(cpu.library, "load", lambda: None)
        yield request.param
        return
    with cpu.select_isa(request.param):
        yield request.param


@pytest.fixture
def _nan_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every new tensor with ones, which is NaN in floats, so that what is not written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.view(torch.uint8).fill_(0xFF)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the tensors are small, and waking others on a busy machine takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"kernel tests ran with torch, {', '.join(cpu.runnable_isas())}; {cpu.describe()}")
