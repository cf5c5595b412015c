"""What each engine reads at which version, as data: targets.yaml."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from cloq_export.errors import UsageError

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
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}
_TARGET = re.compile(r"(?P<name>[\w.-]+?)(==(?P<version>\d+(\.\d+)*)([.+]?[a-z][\w.+]*)?)?")


@dataclasses.dataclass(frozen=True)
class Target:
    """The engine that an export is made for.

    Args:
        name: of the engine, as in the option `target`.
        version: as the table lists it, so with the patch number left out where it does not matter; None asks for what
            every version of the table reads.
        asked: the version that was asked for, where the table does not know it and `version` is the newest before it.
    """

    name: str
    version: str | None = None
    asked: str | None = None

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
        flag: what the engine must be started with; it holds for all modules, so no line without it can serve some.
        symmetric_because: why other grids are not read, where `symmetric` allows one kind alone.
        embeddings: whether it is about codes of embeddings, and of nothing else.
        adapters: whether the engine puts adapters on layers of this kind.
        snippet: how it is loaded, a key of the table's snippets.
        source: package, file and name in which the line was read.
        note: what else a user must know.
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
    flag: str
    symmetric_because: str
    embeddings: bool
    adapters: bool
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
        name: as in the option `target`.
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
class Exported:
    """What an export holds, and what stands beside the engine that is to read it.

    Args:
        specs: quantized module -> its grid.
        shapes: module -> (out, in), of every quantized module; the linear modules that stay float should stand there
            too, because some engines read only checkpoints without any.
        ranks: the ranks that occur in the adapters that will be used; empty without one.
        plugin: whether this package is installed beside the engine.
        embeddings: those of the quantized modules that are embeddings.
    """

    specs: Specs
    shapes: Shapes
    ranks: Collection[int] = ()
    plugin: bool = False
    embeddings: Collection[str] = ()


@functools.cache
def read_table() -> Table:
    """Return the table of targets.yaml."""
    raw = yaml.safe_load((Path(__file__).parents[1] / "targets.yaml").read_text(encoding="utf-8"))
    engines = {name: _engine(name, fields) for name, fields in raw["targets"].items()}
    snippets = {name: Snippet(**fields) for name, fields in raw["snippets"].items()}
    return Table(engines, tuple(_rule(fields) for fields in raw["rules"]), snippets)


def parse_target(text: str) -> Target:
    """Return the target that a text like `vllm==0.32` or `transformers` names.

    Args:
        text: name of an engine, alone or with `==` and a version; a patch number that does not matter is left out. A
            version that the table does not know is taken for the newest one before it.

    Raises:
        UsageError: the engine is not in the table, or the version is older than all of it there.
    """
    engines = read_table().engines
    match = _TARGET.fullmatch(text.strip())
    name = match["name"].lower() if match else re.split(r"[^\w.-]", text.strip(), maxsplit=1)[0].lower()
    if match is None or name not in engines:
        nearest = ""
        if close := difflib.get_close_matches(name, list(engines), n=1, cutoff=0.4):
            asked = next((version for version in engines[close[0]].versions if version in text), None)
            nearest = f" Did you mean {Target(close[0], asked)}?"
        known = ", ".join(f"{engine.name} ({span(engine.versions)})" for engine in engines.values())
        raise UsageError(f"target {text!r} is unknown; give a name or NAME==VERSION of: {known}.{nearest}")
    engine = engines[name]
    if match["version"] is None:
        return Target(name)
    parts = match["version"].split(".")
    version = ".".join(parts[: engine.version_parts])
    if version in engine.versions:
        return Target(name, version)
    older = [known for known in engine.versions if _numbers(known) < _numbers(version)]
    if not older:
        raise UsageError(
            f"what {name} {match['version']} reads is not known; known are {', '.join(engine.versions)}. The nearest "
            f"is `target={name}=={engine.versions[0]}`."
        )
    return Target(name, older[-1], asked=match["version"])


def allowed_rank(adapters: AdapterRule, rank: int) -> int | None:
    """Return the smallest value of the engine's option that takes a rank, or None."""
    return rank if adapters.ranks is None else min((value for value in adapters.ranks if value >= rank), default=None)


def needed_packages(rules: Iterable[Rule]) -> tuple[str, ...]:
    """Return the packages that some rules need, each once."""
    return tuple(dict.fromkeys(need for rule in rules for need in rule.needs))


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
        flag=values.pop("flag", ""),
        symmetric_because=values.pop("symmetric_because", ""),
        embeddings=values.pop("embeddings", False),
        adapters=values.pop("adapters", True),
        note=values.pop("note", ""),
        inputs=multiple["inputs"],
        outputs=multiple["outputs"],
        **values,
    )


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def _any_or_tuple(value: Any) -> tuple[Any, ...] | None:
    return None if value == "any" else tuple(value)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def listed(values: Iterable[object]) -> str:
    """Return values as people list them: `a, b and c`."""
    *first, last = (str(value) for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def span(versions: Sequence[str]) -> str:
    """Return versions from the first to the last, in words."""
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
