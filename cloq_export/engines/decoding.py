"""Greedy continuation of many prompts by a transformers model, with keys and values read as they lie.

Transformers copies all keys and values for every new token, and once more for every query head that shares them. With
a hundred prompts at a time that takes most of the time, so both are done without copies here. A model that keeps
anything else than all keys and values of every layer is continued by transformers' own `generate`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cloq_export.errors import NonFiniteError
from cloq_export.models.context import require_known_tokens
from cloq_export.models.devices import device_of
from cloq_export.models.rotary_switch import RotarySwitch, forget_lengths

Ended = Callable[[Sequence[int]], bool]

# Keys and values that a batch may take, and prompts that are continued together at most.
_CACHE_BYTES = 2 << 30
_BATCH_PROMPTS = 128
# Share of the prompts that may have ended before their rows are taken out of the cache.
_ENDED_SHARE = 0.125
# Steps between two questions whether a text has come to its end.
_STOP_STEPS = 8
# Tokens for which a full cache is enlarged.
_ROOM = 64
_GROUPED = "cloq_grouped_sdpa"


def prompts_per_batch(model: Any, tokens: int) -> int:
    """Return how many prompts may be continued together.

    Args:
        model: a causal language model.
        tokens: of the longest prompt with its continuation.
    """
    config = model.config.get_text_config()
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    except (AttributeError, RuntimeError):
        width = config.hidden_size  # a model without attention, or with other heads in every layer
    size = next((parameter.element_size() for parameter in model.parameters()), 4)
    per_token = 2 * config.num_hidden_layers * width * size
    return int(max(1, min(_BATCH_PROMPTS, _CACHE_BYTES // (per_token * tokens))))


def continue_greedily(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, ended: Ended | None = None
) -> list[list[int]]:
    """Return the most probable continuation of each prompt, computed together with a cache of keys and values.

    Prompts are filled up in front, and masked there. Nothing but the largest logit decides: what a model's
    generation_config.json says about sampling or penalties is ignored, except its end-of-text tokens.

    Args:
        model: a causal language model.
        prompts: token ids, at least one each.
        max_new_tokens: at most.
        ended: tells from the new tokens that nothing more is wanted.

    Returns:
        list: token ids for each prompt, an end-of-text token last if the model gave one.

    Raises:
        NonFiniteError: the model gives NaN or Inf.
    """
    switch = RotarySwitch.of(model)
    forget_lengths(model)
    if not switch:
        return _continue_together(model, prompts, max_new_tokens, ended)
    results: list[list[int]] = [[] for _ in prompts]
    for rows in _beside_switch(switch, [len(prompt) for prompt in prompts], max_new_tokens):
        texts = _continue_across(switch, model, [prompts[row] for row in rows], max_new_tokens, ended)
        for row, text in zip(rows, texts, strict=True):
            results[row] = text
    return results


def _beside_switch(switch: RotarySwitch, lengths: Sequence[int], new: int) -> list[list[int]]:
    """Return numbers of prompts that may be continued together: on one side to the end, or of one length."""
    groups: dict[Any, list[int]] = {}
    for row, length in enumerate(lengths):
        first, last = switch.side(length), switch.side(length + new - 1)
        groups.setdefault(first if first == last else length, []).append(row)
    return list(groups.values())


def _continue_across(
    switch: RotarySwitch, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ended: Ended | None
) -> list[list[int]]:
    """Return continuations of prompts that come to a switch together, if they do.

    Keys that were computed with the short factors of LongRoPE do not go with queries of the long ones: behind the
    switch the text is read again from its start.
    """
    ends = end_tokens(model)
    texts: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    crossing = len({len(prompt) for prompt in prompts}) == 1
    stretches = switch.stretches(len(prompts[0]), max_new_tokens) if crossing else [max_new_tokens]
    for stretch in stretches:
        # `ended` needs the whole text of a row, and after a switch each row has a different beginning.
        anew = ended is not None and any(texts)
        for rows in [[row] for row in alive] if anew else [alive]:
            so_far = [[*prompts[row], *texts[row]] for row in rows]
            asked = _behind(texts[rows[0]], ended) if anew and ended is not None else ended
            for row, new in zip(rows, _continue_together(model, so_far, stretch, asked), strict=True):
                texts[row] += new
        alive = [row for row in alive if texts[row][-1] not in ends and not (ended is not None and ended(texts[row]))]
        if not alive:
            break
    return texts


def _behind(text: Sequence[int], ended: Ended) -> Ended:
    before = tuple(text)
    return lambda new: ended([*before, *new])


def _continue_together(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ended: Ended | None
) -> list[list[int]]:
    """Return continuations that are computed together to the end."""
    accepted = inspect.signature(model.forward).parameters
    cache = _roomy_cache(model) if "past_key_values" in accepted else None
    if cache is None:
        return _generate(model, prompts, max_new_tokens, ended)
    device = device_of(model)
    ends = end_tokens(model)
    ids, mask = _filled_up(prompts, model)
    results: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # prompt of each row of the cache
    open_rows = [True] * len(alive)
    with torch.no_grad(), _grouped_attention(model):
        for step in range(max_new_tokens):
            options: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            if "position_ids" in accepted:
                options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            if "logits_to_keep" in accepted:
                options["logits_to_keep"] = 1
            output = model(input_ids=ids, **options)
            logits, cache = output.logits[:, -1].to(torch.float32), output.past_key_values
            chosen = logits.argmax(-1)
            # Read together: a GPU's host waits once for each token.
            *tokens, finite = torch.cat([chosen, torch.isfinite(logits).all()[None]]).tolist()
            _refuse_overflow(bool(finite))
            for row, token in enumerate(tokens):
                if open_rows[row]:
                    text = results[alive[row]]
                    text.append(token)
                    asked = ended is not None and (step + 1) % _STOP_STEPS == 0
                    open_rows[row] = not (token in ends or (asked and ended is not None and ended(text)))
            if not any(open_rows):
                break
            if open_rows.count(False) >= _ENDED_SHARE * len(open_rows):
                kept = [row for row, still in enumerate(open_rows) if still]
                index = torch.tensor(kept, device=device)
                cache.batch_select_indices(index)
                mask, chosen = mask[index], chosen[index]
                alive, open_rows = [alive[row] for row in kept], [True] * len(kept)
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return results


def _filled_up(prompts: Sequence[Sequence[int]], model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their mask, (prompts, longest), filled up in front, on a model's device.

    Raises:
        DataError: a token is outside of the model's vocabulary.
    """
    longest = max(len(ids) for ids in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    require_known_tokens(model, ids, "the tokens of a prompt")
    return ids.to(device_of(model)), mask.to(device_of(model))


def _refuse_overflow(finite: bool) -> None:
    if not finite:
        raise NonFiniteError("the model gives NaN or Inf while it generates; run it in float32.")


def _generate(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, ended: Ended | None
) -> list[list[int]]:
    """Return continuations as transformers' `generate` makes them, with the cache that the model makes for itself."""
    ends = end_tokens(model)
    results: list[list[int]] = [[] for _ in prompts]
    own = model.generation_config
    # Given with the call, it would be filled up with what the model's own says of sampling and penalties.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=0)
    try:
        for rows in _together(model, prompts):
            ids, mask = _filled_up([prompts[row] for row in rows], model)
            watch = _Watch(ids.shape[1], ended)
            texts = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                logits_processor=[watch.check],
                stopping_criteria=[watch.has_ended],
            )
            for number, (row, text) in enumerate(zip(rows, texts[:, ids.shape[1] :].tolist(), strict=True)):
                end = next((place for place, token in enumerate(text, start=1) if token in ends), len(text))
                results[row] = text[: min(end, watch.lengths.get(number, end))]
    finally:
        model.generation_config = own
    return results


