"""Configs that name what transformers does not know: one line when the model is read, no traceback when it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloq_export.errors import UnsupportedModelError
from cloq_export.models.source import open_model


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, "KeyError: 'linear_attention'"),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "attention"),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
        ("qwen3", {"return_dict": None}, "has no attribute 'logits'"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0"),
        ("gemma2", {"query_pre_attn_scalar": -1}, "must be float"),
        ("opt", {"num_key_value_heads": "x"}, "num_key_value_heads is 'x'"),
    ],
)
def test_a_value_that_no_model_can_compute_with_is_refused(
    tmp_path: Path, model_folder: Callable[..., Path], family: str, changes: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(model_folder(family), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=r"cannot compute with its config\.json") as raised:
        open_model(str(folder))
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_ordinary_model_is_read(model_folder: Callable[..., Path]) -> None:
    assert open_model(str(model_folder("gemma2"))).model.config.sliding_window == 5
