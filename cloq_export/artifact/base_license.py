"""The licence of a float model, as its folder states it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.models.companions import is_legal

CARD_NAME = "README.md"

_LICENSE_LINE = re.compile(r"^(license(?:_name|_link)?):[ \t]*(.{0,300})$((?:\n[ \t]*-[ \t].{0,100}$)*)", re.MULTILINE)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_README_BYTES = 256 * 1024


@dataclasses.dataclass(frozen=True)
class License:
    """A licence as the hub's header states it; its texts are not trusted.

    Args:
        license: an identifier, "other", or any text.
        license_name: of one that has no identifier, or None.
        license_link: to its text, or None.
    """

    license: str
    license_name: str | None = None
    license_link: str | None = None

    @classmethod
    def from_json(cls, entry: Any) -> License | None:
        """Return the licence that a JSON object holds, None if it holds none."""
        if not isinstance(entry, Mapping):
            return None
        texts = {
            field.name: entry[field.name]
            for field in dataclasses.fields(cls)
            if isinstance(entry.get(field.name), str) and entry[field.name].strip()
        }
        return cls(**texts) if "license" in texts else None

    def to_json(self) -> dict[str, str]:
        """Return the licence as a JSON object."""
        return {name: text for name, text in dataclasses.asdict(self).items() if text is not None}


def base_license(folder: str | os.PathLike[str]) -> License | None:
    """Return the licence of a model from its folder: the header of README.md, else config.json, else a LICENSE file.

    Args:
        folder: the folder of the float model.

    Returns:
        The licence; None if the folder does not say.

    Raises:
        FormatError: a file of the folder is a link that leads out of it.
    """
    folder = Path(folder)
    stated = License.from_json(_header_of(folder)) or _license_of_config(folder)
    if stated is not None:
        return stated
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and is_legal(path.name))
    # A licence before its notices.
    files.sort(key=lambda name: re.match("licen[cs]e", name, re.IGNORECASE) is None)
    return License("other", "license-of-the-base-model", files[0]) if files else None


def _header_of(folder: Path) -> dict[str, str]:
    """Return what the header of a model's card says of its licence."""
    readme = folder / CARD_NAME
    if not readme.is_file():
        return {}
    with open(require_inside(folder, readme), "rb") as file:
        text = file.read(_README_BYTES).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    header = _HEADER.match(text)
    stated: dict[str, str] = {}
    # Only these lines are parsed: a header is YAML, of which a few lines can expand to more than memory holds.
    for key, value, items in _LICENSE_LINE.findall(header[1]) if header else ():
        parsed = [_scalar(item.strip().removeprefix("-")) for item in items.splitlines() if item.strip()]
        words = [word for word in ([_scalar(value)] if value.strip() else parsed) if word]
        if words:
            stated.setdefault(key, ", ".join(words))
    return stated


def _license_of_config(folder: Path) -> License | None:
    if not (folder / "config.json").is_file():
        return None
    try:
        return License.from_json(read_json(require_inside(folder, folder / "config.json")))
    except FormatError:
        return None


def _scalar(text: str) -> str:
    """Return what a short piece of YAML says if it is a text, and nothing otherwise."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    return value.strip() if isinstance(value, str) else ""
