"""Stopping before every group of linears must change nothing but what the caller changes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import greenlet
import pytest
import torch
from torch import nn

from cloq_export.errors import NonFiniteError
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.lockstep import run_in_lockstep
from cloq_export.models.shared_inputs import shared_inputs
from cloq_export.models.stream import BlockStream

FLOAT, CHANGED = 0, 1
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt-neox", "opt", "falcon", "plain-moe"]

BuildModel = Callable[[str], Any]


class Walk:
    """One block of a model with two streams of hidden states, the second a little off the first."""

    def __init__(self, model: nn.Module, windows: torch.Tensor, *, index: int = 1, batch: int = 2, **options: Any):
        self.stream = BlockStream(model, find_blocks(model), windows, device="cpu", batch=batch, **options)
        self.index = index
        self.block = self.stream.blocks.modules[index]
        prefix = self.stream.blocks.prefix(index)
        self.linears = find_linears(self.block, prefix)
        exact = self.stream.hidden
        noise = torch.Generator().manual_seed(2)
        self.hidden = [exact, [states + 0.1 * torch.randn(states.shape, generator=noise) for states in exact]]
        self.names = shared_inputs(self.block, lambda: self.stream.forward_batch(index, 0, exact[0]), prefix)
        self.weights: list[dict[str, torch.Tensor]] = [
            {name: linear.weight.data for name, linear in self.linears.items()} for _ in self.hidden
        ]
        self.visits: list[tuple[int, list[dict[int, torch.Tensor]]]] = []

    def install(self, stream: int) -> None:
        for name, linear in self.linears.items():
            linear.weight.data = self.weights[stream][name]

    def visit(self, group: int, inputs: Any) -> None:
        self.visits.append((group, [dict(of_stream) for of_stream in inputs]))

    def run(self, visit: Callable[[int, Any], None] | None = None) -> list[list[torch.Tensor]]:
        groups = [[self.linears[name] for name in group] for group in self.names]
        after = run_in_lockstep(self.stream, self.index, self.hidden, groups, self.install, visit or self.visit)
        self.install(FLOAT)
        return after

    def plain(self, stream: int) -> tuple[list[torch.Tensor], dict[str, dict[int, torch.Tensor]]]:
        """Run one stream with its weights in the ordinary way; return its outputs and what each linear was given."""
        self.install(stream)
        seen: dict[str, dict[int, torch.Tensor]] = {name: {} for name in self.linears}
        batch = 0

        def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen[name][batch] = args[0]

            return hook

        handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in self.linears.items()]
        after = []
        for batch, states in enumerate(self.hidden[stream]):
            after.append(self.stream.forward_batch(self.index, batch, states))
        for handle in handles:
            handle.remove()
        self.install(FLOAT)
        return after, seen

    def assert_saw(self, inputs: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
        assert inputs.keys() == expected.keys()
        for batch, tensor in expected.items():
            assert torch.equal(inputs[batch], tensor)


def assert_same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left, right)


@pytest.fixture
def open_walk(build_model: BuildModel, token_windows: torch.Tensor) -> Callable[..., Walk]:
    def build(family: str, **options: Any) -> Walk:
        return Walk(build_model(family), token_windows, **options)

    return build


@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pausing_changes_nothing(family: str, compute: torch.dtype | None, open_walk: Callable[..., Walk]) -> None:
    walk = open_walk(family, compute=compute)
    after = walk.run()
    for stream in (FLOAT, CHANGED):
        assert_same(after[stream], walk.stream.forward_block(walk.index, walk.hidden[stream]))
    assert not torch.equal(after[FLOAT][0], after[CHANGED][0])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "plain-moe"])
def test_every_group_is_visited_once_and_in_order(family: str, open_walk: Callable[..., Walk]) -> None:
    walk = open_walk(family)
    walk.run()
    assert [group for group, _ in walk.visits] == list(range(len(walk.names)))
    for stream in (FLOAT, CHANGED):
        _, seen = walk.plain(stream)
        for group, inputs in walk.visits:
            for name in walk.names[group]:
                walk.assert_saw(inputs[stream], seen[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_exchanged_weights_serve_their_own_stream_from_then_on(family: str, open_walk: Callable[..., Walk]) -> None:
    walk = open_walk(family)
    generator = torch.Generator().manual_seed(3)

    def exchange(group: int, inputs: Any) -> None:
        walk.visit(group, inputs)
        for name in walk.names[group]:
            weight = walk.weights[FLOAT][name]
            walk.weights[CHANGED][name] = weight + 0.05 * torch.randn(weight.shape, generator=generator)

    after = walk.run(exchange)
    for stream in (FLOAT, CHANGED):
        expected, seen = walk.plain(stream)
        assert_same(after[stream], expected)
        # A layer's own weight does not reach its input, so all inputs are those behind every exchanged weight.
        for group, inputs in walk.visits:
            walk.assert_saw(inputs[stream], seen[walk.names[group][0]])


def test_experts_are_visited_once_with_every_batch_that_reaches_them(
    build_model: BuildModel, token_windows: torch.Tensor
) -> None:
    """Batches of one short window meet different experts, some of them none that the first batch met."""
    telling = 0
    for first in range(len(token_windows)):
        walk = Walk(build_model("plain-moe"), token_windows.roll(-first, 0)[:, :3], batch=1)
        walk.run()
        visited = [group for group, _ in walk.visits]
        assert visited == sorted(set(visited))
        for stream in (FLOAT, CHANGED):
            _, seen = walk.plain(stream)
            for group, inputs in walk.visits:
                for name in walk.names[group]:
                    walk.assert_saw(inputs[stream], seen[name])
            assert {name for name in seen if seen[name]} <= {name for group in visited for name in walk.names[group]}
        # What other batches bring to an expert before the first batch reaches its own must not be missed.
        experts = [set(batches) for name, batches in seen.items() if ".experts." in name]
        telling += any(
            batches and 0 not in batches and any(0 in later for later in experts[number:])
            for number, batches in enumerate(experts)
        )
    assert telling, "the first batch reaches every expert that the others reach"


@pytest.fixture
def _other_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def arithmetic() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_autocast_dtype("cpu"),
    )


@pytest.mark.usefixtures("_other_precision")
@pytest.mark.parametrize("compute", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_callers_arithmetic_holds_in_visits_and_afterwards(
    compute: torch.dtype | None, open_walk: Callable[..., Walk]
) -> None:
    walk = open_walk("llama", compute=compute)
    expected = [walk.stream.forward_block(walk.index, states) for states in walk.hidden]
    before = arithmetic()
    met = []
    after = walk.run(lambda *_: met.append(arithmetic()))
    assert met == [before] * len(walk.names)
    assert arithmetic() == before
    for stream in (FLOAT, CHANGED):
        assert_same(after[stream], expected[stream])


class StopHereError(Exception):
    pass


@pytest.mark.usefixtures("_other_precision")
@pytest.mark.parametrize("stop_at", [0, 2])
def test_an_exception_in_a_visit_leaves_nothing_behind(stop_at: int, open_walk: Callable[..., Walk]) -> None:
    walk = open_walk("llama", compute=torch.bfloat16)
    expected = walk.stream.forward_block(walk.index, walk.hidden[FLOAT])
    before = arithmetic()

    def stop(group: int, _: Any) -> None:
        if group == stop_at:
            raise StopHereError(f"group {group}")

    with pytest.raises(StopHereError, match=f"group {stop_at}") as error:
        walk.run(stop)
    assert arithmetic() == before
    assert not any(linear._forward_pre_hooks for linear in walk.linears.values())
    # Batches that were on their way are ended at once, not when somebody drops the exception.
    assert error.value.__traceback__ is not None
    running = [run for run in gc.get_objects() if issubclass(type(run), greenlet.greenlet) and run]
    assert running == [greenlet.getcurrent()]
    walk.install(FLOAT)
    assert_same(walk.stream.forward_block(walk.index, walk.hidden[FLOAT]), expected)
    assert arithmetic() == before


def test_an_exception_in_the_block_leaves_nothing_behind(open_walk: Callable[..., Walk]) -> None:
    walk = open_walk("opt")
    before = arithmetic()
    walk.hidden[CHANGED][1][0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"block model\.decoder\.layers\.1 gives NaN or Inf"):
        walk.run()
    assert arithmetic() == before
    assert not any(linear._forward_pre_hooks for linear in walk.linears.values())


def test_without_groups_it_is_a_plain_forward_pass(open_walk: Callable[..., Walk]) -> None:
    walk = open_walk("llama")
    walk.names = []
    assert_same(walk.run()[CHANGED], walk.stream.forward_block(walk.index, walk.hidden[CHANGED]))
    assert walk.visits == []
