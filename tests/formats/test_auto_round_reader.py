"""AutoRound itself: it reads our layers and models, and we read the layers that it packs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from other_readers import installed, run_reader
from random_layers import assert_same, make_layer
from safetensors.torch import load_file, save_file

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.formats.auto_round import AUTO_ROUND, AUTO_ROUND_GPTQ, AutoRoundLayout
from cloq_export.types import QuantizedLayer, QuantSpec

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "real_readers" / "run_auto_round.py"
PACKAGES = ("auto-round==0.16.1", "py-cpuinfo==9.0.0")
PACKINGS: dict[str, AutoRoundLayout] = {"auto_round": AUTO_ROUND, "auto_round:auto_gptq": AUTO_ROUND_GPTQ}
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
APART = ("model.layers.1.self_attn.o_proj", "lm_head")


def layers_to_exchange() -> dict[str, tuple[str, QuantizedLayer]]:
    """Return case -> (packing, layer): every width in both forms, asymmetric where zeros are stored as they are."""
    cases = {}
    for packing in PACKINGS:
        for bits in (2, 3, 4, 8):
            for symmetric in (False, True):
                for group_size in (32, -1):
                    if symmetric or packing == "auto_round":
                        name = f"{packing.replace(':', '-')}_w{bits}_{symmetric}_g{group_size}"
                        spec = QuantSpec(bits, group_size, symmetric)
                        cases[name] = packing, make_layer(spec, 64, 96, len(cases))
    return cases


@dataclasses.dataclass
class Exchange:
    """What AutoRound left in a folder."""

    folder: Path
    layers: dict[str, tuple[str, QuantizedLayer]]
    model: torch.nn.Module
    model_layers: dict[str, dict[str, QuantizedLayer]]


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, layers = tmp_path_factory.mktemp("auto_round"), layers_to_exchange()
    for name in ("ours", "canonical", "models"):
        (folder / name).mkdir()
    cases = {}
    for name, (packing, layer) in layers.items():
        cases[name] = {**dataclasses.asdict(layer.spec), "packing": packing}
        save_file(PACKINGS[packing].pack_layer(layer), folder / "ours" / f"{name}.safetensors")
        canonical = {"weight": layer.dequantize(), "scales": layer.scales, "zeros": layer.zeros}
        save_file(canonical, folder / "canonical" / f"{name}.safetensors")
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "ids.json").write_text(json.dumps([list(range(5, 37))]))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    model_layers = {}
    for packing, layout in PACKINGS.items():
        symmetric = layout is AUTO_ROUND_GPTQ
        grids = {"down_proj": QuantSpec(2, 32, symmetric), "gate_proj": QuantSpec(3, -1, symmetric)}
        held = model_layers[packing] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in APART:
                spec = grids.get(name.rpartition(".")[2], QuantSpec(4, 32, symmetric))
                layer = make_layer(spec, module.out_features, module.in_features, len(held))
                held[name] = dataclasses.replace(layer, scales=layer.scales / 16)
        source = LayerSource.of_mapping(held)
        export_checkpoint(folder / "models" / layout.name, source, FloatPart.of_model(model, source), layout=layout)
    run_reader(SCRIPT, installed(*PACKAGES), str(folder))
    return Exchange(folder, layers, model, model_layers)


def test_it_multiplies_with_the_weights_of_our_layers(exchange: Exchange) -> None:
    for name, (_, layer) in exchange.layers.items():
        read = load_file(exchange.folder / "read" / f"{name}.safetensors")["weight"]
        # Its products of a code and a scale are rounded to float16.
        assert torch.equal(read, layer.dequantize().half().float()), name


def test_its_bytes_are_ours(exchange: Exchange) -> None:
    for name, (packing, layer) in exchange.layers.items():
        theirs = load_file(exchange.folder / "theirs" / f"{name}.safetensors")
        ours = load_file(exchange.folder / "ours" / f"{name}.safetensors")
        assert theirs.keys() == ours.keys(), name
        assert all(torch.equal(theirs[part], ours[part]) for part in ours), name
        assert_same(PACKINGS[packing].unpack_layer(theirs, layer.spec), layer)


@pytest.mark.parametrize("packing", PACKINGS)
def test_transformers_loads_our_model_with_it(exchange: Exchange, packing: str) -> None:
    folder, layers = exchange.folder / "models" / PACKINGS[packing].name, exchange.model_layers[packing]
    assert Checkpoint.open(folder).grids.layout is PACKINGS[packing]
    assert json.loads((folder / "packed.json").read_text()) == sorted(layers)
    weights = {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}
    ids = torch.tensor(json.loads((exchange.folder / "ids.json").read_text()))
    expected = torch.func.functional_call(exchange.model, weights, (ids,)).logits.detach()
    logits = load_file(folder / "logits.safetensors")["logits"]
    # In bfloat16, as its kernel for a CPU computes; a zero one off moves logits by more than their own size.
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
