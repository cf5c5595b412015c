"""Every option of a fine-tuning, with its default, its allowed values and its meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from cloq_export.errors import RecipeError
from cloq_export.recipe.checks import (
    ABOVE_ZERO,
    FILE_NAME,
    SHARE,
    Options,
    at_least,
    below_power_of_two,
    near,
    option,
    recipe_error,
)

FINETUNE_PREFIX = "finetune."


@dataclasses.dataclass(frozen=True)
class FineTuneRecipe:
    """Every option of a fine-tuning; equal ones on equal bases and data make equal adapters.

    Raises:
        RecipeError: a value has a wrong type or is out of range; the message lists all faults.
    """

    data: str = option(
        "", "Examples to learn: a set by name (wikitext2, gsm8k, ...; NAME:SPLIT), a text or JSON file, or a hub id."
    )
    name: str = option("finetuned", "Name of the adapter that is made, the folder RUN/adapters/NAME.", FILE_NAME)
    start: str = option(
        "",
        "Adapter of the run to start from, or zero, a new one that changes nothing yet; unless given, the run's.",
    )
    epochs: float = option(3.0, "Passes over the examples.", ABOVE_ZERO)
    steps: int = option(0, "Optimizer steps; 0 leaves it to epochs.", at_least(0))
    learning_rate: float = option(4e-4, "Largest learning rate.", ABOVE_ZERO)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "How the learning rate falls.")
    warmup: float = option(0.03, "Share of the steps in which the learning rate rises; 0 to 1.", SHARE)
    weight_decay: float = option(0.1, "AdamW's weight decay.", at_least(0))
    batch_size: int = option(8, "Sequences in one forward pass, on each device.", at_least(1))
    gradient_accumulation: int = option(1, "Forward passes before a step.", at_least(1))
    seqlen: int = option(512, "Tokens in a sequence.", at_least(2))
    too_long: Literal["truncate", "drop"] = option("truncate", "What is done with examples longer than a sequence.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Arithmetic of activations; A and B are trained in float32."
    )
    gradient_checkpointing: bool = option(False, "Compute activations again instead of keeping them.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Where to train.")
    seed: int = option(0, "Seed of the order of examples, and of a new adapter.", at_least(0), below_power_of_two(32))
    eval_data: str = option(
        "", "Examples to evaluate on, named as data is. Unless given, examples held out of data, which are not learned."
    )
    eval_samples: int = option(
        32, "Sequences to evaluate on; 0 evaluates nothing, and keeps the last adapter.", at_least(0)
    )
    eval_every: int = option(
        50, "Steps between evaluations and checkpoints; 0 is one of each after every epoch.", at_least(0)
    )

    def __post_init__(self) -> None:
        faults = [fault for name in FINETUNE_FIELDS for fault in _OPTIONS.faults(name, getattr(self, name))]
        if faults:
            raise recipe_error(faults)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> FineTuneRecipe:
        """Return the recipe of a mapping; what it does not name has its default.

        Args:
            mapping: field name to value.

        Raises:
            RecipeError: unknown names (near matches are suggested) or bad values; all faults in one message.
        """
        faults = finetune_faults(mapping)
        if faults:
            raise recipe_error(faults)
        return cls(**{name: _OPTIONS.number_of(name, value) for name, value in mapping.items()})

    def to_mapping(self) -> dict[str, Any]:
        """Return every option as plain JSON values."""
        return dataclasses.asdict(self)

    def changed(self, changes: Mapping[str, Any]) -> FineTuneRecipe:
        """Return this recipe with some options replaced.

        Raises:
            RecipeError: as in `from_mapping`.
        """
        return FineTuneRecipe.from_mapping({**self.to_mapping(), **changes})


_OPTIONS = Options(FineTuneRecipe)
FINETUNE_FIELDS, FINETUNE_CHOICES = _OPTIONS.fields, _OPTIONS.choices


def finetune_faults(mapping: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the options of a fine-tuning."""
    faults = []
    for name, value in mapping.items():
        if name in FINETUNE_FIELDS:
            faults.extend(_OPTIONS.faults(name, value))
        else:
            faults.append(f"{name!r} is not an option of a fine-tuning{near(str(name), FINETUNE_FIELDS)}")
    return faults


def parse_finetune_setting(name: str, text: str) -> Any:
    """Return the value of an option of a fine-tuning from a text.

    Raises:
        RecipeError: an unknown name, or a value that cannot be read in its type.
    """
    if name not in FINETUNE_FIELDS:
        raise RecipeError(
            f"{name!r} is not an option of a fine-tuning{near(name, FINETUNE_FIELDS)}; see docs/finetune.md for all."
        )
    return _OPTIONS.parse(name, text, shown=FINETUNE_PREFIX + name)
