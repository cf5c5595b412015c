"""The recipe: every option of a run in one frozen dataclass, with its default, its allowed values and its meaning.

This file is the only place where a default stands. The command line, recipe files and `run.json` all go through
`Recipe.from_mapping`, which reports every fault at once. It needs no torch, so that `cloq --help` is quick.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import yaml

from cloq_export.recipe.checks import (
    ABOVE_ZERO,
    FILE_NAME,
    SHARE,
    SHRINK,
    Options,
    ValueRule,
    at_least,
    below_power_of_two,
    between,
    bytes_of_size,
    joined_names,
    mapping_faults,
    matching,
    near,
    option,
    recipe_error,
)
from cloq_export.recipe.finetune import finetune_faults
from cloq_export.recipe.presets import PRESETS, preset_options

SUPPORTED_BITS = (2, 3, 4, 8)
# Steps of a refinement where a recipe says 0: more bring little.
REFINE_STEPS = 200
OVERRIDE_KEYS = ("bits", "group_size", "rank", "skip")

# Fields that do not change the bytes of a run: a run may be resumed with other values of these.
NOT_IN_THE_BYTES = (
    *("eval_text", "eval_window", "eval_windows", "measure", "max_shard_size", "format", "finetune", "solvers"),
    "stream",
)

_GROUP_SIZE = ValueRule(
    lambda value: value == -1 or (value >= 8 and value % 8 == 0),
    "allowed are -1 (one group per output channel) or a multiple of 8, usually 32, 64 or 128",
)
_END_BITS = ValueRule((0, 4, 8).__contains__, "allowed are 0, 4 and 8")
_DEVICE = matching(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", "allowed are auto, cpu, cuda, cuda:N, xpu, mps")
_OF_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
_MODULE_PATH = matching(r"|\w+(\.\w+)*", "a dotted module path is needed, for example model.layers")
_SHARD_SIZE = ValueRule(lambda value: bool(bytes_of_size(value)), "a size is needed, for example 500MB or 5GB")
_SIZE_OR_NONE = ValueRule(lambda value: not value or bool(bytes_of_size(value)), "a size is needed, for example 6GB")
_TEXT = ValueRule(lambda value: bool(value.strip()), "give wikitext2, gsm8k, embedded, a file or a hub id")


def is_expert(module: str) -> bool:
    """Return whether a full module name is that of one expert of a mixture, or of a layer in it."""
    return _OF_EXPERT.search(module) is not None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every option of a run; two runs with equal recipes and sources write equal bytes.

    Raises:
        RecipeError: a value has a wrong type or is out of range; the message lists all faults.
    """

    model: str = option("", "Model to read: a Hugging Face folder, a hub id or a GGUF file.")
    bits: int = option(
        4, "Width of a code: 2, 3, 4 or 8.", ValueRule(SUPPORTED_BITS.__contains__, "allowed are 2, 3, 4 and 8")
    )
    group_size: int = option(
        64, "Input channels that share a scale and a zero; -1 is one group per output channel.", _GROUP_SIZE
    )
    symmetric: bool = option(False, "Pin every zero to the middle of the range instead of choosing it per group.")
    method: Literal["optq", "magr", "rtn"] = option(
        "optq", "How codes are made: optq, magr (MagR, then OPTQ), or rtn (round to nearest)."
    )
    grid: Literal["searched", "minmax"] = option(
        "searched", "Range of a group: searched for the least error, or its minimum and maximum."
    )
    damping: float = option(0.01, "Added to the diagonal of H, as a share of its mean; 0 to 1.", SHARE)
    range_shrink: float = option(
        1.0, "Share of its range that a group's minmax grid spans, as MagR's authors shrink it; above 0.", SHRINK
    )
    magr_alpha: float = option(1e-3, "Strength of MagR's penalty on the largest weight of a group; 0 to 1.", SHARE)
    sweeps: int = option(0, "COMQ coordinate sweeps over the codes after OPTQ; 0 is none.", at_least(0))
    refit: bool = option(False, "Refit the scales by least squares after OPTQ.")
    rank: int = option(64, "Rank of the LoRA adapter; 0 makes none.", at_least(0))
    expert_rank: int = option(0, "Rank of the LoRA adapter of each expert of a mixture; 0 makes none.", at_least(0))
    expert_shared_a: bool = option(
        False, "Gate and up of an expert share A, the closed form of both as one weight: what PEFT stacks at one rank."
    )
    head_bits: int = option(0, "Width of the head's codes, symmetric: 4 or 8; 0 leaves it float.", _END_BITS)
    embedding_bits: int = option(
        0, "Width of the embeddings' codes, symmetric: 4 or 8; 0 leaves them float.", _END_BITS
    )
    init: Literal["cloq", "svd"] = option(
        "cloq",
        "How A and B are made: cloq (closed form on the calibration inputs) or svd (of the weight error alone); other "
        "choices are start points to compare with, see docs/method.md.",
    )
    split: Literal["paper", "balanced", "transposed"] = option(
        "paper", "How the correction is shared between A and B (Table 6 of the CLoQ paper)."
    )
    svd: Literal["truncated", "full"] = option(
        "truncated", "Truncated SVD with a checked residual, or the slow full one."
    )
    adapter_dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "Dtype in which A and B are stored.")
    low_rank_rounds: int = option(
        0,
        "Rounds in which A and B are taken out of the weight before its codes are made; these need their adapter then.",
        at_least(0),
    )
    low_rank_share: float = option(
        1.0, "Share of the rank that such a round takes out; above 0, to 1.", ABOVE_ZERO, SHARE
    )
    budget: float = option(
        0.0,
        "Stored bits per weight, codes, scales, zeros and adapters together: bits, group size and rank (at most rank) "
        "of each layer are chosen for it; 0 leaves them as given.",
        between(0, 32),
    )
    error_aware: float = option(
        0.5,
        "Share by which the targets of 2-bit layers move to mend the error of the layers before; 0 (independent "
        "layers) to 1. Layers of b bits take 2/b of it.",
        SHARE,
    )
    float_share: float = option(
        0.5,
        "Share of the calibration windows that also run through the float model, to tell what error_aware mends; with "
        "refine all of them do.",
        SHARE,
    )
    token_weighting: Literal["none", "inverse_norm"] = option(
        "none", "Weight of a token in H: equal, or the inverse of its norm."
    )
    experts: Literal["routed", "all"] = option(
        "routed",
        "Which tokens calibrate an expert of a mixture: those that the router sends it, or all; the mixture itself "
        "computes the same.",
    )
    refine: Literal["none", "block", "model"] = option(
        "none",
        "Train what was solved: block (scales and adapters of a block, or codes where there is no adapter, together on "
        "its output), or model (that, then the scales and adapters of all blocks, on the model's output); other "
        "choices are schemes to compare with, see docs/method.md.",
    )
    refine_steps: int = option(
        0, f"Steps of the refinement of each block, and of the model; 0 is {REFINE_STEPS}.", at_least(0)
    )
    calibration: str = option(
        "wikitext2", "Calibration text: wikitext2, gsm8k, embedded, a file, a hub id, or several joined by +.", _TEXT
    )
    samples: int = option(128, "Number of calibration windows.", at_least(1))
    seqlen: int = option(2048, "Tokens in a calibration window.", at_least(2))
    seed: int = option(0, "Seed that draws the calibration windows.", at_least(0), below_power_of_two(63))
    reserve: int = option(
        0,
        "Tokens at the end of each calibration text that no window is drawn from: what a training on that text holds "
        "out is then new to the codes.",
        at_least(0),
    )
    bos: Literal["auto", "never", "always"] = option(
        "auto",
        "Begin token before each window of text, in calibration, evaluation and training: auto (where the tokenizer "
        "puts one by itself), never or always.",
    )
    device: str = option("auto", "Where to compute: auto, cpu, cuda, or cuda:N.", _DEVICE)
    device_memory: str = option("", "Most of a GPU's memory that the run takes, e.g. 6GB; empty: all.", _SIZE_OR_NONE)
    solvers: Literal["local", "ray"] = option(
        "local", "Where independent layers are solved: here, on every GPU of this machine, or by a Ray cluster."
    )
    stream: Literal["auto", "always", "never"] = option(
        "auto", "Read each block from disk when used: where the model does not fit into memory, always, or never."
    )
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Arithmetic of the calibration forward passes; H itself is never below float32."
    )
    blocks: str = option(
        "", "Dotted path of the list of decoder blocks, for architectures that are not recognised.", _MODULE_PATH
    )
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "Module-name pattern to its own bits, group_size, rank or skip; the first match wins."},
    )
    codes_from: str = option(
        "", "Quantized checkpoint of the same model whose codes are kept, so that only the adapter is made."
    )
    adapter_name: str = option("cloq", "Name of the adapter, the folder RUN/adapters/NAME.", FILE_NAME)
    format: Literal[
        "gptq_v2", "gptq", "compressed_tensors", "compressed_tensors_padded", "auto_round", "auto_round_gptq"
    ] = option("gptq_v2", "Layout of the checkpoint.")
    max_shard_size: str = option("5GB", "Largest weight file of the checkpoint, e.g. 500MB or 5GB.", _SHARD_SIZE)
    measure: bool = option(
        True, "Measure the perplexity of the float model and of the result; without it, `cloq eval` does it later."
    )
    eval_text: str = option(
        "wikitext2", "Text on which perplexity is measured: wikitext2, gsm8k, embedded, a file, a hub id.", _TEXT
    )
    eval_window: int = option(512, "Tokens in an evaluation window.", at_least(2))
    eval_windows: int = option(16, "Number of evaluation windows, from the start of the text.", at_least(1))
    finetune: Mapping[str, Any] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "Options of a fine-tuning that follows, see FineTuneRecipe; empty is none."},
    )

    def __post_init__(self) -> None:
        faults = [fault for name in FIELDS for fault in _faults_of(name, getattr(self, name))]
        if faults:
            raise recipe_error(faults)
        # Copies, so that a later edit by the caller cannot change a frozen recipe.
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
            faults.append(f"preset {preset!r} is unknown{near(preset, PRESETS)}; allowed are {joined_names(PRESETS)}")
        values: dict[str, Any] = {}
        for name, value in mapping.items():
            if name not in FIELDS:
                faults.append(f"{name!r} is not an option of a recipe{near(str(name), FIELDS)}")
                continue
            if name == "overrides":
                value, list_faults = _overrides_of(value)
                faults.extend(list_faults)
                if list_faults:
                    continue
            of_value = _faults_of(name, value)
            faults.extend(of_value)
            if not of_value:
                values[name] = _OPTIONS.number_of(name, value)
        if faults:
            raise recipe_error(faults)
        grid = [values.get(name, FIELDS[name].default) for name in ("bits", "group_size")]
        return cls(**{**preset_options(preset, *grid), **values})

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

    def rank_for(self, module: str) -> int:
        """Return the rank of a layer's adapter, by its full module name."""
        rank = self.expert_rank if is_expert(module) else self.rank
        return int(self.override_for(module).get("rank", rank))

    @property
    def preset_name(self) -> str:
        """Return the preset whose every setting this recipe has, or "custom"."""
        touched = {name for settings in PRESETS.values() for name in settings}
        for preset in PRESETS:
            settings = preset_options(preset, self.bits, self.group_size)
            expected = {**{name: FIELDS[name].default for name in touched}, **settings}
            if all(getattr(self, name) == value for name, value in expected.items()):
                return preset
        return "custom"

    @property
    def max_shard_bytes(self) -> int:
        """Return `max_shard_size` in bytes; GB is 10**9 and GiB is 2**30, as transformers counts."""
        size = bytes_of_size(self.max_shard_size)
        assert size is not None  # checked on creation
        return size


