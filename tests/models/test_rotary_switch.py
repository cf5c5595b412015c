"""Rows of a batch on two sides of a switch of rotary frequencies: each comes out as it does alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cloq_export.engines.decoding import continue_greedily
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.engines.transformers.served import batches_of, float_model, sequence_logprobs
from cloq_export.models.blocks import find_blocks
from cloq_export.models.rotary_switch import RotarySwitch, forget_lengths
from cloq_export.models.stream import BlockStream
from cloq_export.train.sequences import NOT_LEARNED, pad_batch
from cloq_export.train.trainer import AdapterTrainer, next_token_loss

SWITCH = 16
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Phi-3 for 16 tokens and 64; a Llama whose frequencies scale with every length beyond 16.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.02 * n for n in range(8)],
    "long_factor": [1.0 + 0.9 * n for n in range(8)],
    "original_max_position_embeddings": SWITCH,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LENGTHS = (5, 16, 17, 30, 9, 24)


def _config(kind: str) -> Any:
    if kind == "phi3-longrope":
        return transformers.Phi3Config(
            **_SIZES,
            max_position_embeddings=64,
            original_max_position_embeddings=SWITCH,
            rope_parameters=_LONGROPE,
        )
    if kind == "llama-dynamic":
        return transformers.LlamaConfig(**_SIZES, max_position_embeddings=SWITCH, rope_parameters=_DYNAMIC)
    return transformers.LlamaConfig(**_SIZES, max_position_embeddings=64)


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_config(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture(params=["phi3-longrope", "llama-dynamic"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _sequences(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def _alone(kind: str, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities of a model that has read nothing else, (tokens, vocabulary)."""
    with torch.no_grad():
        return _model(kind)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_the_switch_is_read_from_the_configuration() -> None:
    longrope, dynamic, none = (RotarySwitch.of(_model(kind)) for kind in ("phi3-longrope", "llama-dynamic", "llama"))
    assert longrope == RotarySwitch(at=(SWITCH,))
    assert dynamic == RotarySwitch(grows=(SWITCH,))
    assert not none
    assert longrope.apart(LENGTHS) == [[0, 1, 4], [2, 3, 5]]
    assert dynamic.apart(LENGTHS) == [[0, 1, 4], [2], [3], [5]]
    assert none.apart(LENGTHS) == [list(range(6))]
    # Of one kind of layers each, as in models with sliding windows.
    config = transformers.LlamaConfig()
    config.rope_parameters = {"full": _LONGROPE, "sliding": {"rope_type": "default"}}
    holder = torch.nn.Module()
    holder.config = config  # type: ignore[assignment]
    assert RotarySwitch.of(holder) == RotarySwitch(at=(SWITCH,))


def test_mixing_them_would_change_what_a_model_says() -> None:
    """What the other tests look for is there to be found."""
    model, (short, *_) = _model("phi3-longrope"), _sequences()
    padded = torch.zeros(2, 30, dtype=torch.int64)
    padded[0, :5] = torch.tensor(short)
    padded[1] = 7
    with torch.no_grad():
        mixed = model(input_ids=padded).logits[0, :5].log_softmax(-1)
    assert float((mixed - _alone("phi3-longrope", short)).abs().max()) > 0.05


