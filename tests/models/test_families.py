"""Families of transformers from a tiny random model to served files, against logits that the test computes by itself.

`families/` holds the configurations and the check; `docs/models.md` is rendered from the results of all families.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "families"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

# What people serve, one of each build; all families take an hour (CONTRIBUTING.md says how).
SELECTED = (
    *("llama", "qwen3", "gemma3n_text", "gemma4_text", "phi3", "qwen3_5_text", "lfm2", "falcon_h1", "mamba", "zamba2"),
    *("apertus", "granitemoehybrid", "gpt_oss", "glm_moe_dsa", "glm5_next", "gemma3", "qwen2_5_vl", "mistral3"),
)


# Files of these hold in one tensor what transformers cuts when it reads, or the other way round, in a tower or a shared
# expert: exports hold it as it is in memory.
_OTHER_NAMES = {"ernie4_5_vl_moe", "kimi_k25", "minimax_m3_vl", "nemotron_h_omni", "qianfan_ocr", "step3p7"}
# Their texts differ where prompts of several lengths are padded to one batch.
_OTHER_TEXTS = {"bigbird_pegasus", "kosmos-2.5"}
KNOWN_WRONG = _OTHER_NAMES | _OTHER_TEXTS


@pytest.mark.slow
def test_selected_families_come_through(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, FOLDER / "run_families.py", "--results", results, "--processes", "2", *SELECTED]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert finished.returncode == 0, finished.stderr[-3000:]
    said = finished.stdout.splitlines()
    failed = [line for line in said if ": passed" not in line]
    assert not failed, "\n".join(failed)
    assert len(said) == len(SELECTED)


def test_the_page_is_rendered_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import model_page
    import run_families

    results = run_families.read_results(FOLDER / "results.jsonl")
    assert {result.outcome for result in results.values()} <= {"passed", "refused", "wrong"}
    assert {family for family, result in results.items() if result.outcome == "wrong"} == KNOWN_WRONG
    page = model_page.render_page(results, version=run_families.version_in(PAGE.read_text()))
    assert page == PAGE.read_text(), "render it again: see CONTRIBUTING.md, Models"
