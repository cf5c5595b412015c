"""What the stages hand to each other: one frozen dataclass per arrow of the pipeline, checked on creation.

Shapes follow `torch.nn.Linear`: a weight W is `(out, in)`, groups run along `in`, adapters are A `(rank, in)` and
B `(out, rank)`, and the served weight is `W' = Q + (alpha / rank) * B @ A` with `Q = scales * (codes - zeros)`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from cloq_export.errors import NonFiniteError, RecipeError, ShapeError

SUPPORTED_BITS = (2, 3, 4, 8)
PER_CHANNEL = -1

Split = Literal["paper", "balanced", "transposed"]


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one linear layer.

    Args:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: input channels that share a scale and a zero; -1 means one group per output channel.
        symmetric: True pins every zero to `2**(bits - 1)`; False lets each group choose its own.

    Raises:
        RecipeError: bits or group_size is not allowed.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise RecipeError(f"bits is {self.bits}; allowed are 2, 3, 4 and 8. Choose one with `bits`.")
        if self.group_size != PER_CHANNEL and (self.group_size < 8 or self.group_size % 8):
            raise RecipeError(
                f"group size is {self.group_size}; allowed are -1 (one group per output channel) or a multiple of 8, "
                "usually 32, 64 or 128. Choose one with `group_size`."
            )

    @property
    def max_code(self) -> int:
        """Return the largest code, `2**bits - 1`."""
        return 2**self.bits - 1

    def columns_per_group(self, in_features: int) -> int:
        """Return how many input channels one group spans in a layer of `in_features` inputs."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def group_count(self, in_features: int) -> int:
        """Return the number of groups along the input of a layer.

        Raises:
            ShapeError: in_features is not divisible by the group size.
        """
        span = self.columns_per_group(in_features)
        if in_features % span:
            raise ShapeError(
                f"a layer with {in_features} inputs cannot be cut into groups of {span}; choose a group size that "
                f"divides {in_features}, or --group-size -1 for one group per output channel."
            )
        return in_features // span


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Second-order statistics of the inputs of one linear layer, the only thing calibration leaves behind.

    `gram` is `H = sum_t w_t * x_t x_t^T` over calibration tokens (CLoQ section 3, H = X^T X), with token weights
    `w_t` that are 1 unless weighting is asked for. In the error-aware mode x is the input that the layer meets behind
    the already compressed prefix, and `drift` is `D = sum_t w_t * x_t (f_t - x_t)^T` with f the same token's input in
    the float model; in the independent mode `drift` is None. D is summed as such, and not as the difference of two
    large sums, because it is small compared to H. It may be summed over part of the tokens only; `drift_gram` is H over
    that part.

    Args:
        gram: H, (in, in) float32 or float64, symmetric.
        tokens: number of tokens that were summed.
        drift: D, (in, in), same dtype, or None.
        drift_gram: H over the tokens of D, (in, in), same dtype; None together with `drift`.
        lent_tokens: of an expert that saw too few: how many tokens the block's count for that `gram` sums besides
            its own; they are not among `tokens`.

    Raises:
        ShapeError: gram is not square, drift has another shape, or only one of drift and drift_gram is given.
        NonFiniteError: a matrix holds NaN or Inf.
    """

    gram: torch.Tensor
    tokens: int
    drift: torch.Tensor | None = None
    drift_gram: torch.Tensor | None = None
    lent_tokens: int = 0

    def __post_init__(self) -> None:
        if self.gram.ndim != 2 or self.gram.shape[0] != self.gram.shape[1]:
            raise ShapeError(f"a Gram matrix is square; this one has shape {tuple(self.gram.shape)}.")
        if (self.drift is None) != (self.drift_gram is None):
            raise ShapeError("the drift and the Gram matrix of its tokens belong together; give both or neither.")
        for matrix in (self.drift, self.drift_gram):
            if matrix is not None and matrix.shape != self.gram.shape:
                raise ShapeError(
                    f"the drift has shape {tuple(matrix.shape)}, the Gram {tuple(self.gram.shape)}; "
                    "both must be collected from the same layer."
                )
        for name, matrix in (("Gram", self.gram), ("drift", self.drift), ("drift's Gram", self.drift_gram)):
            if matrix is not None and not bool(torch.isfinite(matrix).all()):
                raise NonFiniteError(
                    f"the {name} matrix holds NaN or Inf: the model overflows on the calibration text. "
                    "Run it in float32, or check the model's weights."
                )

    @property
    def in_features(self) -> int:
        """Return the number of input channels."""
        return self.gram.shape[0]

    def to(self, device: torch.device) -> LayerStats:
        """Return the statistics with their matrices on a device, themselves if they are there."""
        if self.gram.device == device:
            return self
        gram = self.gram.to(device)
        if self.drift is None or self.drift_gram is None:
            return dataclasses.replace(self, gram=gram)
        # Where both are one matrix they stay one: its factorisation is then shared.
        drift_gram = gram if self.drift_gram is self.gram else self.drift_gram.to(device)
        return dataclasses.replace(self, gram=gram, drift=self.drift.to(device), drift_gram=drift_gram)


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """The canonical integer form of one linear layer: `Q = scales * (codes - zeros)`.

    Scales are held in float16 because that is what the layouts store: the weight that is calibrated against is then
    the weight that is served, bit for bit.

    Args:
        codes: (out, in) uint8 in `0..2**bits - 1`.
        scales: (out, groups) float16, finite and positive.
        zeros: (out, groups) uint8 in `0..2**bits - 1`.
        spec: the grid.

    Raises:
        ShapeError: shapes or dtypes disagree with each other or with the spec.
        NonFiniteError: a scale is NaN, Inf, zero or negative.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    spec: QuantSpec

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise ShapeError(f"codes must be (out, in) uint8; got {tuple(self.codes.shape)} {self.codes.dtype}.")
        expected = (self.codes.shape[0], self.spec.group_count(self.codes.shape[1]))
        for name, tensor, dtype in (("scales", self.scales, torch.float16), ("zeros", self.zeros, torch.uint8)):
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise ShapeError(
                    f"{name} must be {expected} {dtype} for codes {tuple(self.codes.shape)} at group size "
                    f"{self.spec.group_size}; got {tuple(tensor.shape)} {tensor.dtype}."
                )
        if not bool((torch.isfinite(self.scales) & (self.scales > 0)).all()):
            raise NonFiniteError("a scale is NaN, Inf, zero or negative; every scale must be a positive number.")
        for name, tensor in (("code", self.codes), ("zero", self.zeros)):
            if tensor.numel() and int(tensor.max()) > self.spec.max_code:
                raise ShapeError(
                    f"the largest {name} is {int(tensor.max())}; {self.spec.bits} bits hold 0..{self.spec.max_code}."
                )

    @property
    def out_features(self) -> int:
        """Return the number of output channels."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Return the number of input channels."""
        return self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return Q, (out, in): computed in float32 as `scales * (codes - zeros)`, then cast to `dtype`."""
        groups = self.scales.shape[1]
        codes = self.codes.view(self.out_features, groups, -1).to(torch.float32)
        centred = codes - self.zeros.to(torch.float32).unsqueeze(-1)
        weight = centred * self.scales.to(torch.float32).unsqueeze(-1)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def to(self, device: torch.device) -> QuantizedLayer:
        """Return the layer with its tensors on a device, itself if they are there."""
        if self.codes.device == device:
            return self
        return QuantizedLayer(self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.spec)

    @property
    def stored_bits(self) -> int:
        """Return the bits that codes, float16 scales and zeros take when packed without padding."""
        return self.codes.numel() * self.spec.bits + self.scales.numel() * (16 + self.spec.bits)


@dataclasses.dataclass(frozen=True)
class LoraPair:
    """A LoRA pair in PEFT's convention: the layer serves `Q + (alpha / rank) * lora_B @ lora_A`.

    Args:
        lora_A: (rank, in), any float dtype.
        lora_B: (out, rank), same dtype.
        alpha: LoRA alpha; equal to the rank means scaling 1.

    Raises:
        ShapeError: the ranks of A and B differ, or the dtypes do.
        NonFiniteError: an entry is NaN or Inf.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.lora_A.ndim != 2 or self.lora_B.ndim != 2 or self.lora_A.shape[0] != self.lora_B.shape[1]:
            raise ShapeError(
                f"a LoRA pair is A (rank, in) and B (out, rank); got {tuple(self.lora_A.shape)} and "
                f"{tuple(self.lora_B.shape)}."
            )
        if self.lora_A.dtype != self.lora_B.dtype:
            raise ShapeError(f"A is {self.lora_A.dtype} and B is {self.lora_B.dtype}; both must have one dtype.")
        for name, tensor in (("A", self.lora_A), ("B", self.lora_B)):
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"LoRA {name} holds NaN or Inf in {tensor.dtype}; store the adapter in float32 "
                    "(--adapter-dtype float32)."
                )

    @property
    def rank(self) -> int:
        """Return the rank of the pair."""
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        """Return `alpha / rank`, the factor in front of `B @ A`."""
        return self.alpha / self.rank

    def to(self, device: torch.device) -> LoraPair:
        """Return the pair with its tensors on a device, itself if they are there."""
        if self.lora_A.device == device:
            return self
        return LoraPair(self.lora_A.to(device), self.lora_B.to(device), self.alpha)

    def product(self) -> torch.Tensor:
        """Return `(alpha / rank) * B @ A`, (out, in) float32."""
        return (self.lora_B.to(torch.float32) @ self.lora_A.to(torch.float32)) * self.scaling


