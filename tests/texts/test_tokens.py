"""Token ids of prompts, completions and windows, with tokenizers of every habit that are made here."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from cloq_export.errors import DataError, UsageError
from cloq_export.parity.answers import Respondent, continue_prompts, score_continuations
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import CalibrationText, evaluation_tokens, sample_windows, tokenize_text
from cloq_export.texts.examples import ChatExample, Example, Message
from cloq_export.texts.tokens import TextTokens
from cloq_export.texts.windows import WindowCounts, draw_windows
from cloq_export.train.sequences import NOT_LEARNED, make_sequences

SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
POSTS = {"none": None, "begins": "<s> $A", "ends": "$A </s>", "both": "<s> $A </s>"}
KINDS = ("bytes", "bytes with blank", "metaspace", "llama 2")


def make_tokenizer(kind: str, post: str = "none", **options: Any) -> Any:
    """Return a tokenizer of letters with a few merges, of which one goes across a border that prompts have."""
    marks = {"bytes": "Ġ", "bytes with blank": "Ġ"}.get(kind, "▁")
    letters = [*"abcdefghijklmnopqrstuvwxyzQA?.:/0123456789", marks]
    merges = [(marks, "4"), (marks, "a"), (":", "/"), (":/", "/")]
    line = "Ċ" if marks == "Ġ" else "\n"
    words = [*SPECIAL, *letters, line, *("".join(pair) for pair in merges)]
    inner = tokenizers.Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges, unk_token="<unk>"))
    if kind.startswith("bytes"):
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind != "bytes", use_regex=False)
        inner.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace()
    else:  # as the files of Llama 2 have it
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if POSTS[post] is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=POSTS[post], special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **options}
    )
    made.add_special_tokens({})
    return made


def texts_of(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


class Recorder:
    """Stands for a runtime, and keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def generate(self, token_ids: Any, adapters: Any, max_new_tokens: int) -> list[list[int]]:
        self.asked += [list(ids) for ids in token_ids]
        return [[EOS] for _ in token_ids]

    def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
        self.asked += [list(ids) for ids in token_ids]
        return [-torch.ones(len(ids) - 1) for ids in token_ids]


