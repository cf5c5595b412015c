"""Running block by block must equal the model's own forward pass, to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pretended_device import pretended_gpus
from torch import nn

from cloq_export.errors import CalibrationError, DataError, NonFiniteError, UnsupportedModelError, UsageError
from cloq_export.models import lending
from cloq_export.models.blocks import find_blocks, find_linears
from cloq_export.models.precision import forward_precision
from cloq_export.models.stream import BlockStream

FAMILIES = [
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt-neox",
    "opt",
    "falcon",
    "bloom",
    "gpt2",
    "mixtral",
    "plain-moe",
]

BuildModel = Callable[[str], Any]


def open_stream(model: nn.Module, windows: torch.Tensor, **options: Any) -> BlockStream:
    return BlockStream(model, find_blocks(model), windows, **{"device": "cpu", "batch": 2, **options})


def run_all(stream: BlockStream) -> list[torch.Tensor]:
    hidden = stream.hidden
    for index in range(len(stream.blocks)):
        hidden = stream.forward_block(index, hidden)
    return hidden


def states_after(model: nn.Module, block: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Return what a block puts out in a plain call of the whole model."""
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    handle = block.register_forward_hook(hook)
    with torch.no_grad():
        model(windows, use_cache=False)
    handle.remove()
    return seen[0]


