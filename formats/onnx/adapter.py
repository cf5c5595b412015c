"""`.onnx_adapter` files: LoRA pairs that ONNX Runtime switches at run time; see SPEC.md section 5."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from cloq_export.errors import BindingError, FormatError, NonFiniteError, ShapeError
from cloq_export.files.atomic import write_folder, write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.formats.onnx.graph import lora_names
from cloq_export.formats.onnx.record import ADAPTER_NAME
from cloq_export.formats.peft.codec import BINDING_NAME, Adapter
from cloq_export.types import LoraPair

BINDING_FORMAT = "cloq-onnx-adapter"
FORMAT_VERSION = 1

_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_OUR_FILES = {ADAPTER_NAME, BINDING_NAME, "README.md", "cloq_certificate.json"}
_LONGEST = 512


def model_version(base_fingerprint: str) -> int:
    """Return the number by which an adapter file itself says which base it belongs to, 31 bits of the fingerprint.

    Args:
        base_fingerprint: "sha256:" and 64 hexadecimal digits.
    """
    return int(hashlib.sha256(base_fingerprint.encode()).hexdigest()[:8], 16) >> 1


def adapter_arrays(pairs: Mapping[str, LoraPair]) -> dict[str, np.ndarray]:
    """Return the graph inputs that serve LoRA pairs, the scaling folded into B.

    Args:
        pairs: full module name -> A (rank, in), B (out, rank).

    Returns:
        dict: name -> A (in, rank) or B (rank, out) float32.

    Raises:
        NonFiniteError: a scaled B is beyond float32.
    """
    arrays: dict[str, np.ndarray] = {}
    for module, pair in pairs.items():
        # Rounded once: a scaling that is no power of two must not meet an already rounded product.
        scaled = (pair.lora_B.to(torch.float64) * pair.scaling).to(torch.float32)
        if not bool(torch.isfinite(scaled).all()):
            raise NonFiniteError(f"{module}: B times its scaling {pair.scaling:g} leaves the range of float32.")
        for name, tensor in zip(lora_names(module), (pair.lora_A.to(torch.float32), scaled), strict=True):
            arrays[name] = np.ascontiguousarray(tensor.T.numpy())
    return arrays


def write_onnx_adapter(
    folder: str | os.PathLike[str],
    pairs: Mapping[str, LoraPair],
    *,
    base_model: str,
    base_fingerprint: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder, whole or not at all: the file that ONNX Runtime loads, and what it is bound to.

    Args:
        folder: the folder to make; an earlier ONNX adapter there is replaced.
        pairs: full module name -> LoRA pair, at least one.
        base_model: name or path of the model that the base was made from.
        base_fingerprint: of the quantized base that the adapter belongs to.
        extra: what else a reader may want to know.

    Raises:
        FormatError: there is no pair.
        RunDirectoryError: the folder holds other files, or cannot be written.
    """
    if not pairs:
        raise FormatError("an adapter needs at least one LoRA pair; rank 0 makes none: choose `rank=1` or more.")
    with write_folder(folder, owned=_holds_only_an_adapter) as filling:
        save_adapter(filling / ADAPTER_NAME, pairs, base_fingerprint)
        write_json(
            filling / BINDING_NAME,
            {
                "format": BINDING_FORMAT,
                "format_version": FORMAT_VERSION,
                "base_fingerprint": base_fingerprint,
                "base_model": base_model,
                "sha256": _sha256(filling / ADAPTER_NAME),
                "extra": dict(extra or {}),
            },
        )


def save_adapter(path: Path, pairs: Mapping[str, LoraPair], base_fingerprint: str) -> None:
    """Write one `.onnx_adapter` file.

    Args:
        path: the file.
        pairs: full module name -> LoRA pair.
        base_fingerprint: of their base.
    """
    # The values refer to these arrays until the file is written.
    arrays = adapter_arrays(pairs)
    writer = onnxruntime.AdapterFormat()
    writer.set_adapter_version(FORMAT_VERSION)
    writer.set_model_version(model_version(base_fingerprint))
    writer.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()})
    writer.export_adapter(str(path))


