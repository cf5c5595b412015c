"""README.md of an export: the hub's metadata header, what was measured, and how each engine loads it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from cloq_export.artifact.base_license import CARD_NAME, License
from cloq_export.artifact.hub import is_repo_id
from cloq_export.artifact.markdown_text import (
    code_span,
    fenced_block,
    label_of,
    number_text,
    one_line,
    prose,
    table_cell,
)
from cloq_export.errors import FormatError
from cloq_export.files.atomic import write_bytes

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_LICENSE_LINK = re.compile(r"https?://[^\s<>\"'`|]{1,300}|[A-Za-z0-9][\w.\-]{0,100}")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One figure that was measured.

    Args:
        name: what was measured.
        value: the number.
        conditions: how it was measured.
        of: which model.
        standard_error: of the value, or None.

    Raises:
        FormatError: there is no number, or nothing says how it was measured.
    """

    name: str
    value: float
    conditions: str
    of: str = ""
    standard_error: float | None = None

    def __post_init__(self) -> None:
        _require_texts(self, "figure", "name", "conditions")
        for number in (self.value, *([] if self.standard_error is None else [self.standard_error])):
            # A figure comes from a report on disk.
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise FormatError(f"the figure {one_line(self.name)} is {number!r}; only measured numbers are shown.")

    def row(self) -> dict[str, str]:
        """Return its cells."""
        numbers = [self.value] if self.standard_error is None else [self.value, self.standard_error]
        value = " ± ".join(map(number_text, numbers))
        return {"name": prose(self.name), "of": prose(self.of), "value": value, "conditions": prose(self.conditions)}


@dataclasses.dataclass(frozen=True)
class MadeFrom:
    """What a card says of the float model and of the way from there.

    Args:
        base_model: its hub id or name; of a path only the last part is shown.
        method: how the codes were made.
        rank: of the adapter that was made with them, or None.
        license: of the base, or None if its files do not say.
        figures: what was measured.

    Raises:
        FormatError: a text is missing.
    """

    base_model: str
    method: str
    rank: int | None = None
    license: License | None = None
    figures: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        _require_texts(self, "model card", "base_model", "method")

    @property
    def hub_id(self) -> str | None:
        """Return the hub id of the base, None if its name is none."""
        return self.base_model if "/" in self.base_model and is_repo_id(self.base_model) else None

    @property
    def shown_name(self) -> str:
        """Return the name of the base; a local path is not shown."""
        return self.hub_id or re.split(r"[/\\]", self.base_model.strip().rstrip("/\\"))[-1]


