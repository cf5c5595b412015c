"""What identifies a LoRA pair: its bytes, and its product in any form in which it is served."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from cloq_export.files.tensor_writer import tensor_bytes
from cloq_export.types import LoraPair

_SKETCHES = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class PairRecord:
    """What identifies one LoRA pair, and its product in any form in which it is served.

    With `P = (alpha / rank) B A`, the sketch is `u_k^T P v_k` for fixed vectors of signs u_k and v_k: a difference E of
    the product changes each by about `||E||_F`, and nothing that leaves the product alone changes any.

    Args:
        sha256: of A, B and the scaling, hexadecimal.
        rank: of the pair.
        scaling: alpha / rank.
        norm: `||P||_F`.
        sketch: `u_k^T P v_k`, k = 1..8.
    """

    sha256: str
    rank: int
    scaling: float
    norm: float
    sketch: tuple[float, ...]

    @classmethod
    def of(cls, module: str, pair: LoraPair) -> PairRecord:
        """Return the record of a pair.

        Args:
            module: its full module name, which the vectors of signs come from.
            pair: A (rank, in) and B (out, rank).
        """
        left, right = pair.lora_B.double(), pair.lora_A.double() * pair.scaling
        squared = float(((left.T @ left) * (right @ right.T)).sum())
        sketch = [
            float((_signs(module, "out", k, left.shape[0]) @ left) @ (right @ _signs(module, "in", k, right.shape[1])))
            for k in range(_SKETCHES)
        ]
        norm = math.sqrt(max(0.0, squared))
        return cls(pair_digest(pair), pair.rank, pair.scaling, _rounded(norm), tuple(map(_rounded, sketch)))

    def deviation(self, other: PairRecord) -> float:
        """Return how far another product is from this one: about `||P - P_other||_F / ||P||_F`, up to a factor of 2."""
        furthest = max(abs(a - b) for a, b in zip(self.sketch, other.sketch, strict=True))
        if self.norm == 0:
            return 0.0 if other.norm == 0 else math.inf
        return max(furthest, abs(self.norm - other.norm)) / self.norm

    def ratio(self, other: PairRecord) -> float | None:
        """Return the factor by which another product is this one times a number; None if it is something else."""
        if self.norm == 0 or other.norm == 0:
            return None
        for factor in (other.norm / self.norm, -other.norm / self.norm):
            scaled = max(abs(factor * a - b) for a, b in zip(self.sketch, other.sketch, strict=True))
            if scaled <= 1e-3 * other.norm:
                return factor
        return None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> PairRecord:
        """Return the record that a JSON object holds.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        if _SHA256.fullmatch(entry["sha256"]) is None or len(entry["sketch"]) != _SKETCHES:
            raise ValueError
        rank, scaling, norm = int(entry["rank"]), float(entry["scaling"]), float(entry["norm"])
        return cls(entry["sha256"], rank, scaling, norm, tuple(map(float, entry["sketch"])))


def pair_digest(pair: LoraPair) -> str:
    """Return the hexadecimal SHA-256 of a pair: dtype, shapes, A, B row by row as little-endian bytes, and scaling."""
    head = [str(pair.lora_A.dtype), list(pair.lora_A.shape), list(pair.lora_B.shape), repr(float(pair.scaling))]
    digest = hashlib.sha256(json.dumps(head).encode("ascii"))
    for factor in (pair.lora_A, pair.lora_B):
        digest.update(tensor_bytes(factor))
    return digest.hexdigest()


def pairs_digest(digests: Mapping[str, str]) -> str:
    """Return one hash over the digests of an adapter's pairs, in sorted order of module names."""
    total = hashlib.sha256()
    for module in sorted(digests):
        total.update(f"{module}\0{digests[module]}\n".encode())
    return total.hexdigest()


def record_pairs(pairs: Mapping[str, LoraPair]) -> dict[str, PairRecord]:
    """Return module -> record of an adapter's pairs, sorted."""
    return {module: PairRecord.of(module, pairs[module]) for module in sorted(pairs)}


def _signs(module: str, side: str, number: int, count: int) -> torch.Tensor:
    """Return a vector of +1 and -1, (count,) float64: the bits of a hash, so the same on every machine."""
    raw = hashlib.shake_256(f"{module}\0{side}\0{number}".encode()).digest(-(-count // 8))
    octets = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:count].double() * 2 - 1


def _rounded(value: float) -> float:
    # The last digits of a sum depend on how many threads make it; the record must not.
    return float(f"{value:.9g}")
