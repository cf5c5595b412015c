"""What the fuzz test found in the readers, each made by hand so that it stays found whatever the seed."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.safe_tensors import TensorFile, read_safetensors
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.types import LoraPair

FINGERPRINT = "sha256:" + "5" * 64


@pytest.fixture
def adapter(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(2, 8, generator=generator), torch.randn(4, 2, generator=generator), alpha=4.0)
    write_adapter(tmp_path / "adapter", {"layer": pair}, base_model="m", base_fingerprint=FINGERPRINT)
    return tmp_path / "adapter"


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for reader in (read_safetensors, TensorFile, read_json):
        with pytest.raises(FormatError, match="is no ordinary file; expected a"):
            reader(tmp_path / "pipe")


def test_a_tensor_that_a_header_names_twice_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    entry = json.loads(path.read_bytes()[8:].split(b"}}")[0] + b"}}")["base_model.model.layer.lora_A.weight"]
    again = f', "base_model.model.layer.lora_A.weight": {json.dumps(entry)}}}'
    change_header(path, lambda text: text.rstrip()[:-1] + again)
    with pytest.raises(FormatError, match=r"'base_model\.model\.layer\.lora_A\.weight' occurs twice"):
        read_adapter(adapter)


@pytest.mark.parametrize("name", ["a\\nb", "x" * 70_000, "\\u001b[2J"])
def test_names_that_would_hide_a_message_are_refused(adapter, name):
    path = adapter / "adapter_model.safetensors"
    change_header(path, lambda text: text.replace("base_model.model.layer.lora_A.weight", name))
    with pytest.raises(FormatError, match=r"holds a tensor of the name '.*' with \d+ characters") as caught:
        read_adapter(adapter)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_side_that_no_tensor_can_have_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "I32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FormatError, match="is truncated or not a safetensors file"):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 10**400}, "expected numbers"),
        ({"r": 2.5}, "rank 2.5; a rank is 1 or more, and whole"),
        ({"use_dora": "x" * 70_000}, "use_dora is 'x+; only plain LoRA"),
        ({"alpha_pattern": {"layer": 10**400}}, "alpha_pattern maps 'layer' to 1000"),
    ],
)
def test_numbers_and_texts_of_any_size_end_in_one_line(adapter, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(FormatError, match=message) as caught:
        read_adapter(adapter)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "cloq_adapter.json"])
def test_an_adapter_whose_files_lie_elsewhere_is_refused(tmp_path, adapter, name):
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    with pytest.raises(FormatError, match="is a link that leads out of"):
        read_adapter(adapter)


def test_links_that_lead_round_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(FormatError, match=r"points back to itself|does not exist|cannot be read"):
        read_json(require_inside(tmp_path, tmp_path / "a"))


def test_a_fingerprint_that_would_hide_a_message_is_refused(adapter):
    path = adapter / "cloq_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "sha256:\x1b[31m"}))
    with pytest.raises(FormatError, match=r"base_fingerprint is .*; the file is damaged"):
        read_adapter(adapter)
