"""What stock vLLM reads of our files, without any help of ours: 4-bit codes with zeros, and symmetric GPTQ."""

from __future__ import annotations

import json

import pytest
import torch

from cloq_export.formats.registry import LAYOUTS
from cloq_export.runtimes.hf import dequantized_model
from cloq_export.types import QuantSpec

pytestmark = pytest.mark.slow

IDS = [5, 17, 8, 80, 33, 2, 9, 64, 21, 40, 7, 11]


@pytest.mark.parametrize(
    ("layout", "spec", "method"),
    [
        ("compressed_tensors", QuantSpec(4, 32), "compressed-tensors"),
        ("gptq", QuantSpec(4, 32, symmetric=True), "gptq"),
    ],
)
def test_stock_vllm_reads_the_same_integers(write_export, probe, layout, spec, method):
    written = write_export(spec, layout=LAYOUTS[layout], dtype=torch.float16)
    found = probe("stock.py", written.folder, json.dumps(IDS), VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    assert method in found["quantization"].replace("_", "-")
    reference = dequantized_model(written.folder)
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([IDS])).logits[0]
    expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    # Zeros off by one, or codes in another order, move these by several units; float16 arithmetic by hundredths.
    difference = (torch.tensor(found["logprobs"]) - expected).abs().max()
    assert difference < 0.05, difference
