"""The engines that `verify` serves with; each is imported when it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.served import packed_model
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verification.plan import Plan

if TYPE_CHECKING:
    from cloq_export.engines.vllm.options import EngineSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Opener = Callable[[Path, Mapping[str, Path], VerifyOptions], ServedModel]


def _open_hf(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    return packed_model(export, adapters, dtype=DTYPES[options.dtype], device=options.device, force=options.force)


def _open_vllm(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.vllm.engine import EngineStart, VllmModel

    return VllmModel(export, adapters, _engine_settings(options), EngineStart(python=options.python))


def _engine_settings(options: VerifyOptions) -> EngineSettings:
    from cloq_export.engines.vllm.options import EngineSettings

    return EngineSettings(dtype=options.dtype, force=options.force)


def _open_vllm_server(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.vllm.plan import ServerOptions
    from cloq_export.engines.vllm.server import VllmServer

    asked = ServerOptions(dtype=options.dtype, python=options.python, force=options.force)
    return VllmServer.start(export, adapters, asked)


def _open_onnx(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.onnx.engine import OnnxModel

    return OnnxModel(export, adapters, force=options.force)


# Runtime -> what opens it.
OPENERS: dict[str, Opener] = {
    "hf": _open_hf,
    "vllm": _open_vllm,
    "vllm-server": _open_vllm_server,
    "onnx": _open_onnx,
}


def check_engine(plan: Plan) -> None:
    """Refuse what vLLM would refuse at its start: long before that, the float model and the reference are measured."""
    options = plan.options
    if not isinstance(plan.checkpoint, Checkpoint) or not options.runtime.startswith("vllm"):
        return
    from cloq_export.engines.vllm.facts import engine_facts
    from cloq_export.engines.vllm.options import engine_options

    engine_options(plan.checkpoint, plan.folders, _engine_settings(options))
    engine_facts(options.python)


def engine_length(plan: Plan) -> int | None:
    """Return how long a text an engine takes for scoring, None where nothing but the model limits it."""
    if not isinstance(plan.checkpoint, Checkpoint) or not plan.options.runtime.startswith("vllm"):
        return None
    from cloq_export.engines.vllm.options import engine_options

    options = engine_options(plan.checkpoint, plan.folders, _engine_settings(plan.options))
    # Scoring a text asks for one token behind it.
    return int(options["max_model_len"]) - 1


@contextlib.contextmanager
def served(plan: Plan, folders: Mapping[str, Path]) -> Iterator[ServedModel]:
    """Serve adapters for a while with the runtime that was asked for."""
    model = OPENERS[plan.options.runtime](plan.export, folders, plan.options)
    try:
        yield model
    finally:
        model.close()
