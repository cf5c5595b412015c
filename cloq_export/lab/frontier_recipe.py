"""What a frontier is: methods, peers, widths, ranks and seeds, read from a recipe and checked as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from cloq_export.errors import RecipeError
from cloq_export.lab.peers import PEERS
from cloq_export.lab.table_recipe import is_mapping, is_text, is_width, list_of, read_table_recipe, whole
from cloq_export.parity.tasks import task_names
from cloq_export.recipe import Recipe

FLOAT = "float"
# As published: layers on their own, the range of a group from its extremes.
_PUBLISHED = {"error_aware": 0.0, "grid": "minmax", "refit": False, "sweeps": 0, "token_weighting": "none"}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to make codes, and perhaps an adapter, with this package.

    Args:
        options: recipe options.
        preset: what the others come from.
        adapters: whether it makes adapters; without, only rank 0 is measured.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preset: str = "default"
    adapters: bool = True


METHODS: dict[str, Method] = {
    "rtn": Method({**_PUBLISHED, "method": "rtn"}, adapters=False),
    "optq": Method({**_PUBLISHED, "method": "optq"}, adapters=False),
    "magr": Method({**_PUBLISHED, "method": "magr"}, adapters=False),
    # Coordinate sweeps from OPTQ's codes; COMQ itself begins with rounding to nearest.
    "comq": Method({**_PUBLISHED, "method": "optq", "sweeps": 30, "refit": True}, adapters=False),
    # Both on our integer grid instead of theirs; LQ-LoRA without its Fisher weights.
    "loftq": Method({**_PUBLISHED, "init": "loftq"}),
    "lq-lora": Method({**_PUBLISHED, "init": "lq-lora"}),
    "apiq-lw": Method({"refine": "apiq-lw"}),
    "apiq-bw": Method({"refine": "apiq-bw"}),
    "cloq-paper": Method(preset="paper"),
    "cloq": Method(),
    "cloq-refine-block": Method({"refine": "block"}),
    "cloq-refine": Method({"refine": "model"}),
}


@dataclasses.dataclass(frozen=True)
class Frontier:
    """What is measured.

    Args:
        model: the float model.
        quantize: recipe options of every run, and what peers are given of them.
        bits: widths.
        ranks: ranks of adapters, 0 for none.
        methods: names in `METHODS`.
        peers: names in `PEERS`.
        seeds: which draw the calibration windows.
        texts: what perplexity is measured on, as `eval_text` names it; the first orders the plot.
        window: tokens in a window.
        windows: windows of each text.
        questions: a task by name.
        problems: how many of its questions; 0 asks none.

    Raises:
        RecipeError: a value is missing or has another form; the message lists all faults.
    """

    model: str
    quantize: Mapping[str, Any]
    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    methods: tuple[str, ...]
    peers: tuple[str, ...]
    seeds: tuple[int, ...]
    texts: tuple[str, ...]
    window: int
    windows: int
    questions: str
    problems: int

    @classmethod
    def read(cls, name: str, *, model: str = "", full: bool = False) -> Frontier:
        """Return the frontier of a file, or of the package by name.

        Args:
            name: a YAML file, or a name such as "small".
            model: taken instead of the file's.
            full: with what its section `full` says instead.

        Raises:
            RecipeError: it cannot be read, or a value is wrong.
        """
        changes = {"model": model} if model else {}
        content = read_table_recipe(name, "frontier", _NEEDED, _faults, full=full, changes=changes)
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        return cls(**values)

    def cases(self) -> list[FrontierRow]:
        """Return every row, in the order in which they are measured; the float model comes first."""
        cases = [FrontierRow(FLOAT, 16, 0, 0)]
        for bits in self.bits:
            for name in (*self.methods, *self.peers):
                makes = METHODS[name].adapters if name in METHODS else PEERS[name].adapters
                without = name in METHODS or not makes
                ranks = [rank for rank in self.ranks if (rank and makes) or (not rank and without)]
                cases += [FrontierRow(name, bits, rank, seed) for rank in ranks for seed in self.seeds]
        return cases


_NEEDED = {
    "model": (is_text, "a model"),
    "quantize": (is_mapping, "a mapping of recipe options"),
    "bits": (list_of(is_width), "a list of widths out of 2, 3, 4 and 8"),
    "ranks": (list_of(whole(0)), "a list of whole numbers"),
    "methods": (list_of(is_text, least=0), "a list of methods"),
    "peers": (list_of(is_text, least=0), "a list of peers"),
    "seeds": (list_of(whole(0)), "a list of whole numbers"),
    "texts": (list_of(is_text), "a list of texts"),
    "window": (whole(2), "a whole number of at least 2"),
    "windows": (whole(1), "a whole number of at least 1"),
    "questions": (lambda name: name in task_names(), f"a task out of {', '.join(task_names())}"),
    "problems": (whole(0), "a whole number"),
}


@dataclasses.dataclass(frozen=True)
class FrontierRow:
    """One row: a method or peer, a width, a rank and a seed."""

    method: str
    bits: int
    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"{self.method}-{self.bits}-{self.rank}-{self.seed}"


def _faults(content: Mapping[str, Any]) -> Iterator[str]:
    for key, known in (("methods", METHODS), ("peers", PEERS)):
        strange = [name for name in content[key] if name not in known]
        if strange:
            yield f"{key} has {strange[0]!r}; allowed are {', '.join(known)}"
    try:
        Recipe.from_mapping({**content["quantize"], "model": content["model"]})
    except RecipeError as error:
        yield f"quantize: {str(error).removesuffix('.')}"
