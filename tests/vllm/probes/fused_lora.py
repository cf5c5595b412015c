"""Adapt layers as ranks of a tensor-parallel engine would, and print as JSON how far they are from plain products."""

import json
import sys
import types

import torch
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.lora import model_manager
from vllm.lora.layers import LoRAMapping, ReplicatedLinearWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear

import cloq_export.engines.vllm.plugin as plugin
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.vllm.plugin.quantization import CloqConfig

plugin.register()
from cloq_export.engines.vllm.plugin import fused_lora  # noqa: E402

folder, dtype_name = sys.argv[1:]
dtype = getattr(torch, dtype_name)
checkpoint = Checkpoint.open(folder)
size = checkpoint.config
heads, kv_heads, hidden = size["num_attention_heads"], size["num_key_value_heads"], size["hidden_size"]
head, inner = hidden // heads, size["intermediate_size"]
attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
generator = torch.Generator().manual_seed(0)
SLOTS, MOST = 3, 16
# Slot after slot, the rank of every slice's pair; 0 is none. The last takes the place of the first.
LOADED = ((0, (4, 16, 8)), (2, (0, 3, 0)), (0, (7, 0, 16)))


def random(*shape):
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def make(rank, ranks, kind, *args, parts=None, **kwargs):
    # The functions that tell a layer which rank it is.
    vllm_linear.get_tensor_model_parallel_rank = lambda: rank
    vllm_linear.get_tensor_model_parallel_world_size = lambda: ranks
    config = CloqConfig.from_config(dict(checkpoint.config["quantization_config"]))
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    layer = kind(*args, bias=False, quant_config=config, return_bias=False, params_dtype=dtype, **kwargs)
    for module, shard in parts:
        which = () if shard is None else (shard,)
        for name in ("qweight", "qzeros", "scales"):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, checkpoint.read(f"{module}.{name}"), *which)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def measure(layer, columns, first_columns, full_outputs, own_outputs):
    """Return how far a layer with adapters is from one without, plus the products; own_outputs are rows of full B."""
    config = LoRAConfig(max_lora_rank=MOST, max_loras=SLOTS, lora_dtype=dtype)
    config.fully_sharded_loras = False
    slices = len(full_outputs)
    wrapper = PunicaWrapperCPU(64, 8, "cpu", lora_config=config)
    made = model_manager.from_layer(layer, SLOTS, config, ["part"] * slices if slices > 1 else [], None)
    made.set_mapping(wrapper)
    held = {}
    for slot, ranks in LOADED:
        pairs = []
        for rank, full in zip(ranks, full_outputs, strict=False):
            pair = (random(rank, columns).to(dtype), random(full, rank).to(dtype)) if rank else (None, None)
            pairs.append(pair)
        if slices == 1 and pairs[0][0] is None:
            made.reset_lora(slot)
        else:
            factors = [list(factor) for factor in zip(*pairs, strict=True)]
            made.set_lora(slot, *(factor if slices > 1 else factor[0] for factor in factors))
        held[slot] = pairs

    def error(x, index):
        lengths = [1] * len(index)
        mapping = LoRAMapping(tuple(10 + i if i >= 0 else 0 for i in index), tuple(0 for _ in lengths), is_prefill=True)
        wrapper.update_metadata(mapping, [10, 11, 12], SLOTS + 1, 96)
        y = made.apply(x)
        expected = layer.quant_method.apply(layer, x).double()
        mine = x.double()
        for row, slot in enumerate(index):
            first = 0
            for number, (rows, (a, b)) in enumerate(zip(own_outputs, held.get(slot, []), strict=False)):
                if a is not None:
                    share = a[:, first_columns : first_columns + x.shape[1]].double()
                    expected[row, first : first + len(rows)] += b[rows].double() @ (share @ mine[row])
                first += len(own_outputs[number])
        return float((y.double() - expected).abs().max() / expected.abs().max())

    width = layer.input_size_per_partition
    found = 0.0
    for index in ([0], [-1], [2, -1, 0, 0, 1, -1], [0] * 16 + [2] * 17 + [-1] * 5, [-1, -1]):
        found = max(found, error(random(len(index), width).to(dtype), index))
    # An adapter that is taken out of its slot adds nothing.
    made.reset_lora(0)
    held[0] = []
    return max(found, error(random(3, width).to(dtype), [0, 2, 0])), isinstance(made, fused_lora.FusedLora)


def rows_of(total, parts, index):
    return torch.arange(total).chunk(parts)[index].tolist()


errors = {}
kinds = set()
with set_current_vllm_config(VllmConfig()):
    for ranks in (1, 2):
        for rank in range(ranks):
            jobs = {}
            layer = make(
                *(rank, ranks, vllm_linear.QKVParallelLinear, hidden, head, heads, kv_heads),
                parts=[(f"{attention}.{part}_proj", part) for part in "qkv"],
                prefix=f"{attention}.qkv_proj",
            )
            full = [heads * head, kv_heads * head, kv_heads * head]
            jobs["qkv"] = (layer, hidden, 0, full, [rows_of(count, ranks, rank) for count in full])
            layer = make(
                *(rank, ranks, vllm_linear.MergedColumnParallelLinear, hidden, [inner, inner]),
                parts=[(f"{mlp}.gate_proj", 0), (f"{mlp}.up_proj", 1)],
                prefix=f"{mlp}.gate_up_proj",
            )
            jobs["gate_up"] = (layer, hidden, 0, [inner, inner], [rows_of(inner, ranks, rank)] * 2)
            for kind in ("RowParallelLinear", "ReplicatedLinear"):
                layer = make(
                    *(rank, ranks, getattr(vllm_linear, kind), inner, hidden),
                    parts=[(f"{mlp}.down_proj", None)],
                    prefix=f"{mlp}.down_proj",
                )
                share = 0 if kind == "ReplicatedLinear" else rank * inner // ranks
                layer.input_size_per_partition = inner if kind == "ReplicatedLinear" else inner // ranks
                jobs[kind] = (layer, inner, share, [hidden], [list(range(hidden))])
            for name, job in jobs.items():
                found, is_fused = measure(*job)
                errors[name] = max(errors.get(name, 0.0), found)
                kinds.add(is_fused)
    assert kinds == {True}, kinds
    # A float layer keeps vLLM's own steps.
    vllm_parameter.get_tensor_model_parallel_rank = lambda: 0
    vllm_parameter.get_tensor_model_parallel_world_size = lambda: 1
    plain = vllm_linear.ReplicatedLinear(hidden, inner, bias=False, params_dtype=dtype, return_bias=False)
    config = types.SimpleNamespace(max_lora_rank=MOST, lora_dtype=dtype, fully_sharded_loras=False)
    made = model_manager.from_layer(plain, SLOTS, config, [], None)
    assert type(made) is ReplicatedLinearWithLoRA, type(made)
print(json.dumps(errors))
