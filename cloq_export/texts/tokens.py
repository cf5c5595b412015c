"""Token ids of prompts, completions and chats: the same ones for training, evaluation and serving."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from cloq_export.errors import DataError, UsageError

# What stands before a text that is to be tokenized as it is in the middle of another one.
_ANCHORS = ("\n", ".", "a")
# How tokenizers show the blank that some put before the first word of a text.
_BLANKS = ("▁", "Ġ")
# Tokens of a vocabulary that are looked through for one that is no special token.
_PROBED_TOKENS = 2048


class TextTokens:
    """Makes token ids of texts, with the tokenizer's own begin and end tokens where they belong.

    A prompt has the ids that the tokenizer gives it by itself, as an engine that is sent the text asks for: with the
    begin tokens that the tokenizer adds, once, even where the text begins with them already. The end token that some
    tokenizers add is left out: a prompt is not the end of a text.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin, added = _added_tokens(tokenizer)
        end = getattr(tokenizer, "eos_token_id", None)
        self.end: list[int] = list(added) if end is None else [end]

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text with no tokens added."""
        # verbose=False: a text may be longer than the model's context; it is cut later.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a text that a model is to continue, the tokenizer's begin tokens first."""
        return self._begun(self.text_ids(text))

    def joined_ids(self, pieces: Sequence[str], *, begin: bool) -> tuple[list[list[int]], int]:
        """Return the ids of each of several texts that stand one behind the other.

        Up to the end of each piece, the ids are those of the whole text to there, if they begin with the ids to the
        end of the piece before, which are what a model is asked with. Where a token would straddle the border of two
        pieces they cannot: there the ids before the border stay as they are, and the piece behind it is tokenized for
        itself.

        Args:
            pieces: the texts.
            begin: put the tokenizer's begin tokens first.

        Returns:
            (ids of each piece, borders that a token would have straddled).
        """
        ids_of_pieces: list[list[int]] = []
        before: list[int] = []
        text, straddled = "", 0
        for piece in pieces:
            text += piece
            whole = self.prompt_ids(text) if begin else self.text_ids(text)
            if whole[: len(before)] == before:
                own = whole[len(before) :]
            else:
                own = self._ids_behind(piece)
                straddled += 1
            ids_of_pieces.append(own)
            before = before + own
        return ids_of_pieces, straddled

    def completion_ids(self, prompt: str, completion: str) -> tuple[list[int], list[int], bool]:
        """Return the ids of a prompt, and those of its completion with one end token behind it.

        Args:
            prompt: what stands before; its ids are those of `prompt_ids`.
            completion: what is learned.

        Returns:
            (of the prompt, of the completion, whether a token would have straddled their border as in `joined_ids`).
        """
        (first, second), straddled = self.joined_ids((prompt, completion), begin=True)
        if self.end and second[-len(self.end) :] != self.end:
            second = second + self.end
        return first, second, bool(straddled)

    def scored_ids(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the ids of both texts together, and how many of them are the continuation's.

        As lm-evaluation-harness does (`TemplateLM._encode_pair`): they are parted behind as many tokens as the context
        has alone, and blanks at its end are counted to the continuation. An empty context is the begin token, or where
        the tokenizer has none the end token.

        Args:
            context: what stands before.
            continuation: what is scored.

        Raises:
            DataError: the context is empty, and the tokenizer has neither token.
        """
        bare = context.rstrip()
        if bare:
            whole = self.prompt_ids(context + continuation)
            # At least the last token is the continuation's, also where it merges with the context altogether.
            return whole, max(1, len(whole) - len(self.prompt_ids(bare)))
        begin = (
            list(self.begin)
            or [
                token
                for token in (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
                if token is not None
            ][:1]
        )
        if not begin:
            raise DataError(
                "a text is to be scored with nothing before it, and the model's tokenizer has neither a begin nor an "
                "end token to put there; give a context."
            )
        own = self.text_ids(context + continuation)
        return [*begin, *own], len(own)

    def window_begin(self, bos: str) -> tuple[int, ...]:
        """Return the tokens that each window of a text begins with.

        Args:
            bos: "auto" is what the tokenizer puts before a text by itself; "always" is its begin token also where it
                adds none by itself; "never" is none.

        Raises:
            UsageError: "always", and the tokenizer has no begin token.
        """
        if bos == "never":
            return ()
        if bos == "auto" or self.begin:
            return self.begin
        token = getattr(self.tokenizer, "bos_token_id", None)
        if token is None:
            raise UsageError("bos is 'always', and the model's tokenizer has no begin token; choose auto or never.")
        return (token,)

    def _begun(self, ids: list[int]) -> list[int]:
        begin = list(self.begin)
        return ids if ids[: len(begin)] == begin else begin + ids

    def _ids_behind(self, text: str) -> list[int]:
        """Return the ids of a text without the blank that some tokenizers put before it."""
        alone = self.text_ids(text)
        if not alone or text[:1].isspace():
            return alone
        first = self.tokenizer.convert_ids_to_tokens(alone[0])
        if not str(first).startswith(_BLANKS):
            return alone
        for anchor in _ANCHORS:
            before, both = self.text_ids(anchor), self.text_ids(anchor + text)
            if before and both[: len(before)] == before and len(both) > len(before):
                return both[len(before) :]
        return alone


def _ordinary_text(tokenizer: Any) -> str:
    """Return a text whose tokens are none that a tokenizer might add: of the alphabet, or of the vocabulary."""
    special = set(getattr(tokenizer, "all_special_ids", ()))

    def is_ordinary(text: str) -> bool:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return bool(ids) and special.isdisjoint(ids)

    def vocabulary() -> Iterator[str]:
        for token in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)[:_PROBED_TOKENS]:
            yield tokenizer.convert_tokens_to_string([token]).strip()

    return next(filter(is_ordinary, itertools.chain(("a", "A", "0"), vocabulary())), "a")


def _added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what a tokenizer puts before and behind a text by itself."""
    probe = _ordinary_text(tokenizer)
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    whole = tokenizer(probe)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    # The probe has no tokens of its own, or others besides special ones: only a begin token can be identified then.
    begin = getattr(tokenizer, "bos_token_id", None)
    count = 1 if whole[:1] == [begin] and begin is not None else 0
    end = getattr(tokenizer, "eos_token_id", None)
    return tuple(whole[:count]), tuple(whole[-1:] if len(whole) > count and whole[-1] == end else ())
