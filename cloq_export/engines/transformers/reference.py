"""The dequantized float32 model that every engine is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.engines.transformers.served import (
    TransformersModel,
    adapter_folder,
    batches_of,
    over_one_base,
    padded_rows,
    rows_by_adapter,
    sequence_logprobs,
    tokens_per_batch,
)
from cloq_export.errors import ShapeError
from cloq_export.models.devices import device_of


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
        rows = max(1, min(rows, tokens_per_batch(model) // len(token_ids)))
        logprobs = []
        for start in range(0, len(modules), rows):
            chosen = list(modules[start : start + rows])
            try:
                logprobs += _logprobs_without(model, token_ids, chosen)
            except _RowsMixedError:
                # Some models lay all tokens of a batch end to end; then one module at a time is left out.
                logprobs += [values for module in chosen for values in _logprobs_without(model, token_ids, [module])]
        return torch.stack(logprobs)

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
        for adapter, rows in rows_by_adapter(whole, adapters, shortest=1):
            model = self.model(adapter)
            known = model.get_input_embeddings().weight.shape[0]
            odd = next((token for row in rows for token in texts[row] if not 0 <= token < known), None)
            if odd is not None:
                raise ShapeError(f"the runtime wrote the token {odd}; the model knows those from 0 to {known - 1}.")
            for batch in batches_of(rows, whole, model):
                with torch.no_grad():
                    logits = model(input_ids=padded_rows([whole[row] for row in batch], model), use_cache=False).logits
                for place, row in enumerate(batch):
                    first = len(prompts[row]) - 1
                    results[row] = _gaps(logits[place, first : len(whole[row])], texts[row], ends[row])
        return results

    def logprobs_of(
        self, token_ids: Sequence[Sequence[int]], adapter: str | None, tokens: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return log-probabilities of several tokens in each place of each sequence.

        Args:
            token_ids: sequences of n tokens.
            adapter: of all of them, or None.
            tokens: (n - 1, c) for each sequence; what lies below zero counts as the token 0.

        Returns:
            list: one (n - 1, c) float32 tensor on the CPU for each.
        """
        model = self.model(adapter)
        results: list[torch.Tensor] = [torch.empty(0)] * len(token_ids)
        for batch in batches_of(list(range(len(token_ids))), token_ids, model):
            padded = padded_rows([token_ids[row] for row in batch], model)
            with torch.no_grad():
                logits = model(input_ids=padded, use_cache=False).logits
            for place, row in enumerate(batch):
                own = logits[place, : len(token_ids[row]) - 1].to(torch.float32)
                wanted = tokens[row].clamp(min=0).to(own.device)
                results[row] = torch.log_softmax(own, -1).gather(1, wanted).cpu()
        return results

    def scale_gradients(
        self,
        token_ids: Sequence[Sequence[int]],
        adapter: str | None,
        modules: Sequence[str],
        tokens: torch.Tensor,
        weights: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Return the gradient of weighted sums of log-probabilities with respect to the scale of each quantized module.

        The output of module m without its bias is multiplied by `f_m` in each sequence on its own; with `w` the
        weights, `g_m = d(sum_i,v w_iv log p(v | x_1..x_{i-1})) / d f_m` at `f = 1`, all modules in one backward pass.

        Args:
            token_ids: sequences of n tokens, all equally long.
            adapter: the adapter, or None.
            modules: full names of linear modules.
            tokens: v, those that are looked at in each place, (sequences, n - 1, c) int64.
            weights: w, tensors of this shape.

        Returns:
            Tensor: (weights, sequences, modules) float64; zero for a module that a sequence does not reach.
        """
        model = self.model(adapter)
        model.requires_grad_(False)
        # Backward keeps the logits and their softmax.
        count = max(1, tokens_per_batch(model) // 4 // len(token_ids[0]))
        gradients = []
        for start in range(0, len(token_ids), count):
            rows = slice(start, start + count)
            chosen, wanted, weighted = token_ids[rows], tokens[rows], [weight[rows] for weight in weights]
            try:
                gradients.append(_scale_gradients(model, chosen, modules, wanted, weighted))
            except _RowsMixedError:
                for row, ids in enumerate(chosen):
                    one = slice(row, row + 1)
                    own = [weight[one] for weight in weighted]
                    gradients.append(_scale_gradients(model, [ids], modules, wanted[one], own))
        return torch.cat(gradients, dim=1)

    @contextlib.contextmanager
    def rounded(self, adapter: str | None, modules: Sequence[str], dtype: torch.dtype) -> Iterator[None]:
        """Compute with activations and float tensors in another precision for a while, products with Q in float32.

        Args:
            adapter: with which it is computed, or None.
            modules: full names of the quantized modules.
            dtype: the precision.
        """
        model = self.model(adapter)
        layers = [_base_layer(model, module) for module in modules]
        kept = {id(part) for layer in layers for part in layer.parameters()}
        kept |= {id(part) for name, part in model.named_parameters() if ".lora_" in name}
        held = [(owner, key, part) for owner in model.modules() for key, part in owner._parameters.items()]
        made: dict[int, nn.Parameter] = {}
        with contextlib.ExitStack() as stack:
            for owner, key, part in held:
                if part is not None and id(part) not in kept and part.is_floating_point():
                    stack.callback(owner._parameters.__setitem__, key, part)
                    # Tied tensors stay one.
                    rounded = made.setdefault(id(part), nn.Parameter(part.detach().to(dtype), requires_grad=False))
                    owner._parameters[key] = rounded
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(_to_float32).remove)
                stack.callback(layer.register_forward_hook(lambda _m, _i, output: output.to(dtype)).remove)
            yield

    @contextlib.contextmanager
    def scaled(self, adapter: str | None, module: str, factor: float) -> Iterator[None]:
        """Multiply the output of a quantized module, without its bias, by a factor for a while."""
        base = _base_layer(self.model(adapter), module)

        def hook(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            bias = getattr(module, "bias", None)  # embeddings have none
            return output * factor if bias is None else output * factor - (factor - 1) * bias

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
    return ReferenceModel(
        over_one_base(
            lambda name: dequantized_model(
                export, adapter_folder(adapters, name), device=device, merged=False, force=force
            )
        )
    )


def _base_layer(model: nn.Module, module: str) -> nn.Module:
    from peft.tuners.lora import LoraLayer

    layer = model.get_submodule(module)
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def _to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].to(torch.float32), *inputs[1:])


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
    model: Any,
    token_ids: Sequence[Sequence[int]],
    modules: Sequence[str],
    tokens: torch.Tensor,
    weights: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return (weights, sequences, modules) float64; see `ReferenceModel.scale_gradients`."""
    rows, device = len(token_ids), device_of(model)

    def scaled(factor: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            if rows > 1 and (output.ndim < 3 or output.shape[0] != rows):
                raise _RowsMixedError
            bias = getattr(module, "bias", None)
            bare = output if bias is None else output - bias
            return output + (factor - 1).view(-1, *[1] * (output.ndim - 1)) * bare

        return hook

    factors = [torch.ones(rows, device=device, requires_grad=True) for _ in modules]
    padded = padded_rows(token_ids, model)
    with contextlib.ExitStack() as stack:
        for module, factor in zip(modules, factors, strict=True):
            stack.callback(_base_layer(model, module).register_forward_hook(scaled(factor)).remove)
        with torch.enable_grad():
            logits = model(input_ids=padded, use_cache=False).logits[:, :-1].to(torch.float32)
            logprobs = torch.log_softmax(logits, -1).gather(2, tokens.to(device))  # (sequences, n - 1, c)
    sums = []
    for weight in weights:
        total = (logprobs * weight.to(device, torch.float32)).sum()
        gradients = torch.autograd.grad(total, factors, retain_graph=True, allow_unused=True)
        sums.append(
            torch.stack([factors[0].new_zeros(rows) if g is None else g for g in gradients], dim=1)
            .cpu()
            .to(torch.float64)
        )
    return torch.stack(sums)


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
