"""Mutations of any file: its bytes, its place, links."""

from __future__ import annotations

import random

from mutating import (
    REFUSED,
    Files,
    Link,
    NotApplicable,
    Special,
    choose,
    mutation,
)


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
