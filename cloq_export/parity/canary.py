"""The sync canary: after each sync, does the engine hold the trainer's weights, and compute with them?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cloq_export.engines.held_adapters import HeldAdapter, factors_of
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import sequence_logprobs, whole_vocabulary
from cloq_export.errors import GateMissedError, UsageError
from cloq_export.parity.divergence import Divergence, divergences, summarize_divergences
from cloq_export.parity.numerics import compare_logprobs, measure_logprobs
from cloq_export.parity.plain import Result

# Of the largest difference of a log-probability in float32; `parity.gate.float32_limit` has that of 2-bit bases.
LIMIT = 1e-3


@dataclasses.dataclass(frozen=True)
class SyncFigures(Result):
    """What the canary measured after one sync.

    Args:
        step: of the training.
        adapter: the name under which the engine serves.
        modules: that the trainer adapts.
        same_weights: whether the engine holds the trainer's A and B, bit for bit in the engine's precision; None where
            it does not tell, as without this package's plugin.
        logprob_difference_max: largest |log p - log p_trainer| on the probe; None if one is NaN.
        token_mult_prob_error: mean of exp |log p - log p_trainer|; None as above.
        divergence: KL divergence of the engine's distributions from the trainer's.
    """

    step: int
    adapter: str
    modules: int
    same_weights: bool | None
    logprob_difference_max: float | None
    token_mult_prob_error: float | None
    divergence: Divergence


class SyncCanary:
    """Compares a trainer with an engine after each sync, and stops a training whose engine has other weights.

    Two things are compared: a hash of A and B of each module, with the one that the engine made of what it read, and
    log-probabilities of fixed probes, which show that it computes with them. Any base and any PEFT LoRA will do, as
    long as trainer and engine have the same base.

    Args:
        model: the trainer's PEFT model.
        served: the engine: a `ServerClient` of a vLLM server, a `VllmModel`, or a `TransformersModel`.
        probes: token ids of two or more tokens each; a few hundred tokens of the task's own text will do.
        limit: largest difference of a log-probability that is allowed.
        adapter_name: PEFT's name of the adapter that is trained.
        needs_weights: an engine that does not tell what it holds is an error.

    Raises:
        UsageError: there is no probe, or the model has no LoRA layer of this adapter.
    """

    def __init__(
        self,
        model: Any,
        served: ServedModel,
        probes: Sequence[Sequence[int]],
        *,
        limit: float = LIMIT,
        adapter_name: str = "default",
        needs_weights: bool = False,
    ) -> None:
        if not probes or min(map(len, probes)) < 2:
            raise UsageError("a canary needs probes of two or more tokens each; give some of the task's own text.")
        if not (math.isfinite(limit) and limit >= 0):
            raise UsageError(f"`limit` is {limit}; a number of nats from 0 on is needed.")
        self._model, self._served, self._name = model, served, adapter_name
        self._probes, self._limit, self._needs_weights = [list(ids) for ids in probes], limit, needs_weights
        self._factors()

    def check(self, step: int, adapter: str) -> SyncFigures:
        """Compare trainer and engine.

        Args:
            step: of the training, for the message.
            adapter: the name under which the engine serves the weights of this step.

        Returns:
            SyncFigures: what was measured.

        Raises:
            GateMissedError: the engine holds or computes something else; it names the step and the figure.
            EngineError: the engine does not answer.
        """
        factors = self._factors()
        held = self._held(adapter)
        if held is None and self._needs_weights:
            raise GateMissedError(
                f"step {step}: the engine does not tell which weights of {adapter} it holds; install cloq-export "
                "beside vLLM, or leave `needs_weights` out."
            )
        if held is not None:
            self._refuse_other_weights(step, adapter, HeldAdapter.of(factors, held.dtype), held)
        figures = self._figures(step, adapter, len(factors), None if held is None else True)
        difference = figures.logprob_difference_max
        if difference is None or difference > self._limit:
            said = "NaN or Inf" if difference is None else f"{difference:g} nats"
            weights = "although it holds the same weights" if figures.same_weights else "and does not tell its weights"
            raise GateMissedError(
                f"step {step}: log-probabilities of {adapter} differ by {said} between trainer and engine, at most "
                f"{self._limit:g} is allowed, {weights}; check base, precision and scaling of both."
            )
        return figures

    def _refuse_other_weights(self, step: int, adapter: str, mine: HeldAdapter, held: HeldAdapter) -> None:
        wrong, count = mine.differing(held), len(mine.modules)
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        if wrong:
            raise GateMissedError(
                f"step {step}: in {len(wrong)} of {count} modules of {adapter} the engine holds other weights than the "
                f"trainer: {', '.join(wrong[:3])}{more}; load the adapter of this step again, and stop if that does "
                "not help."
            )
        if len(held.modules) != count:
            raise GateMissedError(
                f"step {step}: the engine holds {len(held.modules)} modules of {adapter} and the trainer adapts "
                f"{count}; load the adapter of this step again."
            )

    def _factors(self) -> dict[str, Any]:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        factors = factors_of(base.named_modules(), self._name)
        if not factors:
            raise UsageError(f"the model has no LoRA layer of the adapter {self._name!r}; name it with `adapter_name`.")
        return factors

    def _held(self, adapter: str) -> HeldAdapter | None:
        tell = getattr(self._served, "held_adapter", None)
        held: HeldAdapter | None = None if tell is None else tell(adapter)
        return held

    def _figures(self, step: int, adapter: str, modules: int, same: bool | None) -> SyncFigures:
        served = measure_logprobs(self._served, self._probes, [adapter] * len(self._probes))
        with self._evaluating() as model:
            own = [sequence_logprobs(model, [ids])[0] for ids in self._probes]
            places = []
            for ids in self._probes:
                distributions = self._served.token_distributions([ids], [adapter])[0]
                places.append(divergences(whole_vocabulary(model, ids), distributions))
        differences = compare_logprobs(served, own)
        return SyncFigures(
            step,
            adapter,
            modules,
            same,
            differences.max,
            differences.token_mult_prob_error,
            summarize_divergences(places),
        )

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[Any]:
        training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                yield self._model
        finally:
            self._model.train(training)
