"""Scales and zeros that an engine reads wrongly, and how they are found."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gate_subjects import SILENT
from parity_reports import missed
from served_exports import CONTEXT, WORDS, healthy, served_by

from cloq_export.engines.transformers.reference import reference_model
from cloq_export.engines.transformers.served import packed_model
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.parity.report import missed_gates
from cloq_export.parity.scales import SCALE_LIMIT, ServedWindow, measure_scales, share_windows
from cloq_export.verbs.verification import engines
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import verify


def with_changed(folder: Path, export: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Return a copy of an export in which tensors are changed, as an engine reads them wrongly."""
    copy = Path(shutil.copytree(export, folder / "changed"))
    tensors, metadata = read_safetensors(copy / "model.safetensors")
    held = {name: tensor.clone() for name, tensor in tensors.items()}
    change(held)
    write_safetensors(copy / "model.safetensors", held, metadata)
    return copy


def scaled(module: str, factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[f"{module}.scales"] = (held[f"{module}.scales"].float() * factor).half()

    return change


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        ("0.mlp.down_proj", "float16"),
        ("0.self_attn.v_proj", "float32"),
        pytest.param("0.mlp.down_proj", "float32", marks=pytest.mark.slow),
        pytest.param("0.self_attn.v_proj", "float16", marks=pytest.mark.slow),
    ],
)
def test_one_hundredth_of_a_scale_is_found_at_two_bits(
    tmp_path: Path, exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch, module: str, dtype: str
) -> None:
    name = f"model.layers.{module}"
    copy = with_changed(tmp_path, exported, scaled(name, 1.01))
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(healthy, copy, force=True))
    report = verify(exported, dataclasses.replace(options, dtype=dtype, windows=40), console=SILENT)
    assert "scale_error_max" in missed(report)
    worst = report.scales.candidates[0]
    # v and o scale the same.
    assert worst.module in (name, name.replace("v_proj", "o_proj"))
    assert worst.error == pytest.approx(0.01, abs=0.003)
    assert f"the scale of {worst.module} is off by +" in str(missed_gates(report))


@pytest.mark.parametrize(
    ("module", "factor"),
    [
        *(("mlp.down_proj", 1.01), ("self_attn.q_proj", 0.99)),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                *(("mlp.up_proj", 0.99), ("mlp.gate_proj", 1.01), ("self_attn.v_proj", 0.99)),
                *(("self_attn.o_proj", 1.01), ("self_attn.k_proj", 1.01)),
            )
        ),
    ],
)
def test_one_hundredth_of_a_scale_is_found_in_bfloat16_on_the_tokens_that_it_takes(
    tmp_path: Path,
    exported: Path,
    options: VerifyOptions,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    factor: float,
) -> None:
    name = f"model.layers.0.{module}"
    copy = with_changed(tmp_path, exported, scaled(name, factor))
    generator = torch.Generator().manual_seed(4)
    drawn = (61 * torch.rand(4200, generator=generator).pow(2)).long()
    (tmp_path / "long.txt").write_text(" ".join(f"w{int(number)}" for number in drawn))
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(healthy, copy, force=True))
    asked = dataclasses.replace(
        options, dtype="bfloat16", text=str(tmp_path / "long.txt"), windows=90, window=CONTEXT - 20, adapters=("cloq",)
    )
    report = verify(exported, asked, console=SILENT)
    assert "scale_error_max" in missed(report)
    worst = report.scales.candidates[0]
    # q and k scale the same, v and o too, and through what is left of an activation also gate, up and down.
    assert worst.module.rpartition(".")[0] == name.rpartition(".")[0]
    assert worst.error == pytest.approx(factor - 1, abs=0.005)
    assert 0 < report.scales.rounding_shared <= 1
    assert max(report.scales.found.values()) < 0.01