def logits_from(model: nn.Module, block: nn.Module, states: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Return the model's logits when its last block puts out the given states."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return states if isinstance(output, torch.Tensor) else (states, *output[1:])

    handle = block.register_forward_hook(hook)
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_the_model(family: str, build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model = build_model(family)
    stream = open_stream(model, token_windows)
    assert stream.batches == 3
    final = run_all(stream)
    last = stream.blocks.modules[-1]
    for windows, states in zip(token_windows.split(2), final, strict=True):
        assert torch.equal(states, states_after(model, last, windows))
        with torch.no_grad():
            expected = model(windows).logits
        assert torch.equal(logits_from(model, last, states, windows), expected)


def test_every_block_alone_equals_the_model(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model = build_model("gemma3")
    stream = open_stream(model, token_windows, batch=5)
    hidden = stream.hidden
    for index, block in enumerate(stream.blocks):
        hidden = stream.forward_block(index, hidden)
        assert torch.equal(hidden[0], states_after(model, block, token_windows))


def test_two_streams_of_hidden_states_share_one_object(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model, compressed_model = build_model("qwen2"), build_model("qwen2")
    stream = open_stream(model, token_windows)
    plain, compressed = stream.hidden, stream.hidden
    for index, block in enumerate(stream.blocks):
        linears = find_linears(block, stream.blocks.prefix(index))
        floats = {name: linear.weight.data for name, linear in linears.items()}
        rounded = {name: (weight * 8).round() / 8 for name, weight in floats.items()}
        plain = stream.forward_block(index, plain)
        for name, linear in linears.items():
            linear.weight.data = rounded[name]
            compressed_model.get_submodule(name).weight.data = rounded[name]
        compressed = stream.forward_block(index, compressed)
        for name, linear in linears.items():
            linear.weight.data = floats[name]
    assert torch.equal(plain[0], states_after(model, stream.blocks.modules[-1], token_windows[:2]))
    other_last = find_blocks(compressed_model).modules[-1]
    assert torch.equal(compressed[0], states_after(compressed_model, other_last, token_windows[:2]))
    assert not torch.equal(plain[0], compressed[0])


def test_hooks_on_linears_see_every_batch_in_order(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    stream = open_stream(build_model("llama"), token_windows)
    seen: list[int] = []
    linear = find_linears(stream.blocks.modules[0], "")["self_attn.q_proj"]
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    kept = [states.clone() for states in stream.hidden]
    stream.forward_block(0, stream.hidden)
    assert seen == [2, 2, 1]
    assert all(map(torch.equal, kept, stream.hidden))


def test_some_batches_alone(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    stream = open_stream(build_model("mistral"), token_windows)
    all_of_them = stream.forward_block(0, stream.hidden)
    assert torch.equal(stream.forward_block(0, stream.hidden[:1])[0], all_of_them[0])
    assert torch.equal(stream.forward_batch(0, 2, stream.hidden[2]), all_of_them[2])


def test_the_model_is_left_as_it_was(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model = build_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = open_stream(model, token_windows)
    run_all(stream)
    assert not model.training
    assert all("forward" not in block.__dict__ for block in stream.blocks)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not stream.hidden[0].requires_grad


def test_a_replaced_forward_survives_the_capture(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model = build_model("llama")
    block = model.model.layers[1]
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs) * 2
    stream = open_stream(model, token_windows)
    assert "forward" in block.__dict__
    run_all(stream)


def test_masks_are_kept_once_for_all_batches(build_model: BuildModel) -> None:
    windows = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(2))
    seen: list[int] = []
    model = build_model("gemma3")
    stream = open_stream(model, windows)
    for block in stream.blocks:
        block.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(id(kwargs["attention_mask"])), with_kwargs=True
        )
    run_all(stream)
    assert len(seen) == 16
    assert len(set(seen)) == 2


def test_bfloat16_arithmetic_stays_close_and_leaves_the_setting(
    build_model: BuildModel, token_windows: torch.Tensor
) -> None:
    model = build_model("llama")
    exact = run_all(open_stream(model, token_windows))
    stream = open_stream(model, token_windows, compute=torch.bfloat16)
    inside: list[bool] = []
    stream.blocks.modules[0].register_forward_pre_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    fast = run_all(stream)
    assert inside == [True] * 3
    assert not torch.is_autocast_enabled("cpu")
    assert fast[0].dtype == torch.float32
    error = float((fast[0] - exact[0]).norm() / exact[0].norm())
    assert 1e-4 < error < 0.02


def test_float32_is_full_precision_whatever_is_set_outside(
    build_model: BuildModel, token_windows: torch.Tensor
) -> None:
    model = build_model("llama")
    exact = run_all(open_stream(model, token_windows))
    with torch.autocast("cpu", torch.bfloat16):
        inside = run_all(open_stream(model, token_windows))
    assert all(map(torch.equal, exact, inside))


def test_arithmetic_is_restored_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), forward_precision("bfloat16", "cpu"):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")


def test_exchanged_weights_are_seen_under_bfloat16(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    stream = open_stream(build_model("llama"), token_windows, compute=torch.bfloat16)
    before = stream.forward_block(0, stream.hidden)
    linear = stream.blocks.modules[0].mlp.down_proj
    linear.weight.data = torch.zeros_like(linear.weight)
    assert not torch.equal(before[0], stream.forward_block(0, stream.hidden)[0])


def test_a_bfloat16_model_runs_in_bfloat16(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model = build_model("llama").to(torch.bfloat16)
    stream = open_stream(model, token_windows, compute=torch.bfloat16)
    assert run_all(stream)[0].dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"the model is in torch\.bfloat16, so .* torch\.float32; allowed are"):
        open_stream(model, token_windows, compute=torch.float32)


def test_an_overflowing_block_is_named(build_model: BuildModel, token_windows: torch.Tensor) -> None:
    model = build_model("llama")
    stream = open_stream(model, token_windows)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    hidden = stream.forward_block(0, stream.hidden)
    with pytest.raises(NonFiniteError, match=r"block model\.layers\.1 gives NaN or Inf"):
        stream.forward_block(1, hidden)


def test_tokens_of_another_tokenizer_are_refused(build_model: BuildModel) -> None:
    with pytest.raises(DataError, match="the calibration tokens reach id 96, the model's vocabulary has 96 entries"):
        open_stream(build_model("llama"), torch.full((2, 8), 96))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (8,)])
def test_no_windows_are_refused(shape: tuple[int, ...], build_model: BuildModel) -> None:
    with pytest.raises(CalibrationError, match="at least one window"):
        open_stream(build_model("llama"), torch.zeros(shape, dtype=torch.int64))


def test_keys_and_values_that_blocks_share_belong_to_their_hidden_states(token_windows: torch.Tensor) -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size=64,
        hidden_size_per_layer_input=16,
        intermediate_size=[96] * 5,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=5,
        num_kv_shared_layers=2,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        laurel_rank=8,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    stream = open_stream(model, token_windows)
    # Two streams through one object: each block reads what its own stream wrote.
    one, other = stream.hidden, [2.0 * states for states in stream.hidden]
    for index in range(len(stream.blocks)):
        one, other = stream.forward_block(index, one), stream.forward_block(index, other)
    last = stream.blocks.modules[-1]
    for batch, windows in zip(one, token_windows.split(2), strict=True):
        assert torch.equal(batch, states_after(model, last, windows))
    assert not torch.equal(one[0], other[0])
    with pytest.raises(UnsupportedModelError, match=r"share more than hidden states .* Choose `refine=block`"):
        stream.forward_block(len(stream.blocks) - 1, [torch.zeros_like(one[0])])


class Block(nn.Module):
    """A block of a made-up model; `beside` makes it return a second value."""

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.beside = beside

    def forward(self, hidden_states: torch.Tensor, extra: Any = None) -> Any:
        after = hidden_states + self.linear(hidden_states)
        if isinstance(extra, torch.Tensor):
            after = after + extra
        return (after, after.mean()) if self.beside else after


class Loop(nn.Module):
    """A model whose loop over blocks does what `step` says."""

    def __init__(self, step: Callable[..., torch.Tensor], beside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 8)
        self.layers = nn.ModuleList([Block(beside) for _ in range(3)])
        self.step = step

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        states, carried = self.embed(input_ids), None
        for layer in self.layers:
            states, carried = self.step(layer, states, carried)
        return states


def test_a_model_outside_transformers_that_names_its_argument(token_windows: torch.Tensor) -> None:
    model = Loop(lambda layer, states, _: (layer(hidden_states=states, extra={"a": (1, states.new_ones(2))}), None))
    final = run_all(open_stream(model, token_windows))
    with torch.no_grad():
        assert torch.equal(final[0], model(token_windows[:2]))


def test_values_returned_beside_and_dropped_are_fine(token_windows: torch.Tensor) -> None:
    model = Loop(lambda layer, states, _: (layer(states)[0], None), beside=True)
    final = run_all(open_stream(model, token_windows))
    with torch.no_grad():
        assert torch.equal(final[0], model(token_windows[:2]))


def test_values_returned_beside_are_handed_to_the_next_block(token_windows: torch.Tensor) -> None:
    model = Loop(lambda layer, states, carried: layer(states, carried), beside=True)
    final = run_all(open_stream(model, token_windows))
    with torch.no_grad():
        assert torch.equal(final[0], model(token_windows[:2]))


@pytest.mark.parametrize(
    ("step", "beside", "message"),
    [
        (lambda layer, states, _: (layer(states) * 1.5, None), False, "does not hand the output .* unchanged"),
        (lambda layer, states, _: (torch.mul(*layer(states)), None), True, "does more with its blocks"),
        (lambda layer, states, _: (layer(states, states.mean()), None), False, "layers.1 of Loop receives more"),
        (lambda layer, states, _: (layer(layer(states)), None), False, "does not hand the output .* unchanged"),
        (lambda layer, states, _: (states + 0 * layer.linear(states), None), False, "did not run every block of"),
    ],
)
def test_models_that_do_more_between_blocks_are_refused(
    step: Callable[..., Any], beside: bool, message: str, token_windows: torch.Tensor
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        open_stream(Loop(step, beside), token_windows)


def test_a_block_that_returns_something_else_is_refused(token_windows: torch.Tensor) -> None:
    model = Loop(lambda layer, states, _: (layer(states), None))
    plain = model.layers[0].forward
    model.layers[0].forward = lambda *args: {"hidden": plain(*args)}
    with pytest.raises(UnsupportedModelError, match=r"block layers\.0 returns a dict"):
        open_stream(model, token_windows)


@pytest.mark.gpu
@pytest.mark.parametrize(("share", "storage"), [(0.25, "cuda"), (0.0, "cpu")])
def test_blocks_visit_the_device_and_return(
    share: float, storage: str, build_model: BuildModel, token_windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "STORAGE_SHARE", share)
    model = build_model("gemma3")
    expected = run_all(open_stream(model, token_windows))
    with contextlib.nullcontext() if torch.cuda.is_available() else pretended_gpus():
        stream = open_stream(model, token_windows, device="cuda")
        seen: list[str] = []
        stream.blocks.modules[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].device.type))
        final = run_all(stream)
        assert seen == ["cuda"] * 3
        assert final[0].device.type == storage
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert torch.allclose(final[0].cpu(), expected[0], atol=1e-4)
