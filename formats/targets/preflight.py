"""The preflight of an export: the layout in which an engine reads it, or the reason why it cannot."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cloq_export.errors import UsageError
from cloq_export.formats.targets.questions import BITS, TargetQuestion
from cloq_export.formats.targets.table import (
    DEVICE_NAMES,
    DEVICES,
    MERGED,
    Device,
    Engine,
    Exported,
    Rule,
    Target,
    allowed_rank,
    listed,
    needed_packages,
    read_table,
)


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


def preflight(target: Target, exported: Exported, *, layout: str | None = None, device: str = "any") -> Decision:
    """Choose the layout in which a target reads a checkpoint, or check one.

    A plain 16-bit export is never chosen by itself, because it gives up what quantization was for.

    Args:
        target: the engine.
        exported: what it shall read, with at least one quantized module.
        layout: the layout to check; None chooses the best.
        device: cpu, cuda, or any for a layout that runs on at least one of them.

    Returns:
        Layout, devices, the rules that allow it, and what a user must know.

    Raises:
        UsageError: the target cannot read this; the message names the reason and the nearest choice that works.
    """
    engine = read_table().engines[target.name]
    if device not in ("any", *DEVICES):
        raise UsageError(f"device {device!r} is unknown; allowed are any, {' and '.join(DEVICES)}.")
    specs, shapes, ranks = exported.specs, exported.shapes, exported.ranks
    if not specs:
        raise UsageError("there is no quantized module to export; the recipe skips all of them.")
    missing = sorted(set(specs) - set(shapes))
    if missing:
        raise UsageError(f"the shape of {missing[0]} is not known; give the shape of every quantized module.")
    versions = engine.versions if target.version is None else (target.version,)
    devices = DEVICES if device == "any" else tuple(known for known in DEVICES if known == device)
    question = TargetQuestion(engine, versions, exported)
    wanted = [known for known in engine.layouts if known != MERGED] if layout is None else [layout]
    fitting = []
    for place, name in enumerate(wanted):
        allowed = {where: rules for where in devices if not isinstance(rules := question.answer(name, where), str)}
        if allowed:
            fitting.append((-len(allowed), place, name, allowed))
    if not fitting:
        raise UsageError(_refusal(target, question, layout, devices))
    _, _, chosen, allowed = min(fitting, key=lambda fit: fit[:2])
    rules = tuple(dict.fromkeys(rule for used in allowed.values() for rule in used))
    max_lora_rank, pad_rank, adapter_notes = _check_ranks(target, engine, ranks)
    notes = (*_version_notes(target), *_notes(engine, versions, allowed), *adapter_notes)
    return Decision(target, chosen, tuple(allowed), rules, notes, max_lora_rank, pad_rank)


def _refusal(target: Target, question: TargetQuestion, layout: str | None, devices: Sequence[Device]) -> str:
    if layout is not None and layout not in (known := _layouts()):
        close = difflib.get_close_matches(layout, known, n=1)
        return f"layout {layout!r} is unknown; allowed are {', '.join(known)}." + (
            f" Did you mean {close[0]}?" if close else ""
        )
    named = layout if layout is not None else question.engine.layouts[0]
    reasons = {f" on {DEVICE_NAMES[device]}": str(question.answer(named, device)) for device in devices}
    if len({reason.replace(where, "") for where, reason in reasons.items()}) == 1:
        where, reason = next(iter(reasons.items()))
        reasons = {"": reason.replace(where, " on " + " or ".join(DEVICE_NAMES[device] for device in devices))}
    reason = f"{target} {'; it '.join(reasons.values())}"
    choices = [
        _nearest(question, layout, devices),
        f"`format={MERGED}`" if layout != MERGED and question.works(MERGED, devices) else None,
    ]
    quantized = [name for name in question.engine.layouts if name != MERGED]
    for device in DEVICES:
        if device not in devices:
            names = sorted(quantized, key=lambda name: name != layout)
            found = next((name for name in names if question.works(name, [device])), None)
            choices.append(found and f"`format={found}` on {DEVICE_NAMES[device]}")
    works = list(dict.fromkeys(choice for choice in choices if choice is not None))
    if not works:
        return f"{reason}; nothing near it works: choose another target, or none."
    return f"{reason}; the nearest that works: {', or '.join(works)}."


def _nearest(question: TargetQuestion, layout: str | None, devices: Sequence[Device]) -> str | None:
    """Return the options that change least and pass: layout first, then group size, symmetry, and bits last."""
    engine, specs, default = question.engine, question.specs, question.default
    rules = [rule for rule in read_table().rules if rule.target == engine.name]
    known = {size for rule in rules for size in rule.group_sizes or () if size > 0}
    inputs = {question.shapes[module][1] for module in specs}
    sizes = [size for size in sorted(known) if all(count % size == 0 for count in inputs)]
    changes: list[tuple[float, dict[str, Any], bool, str]] = []
    for bits, flip, size, uniform, (place, name) in itertools.product(
        (None, *BITS),
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
            steps = BITS.index(bits) - BITS.index(default.bits)
            cost += 8 + (steps if steps >= 0 else 0.5 - steps)
        changes.append((cost, grid, uniform, name))
    for _, grid, uniform, name in sorted(changes, key=lambda change: change[0]):
        changed = {module: dataclasses.replace(default if uniform else spec, **grid) for module, spec in specs.items()}
        if not question.with_specs(changed).works(name, devices):
            continue
        words = ["one grid for all modules"] if uniform else []
        if "bits" in grid:
            words.append(f"`bits={grid['bits']}`")
        if "group_size" in grid:
            words.append(f"`group_size={grid['group_size']}`")
        if "symmetric" in grid:
            words.append(f"`symmetric={str(grid['symmetric']).lower()}`")
        return " ".join([*words, f"`format={name}`"])
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
    allowed = allowed_rank(adapters, largest)
    if allowed is None:
        limit = max(adapters.ranks or ())
        raise UsageError(f"an adapter has rank {largest}; {target} takes up to {limit}: make it with `rank={limit}`.")
    notes = []
    option = "--max-lora-rank" in adapters.note
    if option:
        notes.append(f"adapters of rank {largest} need --max-lora-rank {allowed} in {engine.title}")
    pad_rank = None
    if not adapters.patterns and len(set(ranks)) > 1:
        pad_rank = largest
        notes.append(
            f"{engine.title} takes one rank in all modules of an adapter: write adapters with `pad_rank={pad_rank}`"
        )
    return allowed if option else None, pad_rank, tuple(notes)


def _version_notes(target: Target) -> tuple[str, ...]:
    if target.asked is None:
        return ()
    return (
        f"{target.name} {target.asked} is not in the table of targets; it is taken for {target.version}, the newest "
        "before it",
    )


def _notes(engine: Engine, versions: Sequence[str], found: Mapping[Device, tuple[Rule, ...]]) -> tuple[str, ...]:
    # Note -> the devices that it holds for.
    notes: dict[str, list[str]] = collections.defaultdict(list)
    for device, rules in found.items():
        own = []
        if any(rule.provider == "cloq_plugin" for rule in rules):
            own.append(f"needs cloq-export installed in the same environment as {engine.title}")
        if others := [need for need in needed_packages(rules) if need != "cloq-export"]:
            own.append(f"needs {listed(others)} beside {engine.title}")
        own += [f"needs {rule.flag} in {engine.title}" for rule in rules if rule.flag]
        own += [rule.note for rule in rules if rule.note]
        if all(rule.versions.get(version, "read") == "read" for rule in rules for version in versions):
            own.append(f"known from the source of {engine.title}, not run")
        for note in dict.fromkeys(own):
            notes[note].append(DEVICE_NAMES[device])
    return tuple(f"on {listed(devices)}: {note}" for note, devices in notes.items())


def _layouts() -> list[str]:
    return list(dict.fromkeys(name for engine in read_table().engines.values() for name in engine.layouts))


def _size_order(size: int) -> float:
    # One group per channel is as good as a very large group.
    return 16 if size == -1 else size.bit_length()
