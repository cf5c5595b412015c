"""Measure perplexity of the float model, of Q alone and of Q with its adapter, for many settings, widths and seeds.

Every setting goes through the public pipeline into a run directory that is removed afterwards, and is measured from the
files in it, on three texts: the slice of WikiText-2 that was looked at while defaults were chosen, the rest of that
file, and GSM8K problems. The JSON file is written after every row; called again, the script goes on where it stopped.

    python benchmarks/init_quality.py --settings default,paper --bits 2,3,4 --seeds 0,1
    python benchmarks/init_quality.py --markdown benchmarks/results/init_quality.json --into docs/quality.md
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from environment import describe_hardware, model_folder, put_into
from init_quality_settings import SETTINGS
from init_quality_tables import markdown, show

from cloq_export.errors import CloqError
from cloq_export.files.atomic import write_json
from cloq_export.recipe import PRESETS, Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "init_quality.json"
# What a setting may not say, because it is an axis of the table or the same for all.
_NOT_OF_A_SETTING = ("model", "bits", "seed", "samples", "seqlen", "calibration", "device", "eval_text", "codes_from")
# What the pipeline's own evaluation is cut down to: here everything is measured afterwards.
_HARDLY_EVALUATED = {"eval_text": "embedded", "eval_window": 2, "eval_windows": 1}


@dataclasses.dataclass(frozen=True)
class JudgedText:
    """A text to measure on.

    Args:
        name: in the table.
        tokens: (tokens,) int64, from the first window on.
        windows: how many windows of it at most.
        about: what stands in the report: origin, hash, how many tokens are left out at the start.
    """

    name: str
    tokens: Any
    windows: int
    about: dict[str, Any]


def judged_texts(tokenizer: Any, options: argparse.Namespace) -> list[JudgedText]:
    """Return the three texts; `test` and `rest` are two parts of one file, and nothing is in both."""
    from cloq_export.texts.corpora import evaluation_text, tokenize_text

    wikitext, problems = evaluation_text("wikitext2"), evaluation_text("gsm8k")
    ids = tokenize_text(tokenizer, wikitext.text)
    left_out = options.windows * options.window
    parts = [
        ("wikitext2", wikitext, ids, options.windows, 0),
        ("wikitext2-rest", wikitext, ids[left_out:], options.rest_windows, left_out),
        ("gsm8k", problems, tokenize_text(tokenizer, problems.text), options.windows, 0),
    ]
    return [
        JudgedText(
            name,
            tokens,
            windows,
            {
                "sha256": text.sha256,
                "skipped_tokens": skipped,
                "windows": min(windows, len(tokens) // options.window),
                "window": options.window,
            },
        )
        for name, text, tokens, windows, skipped in parts
    ]


class Report:
    """The JSON file: rows, and everything that they depend on."""

    def __init__(self, path: Path, conditions: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**environment, "conditions": conditions, "settings": {}, "rows": []}
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(
            name for name in {*found["conditions"], *conditions} if found["conditions"].get(name) != conditions[name]
        )
        if differing:
            raise SystemExit(f"{path} was measured with another {', '.join(differing)}; name another file with --json.")
        self.content |= {"settings": found["settings"], "rows": found["rows"]}
        machines = {key: found[key] for key in environment if found[key] != environment[key]}
        if machines:
            print(f"note: {path} was begun with other {', '.join(machines)}; it now names these", file=sys.stderr)

    def has(self, **key: Any) -> bool:
        """Return whether a row with these fields is there."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.content["rows"])

    def describe_setting(self, name: str, fields: dict[str, Any]) -> None:
        """Note the options of a setting.

        Raises:
            SystemExit: rows of that name were measured with other options.
        """
        before = self.content["settings"].get(name)
        if before is not None and before != fields and self.has(setting=name):
            changed = sorted(key for key in {*before, *fields} if before.get(key) != fields.get(key))
            raise SystemExit(
                f"{self.path} holds rows of {name!r} that were measured with another {', '.join(changed)}; remove "
                "them, or name another file with --json."
            )
        self.content["settings"][name] = fields

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.content["rows"].append(row)
        write_json(self.path, self.content, sort_keys=False)
        print(
            f"{row['setting']} INT{row['bits']} seed {row['seed']}, {row['model']} on {row['text']}: "
            f"{row['perplexity']:.3f}"
            if row["model"] != "float"
            else f"float on {row['text']}: {row['perplexity']:.3f}",
            file=sys.stderr,
        )


