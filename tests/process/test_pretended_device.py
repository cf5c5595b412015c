"""The pretended GPUs hold to the rules of real ones: what a test on them passes must not fail on a device for these."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils._device
from pretended_device import PretendedGpus, pretended_gpus
from torch import nn
from transformers.initialization import meta_device_safe_creation_ops

import cloq_export
from cloq_export.kernels.gpu import cuda

CUDA0, CUDA1 = torch.device("cuda", 0), torch.device("cuda", 1)
# Programs that run in environments of their own, without this package.
ALONE = {"engines/vllm/facts.py", "lab/peer_workers/autoround.py"}


@pytest.fixture
def gpus() -> Iterator[PretendedGpus]:
    with pretended_gpus(2, total=1 << 20) as pretended:
        yield pretended


def test_tensors_lie_where_they_are_made_and_moved(gpus: PretendedGpus) -> None:
    made = torch.ones(3, device="cuda:1")
    assert (made.device, (made + 1).device, made[1:].device, made.cpu().device) == (
        CUDA1,
        CUDA1,
        CUDA1,
        torch.device("cpu"),
    )
    assert torch.zeros_like(made).device == made.new_empty(2).device == made.to(torch.float64).device == CUDA1
    assert (
        torch.ones(3).to("cuda").device
        == torch.ones(3).cuda().device
        == torch.ones(3).to(made[:2].to(CUDA0)).device
        == CUDA0
    )
    assert torch.randn(2, device="cuda:1").is_cuda
    assert not made.is_cpu
    layer = nn.Linear(4, 2).to(CUDA1)
    assert {parameter.device for parameter in layer.parameters()} == {CUDA1}
    layer.weight.data = torch.zeros(2, 4)
    assert layer.weight.device == torch.device("cpu")
    assert cuda().count() == torch.cuda.device_count() == 2


def test_makers_inside_a_device_context_are_found_now_and_afterwards() -> None:
    torch.utils._device._device_constructors.cache_clear()
    with pretended_gpus(), torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"


def test_makers_follow_whatever_torch_listed_before() -> None:
    listing = torch.utils._device._device_constructors
    listing.cache_clear()
    # On its first call torch keeps the list for good, here with transformers' function in the place of its own.
    with meta_device_safe_creation_ops():
        listing()
    try:
        with pretended_gpus():
            assert torch.linspace(0, 1, 3, device="cuda").device.type == "cuda"
    finally:
        listing.cache_clear()


def test_devices_do_not_mix(gpus: PretendedGpus) -> None:
    here, there, host = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1"), torch.ones(3)
    for other in (there, host):
        with pytest.raises(RuntimeError, match="same device, but found at least two devices"):
            here + other
        with pytest.raises(RuntimeError, match="same device"):
            here @ other
    assert (here * torch.tensor(2.0)).tolist() == [2.0] * 3
    assert (here.copy_(host) + here).device == CUDA0
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        host[torch.tensor([0], device="cuda")]
    with pytest.raises(TypeError, match=r"use Tensor\.cpu\(\)|Use Tensor\.cpu\(\)"):
        here.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="generator"):
        here.normal_(generator=torch.Generator())
    assert torch.randn(2, device="cuda", generator=torch.Generator("cuda")).device == CUDA0
    with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
        torch.ones(1, device="cuda:2")


def test_gradients_go_the_way_back(gpus: PretendedGpus) -> None:
    leaf = torch.ones(3, requires_grad=True)
    far = (leaf * 2).to("cuda:1")
    (far * far).sum().to("cuda:0").backward()
    assert leaf.grad is not None
    assert leaf.grad.device == torch.device("cpu")
    assert leaf.grad.tolist() == [8.0] * 3


def test_what_the_host_waits_for_is_counted(gpus: PretendedGpus) -> None:
    here = torch.ones(3, device="cuda")
    _ = here.sum() * 2
    assert not gpus.waits
    here.sum().item()
    bool(here[0])
    here.tolist()
    here.nonzero()
    here[here > 0]
    here.to("cpu")
    here[[0, 1]]
    torch.ones(3).to("cuda")
    kinds = {kind: count for (kind, _), count in gpus.waits.items()}
    assert kinds == {
        "_local_scalar_dense": 2,
        "copy to the host": 2,
        "nonzero": 1,
        "index by a mask or by indices of the host": 2,
        "copy from the host": 1,
    }
    assert torch.ones(3).sum().item() == 3.0
    assert sum(gpus.waits.values()) == 8


def test_copies_that_do_not_block_need_page_locked_memory(gpus: PretendedGpus) -> None:
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    pinned.to("cuda", non_blocking=True)
    assert not gpus.faults
    torch.ones(3).to("cuda", non_blocking=True)
    torch.ones(3, device="cuda").copy_(torch.ones(3), non_blocking=True)
    torch.ones(3, device="cuda").to("cpu", non_blocking=True)
    assert ["page-locked" in fault for fault in gpus.faults] == [True, True, False]


def test_what_another_stream_writes_is_waited_for(gpus: PretendedGpus) -> None:
    stream = cuda().make_stream(CUDA0)
    with cuda().on_stream(stream):
        copied = torch.ones(3).to("cuda")
    with pytest.raises(RuntimeError, match="has not waited for it"):
        copied + 1
    cuda().current_stream(CUDA0).wait_stream(stream)
    assert (copied + 1).tolist() == [2.0] * 3


def test_memory_is_counted_by_storage(gpus: PretendedGpus) -> None:
    held = torch.ones(1000, device="cuda")
    view = held[10:]
    assert gpus.in_use[0] == 4000
    held.add(1)
    assert (gpus.in_use[0], gpus.peak[0]) == (4000, 8000)
    del held
    assert gpus.in_use[0] == 4000
    del view
    assert gpus.in_use[0] == 0
    assert cuda().free_bytes(CUDA0) == 1 << 20
    with pytest.raises(torch.OutOfMemoryError, match="1048576 are free"):
        torch.empty(1 << 20, device="cuda")


def test_all_of_the_package_asks_through_the_seam() -> None:
    # A checkout has kernels/ and formats/ beside the package, an installation has them in it.
    parts = {"": cloq_export, "kernels/": cloq_export.kernels, "formats/": cloq_export.formats}
    homes = {name: Path(str(part.__file__)).parent for name, part in parts.items()}
    asked = set()
    for path, name in [
        (Path(folder) / file, f"{part}{(Path(folder) / file).relative_to(home).as_posix()}")
        for part, home in homes.items()
        for folder, _, files in os.walk(home, followlinks=True)
        for file in files
    ]:
        if path.suffix != ".py" or name.startswith("engines/vllm/plugin/"):
            continue  # where vLLM has chosen the device
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
                asked.add(name)
    assert asked - ALONE == {"kernels/gpu.py"}
