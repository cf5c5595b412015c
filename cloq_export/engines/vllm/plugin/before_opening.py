"""What a server computes is shown to the program that started it before anybody else can ask.

vLLM binds its port early and listens at the very end, so that whoever knocks meanwhile is turned away. In between the
server answers over a socket that it has inherited; `engines.vllm.closed_server` is the other side.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input

from cloq_export.engines.vllm.plugin.adapters import DOOR_VARIABLE
from cloq_export.engines.vllm.plugin.held_adapters import METHOD
from cloq_export.errors import EngineError


async def answer_starter(models: Any) -> None:
    """Answer the program that started this server until it lets the port be opened.

    Args:
        models: vLLM's `OpenAIServingModels`, with the adapters of the start.

    Raises:
        EngineError: that program is gone.
    """
    number = os.environ.pop(DOOR_VARIABLE, None)
    if number is None:
        return
    with socket.socket(fileno=int(number)) as connection, connection.makefile("rw") as lines:
        _answer(lines, {"result": "loaded"})
        while True:
            line = await asyncio.to_thread(lines.readline)
            if not line:
                raise EngineError("the program that started this server is gone")
            request = json.loads(line)
            try:
                _answer(lines, {"result": await _compute(models, request)})
            except VLLMClientError as error:
                _answer(lines, {"error": " ".join(str(error).split())[:500]})
            if "open" in request:
                return


async def _compute(models: Any, request: Mapping[str, Any]) -> Any:
    if "held" in request:
        # All workers read the whole adapter, whatever part of it each computes.
        held = (await models.engine_client.collective_rpc(METHOD))[0]
        return held.get(str(models.lora_requests[request["held"]].lora_int_id))
    # One after the other: what is proven of a request must not hang on its neighbours.
    return [await _prompt_logprobs(models, ids, name) for ids, name in request.get("prompt_logprobs", ())]


async def _prompt_logprobs(models: Any, ids: list[int], name: str | None) -> list[float]:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    lora = None if name is None else models.lora_requests[name]
    output = None
    async for output in models.engine_client.generate(  # noqa: B007 (the last one is used)
        tokens_input(ids), sampling, f"before-opening-{os.urandom(8).hex()}", lora_request=lora
    ):
        pass
    assert output is not None
    return [scores[token].logprob for token, scores in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]


def _answer(lines: Any, message: Mapping[str, Any]) -> None:
    lines.write(json.dumps(message) + "\n")
    lines.flush()
