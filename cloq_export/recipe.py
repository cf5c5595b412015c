"""The recipe: every option of a run in one frozen dataclass, with its default, its allowed values and its meaning.

This file is the only place where a default stands. The command line, recipe files and `run.json` all go through
`Recipe.from_mapping`, which reports every fault at once. It needs no torch, so that `cloq --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from cloq_export.errors import RecipeError

SUPPORTED_BITS = (2, 3, 4, 8)
FINETUNE_PREFIX = "finetune."
# Where a recipe says 0: after so many steps ours are near their end, and ApiQ's authors make so many passes.
REFINE_STEPS, APIQ_PASSES = 200, 20
OVERRIDE_KEYS = ("bits", "group_size", "rank", "skip")

# Fields that do not change the bytes of a run: a run may be resumed with other values of these.
NOT_IN_THE_BYTES = ("eval_text", "eval_window", "eval_windows", "max_shard_size", "format", "finetune", "solvers")

_RECIPES = Path(__file__).with_name("recipes")
_PAPER = "paper"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every option of a run; two runs with equal recipes and sources write equal bytes.

    Raises:
        RecipeError: a value has a wrong type or is out of range; the message lists all faults.
    """

    model: str = _option("", "Model to read: a Hugging Face folder, a hub id or a GGUF file.")
    bits: int = _option(4, "Width of a code: 2, 3, 4 or 8.")
    group_size: int = _option(64, "Input channels that share a scale and a zero; -1 is one group per output channel.")
    symmetric: bool = _option(False, "Pin every zero to the middle of the range instead of choosing it per group.")
    method: Literal["optq", "magr", "rtn"] = _option(
        "optq", "How codes are made: optq, magr (MagR, then OPTQ), or rtn (round to nearest)."
    )
    grid: Literal["searched", "minmax"] = _option(
        "searched", "Range of a group: searched for the least error, or its minimum and maximum."
    )
    damping: float = _option(0.01, "Added to the diagonal of H, as a share of its mean; 0 to 1.")
    magr_alpha: float = _option(1e-3, "Strength of MagR's penalty on the largest weight of a group; 0 to 1.")
    sweeps: int = _option(0, "COMQ coordinate sweeps over the codes after OPTQ; 0 is none.")
    refit: bool = _option(False, "Refit the scales by least squares after OPTQ.")
    rank: int = _option(64, "Rank of the LoRA adapter; 0 makes none.")
    init: Literal["cloq", "svd", "loftq", "lq-lora"] = _option(
        "cloq",
        "How A and B are made: cloq (closed form on the calibration inputs), svd (of the weight error alone), or, "
        "codes and svd in alternation without calibration, loftq or lq-lora.",
    )
    split: Literal["paper", "balanced", "transposed"] = _option(
        "paper", "How the correction is shared between A and B (Table 6 of the CLoQ paper)."
    )
    svd: Literal["truncated", "full"] = _option(
        "truncated", "Truncated SVD with a checked residual, or the slow full one."
    )
    adapter_dtype: Literal["float16", "bfloat16", "float32"] = _option("float16", "Dtype in which A and B are stored.")
    budget: float = _option(
        0.0,
        "Stored bits per weight, codes, scales, zeros and adapters together: bits, group size and rank (at most rank) "
        "of each layer are chosen for it; 0 leaves them as given.",
    )
    error_aware: float = _option(
        0.5,
        "Share by which the targets of 2-bit layers move to mend the error of the layers before; 0 (independent "
        "layers) to 1. Layers of b bits take 2/b of it.",
    )
    float_share: float = _option(
        0.5,
        "Share of the calibration windows that also run through the float model, to tell what error_aware mends; with "
        "refine all of them do.",
    )
    token_weighting: Literal["none", "inverse_norm"] = _option(
        "none", "Weight of a token in H: equal, or the inverse of its norm."
    )
    refine: Literal["none", "block", "model", "apiq-lw", "apiq-bw"] = _option(
        "none",
        "Train what was solved: block (scales and adapters of a block, or codes where there is no adapter, together on "
        "its output), or model (that, then the scales and adapters of all blocks, on what the model says); or ApiQ's "
        "layer-wise or block-wise scheme instead of solving.",
    )
    refine_steps: int = _option(
        0,
        "Steps of the refinement of each block, and of the model (apiq-lw: of each layer); 0 is "
        f"{REFINE_STEPS}, and with apiq-lw and apiq-bw {APIQ_PASSES} passes over the windows.",
    )
    calibration: str = _option(
        "wikitext2", "Calibration text: wikitext2, gsm8k, embedded, a file, a hub id, or several joined by +."
    )
    samples: int = _option(128, "Number of calibration windows.")
    seqlen: int = _option(2048, "Tokens in a calibration window.")
    seed: int = _option(0, "Seed that draws the calibration windows.")
    bos: Literal["auto", "never", "always"] = _option(
        "auto",
        "Begin token before each window of text, in calibration, evaluation and training: auto (where the tokenizer "
        "puts one by itself), never or always.",
    )
    device: str = _option("auto", "Where to compute: auto, cpu, cuda, or cuda:N.")
    solvers: Literal["local", "ray"] = _option(
        "local", "Where independent layers are solved: here, on every GPU of this machine, or by a Ray cluster."
    )
    precision: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "Arithmetic of the calibration forward passes; H itself is never below float32."
    )
    blocks: str = _option("", "Dotted path of the list of decoder blocks, for architectures that are not recognised.")
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "Module-name pattern to its own bits, group_size, rank or skip; the first match wins."},
    )
    codes_from: str = _option(
        "", "Quantized checkpoint of the same model whose codes are kept, so that only the adapter is made."
    )
    adapter_name: str = _option("cloq", "Name of the adapter, the folder RUN/adapters/NAME.")
    format: Literal["gptq_v2", "gptq", "compressed_tensors", "compressed_tensors_padded"] = _option(
        "gptq_v2", "Layout of the checkpoint."
    )
    max_shard_size: str = _option("5GB", "Largest weight file of the checkpoint, e.g. 500MB or 5GB.")
    eval_text: str = _option(
        "wikitext2", "Text on which perplexity is measured: wikitext2, gsm8k, embedded, a file, a hub id."
    )
    eval_window: int = _option(512, "Tokens in an evaluation window.")
    eval_windows: int = _option(16, "Number of evaluation windows, from the start of the text.")
    finetune: Mapping[str, Any] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "Options of a fine-tuning that follows, see FineTuneRecipe; empty is none."},
    )

    def __post_init__(self) -> None:
        faults = [fault for name in FIELDS for fault in _faults_of(name, getattr(self, name))]
        if faults:
            raise _recipe_error(faults)
        # Own copies, so that a caller's later edit cannot change a frozen recipe.
        copies = {pattern: dict(settings) for pattern, settings in self.overrides.items()}
        object.__setattr__(self, "overrides", copies)
        object.__setattr__(self, "finetune", dict(self.finetune))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], *, preset: str = "default") -> Recipe:
        """Return the recipe of a mapping: fields that it does not name come from the preset, then from the defaults.

        Args:
            mapping: field name to value. `overrides` may be a mapping, or the list that `to_mapping` writes.
            preset: a name in PRESETS.

        Returns:
            Recipe: the checked recipe.

        Raises:
            RecipeError: unknown names (near matches are suggested) or bad values; all faults in one message.
        """
        faults: list[str] = []
        if preset not in PRESETS:
            faults.append(f"preset {preset!r} is unknown{_near(preset, PRESETS)}; allowed are {_listed(PRESETS)}")
        values: dict[str, Any] = dict(PRESETS.get(preset, {}))
        for name, value in mapping.items():
            if name not in FIELDS:
                faults.append(f"{name!r} is not an option of a recipe{_near(str(name), FIELDS)}")
                continue
            if name == "overrides":
                value, list_faults = _overrides_of(value)
                faults.extend(list_faults)
                if list_faults:
                    continue
            found = _faults_of(name, value)
            faults.extend(found)
            if not found:
                values[name] = float(value) if FIELDS[name].type == "float" else value
        if faults:
            raise _recipe_error(faults)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return every option as plain JSON values.

        `overrides` becomes a list of `{"pattern": ..., setting: value}`, because the order of patterns matters and a
        JSON object that is written with sorted keys would lose it.
        """
        mapping = {name: getattr(self, name) for name in FIELDS}
        mapping["overrides"] = [{"pattern": pattern, **settings} for pattern, settings in self.overrides.items()]
        mapping["finetune"] = dict(self.finetune)
        return mapping

    def to_yaml(self) -> str:
        """Return every option as a recipe file."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """Return this recipe with some options replaced.

        Raises:
            RecipeError: as in `from_mapping`.
        """
        return Recipe.from_mapping({**self.to_mapping(), **changes})

    def difference(self, other: Recipe) -> list[str]:
        """Return one line for each option that differs: this recipe is the run's, `other` is what is asked.

        Options that do not change the bytes of a run (NOT_IN_THE_BYTES) are left out.
        """
        mine, theirs = self.to_mapping(), other.to_mapping()
        return [
            f"{name}: {_shown(mine[name])} in the run, {_shown(theirs[name])} asked"
            for name in FIELDS
            if name not in NOT_IN_THE_BYTES and mine[name] != theirs[name]
        ]

    def target_share(self, bits: int) -> float:
        """Return the share of `error_aware` that a layer's target takes.

        Wider codes leave less error to mend, and what is left is soon below what the calibration text can tell: the
        share that helps most falls with the width.

        Args:
            bits: width of the layer's codes.
        """
        return self.error_aware * min(1.0, 2.0 / bits)

    def override_for(self, module: str) -> dict[str, Any]:
        """Return the settings of the first pattern that matches a full module name, or an empty dict."""
        for pattern, settings in self.overrides.items():
            if fnmatch.fnmatchcase(module, pattern):
                return dict(settings)
        return {}

    @property
    def preset_name(self) -> str:
        """Return the preset whose every setting this recipe has, or "custom"."""
        touched = {name for settings in PRESETS.values() for name in settings}
        for preset, settings in PRESETS.items():
            expected = {**{name: FIELDS[name].default for name in touched}, **settings}
            if all(getattr(self, name) == value for name, value in expected.items()):
                return preset
        return "custom"

    @property
    def max_shard_bytes(self) -> int:
        """Return `max_shard_size` in bytes; GB is 10**9 and GiB is 2**30, as transformers counts."""
        match = _SHARD_SIZE.fullmatch(self.max_shard_size)
        assert match is not None  # checked on creation
        return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclasses.dataclass(frozen=True)
class FineTuneRecipe:
    """Every option of a fine-tuning; equal ones on equal bases and data make equal adapters.

    Raises:
        RecipeError: a value has a wrong type or is out of range; the message lists all faults.
    """

    data: str = _option(
        "", "Examples to learn: a set by name (wikitext2, gsm8k, ...; NAME:SPLIT), a text or JSON file, or a hub id."
    )
    name: str = _option("finetuned", "Name of the adapter that is made, the folder RUN/adapters/NAME.")
    start: str = _option(
        "",
        "Adapter of the run to start from, or zero, a new one that changes nothing yet; unless given, the run's.",
    )
    epochs: float = _option(3.0, "Passes over the examples.")
    steps: int = _option(0, "Optimizer steps; 0 leaves it to epochs.")
    learning_rate: float = _option(4e-4, "Largest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = _option("cosine", "How the learning rate falls.")
    warmup: float = _option(0.03, "Share of the steps in which the learning rate rises; 0 to 1.")
    weight_decay: float = _option(0.1, "AdamW's weight decay.")
    batch_size: int = _option(8, "Sequences in one forward pass, on each device.")
    gradient_accumulation: int = _option(1, "Forward passes before a step.")
    seqlen: int = _option(512, "Tokens in a sequence.")
    too_long: Literal["truncate", "drop"] = _option("truncate", "What is done with examples longer than a sequence.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Arithmetic of activations; A and B are trained in float32."
    )
    gradient_checkpointing: bool = _option(False, "Compute activations again instead of keeping them.")
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "Where to train.")
    seed: int = _option(0, "Seed of the order of examples, and of a new adapter.")
    eval_data: str = _option(
        "", "Examples to evaluate on, named as data is. Unless given, examples held out of data, which are not learned."
    )
    eval_samples: int = _option(32, "Sequences to evaluate on; 0 evaluates nothing, and keeps the last adapter.")
    eval_every: int = _option(50, "Steps between evaluations and checkpoints; 0 is one of each after every epoch.")

    def __post_init__(self) -> None:
        faults = [fault for name in FINETUNE_FIELDS for fault in _finetune_faults(name, getattr(self, name))]
        if faults:
            raise _recipe_error(faults)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> FineTuneRecipe:
        """Return the recipe of a mapping; what it does not name has its default.

        Args:
            mapping: field name to value.

        Raises:
            RecipeError: unknown names (near matches are suggested) or bad values; all faults in one message.
        """
        faults = _finetune_section_faults(mapping)
        if faults:
            raise _recipe_error(faults)
        values: dict[str, Any] = {
            name: float(value) if FINETUNE_FIELDS[name].type == "float" else value for name, value in mapping.items()
        }
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return every option as plain JSON values."""
        return dataclasses.asdict(self)

    def changed(self, changes: Mapping[str, Any]) -> FineTuneRecipe:
        """Return this recipe with some options replaced.

        Raises:
            RecipeError: as in `from_mapping`.
        """
        return FineTuneRecipe.from_mapping({**self.to_mapping(), **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The published setting: MagR before OPTQ, layers independent, one float pass.
    "paper": {
        "method": "magr",
        "grid": "minmax",
        "magr_alpha": 1e-3,
        "damping": 0.01,
        "sweeps": 0,
        "refit": False,
        "split": "paper",
        "error_aware": 0.0,
        "token_weighting": "none",
        "refine": "none",
    },
}

# What --demo sets: a small real model and a calibration that two cores finish in minutes.
DEMO: dict[str, Any] = {"model": "smollm2-demo", "bits": 2, "samples": 40, "seqlen": 1024}

# What --demo --finetune sets beside it: WikiText-2's validation split is what the demo is calibrated on too.
DEMO_FINETUNE: dict[str, Any] = {
    "data": "wikitext2:validation",
    "steps": 60,
    "batch_size": 4,
    "seqlen": 256,
    "eval_every": 20,
    "eval_samples": 16,
}

FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Recipe)}
FINETUNE_FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(FineTuneRecipe)}

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("optq", "magr", "rtn"),
    "grid": ("searched", "minmax"),
    "init": ("cloq", "svd", "loftq", "lq-lora"),
    "split": ("paper", "balanced", "transposed"),
    "svd": ("truncated", "full"),
    "adapter_dtype": ("float16", "bfloat16", "float32"),
    "refine": ("none", "block", "model", "apiq-lw", "apiq-bw"),
    "token_weighting": ("none", "inverse_norm"),
    "bos": ("auto", "never", "always"),
    "solvers": ("local", "ray"),
    "precision": ("auto", "float32", "bfloat16"),
    "format": ("gptq_v2", "gptq", "compressed_tensors", "compressed_tensors_padded"),
}

