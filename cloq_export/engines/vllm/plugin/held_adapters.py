"""What an engine answers when it is asked which weights of its adapters it holds.

A worker notes a hash of every pair as it has read it, in its own precision; `GET /v1/held_lora_adapters` of a server
gives them by the names that requests use. So a trainer sees whether its last weights have come, and which of them.
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import torch
from vllm.v1.worker.worker_base import WorkerBase

from cloq_export.engines.held_adapters import factors_digest
from cloq_export.engines.vllm.plugin.pieces import SERVER_PIECES, require_pieces

ROUTE = "/v1/held_lora_adapters"
"""Where a server answers; `client.ServerClient.held_adapter` asks there."""

METHOD = "cloq_held_adapters"
"""The method of a worker that gives number of an adapter -> what it holds."""

_SERVER_MODULES = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.serve")


def register() -> None:
    """Let workers and servers answer; importing a server takes a while, so only programs that are one do it."""
    setattr(WorkerBase, METHOD, _held_by)
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    loaded = any(name in sys.modules or getattr(main, "name", None) == name for name in _SERVER_MODULES)
    if loaded and multiprocessing.parent_process() is None:
        _add_route()


def note_loaded(manager: Any, number: int, lora: Any) -> None:
    """Note what a worker has read of an adapter.

    Args:
        manager: the worker's own, which keeps the note.
        number: of the adapter.
        lora: what was read, before vLLM brings it into another form.
    """
    dtype = manager.lora_config.lora_dtype
    modules = {
        name: factors_digest(each.lora_a, each.lora_b, each.scaling, dtype)
        for name, each in lora.loras.items()
        if isinstance(each.lora_a, torch.Tensor) and isinstance(each.lora_b, torch.Tensor)
    }
    notes = vars(manager).setdefault("held_by_cloq_export", {})
    notes[str(number)] = {"dtype": str(dtype).removeprefix("torch."), "modules": modules}


def _held_by(worker: Any) -> dict[str, Any]:
    manager = getattr(worker.model_runner, "lora_manager", None)
    if manager is None:
        return {}
    notes = vars(manager).get("held_by_cloq_export", {})
    numbers = {str(number) for number in manager.list_adapters()}
    for number in set(notes) - numbers:
        del notes[number]
    return dict(notes)


def _add_route() -> None:
    require_pieces(SERVER_PIECES)
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.openai.models.api_router import models
    from vllm.entrypoints.serve.lora import api_router

    if hasattr(api_router.attach_router, "of_cloq_export"):
        return
    stock = api_router.attach_router

    async def held_lora_adapters(raw_request: Request) -> JSONResponse:
        handler = models(raw_request)
        # All workers read the whole adapter, although each computes only a part of it.
        held = (await handler.engine_client.collective_rpc(METHOD))[0]
        names = {name: held.get(str(each.lora_int_id)) for name, each in handler.lora_requests.items()}
        return JSONResponse({"adapters": names})

    # FastAPI reads annotations, which are texts in this file.
    held_lora_adapters.__annotations__ = {"raw_request": Request, "return": JSONResponse}

    def attach(app: Any) -> None:
        stock(app)
        app.add_api_route(ROUTE, held_lora_adapters, methods=["GET"], response_class=JSONResponse)

    attach.of_cloq_export = True  # type: ignore[attr-defined]
    api_router.attach_router = attach
