"""Measure what every method makes of a model, beside what it stores and how long it takes."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.compress.session import Session
from cloq_export.engines.transformers.loading import load
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import CloqError, RecipeError, UsageError
from cloq_export.files.safe_json import read_json
from cloq_export.lab.peers import PEERS, PeerError, run_peer
from cloq_export.lab.row_folder import (
    RowFolder,
    environment_mark,
    making_cost,
    row_path,
    seconds_cell,
    table_foot,
    write_table,
)
from cloq_export.lab.table_recipe import is_mapping, is_text, is_width, listed, read_table_recipe, whole
from cloq_export.models.saving import save_plain
from cloq_export.models.source import open_model
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.perplexity import perplexity
from cloq_export.parity.plots import Points, scatter_plot, standalone
from cloq_export.parity.tasks import task_names
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import calibration_windows, evaluation_text, evaluation_tokens, load_text
from cloq_export.verbs.answering import Subject, answer_tasks, read_questions
from cloq_export.verbs.verbs import run

FORMAT, FORMAT_VERSION = "cloq-frontier", 1
MEAN = "mean"
FLOAT = "float"
# Perplexities up to so many times the float model's are plotted.
_PLOTTED = 20
# What the plots are over: field of a row, the end of the picture's name, what the axis says.
_OVER = (("stored_bits_per_weight", "bits", "stored bits a weight"), ("seconds", "seconds", "seconds"))
# What a run measures by itself is not looked at.
OWN_EVALUATION = {"eval_windows": 1, "eval_window": 64}
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
        texts: what perplexity is measured on, as `--eval-text` names it; the first orders the plot.
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
        found: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        return cls(**found)

    def cases(self) -> list[Case]:
        """Return every row, in the order in which they are measured; the float model comes first."""
        found = [Case(FLOAT, 16, 0, 0)]
        for bits in self.bits:
            for name in (*self.methods, *self.peers):
                makes = METHODS[name].adapters if name in METHODS else PEERS[name].adapters
                without = name in METHODS or not makes
                ranks = [rank for rank in self.ranks if (rank and makes) or (not rank and without)]
                found += [Case(name, bits, rank, seed) for rank in ranks for seed in self.seeds]
        return found


_NEEDED = {
    "model": (is_text, "a model"),
    "quantize": (is_mapping, "a mapping of recipe options"),
    "bits": (listed(is_width), "a list of widths out of 2, 3, 4 and 8"),
    "ranks": (listed(whole(0)), "a list of whole numbers"),
    "methods": (listed(is_text, least=0), "a list of methods"),
    "peers": (listed(is_text, least=0), "a list of peers"),
    "seeds": (listed(whole(0)), "a list of whole numbers"),
    "texts": (listed(is_text), "a list of texts"),
    "window": (whole(2), "a whole number of at least 2"),
    "windows": (whole(1), "a whole number of at least 1"),
    "questions": (lambda name: name in task_names(), f"a task out of {', '.join(task_names())}"),
    "problems": (whole(0), "a whole number"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a method or peer, a width, a rank and a seed."""

    method: str
    bits: int
    rank: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"{self.method}-{self.bits}-{self.rank}-{self.seed}"


