"""adapter_config.json: written under exact names, and read by the rules of PEFT."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from cloq_export.errors import FormatError
from cloq_export.formats.patterns import NamePattern, PatternBudget
from cloq_export.formats.peft.stacked import StackedPair
from cloq_export.types import LoraPair

# PEFT's other initialisations change the base weights when an adapter is loaded; these only set A and B.
_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Options that say where an adapter belongs, how it was trained, or what is read here; any value will do, or is checked.
_KNOWN_OPTIONS = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_rslora",
    )
)
_VARIANT = re.compile(r"(kasa|monteclora|velora|arrow|megatron)_config|layer_replication|use_bdlora")
_LARGEST = 1e9
_PLAIN_PATTERN = re.compile(r"(?P<start>\^?)(?P<name>(?:[\w.\-]|\\[.\-])+)\$?", re.ASCII)
_PATTERN_OPTIONS = ("rank_pattern", "alpha_pattern")
_MOST_PATTERNS = 100_000


def adapter_config(
    pairs: Mapping[str, LoraPair | StackedPair], base_model: str, *, parameters: Container[str] = ()
) -> dict[str, Any]:
    """Return the adapter_config.json of pairs, under exact names; SPEC.md section 3.

    Args:
        pairs: full name of a module or parameter -> LoRA pair, at least one.
        base_model: name or path of the model that the base was made from.
        parameters: names among these that are parameters.
    """
    by_parameter = sorted(name for name in pairs if name in parameters)
    # PEFT warns of patterns that match parameters alone, although it follows them: these have the common values.
    counted = [pairs[name] for name in by_parameter] or list(pairs.values())
    ranks = collections.Counter(pair.rank for pair in counted)
    alphas = collections.Counter(pair.alpha for pair in counted)
    rank = min(ranks, key=lambda value: (-ranks[value], value))
    alpha = min(alphas, key=lambda value: (-alphas[value], value))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(name for name in pairs if name not in parameters),
        **({"target_parameters": by_parameter} if by_parameter else {}),
        "rank_pattern": _patterns({name: pair.rank for name, pair in pairs.items()}, rank),
        "alpha_pattern": _patterns({name: _number(pair.alpha) for name, pair in pairs.items()}, _number(alpha)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    # Readers match a key as a suffix at a dot and take the first that matches. So a module whose name ends with a
    # listed one is listed too, and longer names come first: then each module meets its own entry before any other.
    listed = {name for name, value in values.items() if value != default}
    listed |= {name for name in values if any(name.endswith(f".{other}") for other in listed)}
    return {name: values[name] for name in sorted(listed, key=lambda name: (-len(name), name))}


def _number(value: float) -> float:
    # vLLM and PEFT declare lora_alpha as an integer; neither refuses another number.
    return int(value) if float(value).is_integer() else float(value)


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter_config.json that says more than plain LoRA.

    Raises:
        FormatError: it does; the message names the option.
    """
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{source}: peft_type is {config.get('peft_type')!r:.80}; only 'LORA' is read.")
    for option, allowed in (("bias", ("none", None)), ("modules_to_save", (None, []))):
        if config.get(option) not in allowed:
            raise FormatError(f"{source}: {option} is {config[option]!r:.80}; only plain LoRA matrices are read.")
    for option, value in config.items():
        if option in _KNOWN_OPTIONS or value is None or value is False:
            continue
        # An empty value is what an option unknown here starts with; a variant's own object is a variant even if empty.
        if value in ("", [], {}) and _VARIANT.fullmatch(option) is None:
            continue
        named = option[:80] if option.isprintable() else repr(option)[:80]
        raise FormatError(
            f"{source}: {named} is {value!r:.80}; only plain LoRA is read, and this changes what a pair means, or is "
            "not known here."
        )
    if config.get("init_lora_weights", True) not in _HARMLESS_INITIALISATIONS:
        raise FormatError(
            f"{source}: init_lora_weights is {config['init_lora_weights']!r:.80}, which changes the base weights; "
            "convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        )
    parameters = config.get("target_parameters") or []
    if not (isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)):
        raise FormatError(f"{source}: target_parameters is {parameters!r:.80}; expected a list of names.")
    for option in _PATTERN_OPTIONS:
        patterns = config.get(option) or {}
        if not isinstance(patterns, Mapping):
            raise FormatError(f"{source}: {option} is a {type(patterns).__name__}; expected an object.")
        for pattern, value in patterns.items():
            if not _is_number(value):
                raise FormatError(f"{source}: {option} maps {pattern[:80]!r} to {value!r:.80}; expected a number.")
        if len(patterns) > _MOST_PATTERNS:
            raise FormatError(f"{source}: {option} has {len(patterns)} keys; {_MOST_PATTERNS} are the most.")
    if not _is_number(config.get("r")) or not _is_number(config.get("lora_alpha")):
        raise FormatError(
            f"{source}: r is {config.get('r')!r:.80} and lora_alpha {config.get('lora_alpha')!r:.80}; expected numbers."
        )


