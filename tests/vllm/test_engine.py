"""What an engine of vLLM serves, compared with the packed transformers runtime on the same files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cloq_export.engines.held_adapters import HeldAdapter
from cloq_export.engines.protocol import MOST_ALTERNATIVES
from cloq_export.engines.transformers.served import packed_model
from cloq_export.engines.vllm.engine import EngineStart, VllmModel
from cloq_export.engines.vllm.facts import engine_facts
from cloq_export.engines.vllm.listed_tokens import MOST_PROBABLE
from cloq_export.engines.vllm.options import EngineSettings
from cloq_export.errors import BindingError, EngineError, FormatError, UsageError
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.peft import read_adapter
from cloq_export.formats.registry import LAYOUTS
from cloq_export.types import QuantSpec

pytestmark = pytest.mark.slow

GENERATOR = torch.Generator().manual_seed(3)
SEQUENCES = [torch.randint(96, (length,), generator=GENERATOR).tolist() for length in (12, 5, 9, 2, 17, 1, 30, 7)]
ADAPTERS = [None, "one", "two", None, "two", "one", None, "one"]
SMALL = EngineStart(threads=1, timeout=600)

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
    "AutoRound's, zeros less one": {
        "spec": QuantSpec(bits=3, group_size=32, symmetric=True),
        "layout": LAYOUTS["auto_round_gptq"],
    },
    "AutoRound's, zeros as they are, which vLLM refuses, own grids and a float layer": {
        "spec": QuantSpec(bits=2, group_size=32),
        "layout": LAYOUTS["auto_round"],
        "overrides": {"k_proj": QuantSpec(bits=4, group_size=-1), "down_proj": None},
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


def references(export: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [export.logprobs(ids, name, dtype) for ids, name in zip(SEQUENCES, ADAPTERS, strict=True)]


def furthest(measured: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference over a batch."""
    assert [len(scores) for scores in measured] == [len(ids) - 1 for ids in SEQUENCES]
    return max(float((one - other).abs().max()) for one, other in zip(measured, expected, strict=True) if len(other))


def allowed(export: Any, dtype: str) -> float:
    """Return how far an engine may be from the float32 reference: twice as far as transformers is in that dtype."""
    if dtype == "float32":
        return 1e-4  # of a log-probability, what the project promises
    return 2 * furthest(references(export, getattr(torch, dtype)), references(export))


@pytest.mark.parametrize("case", CASES)
def test_served_equals_the_reference_and_mixed_equals_single(
    write_export: Callable[..., Any], load_engine: Callable[..., VllmModel], device: str, case: str
) -> None:
    export = write_export(**CASES[case])
    dtype = "float32" if device == "cpu" else "float16"
    model = load_engine(export.folder, export.adapters)
    mixed = model.prompt_logprobs(SEQUENCES, ADAPTERS)
    assert furthest(mixed, references(export)) < allowed(export, dtype)
    answers = model.generate(SEQUENCES, ADAPTERS, 6)
    alone = [model.prompt_logprobs([ids], [name])[0] for ids, name in zip(SEQUENCES, ADAPTERS, strict=True)]
    assert furthest(mixed, alone) < allowed(export, dtype)
    for ids, name, answer in zip(SEQUENCES, ADAPTERS, answers, strict=True):
        assert 1 <= len(answer) <= 6
        # Half precision may turn a near-tie around.
        assert device == "cuda" or model.generate([ids], [name], 6) == [answer]


def test_the_most_probable_tokens_of_each_place(export: Any, load_engine: Callable[..., VllmModel]) -> None:
    model = load_engine(export.folder, export.adapters)
    kept = [number for number, ids in enumerate(SEQUENCES) if len(ids) > 1]
    asked = [SEQUENCES[number] for number in kept], [ADAPTERS[number] for number in kept]
    for ids, name, found in zip(*asked, model.token_distributions(*asked), strict=True):
        expected = packed_model(export.folder, export.adapters).token_distributions([ids], [name])[0].logprobs
        assert found.token_ids is not None
        assert found.token_ids.shape == (len(ids) - 1, MOST_PROBABLE)
        assert torch.allclose(found.logprobs, expected.topk(MOST_PROBABLE).values, atol=1e-4)
        assert torch.allclose(found.logprobs, expected.gather(1, found.token_ids), atol=1e-4)


