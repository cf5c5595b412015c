"""Calibration and evaluation texts, and the windows of tokens cut from them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import CalibrationError, DataError, UsageError
from cloq_export.files.spelled_paths import expand_user, split_list
from cloq_export.texts.data_sets import hub_rows, local_file
from cloq_export.texts.examples import forms_of, numbered_rows, text_of
from cloq_export.texts.reading import FILE_SUFFIXES, holds_rows, read_rows, read_text
from cloq_export.texts.tokens import TextTokens
from cloq_export.texts.wikitext import WIKITEXTS, read_wikitext

WIKITEXT2 = "wikitext2"
GSM8K = "gsm8k"
EMBEDDED = "embedded"

_GSM8K_HUB = ("openai/gsm8k", "main")
_REMEDY = (
    "Name a text file or 'embedded' instead, or put the data set's files in the folder that the environment variable "
    "CLOQ_DATA names."
)


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """A text and where it came from.

    Args:
        text: the whole text, not empty.
        origin: a file path, "hub:<id>", or "embedded (<what>)", for reports.
        sha256: of the text in UTF-8, hexadecimal.
        parts: of a mix, the texts from which windows are drawn in turn; empty for one text.
    """

    text: str
    origin: str
    sha256: str
    parts: tuple[CalibrationText, ...] = ()

    @classmethod
    def of(cls, text: str, origin: str) -> CalibrationText:
        """Return the text with its hash.

        Args:
            text: the whole text.
            origin: where it came from, for reports and messages.

        Returns:
            CalibrationText: text, origin and hash.

        Raises:
            CalibrationError: the text is empty or white space, or UTF-8 cannot say it.
        """
        if not text.strip():
            raise CalibrationError(f"the text {origin} is empty; give a file or data set with text in it.")
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError:
            raise CalibrationError(
                f"the text {origin} holds half of a surrogate pair, which is no text; mend it."
            ) from None
        return cls(text, origin, hashlib.sha256(encoded).hexdigest())


def load_text(name: str) -> CalibrationText:
    """Return a calibration text, or a mix of several.

    Args:
        name: "wikitext2" (validation split, from the data folder or the hub; ":SPLIT" names another), "wikitext2-raw"
            (the raw form, its lines joined by two line feeds as papers do; the same splits), "gsm8k" (training split,
            questions and answers), "embedded" (a text that every Python installation has), a file (plain text, or
            .jsonl or .json rows with "text" or with "question" and "answer"), or a hub data set
            `ID[:CONFIG[:SPLIT]]` (split "train" unless named). Several, joined by "+", are a mix.

    Returns:
        CalibrationText: the text with its origin and hash.

    Raises:
        CalibrationError: the text is missing, unreadable, empty, or on the hub without network.
        MissingPackageError: a hub data set is asked for and `datasets` is not installed.
    """
    entries = split_list(name, "+")
    if len(entries) == 1:
        return _load_any(name, "validation", "train")
    parts = tuple(_load_any(entry, "validation", "train") for entry in entries)
    whole = CalibrationText.of("\n\n".join(part.text for part in parts), " + ".join(part.origin for part in parts))
    return dataclasses.replace(whole, parts=parts)


def evaluation_text(name: str) -> CalibrationText:
    """Return a text to measure perplexity on: as `load_text`, but "wikitext2" and "gsm8k" are their test splits.

    Args:
        name: as in `load_text`.

    Returns:
        CalibrationText: the text with its origin and hash.

    Raises:
        CalibrationError: as in `load_text`.
        MissingPackageError: as in `load_text`.
    """
    return _load_any(name, "test", "test")


def tokenize_text(tokenizer: Any, text: str) -> torch.Tensor:
    """Return the token ids of a text, without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text.

    Returns:
        Tensor: (tokens,) int64.
    """
    return torch.tensor(TextTokens(tokenizer).text_ids(text), dtype=torch.int64)


def evaluation_tokens(tokenizer: Any, text: str, window: int, bos: str) -> torch.Tensor:
    """Return the token ids of a text such that, cut into windows, each begins with the begin tokens that bos asks for.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text.
        window: tokens in a window, the begin tokens among them.
        bos: as in `TextTokens.window_begin`.

    Returns:
        Tensor: (tokens,) int64.

    Raises:
        UsageError: as in `TextTokens.window_begin`, or a window has no room behind the begin tokens.
    """
    tokens = TextTokens(tokenizer)
    ids, begin = torch.tensor(tokens.text_ids(text), dtype=torch.int64), tokens.window_begin(bos)
    if not begin:
        return ids
    check_room(begin, window)
    first = torch.tensor(begin, dtype=torch.int64)
    return torch.cat([part for piece in ids.split(window - len(begin)) for part in (first, piece)])


def sample_windows(token_ids: torch.Tensor, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Return random windows of a token sequence; the same arguments always give the same windows.

    Starts are drawn uniformly and independently, so windows may overlap.

    Args:
        token_ids: (tokens,) int64.
        samples: number of windows, at least 1.
        seqlen: tokens per window, at least 1.
        seed: of the draw.

    Returns:
        Tensor: (samples, seqlen) int64.

    Raises:
        CalibrationError: the text is shorter than one window, or no window is asked for.
    """
    starts = sample_starts(token_ids.shape[0], samples, seqlen, seed)
    return token_ids[starts.unsqueeze(1) + torch.arange(seqlen)]