@dataclasses.dataclass(frozen=True)
class CardAdapter:
    """An adapter in an export: its name, and what is known of it."""

    name: str
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class EngineLines:
    """How one engine loads an export.

    Args:
        engine: its name.
        snippet: the lines.
        version: that they were written for.
        note: what else is needed.
        language: of the lines.

    Raises:
        FormatError: a text is missing.
    """

    engine: str
    snippet: str
    version: str = ""
    note: str = ""
    language: str = "python"

    def __post_init__(self) -> None:
        _require_texts(self, "engine of a model card", "engine", "snippet")

    def section(self) -> dict[str, str]:
        """Return the texts of its section."""
        title = f"{self.engine} {self.version}" if self.version else self.engine
        return {
            "title": prose(title),
            "note": prose(self.note),
            "snippet": fenced_block(self.snippet, self.language),
        }


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What is known of an export; nothing else is said.

    Args:
        made_from: the float model and the method.
        layout: how the codes are stored.
        base_fingerprint: of the codes.
        bits: widths that occur; empty where there are no codes.
        group_size: of most layers; -1 is one group per output channel.
        symmetric: whether the grid is.
        dtype: of the float tensors, or None.
        relation: to the base.
        library_name: that loads it.
        adapters: that lie in it.
        engines: that load it.
        certificate: what its certificate covers; empty without one.
        notes: sentences.

    Raises:
        FormatError: a text is missing.
    """

    made_from: MadeFrom
    layout: str
    base_fingerprint: str
    bits: tuple[int, ...] = ()
    group_size: int | None = None
    symmetric: bool | None = None
    dtype: str | None = None
    relation: Literal["quantized", "adapter"] = "quantized"
    library_name: str = "transformers"
    adapters: tuple[CardAdapter, ...] = ()
    engines: tuple[EngineLines, ...] = ()
    certificate: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_texts(self, "model card", "layout", "base_fingerprint")

    @property
    def widths(self) -> str:
        """Return "2", or "2/4" for a mix."""
        return "/".join(map(str, sorted(set(self.bits))))


def model_card(facts: CardFacts) -> str:
    """Return the card of an export; only what stands in the facts is said, and no figure without its conditions.

    Every text is taken as hostile: it becomes one line without control characters, and no text can end the header,
    a table cell or a code block.

    Args:
        facts: what is known of the export.

    Returns:
        The text of README.md.
    """
    name, widths = facts.made_from.shown_name, facts.widths
    title = " ".join([name.rpartition("/")[2], *([f"{widths}-bit"] if widths else []), facts.layout])
    stated = _license(facts.made_from.license)
    card = ModelCard.from_template(
        _card_data(facts, stated),
        template_path=str(_TEMPLATE),
        title=prose(title),
        summary=_summary(facts),
        rows=_rows(facts),
        license_note=""
        if stated
        else "The licence of the base model applies; the files that this was made from do not say which it is.",
        notes=[prose(note) for note in facts.notes],
        figures=[figure.row() for figure in facts.made_from.figures],
        adapters=[_adapter(adapter) for adapter in facts.adapters],
        engines=[engine.section() for engine in facts.engines],
        certificate=[(prose(label_of(key)), table_cell(value)) for key, value in facts.certificate.items()],
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def write_model_card(folder: str | os.PathLike[str], facts: CardFacts) -> Path:
    """Write README.md into a folder, whole or not at all; an earlier one is replaced.

    Args:
        folder: an existing folder.
        facts: what is known of the export.

    Returns:
        The file.

    Raises:
        RunDirectoryError: the folder cannot be written.
    """
    path = Path(folder) / CARD_NAME
    write_bytes(path, model_card(facts).encode("utf-8", "replace"))
    return path


def _require_texts(owner: Any, what: str, *names: str) -> None:
    for name in names:
        text = getattr(owner, name)
        if not isinstance(text, str) or not text.strip():
            raise FormatError(f"a {what} needs {name}, a text; it is {text!r:.80}.")


def _card_data(facts: CardFacts, stated: Mapping[str, str]) -> ModelCardData:
    tags = ["cloq", facts.layout, *(f"{width}-bit" for width in facts.widths.split("/") if width)]
    hub_id = facts.made_from.hub_id
    content: dict[str, Any] = {
        "base_model": hub_id,
        **stated,
        "library_name": one_line(facts.library_name),
        "pipeline_tag": "text-generation",
        "tags": [one_line(tag) for tag in (*tags, *(["lora"] if facts.made_from.rank else []))],
    }
    if hub_id is not None:
        content["base_model_relation"] = facts.relation
    return ModelCardData(**content)


def _license(stated: License | None) -> dict[str, str]:
    """Return the licence as the hub's header takes it: an identifier, or "other" with a name."""
    if stated is None or not stated.license.strip():
        return {}
    identifier = stated.license.strip().lower()
    known = _LICENSE_ID.fullmatch(identifier) is not None
    header = {"license": identifier if known else "other"}
    name = stated.license_name or (None if known else stated.license)
    if name:
        header["license_name"] = one_line(name)
    if stated.license_link is not None and _LICENSE_LINK.fullmatch(stated.license_link.strip()):
        header["license_link"] = stated.license_link.strip()
    return header


def _summary(facts: CardFacts) -> str:
    what = f"A {facts.widths}-bit export" if facts.widths else "An export"
    count = len(facts.adapters)
    adapters = {0: "", 1: " with a LoRA adapter"}.get(count, f" with {count} LoRA adapters")
    figures = " The figures below were measured; nothing else is claimed." if facts.made_from.figures else ""
    return f"{what} of {code_span(facts.made_from.shown_name)}{adapters}, made by cloq\\_export.{figures}"


def _rows(facts: CardFacts) -> list[tuple[str, str]]:
    widths, symmetric = facts.widths, facts.symmetric
    rows: list[tuple[str, Any]] = [
        ("base model", facts.made_from.shown_name),
        ("method", facts.made_from.method),
        ("layout", facts.layout),
        ("bits", int(widths) if widths.isdigit() else widths or None),
        ("group size", "one group per output channel" if facts.group_size == -1 else facts.group_size),
        ("grid", None if symmetric is None else "symmetric" if symmetric else "asymmetric"),
        ("adapter rank", facts.made_from.rank),
        ("dtype", facts.dtype),
        ("base fingerprint", facts.base_fingerprint),
    ]
    return [(label, table_cell(value)) for label, value in rows if value is not None]


def _adapter(adapter: CardAdapter) -> tuple[str, str]:
    facts = [f"{prose(label_of(key))} {table_cell(value)}" for key, value in adapter.facts.items()]
    return code_span(adapter.name), ", ".join(facts)
