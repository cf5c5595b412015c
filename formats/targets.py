"""What each engine reads at which version, and the preflight of an export: the rules are data, in targets.yaml.

`python -m cloq_export.formats.targets --into docs/targets.md` renders the table into its page again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import functools
import itertools
import re
import string
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from cloq_export.errors import UsageError
from cloq_export.files.atomic import write_bytes

if TYPE_CHECKING:
    # QuantSpec lives beside tensors; this module itself needs no torch.
    from cloq_export.types import QuantSpec

Checked = Literal["run", "read"]
Device = Literal["cpu", "cuda"]
Provider = Literal["stock", "cloq_plugin"]
OwnGrids = Literal["parts", "all", "unfused", "none"]
Specs = Mapping[str, "QuantSpec"]
Shapes = Mapping[str, tuple[int, int]]

DEVICES: tuple[Device, ...] = ("cpu", "cuda")
MERGED = "merged"

_BITS = (2, 3, 4, 8)
_DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}
_OWN_GRIDS = {"parts": "yes, also in fused layers", "all": "yes", "unfused": "not in fused layers", "none": "no"}
# Engines with `fused` compute these projections of one parent as one layer.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_TARGET = re.compile(r"(?P<name>[\w.-]+?)(==(?P<version>\d+(\.\d+)*)([.+]?[a-z][\w.+]*)?)?")
_PATH = re.compile(r"[\w./:@+~ -]+")
_BEGIN, _END = "<!-- targets table: begin -->", "<!-- targets table: end -->"


@dataclasses.dataclass(frozen=True)
class Target:
    """The engine that an export is made for.

    Args:
        name: of the engine, as in `--target`.
        version: as the table lists it, so with the patch number left out where it does not matter; None asks for what
            every version of the table reads.
    """

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}=={self.version}"


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """One line of the table: grids in a layout that an engine reads on a device.

    Args:
        target: the engine.
        layouts: the layouts that the line holds for.
        devices: the devices that it holds for.
        versions: version of the engine -> how the line was checked there: run (loaded, and its logits compared with
            the same weights as plain floats, on this device) or read (in the source).
        bits: allowed widths; None means any.
        symmetric: allowed values of `QuantSpec.symmetric`.
        group_sizes: allowed group sizes, -1 for one group per output channel; None means any.
        inputs: a layer's inputs must be a multiple of this.
        outputs: a layer's outputs must be a multiple of this.
        own_grids: which modules may have another grid than the most common one: parts (all, and those that the engine
            computes as one layer need not agree), all (if those agree), unfused (those that it does not compute as one
            layer with others) or none.
        kernel: what computes from the codes.
        provider: stock, or cloq_plugin where this package must be installed beside the engine.
        needs: other packages that must be installed.
        snippet: how it is loaded, a key of the table's snippets.
        source: package, file and name in which the line was read.
        note: what a user must know beside it.
    """

    target: str
    layouts: tuple[str, ...]
    devices: tuple[Device, ...]
    versions: Mapping[str, Checked]
    bits: tuple[int, ...] | None
    symmetric: tuple[bool, ...]
    group_sizes: tuple[int, ...] | None
    inputs: int
    outputs: int
    own_grids: OwnGrids
    kernel: str
    provider: Provider
    needs: tuple[str, ...]
    snippet: str
    source: str
    note: str


@dataclasses.dataclass(frozen=True)
class AdapterRule:
    """Which LoRA adapters an engine takes.

    Args:
        ranks: the values that its option for the largest rank takes; None means any.
        patterns: whether modules of one adapter may have ranks of their own.
        versions: as in `Rule`.
        source: as in `Rule`.
        note: as in `Rule`.
    """

    ranks: tuple[int, ...] | None
    patterns: bool
    versions: Mapping[str, Checked]
    source: str
    note: str


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine of the table.

    Args:
        name: as in `--target`.
        title: as people write it.
        version_parts: how many numbers of a version matter.
        versions: the versions that were looked at, oldest first.
        layouts: what it reads at all, best first.
        fused: whether it computes q, k, v and gate, up as one layer each, which then need one grid.
        adapters: which adapters it takes.
    """

    name: str
    title: str
    version_parts: int
    versions: tuple[str, ...]
    layouts: tuple[str, ...]
    fused: bool
    adapters: AdapterRule