def measured_rows(model: Any, texts: list[JudgedText], window: int) -> Iterator[tuple[JudgedText, dict[str, Any]]]:
    """Yield perplexity and standard error of one model on each text."""
    from cloq_export.parity.perplexity import perplexity

    for text in texts:
        found = perplexity(model, text.tokens, window=window, windows=text.windows, label=None)
        error = found.standard_error
        yield (
            text,
            {
                "perplexity": found.perplexity,
                "standard_error": error if error == error else None,
                "tokens": found.tokens,
            },
        )


def measure_float(source: str, texts: list[JudgedText], options: argparse.Namespace, report: Report) -> None:
    """Measure the float model on the texts where that has not been done."""
    import torch

    from cloq_export.models.source import open_model

    missing = [text for text in texts if not report.has(model="float", text=text.name)]
    if not missing:
        return
    model = open_model(source, dtype=torch.float32).model
    started = time.perf_counter()
    for text, figures in measured_rows(model, missing, options.window):
        seconds = time.perf_counter() - started
        identity = {"setting": "float", "bits": None, "seed": None, "text": text.name, "model": "float"}
        report.add({**identity, **figures, "seconds": None, "seconds_measuring": seconds})
        started = time.perf_counter()


def measure_setting(
    recipe: Recipe, name: str, texts: list[JudgedText], options: argparse.Namespace, report: Report
) -> None:
    """Compress with one recipe and measure what the files hold."""
    from rich.console import Console

    from cloq_export.engines.transformers.loading import dequantized_model, load
    from cloq_export.verbs.run import run as make_run

    kinds = [("quantized", None), ("adapter", recipe.adapter_name)] if has_adapter(recipe) else [("quantized", None)]
    # Q alone is what a setting without an adapter has; elsewhere it is not what is optimised, and can be left out.
    kinds = [kind for kind in kinds if options.models == "all" or kind == kinds[-1]]
    identity = {"setting": name, "bits": recipe.bits, "seed": recipe.seed}
    missing = {
        kind: [text for text in texts if not report.has(**identity, model=kind, text=text.name)] for kind, _ in kinds
    }
    if not any(missing.values()):
        return
    with tempfile.TemporaryDirectory(prefix="run-", dir=options.out) as folder:
        run = Path(folder) / "run"
        summary = make_run(recipe, run, console=Console(file=io.StringIO())).to_json()
        stages = summary["seconds"]
        # The same stages as benchmarks/init_speed.py: not reading, writing or measuring.
        compressing = stages["forward and statistics"] + stages["solve"] + stages.get("refine", 0.0)
        for kind, adapter in kinds:
            if not missing[kind]:
                continue
            model = load(run, adapter) if options.runtime == "packed" else dequantized_model(run, adapter)
            for text, figures in measured_rows(model, missing[kind], options.window):
                row = {**identity, "text": text.name, "model": kind, **figures, "seconds": compressing}
                report.add({**row, "bits_per_weight": bits_per_weight(summary, kind)})
            del model
            gc.collect()


def has_adapter(recipe: Recipe) -> bool:
    """Return whether a recipe gives any layer an adapter."""
    return recipe.rank > 0 or any(settings.get("rank", 0) for settings in recipe.overrides.values())


def bits_per_weight(summary: Mapping[str, Any], kind: str) -> float | None:
    """Return what the summary of a run says about the stored size of Q, or of Q and its adapter."""
    name = "bits_per_weight_base" if kind == "quantized" else "bits_per_weight_with_adapter"
    value = summary["stored"].get(name)
    return None if value is None else float(value)


def recipe_of(name: str, source: str, bits: int, seed: int, options: argparse.Namespace) -> Recipe:
    """Return the recipe of a setting at one width and seed."""
    preset, fields = SETTINGS[name]
    fixed = {"model": source, "bits": bits, "seed": seed, "samples": options.samples, "seqlen": options.seqlen}
    fixed |= {"calibration": options.calibration, "device": options.device, **_HARDLY_EVALUATED}
    return Recipe.from_mapping({**fields, **fixed}, preset=preset)


