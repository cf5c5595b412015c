"""Load layers as ranks of a tensor-parallel engine would, and print as JSON how far each is off, job by job."""

import json
import sys

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear

import cloq_export.engines.vllm.plugin as plugin
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.vllm.plugin.quantization import CloqConfig
from cloq_export.errors import CloqError
from cloq_export.kernels import cpu

plugin.register()
native = cpu.available


def measure(folder, ranks, native_library):
    # Without, as on a machine that has no compiler.
    cpu.available = native if native_library else lambda: False
    checkpoint = Checkpoint.open(folder)
    size = checkpoint.config
    heads, kv_heads, hidden = size["num_attention_heads"], size["num_key_value_heads"], size["hidden_size"]
    head, inner = hidden // heads, size["intermediate_size"]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"

    def make(rank, kind, *args, **kwargs):
        # The functions that tell a layer which rank it is.
        vllm_linear.get_tensor_model_parallel_rank = lambda: rank
        vllm_linear.get_tensor_model_parallel_world_size = lambda: ranks
        config = CloqConfig.from_config(dict(checkpoint.config["quantization_config"]))
        config.packed_modules_mapping = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        return kind(*args, bias=False, quant_config=config, return_bias=False, params_dtype=torch.float32, **kwargs)

    def fill(layer, module, shard=None):
        for part in ("qweight", "qzeros", "scales"):
            parameter = getattr(layer, part)
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, checkpoint.read(f"{module}.{part}"), *arguments)

    def compute(layer, x):
        layer.quant_method.process_weights_after_loading(layer)
        return layer.quant_method.apply(layer, x)

    def weight(module):
        return checkpoint.read_layer(module).dequantize()

    errors = {"qkv": 0.0, "gate_up": 0.0, "fused_on_disk": 0.0, "down": 0.0, "o": 0.0, "replicated": 0.0}
    with set_current_vllm_config(VllmConfig()):
        for rank in range(ranks):
            x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(rank))
            layer = make(
                rank, vllm_linear.QKVParallelLinear, hidden, head, heads, kv_heads, prefix=f"{attention}.qkv_proj"
            )
            for shard in "qkv":
                fill(layer, f"{attention}.{shard}_proj", shard)
            # Fewer key heads than ranks: several ranks hold the same one.
            kept = min(ranks, kv_heads)
            share = torch.cat(
                [weight(f"{attention}.q_proj").chunk(ranks)[rank]]
                + [weight(f"{attention}.{name}_proj").chunk(kept)[rank * kept // ranks] for name in "kv"]
            )
            errors["qkv"] = max(errors["qkv"], float((compute(layer, x) - x @ share.t()).abs().max()))

            layer = make(
                rank, vllm_linear.MergedColumnParallelLinear, hidden, [inner, inner], prefix=f"{mlp}.gate_up_proj"
            )
            fill(layer, f"{mlp}.gate_proj", 0)
            fill(layer, f"{mlp}.up_proj", 1)
            share = torch.cat([weight(f"{mlp}.{name}_proj").chunk(ranks)[rank] for name in ("gate", "up")])
            errors["gate_up"] = max(errors["gate_up"], float((compute(layer, x) - x @ share.t()).abs().max()))

            for name, module, width in (("down", f"{mlp}.down_proj", inner), ("o", f"{attention}.o_proj", hidden)):
                layer = make(rank, vllm_linear.RowParallelLinear, width, hidden, prefix=module)
                fill(layer, module)
                x = torch.randn(3, width // ranks, generator=torch.Generator().manual_seed(rank))
                share = weight(module).chunk(ranks, dim=1)[rank]
                errors[name] = max(errors[name], float((compute(layer, x) - x @ share.t()).abs().max()))

            x = torch.randn(3, inner, generator=torch.Generator().manual_seed(rank))
            layer = make(rank, vllm_linear.ReplicatedLinear, inner, hidden, prefix=f"{mlp}.down_proj")
            fill(layer, f"{mlp}.down_proj")
            whole = weight(f"{mlp}.down_proj")
            errors["replicated"] = max(errors["replicated"], float((compute(layer, x) - x @ whole.t()).abs().max()))

            # A module that is one in the checkpoint and two for vLLM, as in Phi-3: down_proj stands in for it.
            layer = make(
                rank,
                vllm_linear.MergedColumnParallelLinear,
                inner,
                [hidden // 2, hidden // 2],
                prefix=f"{mlp}.down_proj",
            )
            fill(layer, f"{mlp}.down_proj")
            share = torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
            errors["fused_on_disk"] = max(
                errors["fused_on_disk"], float((compute(layer, x) - x @ share.t()).abs().max())
            )
    return errors


found = []
for job in json.loads(sys.argv[1]):
    try:
        found.append(measure(*job))
    except CloqError as error:
        found.append({"refused": str(error)})
print(json.dumps(found))
