"""Write docs/results.md and its plots from the files in benchmarks/results: what was measured, how and on what.

    python benchmarks/render_results.py

A part whose file is not there says so and names the command that makes it. `tests/benchmarks` compares the page with
what this script would write.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import hardware_line

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "plots"

Content = Mapping[str, Any]


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown; columns after the first are set to the right."""
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def served_parity(content: Content) -> list[str]:
    """Return what vLLM serves against the reference."""
    rows = []
    for row in content["rows"]:
        metrics = row["metrics"]
        over = metrics["logprob_difference_over_float"]
        prompts = sum(each["prompts"] for each in row["greedy"])
        equal = sum(round(each["agreement"] * each["prompts"]) for each in row["greedy"])
        rows.append(
            (
                f"INT{row['bits'][0]}, {row['dtype']}",
                f"{sum(each['tokens'] for each in row['served']):,}",
                f"{metrics['logprob_difference_max']:.1e}",
                f"{metrics['logprob_difference_mean']:.1e}",
                "" if over is None else f"{over:.2f}",
                f"{equal} of {prompts}",
                f"{metrics['mixed_batch_difference_max']:.1e}",
                f"{metrics['live_modules']:.0%}",
                "passed" if row["passed"] else "missed",
            )
        )
    heading = (
        "served by vLLM",
        "tokens, both adapters",
        "log-probability difference from the reference, largest",
        "mean",
        "over the float model's own",
        "greedy texts equal",
        "mixed batch against single",
        "modules live",
        "gate",
    )
    return table(heading, rows)


def serving_soak(content: Content) -> list[str]:
    """Return the long run of the server."""
    result, settings = content["result"], content["settings"]
    memory = result["memory_bytes"]
    return [
        f"{result['requests']:,} requests, {settings['at_once']} at a time, over {result['adapters']} adapters, "
        f"{result['loads']} loads and {result['unloads']} unloads in between: {len(result['wrong'])} wrong answers, "
        f"{len(result['failed'])} failed requests, exit code {result['exit_code']}. Largest difference of a "
        f"log-probability from the same request alone: {result['largest_difference']:.1e} (any two adapters differ by "
        f"at least {result['least_difference_of_adapters']:.2f} on the prompts). Memory of the server and its "
        f"processes after the second round {memory[1] / 1e9:.2f} GB, at the end {memory[-1] / 1e9:.2f} GB."
    ]


def onnx_decode(content: Content) -> list[str]:
    """Return exactness and speed of the ONNX exports."""
    group = {-1: "per channel"}
    rows = [
        (
            f"{row['name']}, {row['bits']} bits, {group.get(row['group_size'], row['group_size'])}, {row['style']}"
            + (", compact" if row["two_bit"] == "compact" else ""),
            row["adapter"],
            f"{row['logit_difference_max']:.1e} (of {row['logit_max']:.0f})",
            f"{row['logit_difference_mean']:.1e}",
            f"{row['greedy_same']} of {row['greedy_prompts']}",
            f"{row['export_bytes'] / 1e6:.0f} MB",
        )
        for row in content["rows"]
    ]
    lines = table(
        ("graph", "adapter", "logit difference, largest", "mean", "greedy texts equal", "size of the graph"), rows
    )
    if content["speed"]:
        speeds = [
            (row["graph"], f"{row['tokens_per_second']:.1f}", f"{row['over_float']:.2f}") for row in content["speed"]
        ]
        lines += ["", *table(("decoding, one sequence", "tokens/s", "over the float graph"), speeds)]
    return lines


def onnx_memory(content: Content) -> list[str]:
    """Return what the graph surgery allocates."""
    return table(
        ("style", "memory allocated at the peak", "largest tensor of the float graph", "float graph"),
        [
            (
                row["style"],
                *(f"{row[key] / 1e6:.0f} MB" for key in ("peak_bytes", "largest_tensor_bytes", "float_graph_bytes")),
            )
            for row in content["rows"]
        ],
    )


def decode_cpu(content: Content) -> list[str]:
    """Return tokens per second of whole models."""
    return table(
        ("model", "engine", "bits", "adapters", "sequences", "tokens/s"),
        [
            (
                row["model"],
                row["engine"],
                "float" if row["bits"] is None else str(row["bits"]),
                str(row["adapters"]),
                str(row["sequences"]),
                f"{row['tokens_per_second']:.1f}",
            )
            for row in content["rows"]
        ],
    )


