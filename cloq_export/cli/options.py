"""The options that verbs share: flags made of option classes and recipes, and how what is typed becomes a recipe.

What is typed wins over the recipe file, which wins over `--demo`, which wins over the preset, which wins over the
defaults of `Recipe`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from cloq_export.errors import UsageError
from cloq_export.files.spelled_paths import expand_user, require_text, split_list
from cloq_export.recipe import (
    CHOICES,
    DEMO,
    DEMO_FINETUNE,
    DEMO_RESERVE,
    FIELDS,
    FINETUNE_CHOICES,
    FINETUNE_FIELDS,
    FINETUNE_PREFIX,
    PRESETS,
    Recipe,
    parse_override,
    parse_setting,
    read_recipe,
)


class _TypedPath(click.Path):
    """A path of the command line; a shell leaves the tilde of `--out=~/run` alone."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = expand_user(os.fsdecode(super().convert(value, param, ctx)))
        require_text(path)
        return path


PATH = _TypedPath(path_type=Path)

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Recipe fields that have an option of their own; every other one is reached by --set.
_NAMED = (
    "bits",
    "group_size",
    "symmetric",
    "method",
    "grid",
    "rank",
    "expert_rank",
    "head_bits",
    "embedding_bits",
    "budget",
    "split",
    "refine",
    "calibration",
    "experts",
    "samples",
    "seqlen",
    "seed",
    "bos",
    "device",
    "stream",
    "precision",
    "error_aware",
    "token_weighting",
    "blocks",
    "format",
    "measure",
)
_METAVARS = {
    "calibration": "TEXT|FILE|HUB_ID",
    "blocks": "PATH",
    "data": "NAME|FILE|HUB_ID",
    "eval_data": "NAME|FILE|HUB_ID",
    "name": "NAME",
    "start": "NAME|zero",
}


def recipe_option(name: str) -> Callable[[Decorated], Decorated]:
    """Return the option of one recipe field; unless it is typed its value is None."""
    metavar = "auto|cpu|cuda[:N]" if name == "device" else _METAVARS.get(name)
    off = "--asymmetric" if name == "symmetric" else None
    return _recipe_field_option(FIELDS[name], CHOICES.get(name), metavar, off)


def finetune_options(function: Decorated) -> Decorated:
    """Add an option for each field of a fine-tuning; unless it is typed its value is None."""
    for name, field in reversed(FINETUNE_FIELDS.items()):
        function = _recipe_field_option(field, FINETUNE_CHOICES.get(name), _METAVARS.get(name))(function)
    return function


def _recipe_field_option(
    field: dataclasses.Field[Any], choices: Iterable[str] | None, metavar: str | None, off: str | None = None
) -> Callable[[Decorated], Decorated]:
    flag = _flag_of(field.name)
    shown = "" if field.default == "" or field.default is False else f"  [default: {field.default}]"
    text = field.metadata["help"] + shown
    if field.type == "bool":
        return click.option(f"{flag}/{off or _flag_of(f'no_{field.name}')}", field.name, default=None, help=text)
    kind = click.Choice(list(choices)) if choices else _number_type(field) or click.STRING
    return click.option(flag, field.name, type=kind, default=None, metavar=None if choices else metavar, help=text)


def options_of(kind: type, **texts: str) -> Callable[[Decorated], Decorated]:
    """Return the options that the fields of an option class make.

    Args:
        kind: a dataclass of `verbs.options`; fields without a help text are left out.
        texts: field -> help text that is another one for this verb.
    """

    def decorate(function: Decorated) -> Decorated:
        for field in reversed(dataclasses.fields(kind)):
            if "help" in field.metadata:
                function = _field_option(field, texts.get(field.name))(function)
        return function

    return decorate


def _field_option(field: dataclasses.Field[Any], text: str | None) -> Callable[[Decorated], Decorated]:
    facts = field.metadata
    settings: dict[str, Any] = {"help": text or facts["help"], "metavar": facts.get("metavar")}
    if field.type == "bool":
        settings["is_flag"] = True
    elif "separator" in facts:
        separator = facts["separator"]
        settings |= {"default": separator.join(field.default), "show_default": True}
        settings["callback"] = lambda _, __, value: split_values(value, separator)
    elif str(field.type).startswith("tuple"):
        settings["multiple"] = True
    else:
        default = None if field.default is dataclasses.MISSING else field.default
        settings |= {"default": default, "show_default": default is not None}
        choices = [choice for rule in facts["rules"] for choice in rule.choices]
        settings["type"] = click.Choice(choices) if choices else _number_type(field)
        if str(field.type).startswith("Path"):
            settings["type"] = PATH
    return click.option(facts.get("flag", _flag_of(field.name)), field.name, **settings)


