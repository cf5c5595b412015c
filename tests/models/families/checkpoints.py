"""Read a quantized checkpoint and an adapter with decoders that share no code with the package.

A layer's numbers are one little-endian stream of bits in both layouts: codes along a row of the weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]


def read_tensors(folder: Path) -> Tensors:
    """Return every tensor of a folder's safetensors files."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def dequantized(tensors: Tensors, quantization: Mapping[str, Any]) -> Tensors:
    """Return Q of every quantized module of a checkpoint, (out, in) float32 under the name of the weight."""
    if quantization["quant_method"] == "gptq":
        return {
            name.replace(".qweight", ".weight"): _gptq(tensors, name.removesuffix(".qweight"), quantization["bits"])
            for name in tensors
            if name.endswith(".qweight")
        }
    bits = quantization["config_groups"]["group_0"]["weights"]["num_bits"]
    return {
        name.replace(".weight_packed", ".weight"): _packed(tensors, name.removesuffix("_packed"), bits)
        for name in tensors
        if name.endswith(".weight_packed")
    }


def without_codes(tensors: Tensors) -> Tensors:
    """Return the tensors of a checkpoint that belong to no quantized module."""
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    parts += (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(parts)}


def fuse_experts(weights: Tensors, floats: Tensors, *, interleaved: bool) -> bool:
    """Put experts that a source holds in one tensor together again, and return whether there are such.

    Args:
        weights: tensors by name; those of single experts are taken out, and the fused ones are put in.
        floats: the source's tensors.
        interleaved: rows of gate and up alternate.
    """
    single = re.compile(r"(.*\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
    matches = [match for name in weights if name not in floats and (match := single.fullmatch(name))]
    for match in matches:
        part, bias = match[3], match[4] == "bias"
        both, alone = (f"{match[1]}experts.{kind}{'_bias' if bias else ''}" for kind in ("gate_up_proj", part))
        gate_first = {both: True, f"{match[1]}input_linear.weight": True, f"{match[1]}output_linear.weight": False}
        gate_first |= {alone: False, f"{match[1]}experts.fc1.weight": True, f"{match[1]}experts.fc2.weight": False}
        fits = (name for name, gated in gate_first.items() if name in floats and gated == (part != "down_proj"))
        fused = next(fits, None)
        if fused is None:
            continue
        tensor = weights.pop(match[0])
        held = weights.setdefault(fused, floats[fused].clone())[int(match[2])]
        held = held if bias or held.shape[-1] == tensor.shape[-1] else held.t()
        _part(held, part if gate_first[fused] else "", interleaved).copy_(tensor)
    return bool(matches)


def cut_joined(beside: Tensors, floats: Tensors) -> bool:
    """Cut what transformers joins when it reads (convolutions of q, k and v), and return whether there is such."""
    joined = [name for name in beside if name not in floats and name.endswith(".conv1d.weight")]
    for name in joined:
        parts = [name.replace(".conv1d.", f".{part}_conv1d.") for part in "qkv"]
        beside |= dict(zip(parts, beside.pop(name).split([len(floats[part]) for part in parts]), strict=True))
    return bool(joined)


def _part(held: torch.Tensor, part: str, interleaved: bool) -> torch.Tensor:
    """Return the rows of gate or up in a tensor of both, or all of another one."""
    if not part:
        return held
    second = part == "up_proj"
    half = len(held) // 2
    return held[second::2] if interleaved else held[half:] if second else held[:half]


def merge_adapter(model: torch.nn.Module, folder: Path) -> int:
    """Add (alpha / rank) B A of a PEFT adapter to the weights of a float model; return the number of pairs."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_tensors(folder)
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    for module in modules:
        a, b = (tensors[f"{module}.{part}.weight"].to(torch.float32) for part in ("lora_A", "lora_B"))
        name = module.removeprefix("base_model.model.")
        alpha = (config.get("alpha_pattern") or {}).get(name, config["lora_alpha"])
        with torch.no_grad():
            weight = _weight_of(model, name, (b.shape[0], a.shape[1]))
            weight += alpha / a.shape[0] * (b @ a)
    return len(modules)


def _weight_of(model: torch.nn.Module, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """Return the weight of a linear, of this shape: of an expert, its part of the tensor that holds all experts."""
    owner, _, rest = name.rpartition(".experts.")
    number, _, part = rest.partition(".")
    experts: Any = model.get_submodule(f"{owner}.experts") if owner else None
    if experts is None or not number.isdigit() or not (hasattr(experts, "down_proj")):
        weight: torch.Tensor = model.get_submodule(name).weight
        return weight
    gated = part in ("gate_proj", "up_proj") and hasattr(experts, "gate_up_proj")
    held = (experts.gate_up_proj if gated else getattr(experts, part))[int(number)]
    transposed = getattr(experts, "is_transposed", held.shape[-1] != shape[1])
    return _part(held.t() if transposed else held, part if gated else "", not getattr(experts, "is_concatenated", True))


def _gptq(tensors: Tensors, module: str, bits: int) -> torch.Tensor:
    codes = _numbers(tensors[f"{module}.qweight"].t(), bits)
    zeros = _numbers(tensors[f"{module}.qzeros"], bits).t()
    return _weight(codes, tensors[f"{module}.scales"].t(), zeros)


def _packed(tensors: Tensors, weight: str, bits: int) -> torch.Tensor:
    rows, columns = tensors[f"{weight}_shape"].tolist()
    codes = _numbers(tensors[f"{weight}_packed"], bits)[:, :columns]
    zeros = _numbers(tensors[f"{weight}_zero_point"].t(), bits).t()[:rows]
    return _weight(codes, tensors[f"{weight}_scale"], zeros)


def _weight(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    span = codes.shape[1] // scales.shape[1]
    scales, zeros = (part.to(torch.float32).repeat_interleave(span, dim=1) for part in (scales, zeros))
    return scales * (codes - zeros)


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers of a few bits that each row of 32-bit words holds, the lowest bits first."""
    stream = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    grouped = stream[:, : stream.shape[1] // bits * bits].reshape(len(stream), -1, bits)
    return torch.from_numpy((grouped * (1 << np.arange(bits))).sum(-1)).to(torch.float32)
