"""The recipe of a run: its options, the presets, and how they are read; it needs no torch."""

from cloq_export.recipe.checks import bytes_of_size
from cloq_export.recipe.choices import register_choice, registered_choice
from cloq_export.recipe.finetune import FINETUNE_CHOICES, FINETUNE_FIELDS, FINETUNE_PREFIX, FineTuneRecipe
from cloq_export.recipe.options import (
    CHOICES,
    EXPORT_FORMATS,
    FIELDS,
    NOT_IN_THE_BYTES,
    REFINE_STEPS,
    SUPPORTED_BITS,
    Recipe,
    is_expert,
)
from cloq_export.recipe.presets import DEMO, DEMO_FINETUNE, DEMO_RESERVE, PRESETS
from cloq_export.recipe.reading import (
    load_recipe,
    named_recipes,
    parse_override,
    parse_setting,
    read_recipe,
    read_recipe_file,
)

__all__ = [
    "CHOICES",
    "DEMO",
    "DEMO_FINETUNE",
    "DEMO_RESERVE",
    "EXPORT_FORMATS",
    "FIELDS",
    "FINETUNE_CHOICES",
    "FINETUNE_FIELDS",
    "FINETUNE_PREFIX",
    "NOT_IN_THE_BYTES",
    "PRESETS",
    "REFINE_STEPS",
    "SUPPORTED_BITS",
    "FineTuneRecipe",
    "Recipe",
    "bytes_of_size",
    "is_expert",
    "load_recipe",
    "named_recipes",
    "parse_override",
    "parse_setting",
    "read_recipe",
    "read_recipe_file",
    "register_choice",
    "registered_choice",
]
