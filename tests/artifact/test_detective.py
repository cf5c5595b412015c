"""The detective: files as AutoGPTQ, GPTQModel, AutoAWQ, AutoRound and llm-compressor write them are told apart."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.detective import examine
from cloq_export.artifact.detective.foreign import UNREAD_METHODS
from cloq_export.errors import FormatError
from cloq_export.files.safe_tensors import TensorFile

MODULES = [f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("up_proj", "gate_proj")]
OUT, IN = 128, 256


# Foreign files, packed bit by bit with none of the package's code.


def bell(bits: int, group: int, *, symmetric: bool = False, out: int = OUT, columns: int = IN, seed: int = 0):
    """Round Gaussian weights to nearest; return codes (out, in), scales (out, groups), zeros (out, groups)."""
    span = columns if group == -1 else group
    weight = np.random.default_rng(seed).normal(size=(out, columns // span, span))
    most = 2**bits - 1
    if symmetric:
        scales = np.abs(weight).max(2) / 2 ** (bits - 1)
        zeros = np.full_like(scales, 2 ** (bits - 1))
    else:
        scales = (weight.max(2) - weight.min(2)) / most
        zeros = np.clip(np.round(-weight.min(2) / scales), 0, most)
    codes = np.clip(np.round(weight / scales[:, :, None]) + zeros[:, :, None], 0, most)
    return codes.reshape(out, columns).astype(np.uint64), scales.astype(np.float16), zeros.astype(np.uint64)


def words(bits_of_rows: np.ndarray) -> np.ndarray:
    """Pack rows of single bits, the first bit lowest, into int32 words."""
    return np.packbits(bits_of_rows.astype(np.uint8), axis=1, bitorder="little").view("<i4")


def dense(codes: np.ndarray, bits: int) -> np.ndarray:
    cut = (codes[:, :, None] >> np.arange(bits, dtype=np.uint64)) & 1
    return words(cut.reshape(codes.shape[0], -1))


def planar(codes: np.ndarray) -> np.ndarray:
    """Of 32 codes of 3 bits first all low two bits, then all high bits."""
    blocks = codes.reshape(codes.shape[0], -1, 32)
    low = ((blocks[..., None] >> np.arange(2, dtype=np.uint64)) & 1).reshape(*blocks.shape[:2], 64)
    high = (blocks >> np.uint64(2)) & 1
    return words(np.concatenate([low, high], axis=2).reshape(codes.shape[0], -1))


def padded(codes: np.ndarray) -> np.ndarray:
    """Ten codes of 3 bits to a word."""
    rows = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 10))).reshape(codes.shape[0], -1, 10)
    return (rows << (3 * np.arange(10, dtype=np.uint64))).sum(2).astype("<u4").view("<i4")


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def gptq_parts(bits: int, group: int, *, version: int = 2, pack=None, symmetric: bool = False, seed: int = 0):
    pack = pack or (lambda codes: dense(codes, bits))
    codes, scales, zeros = bell(bits, group, symmetric=symmetric, seed=seed)
    stored = (zeros - np.uint64(version == 1)) & np.uint64(2**bits - 1)
    span = IN if group == -1 else group
    return {
        "qweight": tensor(pack(codes).T),
        "qzeros": tensor(pack(stored.T.copy())),
        "scales": tensor(scales.T),
        "g_idx": torch.arange(IN, dtype=torch.int32) // span,
    }


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


def write(folder: pathlib.Path, quantization, make, *, modules=MODULES, more=None) -> pathlib.Path:
    """Write a folder; `make(seed)` gives the parts of a module."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{module}.{part}": v for seed, module in enumerate(modules) for part, v in make(seed).items()}
    save_file({"model.norm.weight": torch.ones(IN), **tensors, **(more or {})}, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"]}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gptq_config(bits: int, group: int, label: str | None = "gptq", *, sym: bool = False, **more):
    told = {} if label is None else {"checkpoint_format": label}
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False, **told, **more}


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


def kinds(found, level: str | None = None) -> set[str]:
    return {suspicion.kind for suspicion in found.suspicions if level in (None, suspicion.level)}


def only(found, kind: str):
    (suspicion,) = [suspicion for suspicion in found.suspicions if suspicion.kind == kind]
    return suspicion


