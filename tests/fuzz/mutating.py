"""Ways to damage a folder, or to change it so that it stays valid.

A mutation takes the files (name -> content) and a source of chance, changes the files in place, and returns what must
follow: REFUSED, READ (it is as valid as before), or None where either may happen as long as what is read is what the
bytes say. It raises `NotApplicable` where the folder offers nothing to change. `mutations.ALL` has them all.
"""

from __future__ import annotations

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
            "auto_round",
            "auto_round:auto_gptq",
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
