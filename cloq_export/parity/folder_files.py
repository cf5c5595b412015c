"""Whether an export holds no file that an engine may read and this gate did not compare."""

from __future__ import annotations

import filecmp
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cloq_export.artifact.certificate import CERTIFICATE_NAME
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.covered_files import entries_of
from cloq_export.artifact.provenance import PROVENANCE_NAME
from cloq_export.errors import CloqError, FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.shards import INDEX_NAME
from cloq_export.models.companions import is_companion, is_legal
from cloq_export.models.source import LoadedModel
from cloq_export.parity.provenance import CONTRADICTED, PROVEN, Finding, join_some

_TOKENIZER_FILE, _SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
# What the tokenizer was read from, if there is a tokenizer.json; its ids, settings and templates are compared.
_OF_TOKENIZER = (
    *(_TOKENIZER_FILE, _SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
_TEMPLATES = "additional_chat_templates/"
_COMPARED = ("config.json", "generation_config.json", CERTIFICATE_NAME, PROVENANCE_NAME, "README.md")
_ADAPTERS = "adapters/"
# What a tokenizer.json does to every text, for programs that read the file without transformers, which sets both anew.
_DONE_TO_ALL = ("truncation", "padding")
# Settings that some readers go by where the class that reads them here does not.
_ADDED = ("add_bos_token", "add_eos_token")


def compare_files(checkpoint: Checkpoint, loaded: LoadedModel) -> Finding:
    """Compare the files of an export that nothing else compares with those of the float model.

    What travels with a model must be the float model's own, byte for byte. Anything else, such as a second set of
    weights, code, or an adapter beside config.json, may be read by an engine in the place of what was compared.

    Args:
        checkpoint: the export.
        loaded: the float model with its tokenizer.
    """
    try:
        faults = list(_faults(checkpoint, loaded))
    except FormatError as error:
        return Finding("files", CONTRADICTED, str(error))
    return Finding("files", CONTRADICTED, join_some(faults, "; ")) if faults else Finding("files", PROVEN)


def _faults(checkpoint: Checkpoint, loaded: LoadedModel) -> Iterator[str]:
    folder, home = checkpoint.folder, loaded.source.folder if loaded.source.kind == "folder" else None
    weights = {file.path.relative_to(folder).as_posix() for file in checkpoint.files.values()}
    names = entries_of(folder)
    if weights != {"model.safetensors"}:
        weights.add(INDEX_NAME)
    compared = {*_COMPARED, *weights, *_read_by_tokenizer(names, loaded.tokenizer)}
    for name in names:
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if name in compared or hidden or name.startswith(_ADAPTERS) or is_legal(name):
            continue
        if not is_companion(name):
            yield f"{name!a:.80} is none of the files that were compared, and engines may read it"
        elif home is None or not (home / name).is_file():
            yield f"{name!a:.80} is not among the float model's files"
        elif not _same_file(folder / name, home / name):
            yield f"{name!a:.80} is not the float model's"
    # Where the source is a folder, both files are copies as a rule.
    if home is None or not _same_file(folder / _TOKENIZER_FILE, home / _TOKENIZER_FILE):
        for key in _DONE_TO_ALL:
            if _stated(folder, _TOKENIZER_FILE, key) not in (None, _stated(home, _TOKENIZER_FILE, key)):
                yield f"{_TOKENIZER_FILE} sets {key} for every text, and the float model's does not"
    for key in _ADDED:
        own, theirs = _stated(folder, _SETTINGS_FILE, key), _stated(home, _SETTINGS_FILE, key)
        theirs = getattr(loaded.tokenizer, key, None) if theirs is None else theirs
        if own is not None and bool(own) != bool(theirs):
            yield f"{_SETTINGS_FILE} says {key} {own!r:.20}, and the float model's says {theirs!r:.20}"


def _read_by_tokenizer(names: Collection[str], tokenizer: Any) -> set[str]:
    """Return the names of files that the tokenizer was read from."""
    found = {*_OF_TOKENIZER, *(name for name in names if name.startswith(_TEMPLATES) and name.endswith(".jinja"))}
    if _TOKENIZER_FILE not in names:
        found |= set(tokenizer.vocab_files_names.values())
    return found


def _same_file(own: Path, theirs: Path) -> bool:
    return own.is_file() and theirs.is_file() and filecmp.cmp(own, theirs, shallow=False)


def _stated(folder: Path | None, name: str, key: str) -> Any:
    """Return what a JSON file of a folder says; None where it says nothing or cannot be read."""
    if folder is None or not (folder / name).is_file():
        return None
    try:
        return read_json(folder / name).get(key)
    except CloqError:
        return None