def described(recipe: Recipe) -> dict[str, Any]:
    """Return the options of a recipe that belong to its setting."""
    return {
        name: value
        for name, value in recipe.to_mapping().items()
        if name not in _NOT_OF_A_SETTING and not name.startswith("eval_")
    }


def run_benchmark(options: argparse.Namespace) -> int:
    """Measure everything that is asked and not yet in the file; return the exit code."""
    from transformers import AutoTokenizer

    from cloq_export.files.versions import environment

    names, failed = _chosen_settings(options.settings), []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cloq-init-quality-", dir=options.out) as temporary:
        source = str(model_folder(options.model, Path(temporary) / "model"))
        texts = judged_texts(AutoTokenizer.from_pretrained(source), options)
        conditions = {
            "model": options.model,
            "calibration": options.calibration,
            "samples": options.samples,
            "seqlen": options.seqlen,
            "device": options.device,
            "runtime": options.runtime,
            "texts": {text.name: text.about for text in texts},
        }
        report = Report(options.json, conditions, {"hardware": describe_hardware(), "versions": environment()})
        for name in names:
            report.describe_setting(name, described(recipe_of(name, source, 4, 0, options)))
        measure_float(source, texts, options, report)
        for bits in options.bits:
            for seed in options.seeds:
                for name in names:
                    try:
                        measure_setting(recipe_of(name, source, bits, seed, options), name, texts, options, report)
                    except CloqError as error:
                        failed.append(name)
                        print(f"error: {name} INT{bits} seed {seed}: {error}", file=sys.stderr)
    show(report.content)
    return 1 if failed else 0


def _chosen_settings(text: str) -> list[str]:
    names = list(SETTINGS) if text == "all" else _listed(text)
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        raise SystemExit(f"unknown settings: {', '.join(unknown)}; allowed are all, {', '.join(SETTINGS)}.")
    for name in names:
        preset, fields = SETTINGS[name]
        if preset not in PRESETS or set(fields) & set(_NOT_OF_A_SETTING):
            raise SystemExit(f"the setting {name} names an unknown preset or one of {', '.join(_NOT_OF_A_SETTING)}.")
    return names


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _listed(text)]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", default="default,paper", help="names, or all (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show the settings and end")
    parser.add_argument("--bits", type=_numbers, default=[2, 3, 4], help="widths (default: 2,3,4)")
    parser.add_argument("--seeds", type=_numbers, default=[0], help="they draw the calibration windows (default: 0)")
    parser.add_argument("--model", default="smollm2-demo", help="as in `cloq run` (default: %(default)s)")
    parser.add_argument("--calibration", default="wikitext2", help="as in `cloq run` (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=40, help="calibration windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens in each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compress; measuring is on the CPU")
    parser.add_argument("--window", type=int, default=512, help="tokens in a judged window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="of wikitext2 and gsm8k (default: %(default)s)")
    parser.add_argument("--rest-windows", type=int, default=48, help="of the rest of wikitext2 (default: %(default)s)")
    parser.add_argument(
        "--models",
        default="all",
        choices=("all", "served"),
        help="measure Q alone beside Q with its adapter, or only what is served (default: %(default)s)",
    )
    parser.add_argument(
        "--runtime",
        default="dequantized",
        choices=("dequantized", "packed"),
        help="measure plain float32 linears read from the files, or the packed ones, slower (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="folder for temporary run directories; default: the system's")
    parser.add_argument("--json", type=Path, default=RESULTS, help="result file, continued if there (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="render a result file and end")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --markdown: put it between the page's marks")
    parser.add_argument("--mark", default="init_quality", help="with --into: which marks (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure, or render what was measured."""
    options = parse_arguments()
    if options.list:
        for name, (preset, fields) in SETTINGS.items():
            print(f"{name}: preset {preset}" + "".join(f", {key}={value}" for key, value in fields.items()))
        return 0
    if options.markdown:
        content = json.loads(options.markdown.read_text(encoding="utf-8"))
        put_into(options.into, options.mark, markdown(content))
        return 0
    try:
        return run_benchmark(options)
    except CloqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
