"""The models that `decode_cpu.py` times, in float and packed, with random adapters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

# This file is run by the interpreter of vLLM too, so nothing else but the standard library is imported at the top.

RANK = 64
SYNTHETIC = "synthetic"


def synthetic_model(layers: int) -> Any:
    """Return a Llama in the shape of one with 1.1 billion parameters (22 layers), random weights, bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def adapted_linears(model: Any) -> dict[str, Any]:
    """Return the linear layers of the blocks, by name."""
    from torch import nn

    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }


class Files:
    """A model's folders, made when they are asked for: in float, quantized, and its adapters.

    Args:
        name: of the model, as on the command line.
        layers: of the synthetic model.
        place: an empty folder.
    """

    def __init__(self, name: str, layers: int, place: Path) -> None:
        self.place = place
        import torch

        from cloq_export.models.library_calls import quiet_transformers
        from cloq_export.models.source import find_source, load_source

        if name == SYNTHETIC:
            model = synthetic_model(layers)
            billions = sum(weight.numel() for weight in model.parameters()) / 1e9
            self.label = f"{type(model).__name__.removesuffix('ForCausalLM')} {billions:.1f}B, random weights"
        else:
            source = find_source(name)
            of_source = source.weights[0].name.partition(".")[0] if source.kind == "gguf" else source.folder.name
            self.label = of_source
            with quiet_transformers():
                model = load_source(source).model.to(torch.bfloat16)
            # A dequantized model still calls itself quantized, which would make its folder unreadable as a float one.
            model.hf_quantizer, model.is_quantized = None, False
            vars(model.config).pop("quantization_config", None)
        for config in (model.config, model.generation_config):
            config.eos_token_id = None
        self.float_folder = place / "float"
        model.save_pretrained(self.float_folder)
        self.shapes = {name: tuple(module.weight.shape) for name, module in adapted_linears(model).items()}
        self.vocabulary = model.config.vocab_size

    def float_model(self) -> Any:
        """Return the model in bfloat16."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.float_folder, dtype=torch.bfloat16).eval()

    @functools.cache  # noqa: B019 - lives as long as the benchmark
    def quantized(self, bits: int, layout: str) -> Path:
        """Write the model rounded to nearest, group 64, as a checkpoint; return its folder."""
        import torch

        from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
        from cloq_export.formats.registry import LAYOUTS
        from cloq_export.types import QuantizedLayer, QuantSpec

        model, spec = self.float_model(), QuantSpec(bits, 64)
        layers: dict[str, QuantizedLayer] = {}
        for name, linear in adapted_linears(model).items():
            weight = linear.weight.detach().to(torch.float32)
            groups = weight.view(weight.shape[0], -1, 64)
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scales = ((high - low) / spec.max_code).to(torch.float16).clamp(min=1e-4)
            steps = scales.to(torch.float32)
            zeros = (-low / steps).round().clamp(0, spec.max_code)
            codes = ((groups / steps.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, spec.max_code)
            layers[name] = QuantizedLayer(codes.to(torch.uint8).view(weight.shape), scales, zeros.to(torch.uint8), spec)
        folder, source = self.place / f"{layout}-{bits}", LayerSource.of_mapping(layers)
        export_checkpoint(folder, source, FloatPart.of_model(model, source), layout=LAYOUTS[layout])
        return folder

    @functools.cache  # noqa: B019 - lives as long as the benchmark
    def adapter(self, number: int) -> Path:
        """Write a random adapter of every quantized linear; return its folder."""
        import torch

        from cloq_export.formats.peft import write_adapter
        from cloq_export.formats.peft.codec import BINDING_NAME
        from cloq_export.types import LoraPair

        generator = torch.Generator().manual_seed(number)

        def factor(*shape: int) -> Any:
            return (0.02 * torch.randn(*shape, generator=generator)).to(torch.float16)

        pairs = {
            name: LoraPair(lora_A=factor(RANK, columns), lora_B=factor(out, RANK), alpha=float(RANK))
            for name, (out, columns) in self.shapes.items()
        }
        folder = self.place / f"adapter{number}"
        write_adapter(folder, pairs, base_model="random", base_fingerprint="random")
        (folder / BINDING_NAME).unlink()  # it serves several bases
        return folder


def add_adapters(model: Any, count: int) -> list[str]:
    """Attach random adapters of every quantized linear; return their names."""
    import torch
    from peft import LoraConfig

    from cloq_export.engines.packed_linear import PackedLinear
    from cloq_export.engines.packed_lora import PackedLoraLinear

    names = [f"adapter{index}" for index in range(count)]
    targets = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name in names:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
        config._register_custom_module({PackedLinear: PackedLoraLinear})
        model.add_adapter(config, name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PackedLoraLinear):
                for pairs in (module.lora_A, module.lora_B):
                    for linear in pairs.values():
                        # float32 that float16 holds, as stored adapters are.
                        linear.weight.data = linear.weight.data.to(torch.float16).to(torch.float32)
    if names:
        model.set_adapter(names[0])
    model.requires_grad_(False)
    return names