def measure_frontier(
    frontier: Frontier,
    out: Path,
    *,
    methods: Sequence[str] = (),
    bits: Sequence[int] = (),
    ranks: Sequence[int] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the rows that are not measured yet, and write the table and the plots of all there are.

    A run is removed once its row is measured; one that was interrupted continues.

    Args:
        frontier: what is measured.
        out: folder for rows, runs, table and plots.
        methods: only these methods and peers; none is all.
        bits: only these widths; none is all.
        ranks: only these ranks; none is all.
        console: where progress goes; None is standard error.

    Returns:
        dict: what frontier.json holds, with "files" beside it.

    Raises:
        UsageError: the folder holds another frontier, or a name is not in this one.
        CloqError: the model or a text cannot be read.
    """
    console = console or Console(stderr=True)
    known = (*frontier.methods, *frontier.peers)
    strange = [name for name in methods if name not in known]
    if strange:
        raise UsageError(f"the frontier has no method {strange[0]!r}; it has {', '.join(known)}.")
    work = _Work(frontier, out, console)
    for case in frontier.cases():
        chosen = case.method == FLOAT or (
            (not methods or case.method in methods)
            and (not bits or case.bits in bits)
            and (not ranks or case.rank in ranks)
        )
        if chosen and not work.rows.has(case.name):
            about = "" if case.method == FLOAT else f", {case.bits} bits, rank {case.rank}, seed {case.seed}"
            console.print(f"{case.method}{about}", highlight=False, markup=False)
            gc.collect()
            work.rows.write(case.name, dataclasses.asdict(case) | work.measure(case))
    return write_frontier(frontier, out)


def write_frontier(frontier: Frontier, out: Path) -> dict[str, Any]:
    """Write frontier.json, frontier.md and the plots from the rows that are there.

    Args:
        frontier: what is measured.
        out: its folder.

    Returns:
        dict: what frontier.json holds, with "files" beside it.
    """
    cases = frontier.cases()
    rows = [read_json(path) for case in cases if (path := row_path(out, case.name)).exists()]
    missing = len(cases) - len(rows)
    rows += _means(rows)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "frontier": dataclasses.asdict(frontier),
        "missing_rows": missing,
        "rows": rows,
    }
    return write_table(out, "frontier", content, frontier_table, frontier_plots)


def frontier_table(result: Mapping[str, Any]) -> str:
    """Return the rows as a table in Markdown, by stored bits.

    Args:
        result: what frontier.json holds.
    """
    frontier, environments = result["frontier"], result["environments"]
    texts, asks = frontier["texts"], bool(frontier["problems"])
    means = [row for row in result["rows"] if row["seed"] == MEAN]
    plain = next((row for row in means if row["method"] == FLOAT), None)
    head = ["method", "rank", "stored bits a weight", *texts, *([frontier["questions"]] if asks else []), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(means, key=lambda row: row["stored_bits_per_weight"]):
        cells = [f"{row['method']}, {row['bits']} bits" if row is not plain else FLOAT, str(row["rank"])]
        cells.append(f"{row['stored_bits_per_weight']:.2f}")
        for text in texts:
            found = row["perplexity"][text]
            cell = f"{found['value']:.2f}"
            if found["standard_error"] is not None:
                cell += f" ± {found['standard_error']:.2f}"
            if plain is not None and row is not plain:
                cell += f" ({found['value'] / plain['perplexity'][text]['value']:.2f}x)"
            cells.append(cell)
        if asks:
            solved = _measured(row, None)
            cells.append("" if solved is None else f"{solved['value']:.3f} ± {solved['standard_error']:.3f}")
        mark = environment_mark(row["environments"], environments)
        cells.append(seconds_cell(row["seconds"], mark) if row is not plain else "")
        lines.append("| " + " | ".join(cells) + " |")
    failed = [row for row in result["rows"] if row.get("failed")]
    if failed:
        lines += ["", "Failed", ""]
    lines += [f"- {row['method']}, {row['bits']} bits, rank {row['rank']}: {row['failed']}" for row in failed]
    lines += table_foot(result)
    return "\n".join(lines) + "\n"


def frontier_plots(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what each measure comes to, with its error, over stored bits and over seconds, as SVG by name.

    Args:
        result: what frontier.json holds.
    """
    frontier = result["frontier"]
    plain = next((row for row in result["rows"] if row["method"] == FLOAT), None)
    means = [row for row in result["rows"] if row["seed"] == MEAN and row["method"] != FLOAT]
    measures: list[tuple[str, str, str | None]] = [
        (Path(text).stem, f"perplexity, {text}", text) for text in frontier["texts"]
    ]
    if frontier["problems"]:
        asked = frontier["questions"]
        measures.append((f"accuracy-{asked.replace(':', '-')}", f"accuracy, {asked}", None))
    pictures = {}
    for (name, y_label, text), (field, end, x_label) in itertools.product(measures, _OVER):
        of_float = _measured(plain, text) if plain is not None else None
        level = None if of_float is None else (FLOAT, of_float["value"])
        if field == "seconds" and len(result["environments"]) > 1:
            x_label = "seconds, on several machines: the table says which"
        # What has lost the language would press all others together.
        limit = math.inf if text is None or level is None else _PLOTTED * level[1]
        series: list[Points] = []
        for method in dict.fromkeys(row["method"] for row in means):
            points = [
                (row[field], found["value"], found["standard_error"])
                for row in means
                if row["method"] == method and row[field] is not None and (found := _measured(row, text)) is not None
            ]
            if not points:
                continue
            drawn = [point for point in points if point[1] <= limit]
            label = method if drawn == points else f"{method} ({len(points) - len(drawn)} above {limit:.3g})"
            series.append((label, [x for x, *_ in drawn], [y for _, y, _ in drawn], [error for *_, error in drawn]))
        plot = scatter_plot(series, x_label=x_label, y_label=y_label, log_y=text is not None, level=level)
        if plot:
            pictures[f"{name}-{end}"] = standalone(plot)
    return pictures


class _Work:
    """One frontier on disk."""

    def __init__(self, frontier: Frontier, out: Path, console: Console) -> None:
        self.frontier = frontier
        self.out = out
        self.console = console
        self.rows = RowFolder(out, "frontier-recipe", dataclasses.asdict(frontier))

    def measure(self, case: Case) -> dict[str, Any]:
        """Make what a row is about, and judge it."""
        if case.method == FLOAT:
            loaded = open_model(self.frontier.model, dtype=torch.float32)
            judged = self._judge(loaded.model, loaded.tokenizer, case)
            return judged | {"stored_bits_per_weight": 16.0, "seconds": None, "memory_beyond_model_bytes": None}
        place = self.out / "runs" / case.name
        try:
            made = self._own(case, place) if case.method in METHODS else self._of_peer(case, place)
        except RecipeError:
            raise
        except (CloqError, PeerError) as error:
            return {"failed": " ".join(str(error).split())}
        shutil.rmtree(place, ignore_errors=True)
        return made

    def _own(self, case: Case, place: Path) -> dict[str, Any]:
        method = METHODS[case.method]
        options = {**self.frontier.quantize, **method.options, "model": self.frontier.model}
        options |= {"bits": case.bits, "rank": case.rank, "seed": case.seed, **OWN_EVALUATION}
        in_one_go = not place.exists()
        summary = run(Recipe.from_mapping(options, preset=method.preset), place, console=self.console)
        adapter = Recipe().adapter_name if case.rank else None
        sizes = stored_sizes(place, adapter)
        model = load(place, adapter, dtype=torch.float32)
        tokenizer = read_tokenizer(RunDirectory.open(place).checkpoint_path)
        stored = sizes.bits_per_weight_with_adapter if adapter else sizes.bits_per_weight
        made = {"stored_bits_per_weight": stored, **making_cost(summary, in_one_go=in_one_go)}
        return self._judge(model, tokenizer, case) | made

    def _of_peer(self, case: Case, place: Path) -> dict[str, Any]:
        folder = self.out / "model"
        loaded = open_model(self.frontier.model, dtype=torch.float32)
        if not (folder / "config.json").exists():
            save_plain(loaded, folder)
        options = Recipe.from_mapping({**self.frontier.quantize, "model": self.frontier.model, "seed": case.seed})
        calibration = load_text(options.calibration)
        windows = calibration_windows(
            loaded.tokenizer, calibration, options.samples, options.seqlen, case.seed, options.bos
        )
        job = {
            "model": str(folder.resolve()),
            "bits": case.bits,
            "group_size": options.group_size,
            "rank": case.rank,
            "seed": case.seed,
            "windows": windows.tolist(),
            "out": str((place / "made").resolve()),
        }
        report = run_peer(case.method, job, self.out / "peers", place, console=self.console)
        checkpoint, adapter = Path(report["checkpoint"]), report.get("adapter")
        sizes = stored_sizes(checkpoint, adapter)
        stored = sizes.bits_per_weight_with_adapter if adapter else sizes.bits_per_weight
        model = load(checkpoint, adapter, dtype=torch.float32, force=True)
        told = {name: report[name] for name in ("seconds", "memory_beyond_model_bytes", "versions")}
        return self._judge(model, loaded.tokenizer, case) | {"stored_bits_per_weight": stored, **told}

    def _judge(self, model: nn.Module, tokenizer: Any, case: Case) -> dict[str, Any]:
        model.eval()
        found: dict[str, Any] = {"perplexity": {}}
        bos = Recipe.from_mapping({**self.frontier.quantize, "model": self.frontier.model}).bos
        for text in self.frontier.texts:
            tokens = evaluation_tokens(tokenizer, evaluation_text(text).text, self.frontier.window, bos)
            measured = perplexity(
                model, tokens, window=self.frontier.window, windows=self.frontier.windows, console=self.console
            )
            found["perplexity"][text] = {"value": measured.perplexity, "standard_error": measured.standard_error}
        if self.frontier.problems:
            questions = read_questions({self.frontier.questions: None}, self.frontier.problems, 0)
            subject = Subject(case.name, float_model(model), None, case.name)  # type: ignore[arg-type]
            session = Session(Recipe(), self.console)
            entry = answer_tasks(session, questions, [subject], tokenizer, None, None)[self.frontier.questions]
            accuracy = entry["models"][case.name]["accuracy"]
            deviation = math.sqrt(accuracy * (1 - accuracy) / entry["questions"])
            found["accuracy"] = {"value": accuracy, "standard_error": deviation}
        return found


def _means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each method, width and rank: means over seeds; error bars of one seed where there is one."""
    found = []
    for key in dict.fromkeys((row["method"], row["bits"], row["rank"]) for row in rows):
        own = [r for r in rows if (r["method"], r["bits"], r["rank"]) == key and not r.get("failed")]
        if not own:
            continue
        mean: dict[str, Any] = dict(zip(("method", "bits", "rank"), key, strict=True)) | {"seed": MEAN}
        mean["environments"] = sorted({row["environment"] for row in own})
        mean["perplexity"] = {
            text: _over_seeds(row["perplexity"][text] for row in own) for text in own[0]["perplexity"]
        }
        for field in ("stored_bits_per_weight", "seconds", "memory_beyond_model_bytes"):
            mean[field] = _mean(row.get(field) for row in own)
        # Rows of the time before questions were asked have none.
        solved = [row["accuracy"] for row in own if "accuracy" in row]
        if solved:
            mean["accuracy"] = _over_seeds(solved)
        found.append(mean)
    return found


def _measured(row: Mapping[str, Any], text: str | None) -> Mapping[str, Any] | None:
    """Return a row's perplexity of a text, or without one its accuracy; None where no question was asked."""
    return row.get("accuracy") if text is None else row["perplexity"][text]


def _over_seeds(measured: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of a measure over seeds, the error of one of them, and their spread."""
    found = list(measured)
    values = [each["value"] for each in found]
    return {
        "value": statistics.fmean(values),
        "standard_error": _mean(each["standard_error"] for each in found),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; a single window, for one, has no standard error."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _faults(content: Mapping[str, Any]) -> Iterator[str]:
    for key, known in (("methods", METHODS), ("peers", PEERS)):
        strange = [name for name in content[key] if name not in known]
        if strange:
            yield f"{key} has {strange[0]!r}; allowed are {', '.join(known)}"
    try:
        Recipe.from_mapping({**content["quantize"], "model": content["model"]})
    except RecipeError as error:
        yield f"quantize: {str(error).removesuffix('.')}"
