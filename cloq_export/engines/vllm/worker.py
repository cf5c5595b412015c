"""The engine's side of a `VllmModel`: run as a module by the interpreter that has vLLM, it answers lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import IO, Any

from cloq_export.engines.vllm.plugin import adapters as adapter_rules


def _serve(asked: IO[str], answered: IO[str]) -> None:
    """Answer the lines of a `VllmModel`; the first one says what to load, and a later one may say it again."""
    try:
        from vllm import LLM
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
        from vllm.exceptions import VLLMClientError
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        _answer(answered, {"error": f"vLLM cannot be imported by {sys.executable} ({error}); install it there"})
        return
    engine: Any = None
    lora: dict[str, Any] = {}
    for line in asked:
        request = json.loads(line)
        if "options" in request:
            if engine is not None:
                engine = None
                cleanup_dist_env_and_memory()
            os.environ.pop(adapter_rules.POLICY_VARIABLE, None)
            if request["force"]:
                os.environ[adapter_rules.POLICY_VARIABLE] = adapter_rules.ServingPolicy("", "", force=True).to_text()
            engine = LLM(**request["options"])
            lora = {name: LoRARequest(name, number, folder) for name, (number, folder) in request["adapters"].items()}
            _answer(answered, {"result": "ready"})
            continue
        try:
            if "held" in request:
                _answer(answered, {"result": _held(engine, lora[request["held"]].lora_int_id)})
                continue
            _answer(answered, {"result": _compute(engine, lora, request)})
        except VLLMClientError as error:  # the request's fault; anything else ends the engine
            _answer(answered, {"error": " ".join(str(error).split())[:500]})


def _held(engine: Any, number: int) -> Any:
    """Return what the worker holds of an adapter; None where this package's plugin is left out."""
    from vllm.v1.worker.worker_base import WorkerBase

    if not hasattr(WorkerBase, "cloq_held_adapters"):
        return None
    return engine.collective_rpc("cloq_held_adapters")[0].get(str(number))


def _compute(engine: Any, lora: Mapping[str, Any], request: Mapping[str, Any]) -> list[Any]:
    from vllm import SamplingParams

    scoring = "prompt_logprobs" in request
    batch = request["prompt_logprobs" if scoring else "generate"]
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=1 if scoring else request["max_new_tokens"],
        # How many tokens are listed in each place besides the one that comes.
        prompt_logprobs=request.get("listed", 0) if scoring else None,
        detokenize=False,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids, _ in batch],
        sampling,
        lora_request=[None if name is None else lora[name] for _, name in batch] if lora else None,
        use_tqdm=False,
    )
    if not scoring:
        return [list(output.outputs[0].token_ids) for output in outputs]
    if "listed" in request:
        return [
            [[(token, score.logprob) for token, score in scores.items()] for scores in output.prompt_logprobs[1:]]
            for output in outputs
        ]
    return [
        [scores[token].logprob for token, scores in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for (ids, _), output in zip(batch, outputs, strict=True)
    ]


def _answer(answered: IO[str], message: Mapping[str, Any]) -> None:
    answered.write(json.dumps(message) + "\n")
    answered.flush()


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1])) as asked, os.fdopen(int(sys.argv[2]), "w") as answered:
        try:
            _serve(asked, answered)
        except BrokenPipeError:
            pass  # the process that asked has ended
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    # vLLM's own threads and processes can keep an interpreter that has nothing left to do.
    os._exit(0)
