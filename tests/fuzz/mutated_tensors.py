"""Mutations of tensors, in a file that is well-formed."""

from __future__ import annotations

import copy
import math
import random
import struct

from mutating import (
    READ,
    REFUSED,
    SIZES,
    Files,
    NotApplicable,
    Tensors,
    change_tensor,
    mutation,
)


@mutation
def lose_tensor(files: Files, chance: random.Random) -> str | None:
    change_tensor(files, chance, (), lambda tensors, name: tensors.pop(name))
    return None


@mutation
def add_tensor(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        module = name.rpartition(".")[0]
        part = chance.choice(
            [
                "weight",
                "bias",
                "weight_g_idx",
                "weight_zero_point",
                "qzeros",
                "lora_magnitude_vector",
                "x",
                "qweight",
                "weight_packed",
            ]
        )
        tensors.setdefault(chance.choice([f"{module}.{part}", f"other.{part}", part]), copy.deepcopy(tensors[name]))

    change_tensor(files, chance, (), change)
    return None


@mutation
def other_dtype(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        new = chance.choice(sorted(SIZES))
        count = math.prod(shape)
        if chance.random() < 0.5:  # the same bytes under another name
            shape = [*shape[:-1], shape[-1] * SIZES[code] // SIZES[new]] if shape else shape
            data = data[: math.prod(shape) * SIZES[new]]
            if len(data) != math.prod(shape) * SIZES[new]:
                return
        else:
            data = chance.randbytes(count * SIZES[new])
        tensors[name] = (new, shape, data)

    change_tensor(files, chance, (), change)
    return None


@mutation
def other_shape(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code not in SIZES:
            return
        kind = chance.randrange(6)
        if kind == 0:
            shape = shape[::-1]
        elif kind == 1:
            shape = [math.prod(shape)]
        elif kind == 2:
            shape = [*shape, 1]
        elif kind == 3 and shape and shape[0] > 1:
            row = len(data) // shape[0]
            shape, data = [shape[0] - 1, *shape[1:]], data[:-row]
        elif kind == 4 and shape and shape[0]:
            row = len(data) // shape[0]
            shape, data = [shape[0] + 1, *shape[1:]], data + data[:row]
        elif kind == 5:
            shape, data = chance.choice(
                [([0], b""), ([0, *shape], b""), ([*shape[:-1], 0], b""), ([], data[: SIZES[code]])]
            )
        tensors[name] = (code, shape, data)

    change_tensor(files, chance, (), change)
    return None


@mutation
def other_codes(files: Files, chance: random.Random) -> str | None:
    """Other codes, all of them valid."""
    if "cloq_certificate.json" in files:
        raise NotApplicable

    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code == "I32":
            tensors[name] = (code, shape, chance.randbytes(len(data)))

    change_tensor(files, chance, ("qweight",), change)
    return READ if "config.json" in files else None


@mutation
def other_words(files: Files, chance: random.Random) -> str | None:
    """Other words where not all are valid."""

    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        value = chance.choice([b"\xff", b"\x00", b"\x80", b"\x7f", None])
        tensors[name] = (code, shape, chance.randbytes(len(data)) if value is None else value * len(data))

    change_tensor(files, chance, ("qweight", "qzeros", "weight_packed", "weight_zero_point"), change)
    return None


@mutation
def bad_scale(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code != "F16" or not data:
            raise NotApplicable
        changed = bytearray(data)
        place = 2 * chance.randrange(len(data) // 2)
        word = chance.choice([0x7C00, 0xFC00, 0x7E00, 0x7C01, 0x0000, 0x8000, 0xBC00])
        changed[place : place + 2] = struct.pack("<H", word)
        tensors[name] = (code, shape, bytes(changed))

    change_tensor(files, chance, ("scales", "weight_scale"), change)
    return REFUSED


@mutation
def small_scale(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code != "F16" or not data:
            raise NotApplicable
        tensors[name] = (code, shape, struct.pack("<H", chance.choice([1, 0x03FF, 0x7BFF])) + data[2:])

    change_tensor(files, chance, ("scales", "weight_scale"), change)
    return READ if "cloq_certificate.json" not in files else None


@mutation
def wide_scale(files: Files, chance: random.Random) -> str | None:
    """Scales in a wider type, exact or with a bit that float16 has not."""

    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code != "F16":
            raise NotApplicable
        values = list(struct.unpack(f"<{len(data) // 2}e", data))
        if chance.random() < 0.5 and values:
            values[0] += chance.choice([1e-7, 1e9, math.nan])
        tensors[name] = ("F32", shape, struct.pack(f"<{len(values)}f", *values))

    change_tensor(files, chance, ("scales", "weight_scale"), change)
    return None


@mutation
def wrong_index_of_groups(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code != "I32" or len(data) < 8:
            raise NotApplicable
        values = list(struct.unpack(f"<{len(data) // 4}i", data))
        kind = chance.randrange(4)
        if kind == 0:
            values[chance.randrange(len(values))] = chance.choice([-1, 2**31 - 1, -(2**31), 99])
        elif kind == 1:
            values = values[::-1]
        elif kind == 2:
            chance.shuffle(values)
        else:
            values = [0] * len(values)
        tensors[name] = (code, shape, struct.pack(f"<{len(values)}i", *values))

    change_tensor(files, chance, ("g_idx",), change)
    return None


@mutation
def wrong_stored_shape(files: Files, chance: random.Random) -> str | None:
    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code != "I64" or len(data) != 16:
            raise NotApplicable
        sides = list(struct.unpack("<2q", data))
        sides[chance.randrange(2)] = chance.choice([0, -1, 1, 31, 33, 96, 2**31, 2**62, -(2**63), sides[0]])
        tensors[name] = (code, shape, struct.pack("<2q", *sides))

    change_tensor(files, chance, ("weight_shape",), change)
    return None


@mutation
def bad_float(files: Files, chance: random.Random) -> str | None:
    """NaN or Inf in an adapter's matrix."""
    if "adapter_config.json" not in files:
        raise NotApplicable

    def change(tensors: Tensors, name: str) -> None:
        code, shape, data = tensors[name]
        if code not in ("F16", "F32") or len(data) < 4:
            raise NotApplicable
        bad = struct.pack("<e" if code == "F16" else "<f", chance.choice([math.nan, math.inf, -math.inf]))
        tensors[name] = (code, shape, bad + data[len(bad) :])

    change_tensor(files, chance, ("weight",), change)
    return REFUSED


@mutation
def other_floats(files: Files, chance: random.Random) -> str | None:
    """Other numbers in an adapter's matrix."""
    if "adapter_config.json" not in files:
        raise NotApplicable

    def change(tensors: Tensors, name: str) -> None:
        code, shape, _ = tensors[name]
        if code not in ("F16", "F32"):
            raise NotApplicable
        letter = "e" if code == "F16" else "f"
        values = [chance.uniform(-2, 2) for _ in range(math.prod(shape))]
        tensors[name] = (code, shape, struct.pack(f"<{len(values)}{letter}", *values))

    change_tensor(files, chance, ("weight",), change)
    return READ
