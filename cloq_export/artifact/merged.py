"""A plain float checkpoint with the adapter merged in, for engines that know neither codes nor adapters."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings, drop_private
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.errors import FormatError, NonFiniteError
from cloq_export.files.atomic import translate_os_errors, write_folder, write_json
from cloq_export.files.fingerprint import combine_digests, layer_digest
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.files.shards import ShardWriter
from cloq_export.files.tensor_writer import tensor_bytes, tensor_header
from cloq_export.formats.merged import (
    MERGED_DTYPES,
    MERGED_NAME,
    Rounding,
    float_blocks,
    is_record,
    merged_blocks,
    merged_record,
)
from cloq_export.types import LoraPair

_FLOAT_CODES = {"F64", "F32", "F16", "BF16"}
# Rows of a weight are merged a block at a time: the float64 numbers of a large layer would need four times its memory,
# and a block that stays in the processor's cache is measured in half the time.
_BLOCK_BYTES = 2 * 2**20
# Of a tensor's norm; rounding alone takes a few thousandths in bfloat16, less in float16.
_MOST_LOST = 0.02


@dataclasses.dataclass(frozen=True)
class MergedReport:
    """A merged export as it was written and read back.

    Args:
        base_fingerprint: of the quantized layers that went in.
        adapter_sha256: hash over the pairs that went in; None without an adapter.
        dtype: of the float tensors.
        modules: module -> shape and sha256 of its merged weight's bytes, for the certificate.
        rounding: kind of tensor -> what was lost: "merged" weights, other "matrices" (embeddings, heads, linears that
            stayed float), "vectors" (norms, biases). Kinds that do not occur are left out.
    """

    base_fingerprint: str
    adapter_sha256: str | None
    dtype: torch.dtype
    modules: Mapping[str, Mapping[str, Any]]
    rounding: Mapping[str, Rounding]


@dataclasses.dataclass(frozen=True)
class MergedAdapter:
    """An adapter on its way into the weights.

    Args:
        pairs: full module name -> LoRA pair, each read once; a linear that stayed float may have one too. Whoever made
            it has checked that they belong to this base. Empty merges nothing.
        name: for the record, or None.
    """

    pairs: Mapping[str, LoraPair] = dataclasses.field(default_factory=dict)
    name: str | None = None


def export_merged(
    folder: str | os.PathLike[str],
    layers: LayerSource,
    floats: FloatPart,
    adapter: MergedAdapter,
    *,
    dtype: torch.dtype = torch.bfloat16,
    settings: WriteSettings[MergedReport] | None = None,
) -> MergedReport:
    """Write `W = Q + (alpha / rank) B A` as an ordinary float checkpoint, whole or not at all, one layer at a time.

    Q is exact in float64 (a float16 scale times a small integer); the product and the sum are computed in it, and the
    result is cast once. Every float tensor besides the quantized ones is cast too. What both lose is measured and
    written to `cloq_merged.json` with the base fingerprint and the adapter's hash. Each tensor is read back from the
    finished files and compared.

    A merged weight is another model than the one that serves Q and the pair apart: each weight is rounded once more,
    by up to half a unit in the last place of the dtype, and the grid of the codes is gone.

    Args:
        folder: the folder to make; an earlier merged export of ours there is replaced.
        layers: the quantized layers.
        floats: everything besides them.
        adapter: what is merged.
        dtype: bfloat16, float16 or float32.
        settings: how the folder is written; what is written is the report.

    Returns:
        The report.

    Raises:
        FormatError: a pair belongs to no weight, has another shape, or the layers are bound to another fingerprint.
        NonFiniteError: a number is beyond the range of the dtype, or most of a tensor below it; the message names the
            tensor and what to do.
        RunDirectoryError: the folder holds other files, the disk is full, or it cannot be written.
    """
    if dtype not in MERGED_DTYPES:
        raise FormatError(f"a merged checkpoint is bfloat16, float16 or float32; {dtype} was asked for.")
    code = tensor_header("", torch.empty(0, dtype=dtype))[0]
    settings, pairs = settings or WriteSettings(), adapter.pairs
    floats, untied = _with_tied(floats, pairs)
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module, weight_shape in layers.shapes.items():
        headers[f"{module}.weight"] = (code, weight_shape)
    for name, (stored, shape) in floats.headers.items():
        headers[name] = (code if stored in _FLOAT_CODES else stored, shape)
    _check_pairs(pairs, {name for name, header in headers.items() if header[0] == code})

    def in_files(name: str) -> str:
        module = name.removesuffix(".weight")
        return floats.name_in_files(module, "weight") if module in layers.specs else floats.name_in_files(name)

    bundles = [{in_files(name): header} for name, header in headers.items()]
    writing = _Writing(dtype)
    layer_digests: dict[str, str] = {}
    with write_folder(folder, owned=is_merged) as filling:
        with ShardWriter(filling, bundles, settings.max_shard_bytes) as shards:
            for done, module in enumerate(layers.specs, start=1):
                layer = layers.read(module)
                layer_digests[module] = layer_digest(layer)
                pair = pairs.get(module)
                name = f"{module}.weight"
                merged = writing.cast(name, "merged", layers.shapes[module], merged_blocks(layer, pair), pair)
                shards.write({in_files(name): merged})
                if settings.progress is not None:
                    settings.progress(done, len(layers.specs))
            for name in floats.headers:
                tensor = floats.read(name)
                module = name.removesuffix(".weight")
                pair = pairs.get(module) if name.endswith(".weight") else None
                if floats.headers[name][0] in _FLOAT_CODES:
                    kind = "merged" if pair is not None else "matrices" if tensor.ndim > 1 else "vectors"
                    tensor = writing.cast(name, kind, tuple(tensor.shape), float_blocks(tensor, pair), pair)
                else:
                    writing.note(name, tensor)
                shards.write({in_files(name): tensor})
        fingerprint = combine_digests(layer_digests)
        settings.refuse_other_layers(fingerprint)
        writing.compare(filling, in_files)
        with translate_os_errors(Path(folder)):
            floats.save_files(filling)
        _write_config(filling / CONFIG_NAME, floats, dtype, untied=untied)
        report = writing.report(fingerprint, layers, pairs)
        taken = {"name": adapter.name, "sha256": report.adapter_sha256, "modules": sorted(pairs)} if pairs else None
        write_json(filling / MERGED_NAME, merged_record(fingerprint, dtype, report.modules, report.rounding, taken))
        if settings.finish is not None:
            settings.finish(filling, report)
    return report


def is_merged(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds a merged export that this package wrote."""
    return is_record(Path(folder) / MERGED_NAME)


