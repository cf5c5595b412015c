"""What a vLLM process refuses to load onto a base of ours, and what a server of `cloq serve` answers by default."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import signal
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.lora.worker_manager import WorkerLoRAManager

from cloq_export.artifact.adapters import refuse_other_base, unbound_note
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.needed_adapter import WHY
from cloq_export.engines.vllm.plugin import api_key
from cloq_export.engines.vllm.plugin.adapter_names import as_in_files, refuse_lost
from cloq_export.engines.vllm.plugin.adapters import (
    LIFELINE_VARIABLE,
    ServingPolicy,
    allowed_place,
    check_adapter,
    check_name,
)
from cloq_export.engines.vllm.plugin.held_adapters import note_loaded
from cloq_export.engines.vllm.plugin.pieces import SERVER_PIECES, require_pieces
from cloq_export.engines.vllm.plugin.prefix_cache import files_signature
from cloq_export.errors import CloqError, UsageError
from cloq_export.files.safe_json import read_json
from cloq_export.files.spelled_paths import expand_user
from cloq_export.formats.peft.codec import BINDING_NAME

logger = init_logger("vllm.plugins.cloq_export")


def register() -> None:
    """Add the checks to vLLM; those of the HTTP server only where `cloq serve` started it."""
    _guard_workers()
    # The processes of the engine answer no requests, and importing the HTTP server takes a while.
    if ServingPolicy.from_environment() is not None and multiprocessing.parent_process() is None:
        _guard_server()
        api_key.register()
        _end_with_starter()


def _end_with_starter() -> None:
    """End this server in order when the program that started it is gone, however that ended."""
    lifeline = os.environ.pop(LIFELINE_VARIABLE, None)
    if lifeline is None:
        return

    def wait() -> None:
        os.read(int(lifeline), 1)  # nothing is ever written to it: `read` returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _base(path: str) -> Checkpoint | None:
    """Return the checkpoint that an engine serves, or None if it is not one that this package wrote."""
    return _base_of(path, files_signature(path))


@functools.lru_cache(maxsize=4)
def _base_of(path: str, state: str) -> Checkpoint | None:
    # A process may serve other files under the same path later.
    try:
        checkpoint = Checkpoint.open(path)
    except CloqError:
        return None
    return checkpoint if checkpoint.is_ours else None


def _guard_workers() -> None:
    """Let no worker load an adapter that says that it belongs to another base."""
    if hasattr(WorkerLoRAManager._load_adapter, "of_cloq_export"):
        return
    stock_init, stock_load = WorkerLoRAManager.__init__, WorkerLoRAManager._load_adapter

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, vllm_config, *args, **kwargs)
        self.served_model = vllm_config.model_config.model
        self.has_all_layers = vllm_config.parallel_config.pipeline_parallel_size == 1

    def load(self: Any, lora_request: Any) -> Any:
        policy, base = ServingPolicy.from_environment(), _base(self.served_model)
        binding = Path(lora_request.lora_path) / BINDING_NAME
        if base is not None and binding.is_file() and not (policy and policy.force):
            refuse_other_base(binding.parent, str(read_json(binding).get("base_fingerprint")), base)
        with as_in_files(base):
            loaded = stock_load(self, lora_request)
        # With pipeline parallelism the other modules are those of other ranks.
        if base is not None and self.has_all_layers:
            refuse_lost(lora_request.lora_path, loaded, self._adapter_manager)
        note_loaded(self, lora_request.lora_int_id, loaded)
        return loaded

    load.of_cloq_export = True  # type: ignore[attr-defined]
    WorkerLoRAManager.__init__, WorkerLoRAManager._load_adapter = init, load


def _guard_server() -> None:
    """Check adapters that are loaded while the server runs, and let plain requests meet the default adapter."""
    require_pieces(SERVER_PIECES)
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    from cloq_export.engines.vllm.plugin.before_opening import answer_starter

    policy = ServingPolicy.from_environment()
    assert policy is not None
    stock_check_load = OpenAIServingModels._check_load_lora_adapter_request
    stock_check_unload = OpenAIServingModels._check_unload_lora_adapter_request
    stock_models, stock_adapters = OpenAIServingModels.show_available_models, BaseServing._maybe_get_adapters
    stock_static = OpenAIServingModels.init_static_loras
    stock_load = OpenAIServingModels.load_lora_adapter

    def refuse(error: Exception) -> Any:
        return create_error_response(message=str(error), err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST)

    async def check_load(self: Any, request: Any) -> Any:
        refused = await stock_check_load(self, request)
        if refused is not None:
            return refused
        limits = self.engine_client.vllm_config.lora_config
        try:
            await asyncio.to_thread(_check_request, policy, self.model_config.model, limits, request)
        except CloqError as error:
            return refuse(error)
        return None

    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        if self.opened_by_cloq_export:
            try:
                place = await asyncio.to_thread(allowed_place, expand_user(request.lora_path), policy.adapter_roots)
            except CloqError as error:
                logger.warning("%s", error)  # vLLM leaves paths out of what it answers
                return refuse(error)
            # What was checked is what is read: a link may be turned meanwhile.
            request = request.model_copy(update={"lora_path": str(place)})
        if not request.load_inplace or request.lora_name not in self.lora_requests:
            return await stock_load(self, request.model_copy(update={"load_inplace": False}), base_model_name)
        # vLLM would give the new weights the number of the old ones, to which requests under way hold, and read the
        # folder again at every step from then on.
        async with self.lora_resolver_lock[request.lora_name]:
            refused = await self._check_load_lora_adapter_request(request)
            if refused is not None:
                return refused
            loaded = LoRARequest(
                request.lora_name,
                self.lora_id_counter.inc(1),
                request.lora_path,
                is_3d_lora_weight=request.is_3d_lora_weight,
            )
            try:
                await self.engine_client.add_lora(loaded)
            except Exception as error:  # the engine's error is the answer; the earlier weights stay
                return create_error_response(
                    message=str(error),
                    err_type="InternalServerError",
                    status_code=HTTPStatus.INTERNAL_SERVER_ERROR,
                )
            self.lora_requests[request.lora_name] = loaded
            return f"Success: LoRA adapter '{request.lora_name}' added successfully."

    async def check_unload(self: Any, request: Any) -> Any:
        if policy.default is not None and request.lora_name in (policy.name, policy.default):
            return refuse(_held(request.lora_name, "unloaded"))
        return await stock_check_unload(self, request)

    async def load_static(self: Any) -> None:
        self.opened_by_cloq_export = False
        if self.lora_resolvers:
            logger.warning("Adapters are loaded by request alone; LoRA resolvers are not asked under cloq serve.")
            self.lora_resolvers = []
        await stock_static(self)
        if policy.default is not None:
            # The same number, so that vLLM holds and counts the adapter once under both of its names.
            default = self.lora_requests[policy.default]
            self.lora_requests[policy.name] = LoRARequest(policy.name, default.lora_int_id, default.lora_path)
        await answer_starter(self)
        self.opened_by_cloq_export = True

    async def show_models(self: Any) -> Any:
        models = await stock_models(self)
        if policy.needs_adapter:
            models.data = [card for card in models.data if card.id != policy.base_name]
        # Clients that choose no model take the first of the list, which must not be the bare quantized base.
        models.data.sort(key=lambda card: (card.id != policy.name, card.id == policy.base_name))
        return models

    def adapters_for(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if not request.model and policy.name in self.models.lora_requests:
            return self.models.lora_requests[policy.name]
        found = stock_adapters(self, request, *args, **kwargs)
        if found is None and policy.needs_adapter:
            raise VLLMValidationError(
                f"{policy.base_name} needs its adapter: {WHY}. Ask for {policy.name}.", parameter="model"
            )
        return found

    OpenAIServingModels._check_load_lora_adapter_request = check_load
    OpenAIServingModels.load_lora_adapter = load
    OpenAIServingModels._check_unload_lora_adapter_request = check_unload
    OpenAIServingModels.show_available_models = show_models
    OpenAIServingModels.init_static_loras = load_static
    BaseServing._maybe_get_adapters = adapters_for


def _held(name: str, wish: str) -> UsageError:
    return UsageError(
        f"{name} is what plain requests are answered with and cannot be {wish}; start the server with another "
        "--default."
    )


def _check_request(policy: ServingPolicy, model: str, limits: Any, request: Any) -> None:
    """Refuse a request to load an adapter that `cloq serve` would refuse at its start."""
    check_name(request.lora_name, taken=(policy.name, policy.base_name))
    if request.load_inplace and request.lora_name == policy.default:
        raise _held(request.lora_name, "replaced")
    base = _base(model)
    folder = expand_user(request.lora_path)
    if base is None:
        return
    adapter = check_adapter(
        base,
        folder,
        max_rank=limits.max_lora_rank,
        target_modules=limits.target_modules,
        force=policy.force,
        trust_unbound=policy.trust_adapters,
    )
    if adapter.base_fingerprint is None:
        logger.warning("%s.", unbound_note(request.lora_name, base))
