"""A linear layer that computes from packed codes: `y = x Q^T + bias` with `Q = scales * (codes - zeros)`.

Everything works on the words as they lie in the file (GPTQ order, zeros stored as they are):

- `qweight` int32 `(in * bits / 32, out)`: the codes of one output channel run down a column as one dense
  little-endian bitstream, so 32 codes of 3 bits take 3 words;
- `qzeros` int32 `(groups, out * bits / 32)`: the same bitstream along a row;
- `scales` `(groups, out)`, any float dtype; groups are consecutive runs of `in / groups` input channels.

Only `BLOCK_ELEMENTS` entries of Q exist at a time, and all arithmetic is float32 whatever the activations are.
"""

from __future__ import annotations

import math

import torch

WORD_BITS = 32
BLOCK_ELEMENTS = 1 << 22


def _unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of a bitstream that runs along dimension 0, (words * 32 / bits, columns) int32."""
    count, columns = words.shape
    mask = (1 << bits) - 1
    words_per_period = math.lcm(WORD_BITS, bits) // WORD_BITS
    codes_per_period = words_per_period * WORD_BITS // bits
    periods = count // words_per_period
    grouped = words.reshape(periods, words_per_period, columns)
    starts = [code * bits for code in range(codes_per_period)]
    shifts = torch.tensor([start % WORD_BITS for start in starts], dtype=torch.int32, device=words.device)
    if words_per_period == 1:
        codes = grouped >> shifts.view(1, -1, 1)
    else:
        holders = torch.tensor([start // WORD_BITS for start in starts], device=words.device)
        codes = grouped[:, holders] >> shifts.view(1, -1, 1)
        for code, start in enumerate(starts):
            low_bits = WORD_BITS - start % WORD_BITS
            if low_bits < bits:
                # The upper bits begin the next word; shifting a signed word filled their place with its sign.
                low = codes[:, code] & ((1 << low_bits) - 1)
                codes[:, code] = low | (grouped[:, start // WORD_BITS + 1] << low_bits)
    return codes.bitwise_and_(mask).reshape(periods * codes_per_period, columns)


def unpack_codes(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of packed weights.

    Args:
        qweight: (in * bits / 32, out) int32.
        bits: width of a code.

    Returns:
        torch.Tensor: (in, out) int32 in `0..2**bits - 1`.
    """
    return _unpack_rows(qweight, bits)


def unpack_zeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the zeros of packed zeros.

    Args:
        qzeros: (groups, out * bits / 32) int32, zeros stored as they are (`gptq_v2`).
        bits: width of a zero.

    Returns:
        torch.Tensor: (groups, out) int32 in `0..2**bits - 1`.
    """
    return _unpack_rows(qzeros.t(), bits).t()


def check_packed(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int) -> int:
    """Return the number of input channels of a packed layer, after checking that its tensors belong together.

    Args:
        qweight: (in * bits / 32, out) int32.
        qzeros: (groups, out * bits / 32) int32.
        scales: (groups, out) float.
        bits: width of a code.

    Returns:
        int: in.

    Raises:
        ValueError: they do not; the message says what was seen and what is allowed.
    """
    for name, tensor, dtype in (("qweight", qweight, torch.int32), ("qzeros", qzeros, torch.int32)):
        if tensor.ndim != 2 or tensor.dtype != dtype:
            raise ValueError(f"{name} must be a matrix of {dtype}; got {tuple(tensor.shape)} {tensor.dtype}.")
    if scales.ndim != 2 or not scales.is_floating_point():
        raise ValueError(f"scales must be a matrix of floats; got {tuple(scales.shape)} {scales.dtype}.")
    in_features, rest = divmod(qweight.shape[0] * WORD_BITS, bits)
    groups, out_features = scales.shape
    if rest or qweight.shape[1] != out_features or groups == 0 or in_features % groups:
        raise ValueError(
            f"qweight {tuple(qweight.shape)} of {bits} bits and scales {tuple(scales.shape)} disagree; "
            "allowed are (in * bits / 32, out) and (groups, out) with groups dividing in."
        )
    if tuple(qzeros.shape) != (groups, out_features * bits // WORD_BITS) or out_features * bits % WORD_BITS:
        raise ValueError(
            f"qzeros is {tuple(qzeros.shape)}; allowed is (groups, out * bits / 32) = "
            f"({groups}, {out_features * bits / WORD_BITS:g}) for {out_features} outputs of {bits} bits."
        )
    return in_features


def _blocks(in_features: int, out_features: int) -> list[tuple[int, int]]:
    """Return runs of output channels whose dequantized weights hold at most `BLOCK_ELEMENTS` entries."""
    rows = max(1, BLOCK_ELEMENTS // max(1, in_features))
    return [(first, min(first + rows, out_features)) for first in range(0, out_features, rows)]


def _dequantize_block(
    qweight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, first: int, last: int
) -> torch.Tensor:
    """Return `Q[first:last]^T`, (in, last - first) float32, from (groups, out) float32 zeros."""
    groups = scales.shape[0]
    codes = unpack_codes(qweight[:, first:last], bits).to(torch.float32)
    grouped = codes.view(groups, -1, last - first)
    grouped.sub_(zeros[:, None, first:last]).mul_(scales[:, None, first:last].to(torch.float32))
    return codes


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the whole weight `Q = scales * (codes - zeros)`, computed in float32.

    Args:
        qweight: (in * bits / 32, out) int32.
        qzeros: (groups, out * bits / 32) int32.
        scales: (groups, out) float.
        bits: width of a code.

    Returns:
        torch.Tensor: Q, (out, in) float32, contiguous.

    Raises:
        ValueError: the tensors do not belong together.
    """
    in_features = check_packed(qweight, qzeros, scales, bits)
    out_features = scales.shape[1]
    zeros = unpack_zeros(qzeros, bits).to(torch.float32)
    weight = torch.empty(out_features, in_features, dtype=torch.float32, device=qweight.device)
    for first, last in _blocks(in_features, out_features):
        weight[first:last] = _dequantize_block(qweight, zeros, scales, bits, first, last).t()
    return weight


