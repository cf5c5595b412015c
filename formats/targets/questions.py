"""What one engine makes of one checkpoint, rule by rule."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cloq_export.formats.targets.table import DEVICE_NAMES, MERGED, Device, Engine, Exported, Rule, listed, read_table

if TYPE_CHECKING:
    # QuantSpec lives beside tensors; this module itself needs no torch.
    from cloq_export.types import QuantSpec


BITS = (2, 3, 4, 8)
# Engines with `fused` compute these projections of one parent as one layer.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class TargetQuestion:
    """A checkpoint put to some versions of an engine."""

    def __init__(self, engine: Engine, versions: Sequence[str], exported: Exported) -> None:
        self.engine, self.versions, self.exported = engine, versions, exported
        self.specs, self.shapes = specs, shapes = exported.specs, exported.shapes
        looked_up = set(exported.embeddings)
        counts = collections.Counter(spec for module, spec in specs.items() if module not in looked_up)
        # The grid that the GPTQ layouts write as the default; every other one is an override there.
        self.default = min(counts, key=lambda spec: (-counts[spec], spec.bits, spec.group_size, spec.symmetric))
        self.fused = tuple(_fused_layers(shapes)) if engine.fused else ()
        # Layers of one shape and grid get one answer.
        self.kinds: dict[tuple[QuantSpec, tuple[int, int], bool], str] = {}
        for module, spec in specs.items():
            self.kinds.setdefault((spec, shapes[module], module in looked_up), module)

    def with_specs(self, specs: Mapping[str, QuantSpec]) -> TargetQuestion:
        """Return the same question about other grids."""
        return TargetQuestion(self.engine, self.versions, dataclasses.replace(self.exported, specs=specs))

    def answer(self, layout: str, device: Device) -> tuple[Rule, ...] | str:
        """Return the rules that allow a layout on a device in every version, or the reason against it."""
        # Lines that hold for every version are one way to load for all of them.
        answer = self._answer_for(self.versions, layout, device)
        if not isinstance(answer, str):
            return tuple(dict.fromkeys(answer))
        used: list[Rule] = []
        for version in self.versions:
            answer = self._answer_for((version,), layout, device)
            if isinstance(answer, str):
                return answer
            used += answer
        return tuple(dict.fromkeys(used))

    def works(self, layout: str, devices: Iterable[Device]) -> bool:
        """Return whether a layout is read on one of the devices at least."""
        return any(not isinstance(self.answer(layout, device), str) for device in devices)

    def _answer_for(self, versions: Sequence[str], layout: str, device: Device) -> list[Rule] | str:
        where = f"{layout} on {DEVICE_NAMES[device]}"
        rules = [
            rule
            for rule in read_table().rules
            if rule.target == self.engine.name
            and rule.versions.keys() >= set(versions)
            and layout in rule.layouts
            and device in rule.devices
            and (rule.provider == "stock" or self.exported.plugin)
        ]
        if not rules:
            return f"does not read {where}"
        if self.exported.ranks:
            rules = [rule for rule in rules if rule.adapters]
            if not rules:
                return f"puts no adapters on layers in {where}"
        if layout != MERGED and (reason := self._mixed_fused_layer()):
            rules = [] if self._partly_float() else [rule for rule in rules if rule.own_grids == "parts"]
            if not rules:
                return reason
        rules_used = self._used(rules, where)
        if isinstance(rules_used, str) or len({rule.flag for rule in rules_used}) < 2:
            return rules_used
        # What an engine is started with holds for all modules.
        for flag in dict.fromkeys(rule.flag for rule in rules):
            alone = self._used([rule for rule in rules if rule.flag == flag], where)
            if not isinstance(alone, str):
                return alone
        flags = listed(sorted({rule.flag for rule in rules_used if rule.flag}))
        return f"reads some of the modules in {where} only with {flags}, and others only without"

    def _used(self, rules: Sequence[Rule], where: str) -> list[Rule] | str:
        """Return the first rule for each kind of layer, or the reason why one has none."""
        used: list[Rule] = []
        for (spec, (outputs, inputs), looked_up), module in self.kinds.items():
            # In a merged export embeddings are a table of floats like any other.
            about = [rule for rule in rules if rule.embeddings is looked_up or MERGED in rule.layouts]
            if not about:
                return f"reads no codes of embeddings in {where}, and {module} has such"
            fitting = [rule for rule in about if rule.bits is None or spec.bits in rule.bits]
            if not fitting:
                known = sorted({bits for rule in about for bits in rule.bits or BITS})
                return f"has no kernel for {spec.bits} bits in {where} (it has one for {listed(known)})"
            wider = fitting
            fitting = [rule for rule in wider if spec.symmetric in rule.symmetric]
            if not fitting:
                only = "symmetric" if wider[0].symmetric[0] else "asymmetric"
                because = next((f" ({rule.symmetric_because})" for rule in wider if rule.symmetric_because), "")
                return f"reads {spec.bits} bits in {where} only {only}{because}"
            wider = fitting
            fitting = [rule for rule in wider if rule.group_sizes is None or spec.group_size in rule.group_sizes]
            if not fitting:
                sizes = sorted({size for rule in wider for size in rule.group_sizes or ()})
                return f"reads {spec.bits} bits in {where} with group size {listed(sizes)}, not {spec.group_size}"
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
                    f"computes {listed([name.rpartition('.')[2] for name in names])} as one layer with one grid, and "
                    f"{names[0].rpartition('.')[0]} has {listed([_grid(spec) for spec in grids])} there"
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


def _fused_layers(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    parents: dict[str, set[str]] = collections.defaultdict(set)
    for name in names:
        parent, _, last = name.rpartition(".")
        parents[parent].add(last)
    for parent, lasts in parents.items():
        for fused in _FUSED:
            if len(members := [last for last in fused if last in lasts]) > 1:
                yield tuple(f"{parent}.{last}" if parent else last for last in members)


def _grid(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    return f"{spec.bits}-bit {'symmetric' if spec.symmetric else 'asymmetric'} group {spec.group_size}"
