"""The report: figures for the gate, the page, and its documentation."""

from __future__ import annotations

import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cloq_export.errors import RunDirectoryError
from cloq_export.parity.gate import GATES, TASK_GATES, judge
from cloq_export.parity.numerics import compare_logprobs
from cloq_export.parity.plots import histogram_plot, line_plot, matrix_plot, scatter_plot
from cloq_export.parity.questions import question_facts
from cloq_export.parity.report import collect_metrics, figure, render_html, schema, write_report

DOCS = Path(__file__).resolve().parents[2] / "docs"
HOSTILE = '<script src="http://x.example/a.js">&"\'</script>'


def difference(largest: float | None) -> dict[str, Any]:
    import torch

    empty = {"0.5": None, "0.9": None, "0.99": None, "0.999": None}
    if largest is None:
        return {"tokens": 3, "max": None, "mean": None, "quantiles": empty, "histogram": None}
    return compare_logprobs([torch.tensor([0.0, largest / 2, largest], dtype=torch.float64)], [torch.zeros(3)])


def perplexity(model: str, adapter: str | None, value: float | None) -> dict[str, Any]:
    entry = {
        "model": model,
        "adapter": adapter,
        "perplexity": value,
        "standard_error": 0.5,
        "by_position": {"position": [8, 16], "perplexity": [40.0, 20.0]},
    }
    if model != "float":
        entry |= {"ratio_to_float": value, "ratio_lower": 1.0, "ratio_upper": value}
    return entry


@pytest.fixture
def report() -> dict[str, Any]:
    """Return a complete report with two adapters, one of them named as an attack would name it."""
    names = ["good", HOSTILE]
    modules = [f"model.layers.{block}.mlp.{kind}_proj" for block in (0, 1, 10) for kind in ("up", "down")]
    presences = [
        {"module": module, "verdict": "live", "presence": 1.0, "error": 0.01, "effect": 0.1, "gain": 1.0}
        for module in [*modules, "lm_head"]
    ]
    dead = {**presences[0], "verdict": "undecided", "presence": None, "error": None, "gain": 4.0}
    answers = {"accuracy": 0.5, "other_accuracy": 0.25, "answers": ["1", "2"], "correct": [True, False]}
    pair = {
        "first": "reference",
        "second": "served",
        "agreement": 0.5,
        "only_first": 1,
        "only_second": 0,
        "p_value": 1.0,
    }
    numerics = [
        {"measured": "served", "against": "reference", "adapter": name, **difference(value)}
        for name, value in zip(names, (1e-4, 3e-4), strict=True)
    ]
    numerics.append({"measured": "reference", "against": "float", "adapter": "good", **difference(0.5)})
    made: dict[str, Any] = {
        "format": "cloq-parity",
        "format_version": 1,
        "passed": False,
        "judged": {"passed": False, "reasons": [HOSTILE]},
        "export": HOSTILE,
        "layout": "gptq_v2",
        "bits": [2, 4],
        "base_fingerprint": "sha256:00",
        "reference": {"name": "org/model", "fingerprint": "sha256:11"},
        "runtime": "hf",
        "dtype": "float32",
        "adapters": [{"name": name, "folder": "x", "modules": 7, "bound_to_this_base": True} for name in names],
        "conditions": {
            "text": "wikitext2",
            "text_sha256": "22",
            "window": 16,
            "windows": 2,
            "bos": "auto",
            "begin_tokens": [1],
            "tasks": ["ppl", "gsm8k"],
            "prompts": 3,
            "new_tokens": 4,
            "longest": 60,
            "liveness_tokens": 16,
            "seed": 0,
            "device": "cpu",
            "threads": 1,
        },
        "certificate": {"passed": True, "files": 9, "modules": 14, "not_covered": [], "reason": None},
        "provenance": {
            "findings": [
                {"what": "codes", "verdict": "proven", "reason": ""},
                {"what": "adapter good", "verdict": "not recorded", "reason": "nothing recorded it"},
                {"what": "reference", "verdict": "proven", "reason": ""},
            ],
            "probes": [{"adapter": "good", "precision": "float32", "tokens": 9, "max": 2e-4, "mean": 1e-4}],
            "recorded_ratios": [{"adapter": "good", "ratio": 1.25}],
        },
        "float_part": [{"what": "config", "verdict": "contradicted", "reason": HOSTILE}],
        "noise_floor": difference(0.0),
        "numerics": numerics,
        "quality": {
            "perplexity": [
                perplexity("float", None, 29.0),
                *(perplexity("served", name, value) for name, value in zip(names, (1.2, 1.5), strict=True)),
            ],
            "tasks": {
                "gsm8k": [
                    {
                        "questions": 2,
                        "questions_sha256": "00",
                        "shots": 0,
                        "max_new_tokens": 256,
                        "version": "3.0",
                        "definition": "lm_eval",
                        "origin": "file",
                        "adapter": "good",
                        "other_rule": "strict",
                        "models": {"float": answers, "reference": answers, "served": {**answers, "accuracy": 0.0}},
                        "comparisons": [pair],
                        **question_facts(2, 3, ("a", "a"), ({"a"}, {"a"}), {"a"}, 0.01),
                    }
                    | other
                    for other in ({}, {"adapter": HOSTILE, "models": dict.fromkeys(["float", "served"], answers)})
                ]
            },
        },
        "greedy": [
            {
                "adapter": name,
                "prompts": prompts,
                "new_tokens": 4,
                "agreement": share,
                "ties": 0,
                "flips": flips,
                "tie_gap": 2e-3,
                "first_flip": None,
            }
            for name, prompts, share, flips in (("good", 3, 1.0, 0), (HOSTILE, 1, 0.0, 1))
        ],
        "decoding": [
            {
                "adapter": name,
                "kind": kind,
                "prompts": 2,
                "longest_prompt": 50,
                "tokens": 8,
                "gap_max": largest,
                "gap_mean": largest / 8,
                "worst": {"prompt": 1, "position": 2, "served": 7, "gap": largest},
            }
            for name, kind, largest in (
                ("good", "greedy", 0.25),
                (HOSTILE, "longest", 0.5),
                (None, "mixed", 0.0),
                (HOSTILE, "mixed", 2.0),
            )
        ],
        "scales": {
            "adapter": HOSTILE,
            "tokens": 90,
            "modules": 14,
            "unseen": [],
            "largest": 0.02,
            "candidates": [{"module": HOSTILE, "error": -0.03, "standard_error": 0.001, "sure": 0.02}],
            "found": {HOSTILE: 0.01},
        },
        "liveness": [
            {"adapter": "good", "sequences": 1, "tokens": 15, "live_share": 1.0, "modules": presences},
            {"adapter": HOSTILE, "sequences": 1, "tokens": 15, "live_share": 6 / 7, "modules": [dead, *presences[1:]]},
        ],
        "isolation": {"requests": 6, "max": 1e-6, "by_adapter": [{"adapter": None, "max": 1e-6, "mean": 1e-7}]},
        "layers": [
            {"module": m, "bits": 2, "rank": 4, "error_quantized": 0.5, "error_adapted": 0.2, "error_bound": None}
            for m in modules
        ],
        "metrics": {},
        "gates": [],
        "missing": [{"what": HOSTILE, "reason": HOSTILE}],
        "notes": [HOSTILE],
        "seconds": {"float": 1.25},
        "versions": {"torch": "2"},
    }
    made["metrics"] = collect_metrics(made) | {"judged": 0.0}
    made["gates"] = judge({"live_modules": 1.0, "perplexity_ratio": 1.4}, made["metrics"])
    return made


