"""The options that verbs share, and how they become a recipe.

What is typed wins over the recipe file, which wins over `--demo`, which wins over the preset, which wins over the
defaults of `Recipe`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from cloq_export.errors import UsageError
from cloq_export.files.spelled_paths import expand_user, require_text, split_list
from cloq_export.recipe import (
    CHOICES,
    DEMO,
    DEMO_FINETUNE,
    EXPORT_FORMATS,
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
    "budget",
    "split",
    "refine",
    "calibration",
    "samples",
    "seqlen",
    "seed",
    "bos",
    "device",
    "precision",
    "error_aware",
    "token_weighting",
    "blocks",
    "format",
)
_METAVARS = {
    "calibration": "TEXT|FILE|HUB_ID",
    "blocks": "PATH",
    "device": "auto|cpu|cuda[:N]",
    "data": "NAME|FILE|HUB_ID",
    "eval_data": "NAME|FILE|HUB_ID",
    "name": "NAME",
    "start": "NAME|zero",
}
_NUMBERS = {"int": click.INT, "float": click.FLOAT}


def recipe_option(name: str) -> Callable[[Decorated], Decorated]:
    """Return the click option of one recipe field; unless it is typed its value is None."""
    field = FIELDS[name]
    flag = "--" + name.replace("_", "-")
    shown = f"  [default: {field.default}]" if field.default != "" else ""
    if field.type == "bool":
        flag += "/--asymmetric" if name == "symmetric" else f"/--no-{name.replace('_', '-')}"
        return click.option(flag, name, default=None, help=field.metadata["help"])
    kind: Any = click.Choice(CHOICES[name]) if name in CHOICES else _NUMBERS.get(str(field.type), click.STRING)
    return click.option(
        flag, name, type=kind, default=None, metavar=_METAVARS.get(name), help=field.metadata["help"] + shown
    )


def recipe_options(function: Decorated) -> Decorated:
    """Add the model argument and every option that makes a recipe."""
    decorators = [
        click.argument("model", required=False),
        click.option(
            "--demo",
            is_flag=True,
            help="A small real model and small settings; every other option still applies beside it.",
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


def finetune_options(function: Decorated) -> Decorated:
    """Add an option for each field of a fine-tuning; unless it is typed its value is None."""
    for name, field in reversed(FINETUNE_FIELDS.items()):
        shown = "" if field.default in ("", False) else f"  [default: {field.default}]"
        text = field.metadata["help"] + shown
        flag = "--" + name.replace("_", "-")
        if field.type == "bool":
            option = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
        else:
            kind: Any = _NUMBERS.get(str(field.type), click.STRING)
            if name in FINETUNE_CHOICES:
                kind = click.Choice(FINETUNE_CHOICES[name])
            metavar = None if name in FINETUNE_CHOICES else _METAVARS.get(name)
            option = click.option(flag, name, type=kind, default=None, metavar=metavar, help=text)
        function = option(function)
    return function


def export_options(place: str) -> Callable[[Decorated], Decorated]:
    """Return the options that say what an export is; `place` tells where it goes unless --out is given."""
    decorators = [
        click.option(
            "--format",
            type=click.Choice(EXPORT_FORMATS),
            help="A layout, merged (plain 16-bit weights), onnx, or adapters alone (peft, onnx-adapter); unless given, "
            "the target's best, or the layout of the source.",
        ),
        click.option(
            "--target",
            metavar="ENGINE[==VERSION]",
            help="Check that this engine can read the export, e.g. vllm==0.33, transformers, gptqmodel, sglang.",
        ),
        click.option(
            "--device", type=click.Choice(["any", "cpu", "cuda"]), default="any", help="Where the target runs."
        ),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            metavar="NAME|FOLDER",
            help="Adapter to put in; can be repeated. Unless given, all that the source has.",
        ),
        click.option(
            "--split",
            type=click.Choice(["stored", "balanced"]),
            default="stored",
            help="How A and B share their product: as stored, or evenly, for engines that compute in float16.",
        ),
        click.option("--pad-rank", type=click.IntRange(min=1), help="Pad every pair with zeros to this rank."),
        click.option(
            "--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", help="Of a merged export."
        ),
        click.option(
            "--style",
            type=click.Choice(["matmulnbits", "qdq"]),
            help="Of an ONNX graph: ONNX Runtime's own operator (the default), or DequantizeLinear and MatMul.",
        ),
        click.option(
            "--two-bit",
            type=click.Choice(["exact", "compact"]),
            help="Of 2-bit codes in an ONNX graph: exact in 4-bit containers (the default), or 2-bit with activations "
            "rounded to int8.",
        ),
        click.option(
            "--opset", type=click.IntRange(min=1), help="Of an ONNX graph; unless given, the least that fits."
        ),
        click.option(
            "--force", is_flag=True, help="Take an adapter of another base; the export and its card will say so."
        ),
        click.option("--out", type=PATH, metavar="FOLDER", help=f"Folder to write; unless given, {place}."),
    ]

    def decorate(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def set_option() -> Callable[[Decorated], Decorated]:
    """Return the option `--set KEY=VALUE`."""
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any option of a recipe; can be repeated."
    )


def parse_tasks(text: str) -> tuple[str, ...]:
    """Return the tasks of a list with commas, each once."""
    return tuple(dict.fromkeys(task for task in split_list(text, ",", label="=") if task))


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
    mapping: dict[str, Any] = {**(DEMO if options["demo"] else {}), **from_file, **typed}
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
