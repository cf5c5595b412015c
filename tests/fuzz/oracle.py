"""What the bytes of a folder say, read slowly and without any code of the package."""

from __future__ import annotations

import json
import math
import pathlib
import re
import struct
from typing import Any

import numpy as np

CODES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


class Unsure(Exception):
    """The oracle does not know this corner; nothing is compared."""


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def load_json(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    return json.loads(path.read_bytes(), object_pairs_hook=distinct)


def load_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length], object_pairs_hook=distinct)
    payload = data[8 + length :]
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(payload):
            raise ValueError("offsets outside the file")
        raw = payload[begin:end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        elif entry["dtype"] in CODES:
            values = np.frombuffer(raw, CODES[entry["dtype"]])
        else:
            values = np.frombuffer(raw, "u1")
            tensors[name] = values
            continue
        tensors[name] = values.reshape(entry["shape"])
    return tensors, metadata


def load_checkpoint_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if (folder / "model.safetensors").exists():
            return load_tensors(folder / "model.safetensors")[0]
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        count = len(names)
        if names != [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]:
            raise Unsure
        shards = [load_tensors(folder / name)[0] for name in names]
        if len({name for shard in shards for name in shard}) < sum(map(len, shards)):
            raise ValueError("a tensor lies in two files")
        return {name: values for shard in shards for name, values in shard.items()}
    weights = load_json(index)["weight_map"]
    found: dict[str, np.ndarray] = {}
    for file in sorted(set(weights.values())):
        tensors, _ = load_tensors(folder / file)
        for name, values in tensors.items():
            if weights[name] != file or name in found:
                raise ValueError("index and files disagree")
            found[name] = values
    if set(found) != set(weights):
        raise ValueError("index and files disagree")
    return found


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Cut each row of 32-bit words into codes: bit j of code i is bit i * bits + j."""
    rows = np.ascontiguousarray(words.astype("<u4"))
    flat = np.unpackbits(rows.view("u1").reshape(rows.shape[0], -1), axis=1, bitorder="little")
    cut = flat[:, : count * bits].reshape(rows.shape[0], count, bits).astype(np.int64)
    return (cut << np.arange(bits)).sum(axis=2)


def padded_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Cut each word into 32 // bits codes and leave the rest."""
    each = 32 // bits
    lanes = (words.astype("<u4")[:, :, None] >> (np.arange(each, dtype="<u4") * bits)) & (2**bits - 1)
    return lanes.reshape(words.shape[0], -1)[:, :count].astype(np.int64)


Layer = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int, bool]]


def read_layers(folder: pathlib.Path) -> dict[str, Layer]:
    """Return module -> (codes (out, in), scales (out, groups), zeros (out, groups), (bits, group size, symmetric))."""
    config = load_json(folder / "config.json")
    tensors = load_checkpoint_tensors(folder)
    quantization = config["quantization_config"]
    ours = quantization.get("cloq")
    if quantization["quant_method"] == "gptq":
        part, read, grid = "qweight", read_gptq, gptq_grids(quantization)
    elif quantization["quant_method"] == "auto-round":
        part, read, grid = "qweight", read_auto_round, auto_round_grids(quantization, tensors)
    else:
        part, read, grid = "weight_packed", read_packed, packed_grids(quantization)
    if ours is None:
        modules = [name.removesuffix(f".{part}") for name in tensors if name.endswith(f".{part}")]
    else:
        modules = ours["modules"]
    layers = {}
    for module in modules:
        parts = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.rpartition(".")[0] == module}
        layers[module] = read(quantization, parts, grid(module))
    return layers


def gptq_grids(quantization: dict[str, Any]):
    keys = ("bits", "group_size", "sym")
    default = tuple(quantization.get(key, False if key == "sym" else None) for key in keys)
    own = {}
    for pattern, values in (quantization.get("dynamic") or {}).items():
        match = re.fullmatch(r"\+:\^(.*)\$", pattern)
        if match is None and not pattern.startswith("-:^"):
            raise Unsure
        if match:
            own[match[1].replace("\\", "")] = tuple(values.get(key, quantization.get(key)) for key in keys)
    return lambda module: own.get(module, default)


def auto_round_grids(quantization: dict[str, Any], tensors: dict[str, np.ndarray]):
    keys = ("bits", "group_size", "sym")
    default = tuple(quantization.get(key, False if key == "sym" else None) for key in keys)
    own = {}
    for name, values in (quantization.get("extra_config") or {}).items():
        if f"{name}.qweight" not in tensors:
            # Any other key is searched for in the names.
            if re.fullmatch(r"[\w.-]+", name) is None or any(re.search(name, coded) for coded in tensors):
                raise Unsure
            continue
        own[name] = tuple(values.get(key, value) for key, value in zip(keys, default, strict=True))
    return lambda module: own.get(module, default)


