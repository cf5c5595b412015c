"""Keeps what vLLM computed for a prompt apart by the weights that it was computed with.

vLLM finds the blocks of a known prompt again by the name and the path of the adapter. Neither says which weights were
in memory: a folder can be written anew, and a name can be loaded again in place. Here the number of the load stands in
the key too, and what the files were when they were loaded. Where the files have changed since, the weights in memory
may be either, because vLLM reads a folder again when the adapter had to leave its memory; then no block is shared.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from cloq_export.files.spelled_paths import expand_user


def files_signature(folder: str | Path) -> str:
    """Return a hash of the state of a folder's files, which is another one after any of them was written."""
    state = []
    try:
        for path in sorted(expand_user(folder).resolve().iterdir()):
            found = path.stat()
            state.append((path.name, found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns))
    except OSError as error:
        state.append((type(error).__name__, 0, 0, 0, 0))
    return hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()


class LoadedAdapters:
    """What stands behind the numbers under which an engine holds its adapters."""

    def __init__(self) -> None:
        self._loaded: dict[int, str] = {}
        self._changed: set[int] = set()

    def load(self, number: int, folder: str | Path) -> None:
        """Note that the engine is about to read an adapter, in the place of what had this number."""
        self._loaded[number] = files_signature(folder)
        self._changed.discard(number)

    def forget(self, number: int) -> None:
        """Note that a load failed, after which it is not known which weights have this number."""
        self._changed.add(number)

    def key(self, number: int, folder: str | Path, request: str, *, rereads: bool = False) -> str:
        """Return what the blocks of a request may be shared by.

        Args:
            number: of its adapter.
            folder: of its adapter.
            request: its own name, which no other request has.
            rereads: the engine reads the folder again for this request.
        """
        now = files_signature(folder)
        if rereads:
            self._loaded[number] = now
            self._changed.discard(number)
        elif now != self._loaded.setdefault(number, now) or number in self._changed:
            # Also when the files are as they were: what was read in the meantime is not known.
            self._changed.add(number)
            return f"{number}:{request}"
        return f"{number}:{now}"


def register() -> None:
    """Let vLLM's keys tell loads apart."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore

    if hasattr(EngineCore.add_lora, "of_cloq_export"):
        return
    adapters = LoadedAdapters()
    stock_keys, stock_add = kv_cache_utils._gen_lora_extra_hash_keys, EngineCore.add_lora

    def keys(request: Any) -> Any:
        adapter = request.lora_request
        found = stock_keys(request)
        if not adapter or not found:
            return found
        if not hasattr(request, "cloq_export_key"):
            request.cloq_export_key = adapters.key(
                adapter.lora_int_id, adapter.lora_path, request.request_id, rereads=adapter.load_inplace
            )
        if isinstance(found[0], tuple):
            return [(*found[0], request.cloq_export_key), *found[1:]]
        return [*found, request.cloq_export_key]

    @functools.wraps(stock_add)
    def add(self: Any, lora_request: Any) -> Any:
        held = lora_request.lora_int_id in self.list_loras()
        if lora_request.load_inplace or not held:
            adapters.load(lora_request.lora_int_id, lora_request.lora_path)
        try:
            return stock_add(self, lora_request)
        except BaseException:
            adapters.forget(lora_request.lora_int_id)
            raise

    add.of_cloq_export = True  # type: ignore[attr-defined]
    kv_cache_utils._gen_lora_extra_hash_keys = keys
    EngineCore.add_lora = add
    # By its name alone, of two loads of one name in a batch only one would be there.
    LoRARequest.__eq__ = lambda one, other: isinstance(other, LoRARequest) and _identity(one) == _identity(other)
    LoRARequest.__hash__ = lambda one: hash(_identity(one))


def _identity(request: Any) -> tuple[str, int]:
    return request.lora_name, request.lora_int_id
