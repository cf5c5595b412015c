"""What is learned and what is held out."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from cloq_export.recipe import FineTuneRecipe
from cloq_export.texts.examples import Example, ExampleSet
from cloq_export.train.data import prompts_of, read_training_data


@pytest.fixture(scope="module")
def tokenizer(model_folder: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_folder("llama"))


def asked(**options: Any) -> FineTuneRecipe:
    return FineTuneRecipe.from_mapping({"data": "mine", "seqlen": 16, "eval_samples": 2, **options})


def test_examples_held_out_are_spread_over_the_set(tokenizer: Any) -> None:
    examples = ExampleSet.of([Example(f"w{n}", " w9 w9") for n in range(8)], "mine")
    data = read_training_data(asked(), tokenizer, examples, bos="never")
    assert data.evaluated is not None
    first = [int(row["input_ids"][0]) for row in data.evaluated.rows]
    assert first == [tokenizer.convert_tokens_to_ids(word) for word in ("w0", "w4")]
    assert len(data.learned.rows) == 6
    assert (data.data.origin, data.data.sha256, data.eval_data) == ("mine", examples.sha256, None)
    assert list(prompts_of(examples)) == [f"w{n}" for n in range(8)]


def test_the_end_of_a_plain_text_is_held_out(tokenizer: Any) -> None:
    text = ExampleSet.of([Example(None, " ".join(f"w{n % 90}" for n in range(96)))], "mine")
    data = read_training_data(asked(), tokenizer, text, bos="never")
    assert data.evaluated is not None
    assert (len(data.learned.rows), len(data.evaluated.rows)) == (4, 2)
    assert int(data.evaluated.rows[-1]["input_ids"][-1]) == tokenizer.convert_tokens_to_ids("w5")


def test_what_did_not_fit_is_noted(tokenizer: Any) -> None:
    alone = ExampleSet.of([Example("w1", " w2" * 30)], "mine")
    recipe = asked()
    data = read_training_data(recipe, tokenizer, alone, bos="never")
    assert data.evaluated is None
    assert list(data.notes(recipe)) == [
        "1 of 1 examples to learn were cut to 16 tokens",
        "too few examples to hold any out: nothing was evaluated, and the last adapter is kept",
    ]
