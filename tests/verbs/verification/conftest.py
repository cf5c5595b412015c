"""An export with two adapters, and another runtime in the place of the one that serves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloq_export.engines.protocol import ServedModel
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification import engines
from cloq_export.verbs.verification.options import VerifyOptions


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, recipe_for: Any, silent: Console) -> Path:
    """Return a 3-bit export with two adapters."""
    run = tmp_path_factory.mktemp("verified") / "run"
    make_run(recipe_for("llama", bits=3), run, console=silent)
    adapt(run, {"rank": 6, "adapter_name": "second", "split": "balanced"}, console=silent)
    write_export(run, ExportOptions(format="gptq_v2", out=run / "exports" / "gptq_v2"), console=silent)
    return run / "exports" / "gptq_v2"


@pytest.fixture
def options(recipe_for: Any, texts: dict[str, str]) -> VerifyOptions:
    return VerifyOptions(
        reference=recipe_for("llama").model,
        text=texts["eval_text"],
        window=24,
        windows=4,
        prompts=6,
        new_tokens=5,
        liveness_tokens=24,
    )


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., ServedModel]], None]:
    """Return a function that puts another runtime in the place of the packed one."""

    def replace(opener: Callable[..., ServedModel]) -> None:
        monkeypatch.setitem(engines.OPENERS, "hf", opener)

    return replace
