"""Ways to damage a folder, or to change it so that it stays valid.

A mutation takes the files (name -> content) and a source of chance, changes the files in place, and returns what must
follow: REFUSED, READ (it is as valid as before), or None where either may happen as long as what is read is what the
bytes say. It raises `NotApplicable` where the folder offers nothing to change.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

REFUSED = "refused"
READ = "read"

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
JSON_FILES = (
    "config.json",
    "cloq_certificate.json",
    "adapter_config.json",
    "cloq_adapter.json",
    "model.safetensors.index.json",
)


class NotApplicable(Exception):
    """The folder offers nothing that this mutation changes."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link.

    In its target "{outside}" stands for a folder beside the one that is read, "{original}" for the original's name,
    and "{same}" for the folder in "{outside}" that holds the original's own files.
    """

    target: str


@dataclasses.dataclass(frozen=True)
class Special:
    """An entry that is no file: "folder" or "pipe"."""

    kind: str


Entry = bytes | Link | Special
Files = dict[str, Entry]
Mutation = Callable[[Files, random.Random], str | None]
Tensors = dict[str, tuple[str, list[int], bytes]]

ALL: list[Mutation] = []


def mutation(function: Mutation) -> Mutation:
    ALL.append(function)
    return function


# What files are made of.


def names_of(files: Files, suffix: str) -> list[str]:
    return sorted(name for name, data in files.items() if name.endswith(suffix) and isinstance(data, bytes))


def choose(files: Files, chance: random.Random, suffix: str) -> str:
    names = names_of(files, suffix)
    if not names:
        raise NotApplicable
    return chance.choice(names)


def split_header(data: bytes) -> tuple[Any, bytes]:
    try:
        (length,) = struct.unpack_from("<Q", data)
        return json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, struct.error, RecursionError):
        raise NotApplicable from None


def join_header(text: str | bytes, payload: bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + payload


def read_tensors(data: bytes) -> tuple[Tensors, dict[str, str]]:
    header, payload = split_header(data)
    try:
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: (entry["dtype"], list(entry["shape"]), payload[entry["data_offsets"][0] : entry["data_offsets"][1]])
            for name, entry in header.items()
        }
    except (AttributeError, KeyError, TypeError, IndexError):
        raise NotApplicable from None
    return tensors, metadata


def write_tensors(tensors: Tensors, metadata: Any) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    payload = b""
    for name, (code, shape, data) in tensors.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]}
        payload += data
    text = json.dumps(header)
    return join_header(text + " " * (-len(text) % 8), payload)


def change_tensor(files: Files, chance: random.Random, parts: tuple[str, ...], change: Callable[..., Any]) -> None:
    """Rewrite a weight file after `change(tensors, name)`, for a tensor whose last name is one of `parts` (or any)."""
    found = []
    for file in names_of(files, ".safetensors"):
        try:
            tensors, _ = read_tensors(files[file])
        except NotApplicable:
            continue
        found += [(file, name) for name in tensors if not parts or name.rpartition(".")[2] in parts]
    if not found:
        raise NotApplicable
    file, name = chance.choice(found)
    tensors, metadata = read_tensors(files[file])
    change(tensors, name)
    files[file] = write_tensors(tensors, metadata)


def read_object(files: Files, name: str) -> Any:
    try:
        return json.loads(files[name])
    except (ValueError, RecursionError):
        raise NotApplicable from None


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths_of(inner, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def take(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


class Raw:
    """A number as it is to stand in the text."""

    def __init__(self, text: str) -> None:
        self.text = text


def wild_value(chance: random.Random) -> Any:
    return chance.choice(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            3,
            4,
            8,
            5,
            16,
            32,
            7.5,
            -0.0,
            1e308,
            2**31,
            2**63,
            2**64,
            -(2**70),
            10**400,
            math.nan,
            math.inf,
            -math.inf,
            "",
            "4",
            "gptq",
            "gptq_v2",
            "gptq_p",
            "awq",
            "compressed_tensors",
            "compressed_tensors_padded",
            "re:(a+)+$",
            "re:.*",
            "Linear",
            "x" * 70_000,
            "a\nb\x1b[31mred",
            "\ud800",
            "\x00",
            "../../etc/passwd",
            [],
            {},
            [[]],
            {"": None},
            [None] * 300,
            {"bits": {"bits": 4}},
            ["model.layers.0.mlp.up_proj"],
            [1, 2, 3],
        ]
    )


def dump(value: Any, chance: random.Random) -> bytes:
    return json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def nested(depth: int, chance: random.Random) -> str:
    return chance.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth, '{"a":' * depth])


# Any file.


@mutation
def truncate(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    files[name] = files[name][: chance.randrange(len(files[name]) + 1)]
    return None


@mutation
def extend(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    files[name] += chance.choice([chance.randbytes(chance.randrange(1, 64)), b"\x00" * 1000, b"{}", b" \n", b"]"])
    return None


@mutation
def flip_bits(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    data = bytearray(files[name])
    for _ in range(chance.choice([1, 1, 1, 8, 64])):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    files[name] = bytes(data)
    return None


@mutation
def overwrite(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    data = bytearray(files[name])
    start = chance.randrange(len(data) + 1)
    data[start : start + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))
    files[name] = bytes(data)
    return None


@mutation
def replace_content(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    files[name] = chance.choice(
        [
            b"",
            b"\x00",
            chance.randbytes(200),
            b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}",
            b"null",
            b"[]",
            b'"x"',
            b"1e999",
            b"{}",
        ]
    )
    return None


@mutation
def remove_file(files: Files, chance: random.Random) -> str | None:
    del files[choose(files, chance, "")]
    return None


@mutation
def swap_files(files: Files, chance: random.Random) -> str | None:
    one, other = choose(files, chance, ""), choose(files, chance, "")
    files[one], files[other] = files[other], files[one]
    return None


@mutation
def no_file(files: Files, chance: random.Random) -> str | None:
    files[choose(files, chance, "")] = Special(chance.choice(["folder", "pipe"]))
    return None


@mutation
def add_files(files: Files, chance: random.Random) -> str | None:
    name = chance.choice(
        [
            "README.md",
            "tokenizer.json",
            "x.safetensors",
            "quantize_config.json",
            "run.json",
            "adapter_config.json",
            "model.gguf",
        ]
    )
    if name in files:
        raise NotApplicable
    files[name] = chance.choice([b"", b"{}", b"junk", chance.randbytes(64)])
    return None


# Links.


@mutation
def link_outside(files: Files, chance: random.Random) -> str | None:
    """Links out of the folder, most of them to the very file that they take the place of."""
    name = choose(files, chance, "")
    others = ["{outside}/secret", "/dev/zero", "/dev/null", "/proc/self/mem", "/etc/passwd"]
    files[name] = Link(chance.choice(["{same}/" + name, "{same}/" + name, "../outside/{original}/" + name, *others]))
    return None if name == "cloq_certificate.json" else REFUSED


@mutation
def link_nowhere(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    files[name] = Link(chance.choice(["missing", name, "/nowhere/at/all", "x" * 200]))
    return None


@mutation
def link_inside(files: Files, chance: random.Random) -> str | None:
    name = choose(files, chance, "")
    inner = f"moved-{name}"
    files[inner] = files[name]
    files[name] = Link(inner)
    return None


# JSON files.


def change_json(files: Files, chance: random.Random, change: Callable[[Any], Any]) -> str:
    names = [name for name in JSON_FILES if isinstance(files.get(name), bytes)]
    if not names:
        raise NotApplicable
    name = chance.choice(names)
    value = read_object(files, name)
    value = change(value)
    files[name] = dump(value, chance)
    return name


@mutation
def wrong_value(files: Files, chance: random.Random) -> str | None:
    def change(value: Any) -> Any:
        paths = paths_of(value)
        for _ in range(chance.choice([1, 1, 2])):
            if paths:
                try:
                    put(value, chance.choice(paths), wild_value(chance))
                except (KeyError, IndexError, TypeError):
                    continue
        return value

    change_json(files, chance, change)
    return None


@mutation
def wrong_config_value(files: Files, chance: random.Random) -> str | None:
    """As above, aimed at what the readers look at most."""
    value = read_object(files, "config.json") if isinstance(files.get("config.json"), bytes) else None
    quantization = value.get("quantization_config") if isinstance(value, dict) else None
    if not isinstance(quantization, dict) or not quantization:
        raise NotApplicable
    put(quantization, chance.choice(paths_of(quantization)), wild_value(chance))
    files["config.json"] = dump(value, chance)
    return None


@mutation
def wrong_key(files: Files, chance: random.Random) -> str | None:
    def change(value: Any) -> Any:
        places = [path for path in [(), *paths_of(value)] if isinstance(take(value, path), dict) and take(value, path)]
        if not places:
            raise NotApplicable
        inner = take(value, chance.choice(places))
        wild = chance.choice(
            ["", "a\nb", "\x1b[31m", "\ud800", "x" * 70_000, "../../x", "/etc/passwd", "re:(a+)+$", "+:^a$", "-:^a$"]
        )
        inner[wild] = inner.pop(chance.choice(sorted(inner)))
        return value

    change_json(files, chance, change)
    return None


@mutation
def remove_value(files: Files, chance: random.Random) -> str | None:
    def change(value: Any) -> Any:
        paths = paths_of(value)
        if not paths:
            raise NotApplicable
        path = chance.choice(paths)
        del take(value, path[:-1])[path[-1]]
        return value

    change_json(files, chance, change)
    return None


@mutation
def add_value(files: Files, chance: random.Random) -> str | None:
    def change(value: Any) -> Any:
        places = [path for path in [(), *paths_of(value)] if isinstance(take(value, path), dict)]
        if not places:
            raise NotApplicable
        keys = [
            "dynamic",
            "desc_act",
            "rank_pattern",
            "use_dora",
            "kv_cache_scheme",
            "version",
            "format",
            "ignore",
            "zzz",
            "",
            "\n",
            "modules_to_save",
        ]
        take(value, chance.choice(places))[chance.choice(keys)] = wild_value(chance)
        return value

    change_json(files, chance, change)
    return None


@mutation
def unknown_key(files: Files, chance: random.Random) -> str | None:
    value = read_object(files, "config.json") if isinstance(files.get("config.json"), bytes) else None
    if not isinstance(value, dict) or "cloq_certificate.json" in files:
        raise NotApplicable
    value["a_key_of_tomorrow"] = {"any": ["thing", 1, None]}
    files["config.json"] = json.dumps(value, indent=chance.choice([None, 1, 4])).encode()
    return READ


@mutation
def retype_values(files: Files, chance: random.Random) -> str | None:
    """Turn values into others that look alike: 4 -> "4" -> 4.0 -> [4] -> true."""

    def change(value: Any) -> Any:
        paths = [path for path in paths_of(value) if not isinstance(take(value, path), (dict, list))]
        if not paths:
            raise NotApplicable
        path = chance.choice(paths)
        old = take(value, path)
        put(
            value,
            path,
            chance.choice([str(old), [old], {"value": old}, float(old) if isinstance(old, int) else 1, bool(old)]),
        )
        return value

    change_json(files, chance, change)
    return None


@mutation
def duplicate_key(files: Files, chance: random.Random) -> str | None:
    names = [name for name in JSON_FILES if isinstance(files.get(name), bytes)]
    if not names:
        raise NotApplicable
    name = chance.choice(names)
    value = read_object(files, name)
    if not isinstance(value, dict) or not value:
        raise NotApplicable
    key = chance.choice(sorted(value))
    text = json.dumps(value)
    other = json.dumps(chance.choice([value[key], None, 1]))
    files[name] = (text[:-1] + f", {json.dumps(key)}: {other}}}").encode()
    return REFUSED if name in ("config.json", "adapter_config.json") else None


@mutation
def deep_json(files: Files, chance: random.Random) -> str | None:
    names = [name for name in JSON_FILES if isinstance(files.get(name), bytes)]
    if not names:
        raise NotApplicable
    name = chance.choice(names)
    value = read_object(files, name)
    deep = nested(chance.choice([50, 900, 100_000]), chance)
    if isinstance(value, dict) and chance.random() < 0.7:
        files[name] = (json.dumps(value)[:-1] + ', "deep": ' + deep + "}").encode()
    else:
        files[name] = deep.encode()
    return None


@mutation
def huge_number(files: Files, chance: random.Random) -> str | None:
    names = [name for name in JSON_FILES if isinstance(files.get(name), bytes)]
    if not names:
        raise NotApplicable
    name = chance.choice(names)
    value = read_object(files, name)
    paths = [path for path in paths_of(value) if isinstance(take(value, path), (int, float))]
    if not paths:
        raise NotApplicable
    put(value, chance.choice(paths), "@@")
    number = chance.choice(
        [
            "9" * 4000,
            "9" * 5000,
            "1" + "0" * 100_000,
            "1e99999",
            "-1e99999",
            "1e-99999",
            "0." + "0" * 5000 + "1",
            "-0",
            "NaN",
            "Infinity",
        ]
    )
    files[name] = json.dumps(value).replace('"@@"', number).encode()
    return None


@mutation
def other_encoding(files: Files, chance: random.Random) -> str | None:
    names = [name for name in JSON_FILES if isinstance(files.get(name), bytes)]
    if not names:
        raise NotApplicable
    name = chance.choice(names)
    text = json.dumps(read_object(files, name))
    files[name] = chance.choice(
        [
            text.encode("utf-16"),
            text.encode("utf-32"),
            b"\xef\xbb\xbf" + text.encode(),
            text.encode()[:-1] + b'"\xff": 1}',
            text.encode() + b"\x00",
        ]
    )
    return None


# The index of a sharded checkpoint.


@mutation
def wrong_index(files: Files, chance: random.Random) -> str | None:
    name = "model.safetensors.index.json"
    if not isinstance(files.get(name), bytes):
        raise NotApplicable
    value = read_object(files, name)
    weights = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise NotApplicable
    tensor = chance.choice(sorted(weights))
    shard = weights[tensor]
    kind = chance.randrange(7)
    if kind == 0:
        weights[tensor] = chance.choice(
            [
                f"../outside/{shard}",
                f"/tmp/{shard}",
                f"./{shard}",
                f"a/../{shard}",
                f"{shard}\x00",
                f"..\\{shard}",
                "..",
                ".",
                "",
                shard.upper() if isinstance(shard, str) else "X",
            ]
        )
    elif kind == 1:
        weights[tensor] = wild_value(chance)
    elif kind == 2:
        del weights[tensor]
    elif kind == 3:
        weights[chance.choice(["ghost", "", "a\nb", tensor + "x"])] = shard
    elif kind == 4:
        value["weight_map"] = dict.fromkeys(weights, shard)
    elif kind == 5:
        value["weight_map"] = wild_value(chance)
    else:
        weights[tensor] = chance.choice(sorted(map(str, weights.values())))
    files[name] = dump(value, chance)
    return None


@mutation
def stale_index(files: Files, chance: random.Random) -> str | None:
    if "model.safetensors.index.json" in files:
        raise NotApplicable
    files["model.safetensors.index.json"] = chance.choice(
        [
            b"{}",
            b'{"weight_map": {}}',
            b'{"weight_map": {"a": "../outside/secret"}}',
            b'{"weight_map": {"a": "model.safetensors"}}',
            b"x",
        ]
    )
    return None


# Headers of weight files.


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


# Tensors, in a file that is well-formed.


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
