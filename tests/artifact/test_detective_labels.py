"""Checkpoints of other tools: labels, shapes and places that the detective reads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from foreign_checkpoints import IN, MODULES, OUT, bell, dense, gptq_config, gptq_parts, kinds, only, tensor, write

from cloq_export.artifact.detective import examine
from cloq_export.artifact.detective.foreign import UNREAD_METHODS
from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import TensorFile


def padded(codes: np.ndarray) -> np.ndarray:
    """Ten codes of 3 bits to a word."""
    rows = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 10))).reshape(codes.shape[0], -1, 10)
    return (rows << (3 * np.arange(10, dtype=np.uint64))).sum(2).astype("<u4").view("<i4")


def packed_parts(bits: int, group: int, *, pack=None, symmetric: bool = False, seed: int = 0):
    pack = pack or (lambda codes: dense(codes, bits))
    codes, scales, zeros = bell(bits, group, symmetric=symmetric, seed=seed)
    parts = {
        "weight_packed": tensor(pack(codes)),
        "weight_scale": tensor(scales),
        "weight_shape": torch.tensor([OUT, IN]),
    }
    if not symmetric:
        parts["weight_zero_point"] = tensor(pack(zeros.T.copy()).T)
    return parts


def packed_config(bits: int, group: int, *, symmetric: bool = False, **more):
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        **more,
    }


def awq_parts(seed):
    """As AutoAWQ's GEMM version: words along the outputs, in the order 0 2 4 6 1 3 5 7."""
    codes, scales, zeros = bell(4, 64, seed=seed)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(rows):
        return dense(rows.reshape(rows.shape[0], -1, 8)[:, :, order].reshape(rows.shape), 4)

    return {
        "qweight": tensor(pack(codes.T.copy())),
        "qzeros": tensor(pack(zeros.T.copy())),
        "scales": tensor(scales.T),
    }


def test_awq_is_told_by_its_shapes_whatever_the_label(tmp_path):
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    found = examine(write(tmp_path / "awq", awq, awq_parts))
    assert (found.content, found.confidence, found.label, found.readable) == ("awq", "certain", "gemm", False)
    assert (found.bits, found.group_size, found.quantized_modules) == (4, 64, 4)
    assert "0 2 4 6 1 3 5 7" in found.refusal
    found = examine(write(tmp_path / "gptq", gptq_config(4, 64), awq_parts))
    assert not found.readable
    assert "its tensors are AWQ" in only(found, "label").finding
    found = examine(write(tmp_path / "bare", None, awq_parts))
    assert found.content == "awq"
    found = examine(write(tmp_path / "turned", awq, lambda seed: gptq_parts(4, 64, seed=seed)))
    assert "have the shapes of GPTQ" in only(found, "label").finding


UINT8 = torch.zeros(8, 8, dtype=torch.uint8)
SIGNS = {
    "hqq": {"W_q": UINT8},
    "bitsandbytes": {"weight": UINT8, "weight.quant_state.bitsandbytes__nf4": UINT8},
    "exl2": {"q_weight": UINT8, "q_perm": UINT8},
    "exl3": {"trellis": UINT8},
    "aqlm": {"codebooks": torch.zeros(2)},
    "fp8": {"weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
    "nvfp4": {"weight_packed": UINT8, "weight_global_scale": torch.ones(1)},
    "marlin": {"B": torch.zeros(4, 64, dtype=torch.int32), "s": torch.ones(1, 64)},
    "metal": {"weight": torch.zeros(4, 4, dtype=torch.int32), "scales": torch.ones(4, 1), "biases": torch.ones(4, 1)},
}


@pytest.mark.parametrize("method", SIGNS)
@pytest.mark.parametrize("labelled", [True, False])
def test_formats_that_are_not_read_are_named(tmp_path, method, labelled):
    quantization = {"quant_method": method} if labelled else None
    found = examine(write(tmp_path / "m", quantization, lambda seed: {k: v.clone() for k, v in SIGNS[method].items()}))
    assert (found.content, found.readable, found.reading) == (method, False, None)
    assert UNREAD_METHODS[method][0] in found.refusal
    assert only(found, "not-read").remedy
    json.dumps(found.to_json(), allow_nan=False)


def test_unknown_methods_and_mislabelled_files(tmp_path):
    found = examine(write(tmp_path / "a", {"quant_method": "tomorrow"}, lambda seed: {"weight": torch.ones(2)}))
    assert "of the method 'tomorrow', which is unknown here" in found.refusal
    found = examine(
        write(tmp_path / "b", {"quant_method": "gptq", "checkpoint_format": "marlin"}, lambda s: {"x": UINT8.clone()})
    )
    assert "Marlin tiles" in found.refusal
    found = examine(
        write(tmp_path / "c", packed_config(4, 64, format="nvfp4-pack-quantized"), lambda s: {"x": UINT8.clone()})
    )
    assert "NVFP4" in found.refusal
    found = examine(write(tmp_path / "d", gptq_config(4, 64), lambda seed: {"W_q": UINT8.clone()}))
    assert "HQQ" in only(found, "label").finding


def test_gguf_and_older_config_places(tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    found = examine(folder)
    assert (found.content, found.readable) == ("gguf", False)
    assert "cloq run" in found.refusal
    folder = write(tmp_path / "old", None, lambda seed: gptq_parts(4, 64, version=1, seed=seed))
    (folder / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 64, "sym": False, "desc_act": False})
    )
    found = examine(folder)
    assert (found.label, found.content, found.bits) == ("gptq", "gptq", 4)
    assert "quantize_config.json" in only(found, "config-place").finding


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 64, True), (4, 128, False), (2, 32, False), (8, -1, True)]
)
def test_llm_compressor_files(tmp_path, bits, group, symmetric):
    folder = write(
        tmp_path / "m",
        packed_config(bits, group, symmetric=symmetric, version="0.17.0"),
        lambda seed: packed_parts(bits, group, symmetric=symmetric, seed=seed),
    )
    found = examine(folder)
    assert (found.content, found.confidence, found.reading) == ("compressed_tensors", "certain", "compressed_tensors")
    assert (found.bits, found.group_size, found.symmetric) == (bits, group, symmetric)
    assert found.producer == "compressed-tensors:0.17.0"
    assert abs(found.figures["code_minus_zero"]["mean"]) < 0.3
    assert not kinds(found)


