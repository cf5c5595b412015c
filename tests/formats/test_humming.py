"""How Humming, which serves 2 and 3 bits in vLLM on GPUs, takes the stored zeros of GPTQ files.

Its conversion of a file's tensors needs no GPU: it is run here, and the weight is put together as its own reference
does, `(code - zero point) * scale`, with codes and zero points taken out of the same bit stream that GPTQ stores.
"""

import json
from pathlib import Path

import pytest
import torch
from other_readers import installed, run_reader
from random_layers import make_layer
from safetensors.torch import load_file, save_file

from cloq_export.formats.gptq import GPTQ_V1, GPTQ_V2
from cloq_export.kernels.bitpack import unpack_rows
from cloq_export.types import QuantizedLayer, QuantSpec

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "real_readers" / "run_humming.py"
# The release that vLLM 0.33 requires, and what its modules import.
PACKAGES = ("humming-kernels==0.1.19", "cuda-bindings==13.5.0", "cuda-pathfinder==1.9.1", "tabulate==0.10.0")
PACKINGS = ("gptq", "auto_round:auto_gptq", "auto_round:gptqmodel")
IN, OUT, GROUP = 128, 64, 32


def weight_of(read: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Return (out, in): what Humming computes with, from what its conversion left."""
    codes = unpack_rows(read["weight"], bits).float()
    if "zero_point" in read:
        zeros = unpack_rows(read["zero_point"].t().contiguous(), bits).t().float()
    else:
        zeros = torch.full((OUT, IN // GROUP), float(1 << (bits - 1)))
    return (codes - zeros.repeat_interleave(GROUP, 1)) * read["weight_scale"].float().repeat_interleave(GROUP, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[QuantizedLayer, torch.Tensor]]:
    """Return case -> (the layer that was stored, the weight that Humming makes of the file)."""
    folder = tmp_path_factory.mktemp("humming")
    cases, layers = {}, {}
    for packing in PACKINGS:
        for layout in (GPTQ_V1, GPTQ_V2):
            for bits in (2, 3, 4):
                for symmetric in (False, True):
                    name = f"{packing.replace(':', '-')} {layout.name} {bits} {symmetric}"
                    layers[name] = make_layer(QuantSpec(bits, GROUP, symmetric), OUT, IN, seed=bits, least_zero=1)
                    save_file(layout.pack_layer(layers[name], name=name), folder / f"{name}.safetensors")
                    cases[name] = {"bits": bits, "group_size": GROUP, "symmetric": symmetric, "packing": packing}
    (folder / "cases.json").write_text(json.dumps(cases))
    run_reader(SCRIPT, installed(*PACKAGES), str(folder))
    return {
        name: (layer, weight_of(load_file(folder / f"{name}.read.safetensors"), layer.spec.bits))
        for name, layer in layers.items()
    }


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_are_taken_as_they_lie_whatever_the_label_says(weights, packing: str, bits: int) -> None:
    name = packing.replace(":", "-")
    layer, read = weights[f"{name} {GPTQ_V2.name} {bits} False"]
    assert torch.equal(read, layer.dequantize())
    layer, read = weights[f"{name} {GPTQ_V1.name} {bits} False"]
    # Version 1 stores zero - 1, so every weight comes out one step too high.
    assert torch.equal(read, layer.dequantize() + layer.scales.float().repeat_interleave(GROUP, 1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("layout", [GPTQ_V1, GPTQ_V2], ids=lambda layout: layout.name)
def test_symmetric_files_of_both_versions_are_read_right(weights, bits: int, layout) -> None:
    layer, read = weights[f"gptq {layout.name} {bits} True"]
    assert torch.equal(read, layer.dequantize())
