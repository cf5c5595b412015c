"""Write and read LoRA adapters in PEFT's layout; the rules stand in SPEC.md."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cloq_export.errors import FormatError, NonFiniteError, ShapeError
from cloq_export.files.atomic import write_folder, write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.safe_tensors import read_safetensors, read_safetensors_header
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.formats.peft.config import RanksAndAlphas, adapter_config, check_config, refuse_unlisted
from cloq_export.formats.peft.stacked import (
    ExpertStack,
    StackedPair,
    named_as_parameters,
    side_names,
    stack_pairs,
    unstack_pairs,
)
from cloq_export.types import LoraPair

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BINDING_NAME = "cloq_adapter.json"
BINDING_FORMAT = "cloq-adapter"
FORMAT_VERSION = 1

_KEY_PREFIX = "base_model.model."
# The name of the adapter stands in keys that were not saved by PEFT itself.
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FINGERPRINT_KEY = "cloq_base_fingerprint"
_OUR_FILES = {CONFIG_NAME, WEIGHTS_NAME, BINDING_NAME, "README.md", "cloq_certificate.json"}
_OTHER_WEIGHTS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapters.safetensors")
# Trained tensors that other tools put beside the pairs.
_BESIDE = ("new_embeddings.safetensors", "new_embeddings.bin", "non_lora_trainables.bin")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LONGEST_FINGERPRINT = 128


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as read from a folder.

    Args:
        pairs: full module name -> LoRA pair, whose alpha gives the scaling that PEFT would use.
        config: the content of adapter_config.json.
        base_fingerprint: of the quantized base that it is bound to; None if it names none.
        extra: how the adapter was made, as its writer recorded it; empty if it recorded nothing.
    """

    pairs: Mapping[str, LoraPair]
    config: Mapping[str, Any]
    base_fingerprint: str | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_adapter(
    folder: str | os.PathLike[str],
    pairs: Mapping[str, LoraPair],
    *,
    base_model: str,
    base_fingerprint: str,
    extra: Mapping[str, Any] | None = None,
    stacks: Sequence[ExpertStack] = (),
) -> None:
    """Write an adapter folder, whole or not at all; upstream PEFT loads it unchanged.

    Args:
        folder: the folder to make; an earlier adapter there is replaced.
        pairs: full module name -> LoRA pair, at least one.
        base_model: name or path of the model that the base was made from.
        base_fingerprint: of the quantized base that the adapter belongs to.
        extra: what else a reader may want to know, e.g. {"split": "balanced", "padded_from": 60}; JSON values.
        stacks: tensors of experts whose pairs are written as one each, for models that hold experts fused; those of
            one module in its order.

    Raises:
        FormatError: there is no pair, or pairs of experts that cannot be one.
        RunDirectoryError: the folder holds other files, or cannot be written.
    """
    if not pairs:
        raise FormatError("an adapter needs at least one LoRA pair; rank 0 makes none: choose `rank=1` or more.")
    stacked = [made for stack in stacks if (made := stack_pairs(stack, pairs)) is not None]
    held = [stack for stack, _ in stacked]
    taken = {name for stack in held for expert in range(stack.experts) for name in stack.linears(expert)}
    beside = {module: pair for module, pair in pairs.items() if module not in taken}
    places, parameters = side_names(held), named_as_parameters(beside) if held else {}
    targets: dict[str, LoraPair | StackedPair] = {parameters.get(module, module): beside[module] for module in beside}
    targets |= {stack.parameter: pair for stack, pair in stacked}
    by_parameter = {**{parameter: module for module, parameter in parameters.items()}, **places}
    tensors: dict[str, torch.Tensor] = {}
    for target, one in targets.items():
        module = by_parameter.get(target, target)
        tensors[tensor_name(module, "A")] = one.lora_A
        tensors[tensor_name(module, "B")] = one.lora_B
    metadata = {"format": "pt", "cloq_format_version": str(FORMAT_VERSION), _FINGERPRINT_KEY: base_fingerprint}
    with write_folder(folder, owned=_holds_only_an_adapter) as filling:
        # The order of the patterns matters (the first match wins), so the keys are not sorted.
        config = adapter_config(targets, base_model, parameters=by_parameter)
        write_json(filling / CONFIG_NAME, config, sort_keys=False)
        write_binding(filling, base_model=base_model, base_fingerprint=base_fingerprint, extra=extra, stacks=held)
        write_safetensors(filling / WEIGHTS_NAME, tensors, metadata)


def tensor_name(module: str, side: str) -> str:
    """Return the name under which PEFT saves and looks for one matrix of a pair.

    Args:
        module: full name of the module.
        side: "A" or "B".
    """
    return f"{_KEY_PREFIX}{module}.lora_{side}.weight"


