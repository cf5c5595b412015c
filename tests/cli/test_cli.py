"""What is typed reaches the verbs, and what they say is printed; tests/cli/test_real_verbs.py runs them."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recorded_verbs import PERPLEXITY, RecordedVerbs

import cloq_export
from cloq_export.cli import VERBS, main
from cloq_export.errors import SourceError
from cloq_export.recipe import Recipe
from cloq_export.verbs.options import EvaluateOptions, ExportOptions


def recipe_of(verbs: RecordedVerbs) -> Recipe:
    return verbs.calls[-1][1]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["eval", "--help"], ["--version"], ["runn"]])
def test_no_torch_is_imported_for_help_and_misuse(arguments):
    finished = run_python(
        f"import sys\nfrom cloq_export.cli import main\ncode = main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\nassert not heavy, heavy\nprint(code)"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == ("2" if arguments == ["runn"] else "0")


def test_python_dash_m_is_the_same_command():
    finished = subprocess.run(
        [sys.executable, "-m", "cloq_export", "--version"], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0
    assert cloq_export.__version__ in finished.stdout


def test_every_verb_has_its_help(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for verb, line in VERBS.items():
        assert f"  {verb} " in listed
        assert line.split()[0] in listed
        assert main([verb, "--help"]) == 0
        assert f"cloq {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: cloq"),
        (["rum"], "there is no verb 'rum'; did you mean `run`?"),
        (["run", "m", "--out", "x", "--bitz", "3"], "--bitz"),
        (["run", "m", "--out", "x", "--bits", "three"], "'three' is not a valid integer"),
        (["run", "m", "--out", "x", "--method", "gptq"], "'gptq' is not one of"),
        (["eval"], "Missing argument 'PATH'"),
        (["eval", "x", "--window", "one"], "'one' is not a valid integer"),
        (["export", "x", "--format", "zip"], "'zip' is not one of"),
        (["run", "m", "--out", "x", "--bits", "5"], "error: bits is 5; allowed are 2, 3, 4 and 8."),
        (["run", "m", "--out", "x", "--set", "nope=1"], "error: 'nope' is not an option of a recipe"),
        (["run", "m", "--out", "x", "--override", "*.q"], "error: '*.q' is not an override"),
        (["run", "m", "--out", "x", "--recipe", "absent.yaml"], "error: the recipe file absent.yaml cannot be read"),
        (["run", "m", "--out", "x", "--bits", "3", "--set", "bits=2"], "error: bits is given twice, as 3 and as 2"),
        (
            ["adapt", "x", "--out", "y"],
            "--out belongs to a checkpoint of another tool; name its float model with --orig",
        ),
        (["adapt", "x", "--samples", "3"], "--samples belongs to a checkpoint of another tool"),
        (["adapt", "x", "--original", "m"], "no run directory was given; say where the run is written with --out RUN"),
        (["adapt", "x", "--set", "rank=4", "--set", "rank=8"], "error: rank is given twice, as 4 and as 8"),
        (["run", "m"], "error: no run directory was given; say where the run is written with --out RUN."),
        (["run", "--out", "x"], "error: no model was given; name a Hugging Face folder"),
        (["run", "--demo", "--gate", "speed=3"], "error: --gate speed=3: 'speed' is not measured; allowed are float_"),
        (["run", "--demo", "--gate", "ratio"], "error: --gate ratio: the limit must be a positive number"),
        (["run", "--demo", "--gate", "ratio=nan"], "error: --gate ratio=nan: the limit must be a positive number"),
        (["run", "--demo", "--rank", "0", "--gate", "adapter=3"], "needs an adapter, and rank is 0"),
    ],
)
def test_misuse_ends_with_two_and_says_what_is_wrong(verbs, capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err + (captured.out if not arguments else "")
    assert "Traceback" not in captured.err
    assert verbs.calls == []


def test_options_beat_the_file_beats_the_demo_beats_the_preset(verbs, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("bits: 3\nsamples: 7\nmethod: rtn\nmodel: from-file\n")
    arguments = [
        "run",
        "--demo",
        "--preset",
        "paper",
        "--recipe",
        str(path),
        "--bits",
        "4",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main(arguments) == 0
    recipe = recipe_of(verbs)
    assert recipe.bits == 4  # typed
    assert (recipe.samples, recipe.model) == (7, "from-file")  # the file, over the demo
    assert recipe.method == "rtn"  # the file, over the preset
    assert recipe.seqlen == 1024  # the demo
    assert recipe.grid == "minmax"  # the preset
    assert recipe.rank == Recipe().rank
    assert verbs.calls[-1][3] is True


def test_the_preset_of_a_file_holds_unless_another_is_typed(verbs, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: paper\n")
    base = ["quantize", "m", "--out", "x", "--recipe", str(path)]
    assert main(base) == 0
    assert recipe_of(verbs).preset_name == "paper"
    assert main([*base, "--preset", "default"]) == 0
    assert recipe_of(verbs).preset_name == "default"


def test_every_option_reaches_its_field(verbs):
    arguments = (
        "run some/model --bits 3 --group-size -1 --symmetric --method magr --grid minmax --rank 8 --split balanced "
        "--calibration text.txt --samples 5 --seqlen 64 --seed 9 --device cpu --precision bfloat16 --error-aware 0.5 "
        "--token-weighting inverse_norm --blocks model.layers --format gptq --set damping=0.02 --set refit=yes "
        "--set adapter-name=mine --override *.q_proj:bits=8 --override *.o_proj:skip --out here"
    )
    assert main(arguments.split()) == 0
    verb, recipe, out, demo = verbs.calls[-1]
    assert (verb, out, demo) == ("run", Path("here"), False)
    assert recipe == Recipe(
        model="some/model",
        bits=3,
        group_size=-1,
        symmetric=True,
        method="magr",
        grid="minmax",
        rank=8,
        split="balanced",
        calibration="text.txt",
        samples=5,
        seqlen=64,
        seed=9,
        device="cpu",
        precision="bfloat16",
        error_aware=0.5,
        token_weighting="inverse_norm",
        blocks="model.layers",
        format="gptq",
        damping=0.02,
        refit=True,
        adapter_name="mine",
        overrides={"*.q_proj": {"bits": 8}, "*.o_proj": {"skip": True}},
    )


def test_asymmetric_can_be_typed_over_a_file(verbs, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("symmetric: true\n")
    assert main(["run", "m", "--out", "x", "--recipe", str(path), "--asymmetric"]) == 0
    assert recipe_of(verbs).symmetric is False


def test_typed_overrides_stand_before_those_of_the_file(verbs, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text('overrides:\n  "*": {rank: 4}\n  "*.q": {bits: 8}\n')
    assert main(["run", "m", "--out", "x", "--recipe", str(path), "--override", "*.q:bits=3"]) == 0
    assert list(recipe_of(verbs).overrides.items()) == [("*.q", {"bits": 3}), ("*", {"rank": 4})]


def test_the_demo_chooses_model_and_run_directory(verbs):
    assert main(["run", "--demo"]) == 0
    _, recipe, out, demo = verbs.calls[-1]
    assert (recipe.model, recipe.bits, recipe.group_size, recipe.rank) == ("smollm2-demo", 2, 64, 64)
    assert (out, demo) == (Path("runs/demo-int2"), True)
    assert main(["run", "--demo", "--bits", "3"]) == 0
    assert verbs.calls[-1][2] == Path("runs/demo-int3")


def test_json_is_one_object_and_everything_else_goes_to_standard_error(verbs, capsys):
    assert main(["run", "--demo", "--json", "--gate", "ratio=2"]) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed["perplexity"] == PERPLEXITY
    assert printed["gates"] == [{"metric": "ratio", "limit": 2.0, "value": 45.125 / 29.5, "passed": True}]
    assert "noise" in captured.err
    assert "progress" in captured.err


def test_eval_json_has_the_fields_of_the_issue(verbs, capsys):
    assert main(["eval", "x", "--text", "embedded", "--windows", "3", "--reference", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PERPLEXITY
    assert verbs.calls[-1] == ("evaluate", Path("x"), EvaluateOptions(text="embedded", windows=3, reference="m"))


def test_what_is_not_a_number_becomes_null(verbs, capsys):
    verbs.perplexity = {"float": {"perplexity": float("inf"), "standard_error": float("nan")}, "tokens": 3}
    assert main(["eval", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["float"] == {"perplexity": None, "standard_error": None}


def test_the_summary_for_people(verbs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    long_run = "/very/long/" + "folder/" * 12 + "run"
    assert main(["run", "--demo", "--out", long_run]) == 0
    shown = capsys.readouterr().out
    for expected in ("29.500", "90.250", "45.125", "1.530", "2.281", "60.00 MB", "1.50 GB", "210", "8176 tokens"):
        assert expected in shown
    assert "2 in 200 layers, 4 in 10 layers" in shown
    assert "64 in" not in shown
    assert "few tokens [red]here[/red]" in shown
    assert "note: calibrated on the embedded text" in shown
    # Paths and commands are never wrapped, so that they can be copied.
    assert f"{long_run}/adapters/cloq\n" in shown
    assert f"  cloq eval {long_run}\n" in shown


def test_adapt_export_and_inspect(verbs, capsys):
    assert main(["adapt", "x", "--rank", "16", "--split", "balanced", "--set", "damping=0.5", "--json"]) == 0
    assert verbs.calls[-1] == ("adapt", Path("x"), {"rank": 16, "split": "balanced", "damping": 0.5})
    assert json.loads(capsys.readouterr().out)["rank"] == 16

    assert main(["adapt", "x", "--original", "m", "--out", "r", "--rank", "8", "--calibration", "embedded"]) == 0
    recipe = Recipe.from_mapping({"model": "m", "rank": 8, "calibration": "embedded"})
    assert verbs.calls[-1] == ("adapt_checkpoint", Path("x"), recipe, Path("r"))

    capsys.readouterr()
    assert main(["inspect", "x", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert verbs.calls[-1] == ("inspect", Path("x"), True, None, False)
    for expected in ("checkpoint", "2.28125", "1.23 MB", "grids", "bits per weight"):
        assert expected in shown
    assert main(["inspect", "x", "--adapter", "y", "--force", "--json"]) == 0
    assert verbs.calls[-1] == ("inspect", Path("x"), False, "y", True)
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"


def test_export_convert_and_push(verbs, capsys):
    assert main(["export", "x"]) == 0
    assert verbs.calls[-1] == ("export", Path("x"), ExportOptions())
    words = "export x --format gptq --out there --target vllm==0.33 --device cpu --adapter a --adapter b"
    assert main([*words.split(), "--split", "balanced", "--pad-rank", "16", "--dtype", "float16", "--force"]) == 0
    said = ExportOptions(
        format="gptq",
        target="vllm==0.33",
        device="cpu",
        adapters=("a", "b"),
        split="balanced",
        pad_rank=16,
        dtype="float16",
        force=True,
        out=Path("there"),
    )
    assert verbs.calls[-1] == ("export", Path("x"), said)
    assert "export  there\n" in capsys.readouterr().out
    words = "convert x --format compressed_tensors --out there --read-as gptq --json"
    assert main(words.split()) == 0
    said = ExportOptions(format="compressed_tensors", out=Path("there"))
    assert verbs.calls[-1] == ("convert", Path("x"), said, "gptq")
    assert json.loads(capsys.readouterr().out)["files"] == {"export": "there"}
    assert main(["push", "x", "me/model", "--private", "--revision", "r", "--token", "t"]) == 0
    assert verbs.calls[-1] == ("push", Path("x"), "me/model", True, "t", "r")
    assert "hub/me/model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gates", "code", "message"),
    [
        (["adapter_perplexity=45.125", "quantized=100", "float-perplexity=30"], 0, ""),
        (["adapter_perplexity=45.1249999"], 3, "adapter_perplexity is 45.125, at most 45.1249999 is allowed"),
        (["ratio=1.5"], 3, "ratio is 1.529"),
        (["ratio=1.6", "quantized_perplexity=10"], 3, "quantized_perplexity is 90.25, at most 10.0 is allowed"),
    ],
)
def test_gates(verbs, capsys, gates, code, message):
    options = [part for gate in gates for part in ("--gate", gate)]
    for verb in (["run", "--demo"], ["eval", "x"]):
        assert main([*verb, *options]) == code
        captured = capsys.readouterr()
        assert message in captured.err
        assert "45.125" in captured.out  # the results are printed also when a gate is missed


@pytest.mark.parametrize(
    "perplexity",
    [
        {},
        *(
            {name: {"perplexity": value, "standard_error": None}}
            for name, value in (("float", 29.5), ("adapter", math.nan))
        ),
    ],
)
def test_a_missing_metric_misses_its_gate(verbs, capsys, perplexity):
    verbs.perplexity = perplexity
    assert main(["eval", "x", "--gate", "adapter_perplexity=1e9", "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("progress\nnoise\nerror: gate missed: adapter_perplexity ")
    assert json.loads(captured.out)["gates"][0]["passed"] is False


def test_without_an_adapter_the_ratio_is_that_of_the_codes(verbs, capsys):
    verbs.perplexity = {
        name: {"perplexity": value, "standard_error": None} for name, value in (("float", 10.0), ("quantized", 15.0))
    }
    assert main(["eval", "x", "--gate", "ratio=1.5"]) == 0
    assert main(["eval", "x", "--gate", "ratio=1.49"]) == 3


def test_an_error_of_ours_is_one_line(verbs, capsys):
    verbs.raises = SourceError("model.safetensors is truncated;\n  fetch it again")
    assert main(["run", "--demo", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "error: model.safetensors is truncated; fetch it again"
    assert captured.out == ""


def test_an_unexpected_error_keeps_its_traceback(verbs):
    verbs.raises = ZeroDivisionError("a mistake of ours")
    with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
        main(["run", "--demo"])


def test_tasks_of_eval(verbs, capsys, tmp_path):
    options = ["--tasks", "svamp=a.json, gsm8k,gsm8k", "--problems", "2", "--shots", "1", "--out", str(tmp_path)]
    assert main(["eval", "x", *options]) == 0
    said = EvaluateOptions(tasks=("svamp=a.json", "gsm8k"), problems=2, shots=1, out=tmp_path)
    assert verbs.calls[-1] == ("evaluate", Path("x"), said)
    printed = capsys.readouterr().out
    assert "50.0%" in printed
    assert "float and adapter: 50.0% of the answers equal, McNemar's p 1 (1 against 0)" in printed
    assert "2 questions of mine [x].jsonl (lm_eval)" in printed
    assert "mean of arithmetic: float 25.0%" in printed
    assert main(["eval", "x", "--tasks", "gsm8k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["means"] == {"arithmetic": {"float": 0.25}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--demo"], "interrupted: the same command continues where it stopped."),
        (["eval", "x"], "interrupted: nothing was written."),
        (["eval", "x", "--out", "y"], "interrupted: the same command continues where it stopped."),
    ],
)
def test_an_interrupt_says_how_to_go_on(verbs, capsys, arguments, message):
    verbs.raises = KeyboardInterrupt()
    assert main(arguments) == 130
    assert message in capsys.readouterr().err


def test_the_entry_point_returns_the_exit_code():
    entry = next(iter(importlib.metadata.entry_points(group="console_scripts", name="cloq")))
    assert entry.value == "cloq_export.cli:main"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "error: /tmp/x: No space left on device; make room, or name a folder on another disk with TMPDIR.",
        ),
        (errno.EROFS, "error: /tmp/x: Read-only file system; name a folder that can be written."),
        (errno.ENAMETOOLONG, "error: /tmp/x: File name too long; choose a shorter name."),
    ],
)
def test_what_the_system_refuses_is_one_line(verbs, capsys, number, message):
    verbs.raises = OSError(number, os.strerror(number), "/tmp/x")
    assert main(["eval", "x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_a_tilde_behind_an_equals_sign(verbs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["export", "x", "--out=~/export"]) == 0
    assert verbs.calls[-1][2].out == tmp_path / "export"
