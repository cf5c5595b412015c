"""Calibration and evaluation texts, and the windows of tokens cut from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import CalibrationError, DataError
from cloq_export.run.data_sets import hub_rows, local_file
from cloq_export.run.spelled_paths import expand_user, split_list

WIKITEXT2 = "wikitext2"
GSM8K = "gsm8k"
EMBEDDED = "embedded"

_WIKITEXT_HUB = ("Salesforce/wikitext", "wikitext-2-v1")
_WIKITEXT_FILES = {"validation": "wikitext2/valid.txt", "test": "wikitext2/test.txt"}
_GSM8K_HUB = ("openai/gsm8k", "main")
_FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".csv")


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """A text and where it came from.

    Args:
        text: the whole text, not empty.
        origin: a file path, "hub:<id>", or "embedded (<what>)", for reports.
        sha256: of the text in UTF-8, hexadecimal.
        parts: of a mix, the texts that take turns in giving a window; empty for one text.
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
            CalibrationError: the text is empty or white space.
        """
        if not text.strip():
            raise CalibrationError(f"the text {origin} is empty; give a file or data set with text in it.")
        return cls(text, origin, hashlib.sha256(text.encode("utf-8")).hexdigest())


def load_text(name: str) -> CalibrationText:
    """Return a calibration text, or a mix of several.

    Args:
        name: "wikitext2" (validation split, from the data folder or the hub), "gsm8k" (training split, questions and
            answers), "embedded" (a text that every Python installation has), a .txt or .jsonl file (rows with "text",
            or with "question" and "answer"), or a hub data set `ID[:CONFIG[:SPLIT]]` (split "train" unless named).
            Several, joined by "+", are a mix.

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
    # verbose=False: a whole text is meant to exceed the model's context; windows are cut from it.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(
    tokenizer: Any, calibration: CalibrationText, samples: int, seqlen: int, seed: int
) -> torch.Tensor:
    """Return random windows of a text; of a mix, window i is from the text i modulo their number.

    Args:
        tokenizer: a transformers tokenizer.
        calibration: one text or a mix.
        samples: number of windows, at least 1.
        seqlen: tokens per window, at least 1.
        seed: of the draw from each text.

    Returns:
        Tensor: (samples, seqlen) int64.

    Raises:
        CalibrationError: a text is shorter than one window, there are fewer windows than texts, or none is asked for.
    """
    parts = calibration.parts or (calibration,)
    if 1 <= samples < len(parts):
        raise CalibrationError(
            f"{samples} windows were asked for from a mix of {len(parts)} texts; at least one of each is needed "
            "(--samples)."
        )
    drawn = [
        sample_windows(tokenize_text(tokenizer, part.text), len(range(place, samples, len(parts))), seqlen, seed)
        for place, part in enumerate(parts)
    ]
    return torch.stack([drawn[i % len(parts)][i // len(parts)] for i in range(samples)])


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
    if samples < 1 or seqlen < 1:
        raise CalibrationError(
            f"{samples} windows of {seqlen} tokens were asked for; at least 1 of each is needed (--samples, --seqlen)."
        )
    available = token_ids.shape[0]
    if available < seqlen:
        raise CalibrationError(
            f"the calibration text has {available} tokens, one window needs {seqlen}; give a longer text with "
            "--calibration, or shorter windows with --seqlen."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(available - seqlen + 1, (samples,), generator=generator)
    return token_ids[starts.unsqueeze(1) + torch.arange(seqlen)]


def _load_any(name: str, wikitext_split: str, gsm8k_split: str) -> CalibrationText:
    if name == WIKITEXT2:
        return _wikitext(wikitext_split)
    if name == GSM8K:
        return _gsm8k(gsm8k_split)
    if name == EMBEDDED:
        return _embedded()
    path = expand_user(name)
    if path.is_file():
        return CalibrationText.of(_read_file(path), str(path))
    if path.is_dir() or path.suffix.lower() in _FILE_SUFFIXES or name.startswith((".", "/", "~")) or not name.strip():
        raise CalibrationError(
            f"{name!r} is not a readable text file; allowed are wikitext2, gsm8k, embedded, a .txt or .jsonl file, or "
            "a data set on the Hugging Face hub. Check the path."
        )
    identifier, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    rows = _hub_rows(identifier, config or None, split or "train")
    return CalibrationText.of(_join_rows(rows, name), f"hub:{name}")


def _embedded() -> CalibrationText:
    # Some distributions strip pydoc's data, so its absence is a user's problem to hear about.
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CalibrationError(
            "this Python has no pydoc_data, so there is no embedded text; give a text file with --calibration."
        ) from None
    text = "\n\n".join(topics[topic].strip() for topic in sorted(topics))
    return CalibrationText.of(text, "embedded (Python language reference, pydoc_data.topics)")


def _wikitext(split: str) -> CalibrationText:
    path = local_file(_WIKITEXT_FILES[split])
    if path is not None:
        return CalibrationText.of(_read_file(path), str(path))
    rows = _hub_rows(*_WIKITEXT_HUB, split)
    # The hub drops the blank that the original file has on empty lines.
    text = "".join(row["text"] or " \n" for row in rows)
    return CalibrationText.of(text, f"hub:{':'.join(_WIKITEXT_HUB)}:{split}")


def _gsm8k(split: str) -> CalibrationText:
    path = local_file(f"gsm8k/{split}.jsonl")
    if path is not None:
        return CalibrationText.of(_read_file(path), str(path))
    name = ":".join((*_GSM8K_HUB, split))
    return CalibrationText.of(_join_rows(_hub_rows(*_GSM8K_HUB, split), name), f"hub:{name}")


def _read_file(path: Path) -> str:
    if path.suffix.lower() in (".parquet", ".csv"):
        raise CalibrationError(
            f"{path} is a {path.suffix} file; allowed are plain text (.txt) and JSON lines (.jsonl) with a 'text' "
            "field, or 'question' and 'answer'. Convert it first."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); give plain text or JSON lines in UTF-8."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    if path.suffix.lower() in (".jsonl", ".json"):
        return _join_rows(_json_rows(text, path), str(path))
    return text


def _json_rows(text: str, path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise CalibrationError(
                f"line {number} of {path} is not a JSON object; a .jsonl file holds one object per line with 'text', "
                "or 'question' and 'answer'."
            )
        yield row


def _join_rows(rows: Iterable[Mapping[str, Any]], name: str) -> str:
    texts = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
            texts.append(f"{row['question']}\n{row['answer']}")
        else:
            raise CalibrationError(
                f"row {number} of {name} has the fields {', '.join(map(str, row)) or 'none'}; needed is 'text', or "
                "'question' and 'answer'. Rename the fields, or give plain text."
            )
    return "\n\n".join(texts)


def _hub_rows(identifier: str, config: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        return hub_rows(
            identifier,
            config,
            split,
            remedy="Give a text file or 'embedded' with --calibration, or put the data set's files in the folder that "
            "the environment variable CLOQ_DATA names.",
        )
    except DataError as error:
        raise CalibrationError(str(error)) from None