def test_scored_sequences_do_not_depend_on_what_is_beside_them(kind: str) -> None:
    texts = _sequences()
    expected = [_alone(kind, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for ids in texts]
    for order in (list(range(6)), [3, 0, 5, 1, 4, 2]):
        model = _model(kind)
        found = sequence_logprobs(model, [texts[row] for row in order])
        served = float_model(model).prompt_logprobs([texts[row] for row in order], [None] * 6)
        for row, one, other in zip(order, found, served, strict=True):
            _close(one, expected[row])
            _close(other, expected[row])


def test_the_reference_judges_texts_apart(kind: str) -> None:
    texts = _sequences()
    reference = ReferenceModel(lambda _: _model(kind))
    together = reference.token_gaps([ids[:3] for ids in texts], [ids[3:] for ids in texts], [None] * 6, [None] * 6)
    for ids, gaps in zip(texts, together, strict=True):
        logprobs = _alone(kind, ids)[2:-1]
        _close(gaps, logprobs.max(-1).values - logprobs.gather(1, torch.tensor(ids[3:])[:, None])[:, 0])
    model = _model(kind)
    for batch in batches_of(sorted(range(6), key=lambda row: LENGTHS[row]), texts, model):
        assert len(RotarySwitch.of(model).apart([LENGTHS[row] for row in batch])) == 1


@pytest.mark.parametrize("asks", [False, True])
def test_texts_are_written_alone_or_beside_others_alike(kind: str, asks: bool) -> None:
    prompts = _sequences((4, 9, 15, 16, 17, 25, 9, 12))

    def ended(text: Any) -> bool:
        return len(text) >= 11

    options = {"ended": ended} if asks else {}
    alone = [continue_greedily(_model(kind), [prompt], 12, **options)[0] for prompt in prompts]
    for order in (list(range(8)), [5, 2, 0, 7, 1, 6, 4, 3]):
        together = continue_greedily(_model(kind), [prompts[row] for row in order], 12, **options)
        assert together == [alone[row] for row in order]
    assert all(len(text) == 12 or text[-1] == 2 or asks for text in alone)


def test_what_is_written_across_the_switch_is_what_the_whole_text_says() -> None:
    """Each token is the best one by a pass over all before it: keys of the short factors are not kept behind."""
    prompts = _sequences((4, 9, 15, 16, 17, 25))
    for prompt, text in zip(prompts, continue_greedily(_model("phi3-longrope"), prompts, 12), strict=True):
        for place in range(len(text)):
            logprobs = _alone("phi3-longrope", [*prompt, *text[:place]])[-1]
            assert float(logprobs.max() - logprobs[text[place]]) < 1e-4


def test_a_long_text_leaves_nothing_behind_for_the_next(kind: str) -> None:
    texts, model = _sequences((40, 18, 30, 16)), _model(kind)
    for ids in texts:
        (found,) = sequence_logprobs(model, [ids])
        _close(found, _alone(kind, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    windows = torch.tensor(_sequences((20, 20)))
    stream = BlockStream(model, find_blocks(model, ""), windows, device="cpu", batch=2)
    hidden = stream.hidden
    for index in range(2):
        hidden = stream.forward_block(index, hidden)
    logits = stream.differentiable_logits(0, hidden[0], slice(None)).detach().log_softmax(-1)
    for row, ids in zip(logits, windows.tolist(), strict=True):
        _close(row, _alone(kind, ids))


def test_training_takes_each_side_by_itself(kind: str, tmp_path: Path) -> None:
    rows = []
    for ids in _sequences():
        labels = torch.tensor(ids, dtype=torch.int32)
        labels[:3] = NOT_LEARNED
        rows.append({"input_ids": torch.tensor(ids, dtype=torch.int32), "labels": labels})
    losses = []
    for ids in _sequences():
        logprobs = _alone(kind, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        losses.append(-logprobs[2:])
    expected = torch.cat(losses).mean()

    model = _model(kind)
    model.loss_function = next_token_loss
    forget_lengths(model)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = AdapterTrainer(model=model, args=arguments, data_collator=pad_batch)
    batch, learned = pad_batch(rows), sum(len(loss) for loss in losses)
    for divided in (None, learned, torch.tensor(learned)):
        _close(trainer.compute_loss(model, dict(batch), num_items_in_batch=divided).detach(), expected)
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs is not None
    # The gradient too is that of the sequences one by one.
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in rows:
        one = pad_batch([row])
        trainer.compute_loss(model, one, num_items_in_batch=learned).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_models_without_a_switch_are_computed_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = _model("llama"), itertools.count()
    plain = model.forward

    def counted(*args: Any, **options: Any) -> Any:
        next(calls)
        return plain(*args, **options)

    monkeypatch.setattr(model, "forward", counted)
    sequence_logprobs(model, _sequences())
    assert next(calls) == 1