_OPTIONS = Options(Recipe)
FIELDS, CHOICES = _OPTIONS.fields, _OPTIONS.choices

# What `cloq export` writes: a layout, or one of two things that hold no codes.
EXPORT_FORMATS = (*CHOICES["format"], "merged", "peft", "onnx", "onnx-adapter")


def _faults_of(name: str, value: Any) -> list[str]:
    """Return what is wrong with one option, as clauses of a sentence."""
    if name == "overrides":
        faults = mapping_faults(name, value, "module patterns to settings")
        return faults or [fault for pattern, given in value.items() for fault in override_faults(pattern, given)]
    if name == "finetune":
        faults = mapping_faults(name, value, "fine-tuning options to values")
        return faults or [f"finetune: {fault}" for fault in finetune_faults(value)]
    return _OPTIONS.faults(name, value)


def parse_option(name: str, text: str) -> Any:
    """Return the value of an option from a text.

    Raises:
        RecipeError: a value that cannot be read in the type of that option.
    """
    return _OPTIONS.parse(name, text)


def override_faults(pattern: Any, settings: Any) -> list[str]:
    """Return what is wrong with the settings of one pattern."""
    label = f"override {pattern!r}"
    if not isinstance(pattern, str) or not pattern.strip():
        return [f"{label}: the pattern must be a text that matches module names, for example '*.down_proj'"]
    if not isinstance(settings, Mapping) or not settings:
        return [f"{label}: settings are needed, out of {joined_names(OVERRIDE_KEYS)}"]
    faults = []
    for key, value in settings.items():
        if key not in OVERRIDE_KEYS:
            faults.append(
                f"{label}: {key!r} is unknown{near(str(key), OVERRIDE_KEYS)}; allowed are {joined_names(OVERRIDE_KEYS)}"
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


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
