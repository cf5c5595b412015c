"""Print, as JSON, which configs the plugin claims, and whether registering twice changes anything."""

import json

from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.platforms import PlatformEnum

from cloq_export.engines.vllm import plugin as vllm_plugin

vllm_plugin.register()
stock = get_quantization_config("auto_gptq")
ours = get_quantization_config("cloq")


def config(bits=4, group_size=128, sym=True, **more):
    plain = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": False}
    return plain | more


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
}
result = {
    "claimed": {name: ours.override_quantization_method(case, None) for name, case in cases.items()},
    "stock": {name: stock_takes(case) for name, case in cases.items() if case["quant_method"] == "gptq"},
    "asked for": ours.override_quantization_method(config(), "cloq"),
    "asked for another": ours.override_quantization_method(config(bits=2), "auto_gptq"),
}
vllm_plugin._registered = False
vllm_plugin.register()
result["methods"] = QUANTIZATION_METHODS.count("cloq")
result["kernels"] = [kernel.__name__ for kernel in _POSSIBLE_KERNELS[PlatformEnum.CPU]].count("CloqCpuKernel")
print(json.dumps(result))
