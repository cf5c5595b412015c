"""`verify` on bases that are not ours, served by vLLM: a float model and a GPTQ checkpoint of another tool."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console

from cloq_export.verbs.verification.applied import AppliedReport, verify_applied
from cloq_export.verbs.verification.options import VerifyOptions

pytestmark = pytest.mark.slow

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = torch.Generator().manual_seed(5)
    words = " ".join(f"w{int(number)}" for number in torch.randint(93, (600,), generator=generator))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words)
    return str(path)


def ask(base: pathlib.Path, adapters: dict[str, pathlib.Path], text: str, python: str) -> AppliedReport:
    options = VerifyOptions(
        runtime="vllm",
        adapters=tuple(f"{name}={folder}" for name, folder in adapters.items()),
        text=text,
        window=48,
        windows=3,
        liveness_tokens=48,
        python=pathlib.Path(python),
    )
    return verify_applied(str(base), options, console=Console(quiet=True))


def check_all(report: AppliedReport, adapters: int) -> None:
    assert report.passed, report.missed()
    assert len(report.checks) == 3 * adapters + 1
    assert all(check.passed for check in report.checks)
    assert all(row.live_share == 1.0 for row in report.liveness)


def test_a_float_model(tmp_path: pathlib.Path, export: Any, text: str, engine_python: str) -> None:
    config = transformers.LlamaConfig.from_pretrained(export.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    for name in TOKENIZER:
        shutil.copy(export.folder / name, tmp_path / "base" / name)
    folders = {}
    for name, rank in (("one", 4), ("two", 8)):
        made = peft.get_peft_model(
            transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            peft.LoraConfig(r=rank, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]),
        )
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if ".lora_B." in key:
                    parameter.normal_(std=0.2)
        made.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    check_all(ask(tmp_path / "base", folders, text, engine_python), 2)


def test_a_checkpoint_of_another_tool(tmp_path: pathlib.Path, export: Any, text: str, engine_python: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(export.folder, base, ignore=shutil.ignore_patterns("adapters", "cloq_*"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"].pop("cloq")
    (base / "config.json").write_text(json.dumps(config))
    check_all(ask(base, dict(export.adapters), text, engine_python), 2)