def test_the_worst_adapter_counts(report: dict[str, Any]) -> None:
    metrics = report["metrics"]
    assert set(metrics) == {*GATES, *(f"gsm8k_{figure}" for figure in TASK_GATES)}
    assert metrics["logprob_difference_max"] == metrics["packed_logprob_difference_max"] == 3e-4
    assert metrics["perplexity_ratio"] == 1.5
    assert metrics["live_modules"] == 6 / 7
    assert (metrics["greedy_agreement"], metrics["greedy_flips"]) == (0.75, 1)
    assert (metrics["gsm8k_accuracy"], metrics["gsm8k_accuracy_drop"], metrics["gsm8k_agreement"]) == (0.0, 0.5, 0.5)
    assert metrics["noise_floor_max"] == 0
    assert (metrics["decode_gap_max"], metrics["decode_gap_mean"]) == (0.5, 0.0625)
    assert (metrics["mixed_decode_gap_max"], metrics["mixed_decode_gap_mean"]) == (2.0, 0.25)
    assert metrics["scale_error_max"] == 0.02
    assert metrics["longest_difference_max"] is None  # no row of it
    asked = [metrics[f"gsm8k_questions_{figure}"] for figure in ("missing", "repeated", "seen")]
    assert asked == [1.0, 1.0, 2.0]
    assert metrics["logprob_difference_over_float"] is None  # nothing to compare with in float32


def test_one_adapter_that_is_missing_makes_the_figure_missing(report: dict[str, Any]) -> None:
    report["numerics"][0] |= difference(None)
    report["quality"]["perplexity"][1]["ratio_to_float"] = None
    report["liveness"][0]["live_share"] = None
    report["isolation"] = None
    metrics = collect_metrics(report)
    for name in ("logprob_difference_max", "perplexity_ratio", "live_modules", "mixed_batch_difference_max"):
        assert metrics[name] is None, name
    jsonschema.validate(report, schema())