@dataclasses.dataclass(frozen=True)
class Snippet:
    """How an export is loaded, without and with its adapter."""

    plain: str
    adapter: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Everything that targets.yaml says."""

    engines: Mapping[str, Engine]
    rules: tuple[Rule, ...]
    snippets: Mapping[str, Snippet]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the preflight allows.

    Args:
        target: the engine.
        layout: the layout to write.
        devices: where it can then be run.
        rules: the lines of the table that say so.
        notes: what a user must know, one sentence each.
        max_lora_rank: the value for the engine's option of that name; None without adapters or such an option.
        pad_rank: the rank to which adapters must be padded; None if they need not.
    """

    target: Target
    layout: str
    devices: tuple[Device, ...]
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    max_lora_rank: int | None = None
    pad_rank: int | None = None


@functools.cache
def read_table() -> Table:
    """Return the table of targets.yaml."""
    raw = yaml.safe_load(Path(__file__).with_name("targets.yaml").read_text(encoding="utf-8"))
    engines = {name: _engine(name, fields) for name, fields in raw["targets"].items()}
    snippets = {name: Snippet(**fields) for name, fields in raw["snippets"].items()}
    return Table(engines, tuple(_rule(fields) for fields in raw["rules"]), snippets)


def parse_target(text: str) -> Target:
    """Return the target that a text like `vllm==0.32` or `transformers` names.

    Args:
        text: name of an engine, alone or with `==` and a version; a patch number that does not matter is left out.

    Raises:
        UsageError: the engine or its version is not in the table.
    """
    engines = read_table().engines
    match = _TARGET.fullmatch(text.strip())
    name = match["name"].lower() if match else re.split(r"[^\w.-]", text.strip(), maxsplit=1)[0].lower()
    if match is None or name not in engines:
        nearest = ""
        if close := difflib.get_close_matches(name, list(engines), n=1, cutoff=0.4):
            asked = next((version for version in engines[close[0]].versions if version in text), None)
            nearest = f" Did you mean {Target(close[0], asked)}?"
        known = ", ".join(f"{engine.name} ({_span(engine.versions)})" for engine in engines.values())
        raise UsageError(f"target {text!r} is unknown; give a name or NAME==VERSION of: {known}.{nearest}")
    engine = engines[name]
    if match["version"] is None:
        return Target(name)
    parts = match["version"].split(".")
    version = ".".join(parts[: engine.version_parts])
    if version not in engine.versions:
        later = [known for known in engine.versions if _numbers(known) > _numbers(version)]
        raise UsageError(
            f"what {name} {match['version']} reads is not known; known are {', '.join(engine.versions)}. The nearest "
            f"is --target {name}=={(later or engine.versions[-1:])[0]}."
        )
    return Target(name, version)


