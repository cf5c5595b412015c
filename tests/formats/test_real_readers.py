"""The integer layouts and the programs that they are made for: each reads the other's files to the same integers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from other_readers import installed, run_reader
from random_layers import assert_same, make_layer
from safetensors.torch import load_file, save_file

import cloq_export.formats.compressed_tensors as compressed_tensors
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.formats.compressed_tensors import COMPRESSED_TENSORS, COMPRESSED_TENSORS_PADDED
from cloq_export.formats.layout import Layout
from cloq_export.formats.peft.codec import read_adapter, write_adapter
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "real_readers" / "run_compressed_tensors.py"
GOLDEN = Path(compressed_tensors.__file__).parent / "golden"
# The release that vLLM 0.32 and 0.33 pin, which is the last but one with padded 3-bit codes; and the newest.
VERSIONS: dict[str, Layout] = {"0.17.0": COMPRESSED_TENSORS_PADDED, "0.20.1": COMPRESSED_TENSORS}

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
# What compressed-tensors writes: every width, with and without zeros, by name, by pattern and as a class.
THEIR_GRIDS = {
    "Linear": QuantSpec(4, 32),
    "re:.*layers\\.\\d+\\.mlp\\.(gate|up)_proj$": QuantSpec(3, 32),
    "model.layers.1.mlp.down_proj": QuantSpec(8, -1, symmetric=True),
    "model.layers.1.self_attn.o_proj": QuantSpec(2, 64),
    "re:.*self_attn.v_proj": QuantSpec(4, -1, symmetric=True),
}


def layers_to_exchange() -> dict[str, QuantizedLayer]:
    layers = {}
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            for group_size, out, columns in ((32, 33, 96), (64, 64, 128), (128, 11, 256), (-1, 19, 50), (-1, 32, 64)):
                name = f"w{bits}_{'symmetric' if symmetric else 'asymmetric'}_g{group_size}_{out}x{columns}"
                layers[name] = make_layer(QuantSpec(bits, group_size, symmetric), out, columns, len(layers))
    for path in GOLDEN.glob("*.safetensors"):
        held = load_file(path)
        symmetric = "packed.weight_zero_point.dense" not in held
        bits, groups, columns = int(path.stem[1]), held["scales"].shape[1], held["codes"].shape[1]
        spec = QuantSpec(bits, columns // groups if groups > 1 else -1, symmetric)
        layers[f"golden_{path.stem}"] = QuantizedLayer(held["codes"], held["scales"], held["zeros"], spec)
    return layers


def as_case(spec: QuantSpec) -> dict:
    return dataclasses.asdict(spec)


@dataclasses.dataclass
class Exchange:
    """What one version of compressed-tensors left in a folder."""

    folder: Path
    version: str
    layout: Layout
    layers: dict[str, QuantizedLayer]
    model_layers: dict[str, QuantizedLayer]
    pairs: dict[str, LoraPair]
    model: torch.nn.Module

    def logits(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what the float model says with these weights in it."""
        ids = torch.tensor(json.loads((self.folder / "ids.json").read_text()))
        return torch.func.functional_call(self.model, weights, (ids,)).logits.detach()


@pytest.fixture(scope="module", params=list(VERSIONS))
def exchange(request, tmp_path_factory) -> Exchange:
    from transformers import LlamaConfig, LlamaForCausalLM

    from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint

    folder, layout = tmp_path_factory.mktemp(f"compressed_tensors_{request.param}"), VERSIONS[request.param]
    layers = layers_to_exchange()
    for name in ("ours", "canonical"):
        (folder / name).mkdir()
    for name, layer in layers.items():
        save_file(layout.pack_layer(layer), folder / "ours" / f"{name}.safetensors")
        canonical = {"weight": layer.dequantize(), "scales": layer.scales, "zeros": layer.zeros}
        save_file(canonical, folder / "canonical" / f"{name}.safetensors")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    grids = {"down_proj": QuantSpec(2, 32), "gate_proj": QuantSpec(3, 64), "up_proj": QuantSpec(3, 64)}
    model_layers = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "model.layers.1.self_attn.o_proj"):
            spec = grids.get(name.rpartition(".")[2], QuantSpec(4, 32, symmetric="v_proj" in name))
            layer = make_layer(spec, module.out_features, module.in_features, len(model_layers))
            model_layers[name] = dataclasses.replace(layer, scales=layer.scales / 16)
    pairs = {}
    for number, (name, layer) in enumerate(model_layers.items()):
        # Ranks differ, so that rank_pattern and alpha_pattern are read too.
        rank = 4 if number % 2 else 8
        lora_A, lora_B = torch.randn(rank, layer.in_features) / 8, torch.randn(layer.out_features, rank) / 8
        pairs[name] = LoraPair(lora_A, lora_B, alpha=float(rank))
    source = LayerSource.of_mapping(model_layers)
    floats = FloatPart.of_model(model, source)
    export_checkpoint(folder / "our_model", source, floats, layout=layout)
    write_adapter(
        folder / "our_adapter",
        pairs,
        base_model="tiny",
        base_fingerprint=Checkpoint.open(folder / "our_model").fingerprint,
    )
    (folder / "ids.json").write_text(json.dumps([list(range(5, 37))]))
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    (folder / "cases.json").write_text(
        json.dumps(
            {
                "layers": {name: as_case(layer.spec) for name, layer in layers.items()},
                "their_model": {target: as_case(spec) for target, spec in THEIR_GRIDS.items()},
            }
        )
    )
    run_reader(SCRIPT, installed(f"compressed-tensors=={request.param}", "loguru==0.7.3"), str(folder))
    assert json.loads((folder / "version.json").read_text()) == request.param
    return Exchange(folder, request.param, layout, layers, model_layers, pairs, model)


