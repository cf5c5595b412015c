"""Register the plugin in a vLLM that is, or pretends to be, another one, and print what comes of it as JSON."""

import contextlib
import json
import logging

import vllm.version

own_version = vllm.version.__version__

from vllm.entrypoints.openai.models.serving import OpenAIServingModels  # noqa: E402
from vllm.lora import lora_model  # noqa: E402
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS  # noqa: E402
from vllm.v1.engine.core import EngineCore  # noqa: E402

from cloq_export.engines.vllm import plugin as vllm_plugin  # noqa: E402
from cloq_export.engines.vllm.plugin.pieces import (  # noqa: E402
    PIECES,
    SERVER_PIECES,
    missing_piece,
    require_pieces,
)
from cloq_export.errors import EngineError  # noqa: E402

lines = []


class Collect(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())


def refused(action):
    try:
        action()
    except EngineError as error:
        return str(error)
    return None


@contextlib.contextmanager
def without(owner, name, instead=None):
    kept = getattr(owner, name)
    delattr(owner, name)
    if instead is not None:
        setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def register():
    vllm_plugin._registered = False
    vllm_plugin.register()


logging.getLogger("vllm.plugins.cloq_export").addHandler(Collect())
vllm.version.__version__ = "0.99.0"
register()
register()  # as in a child process, which inherits the environment
assert all("leaves" in line and "\n" not in line for line in lines), lines
result = {"unknown": {"methods": QUANTIZATION_METHODS.count("cloq"), "warnings": len(lines)}}
vllm.version.__version__ = own_version
result["version"] = own_version
result["complete"] = [missing_piece(PIECES), missing_piece(SERVER_PIECES)]
with without(lora_model, "parse_fine_tuned_lora_name"):
    result["lacking"] = refused(register)
with without(EngineCore, "add_lora", lambda self, adapter: None):
    result["changed"] = refused(register)
with without(OpenAIServingModels, "show_available_models"):
    result["server"] = refused(lambda: require_pieces(SERVER_PIECES))
result["methods after a refusal"] = QUANTIZATION_METHODS.count("cloq")
print(json.dumps(result))
