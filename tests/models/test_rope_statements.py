"""Configs that say two things about rotary embeddings are refused, and those that say one thing twice are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cloq_export.errors import FormatError
from cloq_export.models.rope_statements import refuse_two_ropes

PLAIN = {"rope_theta": 1000.0, "rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
NESTED = {"full_attention": PLAIN, "sliding_attention": {"rope_theta": 10.0, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": YARN}, "rope_scaling"),
        ({"rope_parameters": PLAIN, "rope_scaling": YARN, "rope_theta": 1000.0}, "rope_scaling"),
        # transformers would take the class's default for the base.
        ({"rope_parameters": {**YARN, "rope_theta": 1000.0}, "rope_scaling": YARN}, "rope_scaling"),
        ({"rope_parameters": PLAIN, "rope_theta": 500000.0}, "rope_theta"),
        ({"rope_parameters": NESTED, "rope_theta": 7.0}, "rope_theta"),
        ({"rope_parameters": NESTED, "rope_scaling": YARN}, "rope_scaling"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_two_ropes_are_refused_by_name(config: dict[str, Any], word: str, inside: bool) -> None:
    whole = {"text_config": config} if inside else config
    with pytest.raises(FormatError, match=rf"config.json says {word} = .* Write all of it into rope_parameters"):
        refuse_two_ropes(whole, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5.0, "rope_scaling": YARN},
        {"rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_theta": 1000, "rope_scaling": None},
        {"rope_parameters": {**YARN, "rope_theta": 5.0}, "rope_theta": 5.0, "rope_scaling": YARN},
        {
            "rope_parameters": {**YARN, "rope_theta": 5.0},
            "rope_scaling": {"type": "yarn", **{key: YARN[key] for key in list(YARN)[1:]}, "rope_theta": 5.0},
        },
        {"rope_parameters": NESTED, "rope_theta": 1000.0},
        {"rope_parameters": None, "rope_scaling": YARN},
    ],
)
def test_one_rope_said_twice_is_read(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    refuse_two_ropes(config, "config.json")
    assert config == before
