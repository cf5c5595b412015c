"""The report: figures for the gate, the page, and its documentation."""

from __future__ import annotations

import dataclasses
import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from cloq_export.errors import RunDirectoryError
from cloq_export.parity.divergence import Divergence
from cloq_export.parity.gate import GATES, TASK_GATES, judge
from cloq_export.parity.generation import WorstToken, WrittenTexts
from cloq_export.parity.isolation import AdapterIsolation, Isolation
from cloq_export.parity.liveness import AdapterLiveness, Presence
from cloq_export.parity.metrics import collect_metrics
from cloq_export.parity.numerics import Flip, GreedyTexts, LogprobDifferences, compare_logprobs
from cloq_export.parity.page import figure, render_html
from cloq_export.parity.plots import histogram_plot, line_plot, matrix_plot, scatter_plot
from cloq_export.parity.power import SmallestLoss
from cloq_export.parity.provenance import Finding, ProbeDifferences, RecordedRatio
from cloq_export.parity.quality import ByPosition, PairedTest, PerplexityRow, Ratio
from cloq_export.parity.questions import question_facts
from cloq_export.parity.report import (
    CertificateCheck,
    Conditions,
    DivergenceRow,
    FloatModel,
    Judged,
    LayerErrors,
    Missing,
    NumericsRow,
    ParityReport,
    Provenance,
    Quality,
    ServedAdapter,
    schema,
    write_report,
)
from cloq_export.parity.scales import ScaleError, ScaleErrors
from cloq_export.parity.task_report import Comparison, ModelAnswers, RecordedAnswers, TaskEntry, VerifiedTask

DOCS = Path(__file__).resolve().parents[2] / "docs"
HOSTILE = '<script src="http://x.example/a.js">&"\'</script>'


def difference(largest: float | None) -> LogprobDifferences:
    measured = torch.tensor([0.0, (largest or 0) / 2, math.nan if largest is None else largest], dtype=torch.float64)
    return compare_logprobs([measured], [torch.zeros(3)])


def perplexity(model: str, adapter: str | None, value: float) -> PerplexityRow:
    ratio = None if model == "float" else Ratio(value, 1.0, value)
    return PerplexityRow(model, adapter, value, 0.5, ByPosition((8, 16), (40.0, 20.0)), ratio)


def verified(adapter: str, models: dict[str, ModelAnswers], recorded: RecordedAnswers | None) -> VerifiedTask:
    compared = (Comparison("reference", "served", 0.5, PairedTest(1, 0, 1.0, 0.5, 0.9)),)
    entry = TaskEntry(2, "00", 0, 256, "3.0", "lm_eval", "file", adapter, "strict", models, compared)
    return VerifiedTask(entry, question_facts(("a", "a"), ({"a"}, {"a"}), {"a"}, asked=3, limit=0.01), recorded)