def is_onnx_adapter(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder looks like an ONNX adapter of ours (which may still be damaged)."""
    return (Path(folder) / ADAPTER_NAME).is_file()


def read_onnx_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an ONNX adapter folder, trusting nothing about it.

    Args:
        folder: the adapter folder.

    Returns:
        The adapter; its pairs are float32 and have scaling 1.

    Raises:
        FormatError: a file is missing, damaged, or not the one that was bound.
    """
    folder = Path(folder)
    path = require_inside(folder, folder / ADAPTER_NAME)
    if not path.is_file():
        raise FormatError(f"{folder} holds no {ADAPTER_NAME}; give the folder of an ONNX adapter.")
    binding = read_json(require_inside(folder, folder / BINDING_NAME))
    if binding.get("format") != BINDING_FORMAT or binding.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{folder / BINDING_NAME} says format {binding.get('format')!r:.80}, version "
            f"{binding.get('format_version')!r:.80}; this program reads {BINDING_FORMAT!r}, version {FORMAT_VERSION}."
        )
    base, digest, extra = (binding.get(key) for key in ("base_fingerprint", "sha256", "extra"))
    if not isinstance(base, str) or not base.isprintable() or not 0 < len(base) <= _LONGEST:
        raise FormatError(f"{folder / BINDING_NAME}: base_fingerprint is {base!r:.80}; the file is damaged.")
    if not isinstance(extra, dict):
        raise FormatError(f"{folder / BINDING_NAME}: extra is a {type(extra).__name__}; the file is damaged.")
    if digest != _sha256(path):
        raise FormatError(f"{path} is not the file that {BINDING_NAME} binds; copy both again from one adapter.")
    pairs, version = load_pairs(path)
    if version != model_version(base):
        raise FormatError(
            f"{path} was made for another base than {BINDING_NAME} says; the files come from two adapters: copy both "
            "again from one."
        )
    config = {"base_model_name_or_path": binding.get("base_model")}
    return Adapter(pairs, config, base, extra)


def load_pairs(path: Path) -> tuple[dict[str, LoraPair], int]:
    """Return the pairs of one `.onnx_adapter` file, and the number that names its base.

    Raises:
        FormatError: the file is damaged, or holds something else than LoRA pairs.
    """
    try:
        read = onnxruntime.AdapterFormat.read_adapter(str(path))
        values = {name: value.numpy() for name, value in read.get_parameters().items()}
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[-160:]
        raise FormatError(f"{path} is damaged or no adapter of ONNX Runtime ({reason}); write it again.") from None
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name in sorted(values):
        match = _NAME.fullmatch(name)
        array = values[name]
        if match is None or array.ndim != 2 or array.dtype != np.float32 or not name.isprintable():
            raise FormatError(f"{path} holds {name[:120]!r}, {array.dtype} {array.shape}; expected LoRA matrices.")
        sides.setdefault(match["module"], {})[match["side"]] = torch.from_numpy(array.T.copy())
    pairs: dict[str, LoraPair] = {}
    for module, found in sides.items():
        if set(found) != {"A", "B"}:
            raise FormatError(f"{path} holds only one matrix of {module}; the adapter is damaged.")
        try:
            pairs[module] = LoraPair(found["A"], found["B"], alpha=float(found["A"].shape[0]))
        except (ShapeError, NonFiniteError) as error:
            raise FormatError(f"{path}: {module}: {error}") from None
    if not pairs:
        raise FormatError(f"{path} holds no LoRA pair; the adapter is empty.")
    return pairs, int(read.get_model_version())


def require_fit(pairs: Mapping[str, LoraPair], shapes: Mapping[str, tuple[int, int]], source: str) -> None:
    """Refuse pairs that a graph has no inputs for.

    Args:
        pairs: full module name -> LoRA pair.
        shapes: quantized module -> (out, in).
        source: the adapter, for messages.

    Raises:
        BindingError: a module is not quantized in the graph, or has another shape.
    """
    for module, pair in pairs.items():
        known = shapes.get(module)
        shape = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        if known != shape:
            what = "the graph has no inputs for it" if known is None else f"the graph has {known} there"
            raise BindingError(
                f"{source} adapts {module} {shape}, and {what}; only quantized linears take an adapter in an ONNX "
                "export: make one for this base with `cloq adapt`."
            )


def same_pairs(read: Mapping[str, LoraPair], meant: Mapping[str, LoraPair]) -> bool:
    """Return whether pairs read back are those that were to be written, bit for bit as the graph sees them."""
    mine, theirs = adapter_arrays(read), adapter_arrays(meant)
    return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


def _holds_only_an_adapter(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return ADAPTER_NAME in names and names <= _OUR_FILES


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
