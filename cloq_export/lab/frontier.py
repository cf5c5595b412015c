"""Measure the quality of every method on a model against its stored size and its time."""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.compress.job import WINDOWS_REPORT
from cloq_export.compress.session import Session
from cloq_export.compress.strategies import strategy_of
from cloq_export.engines.transformers.loading import load
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import CloqError, RecipeError, UsageError
from cloq_export.lab.frontier_recipe import FLOAT, METHODS, Frontier, FrontierRow
from cloq_export.lab.frontier_report import write_frontier
from cloq_export.lab.peers import PeerError, run_peer
from cloq_export.lab.row_folder import (
    RowFolder,
    making_cost,
)
from cloq_export.models.saving import save_plain
from cloq_export.models.source import open_model
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.perplexity import perplexity
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import evaluation_text, evaluation_tokens, load_text
from cloq_export.texts.windows import draw_windows
from cloq_export.verbs.answering import Subject, answer_tasks, read_questions
from cloq_export.verbs.run import run


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
    work = FrontierFolder(frontier, out, console)
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


class FrontierFolder:
    """One frontier on disk."""

    def __init__(self, frontier: Frontier, out: Path, console: Console) -> None:
        self.frontier = frontier
        self.out = out
        self.console = console
        # Rows from before windows that judge were held apart are not of the same table.
        self.rows = RowFolder(out, "frontier-recipe", {**dataclasses.asdict(frontier), "judged": "apart"})

    def measure(self, case: FrontierRow) -> dict[str, Any]:
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

    def _own(self, case: FrontierRow, place: Path) -> dict[str, Any]:
        method = METHODS[case.method]
        options = {**self.frontier.quantize, **method.options, "model": self.frontier.model}
        options |= {"bits": case.bits, "rank": case.rank, "seed": case.seed, "measure": False}
        in_one_go = not place.exists()
        summary = run(Recipe.from_mapping(options, preset=method.preset), place, console=self.console).to_json()
        adapter = Recipe().adapter_name if case.rank else None
        sizes = stored_sizes(place, adapter)
        model = load(place, adapter, dtype=torch.float32)
        tokenizer = read_tokenizer(RunDirectory.open(place).checkpoint_path)
        stored = sizes.bits_per_weight_with_adapter if adapter else sizes.bits_per_weight
        windows = RunDirectory.open(place).read_report(WINDOWS_REPORT)["windows"]
        made = {
            "stored_bits_per_weight": stored,
            **making_cost(summary, in_one_go=in_one_go),
            "distinct_tokens": {kind: told["distinct_tokens"] for kind, told in windows.items()},
        }
        return self._judge(model, tokenizer, case) | made

    def _of_peer(self, case: FrontierRow, place: Path) -> dict[str, Any]:
        folder = self.out / "model"
        loaded = open_model(self.frontier.model, dtype=torch.float32)
        if not (folder / "config.json").exists():
            save_plain(loaded, folder)
        options = Recipe.from_mapping({**self.frontier.quantize, "model": self.frontier.model, "seed": case.seed})
        # Those that refined rows are solved on: without overlap, and none of the text that judges these.
        counts = strategy_of(options.changed({"refine": "block"})).window_counts(options)
        drawn = draw_windows(loaded.tokenizer, load_text(options.calibration), options, counts)
        job = {
            "model": str(folder.resolve()),
            "bits": case.bits,
            "group_size": options.group_size,
            "rank": case.rank,
            "seed": case.seed,
            "windows": drawn.solving.ids.tolist(),
            "out": str((place / "made").resolve()),
        }
        report = run_peer(case.method, job, self.out / "peers", place, console=self.console)
        checkpoint, adapter = Path(report["checkpoint"]), report.get("adapter")
        sizes = stored_sizes(checkpoint, adapter)
        stored = sizes.bits_per_weight_with_adapter if adapter else sizes.bits_per_weight
        model = load(checkpoint, adapter, dtype=torch.float32, force=True)
        told = {name: report[name] for name in ("seconds", "memory_beyond_model_bytes", "versions")}
        told["distinct_tokens"] = {"solved": drawn.distinct(drawn.solving)}
        return self._judge(model, loaded.tokenizer, case) | {"stored_bits_per_weight": stored, **told}

    def _judge(self, model: nn.Module, tokenizer: Any, case: FrontierRow) -> dict[str, Any]:
        model.eval()
        judged: dict[str, Any] = {"perplexity": {}}
        bos = Recipe.from_mapping({**self.frontier.quantize, "model": self.frontier.model}).bos
        for text in self.frontier.texts:
            tokens = evaluation_tokens(tokenizer, evaluation_text(text).text, self.frontier.window, bos)
            measured = perplexity(
                model, tokens, window=self.frontier.window, windows=self.frontier.windows, console=self.console
            )
            judged["perplexity"][text] = {"value": measured.perplexity, "standard_error": measured.standard_error}
        if self.frontier.problems:
            questions = read_questions({self.frontier.questions: None}, self.frontier.problems, 0)
            subject = Subject(case.name, float_model(model), None, case.name)  # type: ignore[arg-type]
            session = Session(self.console)
            entry = answer_tasks(session, questions, [subject], tokenizer, None, None)[self.frontier.questions]
            accuracy = entry.models[case.name].accuracy
            deviation = math.sqrt(accuracy * (1 - accuracy) / entry.questions)
            judged["accuracy"] = {"value": accuracy, "standard_error": deviation}
        return judged