@pytest.mark.parametrize(("pack", "form"), [(None, "compressed_tensors"), (padded, "compressed_tensors_padded")])
@pytest.mark.parametrize("claim", [None, "compressed_tensors", "compressed_tensors_padded"])
def test_three_bits_dense_or_padded_by_shape(tmp_path, pack, form, claim):
    ours = {"format_version": 1, "layout": claim, "base_fingerprint": "sha256:0", "modules": sorted(MODULES)}
    folder = write(
        tmp_path / "m",
        packed_config(3, 64, **({"cloq": ours} if claim else {})),
        lambda seed: packed_parts(3, 64, pack=pack, seed=seed),
    )
    found = examine(folder)
    assert (found.content, found.confidence, found.bits) == (form, "certain", 3)
    assert ("padded" in kinds(found, "note")) == (pack is padded)
    assert found.readable == (claim in (None, form))
    if claim not in (None, form):
        assert only(found, "order").finding == f"our own metadata say {claim}, but the shapes are those of {form}"
        assert found.refusal
    assert abs(found.figures["code_minus_zero"]["mean"]) < 0.1  # of a step of the grid: zeros are stored as they are


def test_zero_points_that_the_config_does_not_speak_of(tmp_path):
    def bare(seed):
        return {k: v for k, v in packed_parts(4, 64, seed=seed).items() if k != "weight_zero_point"}

    found = examine(write(tmp_path / "bare", packed_config(4, 64), bare))
    assert only(found, "no-zeros").finding.startswith(
        "the config says asymmetric, but 4 of 4 modules have no zero points"
    )
    assert not found.readable
    found = examine(
        write(tmp_path / "idle", packed_config(4, 64, symmetric=True), lambda s: packed_parts(4, 64, seed=s))
    )
    assert "which readers then ignore" in only(found, "symmetric").finding
    assert not found.readable


def test_act_order_and_bits_of_packed_files(tmp_path):
    def indexed(seed):
        return packed_parts(4, 64, seed=seed) | {"weight_g_idx": torch.zeros(IN, dtype=torch.int32)}

    found = examine(write(tmp_path / "m", packed_config(4, 64), indexed))
    assert only(found, "act-order").level == "wrong"
    assert not found.readable
    found = examine(write(tmp_path / "n", packed_config(2, 64), lambda seed: packed_parts(4, 64, seed=seed)))
    assert only(found, "bits").finding == "the config says 2 bits, but the shapes hold 4-bit codes"


def test_our_own_files_raise_no_suspicion(tmp_path, written):
    found = examine(written.folder)
    assert (found.label, found.reading, found.readable) == ("gptq_v2", "gptq_v2", True)
    assert found.producer.startswith("cloq_export:")
    assert not kinds(found, "wrong")
    copy = tmp_path / "copy"
    shutil.copytree(written.folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (copy / "config.json").write_text(json.dumps(config))
    found = examine(copy)
    assert not found.readable
    assert "cloq.layout is 'gptq_v2' but checkpoint_format is 'gptq'" in found.refusal


def test_what_is_no_quantized_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        examine(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        examine(tmp_path / "empty")
    with pytest.raises(FormatError, match="so it is no quantized checkpoint; make one with: cloq run"):
        examine(write(tmp_path / "float", None, lambda seed: {"weight": torch.ones(2)}))
    folder = write(tmp_path / "cut", gptq_config(4, 64), lambda seed: gptq_parts(4, 64, seed=seed))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="is truncated or not a safetensors file"):
        examine(folder)


def test_large_files_are_only_sampled(tmp_path, monkeypatch):
    read = 0
    inner = TensorFile._read

    def counting(self, name, place, shape):
        nonlocal read
        values = inner(self, name, place, shape)
        read += values.numel() * values.element_size()
        return values

    monkeypatch.setattr(TensorFile, "_read", counting)
    columns, out = 4096, 8192

    def make(seed):
        return {
            "qweight": torch.full((columns // 8, out), -0x77777778, dtype=torch.int32),
            "qzeros": torch.full((columns // 64, out // 8), -0x77777778, dtype=torch.int32),
            "scales": torch.ones(columns // 64, out, dtype=torch.float16),
            "g_idx": torch.arange(columns, dtype=torch.int32) // 64,
        }

    found = examine(write(tmp_path / "m", gptq_config(4, 64, "gptq_v2"), make))
    assert found.sampled_modules == 4
    assert found.content == "gptq_v2"
    assert 0 < read < 4 * 5 * 2**20
