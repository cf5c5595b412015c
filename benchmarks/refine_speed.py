"""Time the refinement of blocks against AutoRound's: same windows, iterations and tokens in each, same CPU.

Both take a model that is cut to its first blocks, and take turns, each time in a fresh process. What is timed starts
with windows of tokens and ends when the last block is done; ours writes each finished layer meanwhile.

    python benchmarks/refine_speed.py --blocks 3 --json benchmarks/results/refine_speed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import describe_hardware, hardware_line

from cloq_export.files.atomic import write_json
from cloq_export.files.versions import environment

# What AutoRound does unless told otherwise; its worker tells it nothing else.
ITERATIONS, WINDOWS_PER_ITERATION = 200, 8


def cut_model(name: str, blocks: int, folder: Path) -> None:
    """Write a model without its blocks behind the first ones as a folder that any tool can read."""
    from cloq_export.models.saving import save_plain
    from cloq_export.models.source import open_model

    loaded = open_model(name)
    inner = loaded.model.get_decoder()
    inner.layers = inner.layers[:blocks]
    loaded.model.config.num_hidden_layers = blocks
    folder.mkdir(parents=True)
    save_plain(loaded, folder)
    # The files of the source tell how many blocks there were.
    loaded.model.config.save_pretrained(folder)


def measure_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Run the package with `--refine block`; solving the start of each block is part of the time."""
    from cloq_export.compress import block_refined as refining
    from cloq_export.compress import strategies
    from cloq_export.lab.row_folder import making_seconds
    from cloq_export.recipe import Recipe
    from cloq_export.verbs.run import run

    if job["same_tokens"]:
        strategies.TOKENS_PER_STEP = WINDOWS_PER_ITERATION * job["recipe"]["seqlen"]  # type: ignore[misc]
    blocks, train = [], refining.train_layers  # type: ignore[attr-defined]

    def watched(*arguments: Any, **options: Any) -> Any:
        found = train(*arguments, **options)
        blocks.append({"steps": found.steps, "error_before": found.error_before, "error_after": found.error_after})
        return found

    refining.train_layers = watched  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        summary = run(Recipe.from_mapping(job["recipe"]), Path(place) / "run").to_json()
    return {"seconds": making_seconds(summary), "stages": summary["seconds"], "blocks": blocks}


def measure_autoround(job: dict[str, Any]) -> dict[str, Any]:
    """Run AutoRound with its defaults, in its own environment."""
    from rich.console import Console

    from cloq_export.compress.strategies import strategy_of
    from cloq_export.lab.peers import run_peer
    from cloq_export.models.source import open_model
    from cloq_export.recipe import Recipe
    from cloq_export.texts.corpora import load_text
    from cloq_export.texts.windows import draw_windows

    recipe = Recipe.from_mapping(job["recipe"])
    tokenizer, text = open_model(recipe.model).tokenizer, load_text(recipe.calibration)
    counts = strategy_of(recipe.changed({"refine": "block"})).window_counts(recipe)
    windows = draw_windows(tokenizer, text, recipe, counts).solving.ids
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        told = {key: job["recipe"][key] for key in ("model", "bits", "group_size", "rank", "seed")}
        told |= {"windows": windows.tolist(), "out": str(Path(place) / "made")}
        environments = Path(job["environments"])
        report = run_peer("autoround", told, environments, Path(place), console=Console(stderr=True))
    return {key: report[key] for key in ("seconds", "versions")}


def medians_of(rounds: dict[str, list[dict[str, Any]]], blocks: int) -> dict[str, dict[str, float]]:
    """Return what the rounds of each side come to; ours may end a block early, so both units are given."""
    peers = [entry["seconds"] for entry in rounds["autoround"]]
    found = {}
    for side, entries in rounds.items():
        seconds = [entry["seconds"] for entry in entries]
        made = [sum(block["steps"] for block in entry.get("blocks", ())) or ITERATIONS * blocks for entry in entries]
        found[side] = {
            "seconds_per_block": statistics.median(seconds) / blocks,
            "over_autoround": statistics.median(own / peer for own, peer in zip(seconds, peers, strict=True)),
            "iterations_per_block": statistics.median(made) / blocks,
            "seconds_per_iteration": statistics.median(own / steps for own, steps in zip(seconds, made, strict=True)),
        }
    return found


SIDES = {"autoround": measure_autoround, "same tokens": measure_ours, "as shipped": measure_ours}


def main() -> None:
    """Let the sides take turns, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-demo")
    parser.add_argument("--calibration", default="wikitext2+gsm8k")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--environments", type=Path, default=Path("build/peers"), help="AutoRound's is made there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](json.loads(options.job))))
        return
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        cut_model(options.model, options.blocks, model)
        recipe: dict[str, Any] = {"model": str(model), "group_size": 64, "seed": 0, "refine": "block"}
        recipe |= {"refine_steps": ITERATIONS, "eval_windows": 1, "eval_window": 64}
        recipe |= {key: getattr(options, key) for key in ("calibration", "bits", "rank", "samples", "seqlen")}
        job = {"recipe": recipe, "folder": folder, "environments": str(options.environments.resolve())}
        for _ in range(options.rounds):
            for side in SIDES:
                told = json.dumps(job | {"same_tokens": side == "same tokens"})
                words = [sys.executable, __file__, "--side", side, "--job", told]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{side}: {found[side][-1]['seconds']:.1f} s", file=sys.stderr)
    print(hardware_line(describe_hardware()))
    print(
        f"{options.blocks} blocks, {options.samples} x {options.seqlen} tokens, {ITERATIONS} iterations for each block"
    )
    medians = medians_of(found, options.blocks)
    for side, median in medians.items():
        each, iteration = median["seconds_per_block"], median["seconds_per_iteration"]
        print(f"{side:12} {each:.1f} s for each block, {median['over_autoround']:.2f} of AutoRound's time; ", end="")
        print(f"{median['iterations_per_block']:.0f} iterations, {iteration:.3f} s for each")
    if options.json:
        named = {
            key: value for key, value in vars(options).items() if key not in ("json", "side", "job", "environments")
        }
        content: dict[str, Any] = {
            "hardware": describe_hardware(),
            "versions": environment(),
            "options": named,
            "medians": medians,
        }
        content |= {"iterations": ITERATIONS, "windows_per_iteration": WINDOWS_PER_ITERATION, "rounds": found}
        write_json(options.json, content)


if __name__ == "__main__":
    main()