def test_what_is_held_is_what_the_files_hold(export: Any, load_engine: Callable[..., VllmModel]) -> None:
    model = load_engine(export.folder, export.adapters)
    model.prompt_logprobs([SEQUENCES[0]] * 2, ["one", "two"])
    for name, folder in export.adapters.items():
        pairs = read_adapter(folder).pairs
        held = model.held_adapter(name)
        assert held is not None
        wanted = HeldAdapter.of({m: (each.lora_A, each.lora_B, each.scaling) for m, each in pairs.items()}, held.dtype)
        assert held == wanted


@pytest.mark.usefixtures("only_on_cpu")
def test_alternatives_are_those_of_the_reference(export: Any, load_engine: Callable[..., VllmModel]) -> None:
    model = load_engine(export.folder, export.adapters)
    rows = [row for row, ids in enumerate(SEQUENCES) if len(ids) > 1]
    sequences, adapters = [SEQUENCES[row] for row in rows], [ADAPTERS[row] for row in rows]
    listed = model.alternative_logprobs(sequences, adapters, MOST_ALTERNATIVES)
    expected = packed_model(export.folder, export.adapters).alternative_logprobs(sequences, adapters, 16)
    scored = model.prompt_logprobs(sequences, adapters)
    for ids, theirs, ours, scores in zip(sequences, listed, expected, scored, strict=True):
        assert theirs.tokens.shape == (len(ids) - 1, 1 + MOST_ALTERNATIVES)
        assert theirs.tokens[:, 0].tolist() == list(ids[1:])
        assert float((theirs.logprobs[:, 0] - scores).abs().max()) < 1e-5
        values, known = theirs.looked_up(ours.tokens)
        assert known.all()
        assert float((values - ours.logprobs).abs().max()) < 1e-4


def test_one_adapter_at_a_time(export: Any, load_engine: Callable[..., VllmModel]) -> None:
    model = load_engine(export.folder, export.adapters, max_loras=1)
    together = model.prompt_logprobs(SEQUENCES, ADAPTERS)
    assert furthest(together, references(export)) < 1e-4