def learned_of(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    (row,) = make_sequences([Example(prompt, completion)], tokenizer, 256).rows
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    first = next(place for place, label in enumerate(labels) if label != NOT_LEARNED)
    assert labels[first:] == ids[first:]
    return ids[:first], ids[first:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post", POSTS)
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Q: ab\nA:", " 4 b"), ("Q: ab\nA:", "4"), ("ab\n", "ab"), ("a ", "4")]
)
def test_a_prompt_is_trained_on_asked_and_served_alike(kind: str, post: str, prompt: str, completion: str) -> None:
    tokenizer = make_tokenizer(kind, post)
    before, learned = learned_of(tokenizer, prompt, completion)
    served = tokenizer(prompt)["input_ids"]
    assert before == (served[:-1] if served[-1] == EOS else served)
    assert EOS not in before
    assert learned.count(EOS) == 1
    assert learned[-1] == EOS
    model = Recorder()
    continue_prompts(Respondent(model, tokenizer), [prompt], cut=str, max_new_tokens=1)  # type: ignore[arg-type]
    assert model.asked == [before]
    # What the model writes then reads as what it was to learn.
    bare = tokenizer.decode(tokenizer(prompt + completion, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(before + learned, skip_special_tokens=True) == bare


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text_where_they_can_be(kind: str) -> None:
    tokenizer = make_tokenizer(kind, "begins")
    before, learned = learned_of(tokenizer, "Q: a\nA:", " 4ab")
    assert before + learned == [*tokenizer("Q: a\nA: 4ab")["input_ids"], EOS]
    # Here a token of the whole goes across: the prompt is as it is asked, and what is left is written behind it.
    for prompt, completion, straddling in (("Q a:", "//b", "://"), ("Q ", "4b", "4")):
        before, learned = learned_of(tokenizer, prompt, completion)
        assert straddling in tokenizer.convert_ids_to_tokens(tokenizer(prompt + completion)["input_ids"])[-2]
        assert before == tokenizer(prompt)["input_ids"]
        assert texts_of(tokenizer, learned) == f"{completion}</s>"
        assert make_sequences([Example(prompt, completion)], tokenizer, 99).counts.straddled == 1
    assert make_sequences([Example("Q: a\nA:", " 4ab")], tokenizer, 99).counts.straddled == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post", ["begins", "both"])
def test_no_token_begins_or_ends_a_text_twice(kind: str, post: str) -> None:
    tokenizer = make_tokenizer(kind, post)
    before, learned = learned_of(tokenizer, "<s>ab", "4</s>")
    assert before.count(BOS) == 1
    assert before[0] == BOS
    assert learned.count(EOS) == 1


# Where the tokenizers of these families put a begin token: Llama 2 and Mistral, Gemma, Llama 3; Qwen has none.
FAMILIES = {
    "llama 2": ("llama 2", "begins"),
    "gemma": ("metaspace", "begins"),
    "llama 3": ("bytes", "begins"),
    "qwen": ("bytes", "none"),
}


def harness_ids(tokenizer: Any, text: str) -> list[int]:
    """Return what lm-evaluation-harness asks (`HFLM.tok_encode` without arguments and with no `add_bos_token`).

    The rule: the tokenizer's own `add_special_tokens`, whatever that is; none where the text begins with the begin
    token already.
    """
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, **({"add_special_tokens": False} if begins else {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["Q: ab\nA:", "<s>Q: ab\nA:", "ab", " 4"])
def test_prompts_are_asked_as_the_harness_asks_them(family: str, text: str) -> None:
    kind, post = FAMILIES[family]
    tokenizer = make_tokenizer(kind, post)
    expected = harness_ids(tokenizer, text)
    assert expected[0] == BOS or post == "none"
    assert TextTokens(tokenizer).prompt_ids(text) == expected
    assert learned_of(tokenizer, text, " 4")[0] == expected
    # Of a tokenizer that ends texts by itself the harness keeps the end token, behind which no model goes on.
    ends = make_tokenizer(kind, "both" if post == "begins" else "ends")
    assert [*TextTokens(ends).prompt_ids(text), *([] if text.startswith("<s>") else [EOS])] == harness_ids(ends, text)
    # The windows of texts begin as prompts do, unless they are asked otherwise.
    begin = TextTokens(tokenizer).window_begin("auto")
    assert list(begin) == expected[: len(begin)]
    assert begin == ((BOS,) if post == "begins" else ())


@pytest.mark.parametrize("post", POSTS)
def test_choices_are_parted_as_the_harness_does(post: str) -> None:
    tokenizer = make_tokenizer("llama 2", post)
    begin = [BOS] if post in ("begins", "both") else []

    def ids(text: str) -> list[int]:
        return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    model = Recorder()
    pairs = [("ab:", " 4 b"), ("ab: ", "4 b"), ("ab:", "//b"), ("Q:/", "/")]
    scores = score_continuations(Respondent(model, tokenizer), [pairs])  # type: ignore[arg-type]
    assert model.asked == [ids(context + continuation) for context, continuation in pairs]
    counts = [len(ids(a + b)) - len(ids(a.rstrip())) for a, b in pairs]
    # A choice that merges with what stands before it altogether is never the most probable for having no token.
    assert scores == [[-float(max(1, count)) for count in counts]]


def test_an_empty_context_is_the_begin_token_or_the_end_token() -> None:
    alone = make_tokenizer("bytes")("ab", add_special_tokens=False)["input_ids"]
    assert TextTokens(make_tokenizer("bytes", "both")).scored_ids("", "ab") == ([BOS, *alone], 2)
    assert TextTokens(make_tokenizer("bytes")).scored_ids("", "ab") == ([BOS, *alone], 2)
    assert TextTokens(make_tokenizer("bytes", bos_token=None)).scored_ids("", "ab") == ([EOS, *alone], 2)
    with pytest.raises(DataError, match="has neither a begin nor an end token to put there; give a context"):
        TextTokens(make_tokenizer("bytes", bos_token=None, eos_token=None)).scored_ids("", "ab")


def test_a_tokenizer_that_begins_with_its_end_token() -> None:
    # As OPT's does: what it is called does not matter, only that it stands before.
    inner = make_tokenizer("bytes").backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="</s>", eos_token="</s>")
    before, learned = learned_of(tokenizer, "ab", "4")
    assert before == tokenizer("ab")["input_ids"]
    assert learned[-1] == EOS


LONG = "ab 4 " * 40


@pytest.mark.parametrize(
    ("post", "bos", "begin"),
    [
        ("none", "auto", ()),
        ("ends", "auto", ()),
        ("begins", "auto", (BOS,)),
        ("both", "auto", (BOS,)),
        ("both", "never", ()),
        ("none", "always", (BOS,)),
        ("begins", "always", (BOS,)),
    ],
)
def test_windows_begin_as_asked(post: str, bos: str, begin: tuple[int, ...]) -> None:
    tokenizer, room = make_tokenizer("bytes", post), 8 - len(begin)
    plain = tokenize_text(tokenizer, LONG)
    assert BOS not in plain
    assert EOS not in plain
    laid = evaluation_tokens(tokenizer, LONG, 8, bos)
    if not begin:
        assert torch.equal(laid, plain)
    count = len(laid) // 8
    windows = laid[: count * 8].view(count, 8)
    assert torch.equal(windows[:, len(begin) :].reshape(-1), plain[: count * room])
    assert all(tuple(window[: len(begin)].tolist()) == begin for window in windows)
    text = CalibrationText.of(LONG, "here")
    recipe = Recipe(model="m", seqlen=8, seed=3, bos=bos)
    made_windows = draw_windows(tokenizer, text, recipe, WindowCounts(5))
    assert made_windows.to_json()["begin_tokens"] == list(begin)
    drawn = made_windows.solving.ids
    assert drawn.shape == (5, 8)
    assert torch.equal(drawn[:, : len(begin)], torch.tensor(begin, dtype=torch.int64).expand(5, -1))
    # Behind it stands what would be drawn for windows that are shorter by the begin token.
    bare = sample_windows(plain, 5, room, 3)
    assert torch.equal(drawn[:, len(begin) :], bare)
    made = make_sequences([Example(None, LONG)], tokenizer, 8, bos=bos)
    assert [row["input_ids"].tolist() for row in made.rows] == windows.tolist()
    assert made.learned == len(made.rows) * 7


def test_windows_that_cannot_begin_as_asked() -> None:
    with pytest.raises(
        UsageError, match="bos is 'always', and the model's tokenizer has no begin token; choose auto or"
    ):
        evaluation_tokens(make_tokenizer("bytes", bos_token=None), LONG, 8, "always")
    with pytest.raises(UsageError, match="a window has 1 tokens, and 1 of them begin each window"):
        evaluation_tokens(make_tokenizer("bytes", "begins"), LONG, 1, "auto")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and loop.index0 == 0 and strict %}"
    "{{ raise_exception('no system turn') }}{% endif %}{{ m.role[0] }}: {{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = ChatExample(
    (Message("user", "ab"), Message("assistant", "4"), Message("user", "4 4"), Message("assistant", "a b"))
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post", POSTS)
def test_a_chat_has_the_ids_that_it_is_asked_with(kind: str, post: str) -> None:
    tokenizer = make_tokenizer(kind, post)
    tokenizer.chat_template = TEMPLATE
    made = make_sequences([CHAT], tokenizer, 256)
    ids, labels = (made.rows[0][name].tolist() for name in ("input_ids", "labels"))
    messages = [{"role": message.role, "content": message.content} for message in CHAT.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert ids.count(BOS) == 1
    for turn in (1, 3):
        asked = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        before = tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert ids[: len(before)] == before
        assert labels[len(before) - 1] == NOT_LEARNED
        assert labels[len(before)] == ids[len(before)]
    assert made.counts.straddled == 0


@pytest.mark.parametrize("unknown", ["<s>", None])
def test_begin_tokens_are_found_where_the_alphabet_is_small(unknown: str | None) -> None:
    """Texts that become the unknown token, or nothing at all, tell nothing of what a tokenizer adds."""
    vocabulary = {"<s>": 0, "</s>": 1, "C": 2, "G": 3, "T": 4}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    if unknown is None:
        inner = tokenizers.Tokenizer(models.BPE(dict(vocabulary), []))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "unk_token": "<s>"} if unknown else {"cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokens = TextTokens(tokenizer)
    assert tokens.begin == (0,)
    assert tokens.prompt_ids("C G") == [0, 2, 3]
