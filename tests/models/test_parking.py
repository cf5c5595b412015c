"""What a batch holds on a GPU goes to host memory while it waits, and is what it was when it comes back."""

from __future__ import annotations

import torch
from pretended_device import pretended_gpus

from cloq_export.models.parking import Parking

DEVICE = torch.device("cuda")


def test_memory_is_given_up_and_comes_back_with_its_views() -> None:
    numbers = torch.arange(12.0).view(3, 4)
    with pretended_gpus() as gpus:
        weight = torch.ones(4, 4).to(DEVICE)
        before = gpus.in_use[0]
        with Parking(DEVICE) as parking:
            parking.resume(run=7, batch=0)
            held = numbers.to(DEVICE)
            transposed, row = held.t(), held[1]
            product = held @ weight
            parking.pause(run=7, ended=False)
            assert gpus.in_use[0] == before
            assert product.shape == (3, 4)
            parking.resume(run=7, batch=0)
            assert gpus.in_use[0] == before + 2 * numbers.nbytes
            assert torch.equal(transposed.t().cpu(), numbers)
            assert torch.equal(row.cpu(), numbers[1])
            assert torch.equal(product.cpu(), numbers @ torch.ones(4, 4))
            parking.pause(run=7, ended=True)
        # What came to its end is its taker's, and is there.
        assert torch.equal(product.cpu(), numbers @ torch.ones(4, 4))
        assert not gpus.faults


def test_what_is_read_while_its_batch_waits_is_lent_until_another_is_asked_for() -> None:
    with pretended_gpus() as gpus:
        before = gpus.in_use[0]
        with Parking(DEVICE) as parking:
            held = []
            for batch in range(3):
                parking.resume(run=batch, batch=batch)
                held.append(torch.full((64,), float(batch), device=DEVICE))
                parking.pause(run=batch, ended=False)
            size = held[0].nbytes
            assert gpus.in_use[0] == before
            for batch, tensor in enumerate(held):
                parking.settle(batch)
                assert float(tensor.sum()) == 64.0 * batch
                assert gpus.in_use[0] == before + size
            parking.settle()
            assert gpus.in_use[0] == before
            del held[1], tensor
            parking.resume(run=1, batch=1)
            assert gpus.in_use[0] == before
            parking.pause(run=1, ended=True)
            # A run that is not at its end reads what another holds.
            parking.resume(run=0, batch=0)
            assert torch.equal((held[0] + held[1]).cpu(), torch.full((64,), 2.0))


def test_a_copy_of_the_host_is_left_where_it_is() -> None:
    with pretended_gpus() as gpus, Parking(DEVICE) as parking:
        parking.resume(run=0, batch=0)
        here, there = torch.ones(4), torch.ones(4, device=DEVICE)
        parking.pause(run=0, ended=False)
        assert here.untyped_storage().nbytes() == 16
        assert there.untyped_storage().nbytes() == 0
        assert gpus.in_use[0] == 0
        assert float((there + 1).sum()) == 8.0