@pytest.mark.usefixtures("only_on_cpu")
def test_compiled(export: Any, load_engine: Callable[..., VllmModel]) -> None:
    # vLLM itself turns compilation off on a CPU as soon as there are adapters.
    model = load_engine(export.folder, {}, more={"enforce_eager": False})
    scores = model.prompt_logprobs([SEQUENCES[0]], [None])[0]
    assert float((scores - export.logprobs(SEQUENCES[0], None)).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", ["gptq_v2", "compressed_tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(
    write_export: Callable[..., Any], load_engine: Callable[..., VllmModel], device: str, dtype: str, layout: str
) -> None:
    if (device, dtype, layout) == ("cuda", "bfloat16", "gptq_v2"):
        pytest.skip("the plugin refuses bfloat16 on CUDA, where scales would be rounded")
    export = write_export(QuantSpec(bits=3, group_size=32), layout=LAYOUTS[layout])
    model = load_engine(export.folder, export.adapters, dtype=dtype)
    assert furthest(model.prompt_logprobs(SEQUENCES, ADAPTERS), references(export)) < allowed(export, dtype)


def test_the_kernel_of_vllm_for_4_bits_in_bfloat16(
    write_export: Callable[..., Any], load_engine: Callable[..., VllmModel]
) -> None:
    """On a CPU with AMX vLLM alone dies here of an illegal instruction."""
    export = write_export(QuantSpec(bits=4, group_size=32), layout=LAYOUTS["compressed_tensors"])
    model = load_engine(export.folder, export.adapters, dtype="bfloat16")
    assert furthest(model.prompt_logprobs(SEQUENCES, ADAPTERS), references(export)) < allowed(export, "bfloat16")


@pytest.mark.parametrize(
    ("layout", "spec"),
    [
        ("compressed_tensors", QuantSpec(4, 32)),
        ("gptq", QuantSpec(4, 32, symmetric=True)),
        ("auto_round_gptq", QuantSpec(4, 32, symmetric=True)),
    ],
)
def test_stock_vllm_reads_the_same_integers(
    write_export: Callable[..., Any], load_engine: Callable[..., VllmModel], layout: str, spec: QuantSpec
) -> None:
    """Without the plugin: 4-bit codes with zeros, and symmetric ones of GPTQ and AutoRound."""
    written = write_export(spec, layout=LAYOUTS[layout], dtype=torch.float16)
    model = load_engine(written.folder, {}, plugin=False, dtype="float16")
    scores = model.prompt_logprobs([SEQUENCES[0]], [None])[0]
    # Zeros off by one, or codes in another order, move these by several units; float16 arithmetic by hundredths.
    difference = (scores - written.logprobs(SEQUENCES[0], None)).abs().max()
    assert difference < 0.05, difference


@pytest.mark.usefixtures("only_on_cpu")
def test_what_vllm_reads_is_left_to_vllm_and_its_fault_is_mended(
    write_export: Callable[..., Any], load_engine: Callable[..., VllmModel], engine_python: str
) -> None:
    """vLLM 0.32 alone gives requests without an adapter the last one when the batch has both."""
    export = write_export(QuantSpec(bits=4, group_size=32, symmetric=True))
    ids = SEQUENCES[0]
    found = {}
    for plugin in (False, True):
        model = load_engine(export.folder, export.adapters, plugin=plugin, dtype="float16")
        alone = model.prompt_logprobs([ids], [None])[0]
        mixed = model.prompt_logprobs([ids, ids, ids], [None, "one", "two"])[0]
        found[plugin] = (alone, float((alone - mixed).abs().max()))
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] < allowed(export, "float16")
    version = engine_facts(engine_python).version
    # An adapter moves a log-probability by several tenths, rounding by thousandths.
    assert (found[False][1] > 0.1) == version.startswith("0.32."), found[False][1]


@pytest.mark.usefixtures("only_on_cpu")
def test_prompt_logprobs_with_an_adapted_head(
    write_export: Callable[..., Any], load_engine: Callable[..., VllmModel]
) -> None:
    """vLLM alone dies of a batch of them unless it is told which modules are adapted."""
    export = write_export(QuantSpec(bits=4, group_size=32, symmetric=True))
    how: dict[str, Any] = {"dtype": "float16", "more": {"lora_target_modules": None}}
    model = load_engine(export.folder, export.adapters, plugin=False, **how)
    with pytest.raises(EngineError, match="ended without an answer"):
        model.prompt_logprobs([SEQUENCES[0], SEQUENCES[1]], ["one", "two"])
    model = load_engine(export.folder, export.adapters, **how)
    assert furthest(model.prompt_logprobs(SEQUENCES, ADAPTERS), references(export)) < allowed(export, "float16")


