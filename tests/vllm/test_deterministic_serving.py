"""A deterministic engine of vLLM gives a request the same bits alone and in any batch, prompt and new tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.engines.vllm.options import EngineSettings, engine_options
from cloq_export.engines.vllm.plan import DETERMINISTIC_ENVIRONMENT
from cloq_export.types import QuantSpec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("only_on_cpu")]

GENERATOR = torch.Generator().manual_seed(3)
LENGTHS = (12, 5, 90, 2, 17, 1, 33, 7, 140, 9)
ADAPTERS = [None, "one", "two", None, "two", "one", None, "one", "one", "two"]
REQUESTS = [
    (torch.randint(96, (length,), generator=GENERATOR).tolist(), name)
    for length, name in zip(LENGTHS, ADAPTERS, strict=True)
]


@pytest.fixture(scope="module")
def answers(write_export: Callable[..., Any], probe: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function from variables of the environment to answers in batches of several kinds."""
    export = write_export(QuantSpec(bits=2, group_size=32), overrides={"down_proj": None})
    options = engine_options(
        Checkpoint.open(export.folder), export.adapters, EngineSettings(max_model_len=256), kv_cache_gib=1
    )
    options |= {"enforce_eager": True, "skip_tokenizer_init": True, "enable_prefix_caching": False, "dtype": "float32"}
    # A prompt is then read in several pieces, with others' tokens in between.
    options |= {"max_num_batched_tokens": 256}
    folders = {name: str(folder) for name, folder in export.adapters.items()}
    common = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }

    def ask(**environment: str) -> Any:
        asked = map(json.dumps, (options, folders, REQUESTS))
        return probe("deterministic.py", *asked, **common, **environment)

    return ask


def differing(answers: Any) -> list[str]:
    """Return which requests have other bits in a batch than alone."""
    return [
        f"{batch}: {number}"
        for batch, found in answers.items()
        for number, scores in found.items()
        if scores != answers["alone"][number]
    ]


def test_requests_alone_and_together(answers: Callable[..., Any]) -> None:
    assert not differing(answers(**DETERMINISTIC_ENVIRONMENT))


def test_without_it_the_bits_depend_on_the_batch(answers: Callable[..., Any]) -> None:
    """What the test above would not see if all batches were computed alike."""
    assert differing(answers())
