"""Options of a fine-tuning, and the recipes and presets of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloq_export.errors import RecipeError
from cloq_export.recipe import (
    DEMO_FINETUNE,
    FINETUNE_FIELDS,
    FineTuneRecipe,
    Recipe,
    named_recipes,
    parse_setting,
    read_recipe,
)


def test_options_of_a_fine_tuning_are_checked_and_kept():
    recipe = Recipe.from_mapping({"finetune": {"data": "gsm8k", "learning_rate": 1}})
    assert recipe.to_mapping()["finetune"] == {"data": "gsm8k", "learning_rate": 1}
    assert FineTuneRecipe.from_mapping(recipe.finetune).learning_rate == 1.0
    assert recipe.difference(Recipe()) == []  # the codes do not depend on it
    with pytest.raises(
        RecipeError, match=r"finetune: 'epoch' is not an option of a fine-tuning .did you mean 'epochs'"
    ):
        Recipe.from_mapping({"finetune": {"epoch": 3}})
    with pytest.raises(RecipeError, match=r"2 faults: \(1\) finetune: warmup is 2; .*learning_rate is 0; it must be"):
        Recipe.from_mapping({"finetune": {"warmup": 2, "learning_rate": 0}})
    assert parse_setting("finetune.learning-rate=1e-4") == ("finetune.learning_rate", 1e-4)
    with pytest.raises(RecipeError, match="'rate' is not an option of a fine-tuning"):
        parse_setting("finetune.rate=1")
    assert FineTuneRecipe.from_mapping(DEMO_FINETUNE).steps > 0


def test_every_fine_tuning_option_is_explained_in_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "finetune.md").read_text(encoding="utf-8")
    assert [name for name in FINETUNE_FIELDS if f"`{name}`" not in text] == []


def test_the_recipes_of_the_package_are_valid():
    recipes = named_recipes()
    for name in recipes:
        options, preset = read_recipe(name)
        recipe = Recipe.from_mapping(options, preset=preset or "default")
        assert FineTuneRecipe.from_mapping(recipe.finetune).data, name
        # Of groups MagR's authors have another alpha than the preset.
        expected = "paper" if name.endswith("channel") else "custom" if name.startswith("paper") else "default"
        assert recipe.preset_name == expected
    with pytest.raises(RecipeError, match=r"there is no recipe 'small-wikitext' .did you mean 'small-wikitext2'"):
        read_recipe("small-wikitext")


@pytest.mark.parametrize(
    ("name", "bits", "group", "rate", "batch", "epochs"),
    [  # one cell of each column of Table 9 and each group of Table 10
        ("paper-7b-wikitext2-int2-g64", 2, 64, 6e-4, 64, 3),
        ("paper-13b-gsm8k-int3-g128", 3, 128, 5e-4, 32, 6),
        ("paper-7b-math10k-int3-channel", 3, -1, 8e-4, 16, 3),
        ("paper-13b-commonsense170k-int4-g64", 4, 64, 5e-5, 16, 3),
        # Tables 2 and 4, of which the paper gives no rates.
        ("paper-llama3-8b-wikitext2-int2-g64", 2, 64, 6e-4, 64, 3),
        ("paper-llama3-8b-math10k-int2-g64", 2, 64, 4e-4, 16, 3),
        ("paper-mistral-7b-gsm8k-int2-g64", 2, 64, 3e-4, 32, 6),
    ],
)
def test_recipes_of_the_papers_tables(name, bits, group, rate, batch, epochs):
    options, preset = read_recipe(name)
    recipe = Recipe.from_mapping(options, preset=preset)
    tuning = FineTuneRecipe.from_mapping(recipe.finetune)
    assert (recipe.bits, recipe.group_size, recipe.rank) == (bits, group, 64)
    assert (tuning.learning_rate, tuning.epochs) == (rate, epochs)
    assert tuning.batch_size * tuning.gradient_accumulation == batch
    # The metric of papers, on the split of its tables; what chooses the epoch is held out of what is learned.
    assert (recipe.eval_text, recipe.eval_window, recipe.bos) == ("wikitext2-raw:validation", 2048, "never")
    assert (recipe.calibration, recipe.samples, recipe.seqlen) == ("wikitext2-raw:train", 128, 2048)
    assert tuning.eval_data == ""
    assert recipe.reserve == (65 * 1024 if tuning.name == "wikitext2" else 0)
    assert (tuning.weight_decay, tuning.schedule, tuning.warmup, tuning.seqlen) == {
        "wikitext2": (0.1, "cosine", 0.03, 1024),
        "gsm8k": (0.1, "cosine", 0.03, 512),
        "math10k": (1.0, "linear", 0.1, 512),
        "commonsense170k": (1.0, "linear", 0.1, 512),
    }[tuning.name]


@pytest.mark.parametrize(
    ("bits", "group", "alpha", "shrink", "sweeps"),
    [(2, -1, 1e-3, 0.8, 30), (3, -1, 1e-3, 0.9, 30), (4, -1, 1e-3, 1.0, 30), (2, 64, 1e-3, 1.0, 0)],
)
def test_the_papers_preset_runs_magr_on_whole_channels_as_its_authors_do(bits, group, alpha, shrink, sweeps):
    recipe = Recipe.from_mapping({"bits": bits, "group_size": group}, preset="paper")
    assert (recipe.magr_alpha, recipe.range_shrink, recipe.sweeps) == (alpha, shrink, sweeps)
    assert recipe.preset_name == "paper"
    # What is typed wins, and a recipe that is read back is the same.
    assert Recipe.from_mapping({"group_size": -1, "range_shrink": 0.7}, preset="paper").range_shrink == 0.7
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe


@pytest.mark.parametrize(
    ("name", "alpha", "shrink", "sweeps"),
    [
        ("paper-7b-gsm8k-int2-channel", 1e-3, 0.8, 30),
        ("paper-7b-gsm8k-int3-channel", 1e-3, 0.9, 30),
        ("paper-7b-gsm8k-int2-g128", 1e-4, 0.95, 0),
        ("paper-7b-gsm8k-int2-g64", 1e-4, 1.0, 0),
        ("paper-7b-gsm8k-int4-g64", 1e-4, 1.0, 0),
    ],
)
def test_recipes_of_the_paper_run_magr_as_its_authors_do(name, alpha, shrink, sweeps):
    options, preset = read_recipe(name)
    recipe = Recipe.from_mapping(options, preset=preset)
    assert (recipe.method, recipe.grid) == ("magr", "minmax")
    assert (recipe.magr_alpha, recipe.range_shrink, recipe.sweeps) == (alpha, shrink, sweeps)


@pytest.mark.parametrize("value", [0, -0.5, 1.01])
def test_a_range_is_shrunk_by_a_share(value):
    with pytest.raises(RecipeError, match=r"range_shrink is .*; it must be above 0 and at most 1"):
        Recipe.from_mapping({"range_shrink": value})