FINETUNE_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("cosine", "linear", "constant"),
    "too_long": ("truncate", "drop"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
}

# What `cloq export` writes: a layout, or one of two things that hold no codes.
EXPORT_FORMATS = (*CHOICES["format"], "merged", "peft", "onnx", "onnx-adapter")

_MINIMUM: dict[str, int] = {
    "sweeps": 0,
    "rank": 0,
    "refine_steps": 0,
    "samples": 1,
    "seqlen": 2,
    "seed": 0,
    "eval_window": 2,
    "eval_windows": 1,
}
_FINETUNE_MINIMUM: dict[str, int] = {
    "steps": 0,
    "weight_decay": 0,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "seqlen": 2,
    "seed": 0,
    "eval_samples": 0,
    "eval_every": 0,
}
_SHARES = ("damping", "magr_alpha", "error_aware", "float_share")
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MODULE_PATH = re.compile(r"\w+(\.\w+)*")
_LARGEST_BUDGET = 32
_SHARD_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B|)", re.IGNORECASE)


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
        raise RecipeError(f"the recipe file {path} gives preset {preset!r}; allowed are {_listed(PRESETS)}.")
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
            f"there is no recipe {name!r}{_near(name, known)}, and no file of that name; docs/finetune.md lists those "
            "of the package."
        )
    content = dict(known[name])
    preset = content.pop("preset", None)
    return content, preset