def _together(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return numbers of prompts that are continued together: not all recurrences are told which tokens are padding."""
    if _keeps_keys_alone(model):
        return [list(range(len(prompts)))]
    of_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        of_length.setdefault(len(prompt), []).append(row)
    return list(of_length.values())


class _Watch:
    """Watches every step of `generate`: raises on overflow, and ends texts that need no more tokens."""

    def __init__(self, begun: int, ended: Ended | None) -> None:
        self._begun, self._ended = begun, ended
        self.lengths: dict[int, int] = {}

    def check(self, _: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        _refuse_overflow(bool(torch.isfinite(logits).all()))
        return logits

    def has_ended(self, ids: torch.Tensor, _: Any, **options: Any) -> torch.Tensor:
        """Return which texts are complete, (prompts) bool, and note how long they were then."""
        length = ids.shape[1] - self._begun
        if self._ended is not None and length % _STOP_STEPS == 0:
            for row, text in enumerate(ids[:, self._begun :].tolist()):
                if row not in self.lengths and self._ended(text):
                    self.lengths[row] = length
        return torch.tensor([row in self.lengths for row in range(len(ids))], device=ids.device)


def end_tokens(model: Any) -> frozenset[int]:
    """Return the token ids with which a transformers model ends a text."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends if isinstance(ends, (list, tuple)) else [ends])
    return frozenset()


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room behind them, so that a new token is written and nothing is moved."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, new, width) tensors, and return all that are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        self.keys = self._append("keys", self.keys, held, key_states)
        self.values = self._append("values", self.values, held, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in newly made room."""
        self._rooms.clear()
        super().batch_select_indices(indices)

    def _append(self, name: str, old: torch.Tensor, held: int, new: torch.Tensor) -> torch.Tensor:
        total = held + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or room.shape[-2] < total:
            room = new.new_empty(*new.shape[:-2], total + _ROOM, new.shape[-1])
            if held:
                room[..., :held, :] = old
            self._rooms[name] = room
        room[..., held:total, :] = new
        return room[..., :total, :]


def _cache_layers(model: Any) -> list[Any]:
    """Return what a model keeps of the tokens before, layer by layer; empty if its cache is of another kind."""
    try:
        return list(DynamicCache(config=model.config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _keeps_keys_alone(model: Any) -> bool:
    layers = _cache_layers(model)
    return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _roomy_cache(model: Any) -> DynamicCache | None:
    """Return an empty cache with room, or None where a layer of the model keeps something else than all keys."""
    cache = DynamicCache()
    cache.layers = [_RoomyLayer() for layer in _cache_layers(model) if type(layer) is DynamicLayer]
    return cache if cache.layers and len(cache.layers) == len(_cache_layers(model)) else None


def _grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention; for one new token, query heads that share keys are taken as that many queries of one head.

    Args:
        module: the attention layer.
        query: (batch, heads, queries, width).
        key: (batch, key heads, tokens, width).
        value: (batch, key heads, tokens, value width).
        attention_mask: (batch, 1, queries, tokens), or None.
        scaling: of the scores.
        options: as transformers passes them.

    Returns:
        (outputs, None): (batch, queries, heads, value width).
    """
    batch, heads, queries, width = query.shape
    masked_per_head = attention_mask is not None and attention_mask.shape[1] != 1
    if queries != 1 or heads == key.shape[1] or masked_per_head or options.get("position_bias") is not None:
        outputs: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return outputs
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[-1]), None


@contextlib.contextmanager
def _grouped_attention(model: Any) -> Iterator[None]:
    """Let a model compute attention with `_grouped_sdpa` for a while; one that does not use SDPA is left as it is."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts or any(part.config._attn_implementation != "sdpa" for part in parts):
        yield
        return
    AttentionInterface.register(_GROUPED, _grouped_sdpa)
    AttentionMaskInterface.register(_GROUPED, sdpa_mask)
    model.set_attn_implementation(_GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
