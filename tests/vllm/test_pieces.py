"""Pieces of vLLM that the plugin builds on: all of them are looked for, and the first that is missing is named."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloq_export.engines.vllm import plugin
from cloq_export.engines.vllm.plugin.pieces import PIECES, SERVER_PIECES, missing_piece

FOLDER = pathlib.Path(plugin.__file__).parent
# What is there in every version, or is asked before the pieces are.
ALWAYS = ("vllm.logger", "vllm.platforms", "vllm.version")


def imported() -> Iterator[tuple[str, str, str]]:
    """Yield the file, the module and the name of everything that the plugin takes from vLLM."""
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.split(".")[0] == "vllm" and module not in ALWAYS:
                yield from ((path.name, module, alias.name) for alias in node.names)


def test_everything_that_is_taken_from_vllm_is_looked_for() -> None:
    known = [piece.partition(":") for piece in (*PIECES, *SERVER_PIECES)]
    taken = list(imported())
    assert len(taken) > 40
    for file, module, name in taken:
        as_attribute = any(home == module and path.split(".")[0] == name for home, _, path in known)
        as_module = any(home == f"{module}.{name}" for home, _, _ in known)
        assert as_attribute or as_module, f"{file} takes {name} of {module}; enter it in pieces.py"


def test_what_is_missing_is_named() -> None:
    assert missing_piece({"json:JSONDecoder.decode": ("s",), "json:dumps": ()}) is None
    assert (
        missing_piece({"json:JSONDecoder.decode": ("s", "shape")}) == "json.JSONDecoder.decode with the parameter shape"
    )
    assert missing_piece({"json:JSONDecoder.learn": ()}) == "json.JSONDecoder.learn"
    assert missing_piece({"json.of_another_version:loads": ()}) == "json.of_another_version.loads"


@pytest.mark.slow
def test_other_versions_and_builds(probe: Callable[..., Any]) -> None:
    found = probe("other_versions.py")
    # A version that nobody has looked at is left alone, and that is said once.
    assert found["unknown"] == {"methods": 0, "warnings": 1}
    version = found["version"]
    assert found["complete"] == [None, None]
    assert found["lacking"] == (
        f"vLLM {version} has no vllm.lora.lora_model.parse_fine_tuned_lora_name, which the plugin of cloq-export "
        "builds on; install the published version 0.32 or 0.33, or update cloq-export."
    )
    assert found["changed"].startswith(
        f"vLLM {version} has no vllm.v1.engine.core.EngineCore.add_lora with the parameter lora_request, which"
    )
    assert found["server"].startswith(
        f"vLLM {version} has no vllm.entrypoints.openai.models.serving.OpenAIServingModels.show_available_models, which"
    )
    assert found["methods after a refusal"] == 0
