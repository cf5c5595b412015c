"""Transformers models as engines: the float model, and the packed one with its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq_export.engines.alternatives import Alternatives
from cloq_export.engines.decoding import Ended, continue_greedily, prompts_per_batch
from cloq_export.engines.held_adapters import HeldAdapter, factors_of
from cloq_export.engines.protocol import TokenDistributions
from cloq_export.engines.transformers.loading import load
from cloq_export.errors import UsageError
from cloq_export.models.context import require_known_tokens
from cloq_export.models.devices import device_of
from cloq_export.models.rotary_switch import RotarySwitch, forget_lengths

# Logits that one forward pass may make: half a gigabyte in float32.
_BATCH_LOGITS = 1 << 27
# Rows of logits that are turned to float32 log-probabilities at a time.
_LOGIT_ROWS = 256


class TransformersModel:
    """A transformers model and its adapters; each adapter is loaded when it is first asked for.

    Requests of one adapter make a batch of their own: a transformers model computes a whole batch with one adapter.

    Args:
        load_model: from the name of an adapter, or None for the base, to a model in evaluation mode. The models may
            share tensors.
    """

    def __init__(self, load_model: Callable[[str | None], nn.Module]) -> None:
        self._load_model = load_model
        self._models: dict[str | None, nn.Module] = {}

    def model(self, adapter: str | None) -> Any:
        """Return the transformers model that serves an adapter, or the base."""
        if adapter not in self._models:
            self._models[adapter] = self._load_model(adapter)
        return self._models[adapter]

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence; see `ServedModel`.

        Raises:
            UsageError: a sequence has less than two tokens, or adapters and sequences differ in number.
        """
        results: list[torch.Tensor] = [torch.empty(0)] * len(token_ids)
        for adapter, rows in rows_by_adapter(token_ids, adapters, shortest=2):
            model = self.model(adapter)
            for batch in batches_of(rows, token_ids, model):
                measured = sequence_logprobs(model, [token_ids[row] for row in batch])
                for row, values in zip(batch, measured, strict=True):
                    results[row] = values
        return results

    def token_distributions(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]
    ) -> list[TokenDistributions]:
        """Return the log-probabilities of the whole vocabulary in each place; see `ServedModel`.

        Raises:
            UsageError: as `prompt_logprobs`.
        """
        results = [TokenDistributions(torch.empty(0, 0))] * len(token_ids)
        for adapter, rows in rows_by_adapter(token_ids, adapters, shortest=2):
            model = self.model(adapter)
            for row in rows:
                results[row] = TokenDistributions(whole_vocabulary(model, token_ids[row]))
        return results

    def alternative_logprobs(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], count: int
    ) -> list[Alternatives]:
        """Return log-probabilities of the next token and of the most probable others; see `ServedModel`.

        Raises:
            UsageError: as `prompt_logprobs`.
        """
        results: list[Alternatives | None] = [None] * len(token_ids)
        for adapter, rows in rows_by_adapter(token_ids, adapters, shortest=2):
            model = self.model(adapter)
            for batch in batches_of(rows, token_ids, model):
                padded = padded_rows([token_ids[row] for row in batch], model)
                with torch.no_grad():
                    logits = model(input_ids=padded, use_cache=False).logits
                for place, row in enumerate(batch):
                    length = len(token_ids[row])
                    targets = padded[place, 1:length]
                    results[row] = Alternatives.of_logits(logits[place, : length - 1], targets, count)
        return [each for each in results if each is not None]

    def generate(
        self,
        token_ids: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        max_new_tokens: int,
        *,
        ended: Ended | None = None,
    ) -> list[list[int]]:
        """Return the most probable continuation of each prompt; see `ServedModel`.

        Args:
            token_ids: prompts.
            adapters: as in `prompt_logprobs`.
            max_new_tokens: at most.
            ended: tells from the new tokens that nothing more is wanted; asked every few steps.

        Returns:
            list: token ids, an end-of-text token last if the model gave one.

        Raises:
            UsageError: a prompt is empty, or adapters and prompts differ in number.
        """
        results: list[list[int]] = [[] for _ in token_ids]
        for adapter, rows in rows_by_adapter(token_ids, adapters, shortest=1):
            model = self.model(adapter)
            for piece in _little_padded(rows, token_ids):
                # The longest stands last: rows are sorted.
                size = prompts_per_batch(model, len(token_ids[piece[-1]]) + max_new_tokens)
                for start in range(0, len(piece), size):
                    batch = piece[start : start + size]
                    continued = continue_greedily(model, [token_ids[row] for row in batch], max_new_tokens, ended=ended)
                    for row, ids in zip(batch, continued, strict=True):
                        results[row] = ids
        return results

    def held_adapter(self, name: str) -> HeldAdapter | None:
        """Return which weights the model holds of an adapter, in float32.

        Args:
            name: of the adapter.
        """
        model = self.model(name)
        return HeldAdapter.of(factors_of(model.named_modules(), "default"), "float32")

    def close(self) -> None:
        """Let go of the models."""
        self._models.clear()


