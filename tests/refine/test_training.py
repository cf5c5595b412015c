"""Training on a small block with correlated inputs: held-out error falls, the best step is kept, nothing is random."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cloq_export.quantize.grid import fit_grid, round_to_grid
from cloq_export.refine import (
    OutputObjective,
    Refinement,
    Schedule,
    TrainedLayer,
    judging_batches,
    mean_error,
    relative_error,
    squared_error,
    train_layers,
)
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

SPEC = QuantSpec(2, 16)
WIDTH, INNER, RANK = 32, 48, 2


class Block:
    """Two layers with a gate between them and a residual, and batches of correlated inputs."""

    def __init__(self, batches: int = 9) -> None:
        generator = torch.Generator().manual_seed(1)
        mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(1.5, 0.1, WIDTH)
        self.inputs = [torch.randn(4, 16, WIDTH, generator=generator) @ mix.t() for _ in range(batches)]
        shapes = {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
        self.weights = {n: torch.randn(s, generator=generator) / s[1] ** 0.5 for n, s in shapes.items()}
        self.parameters = {n: nn.Parameter(w.clone(), requires_grad=False) for n, w in self.weights.items()}
        self.targets = [self.forward(batch) for batch in range(batches)]

    def forward(self, batch: int) -> torch.Tensor:
        states = self.inputs[batch]
        inner = nn.functional.silu(states @ self.parameters["up"].t())
        return states + inner @ self.parameters["down"].t()

    def start(self, name: str, rank: int = RANK) -> tuple[QuantizedLayer, LoraPair | None]:
        """Return rounded codes with the best pair under an identity H."""
        weight = self.weights[name]
        scales, zeros = fit_grid(weight, SPEC)
        spread = (values.float().repeat_interleave(16, 1) for values in (scales, zeros))
        layer = QuantizedLayer(round_to_grid(weight, *spread, 3).to(torch.uint8), scales, zeros, SPEC)
        if not rank:
            return layer, None
        left, values, right = torch.linalg.svd(weight - layer.dequantize(), full_matrices=False)
        pair = LoraPair(
            (values[:rank, None] * right[:rank]).half().contiguous(), left[:, :rank].half().contiguous(), float(rank)
        )
        return layer, pair

    def layers(self, *, scales: bool = True, rank: int = RANK) -> dict[str, TrainedLayer]:
        return {
            name: TrainedLayer(parameter, self.start(name, rank), dtype=torch.float32, scales=scales)
            for name, parameter in self.parameters.items()
        }

    def train(self, *, scales: bool = True, rank: int = RANK, steps: int = 120, seed: int = 0) -> Refinement:
        layers = self.layers(scales=scales, rank=rank)
        return train_layers(
            layers, OutputObjective(layers, self.forward, self.targets, [len(self.targets) - 1]), Schedule(steps, seed)
        )


def test_the_held_out_error_falls_and_all_parts_together_do_best() -> None:
    found = {
        name: Block().train(scales=scales, rank=rank)
        for name, scales, rank in (("both", True, RANK), ("pair", False, RANK), ("scales", True, 0))
    }
    for refinement in found.values():
        assert refinement.layers is not None
        assert refinement.error_after < 0.85 * refinement.error_before
        assert refinement.best_step > 0
        assert not refinement.diverged
    assert found["both"].error_before == found["pair"].error_before < found["scales"].error_before
    assert found["both"].error_after < 0.95 * found["pair"].error_after
    assert found["both"].error_after < 0.95 * found["scales"].error_after


def test_what_is_kept_is_what_was_judged() -> None:
    block = Block()
    found = block.train(steps=40)
    assert found.layers is not None
    for name, (layer, pair) in found.layers.items():
        assert pair is not None
        block.parameters[name].data = layer.dequantize() + pair.product()
    assert mean_error(block.forward, block.targets, [8]) == found.error_after
    # The last of nine batches judges, by the definition of the error.
    output, target = block.forward(8), block.targets[8]
    by_hand = ((output - target).square().sum(-1) / target.square().sum(-1)).mean()
    assert found.error_after == pytest.approx(float(by_hand), rel=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    one, again, other = (Block().train(steps=20, seed=seed).layers for seed in (0, 0, 1))
    assert one is not None
    assert again is not None
    assert other is not None
    for name, (layer, pair) in one.items():
        assert torch.equal(layer.scales, again[name][0].scales)
        assert torch.equal(pair.lora_A, again[name][1].lora_A)
        assert not torch.equal(pair.lora_A, other[name][1].lora_A)


def test_a_start_that_cannot_be_bettered_is_kept_and_training_ends_early() -> None:
    block = Block()
    for layer in block.layers().values():
        layer.install()
    block.targets = [block.forward(batch) for batch in range(9)]
    found = block.train(steps=100)
    assert found.layers is None
    assert (found.error_before, found.error_after, found.best_step, found.diverged) == (0.0, 0.0, 0, False)
    assert found.steps == 40  # four judgements of ten


@pytest.mark.parametrize("calls_before", [0, 1, 30])
def test_an_error_that_is_no_number_leaves_the_best_so_far(calls_before: int) -> None:
    block = Block()
    plain, calls = block.forward, 0

    def forward(batch: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain(batch) * (math.nan if calls > calls_before else 1.0)

    layers = block.layers()
    found = train_layers(layers, OutputObjective(layers, forward, block.targets, [8]), Schedule(50, 0))
    assert found.diverged
    assert found.steps < 50
    assert (found.layers is None) == (calls_before < 30)
    if found.layers is not None:
        assert found.error_after < found.error_before


@pytest.mark.parametrize(("trained", "judging"), [(1, 1), (8, 1), (15, 1), (16, 2), (40, 5), (64, 8), (500, 8)])
def test_one_batch_judges_for_eight(trained: int, judging: int) -> None:
    assert judging_batches(trained) == judging


def test_a_batch_that_judges_is_never_trained_on() -> None:
    block, trained = Block(batches=6), []
    layers = block.layers()
    objective = OutputObjective(layers, block.forward, block.targets, [1, 4])
    plain = objective.gradients

    def watched(batch: int) -> object:
        trained.append(batch)
        return plain(batch)

    objective.gradients = watched  # type: ignore[method-assign, assignment]
    train_layers(layers, objective, Schedule(20, 0))
    assert set(trained) == {0, 2, 3, 5}


def test_a_layer_that_no_token_reaches_stands_still() -> None:
    block = Block()
    layers = block.layers()
    start = block.start("up")
    idle = TrainedLayer(nn.Parameter(torch.empty(INNER, WIDTH)), start, dtype=torch.float32, scales=True)
    layers["idle"] = idle
    found = train_layers(layers, OutputObjective(layers, block.forward, block.targets, [8]), Schedule(10, 0))
    assert found.layers is not None
    stored, pair = found.layers["idle"]
    assert torch.equal(stored.scales, start[0].scales)
    assert torch.equal(pair.lora_B, start[1].lora_B)


def test_requires_grad_is_left_as_it_was() -> None:
    block = Block()
    block.parameters["up"].requires_grad_(True)
    block.train(steps=2)
    assert [parameter.requires_grad for parameter in block.parameters.values()] == [True, False]
    assert all(parameter.grad is None for parameter in block.parameters.values())


@pytest.mark.parametrize("measure", [relative_error, squared_error])
def test_a_perfect_output_has_no_error(measure: Callable[..., torch.Tensor]) -> None:
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert float(measure(states, states)) == 0.0
    states[0, 0] = 0.0  # a token of length zero divides nothing
    assert math.isfinite(float(measure(states + 0.1, states)))
    assert float(measure(states + 0.1, states)) > 0.0
