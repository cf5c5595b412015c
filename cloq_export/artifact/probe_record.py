"""What fixed texts become: token ids of a tokenizer, and log-probabilities of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Letters of several scripts, digits, blanks, line ends, code: what tokenizers differ in.
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and nobody asked why it did so twice before breakfast.",
    "  def area(radius: float) -> float:\n\treturn 3.14159 * radius ** 2  # square metres\n\n",
    "Größe, naïveté, Ελλάδα, Москва, 東京, 🙂 e\u0301; 1234567890 + 0.5e-3 = ?",
    "Question: Ann has 12 apples and gives 5 of them to Bob. How many apples does she keep?\nAnswer: 7",
)
PROBE_CHAT = (
    {"role": "user", "content": "Name three colours."},
    {"role": "assistant", "content": "Red, green and blue."},
    {"role": "user", "content": "And a fourth?"},
)
# Tokens of each probe text on which log-probabilities are kept: a handful that one forward pass gives.
_PROBE_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class ProbeRecord:
    """Log-probabilities on fixed token ids.

    Args:
        precision: of the activations: "float32", "bfloat16" or "float16".
        token_ids: sequences of two or more tokens.
        logprobs: log p(x_i | x_1..x_{i-1}) of each, i = 2..n.
    """

    precision: str
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]

    @classmethod
    def of(
        cls, precision: torch.dtype, token_ids: Sequence[Sequence[int]], logprobs: Sequence[torch.Tensor]
    ) -> ProbeRecord:
        """Return the record of measured log-probabilities.

        Args:
            precision: of the activations.
            token_ids: the sequences.
            logprobs: (n - 1,) for each.
        """
        return cls(
            str(precision).removeprefix("torch."),
            tuple(map(tuple, token_ids)),
            tuple(tuple(float(value) for value in values) for values in logprobs),
        )

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ProbeRecord:
        """Return the record that a JSON object holds.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        lengths = [(len(ids), len(values)) for ids, values in zip(entry["token_ids"], entry["logprobs"], strict=True)]
        if not lengths or any(ids < 2 or values != ids - 1 for ids, values in lengths):
            raise ValueError
        return cls(
            printable(entry["precision"]),
            tuple(tuple(map(int, ids)) for ids in entry["token_ids"]),
            tuple(tuple(map(float, values)) for values in entry["logprobs"]),
        )


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """What a tokenizer and its chat template make of fixed texts.

    Args:
        texts: token ids of each of `PROBE_TEXTS`, special tokens as the tokenizer adds them by itself.
        chat: token ids of `PROBE_CHAT`; None without a template, or where it refuses the chat.
        special: name of a special token -> its id.
    """

    texts: tuple[tuple[int, ...], ...]
    chat: tuple[int, ...] | None
    special: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerRecord:
        """Return the record of a transformers tokenizer."""
        texts = tuple(tuple(tokenizer(text, verbose=False)["input_ids"]) for text in PROBE_TEXTS)
        chat: tuple[int, ...] | None = None
        if getattr(tokenizer, "chat_template", None):
            try:
                rendered = tokenizer.apply_chat_template(list(PROBE_CHAT), tokenize=False, add_generation_prompt=True)
                chat = tuple(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
            except Exception:  # a template may raise anything
                chat = None
        special = {
            name: tokenizer.convert_tokens_to_ids(token)
            for name, token in sorted(tokenizer.special_tokens_map.items())
            if isinstance(token, str)
        }
        return cls(texts, chat, special)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TokenizerRecord:
        """Return the record that a JSON object holds.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        if len(entry["texts"]) != len(PROBE_TEXTS):
            raise ValueError
        chat = entry["chat"]
        return cls(tuple(map(tuple, entry["texts"])), None if chat is None else tuple(chat), dict(entry["special"]))

    def probes(self) -> list[list[int]]:
        """Return the token ids on which models are probed."""
        return [list(ids[:_PROBE_TOKENS]) for ids in self.texts if len(ids) >= 2]


def printable(value: Any) -> str:
    """Return a value that has to be a text without control characters.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError
    return value