def packed_grids(quantization: dict[str, Any]):
    grids = {}
    for group in quantization["config_groups"].values():
        weights = group["weights"]
        size = weights.get("group_size")
        grid = (weights["num_bits"], -1 if size is None else size, weights.get("symmetric", True))
        for target in group["targets"]:
            if target.startswith("re:"):
                raise Unsure
            grids[target] = grid
    return lambda module: grids[module] if module in grids else grids["Linear"]


def read_gptq(quantization: dict[str, Any], parts: dict[str, np.ndarray], grid: tuple[int, int, bool]) -> Layer:
    bits, group_size, _ = grid
    version = {"gptq": 1, "gptq_v2": 2}[quantization.get("checkpoint_format", "gptq")]
    words, out_features = parts["qweight"].shape
    in_features = words * 32 // bits
    groups = 1 if group_size == -1 else in_features // group_size
    span = in_features // groups
    codes = stream(parts["qweight"].T, bits, in_features)
    zeros = stream(parts["qzeros"], bits, out_features).T
    if grid[2] is True and quantization.get("cloq") is None and (zeros == 2 ** (bits - 1) - (version == 2)).all():
        raise Unsure  # symmetric zeros as the other version stores them: the content counts
    if version == 1:
        zeros = zeros + 1
    if zeros.max() >= 2**bits and not {"checkpoint_format", "format", "cloq"} & set(quantization):
        raise Unsure  # without a label, symmetric layers beside this one may prove the other version
    if zeros.max() >= 2**bits or zeros.shape != (out_features, groups):
        raise ValueError("zeros")
    if not np.array_equal(parts["g_idx"], np.arange(in_features) // span):
        raise ValueError("act-order")
    if parts["qweight"].dtype != np.dtype("<i4"):
        raise ValueError("dtype")
    return codes, half_scales(parts["scales"]).T, zeros, grid


def half_scales(scales: np.ndarray) -> np.ndarray:
    """Return scales of any float type in float16, which must be the same numbers."""
    if not np.array_equal(scales.astype("<f2").astype("<f8"), scales.astype("<f8")):
        raise ValueError("scales lose something")
    return scales.astype("<f2")


def read_auto_round(quantization: dict[str, Any], parts: dict[str, np.ndarray], grid: tuple[int, int, bool]) -> Layer:
    packings = {"auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2"}
    packings |= dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq"), "gptq")
    label = packings[quantization.get("packing_format", "auto_round:auto_gptq")]
    in_features = len(parts["qweight"]) * 32 // grid[0]
    index = np.arange(in_features) // (in_features if grid[1] == -1 else grid[1])
    return read_gptq({**quantization, "checkpoint_format": label}, {"g_idx": index, **parts}, grid)


def read_packed(quantization: dict[str, Any], parts: dict[str, np.ndarray], grid: tuple[int, int, bool]) -> Layer:
    bits, group_size, symmetric = grid
    out_features, in_features = (int(side) for side in parts["weight_shape"])
    groups = 1 if group_size == -1 else in_features // group_size
    needed = {stream: -(-in_features * bits // 32), padded_words: -(-in_features // (32 // bits))}
    fitting = [cut for cut, words in needed.items() if parts["weight_packed"].shape == (out_features, words)]
    if not fitting:
        raise ValueError("words")
    cut = fitting[0]
    codes = cut(parts["weight_packed"], bits, in_features)
    if symmetric:
        zeros = np.full((out_features, groups), 2 ** (bits - 1))
    else:
        zeros = cut(parts["weight_zero_point"].T, bits, out_features).T
    scales = half_scales(parts["weight_scale"])
    if scales.shape != (out_features, groups) or zeros.shape != scales.shape or in_features % groups:
        raise ValueError("shapes")
    return codes, scales, zeros, grid


Pair = tuple[np.ndarray, np.ndarray, float]


def read_pairs(folder: pathlib.Path) -> dict[str, Pair]:
    """Return module -> (A, B, alpha) of an adapter."""
    config = load_json(folder / "adapter_config.json")
    tensors, _ = load_tensors(folder / "adapter_model.safetensors")
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", name)
        if match is None or match[2] in sides.get(match[1], {}):
            raise ValueError("no plain LoRA")
        sides.setdefault(match[1], {})[match[2]] = values
    pairs = {}
    for module, side in sides.items():
        rank = looked_up(config.get("rank_pattern"), module, config["r"])
        alpha = looked_up(config.get("alpha_pattern"), module, config["lora_alpha"])
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)
        if side["A"].shape[0] != rank or side["B"].shape[1] != rank:
            raise ValueError("rank")
        pairs[module] = (side["A"], side["B"], float(alpha))
    return pairs


def looked_up(patterns: dict[str, float] | None, module: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
