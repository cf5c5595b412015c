"""Merged weights: the golden file, the worked example of the specification, and the record beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest
import torch

import cloq_export.formats.merged
from cloq_export.formats.merged import Rounding, codec, float_blocks, is_record, merged_blocks, merged_record
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

FOLDER = Path(cloq_export.formats.merged.__file__).parent
GOLDEN = json.loads((FOLDER / "golden" / "w3_rank2.json").read_text())
FINGERPRINT = "sha256:" + "0123456789abcdef" * 4


def golden_layer() -> tuple[QuantizedLayer, LoraPair]:
    layer = QuantizedLayer(
        torch.tensor(GOLDEN["codes"], dtype=torch.uint8),
        torch.tensor(GOLDEN["scales"], dtype=torch.float16),
        torch.tensor(GOLDEN["zeros"], dtype=torch.uint8),
        QuantSpec(GOLDEN["bits"], GOLDEN["group_size"]),
    )
    lora = [torch.tensor(GOLDEN[name], dtype=torch.float16) for name in ("lora_A", "lora_B")]
    return layer, LoraPair(*lora, alpha=GOLDEN["alpha"])


def whole(blocks) -> torch.Tensor:
    return torch.cat([block for _, block in blocks])


def test_the_golden_file_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("generate", FOLDER / "golden" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.make_case() == GOLDEN


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_golden_weights(monkeypatch, dtype, rows_at_a_time):
    monkeypatch.setattr(codec, "_BLOCK_BYTES", rows_at_a_time * 8 * 16)
    expected = torch.tensor(GOLDEN[str(dtype).removeprefix("torch.")], dtype=dtype)
    assert torch.equal(whole(merged_blocks(*golden_layer())).to(dtype), expected)


def test_the_example_of_the_specification():
    layer = QuantizedLayer(
        torch.tensor([[3, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.uint8),
        torch.tensor([[0.1]], dtype=torch.float16),
        torch.tensor([[1]], dtype=torch.uint8),
        QuantSpec(2, 8),
    )
    pair = LoraPair(torch.tensor([[0.25, -1.0, 0, 0, 0, 0, 0, 0]]), torch.tensor([[0.5]]), alpha=1.0)
    exact = whole(merged_blocks(layer, pair))
    assert exact[0, :2].tolist() == [0.324951171875, -0.5999755859375]
    assert exact.to(torch.bfloat16)[0, :2].tolist() == [0.32421875, -0.6015625]
    for value in ("0.324951171875", "0.5999755859375", "0.32421875", "0.6015625"):
        assert value in (FOLDER / "SPEC.md").read_text()


def test_float_tensors_go_through_with_and_without_a_pair():
    _, pair = golden_layer()
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole(float_blocks(weight, None)), weight.double())
    added = whole(float_blocks(weight, pair)) - weight.double()
    torch.testing.assert_close(added, pair.lora_B.double() @ pair.lora_A.double() * 1.5, rtol=1e-12, atol=1e-12)
    ((rows, scalar),) = float_blocks(torch.tensor(2.5), None)
    assert (rows, scalar.item(), scalar.shape) == (slice(None), 2.5, ())


def test_the_record_fits_its_schema(tmp_path):
    schema = json.loads((FOLDER / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    adapter = {"name": "cloq", "sha256": FINGERPRINT, "modules": ["a"]}
    lost = {"merged": Rounding(2, 0.1, 0.01, "a.weight"), "vectors": Rounding(1)}
    record = merged_record(FINGERPRINT, torch.bfloat16, {"b": {}, "a": {}}, lost, adapter)
    assert record["modules"] == ["a", "b"]
    jsonschema.validate(record, schema)
    jsonschema.validate({**record, "adapter": None}, schema)
    for change in ({"format_version": 2}, {"dtype": "int8"}, {"base_fingerprint": "x"}, {"rounding": {}}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**record, **change}, schema)
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert is_record(tmp_path / "record.json")
    (tmp_path / "record.json").write_text("{}")
    assert not is_record(tmp_path / "record.json")
    assert not is_record(tmp_path / "nothing.json")