def _is_number(value: Any) -> bool:
    # Compared first: a whole number beyond every float is none that math takes.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def refuse_unlisted(config: Mapping[str, Any], modules: Iterable[str], source: str) -> None:
    """Refuse pairs of modules that adapter_config.json leaves out: PEFT passes over them, and other readers do not.

    The rules are PEFT's (`check_target_module_exists`): a text is a regular expression for the whole name, a list holds
    names or their ends behind a dot, and layers are counted where names are given by their ends.

    Args:
        config: content of adapter_config.json, checked.
        modules: full names of the modules that have a pair.
        source: the file, for messages.

    Raises:
        FormatError: one is left out, or a pattern is not read.
    """
    budget = PatternBudget(source)
    targets, excluded = (_NameList.of(config.get(option), budget) for option in ("target_modules", "exclude_modules"))
    layers = config.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers or []
    for module in modules:
        option = None
        if excluded is not None and excluded.holds(module):
            option = "exclude_modules"
        elif targets is not None and not targets.holds(module):
            option = "target_modules"
        elif numbers and (targets is None or module not in targets.names) and _layer_of(module, config) not in numbers:
            option = "layers_to_transform"
        if option is not None:
            raise FormatError(
                f"{source}: {option} leaves out {module:.200}, for which the adapter holds a pair: PEFT would pass "
                f"over it, and other readers would not. Correct {option}, or save the adapter again with PEFT."
            )


@dataclasses.dataclass(frozen=True)
class _NameList:
    """Modules as `target_modules` names them: by names and their ends, or by one pattern."""

    names: frozenset[str]
    pattern: NamePattern | None

    @classmethod
    def of(cls, value: Any, budget: PatternBudget) -> _NameList | None:
        if isinstance(value, str) and value and value.lower() != "all-linear":
            return cls(frozenset(), NamePattern(f"({value})$", source=budget.source, budget=budget))
        if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
            return cls(frozenset(value), None)
        return None

    def holds(self, module: str) -> bool:
        if self.pattern is not None:
            return self.pattern.matches(module)
        ends = [module, *(module[index + 1 :] for index, sign in enumerate(module) if sign == ".")]
        return not self.names.isdisjoint(ends)


def _layer_of(module: str, config: Mapping[str, Any]) -> int | None:
    """Return the number of a module's layer: the first behind a name in `layers_pattern`, or behind any inner name."""
    patterns = config.get("layers_pattern") or []
    parts = module.split(".")
    numbered = [place for place in range(1, len(parts) - 1) if parts[place].isdecimal()]
    if not patterns:
        return next((int(parts[place]) for place in numbered if place > 1), None)
    names = [patterns] if isinstance(patterns, str) else patterns
    return next((int(parts[place]) for name in names for place in numbered if parts[place - 1] == name), None)


class RanksAndAlphas:
    """Ranks and alphas of modules, by the rule of PEFT: a key is a regular expression behind a dot or at the start.

    Args:
        config: content of adapter_config.json, checked.
        source: the file, for messages.
    """

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config = config
        budget = PatternBudget(source)
        self._patterns = {option: _Patterns(config.get(option) or {}, budget) for option in _PATTERN_OPTIONS}

    def rank_and_alpha(self, module: str) -> tuple[float, float]:
        """Return the rank of a module, and the alpha that gives its scaling as alpha / rank."""
        rank = self._patterns["rank_pattern"].value(module, self._config["r"])
        alpha = float(self._patterns["alpha_pattern"].value(module, self._config["lora_alpha"]))
        if self._config.get("use_rslora"):
            # rsLoRA scales by alpha / sqrt(rank) where LoRA scales by alpha / rank.
            alpha *= math.sqrt(rank)
        return rank, alpha


class _Patterns:
    """Numbers by pattern, of which the first that matches counts.

    A key for each of thousands of modules is common. So keys of plain characters are looked up and not compared one by
    one, but as the regular expressions that they are: a dot that is not escaped stands for any character.

    Args:
        patterns: pattern -> number.
        budget: of the file.
    """

    def __init__(self, patterns: Mapping[str, float], budget: PatternBudget) -> None:
        self._budget = budget
        self._values = list(patterns.values())
        self._general: list[tuple[int, NamePattern]] = []
        # (length, whole name or its end) -> the places of dots that keys of this length have.
        self._dots: dict[tuple[int, bool], set[tuple[int, ...]]] = collections.defaultdict(set)
        self._plain: dict[tuple[bool, tuple[int, ...], str], int] = {}
        for place, pattern in enumerate(patterns):
            plain = _PLAIN_PATTERN.fullmatch(pattern)
            if plain is None:
                compiled = NamePattern(rf"(.*\.)?({pattern})$", source=budget.source, budget=budget)
                self._general.append((place, compiled))
                continue
            whole = bool(plain["start"])
            characters = re.findall(r"\\.|.", plain["name"])
            dots = tuple(index for index, character in enumerate(characters) if character == ".")
            self._dots[len(characters), whole].add(dots)
            text = _without("".join(character[-1] for character in characters), dots)
            self._plain.setdefault((whole, dots, text), place)

    def value(self, module: str, default: float) -> float:
        """Return the number of a module."""
        starts = [0, *(index + 1 for index, character in enumerate(module) if character == ".")]
        places = [place for start in starts for place in self._ending(module[start:], whole=start == 0)]
        first = next((place for place, pattern in self._general if pattern.matches(module)), None)
        if first is not None:
            places.append(first)
        return self._values[min(places)] if places else default

    def _ending(self, end: str, *, whole: bool) -> Iterator[int]:
        """Yield the places of the plain keys that match a name, or the end of one behind a dot."""
        for anchored in (False, True) if whole else (False,):
            known = self._dots.get((len(end), anchored), ())
            self._budget.spend(len(known), end)
            for dots in known:
                place = self._plain.get((anchored, dots, _without(end, dots)))
                if place is not None:
                    yield place


def _without(text: str, places: tuple[int, ...]) -> str:
    return "".join(character for index, character in enumerate(text) if index not in places)
