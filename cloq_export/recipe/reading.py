"""Read recipes: from files, from those of the package by name, and from the command line's texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cloq_export.errors import RecipeError
from cloq_export.recipe.checks import joined_names, near, parse_value, recipe_error
from cloq_export.recipe.finetune import FINETUNE_PREFIX, parse_finetune_setting
from cloq_export.recipe.options import FIELDS, OVERRIDE_KEYS, Recipe, override_faults, parse_option
from cloq_export.recipe.presets import PRESETS, magr_options

_NAMED = Path(__file__).with_name("named")
_PAPER = "paper"


def load_recipe(path: str | Path) -> Recipe:
    """Return the recipe of a YAML or JSON file, or of a run's `run.json`.

    Raises:
        RecipeError: the file cannot be read, is not a mapping, or names bad options.
    """
    mapping, preset = read_recipe_file(path)
    try:
        return Recipe.from_mapping(mapping, preset=preset or "default")
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def read_recipe_file(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """Return the options that a recipe file names, unchecked, and the preset that it names, if any.

    Raises:
        RecipeError: the file cannot be read or is not a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            f"the recipe file {path} cannot be read: {reason}. Give the path of a YAML or JSON file."
        ) from None
    try:
        content = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "nested too deeply"
        raise RecipeError(
            f"the recipe file {path} is not valid YAML{where}: {problem}. Patterns that begin with * need quotes."
        ) from None
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]  # a run.json: its recipe is what the run really used
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError(
            f"the recipe file {path} holds a {type(content).__name__}; it must hold lines of the form `option: value`."
        )
    preset = content.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise RecipeError(f"the recipe file {path} gives preset {preset!r}; allowed are {joined_names(PRESETS)}.")
    return content, preset


def read_recipe(name: str) -> tuple[dict[str, Any], str | None]:
    """Return the options of a recipe of the package, or of a recipe file, and the preset that it names, if any.

    Args:
        name: as `named_recipes` lists them, or the path of a file; a file of that name comes first.

    Raises:
        RecipeError: there is neither, or the file cannot be read.
    """
    if Path(name).is_file() or Path(name).suffix or "/" in name:
        return read_recipe_file(name)
    known = named_recipes()
    if name not in known:
        raise RecipeError(
            f"there is no recipe {name!r}{near(name, known)}, and no file of that name; docs/finetune.md lists those "
            "of the package."
        )
    content = dict(known[name])
    preset = content.pop("preset", None)
    return content, preset


@functools.cache
def named_recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of the package: those of the paper's tables, and small ones, by name."""
    recipes: dict[str, dict[str, Any]] = {}
    for path in sorted(_NAMED.glob("*.yaml")):
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
        if path.stem == _PAPER:
            recipes |= dict(_paper_recipes(content))
        else:
            recipes[path.stem] = content
    return recipes


def _paper_recipes(tables: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for group, tasks in tables["learning_rates"].items():
        for task, models in tasks.items():
            for model, rates in models.items():
                for bits, rate in rates.items():
                    section = {**tables["tasks"][task], "name": task, "learning_rate": rate}
                    grid = {"bits": int(bits), "group_size": tables["groups"][group]}
                    base = {**tables["recipe"], **magr_options(**grid), **grid, "model": tables["models"][model]}
                    if section["data"] == base["calibration"]:
                        # What the training holds out at the end of that text, and a sequence that may not be full.
                        base["reserve"] = (section["eval_samples"] + 1) * section["seqlen"]
                    yield f"{_PAPER}-{model}-{task}-int{bits}-{group}", {**base, "finetune": section}


def parse_setting(text: str) -> tuple[str, Any]:
    """Return (name, value) of a `KEY=VALUE` text, the value in the type of that option.

    `finetune.KEY=VALUE` sets an option of the fine-tuning; its name is returned with the prefix.

    Raises:
        RecipeError: no `=`, an unknown name, or a value that cannot be read in that type.
    """
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals:
        raise RecipeError(f"{text!r} is not a setting; write KEY=VALUE, for example damping=0.02.")
    if name.startswith(FINETUNE_PREFIX):
        return name, parse_finetune_setting(name.removeprefix(FINETUNE_PREFIX), value.strip())
    if name not in FIELDS:
        raise RecipeError(f"{name!r} is not an option of a recipe{near(name, FIELDS)}; see docs/recipes.md for all.")
    if name == "finetune":
        raise RecipeError("finetune cannot be given as KEY=VALUE; set its options, e.g. finetune.learning_rate=1e-4.")
    if name == "overrides":
        raise RecipeError("overrides cannot be given as KEY=VALUE; use `overrides='PATTERN:key=value,...'`.")
    return name, parse_option(name, value.strip())


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """Return (pattern, settings) of a `PATTERN:key=value,...` text; `PATTERN:skip` leaves modules in float.

    Raises:
        RecipeError: the text has another form, or a setting is unknown or not allowed.
    """
    pattern, colon, given = text.rpartition(":")
    if not colon or not pattern.strip() or not given.strip():
        raise RecipeError(f"{text!r} is not an override; write 'PATTERN:key=value,...', e.g. '*.down_proj:bits=4'.")
    settings: dict[str, Any] = {}
    for item in given.split(","):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key not in OVERRIDE_KEYS:
            raise RecipeError(
                f"override {text!r}: {key!r} is unknown{near(key, OVERRIDE_KEYS)}; allowed are "
                f"{joined_names(OVERRIDE_KEYS)}."
            )
        if key == "skip":
            settings[key] = parse_value(key, "bool", value.strip()) if equals else True
        else:
            settings[key] = parse_value(key, "int", value.strip())
    pattern = pattern.strip()
    faults = override_faults(pattern, settings)
    if faults:
        raise recipe_error(faults)
    return pattern, settings


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a name given twice."""


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


def _mapping_without_repeats(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
    return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}


_RecipeLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)
