"""The loss of next tokens, a few rows of the vocabulary at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from cloq_export.train.sequences import NOT_LEARNED

# Elements of float32 at a time: a piece and its exponentials stay in the cache.
_PIECE_ELEMENTS = 1 << 22


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = NOT_LEARNED,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the negative log-likelihood of each next token, summed and divided by how many are learned.

    It takes what transformers' `ForCausalLMLoss` takes and returns what that returns, without its copies of the logits
    in float32: softmax is computed for a few rows at a time, and the gradient is held in the logits' own precision.

    Args:
        logits: (batch, tokens, vocabulary), any floating precision.
        labels: (batch, tokens) int64; the label of a position is the token at it, and is predicted from the one before.
        vocab_size: ignored; the logits give it.
        num_items_in_batch: what the sum is divided by; None is the number of labels that count.
        ignore_index: the label that does not count.
        shift_labels: (batch, tokens) int64, the token that each position predicts; taken instead of labels.

    Returns:
        Tensor: scalar float32.
    """
    targets = pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(logits.device)
    rows = (targets != ignore_index).nonzero().squeeze(1)
    total: torch.Tensor = _SummedLoss.apply(logits.reshape(-1, logits.shape[-1]), rows, targets[rows])
    if num_items_in_batch is None:
        return total / rows.numel()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _SummedLoss(torch.autograd.Function):
    """Sum over rows r of logsumexp(z_r) - z_r[t_r]; its gradient is softmax(z_r) - onehot(t_r)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        wanted = ctx.needs_input_grad[0]
        # Rows without a label must be zeros; where all have one, none is written twice.
        gradient = None
        if wanted:
            gradient = torch.empty_like(logits) if rows.numel() == logits.shape[0] else torch.zeros_like(logits)
        size = max(1, _PIECE_ELEMENTS // logits.shape[-1])
        for own, target in zip(rows.split(size), targets.split(size), strict=True):
            values = logits[own].float()
            picked = values.gather(1, target[:, None])
            largest = values.amax(dim=1, keepdim=True)
            values.sub_(largest).exp_()
            sums = values.sum(dim=1, keepdim=True)
            total += (sums.log() + largest - picked).sum()
            if gradient is not None:
                values.div_(sums).scatter_add_(1, target[:, None], values.new_full((len(own), 1), -1.0))
                gradient[own] = values.to(gradient.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return None if gradient is None else gradient.mul_(gradients[0]), None, None