def read_yaml(name: str, *, kind: str) -> dict[str, Any]:
    """Return the content of a YAML file, or of one of the package's by its name.

    Args:
        name: a file, or the name of one of the package without suffix.
        kind: the folder of the package's recipes that it lies in.

    Raises:
        RecipeError: there is neither, or it holds no mapping.
    """
    if Path(name).is_file() or Path(name).suffix or "/" in name:
        return read_recipe_file(name)[0]
    known = {path.stem: path for path in (_RECIPES / kind).glob("*.yaml")}
    if name not in known:
        raise RecipeError(f"there is no {kind} recipe {name!r}, and no file of that name; there are {_listed(known)}.")
    return read_recipe_file(known[name])[0]


@functools.cache
def named_recipes() -> dict[str, dict[str, Any]]:
    """Return the recipes of the package: those of the paper's tables, and small ones, by name."""
    recipes: dict[str, dict[str, Any]] = {}
    for path in sorted(_RECIPES.glob("*.yaml")):
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
                    yield (
                        f"{_PAPER}-{model}-{task}-int{bits}-{group}",
                        {
                            **tables["recipe"],
                            "model": tables["models"][model],
                            "bits": int(bits),
                            "group_size": tables["groups"][group],
                            "finetune": section,
                        },
                    )


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
        own = name.removeprefix(FINETUNE_PREFIX)
        if own not in FINETUNE_FIELDS:
            raise RecipeError(
                f"{own!r} is not an option of a fine-tuning{_near(own, FINETUNE_FIELDS)}; see docs/finetune.md for all."
            )
        return name, _parse_value(name, FINETUNE_FIELDS[own].type, value.strip())
    if name not in FIELDS:
        raise RecipeError(f"{name!r} is not an option of a recipe{_near(name, FIELDS)}; see docs/recipes.md for all.")
    if name == "finetune":
        raise RecipeError("finetune cannot be given as KEY=VALUE; set its options, e.g. finetune.learning_rate=1e-4.")
    if name == "overrides":
        raise RecipeError("overrides cannot be given as KEY=VALUE; use --override 'PATTERN:key=value,...'.")
    return name, _parse_value(name, FIELDS[name].type, value.strip())


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """Return (pattern, settings) of a `PATTERN:key=value,...` text; `PATTERN:skip` leaves modules in float.

    Raises:
        RecipeError: the text has another form, or a setting is unknown or not allowed.
    """
    pattern, colon, listed = text.rpartition(":")
    if not colon or not pattern.strip() or not listed.strip():
        raise RecipeError(f"{text!r} is not an override; write 'PATTERN:key=value,...', e.g. '*.down_proj:bits=4'.")
    settings: dict[str, Any] = {}
    for item in listed.split(","):
        key, equals, value = item.partition("=")
        key = key.strip().replace("-", "_")
        if key not in OVERRIDE_KEYS:
            raise RecipeError(
                f"override {text!r}: {key!r} is unknown{_near(key, OVERRIDE_KEYS)}; "
                f"allowed are {_listed(OVERRIDE_KEYS)}."
            )
        if key == "skip":
            settings[key] = _parse_value(key, "bool", value.strip()) if equals else True
        else:
            settings[key] = _parse_value(key, "int", value.strip())
    pattern = pattern.strip()
    faults = _override_faults(pattern, settings)
    if faults:
        raise _recipe_error(faults)
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


