"""Log-probabilities of several tokens in each place, as engines list them and as the reference computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cloq_export.engines.alternatives import Alternatives
from cloq_export.engines.transformers.reference import ReferenceModel
from cloq_export.engines.transformers.served import float_model

IDS = [3, 9, 4, 4, 11, 2, 30]


def test_logits_give_the_next_token_and_the_most_probable_others() -> None:
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 0, 11, 5, 5])
    found = Alternatives.of_logits(logits, targets, 4)
    for place, target in enumerate(targets.tolist()):
        truth = logits[place].double().log_softmax(-1)
        others = sorted(set(range(12)) - {target}, key=lambda token: -float(truth[token]))[:4]
        assert found.tokens[place].tolist() == [target, *others]
        assert torch.allclose(found.logprobs[place].double(), truth[[target, *others]], atol=1e-6)
    assert Alternatives.of_logits(logits, targets, 99).tokens.shape == (5, 12)


def test_entries_are_ordered_and_cut_to_what_every_place_has() -> None:
    places = [{9: -1.0, 4: -0.5, 7: -3.0}, {4: -0.1, 8: -5.0, 1: -2.0, 0: -4.0}]
    found = Alternatives.of_entries([3, 9, 4], places, 3)
    assert found.tokens.tolist() == [[9, 4, 7], [4, 1, 0]]
    assert found.logprobs.tolist() == [[-1.0, -0.5, -3.0], pytest.approx([-0.1, -2.0, -4.0])]
    assert Alternatives.of_entries([3], [], 3).tokens.shape == (0, 4)


def test_other_tokens_are_looked_up_one_by_one() -> None:
    found = Alternatives(torch.tensor([[5, 6], [1, 2]]), torch.tensor([[-1.0, torch.nan], [-3.0, -4.0]]))
    values, known = found.looked_up(torch.tensor([[6, 5], [2, 9]]))
    assert known.tolist() == [[True, True], [True, False]]
    assert values[0, 0].isnan()
    assert values[0, 1] == -1.0
    assert values[1].tolist() == [-4.0, 0.0]


def test_a_transformers_model_lists_what_it_scores(tiny_model: Callable[..., Any]) -> None:
    engine = float_model(tiny_model("llama"))
    rows = [IDS, IDS[:3]]
    listed = engine.alternative_logprobs(rows, [None, None], 5)
    for ids, scored, found in zip(rows, engine.prompt_logprobs(rows, [None, None]), listed, strict=True):
        assert found.tokens.shape == (len(ids) - 1, 6)
        assert found.tokens[:, 0].tolist() == ids[1:]
        assert torch.allclose(found.logprobs[:, 0], scored, atol=1e-5)


def test_the_reference_scores_any_tokens(tiny_model: Callable[..., Any]) -> None:
    reference = ReferenceModel(lambda _: tiny_model("llama"))
    rows = [IDS[:4], IDS]
    listed = reference.alternative_logprobs(rows, [None, None], 5)
    again = reference.logprobs_of(rows, None, [each.tokens for each in listed])
    for found, wanted in zip(again, listed, strict=True):
        assert torch.allclose(found, wanted.logprobs, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_reference_rounds_for_a_while(tiny_model: Callable[..., Any], family: str) -> None:
    model = tiny_model(family)
    reference = ReferenceModel(lambda _: model)
    modules = [name for name, module in model.named_modules() if name.endswith("_proj")]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = reference.prompt_logprobs([IDS], [None])[0]
    with reference.rounded(None, modules, torch.bfloat16):
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert model.get_submodule(modules[0]).weight.dtype == torch.float32
        rounded = reference.prompt_logprobs([IDS], [None])[0]
    assert 1e-5 < (rounded - exact).abs().max() < 0.5
    assert torch.equal(reference.prompt_logprobs([IDS], [None])[0], exact)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())


def test_gradients_of_scales_equal_small_changes(tiny_model: Callable[..., Any]) -> None:
    reference = ReferenceModel(lambda _: tiny_model("llama"))
    rows = [IDS, IDS[::-1]]
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    tokens = torch.stack([each.tokens for each in reference.alternative_logprobs(rows, [None] * 2, 3)])
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    found = reference.scale_gradients(rows, None, modules, tokens, [weights])
    assert found.shape == (1, 2, 2)
    for number, module in enumerate(modules):
        sums = []
        for factor in (1.001, 0.999):
            with reference.scaled(None, module, factor):
                changed = torch.stack(reference.logprobs_of(rows, None, list(tokens)))
            sums.append((changed.double() * weights).sum((1, 2)))
        # Central differences of float32 log-probabilities over 0.002: two digits are left.
        assert torch.allclose(found[0, :, number], (sums[0] - sums[1]) / 0.002, rtol=0.02, atol=0.02)
