"""The run directory: everything a run knows and has finished, safe against a kill at any moment.

- `RUN/run.json`: recipe, source fingerprint, versions, state
- `RUN/layers/<module>.safetensors`: codes, scales, zeros, lora_A, lora_B and the layer's certificate
- `RUN/reports/<name>.json`: what was measured
- `RUN/checkpoint/`: the packed checkpoint
- `RUN/adapters/<name>/`: adapters bound to it
- `RUN/.lock`: held by the process that writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from cloq_export.errors import CloqError, FormatError, NonFiniteError, RunDirectoryError, ShapeError
from cloq_export.files.atomic import is_partial, remove_partials, translate_os_errors, write_json, write_safetensors
from cloq_export.files.safe_json import parse_json, read_json
from cloq_export.files.safe_tensors import read_safetensors, read_safetensors_header, require_tensor
from cloq_export.files.spelled_paths import is_same_place
from cloq_export.recipe import NOT_IN_THE_BYTES
from cloq_export.types import LayerCertificate, LoraPair, QuantizedLayer, QuantSpec

if sys.platform != "win32":
    import fcntl

MANIFEST_NAME = "run.json"
LOCK_NAME = ".lock"
RUN_FORMAT = "cloq-run"
LAYER_FORMAT = "cloq-layer"
FORMAT_VERSION = 1

_SAFE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*")


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


class RunDirectory:
    """One run on disk, opened with `create_or_resume` or `open`.

    Reading needs no lock. The first write takes the lock of the directory, which is held until `close` (or the end of
    a `with` block) and which the operating system frees when the process dies. On Windows there is no lock.

    Args:
        path: the directory.
        manifest: the content of its run.json.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._manifest = dict(manifest)
        self._lock_file: IO[str] | None = None

    @classmethod
    def create_or_resume(
        cls,
        path: str | os.PathLike[str],
        recipe: Mapping[str, Any],
        source_fingerprint: str,
        versions: Mapping[str, str],
    ) -> RunDirectory:
        """Start a run in a new or empty folder, or continue the same run where it stopped.

        Args:
            path: the folder.
            recipe: every option of the run; those of `recipe.NOT_IN_THE_BYTES` may change between calls.
            source_fingerprint: of the model's files.
            versions: of the software; a run keeps those it was started with, and lists later ones that differ.

        Returns:
            The run, locked for this process.

        Raises:
            RunDirectoryError: the folder holds something else, a run with another recipe or source, or cannot be
                written; or another process works in it.
            FormatError: run.json is damaged.
        """
        run = cls(path, {})
        folder = run.path
        with translate_os_errors(folder):
            if folder.exists() and not folder.is_dir():
                raise RunDirectoryError(f"{folder} is a file; choose a folder with --out.")
            if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
                foreign = sorted(e.name for e in folder.iterdir() if e.name != LOCK_NAME and not is_partial(e.name))
                if foreign:
                    raise RunDirectoryError(
                        f"{folder} holds {_some(foreign)} but no {MANIFEST_NAME}, so it is not a run; choose an empty "
                        "or new folder with --out."
                    )
            folder.mkdir(parents=True, exist_ok=True)
        run._lock()
        try:
            asked = _plain(recipe)
            if (folder / MANIFEST_NAME).exists():
                run._manifest = _read_manifest(folder)
                run._refuse_difference(asked, source_fingerprint)
                run._renew_manifest(asked, versions)
            else:
                run._write_manifest(
                    {
                        "format": RUN_FORMAT,
                        "format_version": FORMAT_VERSION,
                        "recipe": asked,
                        "source_fingerprint": source_fingerprint,
                        "state": "running",
                        "versions": dict(versions),
                    }
                )
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Open an existing run.

        Args:
            path: the folder.

        Returns:
            The run, not locked.

        Raises:
            RunDirectoryError: there is no run at `path`.
            FormatError: run.json is damaged.
        """
        folder = Path(path)
        if not cls.is_run(folder):
            what = "does not exist" if not folder.exists() else f"holds no {MANIFEST_NAME}"
            raise RunDirectoryError(
                f"{folder} {what}, so it is not a run; make one with: cloq run MODEL --out {folder}"
            )
        return cls(folder, _read_manifest(folder))

    @staticmethod
    def is_run(path: str | os.PathLike[str]) -> bool:
        """Return whether a folder holds a run's manifest (which may still be damaged)."""
        return (Path(path) / MANIFEST_NAME).is_file()

    def close(self) -> None:
        """Give the lock back; the object can still read."""
        if self._lock_file is not None:
            # An empty lock file leaves the folder byte for byte the same, whoever worked in it.
            with contextlib.suppress(OSError):
                self._lock_file.truncate(0)
            self._lock_file.close()
            self._lock_file = None

    def lock(self) -> None:
        """Take the lock now, before the first write.

        Raises:
            RunDirectoryError: another process works in the run, or it cannot be written.
        """
        self._lock()

    def discard_if_empty(self) -> None:
        """Remove the run, folder included if nothing else is in it, unless a layer or work on one was ever written.

        There is nothing to continue then, and a manifest would only refuse another recipe. It gives the lock back.
        """
        with contextlib.suppress(OSError):
            (self.path / "work").rmdir()
        if _entries(self.path / "layers") or _entries(self.path / "work"):
            return
        self._lock()
        with contextlib.suppress(OSError):
            # The manifest goes first: without it the rest is no run.
            (self.path / MANIFEST_NAME).unlink(missing_ok=True)
            for report in _entries(self.path / "reports"):
                report.unlink()
            for folder in ("layers", "reports"):
                with contextlib.suppress(FileNotFoundError):
                    (self.path / folder).rmdir()
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            self.path.rmdir()
        self.close()

    def __enter__(self) -> RunDirectory:
        """Return the run."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self.close()

    @property
    def recipe(self) -> dict[str, Any]:
        """Return every option of the run."""
        return dict(self._manifest["recipe"])

    @property
    def state(self) -> str:
        """Return how far the run is: "running" at first, then what `set_state` was given."""
        return str(self._manifest["state"])

    @property
    def source_fingerprint(self) -> str:
        """Return the fingerprint of the model that the run was made from."""
        return str(self._manifest["source_fingerprint"])

    def manifest(self) -> dict[str, Any]:
        """Return a copy of the content of run.json."""
        copy: dict[str, Any] = json.loads(json.dumps(self._manifest))
        return copy

    def set_state(self, state: str) -> None:
        """Record how far the run is.

        Args:
            state: a word such as "running", "quantized" or "done".

        Raises:
            RunDirectoryError: the run cannot be written.
        """
        self._lock()
        if state != self.state:
            self._write_manifest(self._manifest | {"state": state})

    def set_overrides(self, overrides: list[dict[str, Any]]) -> None:
        """Record the overrides that a run has chosen for itself, before its first layer.

        Args:
            overrides: as `Recipe.to_mapping` lists them.

        Raises:
            RunDirectoryError: the run cannot be written.
        """
        self._lock()
        self._write_manifest(self._manifest | {"recipe": self._manifest["recipe"] | {"overrides": overrides}})

    @property
    def checkpoint_path(self) -> Path:
        """Return where the packed checkpoint stands."""
        return self.path / "checkpoint"

    def adapter_path(self, name: str) -> Path:
        """Return where the adapter of a name stands.

        Raises:
            RunDirectoryError: the name cannot be a folder name.
        """
        return self.path / "adapters" / _checked_name(name, "adapter name")

    def adapters(self) -> list[str]:
        """Return the names of the adapters in the run, sorted."""
        folder = self.path / "adapters"
        return sorted(e.name for e in _entries(folder) if e.is_dir() and not is_partial(e.name))

    def layer_path(self, module: str) -> Path:
        """Return where the layer of a module stands.

        Raises:
            RunDirectoryError: the module name cannot be a file name.
        """
        return self.path / "layers" / f"{_checked_name(module, 'module name')}.safetensors"

    def write_layer(
        self,
        module: str,
        quantized: QuantizedLayer,
        lora: LoraPair | None = None,
        certificate: LayerCertificate | None = None,
    ) -> None:
        """Write one finished layer, replacing an earlier version of it.

        Args:
            module: full module name.
            quantized: codes, scales and zeros.
            lora: the adapter pair, or None.
            certificate: how good the layer is, or None.

        Raises:
            RunDirectoryError: the run cannot be written, or the module name cannot be a file name.
        """
        path = self.layer_path(module)
        self._lock()
        tensors = {"codes": quantized.codes, "scales": quantized.scales, "zeros": quantized.zeros}
        metadata = {
            "format": LAYER_FORMAT,
            "format_version": str(FORMAT_VERSION),
            "module": module,
            "spec": json.dumps(dataclasses.asdict(quantized.spec), sort_keys=True),
        }
        if lora is not None:
            tensors |= {"lora_A": lora.lora_A, "lora_B": lora.lora_B}
            metadata["alpha"] = repr(float(lora.alpha))
        if certificate is not None:
            metadata["certificate"] = json.dumps(dataclasses.asdict(certificate), sort_keys=True)
        self._make_folder(path.parent)
        write_safetensors(path, tensors, metadata)

    def read_layer(self, module: str) -> StoredLayer:
        """Read one finished layer.

        Args:
            module: full module name.

        Returns:
            The layer, its adapter pair and its certificate, tensors on the CPU.

        Raises:
            FormatError: the layer is missing or damaged.
        """
        path = self.layer_path(module)
        if not path.exists():
            raise FormatError(f"{self.path} has no finished layer {module}; run the command again to make it.")
        with _remedy(path):
            tensors = read_safetensors(path)[0]
            spec, alpha, certificate = _read_layer_header(path, module)
            source = str(path)
            quantized = QuantizedLayer(
                codes=require_tensor(tensors, "codes", source=source),
                scales=require_tensor(tensors, "scales", source=source),
                zeros=require_tensor(tensors, "zeros", source=source),
                spec=spec,
            )
            lora = None
            if alpha is not None:
                lora = LoraPair(
                    lora_A=require_tensor(tensors, "lora_A", source=source),
                    lora_B=require_tensor(tensors, "lora_B", source=source),
                    alpha=alpha,
                )
                if lora.lora_A.shape[1] != quantized.in_features or lora.lora_B.shape[0] != quantized.out_features:
                    raise FormatError(
                        f"{path}: A {tuple(lora.lora_A.shape)} and B {tuple(lora.lora_B.shape)} do not fit codes "
                        f"{tuple(quantized.codes.shape)}."
                    )
        return StoredLayer(quantized, lora, certificate)

    def layer_header(self, module: str) -> tuple[QuantSpec, tuple[int, int]]:
        """Return the grid and the shape (out, in) of one finished layer, without reading its numbers.

        Args:
            module: full module name.

        Raises:
            FormatError: the layer is missing or damaged.
        """
        path = self.layer_path(module)
        with _remedy(path):
            spec = _read_layer_header(path, module)[0]
            shape = read_safetensors_header(path)[0]["codes"][1]
            if len(shape) != 2:
                raise FormatError(f"{path}: codes have shape {shape}; expected (out, in).")
        return spec, (shape[0], shape[1])

    def completed_modules(self) -> set[str]:
        """Return the modules whose layer is finished and whole; `damaged_layers` tells of the others."""
        return self._check_layers()[0]

    def damaged_layers(self) -> dict[str, str]:
        """Return the modules whose layer file is damaged, with the reason; they count as not done.

        Writes are atomic, so only a failing disk or a foreign hand makes one.
        """
        return self._check_layers()[1]

    def certificates(self) -> list[LayerCertificate]:
        """Return the certificates of all finished layers, in the order of the model's blocks.

        Raises:
            FormatError: a layer is damaged.
        """
        found = []
        for module in sorted(self.completed_modules(), key=natural_order):
            path = self.layer_path(module)
            with _remedy(path):
                certificate = _read_layer_header(path, module)[2]
            if certificate is not None:
                found.append(certificate)
        return found

    def write_report(self, name: str, obj: Any) -> None:
        """Write a report as JSON.

        Args:
            name: the report, e.g. "evaluation".
            obj: mappings, sequences, dataclasses, numbers, text; NaN and Inf become null.

        Raises:
            RunDirectoryError: the run cannot be written, or the name cannot be a file name.
        """
        path = self._report_path(name)
        self._lock()
        self._make_folder(path.parent)
        write_json(path, obj)

    def read_report(self, name: str) -> dict[str, Any]:
        """Read a report.

        Args:
            name: as given to `write_report`; the report must be a mapping.

        Returns:
            The report.

        Raises:
            RunDirectoryError: the run has no such report.
            FormatError: the report is damaged.
        """
        path = self._report_path(name)
        if not path.exists():
            held = ", ".join(self.reports()) or "none"
            raise RunDirectoryError(f"{self.path} has no report {name!r}; it has {held}.")
        return read_json(path)

    def reports(self) -> list[str]:
        """Return the names of the reports in the run, sorted."""
        return sorted(e.stem for e in _entries(self.path / "reports") if e.suffix == ".json")

    def _report_path(self, name: str) -> Path:
        return self.path / "reports" / f"{_checked_name(name, 'report name')}.json"

    def _check_layers(self) -> tuple[set[str], dict[str, str]]:
        whole: set[str] = set()
        damaged: dict[str, str] = {}
        for entry in _entries(self.path / "layers"):
            if entry.suffix != ".safetensors" or is_partial(entry.name):
                continue
            try:
                _read_layer_header(entry, entry.stem)
            except FormatError as error:
                damaged[entry.stem] = str(error)
            else:
                whole.add(entry.stem)
        return whole, damaged

    def _make_folder(self, folder: Path) -> None:
        with translate_os_errors(folder):
            folder.mkdir(exist_ok=True)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        # The recipe keeps its own order of options: it is read by people, and patterns in it may depend on order.
        write_json(self.path / MANIFEST_NAME, manifest, sort_keys=False)
        self._manifest = manifest

    def _lock(self) -> None:
        if self._lock_file is not None:
            return
        with translate_os_errors(self.path):
            # Opened for appending, so that a loser does not wipe the winner's process number.
            file = open(self.path / LOCK_NAME, "a+", encoding="ascii")  # noqa: SIM115
            try:
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read(32).strip() or "unknown"
                file.close()
                raise RunDirectoryError(
                    f"{self.path} is in use by process {owner}; wait until it ends, or choose another folder with "
                    "--out."
                ) from None
            except BaseException:
                file.close()
                raise
            self._lock_file = file
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        for folder in (self.path, self.path / "layers", self.path / "reports", self.path / "adapters"):
            remove_partials(folder)
        if self._manifest:
            # Another process may have gone on with the run since it was opened for reading.
            self._manifest = _read_manifest(self.path)

    def _refuse_difference(self, asked: Mapping[str, Any], source_fingerprint: str) -> None:
        faults = recipe_difference(self._manifest["recipe"], asked)
        held = self._manifest["source_fingerprint"]
        if held != source_fingerprint:
            faults.append(f"source model: {_short(held)} in the run, {_short(source_fingerprint)} asked")
        if faults:
            raise RunDirectoryError(
                f"{self.path} holds another run: {'; '.join(faults)}. Use the run's own options to continue it, or "
                "choose another folder with --out."
            )

    def _renew_manifest(self, asked: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        manifest = self.manifest()
        manifest["recipe"] |= {name: value for name, value in asked.items() if name in NOT_IN_THE_BYTES}
        if dict(versions) != manifest["versions"]:
            later = manifest.setdefault("later_versions", [])
            if dict(versions) not in later:
                later.append(dict(versions))
        if manifest != self._manifest:
            self._write_manifest(manifest)


def recipe_difference(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return what keeps two recipes from being the same run, as lines "bits: 2 in the run, 3 asked".

    Args:
        held: the recipe of the run.
        asked: the recipe that is asked for.

    Returns:
        One line per option, sorted; options that do not change the layers are passed over.
    """
    held, asked = _plain(held), _plain(asked)
    lines = []
    for key in sorted({*held, *asked} - set(NOT_IN_THE_BYTES)):
        if is_same_place(held.get(key), asked.get(key)):
            continue
        if (key in held) != (key in asked) or held.get(key) != asked.get(key):
            before, now = (_shown(side[key]) if key in side else "not set" for side in (held, asked))
            lines.append(f"{key}: {before} in the run, {now} asked")
    return lines


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    manifest = read_json(path)
    if manifest.get("format") != RUN_FORMAT:
        raise RunDirectoryError(f"{path} was not written by cloq, so {folder} is not a run; choose another folder.")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {version!r}; this program reads {FORMAT_VERSION}. Use the cloq_export that "
            "made the run."
        )
    for key, kind in (("recipe", dict), ("source_fingerprint", str), ("state", str), ("versions", dict)):
        if not isinstance(manifest.get(key), kind):
            raise FormatError(f"{path} lacks a valid {key!r}; the file is damaged: start the run in another folder.")
    return manifest