def test_a_zero_that_is_off_by_one_in_one_group_is_found(
    tmp_path: Path, exported: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.0.mlp.up_proj.qzeros"][0, 0] ^= 1

    copy = with_changed(tmp_path, exported, change)
    monkeypatch.setitem(engines.OPENERS, "hf", served_by(healthy, copy, force=True))
    assert "logprob_difference_max" in missed(verify(exported, options, console=SILENT))


def served_windows(
    windows: Sequence[Sequence[int]], names: Sequence[str | None], served: Any, expected: Any
) -> list[ServedWindow]:
    return [ServedWindow.of_next(*each) for each in zip(windows, names, served, expected, strict=True)]


def test_scales_of_healthy_runtimes_show_no_error(exported: Path, text: Path) -> None:
    ids = [WORDS.index(word) for word in text.read_text().split()]
    windows = [ids[start : start + 48] for start in range(0, 1152, 48)]
    adapters = {"cloq": exported / "adapters" / "cloq"}
    reference = reference_model(exported, adapters)
    names = ["cloq", None] * (len(windows) // 2)
    expected = reference.prompt_logprobs(windows, names)
    modules = sorted(path for path in reference.model("cloq").state_dict() if path.endswith("base_layer.weight"))
    modules = [path.removesuffix(".base_layer.weight") for path in modules]
    assert len(modules) == 7
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        served = packed_model(exported, adapters, dtype=dtype).prompt_logprobs(windows, names)
        measured = served_windows(windows, names, served, expected)
        found = measure_scales(reference, measured, modules, screened=32, limit=SCALE_LIMIT, seed=1)
        assert found.largest < SCALE_LIMIT
        assert found.unseen == ()
        assert set(found.found) == set(modules)
    name = "model.layers.0.mlp.up_proj"
    with reference.scaled("cloq", name, 1.02), reference.scaled(None, name, 1.02):
        wrong = reference.prompt_logprobs(windows, names)
    measured = served_windows(windows, names, wrong, expected)
    found = measure_scales(reference, measured, modules, screened=32, limit=SCALE_LIMIT)
    assert found.candidates[0].module == name
    assert found.largest == pytest.approx(0.02, abs=0.002)


@pytest.mark.parametrize("path", ["cloq", None])
def test_a_scale_that_is_wrong_with_one_adapter_alone_is_found(exported: Path, text: Path, path: str | None) -> None:
    ids = [WORDS.index(word) for word in text.read_text().split()]
    windows = [ids[start : start + 48] for start in range(0, 1152, 48)]
    reference = reference_model(exported, {name: exported / "adapters" / name for name in ("cloq", "second")})
    names = ["cloq", "second", None] * (len(windows) // 3)
    expected = reference.prompt_logprobs(windows, names)
    modules = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")]
    with reference.scaled(path, modules[2], 1.01):
        wrong = reference.prompt_logprobs(windows, names)
    measured = served_windows(windows, names, wrong, expected)
    found = measure_scales(reference, measured, modules, screened=32, limit=SCALE_LIMIT)
    assert (found.candidates[0].module, found.candidates[0].adapters) == (modules[2], (path,))
    assert found.largest == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize(
    ("windows", "window", "subjects", "length", "pieces"),
    [
        (16, 512, 1, 512, [(0, 0), (1, 0)]),
        (16, 512, 2, 512, [(0, 0), (1, 1)]),
        (16, 512, 4, 256, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (1, 512, 3, 341, [(0, 0), (0, 1), (0, 2)]),
        (2, 24, 1, 24, [(0, 0), (1, 0)]),
    ],
)
def test_the_budget_of_tokens_is_shared_out(
    windows: int, window: int, subjects: int, length: int, pieces: list[tuple[int, int]]
) -> None:
    assert share_windows(windows, 1024, window, subjects) == (length, pieces)


def test_too_few_tokens_say_nothing_of_scales(exported: Path) -> None:
    window = ServedWindow.of_next([3, 4], None, torch.ones(1), torch.ones(1))
    found = measure_scales(reference_model(exported, {}), [window], ["model.layers.0.mlp.up_proj"], screened=2, limit=1)
    assert found.largest is None
