"""Which adapters a vLLM server may load: the same checks before it starts and while it serves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cloq_export.artifact.adapters import read_bound_adapter
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.errors import FormatError, ShapeError, UsageError
from cloq_export.formats.peft.codec import CONFIG_NAME, Adapter, is_adapter

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `--max-lora-rank` takes (vllm/config/lora.py: MaxLoRARanks)."""

POLICY_VARIABLE = "CLOQ_EXPORT_VLLM_POLICY"
"""Environment variable by which `cloq serve` hands its `ServingPolicy` to the server."""

LIFELINE_VARIABLE = "CLOQ_EXPORT_VLLM_LIFELINE"
"""Environment variable that names the pipe whose other end closes when the program that started a server is gone."""

DOOR_VARIABLE = "CLOQ_EXPORT_VLLM_DOOR"
"""Environment variable that names the socket over which a server answers its starter before it opens its port."""

_EXPERT = re.compile(r"\.experts\.\d+\.")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+\-]{0,127}")


@dataclasses.dataclass(frozen=True)
class ServingPolicy:
    """What a server that `cloq serve` started has to keep to.

    Args:
        name: the model's own name, under which the default adapter is served.
        base_name: the name of the quantized base without an adapter; equal to `name` if there is no adapter.
        default: the name of the adapter that answers to the model's own name, or None if there is no adapter.
        force: load adapters that are bound to another base.
        trust_adapters: load adapters that are bound to none.
        needs_adapter: the base says nothing without its adapter, so nothing is answered by it alone.
        adapter_roots: folders that adapters may be loaded from while it serves, resolved.
    """

    name: str
    base_name: str
    default: str | None = None
    force: bool = False
    trust_adapters: bool = False
    needs_adapter: bool = False
    adapter_roots: Sequence[str] = ()

    def to_text(self) -> str:
        """Return the text for `POLICY_VARIABLE`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_environment(cls) -> ServingPolicy | None:
        """Return the policy of this process, or None if `cloq serve` did not start it."""
        text = os.environ.get(POLICY_VARIABLE)
        return None if not text else cls(**json.loads(text))


def allowed_place(folder: Path, roots: Iterable[str | Path]) -> Path:
    """Return where an adapter folder really lies, after checking that it and its files lie in an allowed folder.

    Args:
        folder: as a request spells it; links and `..` are followed.
        roots: the allowed folders.

    Raises:
        UsageError: the folder, or a file that a link in it leads to, lies elsewhere.
    """
    homes = [Path(root).resolve() for root in roots]

    def lies_within(path: Path) -> bool:
        return any(path.is_relative_to(home) for home in homes)

    try:
        place = folder.resolve()
        files = [path.resolve() for path in place.iterdir()] if lies_within(place) and place.is_dir() else []
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise UsageError(f"{folder} cannot be followed ({getattr(error, 'strerror', None) or error}).") from None
    outside = [path for path in (place, *files) if not lies_within(path)]
    if outside:
        allowed = ", ".join(map(str, homes)) or "none"
        raise UsageError(
            f"{outside[0]} lies in no folder that adapters may be loaded from while the server runs (allowed: "
            f"{allowed}); start the server with --adapter-root FOLDER."
        )
    return place


def derived_name(folder: Path) -> str:
    """Return the name of a folder as a model's name, with what is not allowed replaced."""
    return re.sub(r"[^A-Za-z0-9_.:+\-]+", "-", folder.resolve().name).lstrip(".:+-")[:100] or "model"


def check_name(name: str, taken: Iterable[str] = (), *, kind: str = "adapter") -> None:
    """Refuse a name that a client could not use or that is taken.

    Args:
        name: the name.
        taken: names that stand for something else.
        kind: of what it is the name, for messages.

    Raises:
        UsageError: it is empty, has a character that is not allowed, or stands for something else already.
    """
    if "/" in name or "\\" in name:
        raise UsageError(f"the {kind} name {name!r:.80} has a slash; choose a name without one.")
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"the {kind} name {name!r:.80} is not allowed; use letters, digits and . _ : + -, at most 128 of them."
        )
    if name in taken:
        raise UsageError(f"the name {name!r} is given twice; every adapter and the model need a name of their own.")


def smallest_rank(ranks: Iterable[int]) -> int:
    """Return the smallest `--max-lora-rank` that takes all of these ranks.

    Raises:
        UsageError: a rank is larger than any that vLLM takes.
    """
    largest = max(ranks)
    for allowed in RANKS:
        if allowed >= largest:
            return allowed
    raise UsageError(f"an adapter has rank {largest}; vLLM takes up to {RANKS[-1]}. Make one of a lower rank.")


