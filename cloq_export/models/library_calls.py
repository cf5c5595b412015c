"""Calls of transformers: none runs code of a model, none writes to the terminal, and each failure is one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cloq_export.errors import CloqError, MissingPackageError, SourceError, UnsupportedModelError

# Of every call that could find the code of a model beside its files: it is not run, not asked for, not fetched.
NO_CODE: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars and log lines of transformers off the terminal for a while."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Some of its progress bars obey no setting, so standard error itself is redirected.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def told_in_one_line(name: str, what: str, *, gguf: bool) -> Iterator[None]:
    """Say in one line what the libraries below raise in dozens of ways.

    Args:
        name: of the model, for messages.
        what: is read: "model", "tokenizer", "config" or "generation" (its settings).
        gguf: the model is a GGUF file.

    Raises:
        SourceError: it cannot be read.
        UnsupportedModelError: the installed transformers does not know it, or it needs code of its own.
        MissingPackageError: it needs a package that is not installed.
    """
    try:
        yield
    except (MemoryError, KeyboardInterrupt, CloqError):
        raise
    except ImportError as error:
        # Image and audio towers need packages that text models do not.
        needed = " ".join(str(error).split())[:200]
        raise MissingPackageError(
            f"{name} cannot be opened without a package that is not installed ({needed}). Install it, and run the "
            "command again."
        ) from None
    except Exception as error:
        reason = first_line(error)
        if re.search(r"does not recognize this architecture|not supported yet|Unrecognized (model|config)", reason):
            raise UnsupportedModelError(
                f"{name} is no causal language model that the installed transformers knows ({reason}). Choose "
                "another model, or a newer transformers."
            ) from None
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(
                f"{name} needs Python code from its own repository, which is never run here. Choose a model "
                "whose architecture transformers itself knows."
            ) from None
        if what == "tokenizer":
            remedy = (
                "Give the model as a Hugging Face folder instead"
                if gguf
                else "Put the model's tokenizer.json and tokenizer_config.json into the folder"
            )
            raise SourceError(f"the tokenizer of {name} cannot be read ({reason}). {remedy}.") from None
        if what == "config":
            raise SourceError(
                f"transformers can make no model of the config.json of {name} ({reason}). Compare it with the "
                "original, or update transformers."
            ) from None
        if what == "generation":
            raise SourceError(
                f"the generation_config.json of {name} cannot be taken ({reason}); programs that serve the model read "
                "it too. Correct the value in it, or delete the file."
            ) from None
        raise SourceError(
            f"the weights of {name} cannot be read ({reason}); the file is truncated, damaged or of another "
            "architecture than it says. Fetch it again."
        ) from None


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says, or the first two."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Some say what it is about in the first line, and what is wrong in the second.
    said = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {said[:200]}"
