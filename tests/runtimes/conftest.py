"""Tiny random models of several architectures, quantized and written to disk as the pipeline writes them."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cloq_export.formats.gptq import GPTQ_V1
from cloq_export.formats.peft.codec import write_adapter
from cloq_export.runtimes.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.types import LoraPair, QuantizedLayer, QuantSpec

VOCABULARY = 96


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


def _qwen2() -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
    )


def _gpt_neox() -> nn.Module:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
        )
    )


def _opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
            init_std=0.2,
        )
    )


MAKERS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}


def _random_model(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model; biases, which transformers starts at zero, are random too."""
    torch.manual_seed(0)
    model = MAKERS[architecture]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype)  # parameters only: rotary frequencies stay float32 in every model
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def rounded(weight: torch.Tensor, spec: QuantSpec) -> QuantizedLayer:
    """Round to nearest on a min/max grid: enough for tests that ask what is served, not how good it is."""
    groups = weight.view(weight.shape[0], spec.group_count(weight.shape[1]), -1)
    if spec.symmetric:
        scales = groups.abs().amax(-1) / 2 ** (spec.bits - 1)
        zeros = torch.full_like(scales, 2 ** (spec.bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / spec.max_code
        zeros = (-low / scales).round().clamp(0, spec.max_code)
    scales = scales.to(torch.float16)
    steps = groups / scales.to(torch.float32).unsqueeze(-1)
    codes = (steps.round() + zeros.unsqueeze(-1)).clamp(0, spec.max_code).to(torch.uint8)
    return QuantizedLayer(codes.view(weight.shape), scales, zeros.to(torch.uint8), spec)


def _block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "lm_head" not in name
    }


@dataclasses.dataclass
class Written:
    """A checkpoint and an adapter on disk, and the dense float32 models that they stand for."""

    folder: pathlib.Path
    adapter: pathlib.Path
    source: Any
    layers: dict[str, QuantizedLayer]
    pairs: dict[str, LoraPair]
    fingerprint: str

    def reference(self, *, adapted: bool) -> Any:
        """Return the dense model, made without any code of the runtimes."""
        model = copy.deepcopy(self.source).to(torch.float32)
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = layer.dequantize()
                model.get_submodule(name).weight.copy_(weight + self.pairs[name].product() if adapted else weight)
        return model


def _write_quantized(
    folder: pathlib.Path,
    architecture: str = "llama",
    spec: QuantSpec | None = None,
    *,
    overrides: Mapping[str, QuantSpec | None] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Written:
    """Quantize a random model by rounding, give each layer a random pair, and write both."""
    model = _random_model(architecture, dtype)
    spec = spec or QuantSpec(bits=2, group_size=32)
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, QuantizedLayer] = {}
    pairs: dict[str, LoraPair] = {}
    for index, (name, linear) in enumerate(_block_linears(model).items()):
        chosen = next((own for suffix, own in (overrides or {}).items() if name.endswith(suffix)), spec)
        if chosen is None:
            continue
        layer = rounded(linear.weight.detach().to(torch.float32), chosen)
        if options.get("layout") is GPTQ_V1:
            layer = dataclasses.replace(layer, zeros=layer.zeros.clamp(min=1))
        layers[name] = layer
        rank = 4 + 4 * (index % 2)
        pairs[name] = LoraPair(
            lora_A=(0.1 * torch.randn(rank, layer.in_features, generator=generator)).to(torch.float16),
            lora_B=(0.1 * torch.randn(layer.out_features, rank, generator=generator)).to(torch.float16),
            alpha=2.0 * rank,
        )
    source = LayerSource.of_mapping(layers)
    floats = FloatPart.of_model(model, source)
    fingerprint = export_checkpoint(folder / "checkpoint", source, floats, **options)
    write_adapter(folder / "adapter", pairs, base_model="random", base_fingerprint=fingerprint)
    return Written(folder / "checkpoint", folder / "adapter", model, layers, pairs, fingerprint)


def _log_probabilities(model: Any) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids).logits.to(torch.float32), dim=-1)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a 2-bit Llama, for tests that only read."""
    return _write_quantized(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="session")
def write_quantized() -> Callable[..., Written]:
    return _write_quantized


@pytest.fixture(scope="session")
def log_probabilities() -> Callable[[Any], torch.Tensor]:
    return _log_probabilities