def test_the_page_stands_alone_whatever_names_it_shows(tmp_path: Path, report: dict[str, Any]) -> None:
    jsonschema.validate(report, schema())
    paths = write_report(tmp_path / "new" / "folder", report)
    page = Path(paths["html"]).read_text(encoding="utf-8")
    assert page == render_html(report)
    tags: list[str] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {name for name, _ in attributes} & {"src", "href", "onload", "onclick"}

    Reader().feed(page)
    assert "script" not in tags
    assert tags.count("svg") == 5  # differences, positions, layers and a matrix for each adapter
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
    assert "undecided, product times 4" in page


def test_a_folder_that_is_a_file(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is not a folder"):
        write_report(tmp_path / "file", report)


def test_plots_of_little_or_nothing() -> None:
    assert str(line_plot([], x_label="x", y_label="y")) == ""
    assert str(line_plot([("a", [1, 2], [math.nan, 0.0])], x_label="x", y_label="y", log_y=True)) == ""
    assert str(histogram_plot([("a", [0.1, 1.0], [0, 0, 0])], x_label="x", y_label="y")) == ""
    for drawing in (
        line_plot([("a", [1], [5.0])], x_label="x", y_label="y"),
        line_plot([("a", [1, 2], [5.0, 5.1])], x_label="x", y_label="y", log_y=True),
        scatter_plot([("a", [1, 2], [1e-5, 1e5], [None, math.nan])], x_label="x", y_label="y", log_y=True),
        scatter_plot([("a", [1], [0.5], [1.0])], x_label="x", y_label="y"),
        histogram_plot([("a", [0.1, 1.0], [3, 0, 0])], x_label="x", y_label="y"),
        matrix_plot(["0"], ["up"], lambda row, column: None),
    ):
        ElementTree.fromstring(str(drawing))


def test_points_have_bars_and_tell_their_series_apart() -> None:
    series = [(f"m{n}", [1.0, 2.0], [10.0 + n, 100.0 + n], [1.0, None]) for n in range(24)]
    drawing = ElementTree.fromstring(str(scatter_plot(series, x_label="x", y_label="y", log_y=True)))
    bars = [shape for shape in drawing if shape.get("class", "").startswith("bar")]
    assert len(bars) == 24
    marks = [shape for shape in drawing if shape.tag in ("circle", "polygon")]
    assert len(marks) == 3 * 24
    # The legend's come first; what differs there is the height alone, if two series look alike.
    looks = set()
    for mark in marks[:24]:
        corners = [tuple(map(float, pair.split(","))) for pair in (mark.get("points") or "0,0").split()]
        looks.add((mark.tag, mark.get("class"), tuple(round(y - corners[0][1]) for _, y in corners)))
    assert len(looks) == 24
    point, bar = marks[24], bars[0]
    assert float(bar.get("y2", "")) < float(point.get("cy", "")) < float(bar.get("y1", ""))
    # A line across stands where its value is, and in the legend.
    leveled = ElementTree.fromstring(
        str(scatter_plot([("a", [1.0], [2.0], [None])], x_label="x", y_label="y", level=("float", 1.0)))
    )
    sample, across = [shape for shape in leveled if shape.get("class") == "level"]
    assert float(across.get("y1", "")) > float(leveled.findall("circle")[-1].get("cy", ""))
    assert sample.get("x2") == "88"
    assert [text.text for text in leveled.findall("text")].count("float") == 1
    # A bar that would go below 0 on a logarithmic axis ends at its point.
    wide = ElementTree.fromstring(
        str(scatter_plot([("a", [1.0, 2.0], [1.0, 50.0], [2.0, 5.0])], x_label="x", y_label="y", log_y=True))
    )
    bar = next(shape for shape in wide if shape.get("class", "").startswith("bar"))
    assert bar.get("y1") == [shape for shape in wide if shape.tag == "circle"][1].get("cy")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "not measured"), (0.0, "0"), (1, "1"), (1.23456, "1.2346"), (1e-5, "1.00e-05"), (12345.6, "1.23e+04")],
)
def test_figures_for_people(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_every_gate_is_documented() -> None:
    text = (DOCS / "verify.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (at most|at least) \|", text, re.MULTILINE))
    gates = {**GATES, **{f"TASK_{figure}": gate for figure, gate in TASK_GATES.items()}}
    assert rows == {name: gate.bound for name, gate in gates.items()}
    for gate in GATES.values():
        assert gate.meaning in text


def test_the_workflow_is_yaml() -> None:
    workflow = yaml.safe_load((DOCS / "github-actions.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["parity"]["steps"]
    assert any("--cloq-export" in step.get("run", "") for step in steps)