def _read_layer_header(path: Path, module: str) -> tuple[QuantSpec, float | None, LayerCertificate | None]:
    tensors, metadata = read_safetensors_header(path)
    if metadata.get("format") != LAYER_FORMAT or metadata.get("format_version") != str(FORMAT_VERSION):
        raise FormatError(
            f"{path} is not a layer of format version {FORMAT_VERSION} "
            f"(it says {metadata.get('format')!r}, {metadata.get('format_version')!r})."
        )
    if metadata.get("module") != module:
        raise FormatError(f"{path} holds the module {metadata.get('module')!r}; expected {module!r}.")
    names = {"codes", "scales", "zeros"} | ({"lora_A", "lora_B"} if "alpha" in metadata else set())
    if set(tensors) != names:
        raise FormatError(f"{path} holds the tensors {sorted(tensors)}; expected {sorted(names)}.")
    try:
        spec = QuantSpec(**parse_json(metadata.get("spec", ""), f"{path}: spec"))
        alpha = float(metadata["alpha"]) if "alpha" in metadata else None
        certificate = None
        if "certificate" in metadata:
            values = parse_json(metadata["certificate"], f"{path}: certificate")
            # JSON has no tuples, and a certificate is equal only to one that holds what it held.
            tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            certificate = LayerCertificate(**(values | tuples))
    except FormatError:
        raise
    except (TypeError, ValueError, CloqError) as error:  # CloqError: a grid that QuantSpec refuses
        raise FormatError(f"{path} has a damaged header ({error}).") from None
    if alpha is not None and not math.isfinite(alpha):
        raise FormatError(f"{path} has a damaged header (alpha {alpha}).")
    if type(spec.bits) is not int or type(spec.group_size) is not int or type(spec.symmetric) is not bool:
        raise FormatError(f"{path} has a damaged header (spec {metadata['spec']}).")
    return spec, alpha, certificate


@contextlib.contextmanager
def _remedy(path: Path) -> Iterator[None]:
    try:
        yield
    except (FormatError, ShapeError, NonFiniteError) as error:
        text = str(error)
        named = text if str(path) in text else f"{path}: {text}"
        raise FormatError(
            f"{named} Delete this file and run the same command again: only this layer is made anew."
        ) from None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirectoryError(
            f"{folder} cannot be read: {error.strerror or error}; check its permissions."
        ) from error


def _checked_name(name: str, what: str) -> str:
    if _SAFE_NAME.fullmatch(name) is None or len(name) > 200:
        raise RunDirectoryError(
            f"the {what} {name[:80]!r} cannot be a file name; allowed are up to 200 letters, digits, '_', '-' and '.', "
            "not starting with '.'."
        )
    return name


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    # What a round trip through run.json makes of it: tuples become lists, keys become text.
    plain: dict[str, Any] = json.loads(json.dumps(dict(recipe)))
    return plain


def _shown(value: Any) -> str:
    if value == "":
        return "empty"
    return value if isinstance(value, str) else json.dumps(value)


def _short(fingerprint: str) -> str:
    return fingerprint[:19] + "…" if len(fingerprint) > 20 else fingerprint


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