def _number_type(field: dataclasses.Field[Any]) -> click.ParamType | None:
    """Return the type of a field that is a number, and None for any other; the verb knows the limits."""
    name = str(field.type).partition(" ")[0]
    if name == "int":
        return click.INT
    return click.FLOAT if name == "float" else None


def _flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def recipe_options(function: Decorated) -> Decorated:
    """Add the model argument and every option that makes a recipe."""
    decorators = [
        click.argument("model", required=False),
        click.option(
            "--demo",
            is_flag=True,
            help="A small real model and small settings; all other options still apply.",
        ),
        *(recipe_option(name) for name in _NAMED),
        click.option("--preset", type=click.Choice(list(PRESETS)), help="Settings that belong together."),
        click.option(
            "--recipe",
            "recipe_file",
            metavar="NAME|FILE",
            help="A recipe of the package by name, a YAML or JSON file of options, or the run.json of another run.",
        ),
        set_option(),
        click.option(
            "--override",
            "overrides",
            multiple=True,
            metavar="'PATTERN:key=value,...'",
            help="Own bits, group_size, rank or skip for modules that match; first match wins; can be repeated.",
        ),
        click.option("--out", type=PATH, metavar="RUN", help="The run directory to write."),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def set_option() -> Callable[[Decorated], Decorated]:
    """Return the option `--set KEY=VALUE`."""
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any option of a recipe; can be repeated."
    )


def split_values(text: str, separator: str = ",") -> tuple[str, ...]:
    """Return the parts of a list in one word, each once; what stands behind `=` may hold the separator."""
    return tuple(dict.fromkeys(part for part in split_list(text, separator, label="=") if part))


def json_option() -> Callable[[Decorated], Decorated]:
    """Return the option `--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
    )


def read_changes(named: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    """Return what was typed, by named options and by --set.

    Raises:
        UsageError: one option was given in both ways, or twice by --set, with different values.
        RecipeError: a setting cannot be read.
    """
    changes = {name: value for name, value in named.items() if value is not None}
    for text in settings:
        name, value = parse_setting(text)
        if name in changes and changes[name] != value:
            raise UsageError(f"{name} is given twice, as {changes[name]!r} and as {value!r}; give it once.")
        changes[name] = value
    return changes


def build_recipe(options: dict[str, Any], *, finetune: bool = False) -> tuple[Recipe, Path]:
    """Return the recipe and the run directory that the options of `recipe_options` ask for.

    Args:
        options: by name.
        finetune: with --demo, its fine-tuning too.

    Raises:
        UsageError: no model, or no run directory.
        RecipeError: an option or the recipe file is wrong.
    """
    typed = read_changes({name: options[name] for name in ("model", *_NAMED)}, options["settings"])
    typed_overrides = dict(parse_override(text) for text in options["overrides"])
    from_file: dict[str, Any] = {}
    file_preset = None
    if options["recipe_file"] is not None:
        from_file, file_preset = read_recipe(options["recipe_file"])
    if finetune and not options["demo"] and not from_file.get("finetune"):
        raise UsageError(
            "--finetune alone names no data; use it with --demo, name a recipe with a finetune section, or train "
            "afterwards with: cloq finetune RUN --data NAME|FILE --name NAME"
        )
    tuned = {name: typed.pop(name) for name in list(typed) if name.startswith(FINETUNE_PREFIX)}
    demo: dict[str, Any] = DEMO if options["demo"] else {}
    if options["demo"] and finetune and not from_file.get("finetune"):
        demo = {**demo, "reserve": DEMO_RESERVE}
    mapping: dict[str, Any] = {**demo, **from_file, **typed}
    if finetune or tuned:
        section = mapping.get("finetune") or (DEMO_FINETUNE if finetune else {})
        if isinstance(section, Mapping):
            own = {name.removeprefix(FINETUNE_PREFIX): value for name, value in tuned.items()}
            mapping["finetune"] = {**section, **own}
    recipe = Recipe.from_mapping(mapping, preset=options["preset"] or file_preset or "default")
    if typed_overrides:
        # Typed patterns stand first, because the first match wins.
        kept = {pattern: own for pattern, own in recipe.overrides.items() if pattern not in typed_overrides}
        recipe = recipe.changed({"overrides": {**typed_overrides, **kept}})
    if not recipe.model:
        raise UsageError("no model was given; name a Hugging Face folder, a hub id or a GGUF file, or use --demo.")
    out = options["out"]
    if out is None:
        if recipe.model != DEMO["model"]:
            raise UsageError("no run directory was given; say where the run is written with --out RUN.")
        out = Path("runs") / f"demo-int{recipe.bits}"
    return recipe, out