def write_binding(
    folder: Path,
    *,
    base_model: str,
    base_fingerprint: str,
    extra: Mapping[str, Any] | None = None,
    stacks: Sequence[ExpertStack] = (),
) -> None:
    """Write beside an adapter which base it belongs to.

    Args:
        folder: the adapter folder, of ours or saved by PEFT.
        base_model: as in `write_adapter`.
        base_fingerprint: as in `write_adapter`.
        extra: as in `write_adapter`.
        stacks: as the adapter holds them.
    """
    binding: dict[str, Any] = {
        "format": BINDING_FORMAT,
        "format_version": FORMAT_VERSION,
        "base_fingerprint": base_fingerprint,
        "base_model": base_model,
    }
    binding |= {"extra": dict(extra)} if extra else {}
    binding |= {"stacked_experts": [stack.to_json() for stack in stacks]} if stacks else {}
    write_json(folder / BINDING_NAME, binding)


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA adapter, ours or any plain one of PEFT, trusting nothing about it.

    Args:
        folder: the adapter folder.

    Returns:
        The adapter, tensors on the CPU.

    Raises:
        FormatError: a file is missing or damaged, or the adapter uses what plain LoRA has not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; give the folder that holds {CONFIG_NAME}.")
    config = read_json(require_inside(folder, folder / CONFIG_NAME))
    source = str(folder / CONFIG_NAME)
    check_config(config, source)
    beside = next((name for name in _BESIDE if (folder / name).exists()), None)
    if beside is not None:
        raise FormatError(
            f"{folder} holds {beside}, trained weights besides its pairs, which are not read; without them the adapter "
            "would compute something else. Merge it with the tool that wrote it, or train pairs alone."
        )
    if not (folder / WEIGHTS_NAME).exists():
        _explain_missing_weights(folder)
    tensors, metadata = read_safetensors(require_inside(folder, folder / WEIGHTS_NAME))
    weights = str(folder / WEIGHTS_NAME)
    sides = _sides(tensors, weights)
    looked_up = RanksAndAlphas(config, source)
    fingerprint, extra, recorded = _read_binding(folder, metadata)
    parameters = frozenset(config.get("target_parameters") or ())
    places = side_names([stack for stack in recorded if stack.parameter in parameters])
    stacks = {places[stack.parameter]: stack for stack in recorded if stack.parameter in places}
    _refuse_unknown_parameters(parameters - {*places, *(f"{module}.weight" for module in sides)}, source)
    by_name = [module for module in sides if module not in stacks and f"{module}.weight" not in parameters]
    refuse_unlisted(config, by_name, source)
    pairs: dict[str, LoraPair] = {}
    for module in sorted(sides):
        pair, stack = sides[module], stacks.get(module)
        for side in ("A", "B"):
            if side not in pair:
                raise FormatError(f"{weights} lacks lora_{side} of {module}; the adapter is damaged.")
        by_parameter = f"{module}.weight" if f"{module}.weight" in parameters else module
        rank, alpha = looked_up.rank_and_alpha(stack.parameter if stack else by_parameter)
        if rank < 1 or rank != int(rank):
            raise FormatError(f"{source} gives {module} rank {rank}; a rank is 1 or more, and whole.")
        if pair["A"].ndim != 2 or pair["A"].shape[0] != rank * (stack.experts if stack else 1):
            raise FormatError(
                f"{weights}: lora_A of {module} has shape {tuple(pair['A'].shape)}, but {CONFIG_NAME} gives rank "
                f"{rank}{f' and {BINDING_NAME} {stack.experts} experts' if stack else ''}."
            )
        try:
            whole = LoraPair(lora_A=pair["A"], lora_B=pair["B"], alpha=alpha)
        except (ShapeError, NonFiniteError) as error:
            raise FormatError(f"{weights}: {module}: {error}") from None
        if stack is None:
            pairs[module] = whole
        else:
            pairs |= unstack_pairs(stack, StackedPair(whole.lora_A, whole.lora_B, int(rank), alpha), weights)
    return Adapter(pairs, config, fingerprint, extra)


def _refuse_unknown_parameters(parameters: Collection[str], source: str) -> None:
    if parameters:
        raise FormatError(
            f"{source}: target_parameters names {min(parameters):.200}, a tensor of which nothing says how experts lie "
            "in it; attach the adapter with PeftModel.from_pretrained to the packed model and save it: that gives "
            "every expert pairs of its own."
        )


def _explain_missing_weights(folder: Path) -> None:
    other = next((name for name in _OTHER_WEIGHTS if (folder / name).exists()), None)
    if other is None:
        return  # the reader of the file says that it is missing
    if other.endswith(".safetensors"):
        raise FormatError(
            f"{folder} holds {other}, the adapter of another tool, but no {WEIGHTS_NAME}; convert it to PEFT's layout."
        )
    raise FormatError(
        f"{folder} holds {other} but no {WEIGHTS_NAME}; only safetensors files are read, because a pickle can run any "
        "code. Where you trust it, load it with PEFT and save it again: save_pretrained writes safetensors."
    )


