"""The transformers runtime against plain loops: padding, batches, caches and ends change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cloq_export.engines import decoding
from cloq_export.engines.decoding import end_tokens, prompts_per_batch
from cloq_export.engines.transformers import served
from cloq_export.engines.transformers.served import TransformersModel, float_model
from cloq_export.errors import DataError, NonFiniteError, UsageError

FAMILIES = ("llama", "gemma2", "opt", "lfm2", "mamba2")


def sequences(lengths: Sequence[int], seed: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (length,), generator=generator).tolist() for length in lengths]


def slow_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    values = []
    with torch.no_grad():
        for end in range(1, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:end]]), use_cache=False).logits[0, -1].double()
            values.append(logits.log_softmax(-1)[ids[end]])
    return torch.stack(values)


def slow_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count and (not new or new[-1] not in end_tokens(model)):
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_each_sequence_alone(
    tiny_model: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_BATCH_LOGITS", 61 * 40)  # several batches
    monkeypatch.setattr(served, "_LOGIT_ROWS", 3)
    model, ids = tiny_model(family), sequences((9, 2, 17, 5, 17))
    measured = float_model(model).prompt_logprobs(ids, [None] * 5)
    for values, sequence in zip(measured, ids, strict=True):
        assert values.dtype == torch.float32
        assert torch.allclose(values.double(), slow_logprobs(model, sequence), atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_those_of_each_prompt_alone(
    tiny_model: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_BATCH_PROMPTS", 4)
    monkeypatch.setattr(decoding, "_ROOM", 3)  # the cache is enlarged on the way
    model, ids = tiny_model(family), sequences((9, 1, 17, 5, 12, 3, 8))
    # An end that most texts of these models come to, at different times, so that rows leave the cache.
    wanted = [slow_greedy(model, prompt, 12) for prompt in ids]
    common = max({token for text in wanted for token in text}, key=lambda t: sum(t in text for text in wanted))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, common])
    wanted = [slow_greedy(model, prompt, 12) for prompt in ids]
    assert len({len(text) for text in wanted}) > 1
    assert float_model(model).generate(ids, [None] * len(ids), 12) == wanted


def test_a_model_is_left_as_it_was(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model("llama"), sequences((6, 3))
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        assert float_model(model).generate(ids, [None] * 2, 4) == [slow_greedy(model, prompt, 4) for prompt in ids]
        assert model.config._attn_implementation == attention


def test_prompts_are_continued_together_as_far_as_memory_allows(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    assert prompts_per_batch(model, 10) == 128
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    monkeypatch.setattr(decoding, "_CACHE_BYTES", 5 * 10 * token + 1)
    assert prompts_per_batch(model, 10) == 5
    assert prompts_per_batch(model, 1000) == 1


def test_sampling_settings_of_a_model_are_not_looked_at(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama"), sequences((6,))
    wanted = float_model(model).generate(ids, [None], 8)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)
    assert float_model(model).generate(ids, [None], 8) == wanted == [slow_greedy(model, ids[0], 8)]


def test_a_text_that_is_at_its_end_is_not_continued(tiny_model: Callable[..., Any]) -> None:
    model, ids = tiny_model("llama"), sequences((6, 4))
    asked: list[int] = []

    def ended(new: Sequence[int]) -> bool:
        asked.append(len(new))
        return len(new) >= 16

    texts = float_model(model).generate(ids, [None] * 2, 100, ended=ended)
    assert all(len(text) <= 16 for text in texts)
    assert set(asked) <= {8, 16}


def test_requests_are_answered_in_their_order_by_their_own_adapter(tiny_model: Callable[..., Any]) -> None:
    one, other = tiny_model("llama"), tiny_model("gemma2")
    loaded: list[str | None] = []

    def load_model(name: str | None) -> Any:
        loaded.append(name)
        return one if name is None else other

    model, ids = TransformersModel(load_model), sequences((5, 9, 5))
    mixed = model.prompt_logprobs(ids, [None, "a", None])
    assert loaded == [None, "a"]
    assert torch.equal(mixed[1], float_model(other).prompt_logprobs([ids[1]], [None])[0])
    assert torch.allclose(mixed[2], float_model(one).prompt_logprobs([ids[2]], [None])[0], atol=1e-6)


def test_bad_requests(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = float_model(tiny_model("llama"))
    with pytest.raises(UsageError, match="a sequence has 1 tokens; at least 2 are needed"):
        model.prompt_logprobs([[4]], [None])
    with pytest.raises(UsageError, match="2 sequences and 1 adapters"):
        model.generate([[4], [5]], [None], 3)
    with pytest.raises(UsageError, match="the float model has no adapter"):
        model.generate([[4]], ["a"], 3)
    broken = tiny_model("llama").get_output_embeddings()
    with torch.no_grad():
        kept = broken.weight[0, 0].clone()
        broken.weight[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="NaN or Inf while it generates"):
            model.generate([[4, 5]], [None], 3)
        broken.weight[0, 0] = kept


def test_tokens_that_the_model_has_no_embedding_for_are_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    rows = model.get_input_embeddings().num_embeddings
    for asked in (
        lambda: float_model(model).prompt_logprobs([[3, rows]], [None]),
        lambda: float_model(model).generate([[3], [4, rows]], [None, None], 2),
    ):
        with pytest.raises(DataError, match=rf"reach id {rows}, the model's vocabulary has {rows} entries"):
            asked()
