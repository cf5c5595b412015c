"""The export of a model of one block, with two adapters, and how it is verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from gate_subjects import SILENT, write_word_tokenizer
from served_exports import CONTEXT, SEEN, WORDS

from cloq_export.recipe import Recipe
from cloq_export.verbs.adapt import adapt
from cloq_export.verbs.export import export as write_export
from cloq_export.verbs.options import ExportOptions
from cloq_export.verbs.run import run as make_run
from cloq_export.verbs.verification.options import VerifyOptions

BITS = 2


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    write_word_tokenizer(folder, WORDS)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(3)
    drawn = (61 * torch.rand(1200, generator=generator).pow(2)).long()
    path.write_text(" ".join(f"w{int(number)}" for number in drawn))
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, float_folder: Path, text: Path) -> Path:
    run = tmp_path_factory.mktemp("faults") / "run"
    small = {"group_size": 16, "rank": 4, "samples": 4, "seqlen": 32, "precision": "float32", "eval_windows": 2}
    texts = {"calibration": str(text), "eval_text": str(text), "eval_window": 16, "error_aware": 0.0}
    recipe = Recipe.from_mapping({"model": str(float_folder), "bits": BITS, **small, **texts})
    make_run(recipe, run, console=SILENT)
    adapt(run, {"rank": 6, "adapter_name": "second", "split": "balanced"}, console=SILENT)
    write_export(run, ExportOptions(format="gptq_v2", out=run / "exports" / "e"), console=SILENT)
    return run / "exports" / "e"


@pytest.fixture
def options(float_folder: Path, text: Path) -> VerifyOptions:
    return VerifyOptions(
        str(float_folder), text=str(text), window=SEEN, windows=4, prompts=4, new_tokens=8, liveness_tokens=SEEN
    )