def _sides(tensors: Mapping[str, torch.Tensor], weights: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return module -> side -> matrix, from keys as PEFT saves them and as other savers leave them."""
    sides: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    names: dict[str | None, str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(
                f"{weights} holds {key!r:.200}, which is no LoRA matrix of the form {_KEY_PREFIX}<module>.lora_A.weight"
                f"{_what_a_key_is(key)}; only plain LoRA is read."
            )
        if tensor.dtype not in _DTYPES:
            raise FormatError(
                f"{weights}: {key} is {tensor.dtype}; expected one of {', '.join(map(str, _DTYPES))}. Save the adapter "
                "again in one of them."
            )
        names.setdefault(match["adapter"], key)
        if len(names) > 1:
            first, second = list(names.values())[:2]
            raise FormatError(
                f"{weights} holds {first!r:.200} and {second!r:.200}, matrices of several adapters; save each in a "
                "folder of its own."
            )
        module, side = match["module"].removeprefix(_KEY_PREFIX), match["side"]
        if side in sides[module]:
            raise FormatError(
                f"{weights} holds lora_{side} of {module:.200} twice, with and without {_KEY_PREFIX!r} in front; save "
                "it again with PEFT."
            )
        sides[module][side] = tensor
    if not sides:
        raise FormatError(f"{weights} holds no tensor; the adapter is empty.")
    return sides


def _what_a_key_is(key: str) -> str:
    """Return in brackets what a tensor is that is no side of a pair, or nothing."""
    for sign, what in (
        ("lora_embedding_", "it adapts embeddings"),
        ("lora_magnitude", "the magnitude of DoRA"),
        ("token_adapter", "trained tokens"),
        ("modules_to_save", "a whole trained weight"),
        (".lora_", ""),
        (".weight", "a whole weight: modules_to_save, or embeddings saved beside"),
    ):
        if sign in key:
            return f" ({what})" if what else ""
    return ""


def read_bound_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of the base that an adapter folder is bound to, None if it names none.

    Args:
        folder: an adapter folder; A and B are not read, so that they may be of any kind that PEFT has.

    Raises:
        FormatError: a file is damaged, or two of them name different bases.
    """
    weights = folder / WEIGHTS_NAME
    metadata = read_safetensors_header(require_inside(folder, weights))[1] if weights.is_file() else {}
    return _read_binding(folder, metadata)[0]


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder looks like an adapter (which may still be damaged)."""
    return (Path(folder) / CONFIG_NAME).is_file()


def _holds_only_an_adapter(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return CONFIG_NAME in names and names <= _OUR_FILES


def _is_fingerprint(text: str) -> bool:
    # Messages carry it, and a text that runs over lines or screens would hide what they say.
    return 0 < len(text) <= _LONGEST_FINGERPRINT and text.isprintable()


def _read_binding(
    folder: Path, metadata: Mapping[str, str]
) -> tuple[str | None, Mapping[str, Any], Sequence[ExpertStack]]:
    """Return the base fingerprint, what else the writer recorded, and the tensors of experts whose pairs are one."""
    inside = metadata.get(_FINGERPRINT_KEY)
    if inside is not None and not _is_fingerprint(inside):
        raise FormatError(f"{folder / WEIGHTS_NAME}: {_FINGERPRINT_KEY} is {inside!r:.80}; the file is damaged.")
    path = folder / BINDING_NAME
    if not path.exists():
        return inside, {}, ()
    binding = read_json(require_inside(folder, path))
    if binding.get("format") != BINDING_FORMAT or binding.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} says format {binding.get('format')!r:.80}, version "
            f"{binding.get('format_version')!r:.80}; this program reads {BINDING_FORMAT!r}, version "
            f"{FORMAT_VERSION}. Update cloq_export."
        )
    beside = binding.get("base_fingerprint")
    if not isinstance(beside, str) or not _is_fingerprint(beside):
        raise FormatError(f"{path}: base_fingerprint is {beside!r:.80}; the file is damaged.")
    extra = binding.get("extra", {})
    if not isinstance(extra, dict):
        raise FormatError(f"{path}: extra is a {type(extra).__name__}; expected an object: the file is damaged.")
    if inside is not None and inside != beside:
        raise FormatError(
            f"{path} names the base {beside[:19]}… but {WEIGHTS_NAME} names {inside[:19]}…; the files come from two "
            "adapters: copy both again from one."
        )
    stacks = binding.get("stacked_experts", [])
    if not isinstance(stacks, list):
        raise FormatError(
            f"{path}: stacked_experts is a {type(stacks).__name__}; expected a list: the file is damaged."
        )
    return beside, extra, [ExpertStack.of_json(fields, str(path)) for fields in stacks]