def train_cpu(content: Content) -> list[str]:
    """Return the training step."""
    sizes = content["options"]
    rows = [
        (side, f"{entry['seconds']:.3f}", f"{entry['peak_bytes'] / 1e6:.0f} MB", f"{entry['model_bytes'] / 1e6:.0f} MB")
        for side, entry in content["medians"].items()
    ]
    ratio = content["medians"]["packed"]["seconds"] / content["medians"]["bfloat16"]["seconds"]
    return [
        *table(("base", "seconds a step", "peak memory of the process", "model with adapters"), rows),
        "",
        f"{sizes['batch']} x {sizes['seqlen']} tokens, {sizes['threads']} threads; "
        f"packed takes {ratio:.2f} of the time.",
    ]


# Figures of these parts that were measured until then were judged on text that was trained on, as far as a note says.
_APART_SINCE = "2026-11-30"


def comparison(content: Content) -> list[str]:
    """Return the start points after training."""
    from cloq_export.lab.comparison_report import comparison_table

    lines = comparison_table(content).strip().splitlines()
    if any("curve" in row or "held_out_loss" in row for row in content["rows"]) and not any(
        "held_out_tokens_calibrated_on" in row for row in content["rows"]
    ):
        lines += [
            "",
            f"Measured before {_APART_SINCE} (version 0.1.0 in the making), on bases that were calibrated on windows "
            "of the whole validation split, also of its end, which trainings hold out: where rates were chosen, steps "
            "kept and the perplexity of held-out examples measured, a part of the text was known to the codes. "
            "Perplexities of the test split are of new text. The command above measures anew, on an end that no base "
            "sees.",
        ]
    return lines


def frontier(content: Content) -> list[str]:
    """Return what every method makes of a model, by stored bits."""
    from cloq_export.lab.frontier_report import frontier_table
    from cloq_export.parity.tasks import CONTINUATIONS
    from cloq_export.recipe import REFINE_STEPS

    measured = content["frontier"]
    steps = measured["quantize"].get("refine_steps") or REFINE_STEPS
    notes = [
        "[method.md](method.md) and [recipes.md](recipes.md) say what each method is; ours are all on one integer "
        f"grid, and train for at most {steps} steps a block or layer, and `cloq-refine` as many more for the model."
    ]
    if "apiq-lw" in measured["methods"]:
        notes.append("ApiQ's two schemes make their authors' 20 passes over the windows instead.")
    if "lq-lora" in measured["methods"]:
        notes.append("LQ-LoRA is without its Fisher weights; without an adapter it and LoftQ are plain rounding.")
    if measured["problems"]:
        chance = "; guessing gives 0.25" if measured["questions"] == CONTINUATIONS else ""
        notes.append(
            f"`{measured['questions']}` is the share of {measured['problems']} questions that are answered right"
            f"{chance}."
        )
        if any("accuracy" not in row for row in content["rows"] if not row.get("failed")):
            notes.append("Where it is empty, the row is from before the recipe asked them.")
    if any(row.get("method") == "cloq-refine" for row in content["rows"]):
        notes.append(_tokens_drawn(content["rows"], measured["quantize"], steps))
    return [*frontier_table(content).strip().splitlines(), "", " ".join(notes)]


