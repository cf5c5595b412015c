"""Print, as JSON, which configs the plugin claims, what it refuses, and whether registering twice changes anything."""

import dataclasses
import json
import types

from vllm.exceptions import VLLMValidationError
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.platforms import PlatformEnum
from vllm.v1.engine.input_processor import InputProcessor

from cloq_export.engines.vllm import plugin as vllm_plugin
from cloq_export.engines.vllm.plugin import adapter_names, expert_lora, experts, needed_adapter
from cloq_export.errors import CloqError
from cloq_export.types import QuantSpec

vllm_plugin.register()
stock = get_quantization_config("auto_gptq")
ours = get_quantization_config("cloq")


def config(bits=4, group_size=128, sym=True, **more):
    plain = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": False}
    return plain | more


def auto_round(**more):
    plain = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    return plain | {"bits": 4, "group_size": 128, "sym": True} | more


def refused(action):
    try:
        action()
    except (CloqError, VLLMValidationError) as error:
        return str(error)
    return None


def stock_takes(case):
    try:
        stock.from_config(case)
    except ValueError:
        return False
    return True


cases = {
    "stock 4-bit": config(),
    "stock 8-bit": config(bits=8),
    "asymmetric": config(sym=False),
    "2-bit": config(bits=2),
    "3-bit v2": config(bits=3, sym=False, checkpoint_format="gptq_v2"),
    "group of 16": config(group_size=16),
    "one layer of 2 bits": config(dynamic={"+:^model\\.layers\\.0\\.mlp\\.up_proj$": {"bits": 2}}),
    "quantized head": config(bits=2, lm_head=True),
    "act-order": config(bits=2, desc_act=True),
    "general rule": config(bits=2, dynamic={"-:.*head.*": {}}),
    "awq": {"quant_method": "awq", "bits": 4},
    "AutoRound, 4-bit": auto_round(),
    "AutoRound, 8-bit": auto_round(bits=8),
    "AutoRound, 2-bit": auto_round(bits=2),
    "AutoRound, asymmetric": auto_round(sym=False),
    "AutoRound, zeros as they are": auto_round(packing_format="auto_round"),
    "AutoRound, a head": auto_round(bits=2, extra_config={"lm_head": {"bits": 2}}),
    "AutoRound, a float head": auto_round(bits=2, extra_config={"lm_head": {"bits": 16}}),
    "AutoRound, words of AWQ": auto_round(packing_format="auto_round:auto_awq"),
}
result = {
    "claimed": {name: ours.override_quantization_method(case, None) for name, case in cases.items()},
    "stock": {name: stock_takes(case) for name, case in cases.items() if case["quant_method"] == "gptq"},
    "head of AutoRound's": refused(lambda: ours.from_config(cases["AutoRound, a head"])),
    "asked for": ours.override_quantization_method(config(), "cloq"),
    "asked for another": ours.override_quantization_method(config(bits=2), "auto_gptq"),
}


# A base that needs its adapter.
binding = {
    "format_version": 1,
    "layout": "gptq_v2",
    "base_fingerprint": "sha256:0",
    "modules": [],
    "needs_adapter": True,
}
needy = types.SimpleNamespace(quantization_config={"quant_method": "gptq", "cloq": binding})
result["needs adapter"] = [
    needed_adapter.needs_adapter(hf_config)
    for hf_config in (
        needy,
        types.SimpleNamespace(quantization_config=types.SimpleNamespace(to_dict=lambda: needy.quantization_config)),
        types.SimpleNamespace(
            quantization_config={"quant_method": "gptq", "cloq": {**binding, "needs_adapter": False}}
        ),
        types.SimpleNamespace(quantization_config={"quant_method": "gptq"}),
        types.SimpleNamespace(),
    )
]
model = types.SimpleNamespace(hf_config=needy, model="/exports/tiny", served_model_name="tiny")
processor = object.__new__(InputProcessor)
without_adapters = types.SimpleNamespace(model_config=model, lora_config=None)
result["no adapters at all"] = refused(lambda: InputProcessor.__init__(processor, without_adapters))
processor.alone_refused_by_cloq_export = needed_adapter.refusal_alone(model)
processor.lora_config, processor.renderer = object(), types.SimpleNamespace(tokenizer=None)
result["alone"] = refused(lambda: processor._validate_lora(None))
result["with an adapter"] = refused(lambda: processor._validate_lora(object()))

