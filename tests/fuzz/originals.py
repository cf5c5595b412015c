"""Small valid checkpoints and adapters, held in memory as file name -> content."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import torch

from cloq_export.artifact.certificate import CERTIFICATE_NAME, certify_checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings, export_checkpoint
from cloq_export.files.atomic import write_json
from cloq_export.formats.layout import Layout
from cloq_export.formats.peft import write_adapter
from cloq_export.formats.registry import LAYOUTS
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

MODULES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
SHAPES = ((64, 32), (32, 64))

# name -> (layout, grid of each module, largest file)
CHECKPOINTS: dict[str, tuple[str, tuple[QuantSpec, QuantSpec], int]] = {
    "gptq-4": ("gptq", (QuantSpec(4, 32), QuantSpec(4, 32)), 10**9),
    "gptq_v2-2": ("gptq_v2", (QuantSpec(2, 16), QuantSpec(2, 16)), 10**9),
    "gptq_v2-3-channel": ("gptq_v2", (QuantSpec(3, -1), QuantSpec(3, -1)), 10**9),
    "gptq_v2-mixed": ("gptq_v2", (QuantSpec(8, 32, symmetric=True), QuantSpec(3, 32)), 10**9),
    "gptq_v2-sharded": ("gptq_v2", (QuantSpec(4, 32), QuantSpec(4, 32)), 1),
    "packed-3-dense": ("compressed_tensors", (QuantSpec(3, 32), QuantSpec(3, 32)), 10**9),
    "packed-3-padded": ("compressed_tensors_padded", (QuantSpec(3, 32), QuantSpec(3, 32)), 10**9),
    "packed-mixed": ("compressed_tensors", (QuantSpec(4, 16, symmetric=True), QuantSpec(2, -1)), 10**9),
    "packed-sharded": ("compressed_tensors", (QuantSpec(4, 32), QuantSpec(4, 32)), 1),
    "auto_round-3": ("auto_round", (QuantSpec(3, 32), QuantSpec(3, -1)), 10**9),
}
# The same without what only this package writes: other people's files.
FOREIGN = ("gptq-4", "gptq_v2-mixed", "packed-3-dense", "packed-mixed", "gptq_v2-sharded", "auto_round-3")


@dataclasses.dataclass(frozen=True)
class Original:
    """A valid folder.

    Args:
        kind: "checkpoint" or "adapter".
        files: file name -> content.
    """

    kind: str
    files: dict[str, bytes]


def random_layer(spec: QuantSpec, shape: tuple[int, int], layout: Layout, generator: torch.Generator) -> QuantizedLayer:
    out_features, in_features = shape
    groups = spec.group_count(in_features)
    lowest = 1 if layout.name == "gptq" else 0
    zeros = torch.randint(lowest, spec.max_code + 1, (out_features, groups), generator=generator, dtype=torch.uint8)
    if spec.symmetric:
        zeros.fill_(2 ** (spec.bits - 1))
    codes = torch.randint(0, spec.max_code + 1, shape, generator=generator, dtype=torch.uint8)
    scales = (0.01 + torch.rand(out_features, groups, generator=generator)).to(torch.float16)
    return QuantizedLayer(codes, scales, zeros, spec)


def make_originals(folder: pathlib.Path) -> dict[str, Original]:
    """Write every original once into a folder, and return them."""
    found: dict[str, Original] = {}
    for name, (layout_name, specs, limit) in CHECKPOINTS.items():
        layout = LAYOUTS[layout_name]
        generator = torch.Generator().manual_seed(len(found))
        layers = {
            module: random_layer(spec, shape, layout, generator)
            for module, spec, shape in zip(MODULES, specs, SHAPES, strict=True)
        }
        source = LayerSource.of_mapping(layers)
        norm = torch.ones(32, dtype=torch.float16)
        floats = FloatPart(
            {"model.norm.weight": ("F16", (32,))},
            {"model.norm.weight": norm}.__getitem__,
            {"architectures": ["LlamaForCausalLM"]},
            ("model.layers.0.mlp.gate_proj",),
            lambda target: write_json(target / "config.json", {"hidden_size": 32, "model_type": "llama"}),
        )
        target = folder / name
        fingerprint = export_checkpoint(target, source, floats, layout=layout, settings=WriteSettings(limit))
        certify_checkpoint(target, source, floats, base_fingerprint=fingerprint)
        found[name] = Original("checkpoint", contents(target))
    for name in FOREIGN:
        found[f"foreign-{name}"] = Original("checkpoint", without_ours(found[name].files))
    for name, (ranks, dtype) in {"adapter": ((4, 4), torch.float16), "adapter-ranks": ((4, 8), torch.float32)}.items():
        generator = torch.Generator().manual_seed(len(found))
        pairs = {
            module: LoraPair(
                torch.randn(rank, shape[1], generator=generator).to(dtype),
                torch.randn(shape[0], rank, generator=generator).to(dtype),
                alpha=2.0 * rank,
            )
            for module, rank, shape in zip(MODULES, ranks, SHAPES, strict=True)
        }
        write_adapter(folder / name, pairs, base_model="tiny", base_fingerprint="sha256:" + "5" * 64)
        found[name] = Original("adapter", contents(folder / name))
    plain = {file: data for file, data in found["adapter"].files.items() if file != "cloq_adapter.json"}
    found["foreign-adapter"] = Original("adapter", plain)
    return found


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def without_ours(files: dict[str, bytes]) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    config["quantization_config"].pop("cloq")
    kept = {name: data for name, data in files.items() if name != CERTIFICATE_NAME}
    return kept | {"config.json": json.dumps(config).encode()}
