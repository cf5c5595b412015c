"""A dense model cut into experts is the same function, and with fewer chosen a real sparse one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from cloq_export.models.experts import SplitExperts
from cloq_export.models.source import open_model

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sliced_experts.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("sliced_experts", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def dense() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 3e4},
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def logits(model: Any, vocabulary: int = 96) -> torch.Tensor:
    ids = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def test_all_slices_together_are_the_dense_model(script: ModuleType, dense: Any) -> None:
    mixture = script.sliced(dense, 8)
    assert mixture.config.num_local_experts == mixture.config.num_experts_per_tok == 8
    expected = logits(dense)
    assert (logits(mixture) - expected).abs().max() <= 1e-5 * expected.std()


def test_a_fitted_router_chooses_the_slices_that_put_out_most(script: ModuleType, dense: Any) -> None:
    windows = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(3))
    mixture = script.sliced(dense, 8, 4)
    expected = logits(dense)
    blind = (logits(mixture) - expected).square().mean()
    script.fit_routers(mixture, dense, windows)
    fitted = (logits(mixture) - expected).square().mean()
    assert fitted < 0.8 * blind


@pytest.mark.slow
def test_sliced_smollm2_is_smollm2(script: ModuleType, tmp_path: Path) -> None:
    script.write_sliced("smollm2-demo", tmp_path, 8, None, "embedded")
    loaded = open_model(str(tmp_path))
    mixtures = [module for module in loaded.model.modules() if isinstance(module, SplitExperts)]
    assert [len(mixture) for mixture in mixtures] == [8] * 30
    expected = logits(open_model("smollm2-demo").model, 40000).log_softmax(-1)
    assert expected.std() > 0.5
    # Of a log-probability in float32, what the project promises.
    assert (logits(loaded.model, 40000).log_softmax(-1) - expected).abs().max() <= 1e-4
