"""Modules of an adapter under the names that vLLM knows, and none of them dropped without a word.

Adapters call modules as transformers has them in memory; vLLM uses the names in the files of the base. Where the two
differ, as they do for the experts of Mixtral, vLLM takes such pairs for those of a module that it does not have, and
serves the adapter without them.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

from vllm.lora import lora_model

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.errors import FormatError

_PREFIX = "base_model.model."
_names: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar("names", default=None)
_UNMAPPED = object()


def register() -> None:
    """Let vLLM read the names of an adapter as those of the files, where `as_in_files` says which these are."""
    stock = lora_model.parse_fine_tuned_lora_name
    if hasattr(stock, "of_cloq_export"):
        return

    def parse(name: str, weights_mapper: Any = _UNMAPPED) -> tuple[str, bool]:
        # Without a mapper, vLLM asks for the name in the adapter, to look its rank and alpha up.
        return stock(name) if weights_mapper is _UNMAPPED else stock(_translated(name), weights_mapper)

    parse.of_cloq_export = True  # type: ignore[attr-defined]
    lora_model.parse_fine_tuned_lora_name = parse


@contextlib.contextmanager
def as_in_files(base: Checkpoint | None) -> Iterator[None]:
    """Take the modules of adapters that are loaded meanwhile for those of a base."""
    token = _names.set(None if base is None else names_in_files(base))
    try:
        yield
    finally:
        _names.reset(token)


def names_in_files(base: Checkpoint) -> dict[str, str]:
    """Return module in memory -> its name in the files, of those that differ."""
    pairs = ((memory.rpartition(".")[0], stored.rpartition(".")[0]) for memory, stored in base.stored.items())
    return {memory: stored for memory, stored in pairs if memory != stored}


def _translated(name: str) -> str:
    module, dot, factor = name.removeprefix(_PREFIX).partition(".lora_")
    renamed = (_names.get() or {}).get(module)
    return name if renamed is None else f"{_PREFIX}{renamed}{dot}{factor}"


def refuse_lost(folder: str, loaded: Any, manager: Any) -> None:
    """Refuse an adapter of which vLLM would leave a part out.

    Args:
        folder: of the adapter, for the message.
        loaded: vLLM's `LoRAModel` as it was read.
        manager: vLLM's `LoRAModelManager`.

    Raises:
        FormatError: it adapts a module that vLLM has no place for.
    """
    known = set(manager.modules) | {part for parts in manager.packed_modules.values() for part in parts}
    # From 0.33 on vLLM also knows the modules of a wrapper's language model by the names in the text model alone.
    if hasattr(manager, "_get_text_lora_names"):
        known |= {name for module in known for name in manager._get_text_lora_names(module)}
    lost = sorted(set(loaded.loras) - known)
    if lost:
        raise FormatError(
            f"{folder} adapts {lost[0]}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which this engine "
            "would serve without the adapter; start it with this adapter, or leave these modules out of it."
        )