class _Writing:
    """Casts tensors one by one, measuring what that loses, and remembers what the files must hold."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._digests: dict[str, str] = {}
        self._pairs = hashlib.sha256()
        self._rounding: dict[str, Rounding] = {}

    def cast(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        blocks: Iterator[tuple[slice, torch.Tensor]],
        pair: LoraPair | None,
    ) -> torch.Tensor:
        """Return a tensor in the dtype, with its pair merged in.

        Args:
            name: of the tensor.
            kind: under which its rounding is counted.
            shape: of the tensor.
            blocks: (rows, their exact numbers in float64, the pair's product in them).
            pair: what was added, for the record; None added nothing.

        Raises:
            FormatError: the pair has another shape.
            NonFiniteError: a number is beyond the range of the dtype, or most of the tensor below it.
        """
        if pair is not None:
            self._take_pair(name, shape, pair)
        result = torch.empty(shape, dtype=self._dtype)
        relative = lost = size = 0.0
        for rows, exact in blocks:
            if not exact.numel():
                continue
            stored = exact.to(self._dtype)
            if not bool(torch.isfinite(stored).all()):
                self._refuse(name, exact)
            (result if shape else result.view(1))[rows] = stored
            error = (stored.to(torch.float64) - exact).abs()
            # 0 / 0 is a zero that stayed zero.
            relative = max(relative, float((error / exact.abs()).nan_to_num(0.0).amax()))
            lost += float(error.square().sum())
            size += float(exact.square().sum())
        norm = math.sqrt(lost / size) if size else 0.0
        if norm > _MOST_LOST:
            self._refuse_loss(name, norm, math.sqrt(size / max(1, result.numel())))
        so_far = self._rounding.get(kind, Rounding())
        self._rounding[kind] = Rounding(
            so_far.tensors + 1,
            max(so_far.max_relative, relative),
            max(so_far.max_norm, norm),
            name if norm > so_far.max_norm else so_far.worst,
        )
        self.note(name, result)
        return result

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Remember a tensor as it goes to disk."""
        self._digests[name] = _digest(tensor)

    def compare(self, folder: Path, in_files: Callable[[str], str]) -> None:
        """Read every tensor back and refuse one that differs from what was written.

        Args:
            folder: where the files lie.
            in_files: gives the name of a tensor in them.

        Raises:
            FormatError: a tensor differs.
        """
        digests = {in_files(name): digest for name, digest in self._digests.items()}
        for path in sorted(folder.glob("*.safetensors")):
            file = TensorFile(path)
            for name in file.headers:
                if _digest(file.read(name)) != digests[name]:
                    raise FormatError(
                        f"{path}: {name} was read back with other numbers than were written; check the disk."
                    )

    def report(self, fingerprint: str, layers: LayerSource, pairs: Mapping[str, LoraPair]) -> MergedReport:
        """Return what was written."""
        modules = {
            module: {"shape": list(shape), "sha256": self._digests[f"{module}.weight"]}
            for module, shape in layers.shapes.items()
        }
        adapter = f"sha256:{self._pairs.hexdigest()}" if pairs else None
        return MergedReport(fingerprint, adapter, self._dtype, modules, dict(self._rounding))

    def _take_pair(self, name: str, shape: tuple[int, ...], pair: LoraPair) -> None:
        expected = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        if shape != expected:
            raise FormatError(
                f"A {tuple(pair.lora_A.shape)} and B {tuple(pair.lora_B.shape)} do not fit {name} of shape {shape}; "
                "the adapter belongs to another model."
            )
        # Modules come in one order only, that of the layers, so one running hash is enough.
        self._pairs.update(f"{name}\0{pair.alpha!r}\0{pair.rank}\0{pair.lora_A.dtype}\n".encode())
        for tensor in (pair.lora_A, pair.lora_B):
            self._pairs.update(tensor_bytes(tensor))

    def _refuse(self, name: str, exact: torch.Tensor) -> None:
        short = str(self._dtype).removeprefix("torch.")
        if not bool(torch.isfinite(exact).all()):
            raise NonFiniteError(f"{name} holds NaN or Inf before it is stored; the source is damaged: fetch it again.")
        raise NonFiniteError(
            f"{name} reaches {float(exact.abs().max()):.4g}, but {short} ends at {torch.finfo(self._dtype).max:.4g}; "
            f"export it in {self._wider()}."
        )

    def _refuse_loss(self, name: str, lost: float, size: float) -> None:
        short = str(self._dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{name} (root mean square {size:.3g}) would lose {lost:.0%} of its norm, because {short} has few numbers "
            f"below {torch.finfo(self._dtype).tiny:.2g}; export it in {self._wider()}."
        )

    def _wider(self) -> str:
        return "bfloat16" if self._dtype == torch.float16 else "float32"


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _check_pairs(pairs: Mapping[str, LoraPair], names: Container[str]) -> None:
    for module in pairs:
        if f"{module}.weight" not in names:
            raise FormatError(
                f"the adapter changes {module}, whose weight the checkpoint does not hold (it shares it with another "
                "layer, or belongs to another model); it cannot be merged: serve it as an adapter."
            )


def _with_tied(floats: FloatPart, pairs: Mapping[str, LoraPair]) -> tuple[FloatPart, bool]:
    """Return the float part with a tensor of its own for each tied weight that has a pair, and whether there is one."""
    own = {name: of for name, of in floats.tied.items() if name.removesuffix(".weight") in pairs}
    own = {name: of for name, of in own.items() if of in floats.headers and name not in floats.headers}
    if not own:
        return floats, False
    headers = {**floats.headers, **{name: floats.headers[of] for name, of in own.items()}}
    return dataclasses.replace(floats, headers=headers, read=lambda name: floats.read(own.get(name, name))), True


def _write_config(path: Path, floats: FloatPart, dtype: torch.dtype, *, untied: bool) -> None:
    short = str(dtype).removeprefix("torch.")
    config = {**read_json(path), **floats.config, "dtype": short}
    config.pop("quantization_config", None)
    if untied:
        config["tie_word_embeddings"] = False
    # The parts of a wrapper have entries of their own for both.
    for key, part in config.items():
        if key.endswith("_config") and isinstance(part, dict):
            changes = {"dtype": short, "torch_dtype": short, **({"tie_word_embeddings": False} if untied else {})}
            config[key] = {**part, **{name: value for name, value in changes.items() if name in part}}
    drop_private(config)
    write_json(path, config)