def preflight(
    target: Target,
    *,
    specs: Specs,
    shapes: Shapes,
    layout: str | None = None,
    device: str = "any",
    ranks: Collection[int] = (),
    plugin: bool = False,
) -> Decision:
    """Choose the layout in which a target reads a checkpoint, or check one.

    A plain 16-bit export is never chosen by itself, because it gives up what quantization was for.

    Args:
        target: the engine.
        specs: quantized module -> its grid, at least one.
        shapes: module -> (out, in), of every quantized module; the linear modules that stay float should stand there
            too, because some engines read only checkpoints without any.
        layout: the layout to check; None chooses the best.
        device: cpu, cuda, or any for a layout that runs on at least one of them.
        ranks: the ranks that occur in the adapters that will be used.
        plugin: whether this package is installed beside the engine.

    Returns:
        Layout, devices, the rules that allow it, and what a user must know.

    Raises:
        UsageError: the target cannot read this; the message names the reason and the nearest choice that works.
    """
    engine = read_table().engines[target.name]
    if device not in ("any", *DEVICES):
        raise UsageError(f"device {device!r} is unknown; allowed are any, {' and '.join(DEVICES)}.")
    if not specs:
        raise UsageError("there is no quantized module to export; the recipe skips all of them.")
    missing = sorted(set(specs) - set(shapes))
    if missing:
        raise UsageError(f"the shape of {missing[0]} is not known; give the shape of every quantized module.")
    versions = engine.versions if target.version is None else (target.version,)
    devices = DEVICES if device == "any" else tuple(known for known in DEVICES if known == device)
    question = _Question(engine, versions, dict(specs), dict(shapes), plugin)
    wanted = [known for known in engine.layouts if known != MERGED] if layout is None else [layout]
    fitting = []
    for place, name in enumerate(wanted):
        found = {where: rules for where in devices if not isinstance(rules := question.answer(name, where), str)}
        if found:
            fitting.append((-len(found), place, name, found))
    if not fitting:
        raise UsageError(_refusal(target, question, layout, devices))
    _, _, chosen, found = min(fitting, key=lambda fit: fit[:2])
    rules = tuple(dict.fromkeys(rule for used in found.values() for rule in used))
    max_lora_rank, pad_rank, adapter_notes = _check_ranks(target, engine, ranks)
    notes = (*_notes(engine, versions, found), *adapter_notes)
    return Decision(target, chosen, tuple(found), rules, notes, max_lora_rank, pad_rank)


def load_snippets(
    layout: str,
    specs: Specs,
    *,
    shapes: Shapes,
    ranks: Collection[int] = (),
    plugin: bool = False,
    folder: str = "PATH/TO/EXPORT",
    adapter: str = "PATH/TO/ADAPTER",
) -> list[dict[str, str]]:
    """Return how an export is loaded in each engine that reads it, for its model card.

    Args:
        layout: the layout of the export.
        specs: quantized module -> its grid.
        shapes: module -> (out, in).
        ranks: the ranks that occur in its adapter; empty without one.
        plugin: whether engines with this package beside them count.
        folder: path or hub id of the export, as the snippets shall name it.
        adapter: path or hub id of the adapter, likewise.

    Returns:
        One entry per engine and way to load: engine, version, device, needs, language and snippet.

    Raises:
        UsageError: a path holds characters that would need quoting.
    """
    for path in (folder, adapter):
        if _PATH.fullmatch(path) is None:
            raise UsageError(f"the path {path!r} holds characters that need quoting in a snippet; use a plain name.")
    table = read_table()
    entries: list[dict[str, str]] = []
    for engine in table.engines.values():
        # (snippet, needs, device) -> the versions in which it works.
        works: dict[tuple[str, tuple[str, ...], Device], list[str]] = collections.defaultdict(list)
        for device, version in itertools.product(DEVICES, engine.versions):
            rules = _Question(engine, (version,), dict(specs), dict(shapes), plugin).answer(layout, device)
            if not isinstance(rules, str):
                # Of two ways to load, the one further down in the table also takes what the one above it takes.
                snippet = max(rules, key=table.rules.index).snippet
                works[snippet, _needs(rules), device].append(version)
        places: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[Device]] = collections.defaultdict(list)
        for (snippet, needs, device), read_by in works.items():
            places[snippet, needs, tuple(read_by)].append(device)
        for (name, needs, versions), devices in places.items():
            with_adapter = bool(ranks) and _allowed_rank(engine.adapters, max(ranks)) is not None
            code = table.snippets[name].adapter if with_adapter else table.snippets[name].plain
            rank = _allowed_rank(engine.adapters, max(ranks)) if with_adapter else None
            entries.append(
                {
                    "engine": engine.title,
                    "version": _span(versions),
                    "device": ", ".join(_DEVICE_NAMES[device] for device in devices),
                    "needs": ", ".join(needs),
                    "language": "sh" if code.startswith("python -m") else "python",
                    "snippet": string.Template(code).substitute(folder=folder, adapter=adapter, rank=rank).rstrip(),
                }
            )
    return entries


