"""Solves give the same bytes wherever they run, and smaller pieces where memory runs out."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cloq_export.compress import workers
from cloq_export.compress.initialisations import ClosedForm
from cloq_export.compress.plan import ModulePlan
from cloq_export.compress.solve import SolveRequest
from cloq_export.errors import UsageError
from cloq_export.models.stream import BlockStream
from cloq_export.recipe import Recipe
from cloq_export.types import LayerStats, QuantSpec
from cloq_export.verbs.quantize import quantize

CPU = torch.device("cpu")
PROBE = Path(__file__).parent / "probes" / "ray_workers.py"


def make_request(number: int = 0) -> SolveRequest:
    """Return two layers of one input, with correlated statistics."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    names = [f"layers.{number}.q", f"layers.{number}.k"]
    return SolveRequest(
        tuple(ModulePlan(name, QuantSpec(2, 16), 4) for name in names),
        {name: torch.randn(24, 32, generator=generator) for name in names},
        LayerStats(gram=x.T @ x, tokens=200),
        Recipe(error_aware=0.0),
        ClosedForm(),
    )


def assert_same(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name, layer in one.items():
        assert torch.equal(layer.quantized.codes, other[name].quantized.codes)
        assert torch.equal(layer.quantized.scales, other[name].quantized.scales)
        assert torch.equal(layer.lora.lora_A, other[name].lora.lora_A)
        assert torch.equal(layer.lora.lora_B, other[name].lora.lora_B)


def test_several_devices_give_the_bytes_of_one_in_the_order_of_the_requests():
    requests = [make_request(number) for number in range(5)]
    alone = list(workers.LocalWorkers([CPU]).solve(requests))
    shared = list(workers.LocalWorkers([CPU, CPU]).solve(requests))
    for one, other in zip(alone, shared, strict=True):
        assert_same(one, other)


def test_an_error_of_one_request_is_raised_and_no_thread_hangs():
    request = make_request()
    broken = dataclasses.replace(request, weights={})
    with pytest.raises(KeyError):
        list(workers.LocalWorkers([CPU, CPU]).solve([request, broken, request]))


def out_of_memory_above(layers: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let solves of more than so many layers run out of memory; return the list of what was tried."""
    solve, tried = workers.solve_group, []

    def limited(request):
        tried.append(len(request.plans))
        if len(request.plans) > layers:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve(request)

    monkeypatch.setattr(workers, "solve_group", limited)
    return tried


def test_where_memory_runs_out_layers_are_solved_one_by_one_and_the_certificates_say_so(monkeypatch):
    request = make_request()
    expected = workers.solve_on(request, CPU)
    tried = out_of_memory_above(1, monkeypatch)
    found = workers.solve_on(request, CPU)
    assert tried == [2, 1, 1]
    assert_same(expected, found)
    for layer in found.values():
        assert "solved one by one" in layer.certificate.notes[-1]


def test_where_no_piece_fits_the_error_goes_on(monkeypatch):
    tried = out_of_memory_above(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        workers.solve_on(make_request(), CPU)
    assert tried == [2, 1]


@pytest.mark.parametrize("fitting", [1, 0])
def test_a_walk_that_runs_out_of_memory_goes_on_with_fewer_windows(fitting, recipe_for, silent, tmp_path, monkeypatch):
    forward, tried = BlockStream.forward_batch, []

    def limited(self, index, batch_index, states):
        tried.append(states.shape[0])
        if states.shape[0] > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, index, batch_index, states)

    monkeypatch.setattr(BlockStream, "forward_batch", limited)
    if not fitting:
        with pytest.raises(UsageError, match=r"ran out with one calibration window .* a smaller `seqlen` than 32"):
            quantize(recipe_for(), tmp_path / "run", console=silent)
        return
    summary = quantize(recipe_for(), tmp_path / "run", console=silent)
    assert [tried[0], max(tried[2:])] == [4, 1]
    notes = [note for note in summary.notes if note.startswith("memory ran out: from there on 1 calibration windows")]
    assert len(notes) == 1


def test_layers_that_wait_for_each_other_are_not_given_to_a_cluster():
    with pytest.raises(UsageError, match=r"error_aware=0\.5 every layer waits .* `error_aware=0`, or `preset"):
        workers.workers_of(Recipe(solvers="ray"), CPU)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bytes_although_a_worker_is_killed(tmp_path):
    command = [sys.executable, str(PROBE), str(Path(__file__)), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"requests": 4, "same": True, "workers_killed": 1}
