"""The tokenizer that a GGUF header describes, held against the one that transformers makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.gguf_file import REMEDY

# tokenizer.ggml.pre of byte-level vocabularies that split text as GPT-2 does; transformers knows others by name.
_GPT2_SPLITS = frozenset(
    {
        "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "gigachat",
        "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion",
        "granite-docling",
    }
)  # fmt: skip
# These split off single digits first. Their merges hold no digits: only blanks before a digit come out otherwise.
_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


def check_gguf_tokenizer(name: str, header: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Refuse a tokenizer that would cut text otherwise than a GGUF header says.

    It is told to put begin and end tokens as the header says.

    Args:
        name: of the model, for messages.
        header: all keys of the file.
        tokenizer: as transformers made it; it may be changed.

    Returns:
        list: what is read otherwise than the header says.

    Raises:
        UnsupportedModelError: text would be cut otherwise.
    """
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in header.items()}
    kind, split = str(said.get("model")), said.get("pre")
    notes = []
    if kind == "gpt2" and split not in (None, "default"):
        if split in _DIGITS_FIRST:
            notes.append(
                f"the header of {name} says tokenizer.ggml.pre = {split}, which transformers does not know: text is "
                "cut as GPT-2 does, which differs where several blanks or line ends stand before a digit"
            )
        elif split not in (_GPT2_SPLITS | _known_splits()):
            raise UnsupportedModelError(
                f"the header of {name} says tokenizer.ggml.pre = {split!s:.40}, a way to cut text that transformers "
                f"does not know: it would make other tokens. {REMEDY}."
            )
    for side, ask in (("bos", _begins), ("eos", _ends)):
        wanted = said.get(f"add_{side}_token")
        if wanted is None or ask(tokenizer) == bool(wanted):
            continue
        setattr(tokenizer, f"add_{side}_token", bool(wanted))
        if ask(tokenizer) != bool(wanted):
            raise UnsupportedModelError(
                f"the header of {name} says tokenizer.ggml.add_{side}_token = {wanted}, and the tokenizer that "
                f"transformers makes of it does not do so. {REMEDY}."
            )
    if kind == "llama" and "add_space_prefix" in said:
        spaced = tokenizer.tokenize("a")[:1] != ["a"]
        if spaced != bool(said["add_space_prefix"]):
            raise UnsupportedModelError(
                f"the header of {name} says tokenizer.ggml.add_space_prefix = {said['add_space_prefix']}, and the "
                f"tokenizer that transformers makes of it does otherwise. {REMEDY}."
            )
    if kind == "llama" and said.get("remove_extra_whitespaces"):
        raise UnsupportedModelError(
            f"the header of {name} says tokenizer.ggml.remove_extra_whitespaces, which transformers does not read. "
            f"{REMEDY}."
        )
    named = sorted(key for key in header if key.startswith("tokenizer.chat_template."))
    if named:
        notes.append(f"chat templates of {name} besides the default one are not read: {', '.join(named)}")
    return notes


def _known_splits() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def _begins(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _ends(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
