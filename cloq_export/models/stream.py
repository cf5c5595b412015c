"""Run the blocks of a model one after the other, with only one block in the fast memory at a time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from cloq_export.errors import CalibrationError, NonFiniteError, UnsupportedModelError
from cloq_export.models.block_arguments import (
    BlockArguments,
    HandedOn,
    OnDevice,
    TensorPool,
    WrittenBeside,
    returned_beside,
)
from cloq_export.models.blocks import BlockList
from cloq_export.models.context import embeddings_of, require_known_tokens
from cloq_export.models.devices import device_of
from cloq_export.models.lending import place_of_states
from cloq_export.models.precision import forward_precision, resolve_precision
from cloq_export.models.prefetch import BlockMover
from cloq_export.models.rotary_switch import forget_lengths
from cloq_export.models.weights_on_disk import in_memory

# Two tokens would do to see what a block returns; four keep models away from their one-token decoding path.
_PROBE_TOKENS = 4


class BlockStream:
    """Runs windows of tokens through a model block by block, exactly as the model itself would.

    On creation it calls the model once per batch with the blocks stubbed out, which costs only the embeddings, and
    keeps what the model passes to each block: the hidden states before the first block, and every other argument
    (masks, rotary embeddings), block by block, because they differ between sliding and global attention. It owns no
    weights and no activations beyond `hidden`, so several streams of activations (float, and behind a compressed
    prefix) can be run through the same object. `hidden` is kept on `device` while it takes a small share of the free
    memory there, and in host memory otherwise.

    Args:
        model: a causal language model, in evaluation mode afterwards.
        blocks: its blocks, from `find_blocks`.
        windows: token ids, (samples, seqlen) int64.
        device: where blocks run.
        compute: precision of matrix products: None is the model's own dtype (float32 in full precision),
            torch.bfloat16 lets a float32 model multiply in bfloat16, see `forward_precision`.
        batch: windows per forward pass, or of each of them in order; it never changes afterwards, so results are
            reproducible.

    Raises:
        CalibrationError: windows are empty.
        DataError: they hold ids outside the model's vocabulary.
        UnsupportedModelError: running block by block would not equal the model's own forward pass.
        UsageError: `compute` is a precision that the model's dtype cannot offer.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: BlockList,
        windows: torch.Tensor,
        *,
        device: torch.device | str,
        compute: torch.dtype | None = None,
        batch: int | Sequence[int] = 1,
    ) -> None:
        if windows.ndim != 2 or windows.numel() == 0:
            raise CalibrationError(
                f"calibration windows have shape {tuple(windows.shape)}; at least one window of one token is needed. "
                "Give more text, or fewer tokens per window with `seqlen`."
            )
        self.model = model.eval()
        forget_lengths(model)
        self.blocks = blocks
        self.device = torch.device(device)
        # Batches that wait for each other inside of a block hold nothing on the device meanwhile.
        self.parks_waiting = False
        self._mover = BlockMover(blocks, self.device)
        self._base = getattr(model, "base_model", model)
        self._precision = resolve_precision(next(blocks.modules[0].parameters()).dtype, compute)
        require_known_tokens(model, windows, "the calibration tokens")

        # Sums of outputs that are not checked yet: on a GPU the host would wait for each.
        self._unseen: list[tuple[int, torch.dtype, torch.Tensor]] = []
        # What each kind of block returns besides the hidden states; None: nothing, not even a tuple.
        self._returns: dict[type[nn.Module], tuple[Any, ...] | None] = {}
        self._calls: list[list[BlockArguments]] = []
        self.hidden: list[torch.Tensor] = []
        # What blocks wrote for later ones, by the hidden states that it belongs to: it lives as long as they do.
        self._beside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._hands_on = self._probe(windows[:1, :_PROBE_TOKENS])
        batches = self._windows = windows.split(batch if isinstance(batch, int) else list(batch))
        # The same mask serves every batch of the same shape; one copy is kept.
        pool: list[torch.Tensor] = []
        for batch_index, ids in enumerate(batches):
            hidden, calls = self._capture(ids)
            if batch_index == 0:
                # Two streams, each with the states before and after the block.
                self.storage = place_of_states(self.device, 4 * len(batches) * hidden.numel() * hidden.element_size())
                place = OnDevice(self.storage)
            shared = TensorPool(pool, place, grows=batch_index == 0)
            self._calls.append([call.map(shared.share) for call in calls])
            self.hidden.append(hidden.to(self.storage))

    @property
    def batches(self) -> int:
        """Return the number of batches, the length of `hidden`."""
        return len(self._calls)

    @property
    def rounds_inputs(self) -> bool:
        """Return whether linear layers multiply their inputs rounded to bfloat16."""
        return self._precision == "bfloat16"

    def arguments(self, index: int) -> BlockArguments:
        """Return what a block is given besides the hidden states in the first batch."""
        return self._calls[0][index]

    def arithmetic(self) -> contextlib.AbstractContextManager[None]:
        """Compute for a while as the blocks do, for callers that run a part of a block by itself."""
        return forward_precision(self._precision, self.device)

    def forward_block(self, index: int, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one block over batches of hidden states, from the first batch on.

        Hooks that the caller has registered on the block's linears see every batch in order. No gradient is kept.

        Args:
            index: number of the block.
            hidden: one tensor (batch, seqlen, hidden) per batch; fewer than `batches` is allowed.

        Returns:
            list: hidden states after the block, one per given batch, on `storage`.

        Raises:
            NonFiniteError: the block's output overflows.
        """
        with self.block_on_device(index):
            after = [self.forward_batch(index, batch_index, states) for batch_index, states in enumerate(hidden)]
            self.refuse_overflow()
            return after

    def forward_batch(self, index: int, batch_index: int, states: torch.Tensor) -> torch.Tensor:
        """Run one block over one batch, for callers that alternate between streams batch by batch.

        Wrap the calls for one block in `block_on_device(index)`, or the block is moved for each of them. On a GPU an
        overflow is told by `refuse_overflow`, or where the block is left.

        Args:
            index: number of the block.
            batch_index: number of the batch that `states` belongs to.
            states: (batch, seqlen, hidden).

        Returns:
            Tensor: hidden states after the block, same shape, on `storage`.

        Raises:
            NonFiniteError: the output overflows.
        """
        with self.block_on_device(index), torch.no_grad():
            after = self.differentiable_batch(index, batch_index, states)
            # A sum is finite only if every term is, and costs a tenth of asking each.
            self._unseen.append((index, after.dtype, after.sum(dtype=torch.float32)))
            if self.device.type == "cpu":
                self.refuse_overflow()
            return self._stored(after)

    def refuse_overflow(self) -> None:
        """Look at the outputs that `forward_batch` has made since the last look.

        Raises:
            NonFiniteError: one of them overflows.
        """
        unseen, self._unseen = self._unseen, []
        if not unseen or bool(torch.isfinite(torch.stack([total for _, _, total in unseen])).all()):
            return
        index, dtype = next((index, dtype) for index, dtype, total in unseen if not bool(torch.isfinite(total)))
        raise NonFiniteError(
            f"block {self.blocks.prefix(index)} gives NaN or Inf in {dtype}: the model overflows on the "
            "calibration text. Run it with `precision=float32`, or check the model's weights."
        )

    def differentiable_batch(self, index: int, batch_index: int, states: torch.Tensor) -> torch.Tensor:
        """Run one block over one batch with the gradients that the caller has switched on, overflow or not.

        Args:
            index: number of the block.
            batch_index: number of the batch that `states` belongs to.
            states: (batch, seqlen, hidden).

        Returns:
            Tensor: hidden states after the block, same shape, on `device`.

        Raises:
            UnsupportedModelError: blocks read what others wrote for them, and the states are not those of a block.
        """
        with self.block_on_device(index) as block, forward_precision(self._precision, self.device):
            call = self._calls[batch_index][index]
            beside = WrittenBeside(collections.UserDict())
            if index and call.holds((collections.UserDict, HandedOn)):
                if states not in self._beside:
                    raise UnsupportedModelError(
                        f"blocks of {type(self.model).__name__} share more than hidden states (such as keys and "
                        "values), which is not kept for every step of a refinement of the whole model. Choose "
                        "`refine=block`."
                    )
                beside = self._beside[states].copied()
            output = call.map(self._as_argument, beside).invoke(block, states.to(self.device))
            whole = output if isinstance(output, (tuple, list)) else (output,)
            after: torch.Tensor = whole[0]
            if self._hands_on:
                self._beside[after] = dataclasses.replace(beside, returned=tuple(whole[1:]))
            return after

    def _stored(self, after: torch.Tensor) -> torch.Tensor:
        """Return hidden states on `storage`, with what blocks wrote beside them."""
        stored = after.to(self.storage)
        if after in self._beside:
            self._beside[stored] = self._beside[after]
        return stored

    def differentiable_logits(self, batch_index: int, states: torch.Tensor, positions: slice) -> torch.Tensor:
        """Run what stands behind the last block, with the gradients that the caller has switched on.

        Args:
            batch_index: number of the batch that `states` belongs to.
            states: hidden states after the last block at those positions, (batch, positions, hidden).
            positions: which of the windows' positions.

        Returns:
            Tensor: logits, (batch, positions, vocabulary), where the model's head stands.
        """
        ids = self._windows[batch_index][:, positions]
        last = len(self.blocks) - 1

        def make_stub(index: int, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def stub(*args: Any, **kwargs: Any) -> Any:
                given, _ = BlockArguments.split(args, kwargs)
                after = states.to(given.device) if index == last else given
                beside = self._returns[type(block)]
                return after if beside is None else (after, *beside)

            return stub

        with _replaced_forwards(self.blocks, make_stub):
            host = device_of(embeddings_of(self.model))
            with forward_precision(self._precision, host):
                logits: torch.Tensor = self.model(input_ids=ids.to(host), use_cache=False).logits
                return logits

    @contextlib.contextmanager
    def head_on_device(self) -> Iterator[None]:
        """Hold all of the model that is outside of its blocks on the device, e.g. its embeddings and its head."""
        inside = {id(tensor) for block in self.blocks for tensor in (*block.parameters(), *block.buffers())}
        outside = [t for t in (*self.model.parameters(), *self.model.buffers()) if id(t) not in inside]
        home = [tensor.data for tensor in outside]
        for tensor in outside:
            tensor.data = tensor.data.to(self.device)
        try:
            yield
        finally:
            for tensor, data in zip(outside, home, strict=True):
                tensor.data = data

    @contextlib.contextmanager
    def block_on_device(self, index: int) -> Iterator[nn.Module]:
        """Hold one block on the device, and move it back afterwards with whatever weights it then has.

        Nested uses for the same block move nothing. On a GPU the next block is copied meanwhile.
        """
        block = self.blocks.modules[index]
        with in_memory(block):
            if _same_device(device_of(block), self.device):
                yield block
                return
            with self._mover.lent(index):
                yield block
                self.refuse_overflow()

    def _as_argument(self, tensor: torch.Tensor) -> torch.Tensor:
        # Rotary tables and masks in the dtype of the products, as a bfloat16 model has them: float32 tables would turn
        # queries and keys back to float32.
        narrow = self.rounds_inputs and tensor.dtype == torch.float32
        return tensor.to(self.device, torch.bfloat16 if narrow else tensor.dtype)

    def _probe(self, ids: torch.Tensor) -> bool:
        """Learn what each kind of block returns, and refuse models that a block-by-block run would misread.

        Blocks may talk to each other through the hidden states, a dictionary that all are given, and values returned
        besides the hidden states and handed on. Another way is looked for: arguments computed from hidden states.

        Returns:
            bool: blocks are given more than hidden states by each other.
        """
        try:
            _, plain = self._capture(ids, probing=True)
            _, shifted = self._capture(ids, shift=1.0)
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            # What a model does with its blocks besides calling them is its own; it fails on what stands in for them.
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does more with its blocks than call one after the other ("
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}); such models cannot be run block by "
                "block. Choose another architecture."
            ) from error
        for index, (one, other) in enumerate(zip(plain, shifted, strict=True)):
            if not one.equals(other):
                raise UnsupportedModelError(
                    f"block {self.blocks.prefix(index)} of {type(self.model).__name__} receives more from other blocks "
                    "than the hidden states; such models cannot be run block by block. Choose another architecture."
                )
        return any(call.holds((collections.UserDict, HandedOn)) for call in plain)

    def _capture(
        self, ids: torch.Tensor, *, shift: float = 0.0, probing: bool = False
    ) -> tuple[torch.Tensor, list[BlockArguments]]:
        """Call the model with its blocks stubbed out; return the first hidden states and every block's arguments.

        Args:
            ids: token ids, (batch, seqlen).
            shift: what a stub adds to the hidden states; 0 hands on the very same tensor.
            probing: run blocks of a kind not met before.
        """
        first: list[torch.Tensor] = []
        handed_on: list[torch.Tensor] = []
        calls: list[BlockArguments | None] = [None] * len(self.blocks)
        beside_probe = WrittenBeside(collections.UserDict())

        def make_stub(index: int, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def stub(*args: Any, **kwargs: Any) -> Any:
                states, call = BlockArguments.split(args, kwargs)
                if not first:
                    first.append(states)
                if calls[index] is not None or (states is not handed_on[-1] if handed_on else index > 0):
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__} does not hand the output of one block of {self.blocks.name} "
                        "unchanged to the next; such models cannot be run block by block. If the decoder blocks are "
                        "elsewhere, name their list with `blocks`."
                    )
                calls[index] = call
                if probing and type(block) not in self._returns:
                    output = call.map(lambda tensor: tensor, beside_probe).invoke(forward, states)
                    self._returns[type(block)] = returned_beside(output, self.blocks.prefix(index))
                after = states + shift if shift else states
                handed_on.append(after)
                beside = self._returns[type(block)]
                return after if beside is None else (after, *beside)

            return stub

        with torch.no_grad(), _replaced_forwards(self.blocks, make_stub):
            self._base(input_ids=ids.to(device_of(embeddings_of(self.model))), use_cache=False)
        if any(call is None for call in calls):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} did not run every block of {self.blocks.name}; name the list of decoder "
                "blocks with `blocks`, e.g. `blocks=model.layers`."
            )
        return first[0], [call for call in calls if call is not None]


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


@contextlib.contextmanager
def _replaced_forwards(
    blocks: BlockList, make_stub: Callable[[int, nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make_stub(index, block, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