def float_model(model: nn.Module) -> TransformersModel:
    """Return a float model as a runtime without adapters.

    Args:
        model: a transformers model in evaluation mode.
    """

    def load_model(adapter: str | None) -> nn.Module:
        if adapter is not None:
            raise UsageError(f"the float model has no adapter, and {adapter!r} was asked for; ask for None.")
        return model

    return TransformersModel(load_model)


def packed_model(
    export: Path,
    adapters: Mapping[str, Path],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    force: bool = False,
) -> TransformersModel:
    """Return the packed transformers runtime, `cloq_export.load`, with several adapters over one copy of the base.

    Args:
        export: the quantized checkpoint.
        adapters: name -> adapter folder.
        dtype: of the float tensors and the activations.
        device: where it computes.
        force: take adapters of another base.
    """
    return TransformersModel(
        over_one_base(
            lambda name: load(export, adapter_folder(adapters, name), device=device, dtype=dtype, force=force)
        )
    )


def sequence_logprobs(model: Any, token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return log p(x_i | x_1..x_{i-1}) of each sequence from one forward pass.

    Shorter sequences are filled up behind their end, which a causal model does not look at. Sequences on two sides of
    a switch of rotary frequencies take a forward pass each.

    Args:
        model: a causal language model.
        token_ids: sequences of two or more tokens.

    Returns:
        list: one (n - 1,) float32 tensor on the CPU per sequence.
    """
    forget_lengths(model)
    logprobs: list[torch.Tensor] = [torch.empty(0)] * len(token_ids)
    for together in RotarySwitch.of(model).apart([len(ids) for ids in token_ids]):
        padded = padded_rows([token_ids[row] for row in together], model)
        with torch.no_grad():
            logits = model(input_ids=padded, use_cache=False).logits
        for place, row in enumerate(together):
            length = len(token_ids[row])
            logprobs[row] = _gathered(logits[place, : length - 1], padded[place, 1:length])
    # One copy for all.
    return list(torch.cat(logprobs).cpu().split([len(ids) - 1 for ids in token_ids]))


def whole_vocabulary(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Return log p(v | x_1..x_{i-1}), i = 2..n, of every token v, (n - 1, vocabulary) float32 on the CPU.

    Args:
        model: a causal language model.
        token_ids: two or more tokens.
    """
    with torch.no_grad():
        logits = model(input_ids=padded_rows([token_ids], model), use_cache=False).logits[0, :-1]
    return logits.to(torch.float32).log_softmax(-1).cpu()


def padded_rows(token_ids: Sequence[Sequence[int]], model: Any) -> torch.Tensor:
    """Return sequences as one (sequences, longest) tensor on the model's device, filled up by zeros.

    Raises:
        DataError: a token is outside of the model's vocabulary.
    """
    longest = max(len(ids) for ids in token_ids)
    padded = torch.zeros(len(token_ids), longest, dtype=torch.int64)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    require_known_tokens(model, padded, "the tokens of a text")
    return padded.to(device_of(model))


def over_one_base(load_model: Callable[[str | None], nn.Module]) -> Callable[[str | None], nn.Module]:
    """Return a loader whose models with an adapter hold the tensors of the base that it loaded first."""
    base: list[nn.Module] = []

    def load_one(adapter: str | None) -> nn.Module:
        if not base:
            base.append(load_model(None))
        if adapter is None:
            return base[0]
        model = load_model(adapter)
        _share_tensors(model, base[0])
        return model

    return load_one


def _share_tensors(model: nn.Module, base: nn.Module) -> None:
    """Let a model with an adapter hold the base's own tensors instead of equal ones."""
    twins = dict(base.named_modules())
    for name, module in model.named_modules():
        twin = twins.get(name.replace(".base_layer", ""))
        if twin is None or type(twin) is not type(module):
            continue  # PEFT's wrapper, or a part of the adapter
        for held, shared in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
            for key in held:
                if shared.get(key) is not None:
                    held[key] = shared[key]  # type: ignore[assignment]


def adapter_folder(adapters: Mapping[str, Path], name: str | None) -> Path | None:
    """Return the folder of an adapter; None for the base.

    Raises:
        UsageError: there is no adapter of that name.
    """
    if name is None:
        return None
    if name not in adapters:
        raise UsageError(f"there is no adapter {name!r}; there are {', '.join(adapters) or 'none'}.")
    return adapters[name]


def rows_by_adapter(
    token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], *, shortest: int
) -> Iterator[tuple[str | None, list[int]]]:
    """Yield each adapter with the numbers of its requests, shortest first.

    Raises:
        UsageError: a sequence has less than `shortest` tokens, or adapters and sequences differ in number.
    """
    if len(token_ids) != len(adapters):
        raise UsageError(f"{len(token_ids)} sequences and {len(adapters)} adapters were given; give one for each.")
    short = next((ids for ids in token_ids if len(ids) < shortest), None)
    if short is not None:
        raise UsageError(f"a sequence has {len(short)} tokens; at least {shortest} are needed.")
    for adapter in dict.fromkeys(adapters):
        rows = [row for row, own in enumerate(adapters) if own == adapter]
        yield adapter, sorted(rows, key=lambda row: len(token_ids[row]))


