"""The table of what engines read: well formed, in sync with its page, and named as people type it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from cloq_export.errors import UsageError
from cloq_export.formats.targets import page as targets_page
from cloq_export.formats.targets.page import table_markdown
from cloq_export.formats.targets.table import DEVICES, Target, parse_target, read_table

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"


# The table.


def test_every_rule_is_complete() -> None:
    table = read_table()
    for rule in table.rules:
        engine = table.engines[rule.target]
        assert rule.source
        assert rule.kernel
        assert rule.versions
        assert set(rule.versions) <= set(engine.versions)
        assert set(rule.versions.values()) <= {"run", "read"}
        assert set(rule.layouts) <= set(engine.layouts)
        assert set(rule.devices) <= set(DEVICES)
        assert rule.provider in ("stock", "cloq_plugin")
        assert rule.own_grids in ("parts", "all", "unfused", "none")
        assert set(rule.bits or ()) <= {2, 3, 4, 8}
        assert rule.symmetric
        assert all(type(value) is bool for value in rule.symmetric)
        assert rule.snippet in table.snippets
        assert "://" not in rule.source


def test_every_engine_is_complete() -> None:
    table = read_table()
    for engine in table.engines.values():
        assert engine.adapters.source
        assert set(engine.adapters.versions) == set(engine.versions)
        for layout, version in itertools.product(engine.layouts, engine.versions):
            rules = [rule for rule in table.rules if rule.target == engine.name and layout in rule.layouts]
            assert any(version in rule.versions for rule in rules), (layout, version)


def test_nothing_on_cuda_is_claimed_to_have_run() -> None:
    # No machine with a GPU has run any of this yet; the line that changes that changes this test.
    for rule in read_table().rules:
        if "cuda" in rule.devices:
            assert "run" not in rule.versions.values()


def test_page_is_in_sync() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table_markdown() in page, "render it again: python -m cloq_export.formats.targets --into docs/targets.md"


def test_render_into_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- targets table: begin -->\nwhat stood here\n<!-- targets table: end -->\nafter\n")
    targets_page.main(["--into", str(page)])
    once = page.read_text()
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "what stood here" not in once
    assert table_markdown() in once
    targets_page.main(["--into", str(page)])
    assert page.read_text() == once


def test_render_refuses_a_page_without_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(UsageError, match=r"page\.md lacks the lines <!-- targets table: begin -->"):
        targets_page.render_into(page)


def test_module_needs_no_torch() -> None:
    code = "import sys, cloq_export.formats.targets.page as t; t.table_markdown(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Targets.


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("vllm==0.32", Target("vllm", "0.32")),
        ("vllm==0.33.1", Target("vllm", "0.33")),
        ("vLLM==0.32.0+cpu", Target("vllm", "0.32")),
        ("vllm==0.33.0rc2", Target("vllm", "0.33")),
        (" transformers ", Target("transformers")),
        ("transformers==5.19.0", Target("transformers", "5.19")),
        ("gptqmodel==7.3.2", Target("gptqmodel", "7.3")),
        ("sglang==0.5.23", Target("sglang", "0.5.23")),
        ("vllm==1.0", Target("vllm", "0.33", asked="1.0")),
        ("vllm==0.34.0rc1", Target("vllm", "0.33", asked="0.34.0")),
        ("gptqmodel==7.5.0", Target("gptqmodel", "7.3", asked="7.5.0")),
        ("transformers==6", Target("transformers", "5.24", asked="6")),
    ],
)
def test_parse_target(text: str, target: Target) -> None:
    assert parse_target(text) == target


def test_targets_read_as_they_are_written() -> None:
    assert str(parse_target("vllm==0.32.0")) == "vllm==0.32"
    assert str(parse_target("vllm")) == "vllm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vlm==0.32", r"target 'vlm==0\.32' is unknown; .* of: vllm \(0\.32 to 0\.33\), .* Did you mean vllm==0\.32\?"),
        ("vllm=0.33", r"target 'vllm=0\.33' is unknown; .* Did you mean vllm==0\.33\?"),
        ("vllm>=0.32", r"target 'vllm>=0\.32' is unknown; give a name or NAME==VERSION"),
        ("", r"target '' is unknown; give a name"),
        ("vllm==0.31", r"what vllm 0\.31 reads is not known; known are 0\.32, 0\.33\. .* `target=vllm==0\.32`\."),
        ("vllm==0", r"what vllm 0 reads is not known"),
        ("transformers==4.57.1", r"what transformers 4\.57\.1 reads is not known; .* `target=transformers==5\.19`\."),
        ("sglang==0.5.22", r"what sglang 0\.5\.22 reads is not known; .* `target=sglang==0\.5\.23`\."),
    ],
)
def test_unknown_target(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_target(text)
