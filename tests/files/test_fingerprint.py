"""Fingerprints change with what they are over, and with nothing else."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from cloq_export.errors import FormatError, SourceError
from cloq_export.files.fingerprint import (
    added_files,
    base_fingerprint,
    combine_digests,
    file_digests,
    file_fingerprint,
    layer_digest,
)
from cloq_export.types import QuantizedLayer, QuantSpec


def make_layer(seed: int, spec: QuantSpec | None = None) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(seed)
    spec = spec or QuantSpec(bits=4, group_size=32)
    return QuantizedLayer(
        codes=torch.randint(0, 16, (8, 64), dtype=torch.uint8, generator=generator),
        scales=(torch.rand(8, 2, generator=generator) + 0.1).half(),
        zeros=torch.randint(0, 16, (8, 2), dtype=torch.uint8, generator=generator),
        spec=spec,
    )


def test_order_of_layers_does_not_matter() -> None:
    layers = [(f"m.{index}", make_layer(index)) for index in range(3)]
    assert base_fingerprint(layers) == base_fingerprint(reversed(layers))
    assert base_fingerprint(layers) == combine_digests({name: layer_digest(layer) for name, layer in layers})


def test_is_what_its_definition_says() -> None:
    layer = make_layer(0)
    head = {"bits": 4, "group_size": 32, "symmetric": False, "out": 8, "in": 64}
    inner = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for tensor in (layer.codes, layer.scales, layer.zeros):
        inner.update(tensor.numpy().tobytes())
    outer = hashlib.sha256(f"m\0{inner.hexdigest()}\n".encode())
    assert base_fingerprint([("m", layer)]) == f"sha256:{outer.hexdigest()}"


def test_every_part_counts() -> None:
    layer = make_layer(0)
    codes, scales, zeros = layer.codes.clone(), layer.scales.clone(), layer.zeros.clone()
    codes[0, 0] = (codes[0, 0] + 1) % 16
    scales[0, 0] *= 2
    zeros[0, 0] = (zeros[0, 0] + 1) % 16
    others = [
        ("m", dataclasses.replace(layer, codes=codes)),
        ("m", dataclasses.replace(layer, scales=scales)),
        ("m", dataclasses.replace(layer, zeros=zeros)),
        ("m", dataclasses.replace(layer, spec=QuantSpec(bits=8, group_size=32))),
        ("n", layer),
    ]
    found = {base_fingerprint([("m", layer)]), *(base_fingerprint([pair]) for pair in others)}
    assert len(found) == 6


def test_memory_layout_does_not_count() -> None:
    layer = make_layer(0)
    strided = dataclasses.replace(layer, codes=layer.codes.t().contiguous().t())
    assert layer_digest(strided) == layer_digest(layer)


def test_module_given_twice() -> None:
    with pytest.raises(FormatError, match="the module m comes twice"):
        base_fingerprint([("m", make_layer(0)), ("m", make_layer(1))])


def test_files(tmp_path: Path) -> None:
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    one.write_bytes(b"1" * 5_000_000)
    two.write_bytes(b"2")
    first = file_fingerprint(file_digests([one, two]))
    assert first == file_fingerprint(file_digests([two, one]))
    assert first.startswith("sha256:")
    other = tmp_path / "moved"
    other.mkdir()
    assert file_fingerprint(file_digests([one.rename(other / one.name), two.rename(other / two.name)])) == first
    (other / two.name).write_bytes(b"3")
    assert file_fingerprint(file_digests([other / one.name, other / two.name])) != first
    with pytest.raises(SourceError, match=r"a\.safetensors cannot be read: No such file or directory"):
        file_fingerprint(file_digests([one]))


def test_files_that_were_not_there_before_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    for path in paths:
        path.write_text(path.name)
    digests = file_digests(paths)
    assert added_files(digests, file_fingerprint(digests[:3])) == ("d",)
    assert added_files(digests, file_fingerprint([digests[0], digests[2]])) == ("b", "d")
    assert added_files(digests, file_fingerprint(digests[:1])) == ()
    assert added_files(digests, "sha256:0") == ()
