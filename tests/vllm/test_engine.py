"""What an engine of vLLM serves, compared with the packed transformers runtime on the same files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cloq_export.errors import BindingError, EngineError, FormatError, UsageError
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.registry import LAYOUTS
from cloq_export.runtimes.vllm_engine import VllmModel
from cloq_export.runtimes.vllm_server import engine_facts
from cloq_export.types import QuantSpec

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(3)
SEQUENCES = [torch.randint(96, (length,), generator=GENERATOR).tolist() for length in (12, 5, 9, 2, 17, 1, 30, 7)]
ADAPTERS = [None, "one", "two", None, "two", "one", None, "one"]
SMALL: dict[str, Any] = {"threads": 1, "kv_cache_gib": 1, "timeout": 600}

CASES: dict[str, dict[str, Any]] = {
    "2-bit": {"spec": QuantSpec(bits=2, group_size=32)},
    "2-bit, version 1": {"spec": QuantSpec(bits=2, group_size=32), "layout": GPTQ_V1},
    "3-bit per channel": {"spec": QuantSpec(bits=3, group_size=-1)},
    "4-bit": {"spec": QuantSpec(bits=4, group_size=64)},
    "4-bit symmetric, which vLLM has no float32 for": {"spec": QuantSpec(bits=4, group_size=32, symmetric=True)},
    "compressed-tensors 3-bit": {
        "spec": QuantSpec(bits=3, group_size=32),
        "layout": LAYOUTS["compressed_tensors"],
    },
    "compressed-tensors 4-bit, which vLLM has no float32 for": {
        "spec": QuantSpec(bits=4, group_size=32),
        "layout": LAYOUTS["compressed_tensors"],
    },
    "own grids and a float layer": {
        "spec": QuantSpec(bits=3, group_size=32),
        "overrides": {
            "q_proj": QuantSpec(bits=2, group_size=16),
            "k_proj": QuantSpec(bits=4, group_size=-1),
            "down_proj": None,
        },
    },
}


def furthest(model: Any, export: Any, *, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest difference from the reference, over a mixed batch."""
    served = model.prompt_logprobs(SEQUENCES, ADAPTERS)
    references = [export.logprobs(ids, name, dtype) for ids, name in zip(SEQUENCES, ADAPTERS, strict=True)]
    assert [len(scores) for scores in served] == [len(ids) - 1 for ids in SEQUENCES]
    return max(float((one - other).abs().max()) for one, other in zip(served, references, strict=True) if len(other))


@pytest.mark.parametrize("case", CASES)
def test_served_equals_the_reference_and_mixed_equals_single(
    write_export: Callable[..., Any], engine_python: str, case: str
) -> None:
    export = write_export(**CASES[case])
    with VllmModel(export.folder, export.adapters, python=engine_python, **SMALL) as model:
        assert furthest(model, export) < 1e-4
        mixed = model.prompt_logprobs(SEQUENCES, ADAPTERS)
        answers = model.generate(SEQUENCES, ADAPTERS, 6)
        for ids, name, scores, answer in zip(SEQUENCES, ADAPTERS, mixed, answers, strict=True):
            alone = model.prompt_logprobs([ids], [name])[0]
            assert torch.allclose(alone, scores, rtol=0, atol=1e-4)
            assert model.generate([ids], [name], 6) == [answer]
            assert 1 <= len(answer) <= 6


def test_one_adapter_at_a_time_in_processes_of_their_own(export: Any, engine_python: str) -> None:
    with VllmModel(
        export.folder, export.adapters, python=engine_python, max_loras=1, own_process=True, **SMALL
    ) as model:
        assert furthest(model, export) < 1e-4