# GPTQ: label and content.


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("label", [None, "gptq", "gptq_v2"])
def test_the_mean_of_codes_less_zeros_tells_the_version(tmp_path, bits, version, label):
    folder = write(
        tmp_path / "m", gptq_config(bits, 64, label), lambda seed: gptq_parts(bits, 64, version=version, seed=seed)
    )
    found = examine(folder)
    content = {1: "gptq", 2: "gptq_v2"}[version]
    assert (found.content, found.confidence) == (content, "likely")
    assert found.label == (label or "gptq")
    assert (found.bits, found.group_size, found.symmetric, found.quantized_modules) == (bits, 64, False, 4)
    # The two readings lie a whole step apart.
    assert abs(found.figures["code_minus_zero"]["mean"] - (2 - version)) < 0.1
    if found.label == content:
        assert "version" not in kinds(found)
    else:
        suspicion = only(found, "version")
        assert suspicion.level == "wrong"
        assert suspicion.finding == f"the label says {found.label}, but the content is {content} (likely)"
        assert suspicion.remedy == f"read it with: cloq convert --read-as {content}"
        assert "mean" in suspicion.evidence
    assert found.readable == (found.label == content)
    if not found.readable:
        assert f"is labelled {found.label}, but its codes lie as in {content} (mean of codes" in found.refusal
        assert Checkpoint.open(folder, read_as=content).layout_name == content
        assert Checkpoint.open(folder, read_as=found.label).layout_name == found.label
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_the_label_alone_decides_where_the_content_tells_nothing(tmp_path, label):
    def make(seed):
        parts = gptq_parts(4, 64, seed=seed)
        _, _, zeros = bell(4, 64, seed=seed)
        half = zeros - (np.arange(OUT) % 2 == 0).astype(np.uint64)[:, None]
        return parts | {"qzeros": tensor(dense(half.T.copy(), 4))}

    folder = write(tmp_path / "m", gptq_config(4, 64, label), make)
    found = examine(folder)
    assert (found.content, found.confidence, found.reading) == (None, "open", label)
    assert only(found, "version-open").remedy == f"the label alone decides; it is read as {label}."
    assert Checkpoint.open(folder).layout_name == label


