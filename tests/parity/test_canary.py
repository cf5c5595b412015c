"""The canary on tiny models: a good sync passes, and what may go wrong in one is named with its step."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
import transformers
from passing_runtime import PassingRuntime

from cloq_export.engines.held_adapters import HeldAdapter, factors_digest, factors_of
from cloq_export.engines.transformers.served import TransformersModel
from cloq_export.errors import GateMissedError, UsageError
from cloq_export.parity.canary import SyncCanary

PROBES = [[5, 6, 7, 8, 9, 10, 11], [3, 1, 4, 1, 5]]


def made() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", lora_dropout=0.5),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model.train()


class Engine(TransformersModel):
    """Serves copies of a trainer's model as they were when they were loaded."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        super().__init__(lambda name: self.loaded[str(name)])

    def load(self, name: str, model: Any) -> Any:
        self.loaded[name] = self._models[name] = copy.deepcopy(model).eval()
        return self.loaded[name]


def step(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.01)


def test_a_good_sync_passes_at_every_step_and_leaves_the_trainer_as_it_was() -> None:
    model, engine = made(), Engine()
    canary = SyncCanary(model, engine, PROBES, needs_weights=True)
    for number in range(2):
        step(model)
        engine.load(f"policy-{number}", model)
        found = canary.check(number, f"policy-{number}")
        assert (found.step, found.modules, found.same_weights) == (number, 14, True)
        assert found.logprob_difference_max < 1e-5  # although the trainer has dropout
        assert found.token_mult_prob_error == pytest.approx(1.0, abs=1e-5)
        assert found.divergence.kl_max < 1e-6
        assert found.divergence.top1_agreement == 1.0
        assert model.training
    assert set(found.to_json()) >= {"step", "same_weights", "logprob_difference_max", "divergence"}


def test_an_engine_that_has_an_old_adapter_is_named_with_the_step() -> None:
    model, engine = made(), Engine()
    canary = SyncCanary(model, engine, PROBES)
    engine.load("policy", model)
    canary.check(6, "policy")
    step(model)
    message = (
        r"step 7: in 14 of 14 modules of policy the engine holds other weights than the trainer: \S+, \S+, \S+ and 11"
    )
    with pytest.raises(GateMissedError, match=message):
        canary.check(7, "policy")


def test_one_module_of_many_is_found_by_its_weights_and_by_what_they_do() -> None:
    model, engine = made(), Engine()
    canary = SyncCanary(model, engine, PROBES)
    served = engine.load("policy", model)
    name = "model.layers.1.mlp.up_proj"
    served.get_base_model().get_submodule(name).lora_B["default"].weight.data[0, 0] += 1e-6
    with pytest.raises(GateMissedError, match=f"step 3: in 1 of 14 modules of policy .*: {name}; load"):
        canary.check(3, "policy")
    served = engine.load("policy", model)
    served.get_base_model().get_submodule(name).lora_A.clear()
    with pytest.raises(GateMissedError, match="step 3: in 1 of 14 modules"):
        canary.check(3, "policy")


def test_an_engine_that_holds_the_weights_and_does_not_use_them() -> None:
    """What one project trained against for two months: every request gets the base."""
    model, engine = made(), Engine()

    class Ignores(PassingRuntime):
        def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
            with self.inner.model("policy").disable_adapter():
                return super().prompt_logprobs(token_ids, adapters)

        def held_adapter(self, name: str) -> HeldAdapter | None:
            return self.inner.held_adapter(name)

    engine.load("policy", model)
    with pytest.raises(
        GateMissedError, match=r"step 1: log-probabilities of policy differ by \S+ nats .* although it holds"
    ):
        SyncCanary(model, Ignores(engine), PROBES).check(1, "policy")
    wide = SyncCanary(model, Ignores(engine), PROBES, limit=20.0).check(1, "policy")
    assert wide.logprob_difference_max > 1e-2


def test_an_engine_that_does_not_tell_is_judged_by_what_it_computes() -> None:
    model, engine = made(), Engine()
    engine.load("policy", model)
    silent = PassingRuntime(engine)
    assert SyncCanary(model, silent, PROBES).check(0, "policy").same_weights is None
    with pytest.raises(GateMissedError, match=r"step 0: the engine does not tell which weights of policy it holds"):
        SyncCanary(model, silent, PROBES, needs_weights=True).check(0, "policy")
    step(model)
    with pytest.raises(GateMissedError, match=r"step 1: log-probabilities .* and does not tell its weights"):
        SyncCanary(model, silent, PROBES).check(1, "policy")


def test_an_engine_that_gives_no_number() -> None:
    model, engine = made(), Engine()

    class Broken(PassingRuntime):
        def prompt_logprobs(self, token_ids: Any, adapters: Any) -> list[torch.Tensor]:
            return [values * math.nan for values in super().prompt_logprobs(token_ids, adapters)]

    engine.load("policy", model)
    with pytest.raises(GateMissedError, match="step 2: log-probabilities of policy differ by NaN or Inf"):
        SyncCanary(model, Broken(engine), PROBES).check(2, "policy")


def test_misuse() -> None:
    model, engine = made(), Engine()
    with pytest.raises(UsageError, match="a canary needs probes of two or more tokens"):
        SyncCanary(model, engine, [[1]])
    with pytest.raises(UsageError, match="no LoRA layer of the adapter 'other'"):
        SyncCanary(model, engine, PROBES, adapter_name="other")
    with pytest.raises(UsageError, match="`limit` is nan"):
        SyncCanary(model, engine, PROBES, limit=math.nan)


def test_hashes_are_of_what_an_engine_of_that_precision_holds() -> None:
    a, b = torch.randn(4, 8), torch.randn(6, 4)
    whole = factors_digest(a, b, 2.0, torch.float32)
    assert whole == factors_digest(a.clone(), b.t().contiguous().t(), 2, torch.float32)
    assert whole != factors_digest(a, b, 1.0, torch.float32)
    assert whole != factors_digest(a, b, 2.0, torch.bfloat16)
    rounded = factors_digest(a.bfloat16(), b.bfloat16(), 2.0, torch.bfloat16)
    assert factors_digest(a, b, 2.0, torch.bfloat16) == rounded
    factors = factors_of(made().get_base_model().named_modules(), "default")
    assert len(factors) == 14
    assert all(scaling == 3.0 for _, _, scaling in factors.values())
    mine = HeldAdapter.of(factors, "float16")
    assert HeldAdapter.from_json(mine.to_json()) == mine
    # Engines call modules otherwise.
    assert not mine.differing(HeldAdapter("float16", {f"x.{name}": each for name, each in mine.modules.items()}))
