"""What of an example is learned, what is cut, left out and padded, and that all of it is counted."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from cloq_export.errors import DataError
from cloq_export.texts.examples import ChatExample, Example, Message
from cloq_export.train.sequences import NOT_LEARNED, make_sequences, pad_batch

WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", ":", *(f"w{number}" for number in range(40))]
END = WORDS.index("</s>")
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }} {% endfor %}"
ASKING = TEMPLATE + "{% if add_generation_prompt %}assistant : {% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def words(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def test_only_the_completion_and_the_end_are_learned(tokenizer: Any) -> None:
    made = make_sequences([Example(words(0, 3), words(10, 2))], tokenizer, 16)
    (row,) = made.rows
    assert row["input_ids"].tolist() == [*ids("w0 w1 w2 w10 w11"), END]
    assert row["labels"].tolist() == [*[NOT_LEARNED] * 3, *ids("w10 w11"), END]
    assert (made.tokens, made.learned) == (6, 3)


def test_plain_text_fills_windows_that_do_not_overlap(tokenizer: Any) -> None:
    made = make_sequences([Example(None, words(0, 7)), Example(None, words(20, 6))], tokenizer, 4)
    flat = [*ids(words(0, 7)), END, *ids(words(20, 6))]
    assert [row["input_ids"].tolist() for row in made.rows] == [flat[:4], flat[4:8], flat[8:12]]
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in made.rows)
    assert made.counts.tail == 2
    assert made.learned == 9


@pytest.mark.parametrize(("too_long", "kept", "truncated", "dropped"), [("truncate", 2, 1, 1), ("drop", 1, 0, 2)])
def test_long_examples_are_cut_or_left_out_and_counted(
    tokenizer: Any, too_long: Any, kept: int, truncated: int, dropped: int
) -> None:
    examples = [
        Example(words(0, 2), words(10, 2)),
        Example(words(0, 3), words(10, 8)),
        Example(words(0, 9), words(10, 2)),  # nothing to learn is left within 6 tokens
    ]
    made = make_sequences(examples, tokenizer, 6, too_long=too_long)
    assert len(made.rows) == kept
    assert (made.counts.examples, made.counts.truncated, made.counts.dropped) == (3, truncated, dropped)
    assert all(len(row["input_ids"]) <= 6 for row in made.rows)


def test_the_assistants_turns_of_a_chat_are_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = ASKING
    chat = ChatExample(
        (
            Message("user", "w0"),
            Message("assistant", "w1 w2"),
            Message("user", "w3"),
            Message("assistant", "w4"),
        )
    )
    (row,) = make_sequences([chat], tokenizer, 64).rows
    text = "user : w0 </s> assistant : w1 w2 </s> user : w3 </s> assistant : w4 </s>"
    assert row["input_ids"].tolist() == ids(text)
    learned = [token for token in row["labels"].tolist() if token != NOT_LEARNED]
    assert learned == ids("w1 w2 </s> w4 </s>")


def test_a_template_that_rewrites_earlier_turns_is_counted(tokenizer: Any) -> None:
    # As templates do that leave the thoughts of earlier answers out.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' and not loop.last %}w9"
        "{% else %}{{ m.content }}{% endif %} {{ eos_token }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    turns = [("user", "w0"), ("assistant", "w1"), ("user", "w3"), ("assistant", "w4")]
    chat = ChatExample(tuple(Message(role, text) for role, text in turns))
    made = make_sequences([chat], tokenizer, 64)
    assert made.counts.turns_left_out == 1
    assert [token for token in made.rows[0]["labels"].tolist() if token != NOT_LEARNED] == ids("w4 </s>")


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "the model's tokenizer has no chat template"), ("{{ messages|length }} w1", "does not begin an answer")],
)
def test_chats_need_a_template_that_can_be_followed(tokenizer: Any, template: str | None, message: str) -> None:
    tokenizer.chat_template = template
    chat = ChatExample((Message("user", "w0"), Message("assistant", "w1")))
    with pytest.raises(DataError, match=message):
        make_sequences([chat], tokenizer, 64)


def test_nothing_to_learn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"my.txt gives no sequence of 64 tokens: 1 examples, 0 left out .* 5 tokens"):
        make_sequences([Example(None, words(0, 5))], tokenizer, 64, origin="my.txt")


def test_padding_changes_no_loss(tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    examples = [Example(words(0, 3), words(10, 2)), Example(words(0, 1), words(20, 9))]
    rows = make_sequences(examples, tokenizer, 32).rows
    batch = pad_batch(rows)
    assert batch["input_ids"].shape == (2, 11)
    with torch.no_grad():
        together = model(**batch).loss
        alone = [(model(**pad_batch([row])).loss, int((row["labels"][1:] != NOT_LEARNED).sum())) for row in rows]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    torch.testing.assert_close(together, expected)


STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nturn') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ m.role }} : {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def chat(*turns: str, where: str = "") -> ChatExample:
    """Return a chat of "role text" turns."""
    return ChatExample(tuple(Message(*turn.split(" ", 1)) for turn in turns), where)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (("system w0", "user w1", "assistant w2"), r"refuses it \(no system\)"),
        (("user w0", "user w1", "assistant w2"), r"refuses it \(turns must alternate\)"),
        (("assistant w0", "user w1", "assistant w2"), r"refuses it \(turns must alternate\)"),
    ],
)
def test_a_chat_that_the_template_refuses_is_named(tokenizer: Any, turns: tuple[str, ...], words: str) -> None:
    tokenizer.chat_template = STRICT
    good = chat("user w0", "assistant w1", where="line 1 of f")
    with pytest.raises(DataError, match=f"^line 2 of f: the model's chat template {words}. Mend the chat") as caught:
        make_sequences([good, chat(*turns, where="line 2 of f"), good, chat(*turns)], tokenizer, 64, origin="f")
    assert str(caught.value).endswith(" 1 more of 4 examples are refused.")
    assert "\n" not in str(caught.value)
    # Made by hand, an example has no line.
    with pytest.raises(DataError, match=r"^example 2 of the data: the model's chat template refuses it"):
        make_sequences([good, chat(*turns)], tokenizer, 64)


@pytest.mark.parametrize("template", ["{{ messages[7].content }}", "{{ 1 / 0 }}", "{% for %}", "{{ messages + 3 }}"])
def test_whatever_a_template_raises_is_an_error_in_the_data(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="line 5 of f: the model's chat template refuses it") as caught:
        make_sequences([chat("user w0", "assistant w1", where="line 5 of f")], tokenizer, 64)
    assert "\n" not in str(caught.value)


def learned(made: Any) -> list[int]:
    return [token for token in made.rows[0]["labels"].tolist() if token != NOT_LEARNED]


def test_an_answer_that_begins_a_chat_is_learned(tokenizer: Any) -> None:
    tokenizer.chat_template = ASKING
    made = make_sequences([chat("assistant w1", "user w2", "assistant w3")], tokenizer, 64)
    assert made.rows[0]["input_ids"].tolist() == ids("assistant : w1 </s> user : w2 </s> assistant : w3 </s>")
    assert learned(made) == ids("w1 </s> w3 </s>")
    assert learned(make_sequences([chat("assistant w1 w2")], tokenizer, 64)) == ids("w1 w2 </s>")
    assert learned(make_sequences([chat("system w0", "assistant w1")], tokenizer, 64)) == ids("w1 </s>")


def test_an_answer_before_which_the_template_asks_for_none_is_counted(tokenizer: Any) -> None:
    # It wants a user's turn before it asks, and asks in other words than those that the answer stands behind.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role if not loop.first else 'w9' }} : {{ m.content }} {{ eos_token }} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    made = make_sequences([chat("assistant w1", "user w2", "assistant w3")], tokenizer, 64)
    assert made.counts.turns_left_out == 1
    assert learned(made) == ids("w3 </s>")
