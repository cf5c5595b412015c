"""Mutations of the headers of weight files."""

from __future__ import annotations

import json
import math
import random
import struct

from mutating import (
    READ,
    REFUSED,
    SIZES,
    Files,
    NotApplicable,
    choose,
    dump,
    join_header,
    mutation,
    nested,
    paths_of,
    put,
    read_tensors,
    split_header,
    wild_value,
    write_tensors,
)


@mutation
def header_length(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, ".safetensors")
    length = chance.choice(
        [
            0,
            1,
            7,
            2**31,
            2**40,
            2**63 - 1,
            2**63,
            2**64 - 1,
            100_000_000,
            100_000_001,
            len(files[name]),
            chance.randrange(4000),
        ]
    )
    files[name] = struct.pack("<Q", length) + files[name][8:]
    return None


@mutation
def header_value(files: Files, chance: random.Random) -> str | None:
    """Wild values anywhere in the header, with the payload as it is."""
    name = choose(files, chance, ".safetensors")
    header, payload = split_header(files[name])
    paths = paths_of(header)
    if not paths:
        raise NotApplicable
    try:
        put(header, chance.choice(paths), wild_value(chance))
    except (KeyError, IndexError, TypeError):
        raise NotApplicable from None
    files[name] = join_header(dump(header, chance), payload)
    return None


@mutation
def header_entry(files: Files, chance: random.Random) -> str | None:
    """Lies about one tensor: dtype, shape, offsets."""
    name = choose(files, chance, ".safetensors")
    header, payload = split_header(files[name])
    entries = (
        [key for key in header if key != "__metadata__" and isinstance(header[key], dict)]
        if isinstance(header, dict)
        else []
    )
    if not entries:
        raise NotApplicable
    entry = header[chance.choice(entries)]
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise NotApplicable
    kind = chance.randrange(6)
    if kind == 0:
        entry["dtype"] = chance.choice([*SIZES, "F4", "C64", "i32", "X", "", "U16", "U32", "U64", "F8_E5M2", "F8_E8M0"])
    elif kind == 1:
        entry["shape"] = chance.choice(
            [
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                shape[1:],
                [0, *shape],
                [2**62, 2**62],
                [0, 2**63],
                [-1],
                [math.prod(n for n in shape if isinstance(n, int))],
            ]
        )
    elif kind == 2 and shape:
        shape[chance.randrange(len(shape))] = chance.choice([0, 1, -1, 2**32, 2**63, 2**64, 1.5, "3", True, None])
    elif kind == 3:
        entry["data_offsets"] = chance.choice(
            [
                offsets[::-1],
                [0, 0],
                [0, len(payload)],
                [-4, 4],
                [2**63, 2**63 + 4],
                [offsets[0], 2**64],
                [1, 2],
                [],
                [0],
                "0",
                [0.0, 4.0],
            ]
        )
    elif kind == 4:
        other = header[chance.choice(entries)]
        entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry["data_offsets"]
    else:
        entry.pop(chance.choice(sorted(entry)), None)
    files[name] = join_header(dump(header, chance), payload)
    return None


@mutation
def header_names(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, ".safetensors")
    tensors, metadata = read_tensors(files[name])
    if not tensors:
        raise NotApplicable
    old = chance.choice(sorted(tensors))
    new = chance.choice(
        [
            "",
            ".",
            "a\nb",
            "x" * 70_000,
            "../x",
            "\x1b[2J",
            "qweight",
            ".qweight",
            "..weight_packed",
            old + ".",
            old.upper(),
            old.replace("0", "1"),
            "\u202ename",
        ]
    )
    tensors = {new if key == old else key: value for key, value in tensors.items()}
    files[name] = write_tensors(tensors, metadata)
    return None


@mutation
def header_twice(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, ".safetensors")
    header, payload = split_header(files[name])
    if not isinstance(header, dict) or not header:
        raise NotApplicable
    key = chance.choice(sorted(header))
    text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
    files[name] = join_header(text, payload)
    return None


@mutation
def header_deep(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, ".safetensors")
    header, payload = split_header(files[name])
    deep = nested(chance.choice([100, 5_000, 200_000]), chance)
    text = json.dumps(header)[:-1] + f', "deep": {deep}}}'
    files[name] = join_header(text, payload)
    return None


@mutation
def header_metadata(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, ".safetensors")
    tensors, _ = read_tensors(files[name])
    metadata = chance.choice(
        [
            None,
            1,
            [],
            {"a": 1},
            {"a": None},
            {"cloq_base_fingerprint": "sha256:0"},
            {"cloq_base_fingerprint": 7},
            {"": ""},
            {"x": "y" * 100_000},
        ]
    )
    files[name] = write_tensors(tensors, metadata)
    return None


@mutation
def header_order(files: Files, chance: random.Random) -> str | None:
    """Another order of tensors, keys and offsets, and spaces behind: all of it is allowed."""
    name = choose(files, chance, ".safetensors")
    if "cloq_certificate.json" in files:
        raise NotApplicable
    tensors, metadata = read_tensors(files[name])
    order = sorted(tensors)
    chance.shuffle(order)
    files[name] = write_tensors({key: tensors[key] for key in order}, metadata)
    return READ


@mutation
def claim_huge(files: Files, chance: random.Random) -> str | None:
    """Tensors of terabytes in a file of kilobytes."""
    name = choose(files, chance, ".safetensors")
    header, payload = split_header(files[name])
    if not isinstance(header, dict):
        raise NotApplicable
    size = chance.choice([2**40, 2**48, 2**62])
    header["huge"] = {"dtype": "I32", "shape": [size // 4], "data_offsets": [len(payload), len(payload) + size]}
    files[name] = join_header(json.dumps(header), payload)
    return REFUSED
