"""The recipe: what it allows, what it says otherwise, and that it survives files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq_export import types
from cloq_export.errors import RecipeError
from cloq_export.recipe import (
    CHOICES,
    DEMO,
    FIELDS,
    PRESETS,
    SUPPORTED_BITS,
    Recipe,
    load_recipe,
    parse_override,
    parse_setting,
    register_choice,
    registered_choice,
)


def test_bits_and_splits_are_those_of_the_types():
    assert SUPPORTED_BITS == types.SUPPORTED_BITS
    assert CHOICES["split"] == types.Split.__args__


def test_every_option_has_a_sentence_of_help():
    assert [name for name, field in FIELDS.items() if not field.metadata["help"].endswith(".")] == []


def test_a_registered_choice_is_allowed_and_found(monkeypatch):
    monkeypatch.setitem(CHOICES, "grid", CHOICES["grid"])
    with pytest.raises(RecipeError, match="grid is 'flat'; allowed are searched, minmax"):
        Recipe(grid="flat")
    register_choice("grid", "flat", "math:inf")
    assert Recipe(grid="flat").grid == "flat"
    assert registered_choice("grid", "flat") == float("inf")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_recipe_that_knows_its_name(preset):
    assert Recipe.from_mapping({}, preset=preset).preset_name == preset


def test_a_changed_preset_is_custom():
    assert Recipe.from_mapping({"error_aware": 0.125}, preset="paper").preset_name == "custom"
    assert Recipe.from_mapping({"bits": 2}, preset="paper").preset_name == "paper"


def test_demo_settings_are_valid():
    assert Recipe.from_mapping(DEMO).bits == 2


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"bits": 5}, "bits is 5; allowed are 2, 3, 4 and 8."),
        ({"bits": True}, "bits is True; a whole number is needed."),
        ({"bits": 4.0}, "bits is 4.0; a whole number is needed."),
        ({"group_size": 12}, "group_size is 12; allowed are -1 (one group per output channel) or a multiple of 8"),
        ({"group_size": 0}, "group_size is 0;"),
        ({"symmetric": "yes"}, "symmetric is 'yes'; true or false is needed."),
        ({"method": "gptq"}, "method is 'gptq'; allowed are optq, magr, rtn"),
        ({"split": "ballanced"}, "did you mean 'balanced'?"),
        ({"damping": float("nan")}, "damping is nan; a number is needed."),
        ({"damping": -0.1}, "damping is -0.1; it must be between 0 and 1."),
        ({"error_aware": 1.5}, "error_aware is 1.5; it must be between 0 and 1."),
        ({"samples": 0}, "samples is 0; it must be at least 1."),
        ({"seed": -1}, "seed is -1; it must be at least 0."),
        ({"device": "gpu"}, "device is 'gpu'; allowed are auto, cpu, cuda, cuda:N"),
        ({"blocks": "model..layers"}, "a dotted module path is needed"),
        ({"adapter_name": "../x"}, "adapter_name is '../x'; letters, digits"),
        ({"adapter_name": ".."}, "adapter_name is '..'; letters, digits"),
        ({"max_shard_size": "huge"}, "a size is needed, for example 500MB or 5GB."),
        ({"max_shard_size": "0GB"}, "a size is needed"),
        ({"calibration": " "}, "give wikitext2, gsm8k, embedded, a file or a hub id"),
        ({"model": 7}, "model is 7; a text is needed."),
        ({"bitz": 4}, "'bitz' is not an option of a recipe (did you mean 'bits'?)."),
        ({"overrides": 3}, "overrides is 3; a mapping of module patterns to settings is needed."),
        ({"overrides": {"*.q": {}}}, "override '*.q': settings are needed, out of bits, group_size, rank, skip."),
        ({"overrides": {"*.q": {"bit": 4}}}, "override '*.q': 'bit' is unknown (did you mean 'bits'?)"),
        ({"overrides": {"*.q": {"bits": 7}}}, "override '*.q': bits is 7; allowed are 2, 3, 4 and 8."),
        ({"overrides": {"*.q": {"skip": 1}}}, "override '*.q': skip is 1; true or false is needed."),
        ({"overrides": [{"bits": 4}]}, "an entry of a list needs `pattern` beside its settings."),
        ({"overrides": [{"pattern": "a", "bits": 4}] * 2}, "overrides gives the pattern 'a' twice."),
    ],
)
def test_a_fault_is_named_in_one_line(mapping, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_mapping(mapping)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_faults_are_reported_at_once():
    with pytest.raises(RecipeError, match=r"^3 faults: \(1\) 'bitz' .*; \(2\) rank is -1; .*; \(3\) grid is 'x'; "):
        Recipe.from_mapping({"bitz": 2, "rank": -1, "grid": "x"})


def test_an_unknown_preset_is_refused():
    with pytest.raises(
        RecipeError, match=r"preset 'papper' is unknown \(did you mean 'paper'\?\); allowed are default"
    ):
        Recipe.from_mapping({}, preset="papper")


def test_direct_construction_is_checked_too():
    with pytest.raises(RecipeError, match="rank is -3; it must be at least 0"):
        Recipe(rank=-3)


def test_a_recipe_is_frozen_also_in_its_overrides():
    given_overrides = {"*.q_proj": {"bits": 8}}
    recipe = Recipe(overrides=given_overrides)
    given_overrides["*.q_proj"]["bits"] = 2
    recipe.override_for("model.q_proj")["bits"] = 3
    assert recipe.override_for("model.q_proj") == {"bits": 8}
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.bits = 2
    assert isinstance(hash(recipe), int)


def test_the_first_matching_override_wins_and_its_order_survives_sorted_json():
    overrides = {"*.9.*": {"bits": 8}, "*.down_proj": {"rank": 8}, "*": {"skip": True}}
    recipe = Recipe(overrides=overrides)
    again = Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping(), sort_keys=True)))
    for candidate in (recipe, again):
        assert candidate.override_for("layers.9.down_proj") == {"bits": 8}
        assert candidate.override_for("layers.1.down_proj") == {"rank": 8}
        assert candidate.override_for("layers.1.up_proj") == {"skip": True}
    assert again == recipe
    assert list(again.overrides) == list(overrides)
    assert Recipe().override_for("anything") == {}


def test_difference_says_what_the_run_has_and_what_is_asked():
    run = Recipe(model="m", bits=2, overrides={"*.q": {"bits": 8}})
    asked = Recipe(model="m", bits=3)
    assert run.difference(asked) == [
        "bits: 2 in the run, 3 asked",
        'overrides: [{"pattern": "*.q", "bits": 8}] in the run, [] asked',
    ]
    assert run.difference(run) == []


def test_options_that_do_not_change_the_bytes_are_no_difference():
    assert Recipe().difference(Recipe(eval_windows=3, max_shard_size="1GB", format="gptq", eval_text="embedded")) == []


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("4096", 4096), ("7kb", 7000)]
)
def test_shard_sizes(size, count):
    assert Recipe(max_shard_size=size).max_shard_bytes == count


def test_a_yaml_file_with_a_preset(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text('preset: paper\nbits: 3\nmagr_alpha: 2e-3\nrank: 16\noverrides:\n  "*.down_proj": {bits: 4}\n')
    recipe = load_recipe(path)
    assert (recipe.method, recipe.bits, recipe.magr_alpha, recipe.rank) == ("magr", 3, 0.002, 16)
    assert recipe.override_for("x.down_proj") == {"bits": 4}


def test_whole_numbers_are_numbers(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("error_aware: 1\ndamping: 1e-2\n")
    recipe = load_recipe(path)
    assert isinstance(recipe.error_aware, float)
    assert recipe.damping == 0.01


def test_a_json_file_and_a_run_json(tmp_path: Path):
    recipe = Recipe(model="m", bits=2, overrides={"*.q": {"skip": True}})
    for name, content in (("recipe.json", recipe.to_mapping()), ("run.json", {"recipe": recipe.to_mapping()})):
        (tmp_path / name).write_text(json.dumps(content))
        assert load_recipe(tmp_path / name) == recipe


def test_an_empty_file_is_the_default_recipe(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bits: 3\nbits: 4\n", "'bits' is given twice"),
        ("overrides:\n  *.q: {bits: 3}\n", "Patterns that begin with * need quotes."),
        ("- bits\n", "holds a list; it must hold lines of the form `option: value`."),
        ("bits: [\n", "is not valid YAML at line"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("preset: 3\n", "gives preset 3; allowed are default, paper"),
        ("bits: 3\nrnak: 2\n", "recipe.yaml: 'rnak' is not an option of a recipe (did you mean 'rank'?)."),
        ("7: 3\n", "'7' is not an option of a recipe"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="it is not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 20000)
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_recipe(tmp_path / "deep.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bits=3", ("bits", 3)),
        ("group-size=-1", ("group_size", -1)),
        ("damping=1e-2", ("damping", 0.01)),
        ("refit=true", ("refit", True)),
        ("refit = no", ("refit", False)),
        ("model=1234", ("model", "1234")),
        ("calibration=a=b", ("calibration", "a=b")),
    ],
)
def test_settings_take_the_type_of_their_option(text, expected):
    name, value = parse_setting(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits", "'bits' is not a setting; write KEY=VALUE"),
        ("bitts=3", r"'bitts' is not an option of a recipe \(did you mean 'bits'\?\)"),
        ("bits=three", "bits is 'three'; a whole number is needed"),
        ("damping=x", "damping is 'x'; a number is needed"),
        ("refit=maybe", "refit is 'maybe'; allowed are true and false"),
        ("overrides={}", "use `overrides="),
    ],
)
def test_bad_settings(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_setting(text)


def test_overrides_from_text():
    assert parse_override("*.down_proj:bits=4,group-size=32") == ("*.down_proj", {"bits": 4, "group_size": 32})
    assert parse_override("model.layers.0.*:skip") == ("model.layers.0.*", {"skip": True})
    assert parse_override("a:skip=false,rank=0") == ("a", {"skip": False, "rank": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.down_proj", "is not an override; write 'PATTERN:key=value,...'"),
        (":bits=4", "is not an override"),
        ("*.q:", "is not an override"),
        ("*.q:bots=4", r"'bots' is unknown \(did you mean 'bits'\?\)"),
        ("*.q:bits", "bits is ''; a whole number is needed"),
        ("*.q:bits=9", "bits is 9; allowed are 2, 3, 4 and 8"),
    ],
)
def test_bad_overrides(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_override(text)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "bits": st.sampled_from(SUPPORTED_BITS),
            "group_size": st.sampled_from([-1, 32, 64, 128]),
            "rank": st.integers(0, 512),
            "error_aware": st.floats(0, 1),
            "symmetric": st.booleans(),
            "split": st.sampled_from(CHOICES["split"]),
            "seed": st.integers(0, 2**63 - 1),
            "overrides": st.dictionaries(
                st.text(min_size=1).filter(str.strip),
                st.fixed_dictionaries({"bits": st.sampled_from(SUPPORTED_BITS)}, optional={"skip": st.booleans()}),
                max_size=3,
            ),
        },
    )
)
def test_a_mapping_comes_back_from_json(mapping):
    recipe = Recipe.from_mapping(mapping)
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping(), sort_keys=True))) == recipe


def test_every_option_is_explained_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"`{name}`" not in text] == []