def batches_of(rows: Sequence[int], token_ids: Sequence[Sequence[int]], model: nn.Module) -> Iterator[list[int]]:
    """Yield rows in batches that one forward pass can take, those on two sides of a rotary switch apart.

    Args:
        rows: their numbers, sorted by length.
        token_ids: of all rows.
        model: says how many tokens may be together.
    """
    limit, switch = tokens_per_batch(model), RotarySwitch.of(model)
    forget_lengths(model)
    for together in switch.apart([len(token_ids[row]) for row in rows]):
        for batch in _little_padded([rows[place] for place in together], token_ids):
            count = max(1, limit // len(token_ids[batch[-1]]))
            yield from (batch[start : start + count] for start in range(0, len(batch), count))


def _little_padded(rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield rows, sorted by length, in pieces of which filling them up at most doubles the tokens."""
    piece: list[int] = []
    held = 0
    for row in rows:
        length = len(token_ids[row])
        if (len(piece) + 1) * length > 2 * (held + length):
            yield piece
            piece, held = [], 0
        piece.append(row)
        held += length
    yield piece


def tokens_per_batch(model: Any) -> int:
    """Return for how many tokens a forward pass may make logits."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    vocabulary = getattr(text_config, "vocab_size", None) or _BATCH_LOGITS
    return max(1, _BATCH_LOGITS // vocabulary)


def _gathered(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits)[targets] as float32; logits (n, vocabulary), targets (n,)."""
    pieces = [
        -nn.functional.cross_entropy(part.to(torch.float32), wanted, reduction="none")
        for part, wanted in zip(logits.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(pieces)