@pytest.mark.parametrize(
    ("label", "version"),
    [
        ({"quant_method": "gptq", "desc_act": False}, 1),
        ({"quant_method": "gptq", "desc_act": False, "checkpoint_format": "gptq_v2"}, 2),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel"}, 2),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_asymmetric_files_of_version_one_are_one_step_off_in_humming(tmp_path, label, version, symmetric):
    quantization = label | {"bits": 4, "group_size": 64, "sym": symmetric}
    found = examine(
        write(
            tmp_path / "m",
            quantization,
            lambda seed: gptq_parts(4, 64, version=version, symmetric=symmetric, seed=seed),
        )
    )
    assert found.readable
    if symmetric or version == 2:
        assert "humming" not in kinds(found)
        return
    suspicion = only(found, "humming")
    assert "--quantization humming take stored zeros as they lie" in suspicion.finding
    assert "cloq convert --format gptq_v2" in suspicion.remedy


@pytest.mark.parametrize("version", [1, 2])
def test_eight_bits_are_told_right_or_left_open(tmp_path, version):
    folder = write(tmp_path / "m", gptq_config(8, 64), lambda seed: gptq_parts(8, 64, version=version, seed=seed))
    assert examine(folder).content in ({1: "gptq", 2: "gptq_v2"}[version], None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_the_middle_zero_of_symmetric_files_is_certain(tmp_path, bits, version):
    """As GPTQModel publishes version 2 under the label of version 1."""
    folder = write(
        tmp_path / "m",
        gptq_config(bits, 64, "gptq", sym=True, meta={"quantizer": ["gptqmodel:5.6.0"]}),
        lambda seed: gptq_parts(bits, 64, version=version, symmetric=True, seed=seed),
    )
    found = examine(folder)
    assert (found.content, found.confidence) == ({1: "gptq", 2: "gptq_v2"}[version], "certain")
    assert found.symmetric is True
    assert found.producer == "gptqmodel:5.6.0"
    assert ("version" in kinds(found)) == (version == 2)
    # Read as version 1, every zero would be one too high, which a symmetric layer cannot have.
    assert found.reading == found.content


def test_constant_zeros_in_an_asymmetric_file_are_only_likely(tmp_path):
    folder = write(tmp_path / "m", gptq_config(4, 64), lambda s: gptq_parts(4, 64, version=1, symmetric=True, seed=s))
    found = examine(folder)
    assert (found.content, found.confidence) == ("gptq", "likely")
    assert only(found, "symmetric").level == "note"


def test_zeros_that_wrapped_are_counted(tmp_path):
    def make(seed):
        _, _, zeros = bell(2, 64, seed=seed)
        zeros[:3] = 0
        parts = gptq_parts(2, 64, seed=seed)
        parts["qzeros"] = tensor(dense(((zeros - np.uint64(1)) & np.uint64(3)).T.copy(), 2))
        return parts

    found = examine(write(tmp_path / "m", gptq_config(2, 64), make))
    suspicion = only(found, "wrapped-zeros")
    assert suspicion.level == "wrong"
    assert suspicion.finding.startswith(f"{3 * 4 * 4} of {OUT * 4 * 4} stored zeros have all bits set")
    assert "lowered its neighbour" in suspicion.finding
    assert not found.readable
    assert "a stored zero has all bits set" in found.refusal


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", "gptq_p"])
def test_planar_codes_have_the_same_shapes_and_are_told_by_their_entropy(tmp_path, label, symmetric):
    folder = write(
        tmp_path / "m",
        gptq_config(3, 64, label, sym=symmetric),
        lambda seed: gptq_parts(3, 64, pack=planar, symmetric=symmetric, seed=seed),
    )
    found = examine(folder)
    assert (found.content, found.confidence) == ("gptq_p", "certain" if symmetric else "likely")
    assert found.figures["entropy_per_code"]["planar"] < found.figures["entropy_per_code"]["dense"]
    assert ("order" in kinds(found)) == (label != "gptq_p")
    if label == "gptq_p":
        assert not found.readable
        assert "checkpoint_format is 'gptq_p'" in found.refusal
    else:
        assert "convert it to gptq_v2 with GPTQModel" in only(found, "order").remedy


def test_planar_words_of_four_bits_are_those_of_version_two(tmp_path):
    folder = write(tmp_path / "m", gptq_config(4, 64, "gptq_p"), lambda seed: gptq_parts(4, 64, seed=seed))
    found = examine(folder)
    assert (found.label, found.content) == ("gptq_p", "gptq_v2")
    assert not kinds(found, "wrong")


def test_codes_without_a_bell_leave_the_order_open(tmp_path):
    def make(seed):
        parts = gptq_parts(3, 64, seed=seed)
        parts["qweight"] = torch.randint(-(2**31), 2**31, parts["qweight"].shape).to(torch.int32)
        return parts

    found = examine(write(tmp_path / "m", gptq_config(3, 64), make))
    assert {"order-open", "uniform"} <= kinds(found, "doubtful")
    assert "version-open" in kinds(found) or "zeros-and-codes" in kinds(found) or found.confidence == "likely"


def test_codes_that_depend_on_their_place_are_striped(tmp_path):
    def make(seed):
        parts = gptq_parts(4, 64, seed=seed)
        parts["qweight"] &= 0x7FFFFFFF - 0x000000F0  # codes 1 and 7 of each word lose bits
        return parts

    suspicion = only(examine(write(tmp_path / "m", gptq_config(4, 64, "gptq_v2"), make)), "striped")
    assert suspicion.level == "doubtful"


def test_zeros_in_another_order_than_their_groups(tmp_path):
    def make(seed):
        parts = gptq_parts(4, 32, seed=seed)
        parts["qzeros"] = parts["qzeros"][torch.randperm(IN // 32), :][:, torch.randperm(parts["qzeros"].shape[1])]
        return parts

    found = examine(write(tmp_path / "m", gptq_config(4, 32, "gptq_v2"), make))
    assert "zeros-order" in kinds(found, "doubtful")
    assert found.figures["slope_of_codes_on_zeros"] < 0.3
    honest = write(tmp_path / "n", gptq_config(4, 32, "gptq_v2"), lambda seed: gptq_parts(4, 32, seed=seed))
    assert examine(honest).figures["slope_of_codes_on_zeros"] > 0.6


def test_act_order_is_seen_and_still_decided(tmp_path):
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(3))

    def make(seed):
        codes, _, _ = bell(4, 64, seed=seed)
        parts = gptq_parts(4, 64, version=1, seed=seed)
        parts["qweight"] = tensor(dense(codes[:, order.numpy()], 4).T)
        parts["g_idx"] = parts["g_idx"][order]
        return parts

    found = examine(write(tmp_path / "m", gptq_config(4, 64), make))
    assert found.content == "gptq"
    assert not found.readable
    assert "though the config says desc_act false" in only(found, "act-order").finding
    found = examine(
        write(
            tmp_path / "n",
            {**gptq_config(4, 64), "desc_act": True},
            lambda seed: gptq_parts(4, 64, version=1, seed=seed),
        )
    )
    assert only(found, "act-order").level == "note"
    assert found.readable


def test_labels_that_the_shapes_contradict(tmp_path):
    found = examine(write(tmp_path / "bits", gptq_config(2, 64), lambda seed: gptq_parts(4, 64, version=1, seed=seed)))
    assert only(found, "bits").finding == "the config says 2 bits, but the shapes hold 4-bit codes"
    assert found.bits == 4
    assert not found.readable
    found = examine(
        write(tmp_path / "group", gptq_config(4, 128), lambda seed: gptq_parts(4, 64, version=1, seed=seed))
    )
    assert only(found, "group-size").finding == "the config says groups of 128, but the shapes hold groups of 64"
    assert not found.readable
    found = examine(
        write(tmp_path / "sym", gptq_config(4, 64, sym=True), lambda s: gptq_parts(4, 64, version=1, seed=s))
    )
    assert only(found, "symmetric").level == "wrong"
    both = gptq_config(4, 64, "gptq", format="gptq_v2")
    found = examine(write(tmp_path / "two", both, lambda seed: gptq_parts(4, 64, version=1, seed=seed)))
    assert only(found, "two-labels").level == "wrong"
    newer = gptq_config(4, 64, None, format="gptq_v2")
    found = examine(write(tmp_path / "new", newer, lambda seed: gptq_parts(4, 64, seed=seed)))
    assert (found.label, found.content) == ("gptq_v2", "gptq_v2")


@pytest.mark.parametrize(
    ("value", "text", "level"),
    [
        (float("nan"), "NaN or Inf", "wrong"),
        (0.0, "zero", "wrong"),
        (-0.5, "negative", "wrong"),
        (3e-6, "subnormal", "note"),
    ],
)
def test_scales_that_no_grid_has(tmp_path, value, text, level):
    def make(seed):
        parts = gptq_parts(4, 64, version=1, seed=seed)
        parts["scales"][1, 5] = value
        return parts

    found = examine(write(tmp_path / "m", gptq_config(4, 64), make))
    suspicion = only(found, "scales")
    assert (suspicion.level, suspicion.finding) == (level, f"4 scales are {text}")
    assert found.readable == (level == "note")


def test_missing_and_extra_tensors(tmp_path):
    def make(seed):
        parts = gptq_parts(4, 64, version=1, seed=seed)
        if seed == 0:
            parts["weight"] = torch.zeros(2, 2)
        if seed == 1:
            del parts["qzeros"]
        return parts

    found = examine(write(tmp_path / "m", gptq_config(4, 64), make, modules=[*MODULES, "lm_head"]))
    assert only(found, "missing").finding == "1 of 5 modules have no qzeros"
    assert "hold a float weight too" in only(found, "extra").finding
    assert only(found, "lm-head").level == "note"
    assert not found.readable


def test_unusual_and_mixed_groups(tmp_path):
    found = examine(write(tmp_path / "m", gptq_config(4, 16), lambda seed: gptq_parts(4, 16, version=1, seed=seed)))
    assert only(found, "unusual-group").finding.startswith("groups of 16 are unusual")
    assert found.content == "gptq"
    found = examine(write(tmp_path / "n", gptq_config(4, -1), lambda seed: gptq_parts(4, -1, version=1, seed=seed)))
    assert (found.group_size, found.readable) == (-1, True)


# AutoRound, AWQ and others.


@pytest.mark.parametrize(
    ("packing", "version", "label"),
    [("auto_round:auto_gptq", 1, "gptq"), ("auto_round:gptqmodel", 2, "gptq_v2"), ("auto_round", 2, "gptq_v2")],
)
def test_autoround_files_without_index(tmp_path, packing, version, label):
    def make(seed):
        return {k: v for k, v in gptq_parts(4, 64, version=version, seed=seed).items() if k != "g_idx"}

    quantization = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "autoround_version": "0.16.1",
        "bits": 4,
        "group_size": 64,
        "sym": False,
    }
    found = examine(write(tmp_path / "m", quantization, make))
    assert (found.label, found.content, found.producer) == (label, label, "auto_round:0.16.1")
    assert found.readable
    assert "no-index" not in kinds(found)
    assert "version" not in kinds(found)
    relabelled = gptq_config(4, 64)
    assert only(examine(write(tmp_path / "n", relabelled, make)), "no-index").level == "wrong"


def test_autoround_symmetric_files_may_have_negative_scales(tmp_path):
    def make(seed):
        parts = gptq_parts(4, 64, version=1, symmetric=True, seed=seed)
        parts["scales"][:, ::2] *= -1
        return parts

    found = examine(write(tmp_path / "m", gptq_config(4, 64, sym=True), make))
    assert "AutoRound writes such" in only(found, "scales").remedy
    assert not found.readable


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


# compressed-tensors.


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


# Our own files, no files, and large files.


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
