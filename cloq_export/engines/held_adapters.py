"""Which weights of an adapter an engine holds, told by hashes; a trainer computes the same of its own.

Nothing of vLLM and PEFT is imported here, so that both sides use the same lines.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cloq_export.types import LoraPair

# One module's A (rank, in), B (out, rank), and the scaling of its product.
Factors = tuple[torch.Tensor, torch.Tensor, float]


@dataclasses.dataclass(frozen=True)
class HeldAdapter:
    """What an engine holds of an adapter.

    Args:
        dtype: in which it holds A and B, such as "float32".
        modules: name of each module -> `factors_digest` of it.
    """

    dtype: str
    modules: Mapping[str, str]

    @classmethod
    def of(cls, factors: Mapping[str, Factors], dtype: str) -> HeldAdapter:
        """Return what an engine of this dtype must hold.

        Args:
            factors: module -> A, B and scaling.
            dtype: name of a torch dtype.
        """
        return cls(dtype, {name: factors_digest(*each, getattr(torch, dtype)) for name, each in factors.items()})

    @classmethod
    def of_pairs(cls, pairs: Mapping[str, LoraPair], dtype: str) -> HeldAdapter:
        """Return what an engine of this dtype must hold of an adapter that was read from files."""
        return cls.of({module: (pair.lora_A, pair.lora_B, pair.scaling) for module, pair in pairs.items()}, dtype)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> HeldAdapter:
        """Return what an engine has answered."""
        return cls(str(content["dtype"]), dict(content["modules"]))

    def to_json(self) -> dict[str, Any]:
        """Return what an engine answers."""
        return {"dtype": self.dtype, "modules": dict(self.modules)}

    def differing(self, held: HeldAdapter) -> list[str]:
        """Return the modules whose weights the engine does not hold, by the names that they have here.

        Engines may call a module by another name, so that hashes alone are compared.

        Args:
            held: by the engine, in the same dtype.
        """
        left = collections.Counter(held.modules.values())
        missing = []
        for name, digest in self.modules.items():
            if left[digest]:
                left[digest] -= 1
            else:
                missing.append(name)
        return missing


def factors_digest(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype) -> str:
    """Return a hexadecimal SHA-256 of a pair as an engine of this dtype holds it: shapes, numbers and scaling.

    Args:
        lora_a: A, (rank, in) float.
        lora_b: B, (out, rank) float.
        scaling: alpha / rank in PEFT.
        dtype: of the engine's pairs.
    """
    digest = hashlib.sha256(f"{float(scaling)!r}".encode())
    for factor in (lora_a, lora_b):
        digest.update(f" {tuple(factor.shape)} {dtype} ".encode())
        kept = factor.detach().to(dtype).cpu().contiguous()
        digest.update(kept.view(torch.uint8).numpy().tobytes() if kept.numel() else b"")
    return digest.hexdigest()


def factors_of(modules: Iterable[tuple[str, torch.nn.Module]], adapter: str) -> dict[str, Factors]:
    """Return the pairs that PEFT's LoRA layers hold.

    Args:
        modules: names and modules of a model with LoRA layers, without the names of PEFT's own wrapper.
        adapter: PEFT's name of the adapter.
    """
    factors: dict[str, Factors] = {}
    for name, layer in modules:
        module: Any = layer
        a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(a, torch.nn.ModuleDict) and isinstance(b, torch.nn.ModuleDict) and adapter in a:
            factors[name] = (
                module.lora_A[adapter].weight,
                module.lora_B[adapter].weight,
                float(module.scaling[adapter]),
            )
    return factors
