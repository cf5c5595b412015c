"""All that the package asks of CUDA besides computing: devices, memory, streams; the tests replace it."""

from __future__ import annotations

import contextlib
import warnings

import torch


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of torch says; advice for programmers follows it."""
    return str(error).strip().partition("\n")[0].rstrip(".")


class Cuda:
    """The GPUs of this machine, as torch sees them."""

    def __init__(self) -> None:
        self._limits: dict[int, int] = {}

    def _index_of(self, device: torch.device) -> int:
        return self.current_device().index if device.index is None else device.index

    def count(self) -> int:
        """Return how many there are."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def why_none(self) -> str:
        """Return why torch sees no GPU, for people."""
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                # Such as a driver that is missing, or older than what this torch is built for.
                return first_line(error)
        return "the driver shows none, or CUDA_VISIBLE_DEVICES hides them"

    def current_device(self) -> torch.device:
        """Return the one that `cuda` without a number means."""
        return torch.device("cuda", torch.cuda.current_device())

    def name(self, device: torch.device) -> str:
        """Return the name of one."""
        return torch.cuda.get_device_name(device)

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Return its compute capability."""
        return torch.cuda.get_device_capability(device)

    def processors(self, device: torch.device) -> int:
        """Return the number of its multiprocessors."""
        return int(torch.cuda.get_device_properties(device).multi_processor_count)

    def has_bfloat16(self) -> bool:
        """Return whether it multiplies bfloat16 itself, instead of going by way of float32."""
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def total_bytes(self, device: torch.device) -> int:
        """Return its memory."""
        return torch.cuda.mem_get_info(device)[1]

    def free_bytes(self, device: torch.device) -> int:
        """Return what is free of its memory, with what torch keeps of it for later tensors, up to the limit."""
        used, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free = torch.cuda.mem_get_info(device)[0] + kept - used
        limit = self._limits.get(self._index_of(device))
        return free if limit is None else max(0, min(free, limit - used))

    def limit(self, device: torch.device, most: int | None) -> None:
        """Let torch take so many bytes of its memory at most; None takes the limit away."""
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(1.0 if most is None else min(1.0, most / total), device)
        if most is None:
            self._limits.pop(self._index_of(device), None)
        else:
            self._limits[self._index_of(device)] = most

    def page_locked(self, size: int) -> torch.Tensor:
        """Return so many bytes of host memory that a GPU reads and writes by itself."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def synchronize(self, device: torch.device) -> None:
        """Wait until it has done all that it was given."""
        torch.cuda.synchronize(device)

    def release_cached(self) -> None:
        """Give back the memory that torch keeps for later tensors."""
        torch.cuda.empty_cache()

    def make_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return a new queue of work."""
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the queue that work goes to now."""
        return torch.cuda.current_stream(device)

    def on_stream(self, stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
        """Let work go to a queue for a while."""
        return torch.cuda.stream(stream)  # type: ignore[arg-type]

    def launching_on(self, tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
        """Make the device of a tensor the current one for a while, where Triton launches."""
        return torch.cuda.device_of(tensor)


_cuda = Cuda()


def cuda() -> Cuda:
    """Return the GPUs."""
    return _cuda
