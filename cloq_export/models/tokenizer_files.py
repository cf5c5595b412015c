"""The tokenizer of a model folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloq_export.errors import SourceError
from cloq_export.models.companions import refuse_marked_file
from cloq_export.models.library_calls import NO_CODE, quiet_transformers, told_in_one_line

# Files that hold a tokenizer's vocabulary.
_VOCABULARIES = ("tokenizer.*", "vocab*", "*.vocab", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "tekken.json")


def read_tokenizer(folder: str | Path, *, name: str | None = None, gguf_file: str | None = None) -> Any:
    """Read the tokenizer of a model folder. Nothing is fetched, nothing is asked, and no code from there is run.

    Args:
        folder: the folder that holds its files.
        name: of the model, for messages; None is the folder.
        gguf_file: the name of the GGUF file in the folder that holds the tokenizer; None reads the folder's own files.

    Returns:
        The tokenizer, as transformers makes it.

    Raises:
        SourceError: a file is missing or damaged.
        FormatError: a JSON file begins with a byte order mark.
        UnsupportedModelError: it needs Python code of its own.
    """
    import transformers

    folder = Path(folder)
    name = name or str(folder)
    if gguf_file is None:
        require_tokenizer(folder, name=name)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with quiet_transformers(), told_in_one_line(name, "tokenizer", gguf=gguf_file is not None):
        return transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE, **options)


def require_tokenizer(folder: str | Path, *, name: str | None = None) -> None:
    """Refuse a model folder without a tokenizer, before anything starts that would need it.

    Args:
        folder: the folder.
        name: of the model, for messages; None is the folder.

    Raises:
        SourceError: it holds no vocabulary.
        FormatError: a JSON file in it begins with a byte order mark.
    """
    for path in sorted(Path(folder).glob("*.json")):
        refuse_marked_file(path)
    # Some classes would start with an empty vocabulary, and every word would be unknown.
    if not any(next(Path(folder).glob(pattern), None) for pattern in _VOCABULARIES):
        raise SourceError(
            f"the tokenizer of {name or folder} cannot be read ({folder} holds no tokenizer.json and no other "
            "vocabulary). Put the model's tokenizer.json and tokenizer_config.json into the folder."
        )
