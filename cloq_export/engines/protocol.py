"""What parity asks of anything that serves a model, and the transformers models that answer it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cloq_export.engines.decoding import Ended, continue_greedily, prompts_per_batch
from cloq_export.engines.transformers import dequantized_model, load
from cloq_export.errors import ShapeError, UsageError

# Logits that one forward pass may make: half a gigabyte in float32.
_BATCH_LOGITS = 1 << 27
# Rows of logits that are turned to float32 log-probabilities at a time.
_LOGIT_ROWS = 256


class ServedModel(Protocol):
    """A model with its adapters as a runtime serves it; requests are token ids, so no tokenizer comes between."""

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None]) -> list[torch.Tensor]:
        """Return log p(x_i | x_1..x_{i-1}), i = 2..n, of each sequence, all requests in one batch.

        Args:
            token_ids: sequences of two or more tokens.
            adapters: for each sequence the name of its adapter, or None for the base alone.

        Returns:
            list: one (n - 1,) float32 tensor on the CPU per sequence.
        """

    def generate(
        self, token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], max_new_tokens: int
    ) -> list[list[int]]:
        """Return the most probable continuation of each prompt, token by token, without the prompt.

        Args:
            token_ids: prompts of one or more tokens.
            adapters: as in `prompt_logprobs`.
            max_new_tokens: where a continuation is cut that has not ended by itself.

        Returns:
            list: token ids for each prompt.
        """

    def close(self) -> None:
        """Let go of memory and processes."""


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
        for adapter, rows in _grouped(token_ids, adapters, shortest=2):
            model = self.model(adapter)
            for batch in _batches_of(rows, token_ids, _tokens_per_batch(model)):
                measured = sequence_logprobs(model, [token_ids[row] for row in batch])
                for row, values in zip(batch, measured, strict=True):
                    results[row] = values
        return results

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
        for adapter, rows in _grouped(token_ids, adapters, shortest=1):
            model = self.model(adapter)
            # The longest stands last: rows are sorted.
            size = prompts_per_batch(model, len(token_ids[rows[-1]]) + max_new_tokens)
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                continued = continue_greedily(model, [token_ids[row] for row in batch], max_new_tokens, ended=ended)
                for row, ids in zip(batch, continued, strict=True):
                    results[row] = ids
        return results

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
    return _shared(
        lambda name: load(export, _folder(adapters, name), device=device, dtype=dtype, force=force),
    )


class ReferenceModel(TransformersModel):
    """The dequantized float32 model with Q and the pairs apart, the yardstick of every runtime."""

    def logprobs_without(
        self, token_ids: Sequence[int], adapter: str, modules: Sequence[str], *, rows: int = 16
    ) -> torch.Tensor:
        """Return log-probabilities of one sequence with one module's pair left out, for each of several modules.

        The sequence is put into a batch once for each module, and the output of `B A` of module i is multiplied by
        zero in row i: the arithmetic is that of serving the adapter without this pair.

        Args:
            token_ids: the sequence, n tokens.
            adapter: the adapter.
            modules: full names of modules that it adapts.
            rows: modules that are computed together.

        Returns:
            Tensor: (modules, n - 1) float32.
        """
        model = self.model(adapter)
        rows = max(1, min(rows, _tokens_per_batch(model) // len(token_ids)))
        found = []
        for start in range(0, len(modules), rows):
            chosen = list(modules[start : start + rows])
            try:
                found += _logprobs_without(model, token_ids, chosen)
            except _RowsMixedError:
                # Some models lay all tokens of a batch end to end; then one module at a time is left out.
                found += [values for module in chosen for values in _logprobs_without(model, token_ids, [module])]
        return torch.stack(found)

    def token_gaps(
        self,
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        ends: Sequence[frozenset[int] | None],
    ) -> list[torch.Tensor]:
        """Return how far each token of a text lies below the token that is most probable in its place.

        `max_v log p(v | prompt, x_1..x_{i-1}) - log p(x_i | prompt, x_1..x_{i-1})`, all tokens of a text in one forward
        pass, so that what comes behind a token of a near-tie is judged too.

        Args:
            prompts: token ids.
            texts: what was written behind each prompt.
            adapters: as in `prompt_logprobs`.
            ends: for each text the tokens of which the best one counts as what comes last; None adds nothing.

        Returns:
            list: one float32 tensor on the CPU per text, of its tokens and of its end if that was asked for.

        Raises:
            ShapeError: a text holds a token that the model does not know.
        """
        results: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
        whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
        for adapter, rows in _grouped(whole, adapters, shortest=1):
            model = self.model(adapter)
            known = model.get_input_embeddings().weight.shape[0]
            odd = next((token for row in rows for token in texts[row] if not 0 <= token < known), None)
            if odd is not None:
                raise ShapeError(f"the runtime wrote the token {odd}; the model knows those from 0 to {known - 1}.")
            for batch in _batches_of(rows, whole, _tokens_per_batch(model)):
                with torch.no_grad():
                    logits = model(input_ids=_padded([whole[row] for row in batch], model), use_cache=False).logits
                for place, row in enumerate(batch):
                    first = len(prompts[row]) - 1
                    results[row] = _gaps(logits[place, first : len(whole[row])], texts[row], ends[row])
        return results

    def scale_gradients(
        self,
        token_ids: Sequence[Sequence[int]],
        adapter: str | None,
        modules: Sequence[str],
        weights: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the gradient of weighted sums of log-probabilities with respect to the scale of each quantized module.

        The output of module m without its bias is multiplied by `f_m` in each sequence on its own; with `w` the
        weights, `g_m = d(sum_i w_i log p(x_i | x_1..x_{i-1})) / d f_m` at `f = 1`, all modules in one backward pass.

        Args:
            token_ids: sequences of n tokens, all equally long.
            adapter: the adapter, or None.
            modules: full names of linear modules.
            weights: (sequences, n - 1) tensors.

        Returns:
            Tensor: (weights, sequences, modules) float64; zero for a module that a sequence does not reach.
        """
        model = self.model(adapter)
        model.requires_grad_(False)
        # Backward keeps the logits and their softmax.
        count = max(1, _tokens_per_batch(model) // 4 // len(token_ids[0]))
        found = []
        for start in range(0, len(token_ids), count):
            rows = slice(start, start + count)
            chosen, weighted = token_ids[rows], [weight[rows] for weight in weights]
            try:
                found.append(_scale_gradients(model, chosen, modules, weighted))
            except _RowsMixedError:
                found += [
                    _scale_gradients(model, [ids], modules, [weight[row : row + 1] for weight in weighted])
                    for row, ids in enumerate(chosen)
                ]
        return torch.cat(found, dim=1)

    @contextlib.contextmanager
    def scaled(self, adapter: str | None, module: str, factor: float) -> Iterator[None]:
        """Multiply the output of a quantized module, without its bias, by a factor for a while."""
        base = _base_layer(self.model(adapter), module)

        def hook(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * factor if module.bias is None else output * factor - (factor - 1) * module.bias

        handle = base.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def reference_model(
    export: Path, adapters: Mapping[str, Path], *, device: str = "cpu", force: bool = False
) -> ReferenceModel:
    """Return the reference, `dequantized_model(..., merged=False)`, with several adapters over one copy of the base.

    Args:
        export: the quantized checkpoint.
        adapters: name -> adapter folder.
        device: where it computes.
        force: take adapters of another base.
    """
    shared = _shared(
        lambda name: dequantized_model(export, _folder(adapters, name), device=device, merged=False, force=force)
    )
    return ReferenceModel(shared._load_model)


def longest_in_memory(model: Any) -> int:
    """Return how many tokens of one sequence a forward pass may have logits for."""
    return _tokens_per_batch(model)


def sequence_logprobs(model: Any, token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return log p(x_i | x_1..x_{i-1}) of each sequence from one forward pass.

    Shorter sequences are filled up behind their end, which a causal model does not look at.

    Args:
        model: a causal language model.
        token_ids: sequences of two or more tokens.

    Returns:
        list: one (n - 1,) float32 tensor on the CPU per sequence.
    """
    padded = _padded(token_ids, model)
    with torch.no_grad():
        logits = model(input_ids=padded, use_cache=False).logits
    return [_gathered(logits[row, : len(ids) - 1], padded[row, 1 : len(ids)]) for row, ids in enumerate(token_ids)]


def _padded(token_ids: Sequence[Sequence[int]], model: Any) -> torch.Tensor:
    longest = max(len(ids) for ids in token_ids)
    padded = torch.zeros(len(token_ids), longest, dtype=torch.int64)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded.to(_device_of(model))


def _base_layer(model: nn.Module, module: str) -> nn.Module:
    from peft.tuners.lora import LoraLayer

    layer = model.get_submodule(module)
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def _gaps(logits: torch.Tensor, text: Sequence[int], ends: frozenset[int] | None) -> torch.Tensor:
    """Return the gap of each token of a text; logits (tokens + 1, vocabulary), of the place behind the text too."""
    rows = len(text)
    logits = logits.to(torch.float32)
    best = logits.max(-1).values
    gaps = best[:rows] - logits[:rows].gather(1, torch.tensor(text, device=logits.device).view(rows, 1))[:, 0]
    if ends is not None:
        gaps = torch.cat([gaps, (best[rows] - logits[rows, sorted(ends)].max()).view(1)])
    return gaps.cpu()


def _scale_gradients(
    model: Any, token_ids: Sequence[Sequence[int]], modules: Sequence[str], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return (weights, sequences, modules) float64; see `ReferenceModel.scale_gradients`."""
    rows, device = len(token_ids), _device_of(model)

    def scaled(factor: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if rows > 1 and (output.ndim < 3 or output.shape[0] != rows):
                raise _RowsMixedError
            bare = output if module.bias is None else output - module.bias
            return output + (factor - 1).view(-1, *[1] * (output.ndim - 1)) * bare

        return hook

    factors = [torch.ones(rows, device=device, requires_grad=True) for _ in modules]
    padded = _padded(token_ids, model)
    with contextlib.ExitStack() as stack:
        for module, factor in zip(modules, factors, strict=True):
            stack.callback(_base_layer(model, module).register_forward_hook(scaled(factor)).remove)
        with torch.enable_grad():
            logits = model(input_ids=padded, use_cache=False).logits[:, :-1].to(torch.float32)
            logprobs = -nn.functional.cross_entropy(
                logits.transpose(1, 2), padded[:, 1:], reduction="none"
            )  # (sequences, n - 1)
    found = []
    for weight in weights:
        total = (logprobs * weight.to(device, torch.float32)).sum()
        gradients = torch.autograd.grad(total, factors, retain_graph=True, allow_unused=True)
        found.append(
            torch.stack([torch.zeros(rows) if g is None else g.cpu() for g in gradients], dim=1).to(torch.float64)
        )
    return torch.stack(found)


class _RowsMixedError(Exception):
    """A module's output does not have one row per sequence."""


def _logprobs_without(model: Any, token_ids: Sequence[int], modules: Sequence[str]) -> list[torch.Tensor]:
    from peft.tuners.lora import LoraLayer

    def silence(row: int) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if len(modules) == 1:
                return torch.zeros_like(output)
            if output.shape[0] != len(modules) or output.ndim < 3:
                raise _RowsMixedError
            output = output.clone()
            output[row] = 0
            return output

        return hook

    with contextlib.ExitStack() as stack:
        for row, module in enumerate(modules):
            layer = model.get_submodule(module)
            if not isinstance(layer, LoraLayer):
                raise ShapeError(f"{module} has no adapter in the reference; it cannot be left out.")
            handle = next(iter(layer.lora_B.values())).register_forward_hook(silence(row))
            stack.callback(handle.remove)
        return sequence_logprobs(model, [token_ids] * len(modules))


def _shared(load_model: Callable[[str | None], nn.Module]) -> TransformersModel:
    """Return a runtime whose adapters lie over the tensors of one base."""
    base: list[nn.Module] = []

    def load_one(adapter: str | None) -> nn.Module:
        if not base:
            base.append(load_model(None))
        if adapter is None:
            return base[0]
        model = load_model(adapter)
        _share_tensors(model, base[0])
        return model

    return TransformersModel(load_one)


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


def _folder(adapters: Mapping[str, Path], name: str | None) -> Path | None:
    if name is None:
        return None
    if name not in adapters:
        raise UsageError(f"there is no adapter {name!r}; there are {', '.join(adapters) or 'none'}.")
    return adapters[name]


def _grouped(
    token_ids: Sequence[Sequence[int]], adapters: Sequence[str | None], *, shortest: int
) -> Iterator[tuple[str | None, list[int]]]:
    """Yield (adapter, numbers of its requests, by length)."""
    if len(token_ids) != len(adapters):
        raise UsageError(f"{len(token_ids)} sequences and {len(adapters)} adapters were given; give one for each.")
    short = next((ids for ids in token_ids if len(ids) < shortest), None)
    if short is not None:
        raise UsageError(f"a sequence has {len(short)} tokens; at least {shortest} are needed.")
    for adapter in dict.fromkeys(adapters):
        rows = [row for row, own in enumerate(adapters) if own == adapter]
        yield adapter, sorted(rows, key=lambda row: len(token_ids[row]))


def _batches_of(rows: Sequence[int], token_ids: Sequence[Sequence[int]], limit: int) -> Iterator[list[int]]:
    """Yield rows, sorted by length, in batches that hold at most `limit` tokens when they are filled up."""
    batch: list[int] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(token_ids[row]) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _tokens_per_batch(model: Any) -> int:
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    vocabulary = getattr(text_config, "vocab_size", None) or _BATCH_LOGITS
    return max(1, _BATCH_LOGITS // vocabulary)


def _gathered(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits)[targets] as float32 on the CPU; logits (n, vocabulary), targets (n,)."""
    pieces = [
        -nn.functional.cross_entropy(part.to(torch.float32), wanted, reduction="none")
        for part, wanted in zip(logits.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(pieces).cpu()


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