def _parse_value(name: str, kind: Any, text: str) -> Any:
    """Return a text as the type of its option; other kinds than numbers and booleans stay text."""
    if kind == "bool":
        lowered = text.lower()
        if lowered in ("true", "yes", "on", "1"):
            return True
        if lowered in ("false", "no", "off", "0"):
            return False
        raise RecipeError(f"{name} is {text!r}; allowed are true and false.")
    reader: Callable[[str], Any] | None = {"int": int, "float": float}.get(kind)
    if reader is None:
        return text
    try:
        return reader(text)
    except ValueError:
        wanted = "a whole number" if kind == "int" else "a number"
        raise RecipeError(f"{name} is {text!r}; {wanted} is needed.") from None


def _type_fault(name: str, value: Any, kind: Any, choices: Mapping[str, tuple[str, ...]]) -> str:
    """Return what a value of the wrong type should have been, or an empty text."""
    wanted = ""
    if kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
        wanted = "a whole number is needed"
    elif kind == "float" and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value)
    ):
        wanted = "a number is needed"
    elif kind == "bool" and not isinstance(value, bool):
        wanted = "true or false is needed"
    elif name in choices:
        if not isinstance(value, str) or value not in choices[name]:
            wanted = f"allowed are {_listed(choices[name])}{_near(str(value), choices[name])}"
    elif kind == "str" and not isinstance(value, str):
        wanted = "a text is needed"
    return wanted


