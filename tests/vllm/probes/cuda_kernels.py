"""Hand layers to vLLM's CUDA kernels as the plugin does, up to the launch, and read back what those would be given.

The platform says that it is CUDA; what only a GPU does, bringing codes into the order of its matrix units, is done by
vLLM's own reference for Marlin, and recorded for Machete. All else is vLLM's code. Printed as JSON: for each case the
kernel that was chosen, the width of its codes, and how far the weight that stands in its tensors is from ours.
"""

import json

import torch
from vllm import _custom_ops as ops
from vllm.model_executor import parameter
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm, marlin_weights
from vllm.platforms import PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability

from cloq_export import kernels
from cloq_export.engines.vllm.plugin import computations
from cloq_export.engines.vllm.plugin.parts import Fused

IN, OUT, GROUP, TILE = 256, 256, 128, 16
parameter.get_tensor_model_parallel_rank = lambda: 0
parameter.get_tensor_model_parallel_world_size = lambda: 1


def pretend(capability):
    """Let vLLM believe in a GPU."""
    kind = type(current_platform)
    kind._enum = PlatformEnum.CUDA
    kind.is_cuda = kind.is_cuda_alike = lambda self: True
    kind.is_cpu = lambda self: False
    kind.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*capability))
    kind.is_device_capability = classmethod(
        lambda cls, wanted, device_id=0: wanted in (capability, capability[0] * 10 + capability[1])
    )


def unpack_rows(packed, bits):
    """Return codes (in, out) of words (in * bits / 32, out) that hold neighbouring inputs, the first one lowest."""
    codes = [(packed >> (bits * place)) & (2**bits - 1) for place in range(32 // bits)]
    return torch.stack(codes, 1).reshape(-1, packed.shape[1])


def repack(b_q_weight, perm=None, size_k=0, size_n=0, num_bits=0, is_a_8bit=False):
    """Bring codes into Marlin's order by vLLM's reference."""
    codes = unpack_rows(b_q_weight, num_bits)
    return marlin_weights(codes, size_k, size_n, num_bits, get_weight_perm(num_bits, is_a_8bit), is_a_8bit)


def prepack(b_q_weight, a_type, b_type, group_scales_type):
    """Take codes as Machete does: column by column."""
    assert b_q_weight.stride(0) == 1
    return b_q_weight


ops.gptq_marlin_repack, ops.machete_prepack_B = repack, prepack


def inverse(perm):
    order = torch.as_tensor(perm)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return back


def of_marlin(layer, config):
    """Return (in, out): the weight that stands in Marlin's tensors."""
    bits = config.weight_type.size_bits
    count = 32 // bits
    packed = layer.qweight.data
    codes = torch.stack([(packed >> (bits * place)) & (2**bits - 1) for place in range(count)], -1)
    codes = codes.reshape(len(packed), -1)
    codes = codes.reshape(-1, len(get_weight_perm(bits)))[:, inverse(get_weight_perm(bits))]
    codes = codes.reshape(IN // TILE, OUT // TILE, TILE, TILE).permute(0, 2, 1, 3).reshape(IN, OUT)
    grouped, _ = marlin_utils.get_scale_perms()
    scales = layer.scales.data.reshape(-1, len(grouped))[:, inverse(grouped)].reshape(-1, OUT).float()
    if not config.zero_points:
        return (codes - config.weight_type.bias) * scales.repeat_interleave(GROUP, 0)
    zeros = marlin_utils.unpack_cols(layer.qzeros.data, bits, IN // GROUP, OUT)
    within = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    zeros = zeros.reshape(-1, len(within))[:, inverse(within)].reshape(-1, len(grouped))[:, inverse(grouped)]
    zeros = zeros.reshape(-1, OUT)
    return (codes - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(GROUP, 0)


def of_machete(layer, config):
    """Return (in, out): the weight that stands in Machete's tensors, `code * scale + (-zero * scale)`."""
    bits = config.weight_type.size_bits
    codes = unpack_rows(layer.qweight.data, bits).float()
    scales = layer.scales.data.float().repeat_interleave(GROUP, 0)
    if not config.zero_points:
        return (codes - config.weight_type.bias) * scales
    return codes * scales + layer.qzeros.data.float().repeat_interleave(GROUP, 0)


def hand_over(bits, symmetric):
    """Choose a kernel for a random layer, prepare its tensors, and compare what they hold with the layer."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=generator, dtype=torch.uint8)
    # Powers of two: products with zeros, which Machete keeps in half precision, are exact then.
    scales = torch.exp2(-torch.randint(2, 6, (OUT, IN // GROUP), generator=generator)).to(torch.float16)
    zeros = torch.randint(0, 2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    steps = codes.float() - zeros.float().repeat_interleave(GROUP, 1)
    wanted = (steps * scales.float().repeat_interleave(GROUP, 1)).t()
    kind = computations.SYMMETRIC if symmetric else computations.ASYMMETRIC
    config = MPLinearLayerConfig((IN, OUT), (IN, OUT), kind[bits], torch.float16, GROUP, not symmetric, False)
    computation = computations.choose_computation(config, bits, symmetric=symmetric)
    layer = torch.nn.Module()
    layer.params_dtype = torch.float16
    computation.prepare(layer, Fused(codes, scales, zeros, bits, symmetric))
    if isinstance(computation, computations.ReferenceComputation):
        found = kernels.dequantize(layer.qweight, layer.qzeros, layer.scales, bits)
        return {"kernel": "ours", "bits": bits, "off": float((found - wanted.t()).abs().max())}
    kernel = type(computation.kernel).__name__
    read = {"MarlinLinearKernel": of_marlin, "MacheteLinearKernel": of_machete}[kernel]
    found = read(layer, computation.kernel.config)
    return {"kernel": kernel, "bits": computation.bits, "off": float((found - wanted).abs().max())}


results = {}
for capability in ((8, 0), (9, 0), (12, 0)):
    pretend(capability)
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            results[f"{capability[0]}.{capability[1]} {bits} {symmetric}"] = hand_over(bits, symmetric)
print(json.dumps(results))