@dataclasses.dataclass(frozen=True)
class LayerCertificate:
    """How well one compressed layer stands in for its float original, as numbers anyone can recompute.

    Errors are Frobenius norms under the damped Gram, `||E R^T||` with `R^T R = H + damping * I`, relative to
    `||W R^T||`; they are measured against the original weight W (never MagR's) or, in the error-aware mode, against
    the target that `target` names.

    Args:
        module: full module name.
        method: how the codes were made, e.g. "optq", or "rtn (no calibration token reached this layer)".
        bits: width of a code.
        group_size: as in QuantSpec.
        rank: rank of the adapter, 0 without one.
        tokens: calibration tokens that reached the layer.
        damping: what was added to the diagonal of H.
        damping_increases: how many times damping had to be raised before H factorised; 0 is normal.
        error_quantized: relative error of Q alone.
        error_adapted: relative error of Q + BA as stored (after casting to the adapter's dtype).
        error_bound: the Eckart-Young lower bound for this Q and rank; error_adapted cannot be below it.
        condition: condition number of the damped H.
        effective_rank: participation ratio of H's eigenvalues (undamped), `tr(H)^2 / ||H||_F^2`, between 1 and `in`.
        dead_columns: input channels that were zero on every calibration token.
        spectral_error_adapted: as error_adapted in the spectral norm, relative to that of W; None in files of before.
        target: what the errors are measured against: the float weight, or the moved target of the error-aware mode.
        notes: everything that did not go the ordinary way, e.g. a fallback, in plain words.
        refined_error_before: of a refined layer, the error of its block (of itself, where layers are refined alone; of
            the model, in nats per token, where all are together, and the errors above are then those of the start) on
            held-out windows at the start of the refinement; None without refinement, or where it is NaN or Inf.
        refined_error_after: the same error of what was kept.
        refined_step: the step that was kept, 0 for the start.
        low_rank_round: where A and B were taken out of the weight before its codes were made (low rank first), the
            round that was kept, 0 for codes of the weight itself; None if that was not asked for.
        needs_adapter: the codes were made for what A and B leave of the weight, so Q alone says nothing.
    """

    module: str
    method: str
    bits: int
    group_size: int
    rank: int
    tokens: int
    damping: float
    damping_increases: int
    error_quantized: float
    error_adapted: float
    error_bound: float
    condition: float
    effective_rank: float
    dead_columns: int
    spectral_error_adapted: float | None = None
    target: str = "float weight"
    notes: tuple[str, ...] = ()
    refined_error_before: float | None = None
    refined_error_after: float | None = None
    refined_step: int | None = None
    low_rank_round: int | None = None
    needs_adapter: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object; those on codes that need their adapter stand there only where they do."""
        content = dataclasses.asdict(self)
        if self.low_rank_round is None:
            del content["low_rank_round"]
        if not self.needs_adapter:
            del content["needs_adapter"]
        return content


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Args:
        perplexity: exp of the mean negative log-likelihood per predicted token, in nats.
        standard_error: of the perplexity, by the delta method over windows (windows are independent pieces of text).
        tokens: number of predicted tokens.
    """

    perplexity: float
    standard_error: float
    tokens: int
