"""Run by test_auto_round_reader.py with auto-round on its path: pack and unpack layers, and load whole models.

The folder given holds cases.json (case -> bits, group_size, symmetric, packing) and, per case, ours/<case>.safetensors
(the tensors of a layer as we pack it) and canonical/<case>.safetensors (weight, scales, zeros). Left behind are
read/<case>.safetensors (the weight that AutoRound multiplies with), theirs/<case>.safetensors (the layer as it packs
it), and for each folder below models/ its logits. Nothing of the package under test is imported here.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def exchange_layer(folder: Path, name: str, case: dict) -> None:
    canonical = load_file(folder / "canonical" / f"{name}.safetensors")
    outputs, inputs = canonical["weight"].shape
    linear_class = dynamic_import_quant_linear_for_packing(
        case["packing"], case["bits"], case["group_size"], case["symmetric"]
    )

    def empty() -> torch.nn.Module:
        layer = linear_class(case["bits"], case["group_size"], inputs, outputs, bias=False)
        layer.device = torch.device("cpu")
        return layer

    reading = empty()
    reading.load_state_dict(load_file(folder / "ours" / f"{name}.safetensors"))
    weight = reading(torch.eye(inputs)).t().contiguous()
    save_file({"weight": weight}, folder / "read" / f"{name}.safetensors")

    packing = empty()
    linear = SimpleNamespace(weight=torch.nn.Parameter(canonical["weight"]), bias=None)
    packing.pack(linear, canonical["scales"].float(), canonical["zeros"].float(), None, device="cpu")
    theirs = {part: tensor.contiguous() for part, tensor in packing.state_dict().items()}
    save_file(theirs, folder / "theirs" / f"{name}.safetensors")


def load_model(folder: Path) -> None:
    ids = torch.tensor(json.loads((folder.parents[1] / "ids.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
    with torch.no_grad():
        logits = model(ids).logits.float()
    packed = sorted(name for name, module in model.named_modules() if hasattr(module, "qweight"))
    (folder / "packed.json").write_text(json.dumps(packed))
    save_file({"logits": logits}, folder / "logits.safetensors")


def main(folder: Path) -> None:
    for name in ("read", "theirs"):
        (folder / name).mkdir()
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        exchange_layer(folder, name, case)
    for model in sorted((folder / "models").iterdir()):
        load_model(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
