"""Mixtures of experts in an engine of vLLM on the CPU, against the packed transformers runtime on the same files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cloq_export.engines.vllm.engine import VllmModel
from cloq_export.errors import FormatError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_on_cpu")]

GENERATOR = torch.Generator().manual_seed(3)
SEQUENCES = [torch.randint(96, (length,), generator=GENERATOR).tolist() for length in (12, 5, 9, 2, 17, 1, 30, 7)]
ADAPTERS = [None, "one", "two", None, "two", "one", None, "one"]
# Dense layers beside mixtures; other names in files than in memory; shared experts; experts fused in files; and
# routers with groups and a correction.
CASES = [
    ("qwen3-moe", "gptq_v2"),
    ("mixtral", "gptq_v2"),
    ("olmoe", "gptq"),
    ("qwen2-moe", "gptq_v2"),
    ("granite-moe", "gptq_v2"),
    ("glm4-moe", "gptq_v2"),
    ("qwen3-moe", "compressed_tensors"),
]


def furthest(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(measured, expected, strict=True) if len(other))


def references(export: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [export.logprobs(ids, name, dtype) for ids, name in zip(SEQUENCES, ADAPTERS, strict=True)]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_served_equals_the_reference_and_mixed_equals_single(
    mixture: Callable[..., Any], load_engine: Callable[..., VllmModel], family: str, layout: str
) -> None:
    export = mixture(family, layout)
    model = load_engine(export.folder, export.adapters)
    mixed = model.prompt_logprobs(SEQUENCES, ADAPTERS)
    expected = references(export)
    assert furthest(mixed, expected) < 1e-3
    assert furthest([export.logprobs(ids, None) for ids in SEQUENCES], expected) > 0.5, "the adapters say nothing"
    alone = [model.prompt_logprobs([ids], [name])[0] for ids, name in zip(SEQUENCES, ADAPTERS, strict=True)]
    assert furthest(mixed, alone) < 1e-4
    answers = model.generate(SEQUENCES, ADAPTERS, 6)
    for ids, name, answer in zip(SEQUENCES, ADAPTERS, answers, strict=True):
        assert model.generate([ids], [name], 6) == [answer]
        assert answer == export.greedy(ids, name, 6)


def test_compiled_without_adapters(mixture: Callable[..., Any], load_engine: Callable[..., VllmModel]) -> None:
    export = mixture("qwen3-moe")
    model = load_engine(export.folder, {}, more={"enforce_eager": False})
    scores = model.prompt_logprobs([SEQUENCES[0]], [None])
    assert furthest(scores, [export.logprobs(SEQUENCES[0], None)]) < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(mixture: Callable[..., Any], load_engine: Callable[..., VllmModel], dtype: str) -> None:
    export = mixture("olmoe")
    model = load_engine(export.folder, export.adapters, dtype=dtype)
    exact = references(export)
    # A router that rounds chooses other experts where two are nearly as good, so the mean is what is held.
    ours = torch.cat(model.prompt_logprobs(SEQUENCES, ADAPTERS)) - torch.cat(exact)
    theirs = torch.cat(references(export, getattr(torch, dtype))) - torch.cat(exact)
    assert float(ours.abs().mean()) < 2 * float(theirs.abs().mean())


def test_an_adapter_of_some_experts(
    mixture: Callable[..., Any],
    load_engine: Callable[..., VllmModel],
    write_pairs: Callable[..., pathlib.Path],
    tmp_path: pathlib.Path,
) -> None:
    export = mixture("mixtral")
    some = {
        name: layer
        for name, layer in export.layers.items()
        if name.endswith(("experts.1.down_proj", "experts.2.gate_proj", "experts.2.up_proj"))
    }
    adapters = {"few": write_pairs(tmp_path / "few", some, export.fingerprint, seed=5)}
    model = load_engine(export.folder, adapters)
    scores = model.prompt_logprobs(SEQUENCES, ["few"] * len(SEQUENCES))
    expected = [export.logprobs(ids, adapters["few"]) for ids in SEQUENCES]
    assert furthest(scores, expected) < 1e-3
    assert furthest([export.logprobs(ids, None) for ids in SEQUENCES], expected) > 0.01


def test_half_quantized_experts_do_not_start(
    mixture: Callable[..., Any], load_engine: Callable[..., VllmModel]
) -> None:
    export = mixture("olmoe", overrides={"layers.1.mlp.experts.3.up_proj": None})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts\.3\.up_proj is not quantized; quantize all"):
        load_engine(export.folder, {})
