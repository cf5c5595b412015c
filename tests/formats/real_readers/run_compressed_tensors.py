"""Run by test_real_readers.py with compressed-tensors on its path: read what we wrote, and write for us to read.

The folder given holds cases.json and, per case, ours/<case>.safetensors (the layer as we pack it) and
canonical/<case>.safetensors (weight, scales, zeros). Left behind are read/<case>.safetensors (the integers and the
weight that compressed-tensors finds in our file) and theirs/<case>.safetensors (the same layer as it packs it), and the
same for whole models: our_model/ is loaded by transformers, and our_adapter/ on it by PEFT, into loaded.safetensors;
their_model/ and their_adapter/ are written.
Nothing of the package under test is imported here.
"""

import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

FORMAT = "pack-quantized"


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def scheme_of(case: dict) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=case["bits"],
        symmetric=case["symmetric"],
        strategy="channel" if case["group_size"] == -1 else "group",
        group_size=None if case["group_size"] == -1 else case["group_size"],
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def exchange_layer(folder: Path, name: str, case: dict) -> None:
    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    scheme, bits = scheme_of(case), case["bits"]
    middle = 2 ** (bits - 1)

    ours = load_file(folder / "ours" / f"{name}.safetensors")
    shape, scales = ours["weight_shape"], ours["weight_scale"]
    found = {"codes": unpack_from_int32(ours["weight_packed"], bits, torch.Size(shape.tolist())).int() + middle}
    if not case["symmetric"]:
        sides = torch.Size((int(shape[0]), scales.shape[1]))
        found["zeros"] = unpack_from_int32(ours["weight_zero_point"], bits, sides, packed_dim=0).int() + middle
    found["weight"] = compressor.decompress(ours | {"weight_scale": scales.float()}, scheme)["weight"]
    save(folder / "read" / f"{name}.safetensors", found)

    canonical = load_file(folder / "canonical" / f"{name}.safetensors")
    dense = {
        "weight": canonical["weight"],
        "weight_scale": canonical["scales"].float(),
        "weight_zero_point": (canonical["zeros"].int() - middle).to(torch.int8),
    }
    theirs = compressor.compress(dense, scheme) | {"weight_scale": canonical["scales"]}
    save(folder / "theirs" / f"{name}.safetensors", theirs)


def load_our_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "our_model", dtype=torch.float32).eval()
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    with torch.no_grad():
        # The first pass through the model unpacks its weights.
        logits = model(ids).logits
    # Cloned, because PEFT turns these very modules into its own.
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("_proj.weight")}
    adapted = PeftModel.from_pretrained(model, folder / "our_adapter").eval()
    with torch.no_grad():
        adapted_logits = adapted(ids).logits
    adapted.save_pretrained(folder / "their_adapter")
    save(folder / "loaded.safetensors", weights | {"logits": logits, "adapted_logits": adapted_logits})


def write_their_model(folder: Path, cases: dict) -> None:
    """Write a model as compressed-tensors does, from scales and zeros at hand: no calibration is wanted."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**json.loads((folder / "llama.json").read_text()))).half()
    groups = {}
    for number, (target, case) in enumerate(cases.items()):
        groups[f"group_{number}"] = scheme_of(case).model_copy(update={"targets": [target]})
    config = QuantizationConfig(
        config_groups=groups, format=FORMAT, ignore=["lm_head"], quantization_status=QuantizationStatus.FROZEN
    )
    apply_quantization_config(model, config)
    expected = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        arguments = module.quantization_scheme.weights
        middle = 2 ** (arguments.num_bits - 1)
        rows, groups_held = module.weight_scale.shape
        zeros = torch.randint(-middle, middle, (rows, groups_held), dtype=torch.int8)
        zeros = torch.zeros_like(zeros) if arguments.symmetric else zeros
        scales = (torch.rand(rows, groups_held) + 0.1).half()
        codes = torch.randint(-middle, middle, module.weight.shape)
        span = module.weight.shape[1] // groups_held
        centred = codes.float() - zeros.float().repeat_interleave(span, 1)
        with torch.no_grad():
            module.weight.copy_(centred * scales.float().repeat_interleave(span, 1))
            module.weight_scale.copy_(scales)
            module.weight_zero_point.copy_(zeros)
        expected |= {
            f"{name}.codes": codes.int() + middle,
            f"{name}.zeros": zeros.int() + middle,
            f"{name}.scales": scales,
        }
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "their_model")
    compressor.update_config(folder / "their_model")
    save(folder / "their_model_integers.safetensors", expected)


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    for name in ("read", "theirs"):
        (folder / name).mkdir()
    for name, case in cases["layers"].items():
        exchange_layer(folder, name, case)
    load_our_model(folder)
    write_their_model(folder, cases["their_model"])
    (folder / "version.json").write_text(json.dumps(compressed_tensors.__version__))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
