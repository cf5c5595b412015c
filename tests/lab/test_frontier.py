"""The frontier: its rows, what it stores for them, and that a peer that fails does not spoil the table."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from cloq_export.cli import main
from cloq_export.errors import RecipeError, RunDirectoryError, UsageError
from cloq_export.files.versions import environment
from cloq_export.lab import frontier as module
from cloq_export.lab import peers, row_folder
from cloq_export.lab.frontier import measure_frontier
from cloq_export.lab.frontier_recipe import METHODS, Frontier
from cloq_export.lab.frontier_report import MEAN, frontier_plots, frontier_table
from cloq_export.lab.peers import PEERS, PeerError, run_peer
from cloq_export.process.hardware import describe_hardware
from cloq_export.recipe import Recipe
from cloq_export.verbs.run import run


@pytest.fixture
def recipe_file(recipe_for: Callable[..., Recipe], texts: dict[str, str], tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        recipe = recipe_for("llama")
        quantize = {name: getattr(recipe, name) for name in ("group_size", "samples", "seqlen", "precision")}
        content: dict[str, Any] = {
            "model": recipe.model,
            "quantize": quantize | {"calibration": texts["calibration"], "refine_steps": 2},
            "bits": [2],
            "ranks": [0, 4],
            "methods": ["rtn", "cloq"],
            "peers": [],
            "seeds": [0, 1],
            "texts": [texts["eval_text"], texts["calibration"]],
            "window": 16,
            "windows": 4,
            "questions": "word-problems",
            "problems": 0,
        }
        path = tmp_path / "frontier.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return path

    return write


@pytest.mark.slow
def test_rows_means_and_files(recipe_file: Any, texts: dict[str, str], silent: Console, tmp_path: Path) -> None:
    frontier, out = Frontier.read(str(recipe_file())), tmp_path / "out"
    partial = measure_frontier(frontier, out, methods=["rtn"], console=silent)
    assert partial["missing_rows"] == 4
    result = measure_frontier(frontier, out, console=silent)
    assert result["missing_rows"] == 0
    rows = {(row["method"], row["rank"], row["seed"]): row for row in result["rows"]}
    assert set(rows) == {
        ("float", 0, 0),
        *(("rtn", 0, seed) for seed in (0, 1)),
        *(("cloq", rank, seed) for rank in (0, 4) for seed in (0, 1)),
        *((method, rank, "mean") for method, rank in (("float", 0), ("rtn", 0), ("cloq", 0), ("cloq", 4))),
    }
    evaluated = texts["eval_text"]
    mean = rows["cloq", 4, "mean"]["perplexity"][evaluated]
    values = [rows["cloq", 4, seed]["perplexity"][evaluated]["value"] for seed in (0, 1)]
    assert mean["value"] == pytest.approx(sum(values) / 2)
    assert mean["spread"] > 0
    # 2 bits, and a scale of 16 and a zero of 2 bits for 32 of them; the adapter comes on top.
    assert rows["rtn", 0, 0]["stored_bits_per_weight"] == pytest.approx(2 + 18 / 32)
    assert rows["cloq", 4, 0]["stored_bits_per_weight"] > 3
    assert rows["float", 0, 0]["perplexity"][evaluated]["value"] < mean["value"]
    assert all(row["seconds"] > 0 for (method, *_), row in rows.items() if method != "float")
    assert "| cloq, 2 bits | 4 |" in (out / "frontier.md").read_text()
    assert (out / "evaluation-bits.svg").exists()
    assert not list((out / "runs").iterdir())


@pytest.mark.slow
def test_every_method_gives_a_row(recipe_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe_file(methods=list(METHODS), ranks=[4, 0], seeds=[0])
    assert main(["frontier", "--recipe", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["seed"] == 0]
    assert [row.get("failed") for row in rows] == [None] * len(rows)
    assert {row["method"] for row in rows} == {"float", *METHODS}


def test_a_row_that_was_interrupted_has_no_cost(
    recipe_file: Any, silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontier, out = Frontier.read(str(recipe_file(methods=["rtn"], ranks=[0], seeds=[0]))), tmp_path / "out"

    def interrupted(*arguments: Any, **options: Any) -> None:
        run(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_frontier(frontier, out, console=silent)
    monkeypatch.setattr(module, "run", run)
    result = measure_frontier(frontier, out, console=silent)
    row = next(row for row in result["rows"] if (row["method"], row["seed"]) == ("rtn", 0))
    # The last call, which found all layers finished, tells of itself alone.
    assert (row["seconds"], row["memory_beyond_model_bytes"]) == (None, None)
    assert "| not in one go |" in frontier_table(result)


def test_a_model_that_gives_no_numbers_fails_its_row_alone(
    recipe_file: Any, silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        model = module_load(*arguments, **options)
        model.get_output_embeddings().weight.data.fill_(torch.nan)
        return model

    module_load = module.load
    monkeypatch.setattr(module, "load", load)
    # A single window, too, which has no standard error.
    path = recipe_file(methods=["rtn"], ranks=[0], seeds=[0], windows=1)
    result = measure_frontier(Frontier.read(str(path)), tmp_path / "out", console=silent)
    failed = [row.get("failed", "") for row in result["rows"] if row["seed"] == 0]
    assert failed[0] == ""
    assert failed[1].startswith("the model gives NaN or Inf on window 1 of 1; ")
    table = frontier_table(result)
    assert "- rtn, 2 bits, rank 0: the model gives NaN or Inf" in table
    assert "±" not in table


def test_a_task_is_answered_beside_the_texts(recipe_file: Any, silent: Console, tmp_path: Path) -> None:
    asked = {"questions": "short-word-problems", "problems": 3}
    frontier = Frontier.read(str(recipe_file(methods=[], seeds=[0], **asked)))
    result = measure_frontier(frontier, tmp_path / "out", console=silent)
    # Random weights solve nothing.
    assert result["rows"][0]["accuracy"] == {"value": 0.0, "standard_error": 0.0}
    assert "| 0.000 ± 0.000 |" in (tmp_path / "out" / "frontier.md").read_text()


def test_the_table_and_the_plots_have_error_bars_and_leave_out_what_would_hide_the_rest() -> None:
    def row(method: str, rank: int, perplexity: float, accuracy: float, seed: Any = "mean") -> dict[str, Any]:
        measured = {"value": perplexity, "standard_error": perplexity / 10}
        return {
            "method": method,
            "bits": 16 if method == "float" else 2,
            "rank": rank,
            "seed": seed,
            "stored_bits_per_weight": 2.25 + rank / 16,
            "seconds": None if rank == 16 else 100.0,
            "perplexity": {"wikitext2": measured},
            "environments": ["1"],
            "environment": "1",
            "accuracy": {"value": accuracy, "standard_error": 0.02},
        }

    rows = [row("float", 0, 30.0, 0.5), row("float", 0, 30.0, 0.5, seed=0)]
    rows += [row("rtn", 0, 700.0, 0.0), row("cloq", 0, 80.0, 0.25), row("cloq", 16, 60.0, 0.3)]
    result = {
        "frontier": {"texts": ["wikitext2"], "questions": "arc-e:instruction", "problems": 4},
        "environments": {"1": {"hardware": describe_hardware(), "versions": environment()}},
        "missing_rows": 0,
        "rows": rows,
    }
    assert "| cloq, 2 bits | 0 | 2.25 | 80.00 ± 8.00 (2.67x) | 0.250 ± 0.020 | 100 |" in frontier_table(result)
    pictures = frontier_plots(result)
    names = ("wikitext2", "accuracy-arc-e-instruction")
    assert set(pictures) == {f"{name}-{over}" for name in names for over in ("bits", "seconds")}
    bits = pictures["wikitext2-bits"]
    assert bits.count('class="bar') == 2
    assert ">rtn (1 above 600)<" in bits
    assert pictures["wikitext2-seconds"].count('class="bar') == 1  # one row has no seconds
    assert pictures["accuracy-arc-e-instruction-bits"].count('class="bar') == 3
    for name, picture in pictures.items():
        assert picture.count('class="level"') == 2, name
        assert "several machines" not in picture
    # A row of the time before questions were asked has no accuracy, and is no point of that plot.
    del rows[-1]["accuracy"], rows[2]["accuracy"]
    result["environments"]["2"] = result["environments"]["1"]
    assert "| cloq, 2 bits | 16 | 3.25 | 60.00 ± 6.00 (2.00x) |  | not in one go |" in frontier_table(result)
    pictures = frontier_plots(result)
    assert pictures["accuracy-arc-e-instruction-bits"].count('class="bar') == 1
    # Where none of a method's rows has one, the method is not named.
    assert ">rtn" not in pictures["accuracy-arc-e-instruction-bits"]
    assert "several machines" in pictures["wikitext2-seconds"]
    assert "several machines" not in pictures["wikitext2-bits"]


def test_a_peer_that_cannot_be_installed_says_so_in_its_row(
    recipe_file: Any, silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        options["stdout"].write("ERROR: No matching distribution found\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", refuse)
    path = recipe_file(methods=[], peers=["autoround"], seeds=[0])
    result = measure_frontier(Frontier.read(str(path)), tmp_path / "out", console=silent)
    row = next(row for row in result["rows"] if row["method"] == "autoround")
    assert row["failed"].startswith("could not be installed: ERROR: No matching distribution found (the log is ")
    assert "- autoround, 2 bits, rank 0: could not be installed" in frontier_table(result)


def test_a_peer_that_fails_is_quoted(silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_environment", lambda *_: "python-that-runs-nothing")

    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "PYTHONPATH" not in options["env"]
        options["stdout"].write("Traceback\nValueError: too few tokens\n")
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(PeerError, match=r"failed with exit code 3: ValueError: too few tokens \(the log is"):
        run_peer("gptqmodel", {}, tmp_path / "peers", tmp_path / "place", console=silent)


def test_peers_have_their_workers() -> None:
    for peer in PEERS.values():
        assert (Path(peers.__file__).with_name("peer_workers") / peer.worker).is_file()


def test_the_small_frontier_of_the_package_is_valid() -> None:
    small = Frontier.read("small")
    names = [case.method for case in small.cases()]
    assert names[0] == "float"
    assert set(names) == {"float", *METHODS, *PEERS}
    assert {case.rank for case in small.cases() if case.method == "gptqmodel-eora"} == {16, 64}
    assert {case.rank for case in small.cases() if case.method in ("rtn", "autoround")} == {0}
    assert Frontier.read("small", full=True).bits == (2, 3, 4)
    assert Frontier.read("small", model="elsewhere").model == "elsewhere"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["clock"]}, "methods has 'clock'; allowed are rtn, "),
        ({"peers": ["awq"]}, "peers has 'awq'; allowed are autoround, "),
        ({"bits": 2}, "bits is 2; a list of widths out of 2, 3, 4 and 8 is needed"),
        ({"texts": []}, r"texts is \[\]; a list of texts is needed"),
        ({"window": 1}, "window is 1; a whole number of at least 2 is needed"),
        ({"quantize": {"samples": 0}}, "quantize: samples is 0; it must be at least 1"),
        ({"speed": 1}, "'speed' is not an option of a frontier recipe"),
        ({"full": ["x"]}, r"full is \['x'\]; a mapping of options is needed"),
        ({"quantize": None, "methods": True}, "quantize is None; a mapping .*; methods is True; a list of methods is"),
        ({"texts": [None]}, r"texts is \[None\]; a list of texts is needed"),
        ({"questions": "gsm"}, "questions is 'gsm'; a task out of gsm8k, "),
        ({"ranks": [], "seeds": [-1]}, r"ranks is \[\]; a list of whole numbers is needed; seeds is \[-1\]; a list"),
    ],
)
def test_bad_recipes_are_refused(recipe_file: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Frontier.read(str(recipe_file(**changes)))


def test_rows_name_the_machine_that_they_were_measured_on(
    recipe_file: Any, silent: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontier, out = Frontier.read(str(recipe_file(methods=[], peers=["autoround"], seeds=[0, 1]))), tmp_path / "out"
    machine = {"cpu": "Slow CPU", "cores": 1, "memory_bytes": 2**34, "isa": []}
    monkeypatch.setattr(row_folder, "describe_hardware", lambda: machine)
    first = measure_frontier(frontier, out, bits=[4], console=silent)  # the float model alone
    assert [row["environment"] for row in first["rows"] if row["seed"] != MEAN] == ["1"]
    alone = frontier_table(first)
    assert "\nMeasured on\n\n- Slow CPU, 1 core, 16 GiB; torch " in alone
    assert "[1]" not in alone

    def made(self: Any, case: Any, place: Path) -> dict[str, Any]:
        judged = {text: {"value": 20.0, "standard_error": 1.0} for text in frontier.texts}
        cost = {"stored_bits_per_weight": 2.5, "seconds": 7.0, "memory_beyond_model_bytes": None}
        return {"perplexity": judged, **cost, "versions": {"auto-round": f"9.{case.seed}"}}

    monkeypatch.setattr(module.FrontierFolder, "_of_peer", made)
    monkeypatch.setattr(row_folder, "describe_hardware", lambda: {**machine, "cpu": "Fast CPU", "cores": 8})
    both = measure_frontier(frontier, out, console=silent)
    assert [row["environment"] for row in both["rows"] if row["seed"] != MEAN] == ["1", "2", "2"]
    table = frontier_table(both)
    assert next(line for line in table.splitlines() if line.startswith("| autoround")).endswith("| 7 [2] |")
    assert "\n- [1] Slow CPU, 1 core, 16 GiB; torch " in table
    assert "\n- [2] Fast CPU, 8 cores, 16 GiB; torch " in table
    assert "\n- autoround: auto-round 9.0\n- autoround: auto-round 9.1\n" in table


def test_a_machine_that_was_started_again_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = itertools.count(2**34, 4096)
    told = {"cpu": "CPU", "cores": 2, "isa": []}
    monkeypatch.setattr(row_folder, "describe_hardware", lambda: {**told, "memory_bytes": next(memory)})
    folder = row_folder.RowFolder(tmp_path / "out", "table", {})
    assert [folder.environment() for _ in range(3)] == ["1", "1", "1"]
    monkeypatch.setattr(row_folder, "environment", lambda: {"torch": "99.0", "transformers": "9.0"})
    assert folder.environment() == "2"


def test_another_frontier_and_unknown_names_are_refused(recipe_file: Any, silent: Console, tmp_path: Path) -> None:
    frontier, out = Frontier.read(str(recipe_file(methods=[], seeds=[0]))), tmp_path / "out"
    measure_frontier(frontier, out, console=silent)
    other = Frontier.read(str(recipe_file(methods=[], seeds=[0], windows=3)))
    with pytest.raises(UsageError, match=r"holds another frontier-recipe \(windows differ\)"):
        measure_frontier(other, out, console=silent)
    with pytest.raises(UsageError, match="the frontier has no method 'cloq'; it has"):
        measure_frontier(frontier, out, methods=["cloq"], console=silent)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="file is not a folder; choose another one with `out`"):
        measure_frontier(frontier, tmp_path / "file", console=silent)


def test_a_peer_that_never_ends_is_stopped(tmp_path: Path, silent: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(peers, "_HOURS", 1e-4)
    monkeypatch.setattr(peers, "_WORKERS", tmp_path)
    (tmp_path / PEERS["gptqmodel"].worker).write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    with pytest.raises(PeerError, match=r"gave no result within 0.0001 hours \(the log is"):
        run_peer("gptqmodel", {}, tmp_path / "peers", tmp_path / "place", console=silent)


def test_peers_measure_their_peak_from_a_moment_on() -> None:
    code = (
        "from peak_memory import PeakMemory\n"
        "large = bytearray(200_000_000)\nlarge[::1024] = b'1' * len(large[::1024])\ndel large\n"
        "memory = PeakMemory()\n"
        "small = bytearray(50_000_000)\nsmall[::1024] = b'1' * len(small[::1024])\ndel small\n"
        "print(memory.beyond())"
    )
    folder = Path(peers.__file__).with_name("peer_workers")
    said = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "None" or 45_000_000 < int(said) < 70_000_000
