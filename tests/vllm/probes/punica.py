"""Compare the low-rank products of vLLM and of the plugin with plain ones, and print as JSON how far they are off."""

import itertools
import json

import torch
from vllm.lora.ops import torch_ops as stock
from vllm.lora.punica_wrapper import punica_cpu

from cloq_export.engines.vllm import plugin as vllm_plugin

vllm_plugin.register()
from cloq_export.engines.vllm.plugin import punica  # noqa: E402

SLOTS, RANK, WIDTH, OUT = 4, 8, 32, 48
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator)


def truth(x, a, b, index):
    y = torch.zeros(len(x), OUT, dtype=torch.float64)
    for row, adapter in enumerate(index):
        if adapter >= 0:
            y[row] = 0.5 * b[adapter, 0].double() @ (a[adapter, 0].double() @ x[row].double())
    return y


def products(module, x, a, b, index, lengths):
    lengths = torch.tensor(lengths)
    starts = lengths.cumsum(0) - lengths
    meta = (starts, lengths, torch.tensor(index), len(index), int(lengths.max()), int(lengths.sum()))
    inner = torch.zeros(len(x), RANK)
    y = torch.zeros(len(x), OUT + 8)
    module.sgmv_shrink(x, a, inner, *meta, 0.5)
    module.sgmv_expand_slice(inner, b, y, *meta, 8, OUT, True)
    rows = torch.tensor(list(itertools.chain(*([i] * n for i, n in zip(index, lengths.tolist(), strict=True)))))
    inner, z = torch.zeros(len(x), RANK), torch.zeros(len(x), OUT)
    module.bgmv_shrink(x, a, inner, rows, 0.5)
    module.bgmv_expand(inner, b, z, rows, True)
    reference = truth(x, a, b, rows.tolist())
    return max(
        float((y[:, 8:] - reference).abs().max()), float((z - reference).abs().max()), float(y[:, :8].abs().max())
    )


worst = {"stock mixed": 0.0, "ours": 0.0}
for index, lengths in (
    ([-1], [5]),
    ([2], [5]),
    ([0, -1, 3], [4, 1, 7]),
    ([1, -1, 1, 0, -1, 1], [1, 1, 1, 1, 1, 1]),
    ([3, 2, 1, 0, -1, 3, 2], [2, 3, 1, 5, 4, 1, 1]),
):
    x, a, b = random(sum(lengths), WIDTH), random(SLOTS, 1, RANK, WIDTH), random(SLOTS, 1, OUT, RANK)
    worst["ours"] = max(worst["ours"], products(punica_cpu, x, a, b, index, lengths))
    if -1 in index:
        worst["stock mixed"] = max(worst["stock mixed"], products(stock, x, a, b, index, lengths))


# The head: rows of one request's prompt, rows of the sampler, and adapters that leave the head alone.
class Wrapper:
    sampler_indices = torch.tensor([1, -1, 0])


a, b = random(SLOTS, 1, RANK, WIDTH), random(SLOTS, 1, OUT, RANK)
a[3] = 0
x = random(3, WIDTH)
y = torch.zeros(3, OUT)
punica_cpu.PunicaWrapperCPU.add_lora_logits(Wrapper(), y, x, a, b, 0.5)
worst["head, sampled"] = float((y - truth(x, a, b, [1, -1, 0])).abs().max())
x = random(7, WIDTH)
for slot in (-1, 0, 2, 3):
    y = torch.zeros(7, OUT)
    with punica._prompt_of(slot):
        punica_cpu.PunicaWrapperCPU.add_lora_logits(Wrapper(), y, x, a, b, 0.5)
    worst[f"head, prompt of {slot}"] = float((y - truth(x, a, b, [slot] * 7)).abs().max())
try:
    punica_cpu.PunicaWrapperCPU.add_lora_logits(Wrapper(), y, x, a, b, 0.5)
except RuntimeError as error:
    worst["refusal"] = str(error)
print(json.dumps(worst))
