"""Keep in host memory what batches hold of a device while they wait for each other inside of a block."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cloq_export.kernels.gpu import cuda
from cloq_export.process.storage_counter import tensors_in


@dataclasses.dataclass
class _Held:
    """Memory of a device that a batch has made, and its copy while it is parked."""

    storage: weakref.ref[torch.UntypedStorage]
    batch: int
    parked: torch.Tensor | None = None


class Parking(TorchDispatchMode):
    """While it is active, the memory of a batch that waits can be given up, and comes back when it is needed.

    What a batch makes is seen operation by operation. Parked, its bytes lie in page-locked host memory, and the
    storages on the device are empty: the tensors that the batch's code holds, views included, stay the same objects.
    They are filled again when the batch goes on, or when any operation reads one of them. Bytes are only moved, so
    nothing that is computed changes.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = cuda().current_device() if device.index is None else device
        self._held: dict[int, _Held] = {}
        self._of_run: dict[int, set[int]] = {}
        self._running: tuple[int, int] | None = None
        self._moving = False
        # Parked memory that was read while its batch waits.
        self._lent: set[int] = set()

    def resume(self, run: int, batch: int) -> None:
        """Bring back all that a batch holds, and watch what it makes.

        Args:
            run: number of the batch's run; another stream's run of the same batch has another.
            batch: number of the batch.
        """
        keys = self._of_run.get(run, set())
        for key in keys:
            self._fetch(self._held[key])
        self._lent -= keys
        self._running = (run, batch)

    def pause(self, run: int, *, ended: bool) -> None:
        """Park all that a batch holds, or let go of it where the batch has come to its end."""
        self._running = None
        if not ended:
            for key in self._of_run.get(run, ()):
                self._park(self._held[key])
            return
        for key in self._of_run.pop(run, set()):
            del self._held[key]

    def settle(self, batch: int | None = None) -> None:
        """Park again what was read of batches that wait, but for that of one batch."""
        for key in [key for key in self._lent if self._held[key].batch != batch]:
            self._lent.discard(key)
            self._park(self._held[key])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on memory that is there, and enter what it has made."""
        kwargs = kwargs or {}
        if self._moving:
            return func(*args, **kwargs)
        given = set()
        for tensor in tensors_in((*args, *kwargs.values())):
            if tensor.device == self._device:
                key = tensor.untyped_storage()._cdata
                given.add(key)
                if key in self._held and self._fetch(self._held[key]):
                    self._lent.add(key)
        result = func(*args, **kwargs)
        if self._running is not None:
            for made in tensors_in((result,)):
                if made.device == self._device and made.untyped_storage()._cdata not in given:
                    self._enter(made.untyped_storage(), *self._running)
        return result

    def _enter(self, storage: torch.UntypedStorage, run: int, batch: int) -> None:
        key = storage._cdata
        if key not in self._held:
            forget = functools.partial(self._forget, key)
            self._held[key] = _Held(weakref.ref(storage, forget), batch)
            self._of_run.setdefault(run, set()).add(key)

    def _forget(self, key: int, _: object) -> None:
        self._held.pop(key, None)
        self._lent.discard(key)
        for keys in self._of_run.values():
            keys.discard(key)

    def _park(self, held: _Held) -> None:
        storage = held.storage()
        if storage is None or held.parked is not None or not storage.nbytes():
            return
        with self._own_operations():
            held.parked = cuda().page_locked(storage.nbytes())
            # Read by the device alone, in the order of its queue: the host need not wait.
            held.parked.copy_(self._bytes_of(storage), non_blocking=True)
        storage.resize_(0)

    def _fetch(self, held: _Held) -> bool:
        storage = held.storage()
        if storage is None or held.parked is None:
            return False
        storage.resize_(held.parked.numel())
        with self._own_operations():
            self._bytes_of(storage).copy_(held.parked, non_blocking=True)
        held.parked = None
        return True

    def _bytes_of(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)  # type: ignore[call-overload,no-any-return]

    @contextlib.contextmanager
    def _own_operations(self) -> Iterator[None]:
        self._moving = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._moving = False
