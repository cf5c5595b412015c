"""LoRA over quantized experts on the CPU: every token's own adapter, in the pass that computes its experts.

vLLM 0.32 and 0.33 hand adapters of experts to kernels that exist for GPUs only. Here a layer of experts keeps them
itself, cut to its rank as the experts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora import lora_weights
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.platforms import current_platform

from cloq_export.engines.vllm.plugin.experts import CloqExpertsMethod
from cloq_export.engines.vllm.plugin.mixture import Pair, StackedLora
from cloq_export.errors import EngineError

# vLLM hands the pairs of an expert over in this order, gate, down and up; an expert without a gate has its up first.
_GATE, _DOWN, _UP = range(3)


def register() -> None:
    """Let vLLM pack the adapters of single experts, whichever of them an adapter adapts, on the CPU."""
    packed = lora_weights.PackedLoRALayerWeights
    if not current_platform.is_cpu() or hasattr(packed.pack_moe, "of_cloq_export"):
        return
    stock = packed.pack_moe.__func__

    def pack_moe(
        cls: Any, loras: Sequence[LoRALayerWeights | None], module_name: str, is_non_gated_moe: bool = False
    ) -> Any:
        return stock(cls, completed(loras, gated=not is_non_gated_moe), module_name, is_non_gated_moe)

    pack_moe.of_cloq_export = True  # type: ignore[attr-defined]
    packed.pack_moe = classmethod(pack_moe)


def completed(loras: Sequence[LoRALayerWeights | None], *, gated: bool) -> list[LoRALayerWeights | None]:
    """Return the pairs of all experts with one for each, all of a projection of one rank, as vLLM stacks them.

    What is added is zero: a pair that adds nothing, and rows of A and columns of B.

    Args:
        loras: gate, down and up of one expert after the other; None where there is no pair.
        gated: there is a gate; without, the third place stays empty.
    """
    shapes = _shapes([loras[place::3] for place in range(3)])
    filled: list[LoRALayerWeights | None] = []
    for number, lora in enumerate(loras):
        place = number % 3
        if place == _UP and not gated:
            filled.append(None)
            continue
        rank, in_features, out_features = shapes[place]
        dtype = next(one.lora_a.dtype for one in loras if one is not None)
        a, b = torch.zeros(rank, in_features, dtype=dtype), torch.zeros(out_features, rank, dtype=dtype)
        if lora is not None:
            lora.optimize()  # the scaling goes into B, for the pairs may differ in it
            a[: lora.lora_a.shape[0]], b[:, : lora.lora_b.shape[1]] = lora.lora_a, lora.lora_b
        filled.append(LoRALayerWeights("", rank, rank, a, b, scaling=1))
    return filled


def _shapes(by_place: Sequence[Sequence[LoRALayerWeights | None]]) -> list[tuple[int, int, int]]:
    """Return rank, inputs and outputs of the projections of an expert, from whichever has a pair."""
    known = [[one for one in loras if one is not None] for loras in by_place]
    ranks = [max((one.lora_a.shape[0] for one in of_place), default=1) for of_place in known]
    place, one = next((place, of_place[0]) for place, of_place in enumerate(known) if of_place)
    sizes = one.lora_a.shape[1], one.lora_b.shape[0]
    hidden, inner = sizes[::-1] if place == _DOWN else sizes
    return [(ranks[_GATE], hidden, inner), (ranks[_DOWN], inner, hidden), (ranks[_UP], hidden, inner)]


class ExpertsWithLoRA(BaseLayerWithLoRA):
    """A mixture whose experts have adapters.

    Args:
        base_layer: vLLM's runner of the mixture.

    Raises:
        EngineError: something else than this plugin computes its experts.
    """

    def __init__(self, base_layer: MoERunner) -> None:
        super().__init__()
        self.base_layer = base_layer
        method = base_layer.routed_experts.quant_method
        if not isinstance(method, CloqExpertsMethod):
            raise EngineError(
                f"{base_layer.layer_name} is adapted, but its experts are not quantized, and on a CPU vLLM serves no "
                "adapters of such experts; quantize them, or leave them out of the adapter."
            )
        self.method = method
        # vLLM looks layers up under their names inside of the runner, too.
        self._shared_experts = base_layer._shared_experts

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make room for so many adapters."""
        mixture, share = self.method.mixture, self.method.share
        assert mixture is not None
        assert share is not None
        slices = [share.inner] * (2 if self.method.moe.is_act_and_mul else 1)
        rank, dtype = lora_config.max_lora_rank, lora_config.lora_dtype
        # vLLM asks for shapes when it makes an adapter of zeros to warm up; these hold no memory.
        self.n_slices = (len(slices) + 1) * self.method.moe.num_experts
        empty = torch.zeros(1, 1, dtype=dtype)
        self.lora_a_stacked = self.lora_b_stacked = [empty] * self.n_slices
        self.up = StackedLora(max_loras, rank, mixture.up, slices, dtype)
        self.down = StackedLora(max_loras, rank, mixture.down, [share.hidden], dtype)
        self.method.lora = (self.up, self.down)

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Take what knows the adapter of every token of a batch."""
        super().set_mapping(punica_wrapper)
        self.method.punica_wrapper = punica_wrapper

    def reset_lora(self, index: int) -> None:
        """Take the adapter out of a slot."""
        self.up.clear(index)
        self.down.clear(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter into a slot, its pairs cut to this rank.

        Args:
            index: the slot.
            lora_a: A of gate, down and up of all experts, (experts, rank, in) each.
            lora_b: B of them, (experts, out, rank) each, with the scaling in it.
        """
        self.reset_lora(index)
        if lora_a[0].ndim != 3:
            return  # vLLM's adapter of zeros
        share = self.method.share
        assert share is not None
        mine = slice(share.first_inner, share.first_inner + share.inner)
        up_places = (_GATE, _UP) if self.method.moe.is_act_and_mul else (_GATE,)
        for slot, number in enumerate(share.experts):
            # vLLM's backend for classes of transformers knows every expert under two names, one list after the other.
            names = range(number, len(lora_a[_DOWN]), self.method.moe.num_logical_experts)
            places = (*up_places, _DOWN)
            number = next((one for one in names if any(lora_b[place][one].any() for place in places)), number)
            pairs: list[Pair] = [(lora_a[place][number], lora_b[place][number, mine]) for place in up_places]
            self.up.place(index, slot, pairs)
            self.down.place(index, slot, [(lora_a[_DOWN][number][:, mine], lora_b[_DOWN][number])])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the mixture puts out."""
        return self.base_layer(*args, **kwargs)

    @property
    def runner(self) -> MoERunner:
        """Return vLLM's runner of the mixture."""
        return self.base_layer

    @property
    def quant_method(self) -> CloqExpertsMethod:
        """Return how the experts are computed."""
        return self.method
