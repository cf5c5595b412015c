"""Register the plugin in a vLLM that claims to be another version, and print what changed as JSON."""

import json
import logging
import sys

import vllm.version

vllm.version.__version__ = sys.argv[1]

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS  # noqa: E402

from cloq_export.engines.vllm import plugin as vllm_plugin  # noqa: E402

lines = []


class Collect(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())


logging.getLogger("vllm.plugins.cloq_export").addHandler(Collect())
vllm_plugin.register()
vllm_plugin._registered = False  # as in a child process, which inherits the environment
vllm_plugin.register()
assert all("leaves" in line and "\n" not in line for line in lines), lines
print(json.dumps({"methods": QUANTIZATION_METHODS.count("cloq"), "warnings": len(lines)}))
