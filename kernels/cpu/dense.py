"""Float linear layers whose sums have one order: a token gets the same bits whatever the others of its batch are."""

from __future__ import annotations

import torch

from cloq_export.kernels.cpu.weight import DTYPES, require_library


def dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x W^T + bias`, summed in float32 and rounded once; without gradients.

    Args:
        x: (..., in) float32, bfloat16 or float16, on the CPU.
        weight: W, (out, in), any of these dtypes.
        bias: (out) float, or None.

    Returns:
        torch.Tensor: (..., out), the dtype of x.

    Raises:
        ValueError: the tensors do not belong together.
        RuntimeError: there is no native library.
    """
    if torch.compiler.is_compiling():
        result: torch.Tensor = cpu_dense_linear_op(x, weight, bias)
        return result
    return _compute(x, weight, bias)


def _compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Check the tensors, and call the library."""
    fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[1:] and weight.shape[1] > 0
    if not fits or x.dtype not in DTYPES or weight.dtype not in DTYPES or x.device.type != "cpu":
        raise ValueError(
            f"the input is {tuple(x.shape)} {x.dtype} on {x.device} and the weight {tuple(weight.shape)} "
            f"{weight.dtype}; allowed are (..., in) and (out, in) of float32, bfloat16 or float16 on the CPU."
        )
    out_features, in_features = weight.shape
    if bias is not None:
        if bias.shape != (out_features,) or not bias.is_floating_point():
            raise ValueError(f"the bias is {tuple(bias.shape)} {bias.dtype}; this layer takes ({out_features},) float.")
        bias = bias.detach().to(torch.float32).contiguous()
    rows, weight = x.detach().to(torch.float32).contiguous(), weight.detach().contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    require_library().cloq_dense_linear(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        out_features,
        in_features,
        rows.data_ptr(),
        rows.numel() // in_features,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y.to(x.dtype)


@torch.library.custom_op(
    "cloq_export::cpu_dense_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def cpu_dense_linear_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute what `dense_linear` returns; operands as there."""
    return _compute(x, weight, bias)


@cpu_dense_linear_op.register_fake
def _cpu_dense_linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return an empty tensor of the shape and dtype that `cpu_dense_linear_op` returns."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])