@pytest.fixture
def report() -> ParityReport:
    """Return a complete report with two adapters, one of them named as an attack would name it."""
    names = ["good", HOSTILE]
    modules = [f"model.layers.{block}.mlp.{kind}_proj" for block in (0, 1, 10) for kind in ("up", "down")]
    presences = [Presence(module, "live", 1.0, 0.01, 0.1) for module in [*modules, "lm_head"]]
    dead = Presence(modules[0], "undecided", None, None, 0.1, 4.0)
    answers = ModelAnswers(0.5, 0.25, ("1", "2"), (True, False))
    wrong = dataclasses.replace(answers, accuracy=0.0)
    differing = {"good": 1e-4, HOSTILE: 3e-4, None: 2e-4}
    made = ParityReport(
        judged=Judged(False, (HOSTILE,)),
        export=HOSTILE,
        layout="gptq_v2",
        bits=(2, 4),
        base_fingerprint="sha256:00",
        reference=FloatModel("org/model", "sha256:11"),
        runtime="hf",
        dtype="float32",
        adapters=tuple(ServedAdapter(name, "x", 7, True) for name in names),
        conditions=Conditions("wikitext2", "22", 16, 2, "auto", (1,), ("ppl", "gsm8k"), 3, 4, 60, 16, 0, "cpu", 1),
        certificate=CertificateCheck(True, 9, 14),
        provenance=Provenance(
            (
                Finding("codes", "proven"),
                Finding("adapter good", "not recorded", "nothing recorded it"),
                Finding("reference", "proven"),
            ),
            (ProbeDifferences("good", "float32", 9, 2e-4, 1e-4),),
            (RecordedRatio("good", 1.25),),
        ),
        float_part=(Finding("config", "contradicted", HOSTILE),),
        noise_floor=difference(0.0),
        numerics=(
            *(NumericsRow("served", "reference", name, difference(value)) for name, value in differing.items()),
            NumericsRow("reference", "float", "good", difference(0.5)),
        ),
        divergence=tuple(
            DivergenceRow("served", against, name, Divergence(15, estimate, 20, value, 2 * value, 3 * value, 1 - value))
            for against, estimate in (("float", "exact"), ("reference", "lower bound"))
            for name, value in (("good", 0.25), (HOSTILE, 0.5))
        ),
        quality=Quality(
            (perplexity("float", None, 29.0), perplexity("served", "good", 1.2), perplexity("served", HOSTILE, 1.5)),
            {
                "gsm8k": (
                    verified(
                        "good",
                        {"float": answers, "reference": answers, "served": wrong},
                        RecordedAnswers(2, 1, 0, 0.5),
                    ),
                    verified(HOSTILE, dict.fromkeys(["float", "served"], answers), None),
                )
            },
        ),
        greedy=(
            GreedyTexts("good", 3, 4, 1.0, 0, 0, 2e-3, None),
            GreedyTexts(HOSTILE, 1, 4, 0.0, 0, 1, 2e-3, Flip(0, 1, 2, None, None)),
        ),
        decoding=tuple(
            WrittenTexts(name, kind, 2, 50, 8, gap, gap / 8, WorstToken(1, 2, 7, gap))
            for name, kind, gap in (
                ("good", "greedy", 0.25),
                (HOSTILE, "longest", 0.5),
                (None, "mixed", 0.0),
                (HOSTILE, "mixed", 2.0),
            )
        ),
        scales=ScaleErrors(
            (HOSTILE, None), 90, 14, (), 0.02, (ScaleError(HOSTILE, (HOSTILE,), -0.03, 0.001, 0.02),), {HOSTILE: 0.01}
        ),
        liveness=(
            AdapterLiveness("good", 1, 15, 1.0, tuple(presences)),
            AdapterLiveness(HOSTILE, 1, 15, 6 / 7, (dead, *presences[1:])),
        ),
        isolation=Isolation(6, 1e-6, (AdapterIsolation(None, 1e-6, 1e-7),)),
        layers=tuple(LayerErrors(module, 2, 4, 0.5, 0.2, None) for module in modules),
        metrics={},
        gates=(),
        missing=(Missing(HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        seconds={"float": 1.25},
        versions={"torch": "2"},
    )
    metrics = collect_metrics(made) | {"judged": 0.0}
    gates = judge({"live_modules": 1.0, "perplexity_ratio": 1.4, "gsm8k_drop_upper": 0.1}, metrics)
    gates[-1] = dataclasses.replace(gates[-1], finds=SmallestLoss(0.1, 0.004, 0.05))
    return dataclasses.replace(made, metrics=metrics, gates=tuple(gates))


def test_the_worst_adapter_counts(report: ParityReport) -> None:
    metrics = report.metrics
    assert set(metrics) == {*GATES, *(f"gsm8k_{figure}" for figure in TASK_GATES)}
    assert metrics["logprob_difference_max"] == metrics["packed_logprob_difference_max"] == 3e-4
    assert metrics["perplexity_ratio"] == 1.5
    assert metrics["live_modules"] == 6 / 7
    assert (metrics["greedy_agreement"], metrics["greedy_flips"]) == (0.75, 1)
    assert (metrics["gsm8k_accuracy"], metrics["gsm8k_accuracy_drop"], metrics["gsm8k_agreement"]) == (0.0, 0.5, 0.5)
    assert metrics["noise_floor_max"] == 0
    assert metrics["gsm8k_recorded_p_value"] == 0.5  # nothing is said of the adapter that nobody asked
    assert (metrics["decode_gap_max"], metrics["decode_gap_mean"]) == (0.5, 0.0625)
    assert (metrics["mixed_decode_gap_max"], metrics["mixed_decode_gap_mean"]) == (2.0, 0.25)
    assert metrics["scale_error_max"] == 0.02
    distances = [metrics[f"kl_to_float_{figure}"] for figure in ("mean", "99", "max")]
    assert distances == [0.5, 1.0, 1.5]
    assert metrics["top1_agreement_reference"] == 0.5
    assert metrics["token_mult_prob_error"] == pytest.approx((1 + math.exp(1.5e-4) + math.exp(3e-4)) / 3)
    assert metrics["longest_difference_max"] is None  # no row of it
    asked = [metrics[f"gsm8k_questions_{figure}"] for figure in ("missing", "repeated", "seen")]
    assert asked == [1.0, 1.0, 2.0]
    assert metrics["logprob_difference_over_float"] is None  # nothing to compare with in float32


def test_one_adapter_that_is_missing_makes_the_figure_missing(report: ParityReport) -> None:
    rows = list(report.numerics)
    perplexities = list(report.quality.perplexity)
    rows[0] = dataclasses.replace(rows[0], differences=difference(None))
    perplexities[1] = dataclasses.replace(perplexities[1], ratio=Ratio(None, None, None))
    report = dataclasses.replace(
        report,
        numerics=tuple(rows),
        quality=dataclasses.replace(report.quality, perplexity=tuple(perplexities)),
        liveness=(dataclasses.replace(report.liveness[0], live_share=None), report.liveness[1]),
        isolation=None,
    )
    metrics = collect_metrics(report)
    for name in ("logprob_difference_max", "perplexity_ratio", "live_modules", "mixed_batch_difference_max"):
        assert metrics[name] is None, name
    jsonschema.validate(report.to_json(), schema())


def test_the_page_stands_alone_whatever_names_it_shows(tmp_path: Path, report: ParityReport) -> None:
    jsonschema.validate(report.to_json(), schema())
    paths = write_report(tmp_path / "new" / "folder", report).files
    assert paths is not None
    page = Path(paths["html"]).read_text(encoding="utf-8")
    assert page == render_html(report.to_json())
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
    assert (
        "It sees a loss of 10.00% with a probability of 95%; it is missed by chance with a probability of 0.4%" in page
    )


def test_a_folder_that_is_a_file(tmp_path: Path, report: ParityReport) -> None:
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
