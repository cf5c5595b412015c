"""Mutations of JSON files, the index of a sharded checkpoint among them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from mutating import (
    JSON_FILES,
    READ,
    REFUSED,
    Files,
    NotApplicable,
    dump,
    mutation,
    nested,
    paths_of,
    put,
    read_object,
    take,
    wild_value,
)


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
