"""Ask `cloq serve` many things at once while adapters come and go, and compare every answer with the one given alone.

    python benchmarks/serving_soak.py RUN --python ENGINE/bin/python --json benchmarks/results/serving_soak.json
    python benchmarks/serving_soak.py RUN --requests 60 --adapters 4 --at-once 8

RUN is an export or a run with one adapter or more; the others are made of its first one by adding noise, each with a
seed of its own. First every prompt is asked of every adapter, and of the base, one request at a time. Then the requests
come in rounds: a round asks for some of the adapters, so many requests at a time, and meanwhile those of the round
before that are not asked for any more are unloaded and those of the next round are loaded. An answer is wrong if a
token of its greedy text differs, or a log-probability of its prompt differs by more than the limit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import describe_hardware, hardware_line, perturbed_adapters

from cloq_export.engines.vllm.client import ServerClient
from cloq_export.engines.vllm.facts import engine_facts
from cloq_export.errors import CloqError
from cloq_export.files.atomic import write_json
from cloq_export.files.versions import environment
from cloq_export.verbs.serve import served_adapters

# Single and batched products add the same numbers in another order.
LIMIT = 1e-3


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request gets: log-probabilities of its prompt, and its greedy text."""

    logprobs: torch.Tensor
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Soak:
    """What is asked.

    Args:
        requests: how many.
        at_once: how many are under way.
        per_round: how many until the adapters change.
        in_round: adapters that a round asks for, beside the base.
        new_tokens: of each text.
        seed: of what is asked when.
    """

    requests: int = 2000
    at_once: int = 16
    per_round: int = 50
    in_round: int = 6
    new_tokens: int = 8
    seed: int = 0


