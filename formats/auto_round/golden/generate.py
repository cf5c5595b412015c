"""Write the golden files with AutoRound itself, so that they hold its own bytes.

Run with auto-round 0.16.1 installed (`pip install auto-round==0.16.1`): `python generate.py` writes cases.json and one
file for each case beside this script. Each file holds a layer's canonical tensors (`canonical.codes`, `.scales`,
`.zeros`) and the tensors that AutoRound packs it into.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
from safetensors.torch import save_file

# name -> (packing_format, bits, group size, symmetric, out, in); group size -1 is one group per output channel.
CASES = {
    "w2_g32": ("auto_round", 2, 32, False, 32, 64),
    "w3_channel": ("auto_round", 3, -1, False, 32, 32),
    "w4_g32": ("auto_round", 4, 32, False, 32, 32),
    "w8_g32_symmetric": ("auto_round", 8, 32, True, 32, 32),
    "w2_g32_gptq": ("auto_round:auto_gptq", 2, 32, True, 32, 64),
    "w3_g32_gptq": ("auto_round:auto_gptq", 3, 32, True, 32, 32),
    "w4_channel_gptq": ("auto_round:auto_gptq", 4, -1, True, 32, 32),
}


def pack(packing: str, bits: int, group_size: int, symmetric: bool, out: int, columns: int) -> dict[str, torch.Tensor]:
    """Return a random layer and what AutoRound packs it into."""
    generator = torch.Generator().manual_seed(bits)
    span = columns if group_size == -1 else group_size
    sides = (out, columns // span)
    codes = torch.randint(0, 2**bits, (out, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, sides, generator=generator)
    zeros = torch.full(sides, 2 ** (bits - 1)) if symmetric else zeros
    scales = (torch.randint(1, 1024, sides, generator=generator) / 4096).half()
    wide = scales.float().repeat_interleave(span, 1), zeros.repeat_interleave(span, 1)
    weight = torch.nn.Parameter((codes - wide[1]) * wide[0], requires_grad=False)
    layer = dynamic_import_quant_linear_for_packing(packing, bits, group_size, symmetric)(
        bits, group_size, columns, out, bias=False
    )
    layer.device = torch.device("cpu")
    linear = SimpleNamespace(weight=weight, bias=None)
    layer.pack(linear, scales.float(), zeros.float(), None, device="cpu")
    canonical = {"codes": codes.to(torch.uint8), "scales": scales, "zeros": zeros.to(torch.uint8)}
    tensors = {f"canonical.{name}": tensor for name, tensor in canonical.items()} | layer.state_dict()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    folder = Path(__file__).parent
    fields = ("packing", "bits", "group_size", "symmetric")
    described = {name: dict(zip(fields, case[:4], strict=True)) for name, case in CASES.items()}
    (folder / "cases.json").write_text(json.dumps(described, indent=1) + "\n")
    for name, case in CASES.items():
        save_file(pack(*case), folder / f"{name}.safetensors")
