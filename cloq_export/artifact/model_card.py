"""README.md of an export: the hub's metadata header, what was measured, and how each engine loads it."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from cloq_export.artifact.hub import is_repo_id
from cloq_export.errors import FormatError
from cloq_export.files.atomic import write_bytes
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.models.companions import is_legal

CARD_NAME = "README.md"
RELATIONS = ("quantized", "adapter", "merge", "finetune")

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_REQUIRED = ("base_model", "method", "layout", "base_fingerprint")
_OPTIONAL = (
    *("title", "base_model_id", "license", "license_name", "license_link", "library_name", "relation", "tags"),
    *("bits", "group_size", "symmetric", "rank", "dtype", "bits_per_weight", "producer", "notes"),
    *("figures", "adapters", "engines", "certificate"),
)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")
_LICENSE_LINK = re.compile(r"https?://[^\s<>\"'`|]{1,300}|[A-Za-z0-9][\w.\-]{0,100}")
_LICENSE_LINE = re.compile(r"^(license(?:_name|_link)?):[ \t]*(.{0,300})$((?:\n[ \t]*-[ \t].{0,100}$)*)", re.MULTILINE)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_README_BYTES = 256 * 1024
# At the start of a line these open a list, a rule or a heading: "-", "+", "=", "1." and "1)".
_BLOCK_START = re.compile(r"^(\d{0,9})([-+=.)])")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~#$&])")


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card of an export; only what stands in the facts is said, and no figure without its conditions.

    Every text is taken as hostile: it becomes one line without control characters, and no text can end the header,
    a table cell or a code block.

    Args:
        facts: what is known of the export:

            - base_model: name of the float model as the user gave it; of a path only its last part is shown.
            - base_model_id: its hub id, for the header. If the key is absent, base_model is taken for one when it
              reads `owner/name`; None if the model has none.
            - license, license_name, license_link: of the base, as from `base_license`.
            - method, layout, base_fingerprint: how the codes were made, how they are stored, which base they are.
            - bits (a number, or several), group_size (-1 is one group per output channel), symmetric, rank, dtype,
              bits_per_weight, producer.
            - title, tags, library_name ("transformers"), relation to the base (one of `RELATIONS`, "quantized").
            - figures: list of {"name", "value", "conditions"} and optionally "of" (which model) and "standard_error".
            - adapters: list of {"name"} and any further facts, e.g. "rank", "dtype", "split".
            - engines: list of {"engine", "snippet"} and optionally "version", "note" and "language" ("python").
            - certificate: what the certificate says, e.g. {"file": ..., "modules": ..., "verified": ...}.
            - notes: list of sentences.

    Returns:
        The text of README.md.

    Raises:
        FormatError: a fact is missing, unknown, or not what it should be.
    """
    _check_facts(facts)
    name, hub_id = _base_model(facts)
    layout = str(facts["layout"])
    widths = _widths(facts.get("bits"))
    title = facts.get("title") or " ".join([name.rpartition("/")[2], *([f"{widths}-bit"] if widths else []), layout])
    card = ModelCard.from_template(
        _card_data(facts, hub_id, widths),
        template_path=str(_TEMPLATE),
        title=_prose(title),
        summary=_summary(facts, name, widths),
        rows=_rows(facts, name, widths),
        license_note=_license_note(facts),
        notes=[_prose(note) for note in facts.get("notes") or ()],
        figures=[_figure(figure) for figure in facts.get("figures") or ()],
        adapters=[_adapter(adapter) for adapter in facts.get("adapters") or ()],
        engines=[_engine(engine) for engine in facts.get("engines") or ()],
        certificate=[(_prose(_label(key)), _cell(value)) for key, value in (facts.get("certificate") or {}).items()],
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def write_model_card(folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> Path:
    """Write README.md into a folder, whole or not at all; an earlier one is replaced.

    Args:
        folder: an existing folder.
        facts: as in `model_card`.

    Returns:
        The file.

    Raises:
        FormatError: as in `model_card`.
        RunDirectoryError: the folder cannot be written.
    """
    path = Path(folder) / CARD_NAME
    write_bytes(path, model_card(facts).encode("utf-8", "replace"))
    return path


def base_license(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the licence of a model from its folder: the header of README.md, else config.json, else a LICENSE file.

    Args:
        folder: the folder of the float model.

    Returns:
        "license" and, where they are given, "license_name" and "license_link"; empty if the folder does not say.

    Raises:
        FormatError: a file of the folder is a link that leads out of it.
    """
    folder = Path(folder)
    found: dict[str, str] = {}
    readme = folder / CARD_NAME
    if readme.is_file():
        with open(require_inside(folder, readme), "rb") as file:
            text = file.read(_README_BYTES).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
        header = _HEADER.match(text)
        # Only these lines are parsed: a header is YAML, in which a few lines can describe more than fits any memory.
        for key, value, items in _LICENSE_LINE.findall(header[1]) if header else ():
            parsed = [_scalar(item.strip().removeprefix("-")) for item in items.splitlines() if item.strip()]
            words = [word for word in ([_scalar(value)] if value.strip() else parsed) if word]
            if words:
                found.setdefault(key, ", ".join(words))
    if not found and (folder / "config.json").is_file():
        try:
            stated = read_json(require_inside(folder, folder / "config.json")).get("license")
        except FormatError:
            stated = None
        if isinstance(stated, str) and stated.strip():
            found["license"] = stated
    if not found:
        files = sorted(path.name for path in folder.iterdir() if path.is_file() and is_legal(path.name))
        # A licence before its notices.
        files.sort(key=lambda name: re.match("licen[cs]e", name, re.IGNORECASE) is None)
        if files:
            found = {"license": "other", "license_name": "license-of-the-base-model", "license_link": files[0]}
    return found


def _check_facts(facts: Mapping[str, Any]) -> None:
    for key in _REQUIRED:
        if not isinstance(facts.get(key), str) or not facts[key].strip():
            raise FormatError(f"a model card needs {key}, a text; it is {facts.get(key)!r}.")
    for key in facts:
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise FormatError(
                f"a model card has no place for {key!r}; allowed are {', '.join((*_REQUIRED, *_OPTIONAL))}."
            )
    if facts.get("relation", RELATIONS[0]) not in RELATIONS:
        raise FormatError(f"relation is {facts['relation']!r}; allowed are {', '.join(RELATIONS)}.")
    for key in ("figures", "adapters", "engines", "notes", "tags"):
        value = facts.get(key)
        if value is not None and (not isinstance(value, Sequence) or isinstance(value, str)):
            raise FormatError(f"{key} of a model card is a list; it is {value!r}.")


def _base_model(facts: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the name that is shown and the hub id that the header carries."""
    name = facts["base_model"]
    hub_id = facts.get("base_model_id", name if _is_hub_id(name) else None)
    if hub_id is not None:
        if not _is_hub_id(hub_id):
            raise FormatError(f"base_model_id is {hub_id!r}; a hub id reads owner/name. Give None if there is none.")
        return hub_id, hub_id
    # Where a machine keeps its models is nobody else's business.
    return re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1], None


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and "/" in name and is_repo_id(name)


def _card_data(facts: Mapping[str, Any], hub_id: str | None, widths: str) -> ModelCardData:
    tags = ["cloq", facts["layout"], *(f"{width}-bit" for width in widths.split("/") if width)]
    if facts.get("rank"):
        tags.append("lora")
    content: dict[str, Any] = {
        "base_model": hub_id,
        **_license(facts),
        "library_name": _line(facts.get("library_name", "transformers")),
        "pipeline_tag": "text-generation",
        "tags": [_line(tag) for tag in (*tags, *(facts.get("tags") or ()))],
    }
    if hub_id is not None:
        content["base_model_relation"] = facts.get("relation", RELATIONS[0])
    return ModelCardData(**content)


def _license(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence as the hub's header takes it: an identifier, or "other" with a name."""
    stated = facts.get("license")
    if not isinstance(stated, str) or not stated.strip():
        return {}
    identifier = stated.strip().lower()
    known = _LICENSE_ID.fullmatch(identifier) is not None
    found = {"license": identifier if known else "other"}
    name = facts.get("license_name") or (None if known else stated)
    if name:
        found["license_name"] = _line(name)
    link = facts.get("license_link")
    if isinstance(link, str) and _LICENSE_LINK.fullmatch(link.strip()):
        found["license_link"] = link.strip()
    return found


def _license_note(facts: Mapping[str, Any]) -> str:
    if _license(facts):
        return ""
    return "The licence of the base model applies; the files that this was made from do not say which it is."


def _summary(facts: Mapping[str, Any], name: str, widths: str) -> str:
    what = f"A {widths}-bit export" if widths else "An export"
    count = len(facts.get("adapters") or ())
    adapters = {0: "", 1: " with a LoRA adapter"}.get(count, f" with {count} LoRA adapters")
    figures = " The figures below were measured; nothing else is claimed." if facts.get("figures") else ""
    return f"{what} of {_code(name)}{adapters}, made by cloq\\_export.{figures}"


def _rows(facts: Mapping[str, Any], name: str, widths: str) -> list[tuple[str, str]]:
    group = facts.get("group_size")
    symmetric = facts.get("symmetric")
    rows: list[tuple[str, Any]] = [
        ("base model", name),
        ("method", facts["method"]),
        ("layout", facts["layout"]),
        ("bits", int(widths) if widths.isdigit() else widths or None),
        ("group size", "one group per output channel" if group == -1 else group),
        ("grid", None if symmetric is None else "symmetric" if symmetric else "asymmetric"),
        ("adapter rank", facts.get("rank")),
        ("dtype", facts.get("dtype")),
        ("stored bits per weight", facts.get("bits_per_weight")),
        ("base fingerprint", facts["base_fingerprint"]),
        ("made by", facts.get("producer")),
    ]
    return [(label, _cell(value)) for label, value in rows if value is not None]


def _figure(figure: Mapping[str, Any]) -> dict[str, str]:
    for key in ("name", "conditions"):
        if not isinstance(figure.get(key), str) or not figure[key].strip():
            raise FormatError(f"a figure has no {key}: {dict(figure)!r}; only measured figures with both are shown.")
    numbers: list[Any] = [figure.get("value")]
    if figure.get("standard_error") is not None:
        numbers.append(figure["standard_error"])
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise FormatError(f"the figure {_line(figure['name'])} is {number!r}; only measured numbers are shown.")
    return {
        "name": _prose(figure["name"]),
        "of": _prose(figure.get("of", "")),
        "value": " ± ".join(map(_number, numbers)),
        "conditions": _prose(figure["conditions"]),
    }


def _adapter(adapter: Mapping[str, Any]) -> tuple[str, str]:
    if not isinstance(adapter.get("name"), str):
        raise FormatError(f"an adapter of a model card has a name; this one is {dict(adapter)!r}.")
    others = [f"{_prose(_label(key))} {_cell(value)}" for key, value in adapter.items() if key != "name"]
    return _code(adapter["name"]), ", ".join(others)


def _engine(engine: Mapping[str, Any]) -> dict[str, str]:
    for key in ("engine", "snippet"):
        if not isinstance(engine.get(key), str) or not engine[key].strip():
            raise FormatError(f"an engine of a model card has no {key}: {dict(engine)!r}.")
    title = " ".join(str(part) for part in (engine["engine"], engine.get("version")) if part)
    return {
        "title": _prose(title),
        "note": _prose(engine.get("note", "")),
        "snippet": _block(engine["snippet"], str(engine.get("language", "python"))),
    }


def _widths(bits: Any) -> str:
    """Return "2", or "2/4" for a mix."""
    if bits is None:
        return ""
    several = bits if isinstance(bits, Iterable) and not isinstance(bits, str) else [bits]
    widths = sorted(set(several))
    if not all(isinstance(width, int) and not isinstance(width, bool) for width in widths):
        raise FormatError(f"bits of a model card is {bits!r}; expected a number or several.")
    return "/".join(str(width) for width in widths)


def _label(key: Any) -> str:
    return str(key).replace("_", " ")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def _line(text: Any) -> str:
    """Return a text as one line of at most 300 characters, without control and direction characters."""
    spaced = "".join(" " if unicodedata.category(sign)[0] in "CZ" else sign for sign in str(text))
    return " ".join(spaced.split())[:300]


def _prose(text: Any) -> str:
    """Return a text as one line that markdown shows as it is."""
    escaped = _MARKDOWN.sub(r"\\\1", _line(text))
    return _BLOCK_START.sub(r"\1\\\2", escaped)


def _cell(value: Any) -> str:
    """Return a value for a table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return _code(value)


def _code(text: Any) -> str:
    """Return a text as a code span, which also a table cell holds whole."""
    line = _line(text)
    if not line:
        return ""
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}".replace("|", "\\|")


def _block(text: str, language: str) -> str:
    """Return a text as a fenced block that it cannot leave."""
    lines = [
        "".join(sign for sign in line if sign == "\t" or sign.isprintable()) for line in text.strip("\n").splitlines()
    ]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    kind = language if re.fullmatch(r"[a-z]{1,20}", language) else ""
    return "\n".join([f"{fence}{kind}", *lines, fence])


def _scalar(text: str) -> str:
    """Return what a short piece of YAML says if it is a text, and nothing otherwise."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    return value.strip() if isinstance(value, str) else ""