def _tokens_drawn(rows: Sequence[Content], options: Content, steps: int) -> str:
    """Return what text each method was given."""
    known = {row["method"]: row["distinct_tokens"] for row in rows if "distinct_tokens" in row}
    if "cloq-refine" in known:
        refined = known["cloq-refine"]
        return (
            f"All methods and peers are solved on {options['samples']} windows of {options['seqlen']} tokens; "
            f"`cloq-refine` trains the model on {refined['refined']:,} tokens more of the same texts, and refinements "
            f"are judged by {refined['judged']:,} that nothing else is drawn from."
        )
    solved, at_once = options["samples"] * options["seqlen"], max(1, 1024 // options["seqlen"])
    drawn = (steps + 8) * at_once * options["seqlen"]
    return (
        f"All methods and peers were solved on the same {solved:,} tokens; `cloq-refine` drew {drawn:,} more of the "
        f"same texts to train the model and to judge it. Measured before {_APART_SINCE} (version 0.1.0 in the making), "
        "when windows could overlap: those that judged a refinement, and chose the step that was kept, shared tokens "
        "with those that it was trained on. Perplexities are of the test splits, which are new text. The command above "
        "measures anew, with windows that are apart."
    )


def refine_speed(content: Content) -> list[str]:
    """Return block refinement's time beside AutoRound's."""
    options = content["options"]
    rows = [
        (
            side,
            f"{median['seconds_per_block']:.1f}",
            f"{median['over_autoround']:.2f}",
            f"{median['iterations_per_block']:.0f}",
            f"{median['seconds_per_iteration']:.2f}",
        )
        for side, median in content["medians"].items()
    ]
    heading = ("side", "seconds a block", "of AutoRound's time", "iterations made", "seconds an iteration")
    return [
        *table(heading, rows),
        "",
        f"INT{options['bits']}, rank {options['rank']}, the first {options['blocks']} blocks, {options['samples']} x "
        f"{options['seqlen']} tokens, at most {content['iterations']} iterations for each block; ours ends a block "
        "where held-out windows gain no more. Seconds have all in them, solving the start too. AutoRound takes "
        f"{content['windows_per_iteration']} windows in an iteration; so does `same tokens`, and `as shipped` takes "
        "1,024 tokens.",
    ]


# File -> heading, command, what renders it.
PARTS: Mapping[str, tuple[str, str, Callable[[Content], list[str]]]] = {
    "served_parity.json": (
        "Served equals trained: vLLM",
        "python benchmarks/served_parity.py --python build/engines/vllm/bin/python",
        served_parity,
    ),
    "serving_soak.json": (
        "A server under load",
        "python benchmarks/serving_soak.py runs/demo-int2 --python build/engines/vllm/bin/python "
        "--json benchmarks/results/serving_soak.json",
        serving_soak,
    ),
    "onnx_decode.json": (
        "ONNX Runtime",
        "python benchmarks/onnx_decode.py --runs RUN2 RUN3 RUN4",
        onnx_decode,
    ),
    "onnx_memory.json": (
        "Memory of the ONNX surgery",
        "python benchmarks/onnx_memory.py RUN --json benchmarks/results/onnx_memory.json",
        onnx_memory,
    ),
    "decode_cpu.json": (
        "Whole models on the CPU",
        "python benchmarks/decode_cpu.py --vllm-python PYTHON --json benchmarks/results/decode_cpu.json",
        decode_cpu,
    ),
    "compare-small.json": (
        "Which start trains best",
        "cloq compare small --out COMPARISON",
        comparison,
    ),
    "compare-refined.json": (
        "What a refined start is worth after training",
        "cloq compare refined --out COMPARISON",
        comparison,
    ),
    "frontier-small.json": (
        "Perplexity for every stored bit at 2 bits",
        "cloq frontier --out FRONTIER",
        frontier,
    ),
    "frontier-small-3-4.json": (
        "The same at 3 and 4 bits",
        "cloq frontier --recipe small-3-4 --out FRONTIER",
        frontier,
    ),
    "refine_speed.json": (
        "Time of block refinement",
        "python benchmarks/refine_speed.py --json benchmarks/results/refine_speed.json",
        refine_speed,
    ),
    "train_cpu.json": (
        "A training step on the CPU",
        "python benchmarks/train_cpu.py RUN --json benchmarks/results/train_cpu.json",
        train_cpu,
    ),
    "gpu.json": (
        "GPU",
        "python benchmarks/gpu_all.py --json benchmarks/results/gpu.json",
        lambda content: ["```json", json.dumps(content, indent=1), "```"],
    ),
}

INTRODUCTION = """# Results

What was measured, from the files in `benchmarks/results`; `python benchmarks/render_results.py` writes this page. What
each benchmark does and needs is said in [benchmarks](../benchmarks/README.md). Two more pages have tables of their own:
perplexity and time of the initialisation in [quality.md](quality.md), single layers on the CPU in
[kernels.md](kernels.md)."""


def plots(path: Path) -> dict[str, str]:
    """Return the plots of a result file, as SVG by file name; only those of the frontier have some."""
    if not path.name.startswith("frontier-"):
        return {}
    from cloq_export.lab.frontier_report import frontier_plots

    drawn = frontier_plots(json.loads(path.read_text(encoding="utf-8")))
    return {f"{path.stem}-{name}.svg": svg for name, svg in drawn.items()}


def render() -> str:
    """Return the page."""
    lines = [INTRODUCTION]
    for name, (heading, command, rendered) in PARTS.items():
        lines += ["", f"## {heading}", "", f"`{command}`"]
        path = RESULTS / name
        if not path.exists():
            where = "No GPU has been at hand yet: nothing is measured." if name == "gpu.json" else "Not measured yet."
            lines += ["", where]
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if "hardware" in content:
            lines += ["", f"{hardware_line(content['hardware'])}."]
        lines += ["", *rendered(content)]
        for plot in plots(path):
            lines += ["", f"![{plot.removesuffix('.svg')}]({PLOTS.name}/{plot})"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    PAGE.write_text(render(), encoding="utf-8")
    shutil.rmtree(PLOTS, ignore_errors=True)
    PLOTS.mkdir()
    for path in RESULTS.glob("*.json"):
        for name, svg in plots(path).items():
            (PLOTS / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