def ask(client: ServerClient, prompt: list[int], adapter: str | None, new_tokens: int) -> Answer:
    """Return one answer."""
    choice = client.complete(prompt, adapter, max_tokens=new_tokens, prompt_logprobs=0, return_token_ids=True)
    scores = [
        entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    return Answer(torch.tensor(scores), tuple(choice["token_ids"]))


def single_answers(
    client: ServerClient, prompts: Sequence[list[int]], held: Sequence[str], spare: Mapping[str, Path], new_tokens: int
) -> dict[tuple[str | None, int], Answer]:
    """Return (adapter, number of the prompt) -> what it gets when nothing else is asked.

    Args:
        client: of the server.
        prompts: token ids.
        held: adapters that stay loaded.
        spare: name -> folder of adapters that are not loaded, nor are they afterwards.
        new_tokens: of each text.
    """
    answers: dict[tuple[str | None, int], Answer] = {}
    for name in [None, *held, *spare]:
        loaded_now = name if name is not None and name in spare else None
        if loaded_now is not None:
            client.load_adapter(loaded_now, spare[loaded_now])
        for number, prompt in enumerate(prompts):
            answers[name, number] = ask(client, prompt, name, new_tokens)
        if loaded_now is not None:
            client.unload_adapter(loaded_now)
    return answers


def soak(
    client: ServerClient,
    prompts: Sequence[list[int]],
    held: Sequence[str],
    spare: Mapping[str, Path],
    plan: Soak,
    *,
    pid: int | None = None,
) -> dict[str, Any]:
    """Ask everything, and return what came back.

    Args:
        client: of the server.
        prompts: token ids.
        held: adapters that stay loaded.
        spare: name -> folder of adapters that come and go.
        plan: what is asked.
        pid: of the server, to measure its memory.

    Returns:
        dict: "requests", "wrong" (each with what differs), "failed", "largest_difference" (from the answer given
        alone), "least_difference_of_adapters" (between the answers of two adapters to one prompt), "loads", "unloads",
        "adapters", "seconds" and "memory_bytes" (after each round).
    """
    alone = single_answers(client, prompts, held, spare, plan.new_tokens)
    # If two adapters answered alike, a mixed-up request would not be seen.
    names_of_all: list[str | None] = [None, *held, *spare]
    apart = min(
        float((alone[one, number].logprobs - alone[other, number].logprobs).abs().max())
        for one, other in itertools.combinations(names_of_all, 2)
        for number in range(len(prompts))
    )
    draw = random.Random(plan.seed)
    rounds: list[tuple[list[str], list[tuple[str | None, int]]]] = []
    while sum(len(asked) for _, asked in rounds) < plan.requests:
        some = draw.sample(sorted(spare), min(plan.in_round, len(spare)))
        names: list[str | None] = [None, *held, *some]
        count = min(plan.per_round, plan.requests - sum(len(asked) for _, asked in rounds))
        rounds.append((some, [(draw.choice(names), draw.randrange(len(prompts))) for _ in range(count)]))
    found: dict[str, Any] = {"wrong": [], "failed": [], "loads": 0, "unloads": 0}
    worst, lock = 0.0, threading.Lock()
    memory = [tree_memory(pid)]

    def check(request: tuple[str | None, int]) -> None:
        nonlocal worst
        name, number = request
        try:
            answer = ask(client, prompts[number], name, plan.new_tokens)
        except CloqError as error:
            with lock:
                found["failed"].append({"adapter": name, "prompt": number, "reason": str(error)[:300]})
            return
        expected = alone[request]
        difference = float((answer.logprobs - expected.logprobs).abs().max())
        with lock:
            worst = max(worst, difference)
            if answer.tokens != expected.tokens or not difference <= LIMIT:
                found["wrong"].append({"adapter": name, "prompt": number, "difference": difference})

    def change(loaded: set[str], wanted: set[str], keep: set[str]) -> None:
        for name in sorted(loaded - wanted - keep):
            client.unload_adapter(name)
            loaded.discard(name)
            found["unloads"] += 1
        for name in sorted(wanted - loaded):
            client.load_adapter(name, spare[name])
            loaded.add(name)
            found["loads"] += 1

    loaded: set[str] = set()
    change(loaded, set(rounds[0][0]), set())
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(plan.at_once + 1) as pool:
        for place, (some, asked) in enumerate(rounds):
            following = set(rounds[place + 1][0]) if place + 1 < len(rounds) else set(some)
            # In the middle of the round: what neither this round nor the next one asks for goes, the next one's comes.
            changing = pool.submit(change, loaded, following, set(some))
            list(pool.map(check, asked))
            changing.result()
            memory.append(tree_memory(pid))
            print(
                f"round {place + 1} of {len(rounds)}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return {
        "requests": plan.requests,
        "largest_difference": worst,
        "least_difference_of_adapters": apart,
        "adapters": len(held) + len(spare),
        "seconds": time.perf_counter() - started,
        "memory_bytes": memory,
        **found,
    }


def tree_memory(pid: int | None) -> int | None:
    """Return the memory of a process and all below it, shared pages divided among their holders; None if unknown."""
    if pid is None or not Path("/proc/self/smaps_rollup").exists():
        return None
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    family, total = {pid}, 0
    for _ in parents:
        grown = family | {child for child, parent in parents.items() if parent in family}
        if grown == family:
            break
        family = grown
    for member in family:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


@contextlib.contextmanager
def serving(export: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start `cloq serve --json` on a free port; yield the process and what it printed, and stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cloq_export", "serve", str(export), "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
        # A program that a shell started in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if line.startswith("}"):
                break
        else:
            raise SystemExit(f"cloq serve ended with code {process.wait()}; start it by hand to see why.")
        yield process, json.loads(text)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cut_prompts(export: Path, count: int) -> list[list[int]]:
    """Return prompts of 8 to 24 tokens out of the standard library's text."""
    from transformers import AutoTokenizer

    from cloq_export.artifact.checkpoint import checkpoint_folder
    from cloq_export.texts.corpora import load_text

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder(export))
    ids = tokenizer(load_text("embedded").text[:50_000], verbose=False)["input_ids"]
    draw = random.Random(0)
    starts = [draw.randrange(len(ids) - 24) for _ in range(count)]
    return [ids[start : start + draw.randint(8, 24)] for start in starts]


def main() -> None:
    """Measure, print a line for each figure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--python", type=Path, help="interpreter of the environment that has vLLM")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--held", type=int, default=4, help="adapters that stay loaded; the others come and go")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--max-loras", type=int, default=4, help="adapters in one batch of the server")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    plan = Soak(requests=arguments.requests, at_once=arguments.at_once, new_tokens=arguments.new_tokens)
    with tempfile.TemporaryDirectory(prefix="cloq-soak-") as place:
        first_name, first = next(iter(served_adapters(arguments.export).items()))
        copies = perturbed_adapters(first, Path(place), arguments.adapters - 1)
        held = [first_name, *list(copies)[: max(0, arguments.held - 1)]]
        spare = {name: folder for name, folder in copies.items() if name not in held}
        options = [f"--adapter={name}={copies[name]}" for name in held[1:]]
        options += ["--adapter-root", place, "--default", first_name, "--kv-cache-gib", "1"]
        options += ["--max-loras", str(arguments.max_loras)]
        options += ["--python", str(arguments.python)] if arguments.python else []
        with serving(arguments.export, *options) as (process, served):
            client = ServerClient(served["url"], served["base_name"], held, clients=plan.at_once)
            prompts = cut_prompts(arguments.export, arguments.prompts)
            result = soak(client, prompts, held, spare, plan, pid=process.pid)
        result["exit_code"] = process.returncode
    hardware = describe_hardware()
    facts = engine_facts(arguments.python)
    settings = {**dataclasses.asdict(plan), "max_loras": arguments.max_loras, "dtype": served["options"]["dtype"]}
    report = {
        "settings": settings,
        "result": result,
        "hardware": hardware,
        "versions": environment() | {"vllm": facts.version},
    }
    print(hardware_line(hardware))
    print(
        f"{result['requests']} requests over {result['adapters']} adapters and the base, {plan.at_once} at a time, "
        f"{result['loads']} loads, {result['unloads']} unloads: {len(result['wrong'])} wrong, {len(result['failed'])} "
        f"failed, largest difference {result['largest_difference']:.2e} (between two adapters at least "
        f"{result['least_difference_of_adapters']:.2e}), {result['seconds']:.0f} s"
    )
    if None not in result["memory_bytes"]:
        quarters = [result["memory_bytes"][len(result["memory_bytes"]) * part // 4] / 2**30 for part in range(4)]
        quarters.append(result["memory_bytes"][-1] / 2**30)
        print("memory in GiB, at the start and after each quarter: " + ", ".join(f"{each:.2f}" for each in quarters))
    if arguments.json:
        write_json(arguments.json, report)
    if result["wrong"] or result["failed"] or result["exit_code"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
