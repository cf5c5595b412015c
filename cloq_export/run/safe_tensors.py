"""Reading safetensors files that nobody vouches for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cloq_export.errors import FormatError


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read every tensor of a safetensors file, and the text of its header.

    The library checks header size, offsets, overlaps and holes before any tensor is made, so a file that claims more
    than it holds costs no memory.

    Args:
        path: the file.

    Returns:
        (tensors, metadata), tensors on the CPU.

    Raises:
        FormatError: the file is missing, unreadable, truncated, or not safetensors.
    """
    path = Path(path)
    with _refusals(path), safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


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
    path = Path(path)
    with _refusals(path), safe_open(path, framework="pt", device="cpu") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
        return shapes, dict(file.metadata() or {})


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
    if path.is_dir():
        raise FormatError(f"{path} is a folder; expected a safetensors file.")
    try:
        yield
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; check the path.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    except (SafetensorError, ValueError, RuntimeError, OverflowError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{path} is truncated or not a safetensors file ({reason}); fetch or write it again."
        ) from None