def _faults_of(name: str, value: Any) -> list[str]:
    """Return what is wrong with one option, as clauses of a sentence."""
    wanted = _type_fault(name, value, FIELDS[name].type, CHOICES)
    if wanted:
        return [f"{name} is {value!r}; {wanted}"]
    if name == "overrides":
        if not isinstance(value, Mapping):
            return [f"overrides is {value!r}; a mapping of module patterns to settings is needed"]
        return [fault for pattern, settings in value.items() for fault in _override_faults(pattern, settings)]
    if name == "finetune":
        if not isinstance(value, Mapping):
            return [f"finetune is {value!r}; a mapping of fine-tuning options to values is needed"]
        return [f"finetune: {fault}" for fault in _finetune_section_faults(value)]
    return _range_faults(name, value)


def _finetune_section_faults(mapping: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the options of a fine-tuning."""
    faults = []
    for name, value in mapping.items():
        if name in FINETUNE_FIELDS:
            faults.extend(_finetune_faults(name, value))
        else:
            faults.append(f"{name!r} is not an option of a fine-tuning{_near(str(name), FINETUNE_FIELDS)}")
    return faults


def _finetune_faults(name: str, value: Any) -> list[str]:
    """Return what is wrong with one option of a fine-tuning."""
    wanted = _type_fault(name, value, FINETUNE_FIELDS[name].type, FINETUNE_CHOICES)
    if wanted:
        return [f"{name} is {value!r}; {wanted}"]
    if name in _FINETUNE_MINIMUM and value < _FINETUNE_MINIMUM[name]:
        wanted = f"it must be at least {_FINETUNE_MINIMUM[name]}"
    elif name in ("epochs", "learning_rate") and value <= 0:
        wanted = "it must be above 0"
    elif name == "warmup" and not 0 <= value <= 1:
        wanted = "it must be between 0 and 1"
    elif name == "seed" and value >= 2**32:
        wanted = "it must be below 2**32"
    elif name == "name" and not _NAME.fullmatch(value):
        wanted = "letters, digits, '.', '_' and '-' are allowed, a letter or digit first"
    return [f"{name} is {value!r}; {wanted}"] if wanted else []


def _range_faults(name: str, value: Any) -> list[str]:
    """Return what is wrong with a value of the right type."""
    wanted = ""
    if name == "bits" and value not in SUPPORTED_BITS:
        wanted = "allowed are 2, 3, 4 and 8"
    elif name == "group_size" and value != -1 and (value < 8 or value % 8):
        wanted = "allowed are -1 (one group per output channel) or a multiple of 8, usually 32, 64 or 128"
    elif name in _MINIMUM and value < _MINIMUM[name]:
        wanted = f"it must be at least {_MINIMUM[name]}"
    elif name == "seed" and value >= 2**63:
        wanted = "it must be below 2**63"
    elif name == "budget" and not 0 <= value <= _LARGEST_BUDGET:
        wanted = f"it must be between 0 and {_LARGEST_BUDGET}"
    elif name in _SHARES and not 0 <= value <= 1:
        wanted = "it must be between 0 and 1"
    elif name == "device" and not _DEVICE.fullmatch(value):
        wanted = "allowed are auto, cpu, cuda, cuda:N, xpu, mps"
    elif name == "blocks" and value and not _MODULE_PATH.fullmatch(value):
        wanted = "a dotted module path is needed, for example model.layers"
    elif name == "adapter_name" and not _NAME.fullmatch(value):
        wanted = "letters, digits, '.', '_' and '-' are allowed, a letter or digit first"
    elif name == "max_shard_size":
        match = _SHARD_SIZE.fullmatch(value)
        if match is None or float(match[1]) == 0:
            wanted = "a size is needed, for example 500MB or 5GB"
    elif name in ("calibration", "eval_text") and not value.strip():
        wanted = "give wikitext2, gsm8k, embedded, a file or a hub id"
    return [f"{name} is {value!r}; {wanted}"] if wanted else []


def _override_faults(pattern: Any, settings: Any) -> list[str]:
    """Return what is wrong with the settings of one pattern."""
    label = f"override {pattern!r}"
    if not isinstance(pattern, str) or not pattern.strip():
        return [f"{label}: the pattern must be a text that matches module names, for example '*.down_proj'"]
    if not isinstance(settings, Mapping) or not settings:
        return [f"{label}: settings are needed, out of {_listed(OVERRIDE_KEYS)}"]
    faults = []
    for key, value in settings.items():
        if key not in OVERRIDE_KEYS:
            faults.append(
                f"{label}: {key!r} is unknown{_near(str(key), OVERRIDE_KEYS)}; allowed are {_listed(OVERRIDE_KEYS)}"
            )
        elif key == "skip":
            if not isinstance(value, bool):
                faults.append(f"{label}: skip is {value!r}; true or false is needed")
        else:
            faults.extend(f"{label}: {fault}" for fault in _faults_of(key, value))
    return faults


def _overrides_of(value: Any) -> tuple[Any, list[str]]:
    """Return overrides as a mapping, reading the list form of `Recipe.to_mapping`, and what is wrong with the list."""
    if not isinstance(value, (list, tuple)):
        return value, []
    mapping: dict[str, Any] = {}
    for entry in value:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("pattern"), str):
            return {}, [f"overrides has the entry {entry!r}; an entry of a list needs `pattern` beside its settings"]
        if entry["pattern"] in mapping:
            return {}, [f"overrides gives the pattern {entry['pattern']!r} twice"]
        mapping[entry["pattern"]] = {key: setting for key, setting in entry.items() if key != "pattern"}
    return mapping, []


def _recipe_error(faults: list[str]) -> RecipeError:
    if len(faults) == 1:
        return RecipeError(f"{faults[0]}.")
    return RecipeError(
        f"{len(faults)} faults: " + "; ".join(f"({i}) {fault}" for i, fault in enumerate(faults, 1)) + "."
    )


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
