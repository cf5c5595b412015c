"""Low-rank products on the CPU: vLLM's own give requests without an adapter the last one, and fail on prompts.

In a batch that mixes requests with and without an adapter, those without carry the index -1. vLLM 0.32 looks the
adapter up by that index, which is the last one. It also gathers A and B once per token. Here each adapter is multiplied
with its own rows, and rows of index -1 are not touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from cloq_export.engines.vllm.plugin.deterministic import is_deterministic
from cloq_export.kernels.cpu.dense import dense_linear

# Adapter of each run of consecutive rows: (adapter, first row, end).
_Runs = Sequence[tuple[int, int, int]]

# Set while the log-probabilities of one request's prompt are computed: the slot of its adapter, or -1.
_prompt_slot: int | None = None


def register() -> None:
    """Replace the products, and what vLLM does about an adapted head, on the CPU."""
    if not current_platform.is_cpu():
        return
    for name in ("bgmv_expand", "bgmv_expand_slice", "bgmv_shrink", "sgmv_expand", "sgmv_expand_slice", "sgmv_shrink"):
        setattr(punica_cpu, name, globals()[name])
    punica_cpu.PunicaWrapperCPU.add_lora_logits = add_lora_logits
    if not hasattr(GPUModelRunner._get_prompt_logprobs_dict, "of_cloq_export"):
        GPUModelRunner._get_prompt_logprobs_dict = _by_request(GPUModelRunner._get_prompt_logprobs_dict)


def _rows_of(runs: _Runs) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """Yield (adapter, its rows), a slice where the rows are consecutive."""
    by_adapter: dict[int, list[tuple[int, int]]] = {}
    for adapter, first, end in runs:
        if adapter >= 0 and end > first:
            by_adapter.setdefault(adapter, []).append((first, end))
    for adapter, pieces in by_adapter.items():
        if len(pieces) == 1:
            yield adapter, slice(*pieces[0])
        else:
            yield adapter, torch.cat([torch.arange(first, end) for first, end in pieces])


def _runs_of_sequences(starts: torch.Tensor, lengths: torch.Tensor, adapters: torch.Tensor) -> _Runs:
    return [
        (adapter, start, start + length)
        for adapter, start, length in zip(adapters.tolist(), starts.tolist(), lengths.tolist(), strict=True)
    ]


def _runs_of_rows(adapters: torch.Tensor) -> _Runs:
    values, counts = torch.unique_consecutive(adapters, return_counts=True)
    ends = counts.cumsum(0)
    return _runs_of_sequences(ends - counts, counts, values)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x W^T`, in an order that does not depend on the other rows where the engine is deterministic."""
    return dense_linear(x, weight) if is_deterministic() else x @ weight.t()


def _shrink(x: torch.Tensor, lora_a: torch.Tensor, y: torch.Tensor, runs: _Runs, scaling: float) -> None:
    """Set `y = scaling * x A_i^T` for the rows of every adapter i; other rows are left as they are.

    Args:
        x: (rows, in).
        lora_a: (slots, 1, rank, in) or (slots, rank, in).
        y: (rows, rank) float32.
        runs: whose rows are whose.
        scaling: the factor.
    """
    for adapter, rows in _rows_of(runs):
        a = lora_a[adapter].reshape(lora_a.shape[-2:]).to(y.dtype)
        y[rows, : a.shape[0]] = scaling * _multiply(x[rows].to(y.dtype), a)


def _expand(x: torch.Tensor, lora_b: torch.Tensor, y: torch.Tensor, runs: _Runs, add: bool, first: int = 0) -> None:
    """Add `x B_i^T` to y, or set it, for the rows of every adapter i; other rows are left as they are.

    Args:
        x: (rows, rank) float32.
        lora_b: (slots, 1, out, rank) or (slots, out, rank).
        y: (rows, outputs), where the product begins at the output `first`.
        runs: whose rows are whose.
        add: add to y, or set it.
        first: output at which the product begins.
    """
    for adapter, rows in _rows_of(runs):
        b = lora_b[adapter].reshape(lora_b.shape[-2:]).to(x.dtype)
        # Padding of the vocabulary may differ between the two.
        count = min(b.shape[0], y.shape[1] - first)
        product = _multiply(x[rows], b[:count])
        if add:
            product = y[rows, first : first + count].to(x.dtype) + product
        y[rows, first : first + count] = product.to(y.dtype)


def sgmv_shrink(
    inputs: torch.Tensor,
    lora_a_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    scaling: float,
) -> None:
    """Do `_shrink` for a batch of sequences; the signature is vLLM's."""
    runs = _runs_of_sequences(b_seq_start_loc, seq_len_tensor, lora_indices_tensor)
    _shrink(inputs, lora_a_weights, output_tensor, runs, scaling)


def sgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    add_inputs: bool = False,
) -> None:
    """Do `_expand` for a batch of sequences; the signature is vLLM's."""
    runs = _runs_of_sequences(b_seq_start_loc, seq_len_tensor, lora_indices_tensor)
    _expand(inputs, lora_b_weights, output_tensor, runs, add_inputs)


def sgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    b_seq_start_loc: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    batches: int,
    max_seq_length: int,
    token_nums: int,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = False,
) -> None:
    """Do `_expand` for a batch of sequences and a range of outputs; the signature is vLLM's."""
    runs = _runs_of_sequences(b_seq_start_loc, seq_len_tensor, lora_indices_tensor)
    _expand(inputs, lora_b_weights, output_tensor, runs, add_inputs, slice_offset)


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """Do `_shrink` with an adapter for every row; the signature is vLLM's."""
    _shrink(inputs, lora_b_weights, output_tensor, _runs_of_rows(lora_indices_tensor), scaling)


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Do `_expand` with an adapter for every row; the signature is vLLM's."""
    _expand(inputs, lora_b_weights, output_tensor, _runs_of_rows(lora_indices_tensor), add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Do `_expand` with an adapter for every row and a range of outputs; the signature is vLLM's."""
    _expand(inputs, lora_b_weights, output_tensor, _runs_of_rows(lora_indices_tensor), add_inputs, slice_offset)


def add_lora_logits(
    self: punica_cpu.PunicaWrapperCPU,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    *,
    buffer: torch.Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Add an adapter's share of the head to logits.

    vLLM takes the adapter of every row from the sampler's list, also when the rows are those of one request's prompt.

    Args:
        self: vLLM's wrapper.
        y: logits, (rows, vocabulary), changed in place.
        x: inputs of the head, (rows, in).
        lora_a_stacked: (slots, 1, rank, in).
        lora_b_stacked: (slots, 1, vocabulary, rank).
        scale: the factor.
        buffer: not needed here.
        kwargs: as vLLM passes them.

    Raises:
        RuntimeError: the adapter of these rows is not known, and one of the adapters changes the head.
    """
    logits, inputs = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    count = inputs.shape[0]
    if _prompt_slot is not None:
        runs: _Runs = [(_prompt_slot, 0, count)]
    elif self.sampler_indices.shape[0] == count:
        runs = _runs_of_rows(self.sampler_indices)
    elif bool(lora_a_stacked.any()):
        raise RuntimeError(
            f"logits of {count} rows were asked for, and the adapters of {self.sampler_indices.shape[0]} are known; "
            "adapters of the head cannot be served by this model runner: name the other modules with "
            "--lora-target-modules."
        )
    else:
        return
    # Adapters of the head are rare, and zeros would cost as much as the head itself for every rank of 64.
    adapted = [run for run in runs if run[0] >= 0 and bool(lora_a_stacked[run[0]].any())]
    if adapted:
        inner = torch.zeros(count, lora_b_stacked.shape[-1], dtype=torch.float32)
        _shrink(inputs, lora_a_stacked, inner, adapted, scale)
        _expand(inner, lora_b_stacked, logits, adapted, True)


@contextlib.contextmanager
def _prompt_of(slot: int) -> Iterator[None]:
    global _prompt_slot
    _prompt_slot = slot
    try:
        yield
    finally:
        _prompt_slot = None


def _by_request(stock: Any) -> Any:
    """Return vLLM's function, called for one request at a time so that its adapter is known."""

    def get_prompt_logprobs(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict:
        pending = self.num_prompt_logprobs
        if not pending or not self.lora_config:
            return stock(self, hidden_states, num_scheduled_tokens)
        results: dict = {}
        wrapper = _punica_wrapper(self)
        try:
            for request in list(pending):
                if num_scheduled_tokens.get(request) is None:
                    continue
                first = int(self.query_start_loc.np[self.input_batch.req_id_to_index[request]])
                self.num_prompt_logprobs = {request: pending[request]}
                with _prompt_of(int(wrapper.token_lora_indices[first])):
                    results |= stock(self, hidden_states, num_scheduled_tokens)
                if request not in self.num_prompt_logprobs:
                    del pending[request]  # all of its prompt is done
        finally:
            self.num_prompt_logprobs = pending
        return results

    get_prompt_logprobs.of_cloq_export = True  # type: ignore[attr-defined]
    return get_prompt_logprobs


def _punica_wrapper(runner: Any) -> punica_cpu.PunicaWrapperCPU:
    """Return the wrapper that holds the adapters of a model runner's batch."""
    manager = runner.lora_manager._adapter_manager
    return next(iter(manager.modules.values())).punica_wrapper
