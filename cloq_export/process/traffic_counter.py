"""Count the bytes that operations read and write, and how many operations there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cloq_export.process.storage_counter import tensors_in


class TrafficCounter(TorchDispatchMode):
    """While it is active, counts what each operation reads and writes if nothing stays in a cache between two of them.

    Meta tensors are counted as well. Attention that torch computes in one piece counts as its operands and its result:
    a GPU's kernel keeps the products of queries and keys to itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0
        self._inside = _Attention(self)
        self._apart = False

    def __enter__(self) -> TrafficCounter:
        """Begin to count."""
        self._inside.__enter__()
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *exception: Any) -> None:
        """End counting."""
        super().__exit__(*exception)
        self._inside.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it unless it only looks at a tensor in another way."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not self._apart:
            self._count((*args, *(kwargs or {}).values()), (result,))
        return result

    def attend(self, func: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run attention and count it as one operation."""
        given = tuple(args)
        self._apart = True
        try:
            result = func(*given, **kwargs)
        finally:
            self._apart = False
        self._count((*given, *kwargs.values()), (result,))
        return result

    def _count(self, given: Iterable[Any], made: Iterable[Any]) -> None:
        read = {id(each): each for each in tensors_in(given)}
        written = [each for each in tensors_in(made) if id(each) not in read]
        self.operations += 1
        self.bytes += sum(each.numel() * each.element_size() for each in (*read.values(), *written))


class _Attention(TorchFunctionMode):
    """Finds torch's own attention before it is taken apart."""

    def __init__(self, counter: TrafficCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._counter.attend(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