def table_markdown() -> str:
    """Return the table as markdown, one part per engine."""
    table = read_table()
    sources: dict[str, int] = {}
    lines: list[str] = []
    for engine in table.engines.values():
        lines += [
            f"## {engine.title}",
            "",
            "| layout | bits | grid | group size | inputs, outputs divisible by | own grids | device | kernel | needs "
            "| versions | source, note |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        shown = [rule for rule in table.rules if rule.target == engine.name]
        for rule in shown:
            number = sources.setdefault(rule.source, len(sources) + 1)
            cells = (
                ", ".join(rule.layouts),
                _list(rule.bits),
                "symmetric or not" if len(rule.symmetric) == 2 else "symmetric" if rule.symmetric[0] else "asymmetric",
                _list(rule.group_sizes),
                "any" if rule.inputs == rule.outputs == 1 else f"{rule.inputs}, {rule.outputs}",
                _OWN_GRIDS[rule.own_grids],
                ", ".join(_DEVICE_NAMES[device] for device in rule.devices),
                rule.kernel,
                ", ".join(f"`{need}`" for need in rule.needs) or "nothing",
                _checked(engine, rule.versions),
                f"[{number}]" + (f" {rule.note}" if rule.note else ""),
            )
            lines.append(f"| {' | '.join(cells)} |")
        adapters = engine.adapters
        number = sources.setdefault(adapters.source, len(sources) + 1)
        allowed = "any rank" if adapters.ranks is None else f"ranks up to {max(adapters.ranks)}"
        own = "modules may have ranks of their own" if adapters.patterns else "one rank in all modules"
        about = f"Adapters: {allowed}; {own}; {adapters.note} ({_checked(engine, adapters.versions)}; [{number}])."
        lines += ["", about, ""]
    lines += ["## Sources", ""]
    lines += [f"{number}. {source}" for source, number in sources.items()]
    return "\n".join(lines) + "\n"


def render_into(path: Path) -> None:
    """Write the table between the markers of a page.

    Raises:
        UsageError: the page has no markers.
        RunDirectoryError: it cannot be written.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UsageError(f"{path} lacks the lines {_BEGIN} and {_END}; put them where the table belongs.")
    write_bytes(path, f"{before}{begin}\n\n{table_markdown()}\n{end}{after}".encode())


class _Question:
    """A checkpoint put to some versions of an engine."""

    def __init__(
        self, engine: Engine, versions: Sequence[str], specs: Mapping[str, QuantSpec], shapes: Shapes, plugin: bool
    ) -> None:
        self.engine, self.versions, self.specs, self.shapes, self.plugin = engine, versions, specs, shapes, plugin
        counts = collections.Counter(specs.values())
        # The grid that the GPTQ layouts write as the default; every other one is an override there.
        self.default = min(counts, key=lambda spec: (-counts[spec], spec.bits, spec.group_size, spec.symmetric))
        self.fused = tuple(_fused_layers(shapes)) if engine.fused else ()
        # Layers of one shape and grid get one answer.
        self.kinds: dict[tuple[QuantSpec, tuple[int, int]], str] = {}
        for module, spec in specs.items():
            self.kinds.setdefault((spec, shapes[module]), module)

    def with_specs(self, specs: Mapping[str, QuantSpec]) -> _Question:
        """Return the same question about other grids."""
        return _Question(self.engine, self.versions, specs, self.shapes, self.plugin)

    def answer(self, layout: str, device: Device) -> tuple[Rule, ...] | str:
        """Return the rules that allow a layout on a device in every version, or the reason against it."""
        used: list[Rule] = []
        for version in self.versions:
            found = self._answer_for(version, layout, device)
            if isinstance(found, str):
                return found
            used += found
        return tuple(dict.fromkeys(used))

    def works(self, layout: str, devices: Iterable[Device]) -> bool:
        """Return whether a layout is read on one of the devices at least."""
        return any(not isinstance(self.answer(layout, device), str) for device in devices)

    def _answer_for(self, version: str, layout: str, device: Device) -> list[Rule] | str:
        where = f"{layout} on {_DEVICE_NAMES[device]}"
        rules = [
            rule
            for rule in read_table().rules
            if rule.target == self.engine.name
            and version in rule.versions
            and layout in rule.layouts
            and device in rule.devices
            and (rule.provider == "stock" or self.plugin)
        ]
        if not rules:
            return f"does not read {where}"
        if layout != MERGED and (reason := self._mixed_fused_layer()):
            rules = [] if self._partly_float() else [rule for rule in rules if rule.own_grids == "parts"]
            if not rules:
                return reason
        used: list[Rule] = []
        for (spec, (outputs, inputs)), module in self.kinds.items():
            fitting = [rule for rule in rules if rule.bits is None or spec.bits in rule.bits]
            if not fitting:
                known = sorted({bits for rule in rules for bits in rule.bits or _BITS})
                return f"has no kernel for {spec.bits} bits in {where} (it has one for {_listed(known)})"
            wider = fitting
            fitting = [rule for rule in wider if spec.symmetric in rule.symmetric]
            if not fitting:
                only = "symmetric" if wider[0].symmetric[0] else "asymmetric"
                return f"reads {spec.bits} bits in {where} only {only}"
            wider = fitting
            fitting = [rule for rule in wider if rule.group_sizes is None or spec.group_size in rule.group_sizes]
            if not fitting:
                sizes = sorted({size for rule in wider for size in rule.group_sizes or ()})
                return f"reads {spec.bits} bits in {where} with group size {_listed(sizes)}, not {spec.group_size}"
            wider = fitting
            fitting = [rule for rule in wider if inputs % rule.inputs == 0 and outputs % rule.outputs == 0]
            if not fitting:
                return (
                    f"needs inputs in multiples of {wider[0].inputs} and outputs in multiples of {wider[0].outputs} "
                    f"for {where}, and {module} has {inputs} inputs and {outputs} outputs"
                )
            wider = fitting
            fitting = [rule for rule in wider if self._own_grids_fit(rule)]
            if not fitting:
                return self._own_grids_reason(wider[0], where)
            used.append(fitting[0])
        return used

    def _mixed_fused_layer(self) -> str | None:
        for names in self.fused:
            grids = list(dict.fromkeys(self.specs.get(name) for name in names))
            if len(grids) > 1:
                return (
                    f"computes {_listed([name.rpartition('.')[2] for name in names])} as one layer with one grid, and "
                    f"{names[0].rpartition('.')[0]} has {_listed([_grid(spec) for spec in grids])} there"
                )
        return None

    def _partly_float(self) -> bool:
        return any(len({name in self.specs for name in names}) > 1 for names in self.fused)

    def _own_grids_fit(self, rule: Rule) -> bool:
        return rule.own_grids in ("parts", "all") or not self._own_grids(fused_only=rule.own_grids == "unfused")

    def _own_grids(self, *, fused_only: bool) -> list[str]:
        considered: Iterable[str] = itertools.chain.from_iterable(self.fused) if fused_only else self.shapes
        return [name for name in considered if self.specs.get(name) != self.default]

    def _own_grids_reason(self, rule: Rule, where: str) -> str:
        name = self._own_grids(fused_only=rule.own_grids == "unfused")[0]
        limit = "the modules that it fuses" if rule.own_grids == "unfused" else "all modules"
        return (
            f"reads one grid for {limit} in {where}, and {name} has {_grid(self.specs.get(name))} where most "
            f"have {_grid(self.default)}"
        )


def _refusal(target: Target, question: _Question, layout: str | None, devices: Sequence[Device]) -> str:
    if layout is not None and layout not in (known := _layouts()):
        close = difflib.get_close_matches(layout, known, n=1)
        return f"layout {layout!r} is unknown; allowed are {', '.join(known)}." + (
            f" Did you mean {close[0]}?" if close else ""
        )
    named = layout if layout is not None else question.engine.layouts[0]
    reasons = {f" on {_DEVICE_NAMES[device]}": str(question.answer(named, device)) for device in devices}
    if len({reason.replace(where, "") for where, reason in reasons.items()}) == 1:
        where, reason = next(iter(reasons.items()))
        reasons = {"": reason.replace(where, " on " + " or ".join(_DEVICE_NAMES[device] for device in devices))}
    reason = f"{target} {'; it '.join(reasons.values())}"
    choices = [
        _nearest(question, layout, devices),
        f"--format {MERGED}" if layout != MERGED and question.works(MERGED, devices) else None,
    ]
    quantized = [name for name in question.engine.layouts if name != MERGED]
    for device in DEVICES:
        if device not in devices:
            names = sorted(quantized, key=lambda name: name != layout)
            found = next((name for name in names if question.works(name, [device])), None)
            choices.append(found and f"--format {found} on {_DEVICE_NAMES[device]}")
    works = list(dict.fromkeys(choice for choice in choices if choice is not None))
    if not works:
        return f"{reason}; nothing near it works: choose another target, or none."
    return f"{reason}; the nearest that works: {', or '.join(works)}."


def _nearest(question: _Question, layout: str | None, devices: Sequence[Device]) -> str | None:
    """Return the options that change least and pass: layout first, then group size, symmetry, and bits last."""
    engine, specs, default = question.engine, question.specs, question.default
    rules = [rule for rule in read_table().rules if rule.target == engine.name]
    known = {size for rule in rules for size in rule.group_sizes or () if size > 0}
    inputs = {question.shapes[module][1] for module in specs}
    sizes = [size for size in sorted(known) if all(count % size == 0 for count in inputs)]
    changes: list[tuple[float, dict[str, Any], bool, str]] = []
    for bits, flip, size, uniform, (place, name) in itertools.product(
        (None, *_BITS),
        (False, True),
        (None, *sizes, -1),
        (False, True) if len(set(specs.values())) > 1 else (False,),
        enumerate(name for name in engine.layouts if name != MERGED),
    ):
        grid: dict[str, Any] = {}
        cost = 0.0 if name == layout else 1 + place / 10
        cost += 3 * uniform
        if size is not None:
            grid["group_size"] = size
            cost += 4 + abs(_size_order(size) - _size_order(default.group_size)) / 10
        if flip:
            grid["symmetric"] = not default.symmetric
            cost += 6
        if bits is not None:
            grid["bits"] = bits
            # More bits never cost accuracy, so they come before fewer.
            steps = _BITS.index(bits) - _BITS.index(default.bits)
            cost += 8 + (steps if steps >= 0 else 0.5 - steps)
        changes.append((cost, grid, uniform, name))
    for _, grid, uniform, name in sorted(changes, key=lambda change: change[0]):
        changed = {module: dataclasses.replace(default if uniform else spec, **grid) for module, spec in specs.items()}
        if not question.with_specs(changed).works(name, devices):
            continue
        words = ["one grid for all modules"] if uniform else []
        if "bits" in grid:
            words.append(f"--bits {grid['bits']}")
        if "group_size" in grid:
            words.append(f"--group-size {grid['group_size']}")
        if "symmetric" in grid:
            words.append("--symmetric" if grid["symmetric"] else "--asymmetric")
        return " ".join([*words, f"--format {name}"])
    return None


def _check_ranks(
    target: Target, engine: Engine, ranks: Collection[int]
) -> tuple[int | None, int | None, tuple[str, ...]]:
    if not ranks:
        return None, None, ()
    if min(ranks) < 1:
        raise UsageError(f"an adapter has rank {min(ranks)}; a rank is 1 or more.")
    adapters = engine.adapters
    largest = max(ranks)
    allowed = _allowed_rank(adapters, largest)
    if allowed is None:
        limit = max(adapters.ranks or ())
        raise UsageError(f"an adapter has rank {largest}; {target} takes up to {limit}: make it with --rank {limit}.")
    notes = []
    option = "--max-lora-rank" in adapters.note
    if option:
        notes.append(f"adapters of rank {largest} need --max-lora-rank {allowed} in {engine.title}")
    pad_rank = None
    if not adapters.patterns and len(set(ranks)) > 1:
        pad_rank = largest
        notes.append(
            f"{engine.title} takes one rank in all modules of an adapter: write adapters with --pad-rank {pad_rank}"
        )
    return allowed if option else None, pad_rank, tuple(notes)


def _allowed_rank(adapters: AdapterRule, rank: int) -> int | None:
    """Return the smallest value of the engine's option that takes a rank, or None."""
    return rank if adapters.ranks is None else min((value for value in adapters.ranks if value >= rank), default=None)


def _notes(engine: Engine, versions: Sequence[str], found: Mapping[Device, tuple[Rule, ...]]) -> tuple[str, ...]:
    # Note -> the devices that it holds for.
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for device, rules in found.items():
        own = []
        if any(rule.provider == "cloq_plugin" for rule in rules):
            own.append(f"needs cloq-export installed in the same environment as {engine.title}")
        if others := [need for need in _needs(rules) if need != "cloq-export"]:
            own.append(f"needs {_listed(others)} beside {engine.title}")
        own += [rule.note for rule in rules if rule.note]
        if all(rule.versions.get(version, "read") == "read" for rule in rules for version in versions):
            own.append(f"known from the source of {engine.title}, not run")
        for note in dict.fromkeys(own):
            notes[note].append(_DEVICE_NAMES[device])
    return tuple(f"on {_listed(devices)}: {note}" for note, devices in notes.items())


def _needs(rules: Iterable[Rule]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(need for rule in rules for need in rule.needs))


def _fused_layers(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    parents: dict[str, set[str]] = collections.defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition(".")
        parents[parent].add(last)
    for parent, lasts in parents.items():
        for fused in _FUSED:
            if len(members := [last for last in fused if last in lasts]) > 1:
                yield tuple(f"{parent}.{last}" if parent else last for last in members)


def _engine(name: str, fields: Mapping[str, Any]) -> Engine:
    adapters = dict(fields["adapters"])
    adapters["ranks"] = _any_or_tuple(adapters["ranks"])
    values = {**fields, "adapters": AdapterRule(**adapters)}
    return Engine(name=name, **{**values, "versions": tuple(fields["versions"]), "layouts": tuple(fields["layouts"])})


def _rule(fields: Mapping[str, Any]) -> Rule:
    values = dict(fields)
    multiple = values.pop("multiple_of", {"inputs": 1, "outputs": 1})
    return Rule(
        layouts=_tuple(values.pop("layout")),
        devices=_tuple(values.pop("device")),
        bits=_any_or_tuple(values.pop("bits")),
        symmetric=tuple(values.pop("symmetric")),
        group_sizes=_any_or_tuple(values.pop("group_sizes")),
        provider=values.pop("provider", "stock"),
        needs=tuple(values.pop("needs", ())),
        note=values.pop("note", ""),
        inputs=multiple["inputs"],
        outputs=multiple["outputs"],
        **values,
    )


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _any_or_tuple(value: Any) -> tuple[Any, ...] | None:
    return None if value == "any" else tuple(value)


def _layouts() -> list[str]:
    return list(dict.fromkeys(name for engine in read_table().engines.values() for name in engine.layouts))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _size_order(size: int) -> float:
    # One group per channel is as good as a very large group.
    return 16 if size == -1 else size.bit_length()


def _grid(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    return f"{spec.bits}-bit {'symmetric' if spec.symmetric else 'asymmetric'} group {spec.group_size}"


def _list(values: Sequence[int] | None) -> str:
    return "any" if values is None else ", ".join(str(value) for value in values)


def _listed(values: Iterable[object]) -> str:
    *first, last = (str(value) for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def _span(versions: Sequence[str]) -> str:
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"


def _checked(engine: Engine, versions: Mapping[str, Checked]) -> str:
    known = [version for version in engine.versions if version in versions]
    alike = itertools.groupby(known, key=lambda version: versions[version])
    return ", ".join(f"{_span(list(names))} {checked}" for checked, names in alike)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m cloq_export.formats.targets", description=__doc__)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="the page to write the table into, at its markers")
    page: Path | None = parser.parse_args(arguments).into
    if page is None:
        sys.stdout.write(table_markdown())
    else:
        render_into(page)


if __name__ == "__main__":
    main()
