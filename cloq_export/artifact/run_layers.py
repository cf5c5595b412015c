"""The layers of a run, each in a file of its own: codes, the pair and the certificate are read apart."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cloq_export.errors import CloqError, FormatError, NonFiniteError, ShapeError
from cloq_export.files.atomic import is_partial
from cloq_export.files.fingerprint import layer_digest
from cloq_export.files.safe_json import parse_json
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.types import LayerCertificate, LoraPair, QuantizedLayer, QuantSpec

LAYER_FORMAT = "cloq-layer"
LAYER_FORMAT_VERSION = 1

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """One finished layer as it stands on disk.

    Args:
        quantized: codes, scales and zeros.
        lora: the adapter pair, or None.
        certificate: how good the layer is, or None.
    """

    quantized: QuantizedLayer
    lora: LoraPair | None
    certificate: LayerCertificate | None


def write_layer_file(path: Path, module: str, layer: StoredLayer) -> None:
    """Write one finished layer, replacing an earlier version of it.

    Args:
        path: the file.
        module: full module name.
        layer: what is written; the digest of its codes goes into the header.

    Raises:
        RunDirectoryError: the file cannot be written.
    """
    quantized = layer.quantized
    tensors = {"codes": quantized.codes, "scales": quantized.scales, "zeros": quantized.zeros}
    metadata = {
        "format": LAYER_FORMAT,
        "format_version": str(LAYER_FORMAT_VERSION),
        "module": module,
        "sha256": layer_digest(quantized),
        "spec": json.dumps(dataclasses.asdict(quantized.spec), sort_keys=True),
    }
    if layer.lora is not None:
        tensors |= {"lora_A": layer.lora.lora_A, "lora_B": layer.lora.lora_B}
        metadata["alpha"] = repr(float(layer.lora.alpha))
    if layer.certificate is not None:
        metadata["certificate"] = json.dumps(layer.certificate.to_json(), sort_keys=True)
    write_safetensors(path, tensors, metadata)


class LayerFile:
    """One finished layer whose header is read and checked, and whose numbers are read as they are asked for.

    Args:
        path: the file.
        module: the module that it must hold.

    Raises:
        FormatError: the file is missing or damaged, or holds another module.
    """

    def __init__(self, path: Path, module: str) -> None:
        self._file = TensorFile(path)
        self._path = path
        metadata = self._file.metadata
        if metadata.get("format") != LAYER_FORMAT or metadata.get("format_version") != str(LAYER_FORMAT_VERSION):
            raise FormatError(
                f"{path} is not a layer of format version {LAYER_FORMAT_VERSION} "
                f"(it says {metadata.get('format')!r}, {metadata.get('format_version')!r})."
            )
        if metadata.get("module") != module:
            raise FormatError(f"{path} holds the module {metadata.get('module')!r}; expected {module!r}.")
        names = {"codes", "scales", "zeros"} | ({"lora_A", "lora_B"} if "alpha" in metadata else set())
        if set(self._file.headers) != names:
            raise FormatError(f"{path} holds the tensors {sorted(self._file.headers)}; expected {sorted(names)}.")
        shape = self._file.headers["codes"][1]
        if len(shape) != 2:
            raise FormatError(f"{path}: codes have shape {shape}; expected (out, in).")
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.spec = _read_spec(path, metadata)
        self._alpha = _read_alpha(path, metadata)
        self.certificate = _read_certificate(path, metadata)
        # Files of older versions have no digest.
        self._noted_digest = metadata.get("sha256")
        if self._noted_digest is not None and _DIGEST.fullmatch(self._noted_digest) is None:
            raise FormatError(f"{path} has a damaged header (sha256 {self._noted_digest!r:.80}).")

    @property
    def digest(self) -> str:
        """Return the `layer_digest` of the codes as the header gives it, computed where it gives none.

        Raises:
            FormatError: it has to be computed, and the file is damaged.
        """
        return self._noted_digest or layer_digest(self.read_codes())

    def read_codes(self) -> QuantizedLayer:
        """Return codes, scales and zeros, on the CPU.

        Raises:
            FormatError: the file is damaged, or they are not those that were written.
        """
        with remedy_named(self._path):
            read = self._file.read
            quantized = QuantizedLayer(read("codes"), read("scales"), read("zeros"), self.spec)
            if self._noted_digest is not None and layer_digest(quantized) != self._noted_digest:
                raise FormatError(f"{self._path}: the codes, scales or zeros are not those that were written.")
            return quantized

    def read_pair(self) -> LoraPair | None:
        """Return the adapter pair, on the CPU, or None if the layer has none.

        Raises:
            FormatError: the file is damaged, or the pair does not fit the codes.
        """
        if self._alpha is None:
            return None
        with remedy_named(self._path):
            pair = LoraPair(self._file.read("lora_A"), self._file.read("lora_B"), self._alpha)
            if (pair.lora_B.shape[0], pair.lora_A.shape[1]) != self.shape:
                raise FormatError(
                    f"{self._path}: A {tuple(pair.lora_A.shape)} and B {tuple(pair.lora_B.shape)} do not fit codes "
                    f"{self.shape}."
                )
            return pair


def read_layer_files(paths: Iterable[Path]) -> tuple[dict[str, LayerFile], dict[str, str]]:
    """Return the layers of a run by module, in the order of the model's blocks.

    Args:
        paths: what lies in the folder of the layers.

    Returns:
        (module -> layer, module -> what is wrong with its file).
    """
    whole: dict[str, LayerFile] = {}
    damaged: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: natural_order(path.stem)):
        if path.suffix != ".safetensors" or is_partial(path.name):
            continue
        try:
            whole[path.stem] = LayerFile(path, path.stem)
        except FormatError as error:
            damaged[path.stem] = str(error)
    return whole, damaged


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_spec(path: Path, metadata: Mapping[str, str]) -> QuantSpec:
    with _damaged_header(path):
        spec = QuantSpec(**parse_json(metadata.get("spec", ""), f"{path}: spec"))
    if type(spec.bits) is not int or type(spec.group_size) is not int or type(spec.symmetric) is not bool:
        raise FormatError(f"{path} has a damaged header (spec {metadata['spec']}).")
    return spec


def _read_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    if "alpha" not in metadata:
        return None
    with _damaged_header(path):
        alpha = float(metadata["alpha"])
    if not math.isfinite(alpha):
        raise FormatError(f"{path} has a damaged header (alpha {alpha}).")
    return alpha


def _read_certificate(path: Path, metadata: Mapping[str, str]) -> LayerCertificate | None:
    if "certificate" not in metadata:
        return None
    with _damaged_header(path):
        values = parse_json(metadata["certificate"], f"{path}: certificate")
        # JSON has no tuples, and a certificate is equal only to one that holds what it held.
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return LayerCertificate(**(values | tuples))


@contextlib.contextmanager
def _damaged_header(path: Path) -> Iterator[None]:
    try:
        yield
    except FormatError:
        raise
    except (TypeError, ValueError, CloqError) as error:  # CloqError: a grid that QuantSpec refuses
        raise FormatError(f"{path} has a damaged header ({error}).") from None


@contextlib.contextmanager
def remedy_named(path: Path) -> Iterator[None]:
    """Add to the errors of a layer's file which file it is, and how it is mended."""
    try:
        yield
    except (FormatError, ShapeError, NonFiniteError) as error:
        text = str(error)
        named = text if str(path) in text else f"{path}: {text}"
        raise FormatError(
            f"{named} Delete this file and run the same command again: only this layer is made again."
        ) from None