def test_compiled(export: Any, engine_python: str) -> None:
    # vLLM itself turns compilation off on a CPU as soon as there are adapters.
    with VllmModel(export.folder, {}, python=engine_python, enforce_eager=False, **SMALL) as model:
        scores = model.prompt_logprobs([SEQUENCES[0]], [None])[0]
    assert float((scores - export.logprobs(SEQUENCES[0], None)).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed_tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(write_export: Callable[..., Any], engine_python: str, dtype: str, layout: str) -> None:
    export = write_export(QuantSpec(bits=3, group_size=32), layout=LAYOUTS[layout])
    with VllmModel(export.folder, export.adapters, dtype=dtype, python=engine_python, **SMALL) as model:
        served = furthest(model, export)
    # As far from the float32 reference as the transformers runtime is in that dtype, give or take its own rounding.
    half = max(
        float((export.logprobs(ids, name, getattr(torch, dtype)) - export.logprobs(ids, name)).abs().max())
        for ids, name in zip(SEQUENCES, ADAPTERS, strict=True)
        if len(ids) > 1
    )
    assert served < 4 * half


def test_what_vllm_reads_is_left_to_vllm_and_its_fault_is_mended(
    write_export: Callable[..., Any], engine_python: str
) -> None:
    """vLLM 0.32 alone gives requests without an adapter the last one when the batch has both."""
    export = write_export(QuantSpec(bits=4, group_size=32, symmetric=True))
    options = {"dtype": "float16", "python": engine_python, **SMALL}
    ids = SEQUENCES[0]
    found = {}
    for plugin in (False, True):
        with VllmModel(export.folder, export.adapters, plugin=plugin, **options) as model:
            alone = model.prompt_logprobs([ids], [None])[0]
            mixed = model.prompt_logprobs([ids, ids, ids], [None, "one", "two"])[0]
            found[plugin] = (alone, float((alone - mixed).abs().max()))
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] < 1e-2
    version = engine_facts(engine_python).version
    assert (found[False][1] > 0.1) == version.startswith("0.32."), found[False][1]


def test_prompt_logprobs_with_an_adapted_head(write_export: Callable[..., Any], engine_python: str) -> None:
    """vLLM alone dies of a batch of them unless it is told which modules are adapted."""
    export = write_export(QuantSpec(bits=4, group_size=32, symmetric=True))
    options = {"dtype": "float16", "python": engine_python, "options": {"lora_target_modules": None}, **SMALL}
    with (
        VllmModel(export.folder, export.adapters, plugin=False, **options) as model,
        pytest.raises(EngineError, match="ended without an answer"),
    ):
        model.prompt_logprobs([SEQUENCES[0], SEQUENCES[1]], ["one", "two"])
    with VllmModel(export.folder, export.adapters, **options) as model:
        assert furthest(model, export) < 0.1


def test_an_engine_that_dies_at_its_start_shows_its_last_lines(export: Any, engine_python: str) -> None:
    with pytest.raises(EngineError, match=r"did not start \(exit code 1\); its last lines:\n(.|\n)*no_such_option"):
        VllmModel(export.folder, {}, python=engine_python, options={"no_such_option": 1}, **SMALL)


def test_an_engine_that_takes_too_long_is_stopped(export: Any, engine_python: str) -> None:
    with pytest.raises(EngineError, match=r"gave no start within 0\.1 seconds and was stopped"):
        VllmModel(export.folder, {}, python=engine_python, **(SMALL | {"timeout": 0.1}))


def test_an_interpreter_that_is_missing(export: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(EngineError, match="cannot be started: No such file or directory; check --python"):
        VllmModel(export.folder, {}, python=tmp_path / "python")


def test_bad_requests_leave_the_engine_running(export: Any, engine_python: str) -> None:
    with VllmModel(export.folder, export.adapters, python=engine_python, max_model_len=32, **SMALL) as model:
        with pytest.raises(UsageError, match="there is no adapter 'three'; there are one, two"):
            model.generate([[1]], ["three"], 1)
        with pytest.raises(UsageError, match="sequence 1 is empty"):
            model.generate([[1], []], [None, None], 1)
        with pytest.raises(EngineError, match="the vLLM engine refused"):
            model.generate([[5] * 100], [None], 1)
        assert len(model.generate([SEQUENCES[0]], ["one"], 1)[0]) == 1


def test_adapters_of_another_base_are_refused_before_the_start(
    write_export: Callable[..., Any], export: Any, tmp_path: pathlib.Path
) -> None:
    other = write_export(QuantSpec(bits=3, group_size=32))
    with pytest.raises(BindingError, match="is bound to the base"):
        VllmModel(export.folder, {"one": other.adapters["one"]})
    with pytest.raises(FormatError, match="is no adapter folder"):
        VllmModel(export.folder, {"one": tmp_path})