def sample_starts(available: int, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Return the first tokens of the windows of `sample_windows`, (samples,) int64.

    Args:
        available: tokens of the text.
        samples: as there.
        seqlen: as there.
        seed: as there.

    Raises:
        CalibrationError: as there.
    """
    if samples < 1 or seqlen < 1:
        raise CalibrationError(
            f"{samples} windows of {seqlen} tokens were asked for; at least 1 of each is needed (`samples`, `seqlen`)."
        )
    if available < seqlen:
        raise CalibrationError(
            f"the calibration text has {available} tokens, one window needs {seqlen}; give a longer text with "
            "`calibration`, or shorter windows with `seqlen`."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(available - seqlen + 1, (samples,), generator=generator)


def check_room(begin: tuple[int, ...], window: int) -> None:
    """Refuse windows that have no room behind their begin tokens.

    Raises:
        UsageError: they have none.
    """
    if begin and window <= len(begin):
        raise UsageError(
            f"a window has {window} tokens, and {len(begin)} of them begin each window; choose longer windows, or bos "
            "never."
        )


def _load_any(name: str, wikitext_split: str, gsm8k_split: str) -> CalibrationText:
    try:
        return _load(name, wikitext_split, gsm8k_split)
    except CalibrationError:
        raise
    except DataError as error:
        raise CalibrationError(str(error)) from None


def _load(name: str, wikitext_split: str, gsm8k_split: str) -> CalibrationText:
    form, _, split = name.partition(":")
    if form in WIKITEXTS and ":" not in split:
        return CalibrationText.of(*read_wikitext(form, split or wikitext_split, remedy=_REMEDY))
    if name == GSM8K:
        return _gsm8k(gsm8k_split)
    if name == EMBEDDED:
        return _embedded()
    path = expand_user(name)
    if path.is_file():
        return CalibrationText.of(_read_file(path), str(path))
    if path.is_dir() or path.suffix.lower() in FILE_SUFFIXES or name.startswith((".", "/", "~")) or not name.strip():
        raise CalibrationError(
            f"{name!r} is not a readable text file; allowed are wikitext2, gsm8k, embedded, a .txt or .jsonl file, or "
            "a data set on the Hugging Face hub. Check the path."
        )
    identifier, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    rows = _hub_rows(identifier, config or None, split or "train")
    return CalibrationText.of(_join_rows(numbered_rows(rows, name)), f"hub:{name}")


def _embedded() -> CalibrationText:
    # Some distributions strip pydoc's data, so its absence is an error that a user can mend.
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "this Python has no pydoc_data, so there is no embedded text; name a text file instead."
        ) from None
    text = "\n\n".join(topics[topic].strip() for topic in sorted(topics))
    return CalibrationText.of(text, "embedded (Python language reference, pydoc_data.topics)")


def _gsm8k(split: str) -> CalibrationText:
    path = local_file(f"gsm8k/{split}.jsonl", f"gsm8k/{split}.json")
    if path is not None:
        return CalibrationText.of(_read_file(path), str(path))
    name = ":".join((*_GSM8K_HUB, split))
    return CalibrationText.of(_join_rows(numbered_rows(_hub_rows(*_GSM8K_HUB, split), name)), f"hub:{name}")


def _read_file(path: Path) -> str:
    return _join_rows(read_rows(path)) if holds_rows(path) else read_text(path)


def _join_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    texts = []
    for where, row in rows:
        forms = forms_of(row, where)
        if ("text",) in forms:
            texts.append(text_of(row, "text", where))
        elif ("question", "answer") in forms:
            texts.append("\n".join(text_of(row, field, where) for field in ("question", "answer")))
        else:
            raise CalibrationError(
                f"{where} has the fields {', '.join(str(name)[:40] for name in list(row)[:12]) or 'none'}; needed is "
                "'text', or 'question' and 'answer'. Rename the fields, or give plain text."
            )
    return "\n\n".join(texts)


def _hub_rows(identifier: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    return hub_rows(identifier, config, split, remedy=_REMEDY)
