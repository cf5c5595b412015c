"""Read safetensors files that are not trusted."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import MAX_JSON_BYTES, parse_json
from cloq_export.files.tensor_writer import DTYPES, tensor_bytes

# Of a tensor, in characters; names of real models stay far below.
MAX_NAME = 512
_ALIGNMENT = 64


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read every tensor of a safetensors file, and the text of its header.

    Header size, offsets, overlaps and holes are checked before any tensor is made, so a file that claims more than it
    holds costs no memory.

    Args:
        path: the file.

    Returns:
        (tensors, metadata), tensors on the CPU.

    Raises:
        FormatError: the file is missing, unreadable, truncated, or not safetensors.
    """
    file = TensorFile(path)
    return {name: file.read(name) for name in file.headers}, file.metadata


def read_safetensors_header(
    path: str | os.PathLike[str],
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Check a safetensors file and return what its header says, without reading a tensor.

    Args:
        path: the file.

    Returns:
        (name -> (dtype code of safetensors, shape), metadata).

    Raises:
        FormatError: the file is missing, unreadable, truncated, or not safetensors.
    """
    file = TensorFile(path)
    return file.headers, file.metadata


class TensorFile:
    """A safetensors file whose tensors are read one at a time, in any order.

    Nothing is mapped into memory: what was read is gone when the tensor is, so a file of any size can be walked through
    in the memory of its largest tensor.

    Args:
        path: the file.

    Raises:
        FormatError: the file is missing, unreadable, truncated, or not safetensors, or a tensor's name is none that a
            program would give.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        with _refusals(self.path):
            with open(self.path, "rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                if length > MAX_JSON_BYTES:
                    raise ValueError(f"its header claims {length} bytes")
                # The library checks header size, offsets, overlaps and holes; only then are the offsets believed.
                with safe_open(self.path, framework="pt", device="cpu") as file:
                    for name in file.keys():  # noqa: SIM118
                        piece = file.get_slice(name)
                        self.headers[name] = piece.get_dtype(), tuple(piece.get_shape())
                    self.metadata: dict[str, str] = dict(file.metadata() or {})
                content = parse_json(raw.read(length), str(self.path))
            self._places: dict[str, tuple[int, int]] = {}
            for name, (_, shape) in self.headers.items():
                # Messages name tensors, and a name that runs over lines or screens would hide what they say.
                if not name.isprintable() or len(name) > MAX_NAME:
                    raise ValueError(f"it holds a tensor of the name {name[:40]!r} with {len(name)} characters")
                begin, end = content[name]["data_offsets"]
                if tuple(content[name]["shape"]) != shape:
                    raise ValueError(f"two headers for {name}")
                self._places[name] = 8 + length + begin, end - begin

    def paths(self, name: str) -> tuple[Path, ...]:
        """Return the files that one tensor is read from."""
        return (self.path,)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU.

        Raises:
            FormatError: the file changed since it was opened, or holds a dtype that torch has not.
        """
        place, _ = self._places[name]
        return self._read(name, place, self.headers[name][1])

    def read_as_mapped(
        self, name: str, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Return one tensor at an address that lies between multiples of 64 as if the file were mapped into memory.

        Products of a few rows may be summed in another order where a matrix lies otherwise: so a model that is read
        tensor by tensor computes what it does where transformers maps its files. Its memory goes back to the system
        with the tensor, where the allocator would keep it, and in pieces that the next tensor does not fit into.

        Args:
            name: the tensor.
            dtype: what it is converted to, and then lies at a multiple of 64; None leaves it as it is.
            rows: the first that is read, and the one behind the last; None reads all.

        Raises:
            FormatError: as `read`.
        """
        place, size = self._places[name]
        code, shape = self.headers[name]
        if rows is not None:
            place += rows[0] * (size // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        stored = DTYPES.get(code)
        # Numbers that lie across their own boundaries cannot be a tensor, wherever the file is mapped.
        skipped = place % _ALIGNMENT if stored is not None and place % stored.itemsize == 0 else 0
        tensor = self._read(name, place, shape, functools.partial(_memory_of_its_own, skipped=skipped))
        if dtype is None or dtype == tensor.dtype:
            return tensor
        return _memory_of_its_own(shape, dtype).copy_(tensor)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return some rows of one tensor without reading the others, on the CPU.

        Args:
            name: a tensor of one dimension or more.
            start: the first row.
            stop: behind the last row; both are cut to the rows that there are.

        Raises:
            FormatError: the file changed since it was opened, or the tensor is a single number, or of a dtype that
                torch has not.
        """
        shape = self.headers[name][1]
        if not shape:
            raise FormatError(f"{self.path}: {name} is a single number and has no rows.")
        start = max(0, min(start, shape[0]))
        stop = max(start, min(stop, shape[0]))
        place, size = self._places[name]
        row = size // shape[0] if shape[0] else 0
        return self._read(name, place + start * row, (stop - start, *shape[1:]))

    def _read(
        self, name: str, place: int, shape: tuple[int, ...], memory: Callable[..., torch.Tensor] = torch.empty
    ) -> torch.Tensor:
        code = self.headers[name][0]
        dtype = DTYPES.get(code)
        if dtype is None:
            raise FormatError(f"{self.path}: {name} is {code}, which is not read.")
        with _refusals(self.path), open(self.path, "rb", buffering=0) as file:
            # Inside the block: torch may refuse the shape of a tensor without bytes, such as (0, 2**70).
            tensor = memory(shape, dtype=dtype)
            file.seek(place)
            view = tensor_bytes(tensor)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError("it ends before its last tensor")
                done += count
        return tensor


def _memory_of_its_own(shape: tuple[int, ...], dtype: torch.dtype, skipped: int = 0) -> torch.Tensor:
    """Return a tensor in a mapping that nothing else shares, some bytes behind its start."""
    count = math.prod(shape) * dtype.itemsize
    # An empty mapping is refused by every system. A private mapping of no file is anonymous memory.
    mapping = mmap.mmap(-1, max(1, skipped + count), access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapping, dtype=torch.uint8)[skipped : skipped + count].view(dtype).view(shape)


def require_tensor(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    *,
    source: str,
    dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    ndim: int | None = None,
) -> torch.Tensor:
    """Return a tensor of a file after checking what the layout promises about it.

    Args:
        tensors: what was read.
        name: the tensor wanted.
        source: the file or layer, for the message.
        dtype: the only dtype allowed; None allows any.
        shape: the only shape allowed; None allows any.
        ndim: the only number of dimensions allowed; None allows any.

    Returns:
        The tensor.

    Raises:
        FormatError: the tensor is missing or differs from what is promised.
    """
    tensor = tensors.get(name)
    if tensor is None:
        held = ", ".join(sorted(tensors)[:8]) or "none"
        raise FormatError(f"{source} lacks the tensor {name!r}; it holds {held}.")
    if dtype is not None and tensor.dtype != dtype:
        raise FormatError(f"{source}: {name} is {tensor.dtype}; expected {dtype}.")
    if ndim is not None and tensor.ndim != ndim:
        raise FormatError(f"{source}: {name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions.")
    if shape is not None and tuple(tensor.shape) != shape:
        raise FormatError(f"{source}: {name} has shape {tuple(tensor.shape)}; expected {shape}.")
    return tensor


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    if path.exists() and not path.is_file():
        # Opening a pipe could wait forever.
        what = "a folder" if path.is_dir() else "no ordinary file"
        raise FormatError(f"{path} is {what}; expected a safetensors file.")
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    except (SafetensorError, ValueError, RuntimeError, OverflowError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error!s:.200}" or type(error).__name__
        reason = reason if reason.isprintable() else repr(reason)
        raise FormatError(
            f"{path} is truncated or not a safetensors file ({reason}); fetch or write it again."
        ) from None