# Experts.
GRID = QuantSpec(bits=2, group_size=32)


@dataclasses.dataclass
class Config:
    activation: object = dataclasses.field(default_factory=lambda: types.SimpleNamespace(value="silu"))
    swiglu_limit: float | None = None
    has_bias: bool = False
    intermediate_size: int = 192
    intermediate_size_per_partition: int = 192
    tp_size: int = 1
    dp_size: int = 1
    pcp_size: int = 1
    is_sequence_parallel: bool = False
    num_experts: int = 2
    num_logical_experts: int = 2


def ask(spec_of=lambda module: GRID, **changes):
    layer = types.SimpleNamespace(
        ckpt_gate_proj_name="gate_proj",
        ckpt_down_proj_name="down_proj",
        ckpt_up_proj_name="up_proj",
        moe_config=Config(**changes),
        expert_map_manager=types.SimpleNamespace(num_fused_shared_experts=0),
    )
    method = experts.CloqExpertsMethod
    experts.CloqExpertsMethod = lambda *_, **__: None
    try:
        return refused(lambda: experts.experts_method(layer, "mlp.experts", spec_of))
    finally:
        experts.CloqExpertsMethod = method


adapted = types.SimpleNamespace(
    layer_name="model.layers.0.mlp.experts", routed_experts=types.SimpleNamespace(quant_method=object())
)
result["experts"] = {
    "as they should be": ask(),
    "activation": ask(activation=types.SimpleNamespace(value="swiglustep")),
    "clamped": ask(swiglu_limit=7.0),
    "biases": ask(has_bias=True),
    "uneven": ask(tp_size=5, intermediate_size_per_partition=39),
    "data parallel": ask(dp_size=2),
    "copied": ask(num_experts=3),
    "half": ask(lambda module: None if module.endswith("experts.1.up_proj") else GRID),
    "adapted float experts": refused(lambda: expert_lora.ExpertsWithLoRA(adapted)),
}
here = experts.current_platform
experts.current_platform = types.SimpleNamespace(is_cpu=lambda: False, device_name="cuda")
result["experts"]["gpu"] = ask()
experts.current_platform = here

# Adapters of which a part would be left out; the second engine is one as 0.33 has it, which knows text models' names.
engine = types.SimpleNamespace(
    modules={"language_model.model.layers.0.self_attn.qkv_proj": None},
    packed_modules={"qkv": ["language_model.model.layers.0.self_attn.q_proj"]},
)
newer = types.SimpleNamespace(
    **vars(engine), _get_text_lora_names=lambda module: [module.removeprefix("language_model.")]
)
text_names = types.SimpleNamespace(loras={"model.layers.0.self_attn.q_proj": None})
own_names = types.SimpleNamespace(loras={"language_model.model.layers.0.self_attn.q_proj": None})
strangers = types.SimpleNamespace(loras={"vision.layers.0.q_proj": None, **own_names.loras})
result["lost"] = [
    refused(lambda adapter=adapter, of=of: adapter_names.refuse_lost("mine", adapter, of))
    for adapter, of in (
        (own_names, engine),
        (own_names, newer),
        (text_names, newer),
        (text_names, engine),
        (strangers, newer),
    )
]

vllm_plugin._registered = False
vllm_plugin.register()
result["methods"] = QUANTIZATION_METHODS.count("cloq")
result["kernels"] = [kernel.__name__ for kernel in _POSSIBLE_KERNELS[PlatformEnum.CPU]].count("CloqCpuKernel")
print(json.dumps(result))
