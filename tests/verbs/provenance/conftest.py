"""A run whose adapters were trained, and its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cloq_export.recipe import FineTuneRecipe
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.finetune import finetune
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, recipe_for: Any, silent: Console) -> Path:
    """Return a run with its own adapter and two that were trained, on other data and from another seed."""
    folder = tmp_path_factory.mktemp("made")
    run = folder / "run"
    make_run(recipe_for("qwen3", bits=3), run, console=silent)
    for name, shift, seed in (("one", 0, 0), ("two", 7, 1)):
        rows = [
            json.dumps({"prompt": f"w{n} w{n + 1}", "completion": f" w{(n + shift) % 90} w{n + 2}"}) for n in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        tuning = FineTuneRecipe.from_mapping(
            {
                "data": str(folder / f"{name}.jsonl"),
                "name": name,
                "steps": 3,
                "batch_size": 2,
                "seqlen": 16,
                "learning_rate": 5e-3,
                "eval_samples": 4,
                "seed": seed,
                "precision": "float32",
            }
        )
        finetune(run, tuning, console=silent)
    return run


@pytest.fixture(scope="session")
def exported(run: Path, silent: Console) -> Path:
    write_export(run, ExportOptions(format="gptq_v2", out=run / "exports" / "all"), console=silent)
    return run / "exports" / "all"


@pytest.fixture
def options(recipe_for: Any, texts: Mapping[str, str]) -> VerifyOptions:
    return VerifyOptions(
        reference=recipe_for("qwen3").model,
        text=texts["eval_text"],
        window=16,
        windows=4,
        prompts=3,
        new_tokens=3,
        liveness_tokens=12,
    )


@pytest.fixture
def copy(tmp_path: Path, exported: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))
