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
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloq_export.artifact.adapters import ADAPTERS_NAME, AdapterShelf
from cloq_export.artifact.run_layers import LayerFile, StoredLayer, read_layer_files, remedy_named, write_layer_file
from cloq_export.artifact.run_lock import LOCK_NAME, RunLock
from cloq_export.artifact.run_manifest import MANIFEST_NAME, RunManifest, as_json
from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.atomic import is_partial, remove_partials, translate_os_errors, write_json
from cloq_export.files.fingerprint import combine_digests
from cloq_export.files.safe_json import read_json
from cloq_export.recipe import Recipe
from cloq_export.types import LayerCertificate, LoraPair, QuantizedLayer

_SAFE_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*")


class RunDirectory:
    """One run on disk, opened with `create_or_resume` or `open`.

    Reading needs no lock. The first write takes the lock of the directory, which is held until `close` (or the end of
    a `with` block) and which the operating system frees when the process dies. On Windows there is no lock.

    Args:
        path: the directory.
        manifest: the content of its run.json.
    """

    def __init__(self, path: Path, manifest: RunManifest) -> None:
        self.path = path
        self._manifest = manifest
        self._held = RunLock(path)

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
        folder, asked = Path(path), as_json(recipe)
        with translate_os_errors(folder):
            if folder.exists() and not folder.is_dir():
                raise RunDirectoryError(f"{folder} is a file; choose a folder with `out`.")
            if folder.is_dir() and not (folder / MANIFEST_NAME).exists():
                foreign = sorted(e.name for e in folder.iterdir() if e.name != LOCK_NAME and not is_partial(e.name))
                if foreign:
                    raise RunDirectoryError(
                        f"{folder} holds {_some(foreign)} but no {MANIFEST_NAME}, so it is not a run; choose an empty "
                        "or new folder with `out`."
                    )
            folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, RunManifest(asked, source_fingerprint, "running", dict(versions)))
        run._take_lock()
        try:
            if (folder / MANIFEST_NAME).exists():
                run._manifest = RunManifest.read(folder)
                run._manifest.refuse_difference(folder, asked, source_fingerprint)
                run._write_manifest(run._manifest.renewed(asked, versions))
            else:
                run._manifest.write(folder)
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
        return cls(folder, RunManifest.read(folder))

    @staticmethod
    def is_run(path: str | os.PathLike[str]) -> bool:
        """Return whether a folder holds a run's manifest (which may still be damaged)."""
        return (Path(path) / MANIFEST_NAME).is_file()

    def close(self) -> None:
        """Give the lock back; the object can still read."""
        self._held.give_back()

    def lock(self) -> None:
        """Take the lock now, before the first write.

        Raises:
            RunDirectoryError: another process works in the run, or it cannot be written.
        """
        if self._take_lock():
            # Another process may have gone on with the run since it was opened for reading.
            self._manifest = RunManifest.read(self.path)

    def _take_lock(self) -> bool:
        if not self._held.take():
            return False
        for folder in (self.path, self.path / "layers", self.path / "reports", self.path / ADAPTERS_NAME):
            remove_partials(folder)
        return True

    def discard_if_empty(self) -> None:
        """Remove the run, folder included if nothing else is in it, unless a layer or work on one was ever written.

        There is nothing to continue then, and a manifest would only refuse another recipe. It gives the lock back.
        """
        with contextlib.suppress(OSError):
            (self.path / "work").rmdir()
        if _entries(self.path / "layers") or _entries(self.path / "work"):
            return
        self.lock()
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
    def manifest(self) -> RunManifest:
        """Return the content of run.json."""
        return self._manifest

    @property
    def recipe(self) -> Recipe:
        """Return every option of the run.

        Raises:
            RecipeError: run.json holds an option that there is not, or a value that is not allowed.
        """
        return Recipe.from_mapping(self._manifest.recipe)

    @property
    def state(self) -> str:
        """Return how far the run is: "running" at first, then what `set_state` was given."""
        return self._manifest.state

    @property
    def source_fingerprint(self) -> str:
        """Return the fingerprint of the model that the run was made from."""
        return self._manifest.source_fingerprint

    def set_state(self, state: str) -> None:
        """Record how far the run is, in a word such as "running", "quantized" or "done".

        Raises:
            RunDirectoryError: the run cannot be written.
        """
        self.lock()
        self._write_manifest(dataclasses.replace(self._manifest, state=state))

    def set_overrides(self, overrides: list[dict[str, Any]]) -> None:
        """Record the overrides, as `Recipe.to_mapping` lists them, that a run chose before its first layer.

        Raises:
            RunDirectoryError: the run cannot be written.
        """
        self.lock()
        recipe = {**self._manifest.recipe, "overrides": overrides}
        self._write_manifest(dataclasses.replace(self._manifest, recipe=recipe))

    @property
    def checkpoint_path(self) -> Path:
        """Return where the packed checkpoint stands."""
        return self.path / "checkpoint"

    def adapter_path(self, name: str) -> Path:
        """Return where the adapter of a name stands.

        Raises:
            RunDirectoryError: the name cannot be a folder name.
        """
        return self.path / ADAPTERS_NAME / _checked_name(name, "adapter name")

    @property
    def adapters(self) -> AdapterShelf:
        """Return the adapters in the run."""
        return AdapterShelf.of(self.path)

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
        self.lock()
        self._make_folder(path.parent)
        write_layer_file(path, module, StoredLayer(quantized, lora, certificate))

    def layer_file(self, module: str) -> LayerFile:
        """Return one finished layer with its header read: grid, shape, digest and certificate.

        Raises:
            FormatError: the layer is missing or damaged.
        """
        path = self.layer_path(module)
        if not path.exists():
            raise FormatError(f"{self.path} has no finished layer {module}; run the command again to make it.")
        with remedy_named(path):
            return LayerFile(path, module)

    def read_codes(self, module: str) -> QuantizedLayer:
        """Return codes, scales and zeros of one finished layer; raises as `layer_file`."""
        return self.layer_file(module).read_codes()

    def read_pair(self, module: str) -> LoraPair | None:
        """Return the adapter pair of one finished layer, or None; raises as `layer_file`."""
        return self.layer_file(module).read_pair()

    def read_layer(self, module: str) -> StoredLayer:
        """Return codes, pair and certificate of one finished layer, on the CPU.

        Raises:
            FormatError: the layer is missing or damaged.
        """
        file = self.layer_file(module)
        return StoredLayer(file.read_codes(), file.read_pair(), file.certificate)

    def layer_files(self) -> dict[str, LayerFile]:
        """Return the finished and whole layers, headers read, in the order of the model's blocks."""
        return read_layer_files(_entries(self.path / "layers"))[0]

    def completed_modules(self) -> set[str]:
        """Return the modules whose layer is finished and whole; `damaged_layers` tells of the others."""
        return set(self.layer_files())

    def damaged_layers(self) -> dict[str, str]:
        """Return the modules whose layer file is damaged, with the reason; they count as not done.

        Writes are atomic, so only a failing disk or another program can damage one.
        """
        return read_layer_files(_entries(self.path / "layers"))[1]

    def certificates(self) -> list[LayerCertificate]:
        """Return the certificates of all finished layers, in the order of the model's blocks."""
        return [file.certificate for file in self.layer_files().values() if file.certificate is not None]

    def digests(self) -> dict[str, str]:
        """Return module -> `layer_digest` of all finished layers, in the order of the model's blocks.

        They stand in the headers; only of layers that an older version wrote are codes read.

        Raises:
            FormatError: codes have to be read, and are damaged.
        """
        return {module: file.digest for module, file in self.layer_files().items()}

    def base_fingerprint(self) -> str:
        """Return the fingerprint of the finished layers, from their `digests`."""
        return combine_digests(self.digests())

    def write_report(self, name: str, content: Any) -> None:
        """Write a report as JSON.

        Args:
            name: the report, e.g. "evaluation".
            content: mappings, sequences, dataclasses, numbers, text; NaN and Inf become null.

        Raises:
            RunDirectoryError: the run cannot be written, or the name cannot be a file name.
        """
        path = self._report_path(name)
        self.lock()
        self._make_folder(path.parent)
        write_json(path, content)

    def read_report(self, name: str) -> dict[str, Any]:
        """Return a report, which must be a mapping.

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

    def _make_folder(self, folder: Path) -> None:
        with translate_os_errors(folder):
            folder.mkdir(exist_ok=True)

    def _write_manifest(self, manifest: RunManifest) -> None:
        if manifest != self._manifest:
            manifest.write(self.path)
            self._manifest = manifest


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


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
