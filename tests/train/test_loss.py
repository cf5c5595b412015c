"""The loss in pieces is the loss of transformers, with its gradient."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from cloq_export.train import loss as module
from cloq_export.train.loss import next_token_loss
from cloq_export.train.sequences import NOT_LEARNED


def _inputs(dtype: torch.dtype, *, ignored: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 11, 37, generator=generator)
    labels = torch.randint(37, (3, 11), generator=generator)
    if ignored:
        labels[0, :6] = NOT_LEARNED
        labels[2] = NOT_LEARNED
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("items", [None, 50, torch.tensor(7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_loss_of_transformers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, items: torch.Tensor | int | None, *, ignored: bool
) -> None:
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", 4 * 37)  # pieces of four rows, and a last one of fewer
    logits, labels = _inputs(dtype, ignored=ignored)
    theirs, ours = logits.detach().clone().requires_grad_(), logits
    expected = ForCausalLMLoss(theirs, labels, 37, num_items_in_batch=items)
    found = next_token_loss(ours, labels, 37, num_items_in_batch=items)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (5 * expected).backward()
    (5 * found).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    close = {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 2**-6, "atol": 1e-6}
    torch.testing.assert_close(ours.grad, theirs.grad, **close)


def test_shifted_labels_are_taken_as_they_are() -> None:
    logits, labels = _inputs(torch.float32, ignored=True)
    found = next_token_loss(logits, labels, shift_labels=labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NOT_LEARNED)
    torch.testing.assert_close(found, expected)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, 0.0], [0.0, -1e4]]], requires_grad=True)
    found = next_token_loss(logits, torch.tensor([[0, 1]]))
    found.backward()
    assert found.item() == 1e4
    assert logits.grad is not None
    assert torch.equal(logits.grad[0, 0], torch.tensor([1.0, -1.0]))


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    logits, labels = _inputs(torch.float32, ignored=False)
    found = next_token_loss(logits.detach(), labels)
    assert not found.requires_grad