def relabelled(export: Any, folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Return a copy of an export whose `quantization_config` says something else."""
    shutil.copytree(export.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def binding_of(folder: pathlib.Path) -> dict[str, Any]:
    binding: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]["cloq"]
    return binding


def test_a_label_of_act_order_counts_for_nothing(
    export: Any, load_engine: Callable[..., VllmModel], tmp_path: pathlib.Path
) -> None:
    folder = relabelled(export, tmp_path / "labelled", desc_act=True)
    model = load_engine(folder, {})
    scores = model.prompt_logprobs([SEQUENCES[0]], [None])[0]
    assert float((scores - export.logprobs(SEQUENCES[0], None)).abs().max()) < allowed(export, "float32")


@pytest.mark.usefixtures("only_on_cpu")
def test_an_order_of_groups_is_refused_by_name(export: Any, engine_python: str, tmp_path: pathlib.Path) -> None:
    folder = relabelled(export, tmp_path / "ordered", desc_act=False)
    file = next(folder.glob("*.safetensors"))
    tensors, _ = read_safetensors(file)
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].flip(0).contiguous()
    write_safetensors(file, tensors, {"format": "pt"})
    with pytest.raises(EngineError, match=rf"(?s)did not start .*{name}: g_idx is not sequential \(an act-order"):
        VllmModel(folder, {}, EngineSettings(), dataclasses.replace(SMALL, python=engine_python))


def test_a_base_that_needs_its_adapter_is_not_asked_alone(
    export: Any, load_engine: Callable[..., VllmModel], tmp_path: pathlib.Path
) -> None:
    """Without `cloq serve`: the plugin alone stands in front of it."""
    folder = relabelled(export, tmp_path / "needy", cloq={**binding_of(export.folder), "needs_adapter": True})
    model = load_engine(folder, export.adapters)
    scores = model.prompt_logprobs([SEQUENCES[0]], ["one"])[0]
    assert float((scores - export.logprobs(SEQUENCES[0], "one")).abs().max()) < allowed(export, "float32")
    for ask in (model.prompt_logprobs, lambda ids, names: model.generate(ids, names, 1)):
        with pytest.raises(EngineError, match=r"refused: .*needy needs its adapter: its codes .* Ask for an adapter"):
            ask([SEQUENCES[0]], [None])
    assert len(model.generate([SEQUENCES[0]], ["one"], 1)[0]) == 1


def test_bad_requests_leave_the_engine_running(export: Any, load_engine: Callable[..., VllmModel]) -> None:
    model = load_engine(export.folder, export.adapters, max_model_len=32)
    with pytest.raises(UsageError, match="there is no adapter 'three'; there are one, two"):
        model.generate([[1]], ["three"], 1)
    with pytest.raises(UsageError, match="sequence 1 is empty"):
        model.generate([[1], []], [None, None], 1)
    with pytest.raises(EngineError, match="the vLLM engine refused"):
        model.generate([[5] * 100], [None], 1)
    assert len(model.generate([SEQUENCES[0]], ["one"], 1)[0]) == 1


def test_an_engine_that_dies_at_its_start_shows_its_last_lines(export: Any, engine_python: str) -> None:
    with pytest.raises(EngineError, match=r"did not start \(exit code 1\); its last lines:\n(.|\n)*no_such_option"):
        VllmModel(
            export.folder,
            {},
            EngineSettings(more={"no_such_option": 1}),
            dataclasses.replace(SMALL, python=engine_python),
        )


def test_an_engine_that_takes_too_long_is_stopped(export: Any, engine_python: str) -> None:
    with pytest.raises(EngineError, match=r"gave no start within 0\.1 seconds and was stopped"):
        VllmModel(export.folder, {}, EngineSettings(), EngineStart(python=engine_python, threads=1, timeout=0.1))


def test_an_interpreter_that_is_missing(export: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(EngineError, match="cannot be started: No such file or directory; check `python`"):
        VllmModel(export.folder, {}, EngineSettings(), EngineStart(python=tmp_path / "python"))


def test_adapters_of_another_base_are_refused_before_the_start(
    write_export: Callable[..., Any], export: Any, tmp_path: pathlib.Path
) -> None:
    other = write_export(QuantSpec(bits=3, group_size=32))
    with pytest.raises(BindingError, match="is bound to the base"):
        VllmModel(export.folder, {"one": other.adapters["one"]}, EngineSettings(), EngineStart())
    with pytest.raises(FormatError, match="is no adapter folder"):
        VllmModel(export.folder, {"one": tmp_path}, EngineSettings(), EngineStart())
