"""RUN/run.json: the recipe of a run, what it is made from, and how far it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloq_export.errors import FormatError, RunDirectoryError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.spelled_paths import is_same_place
from cloq_export.recipe import NOT_IN_THE_BYTES

MANIFEST_NAME = "run.json"
RUN_FORMAT = "cloq-run"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RunManifest:
    """The content of run.json.

    Args:
        recipe: every option of the run, as JSON holds it.
        source_fingerprint: of the model's files.
        state: how far the run is.
        versions: of the software that started it.
        later_versions: of the software that went on with it, where they differ.
    """

    recipe: Mapping[str, Any]
    source_fingerprint: str
    state: str
    versions: Mapping[str, str]
    later_versions: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def read(cls, folder: Path) -> RunManifest:
        """Read the manifest of a folder.

        Raises:
            RunDirectoryError: run.json is of another program.
            FormatError: it is damaged, or of another version.
        """
        path = folder / MANIFEST_NAME
        content = read_json(path)
        if content.get("format") != RUN_FORMAT:
            raise RunDirectoryError(f"{path} was not written by cloq, so {folder} is not a run; choose another folder.")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {version!r}; this program reads {FORMAT_VERSION}. Use the cloq_export that "
                "made the run."
            )
        for key, kind in (("recipe", dict), ("source_fingerprint", str), ("state", str), ("versions", dict)):
            if not isinstance(content.get(key), kind):
                raise FormatError(
                    f"{path} lacks a valid {key!r}; the file is damaged: start the run in another folder."
                )
        later = content.get("later_versions", [])
        if not isinstance(later, list):
            raise FormatError(
                f"{path} lacks a valid 'later_versions'; the file is damaged: start the run in another folder."
            )
        return cls(
            content["recipe"], content["source_fingerprint"], content["state"], content["versions"], tuple(later)
        )

    def write(self, folder: Path) -> None:
        """Write run.json into a folder.

        Raises:
            RunDirectoryError: it cannot be written.
        """
        # The recipe keeps its own order of options: it is read by people, and patterns in it may depend on order.
        write_json(folder / MANIFEST_NAME, self.to_json(), sort_keys=False)

    def to_json(self) -> dict[str, Any]:
        """Return the content of run.json."""
        content = {
            "format": RUN_FORMAT,
            "format_version": FORMAT_VERSION,
            "recipe": dict(self.recipe),
            "source_fingerprint": self.source_fingerprint,
            "state": self.state,
            "versions": dict(self.versions),
        }
        return content | ({"later_versions": list(self.later_versions)} if self.later_versions else {})

    def refuse_difference(self, folder: Path, recipe: Mapping[str, Any], source_fingerprint: str) -> None:
        """Refuse to continue the run with other options, or from another model.

        Raises:
            RunDirectoryError: they differ in what the layers depend on.
        """
        faults = recipe_difference(self.recipe, recipe)
        if self.source_fingerprint != source_fingerprint:
            held, asked = _shortened(self.source_fingerprint), _shortened(source_fingerprint)
            faults.append(f"source model: {held} in the run, {asked} asked")
        if faults:
            raise RunDirectoryError(
                f"{folder} holds another run: {'; '.join(faults)}. Use the run's own options to continue it, or "
                "choose another folder with `out`."
            )

    def renewed(self, recipe: Mapping[str, Any], versions: Mapping[str, str]) -> RunManifest:
        """Return the manifest of the run as it is continued: options outside the bytes, and versions that differ."""
        free = {name: value for name, value in recipe.items() if name in NOT_IN_THE_BYTES}
        later = self.later_versions
        if versions != self.versions and versions not in later:
            later = (*later, dict(versions))
        return dataclasses.replace(self, recipe={**self.recipe, **free}, later_versions=later)


def recipe_difference(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return what keeps two recipes from being the same run, as lines "bits: 2 in the run, 3 asked".

    Args:
        held: the recipe of the run.
        asked: the recipe that is asked for.

    Returns:
        One line per option, sorted; options that do not change the layers are passed over.
    """
    held, asked = as_json(held), as_json(asked)
    lines = []
    for key in sorted({*held, *asked} - set(NOT_IN_THE_BYTES)):
        if is_same_place(held.get(key), asked.get(key)):
            continue
        if (key in held) != (key in asked) or held.get(key) != asked.get(key):
            before, now = (_shown(side[key]) if key in side else "not set" for side in (held, asked))
            lines.append(f"{key}: {before} in the run, {now} asked")
    return lines


def as_json(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a round trip through run.json makes of a recipe: tuples become lists, keys become text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(recipe)))
    return plain


def _shown(value: Any) -> str:
    if value == "":
        return "empty"
    return value if isinstance(value, str) else json.dumps(value)


def _shortened(fingerprint: str) -> str:
    return fingerprint[:19] + "…" if len(fingerprint) > 20 else fingerprint