def compute_packed_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute `x Q^T + bias`; see `packed_linear`."""
    in_features = check_packed(qweight, qzeros, scales, bits)
    out_features = scales.shape[1]
    if x.shape[-1] != in_features:
        raise ValueError(f"the input has {x.shape[-1]} channels; this layer takes {in_features}.")
    zeros = unpack_zeros(qzeros, bits).to(torch.float32)
    # Autocast would turn the float32 products below into half precision.
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, in_features).to(torch.float32)
        y = torch.empty(rows.shape[0], out_features, dtype=x.dtype, device=x.device)
        for first, last in _blocks(in_features, out_features):
            block = rows @ _dequantize_block(qweight, zeros, scales, bits, first, last)
            if bias is not None:
                block += bias[first:last].to(torch.float32)
            y[:, first:last] = block
    return y.view(*x.shape[:-1], out_features)


packed_linear_op = torch.library.custom_op(
    "cloq_export::packed_linear",
    compute_packed_linear,
    mutates_args=(),
    schema="(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, int bits, Tensor? bias) -> Tensor",
)


@packed_linear_op.register_fake
def _packed_linear_shape(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `packed_linear_op` returns."""
    return x.new_empty(*x.shape[:-1], scales.shape[1])


def compute_packed_linear_input_grad(
    grad: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> torch.Tensor:
    """Compute `grad Q`, the gradient of `packed_linear` by its input, with the arithmetic of the forward pass."""
    in_features = check_packed(qweight, qzeros, scales, bits)
    out_features = scales.shape[1]
    zeros = unpack_zeros(qzeros, bits).to(torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        rows = grad.reshape(-1, out_features)
        total = torch.zeros(rows.shape[0], in_features, dtype=torch.float32, device=grad.device)
        for first, last in _blocks(in_features, out_features):
            block = _dequantize_block(qweight, zeros, scales, bits, first, last)
            total.addmm_(rows[:, first:last].to(torch.float32), block.t())
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


packed_linear_input_grad_op = torch.library.custom_op(
    "cloq_export::packed_linear_input_grad",
    compute_packed_linear_input_grad,
    mutates_args=(),
    schema="(Tensor grad, Tensor qweight, Tensor qzeros, Tensor scales, int bits) -> Tensor",
)


@packed_linear_input_grad_op.register_fake
def _packed_linear_input_grad_shape(
    grad: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `packed_linear_input_grad_op` returns."""
    return grad.new_empty(*grad.shape[:-1], qweight.shape[0] * WORD_BITS // bits)


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: torch.Tensor) -> None:
    """Keep references to the packed tensors: the activations are not needed, so none are held."""
    _, qweight, qzeros, scales, bits, bias = inputs
    ctx.save_for_backward(qweight, qzeros, scales)
    ctx.bits = bits  # type: ignore[attr-defined]
    ctx.bias_dtype = None if bias is None else bias.dtype  # type: ignore[attr-defined]


def _packed_linear_backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple:
    """Return the gradients by x and bias; codes, scales and zeros are frozen and get none."""
    qweight, qzeros, scales = ctx.saved_tensors  # type: ignore[attr-defined]
    input_grad = bias_grad = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        input_grad = packed_linear_input_grad_op(grad, qweight, qzeros, scales, ctx.bits)  # type: ignore[attr-defined]
    if ctx.needs_input_grad[5]:  # type: ignore[attr-defined]
        summed = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        bias_grad = summed.to(ctx.bias_dtype)  # type: ignore[attr-defined]
    return input_grad, None, None, None, None, bias_grad


packed_linear_op.register_autograd(_packed_linear_backward, setup_context=_keep_for_backward)


def packed_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `x Q^T + bias`, computed from packed codes in float32 and rounded once to the dtype of x.

    Differentiable by x and bias. Q exists only `BLOCK_ELEMENTS` entries at a time, in both directions.

    Args:
        x: (..., in) float32, bfloat16 or float16.
        qweight: (in * bits / 32, out) int32.
        qzeros: (groups, out * bits / 32) int32, zeros stored as they are.
        scales: (groups, out) float.
        bits: width of a code.
        bias: (out) float, or None.

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together.
    """
    return packed_linear_op(x, qweight, qzeros, scales, bits, bias)