def check_adapter(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    max_rank: int | None = None,
    target_modules: Iterable[str] | None = None,
    force: bool = False,
    trust_unbound: bool = False,
) -> Adapter:
    """Read an adapter and refuse it unless it can be served on a base.

    Args:
        checkpoint: the base.
        folder: the adapter folder.
        max_rank: the largest rank that the engine takes; None takes any that vLLM can be told to take.
        target_modules: last parts of the module names that the engine adapts; None means any.
        force: take it even if it is bound to another base.
        trust_unbound: take it if it is bound to none.

    Returns:
        Adapter: as read.

    Raises:
        FormatError: a file is missing or damaged, or a module does not fit the base.
        BindingError: it is bound to another base, or to none.
        UsageError: its rank is too large.
    """
    if not is_adapter(folder):
        raise FormatError(f"{folder} is no adapter folder; give the folder that holds {CONFIG_NAME}.")
    adapter = read_bound_adapter(folder, checkpoint, force=force, trust_unbound=trust_unbound)
    if adapter.config.get("target_parameters"):
        raise FormatError(
            f"{folder} holds pairs of fused tensors (target_parameters), which vLLM would look for under other names; "
            "export the adapter with `expert_pairs=single`."
        )
    allowed = None if target_modules is None else set(target_modules)
    for module, pair in adapter.pairs.items():
        shape = _linear_shape(checkpoint, module)
        if shape is None:
            raise FormatError(
                f"{folder} adapts {module}, which is no linear layer of {checkpoint.folder}; it belongs to another "
                "model."
            )
        if (pair.lora_B.shape[0], pair.lora_A.shape[1]) != shape:
            raise FormatError(
                f"{folder}: A {tuple(pair.lora_A.shape)} and B {tuple(pair.lora_B.shape)} do not fit {module} with "
                f"{shape[1]} inputs and {shape[0]} outputs; it belongs to another model."
            )
        if allowed is not None and target_name(module) not in allowed:
            raise FormatError(
                f"{folder} adapts {module}, but the server adapts only modules named {', '.join(sorted(allowed))}; "
                "start it with this adapter."
            )
        if pair.rank > (max_rank or RANKS[-1]):
            raise UsageError(
                f"{folder} has rank {pair.rank} at {module}; the server takes up to {max_rank or RANKS[-1]}. Start it "
                "with a larger --max-lora-rank, or make an adapter of a lower rank."
            )
    return adapter


def quantized_suffixes(checkpoint: Checkpoint) -> set[str]:
    """Return what `--lora-target-modules` calls a base's quantized modules."""
    return {target_name(module) for module in checkpoint.specs}


def target_name(module: str) -> str:
    """Return what `--lora-target-modules` calls a module: the last part of its name, and all experts by one name."""
    return "experts" if _EXPERT.search(module) else module.rpartition(".")[2]


def refuse_half_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a base of whose experts only some are quantized, which vLLM computes as one layer.

    Raises:
        FormatError: it is one.
    """
    mixtures = {module[: match.start()] for module in checkpoint.specs if (match := _EXPERT.search(module))}
    for name in checkpoint.headers:
        match = _EXPERT.search(name)
        if match and name.endswith(".weight") and name[: match.start()] in mixtures:
            module = name.removesuffix(".weight")
            if module not in checkpoint.specs:
                raise FormatError(
                    f"vLLM computes the experts of {name[: match.start()]} as one layer, but {module} is not "
                    "quantized; quantize all of them or none, with an override in the recipe."
                )


def refuse_float_experts(checkpoint: Checkpoint, folder: Path, modules: Iterable[str]) -> None:
    """Refuse an adapter of experts that are not quantized, which vLLM adapts on GPUs only.

    Args:
        checkpoint: the base.
        folder: of the adapter, for the message.
        modules: that it adapts.

    Raises:
        FormatError: it adapts such experts.
    """
    for module in modules:
        if _EXPERT.search(module) and module not in checkpoint.specs:
            raise FormatError(
                f"{folder} adapts {module}, but the experts of {checkpoint.folder} are not quantized, and on a CPU "
                "vLLM serves no adapters of such experts; quantize them, or leave them out of the adapter."
            )


def _linear_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer of a base, quantized or not, or None if there is no such layer."""
    if module in checkpoint.specs:
        try:
            return checkpoint.features(module)
        except ShapeError as error:
            raise FormatError(str(error)) from None
    header: Mapping[str, tuple[str, tuple[int, ...]]] = checkpoint.headers
    shape = header.get(f"{module}.weight", ("", ()))[1]
    return (shape[0], shape[1]) if len(shape) == 2 else None
