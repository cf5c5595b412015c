"""The detective: files as AutoGPTQ, GPTQModel, AutoAWQ, AutoRound and llm-compressor write them are told apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from foreign_checkpoints import (
    IN,
    MODULES,
    OUT,
    bell,
    dense,
    gptq_config,
    gptq_parts,
    kinds,
    only,
    tensor,
    words,
    write,
)

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.detective import examine


def planar(codes: np.ndarray) -> np.ndarray:
    """Of 32 codes of 3 bits first all low two bits, then all high bits."""
    blocks = codes.reshape(codes.shape[0], -1, 32)
    low = ((blocks[..., None] >> np.arange(2, dtype=np.uint64)) & 1).reshape(*blocks.shape[:2], 64)
    high = (blocks >> np.uint64(2)) & 1
    return words(np.concatenate([low, high], axis=2).reshape(codes.shape[0], -1))


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


@pytest.mark.parametrize(
    ("packing", "version", "label"),
    [
        ("auto_round:auto_gptq", 1, "auto_round_gptq"),
        ("auto_round:gptqmodel", 2, "auto_round"),
        ("auto_round", 2, "auto_round"),
    ],
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
    assert (found.label, found.content, found.reading, found.producer) == (label, label, label, "auto_round:0.16.1")
    assert ("humming" in kinds(found)) is (version == 1)
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