def test_it_reads_our_layers_to_the_same_integers(exchange: Exchange) -> None:
    for name, layer in exchange.layers.items():
        found = load_file(exchange.folder / "read" / f"{name}.safetensors")
        assert torch.equal(found["codes"], layer.codes.int()), name
        if not layer.spec.symmetric:
            assert torch.equal(found["zeros"], layer.zeros.int()), name
        assert torch.equal(found["weight"], layer.dequantize()), name


def test_we_read_its_layers_to_the_same_integers(exchange: Exchange) -> None:
    for name, layer in exchange.layers.items():
        theirs = load_file(exchange.folder / "theirs" / f"{name}.safetensors")
        assert_same(exchange.layout.unpack_layer(theirs, layer.spec, name=name), layer)


def test_its_bytes_are_ours(exchange: Exchange) -> None:
    for name in exchange.layers:
        ours = load_file(exchange.folder / "ours" / f"{name}.safetensors")
        theirs = load_file(exchange.folder / "theirs" / f"{name}.safetensors")
        assert ours.keys() == theirs.keys(), name
        for part in ours:
            assert ours[part].dtype == theirs[part].dtype, (name, part)
            assert torch.equal(ours[part], theirs[part]), (name, part)


def test_transformers_loads_our_checkpoint(exchange: Exchange) -> None:
    loaded = load_file(exchange.folder / "loaded.safetensors")
    weights = {name: tensor for name, tensor in exchange.model.state_dict().items() if name.endswith("_proj.weight")}
    weights |= {f"{name}.weight": layer.dequantize() for name, layer in exchange.model_layers.items()}
    assert loaded.keys() == {*weights, "logits", "adapted_logits"}
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert torch.allclose(loaded["logits"], exchange.logits(weights), atol=1e-4)


def test_peft_loads_our_adapter_on_it(exchange: Exchange) -> None:
    weights = {
        f"{name}.weight": layer.dequantize() + exchange.pairs[name].product()
        for name, layer in exchange.model_layers.items()
    }
    loaded = load_file(exchange.folder / "loaded.safetensors")
    # The pair moves logits by a hundred times what the comparison below allows.
    assert not torch.allclose(loaded["adapted_logits"], loaded["logits"], atol=1e-2)
    assert torch.allclose(loaded["adapted_logits"], exchange.logits(weights), atol=1e-4)


def test_we_read_the_adapter_that_peft_writes(exchange: Exchange) -> None:
    adapter = read_adapter(exchange.folder / "their_adapter")
    assert adapter.base_fingerprint is None
    assert adapter.pairs.keys() == exchange.pairs.keys()
    for name, pair in exchange.pairs.items():
        assert torch.equal(adapter.pairs[name].lora_A, pair.lora_A)
        assert torch.equal(adapter.pairs[name].lora_B, pair.lora_B)
        assert adapter.pairs[name].scaling == pair.scaling


def test_we_read_its_checkpoint(exchange: Exchange) -> None:
    checkpoint = Checkpoint.open(exchange.folder / "their_model")
    expected = load_file(exchange.folder / "their_model_integers.safetensors")
    assert not checkpoint.is_ours
    assert checkpoint.grids.layout is exchange.layout
    assert len(checkpoint.specs) == 14
    assert set(checkpoint.specs.values()) == set(THEIR_GRIDS.values())
    for module, layer in checkpoint.read_layers():
        assert torch.equal(layer.codes.int(), expected[f"{module}.codes"]), module
        assert torch.equal(layer.zeros.int(), expected[f"{module}.zeros"]), module
        assert torch.equal(layer.scales, expected[f"{module}.scales"]), module
