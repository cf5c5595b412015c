"""Time decoding on the CPU, end to end: tokens per second of a whole model, packed and in float, with adapters.

Sequences are decoded greedily in bfloat16, by transformers' `generate` (float, and `cloq_export.load`) and by vLLM
(float, this package's plugin, and vLLM's own int4 kernel). The time of the prompt is taken off by running it with two
lengths of answer. Models: a real one, and a Llama in the shape of one with a billion parameters and random weights
(speed does not ask what they are). Each is quantized by rounding to nearest, group 64, which takes seconds, and served
from files as any export is; none has an end-of-text token, so that answers have the length that was asked for. Adapters
are random, of rank 64; with several, each has a sequence of its own in the batch.

    python benchmarks/decode_cpu.py --vllm-python ENGINE/bin/python --json benchmarks/results/decode_cpu.json
    python benchmarks/decode_cpu.py --models PATH --engines cloq --bits 2,4 --adapters 0,1,8

The JSON file is written after every row, and rows that it holds are not measured again: a benchmark that was stopped
goes on with the same command, and may be done in parts (--models, --engines).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from decode_models import RANK, SYNTHETIC, Files, add_adapters

# This file is run by the interpreter of vLLM too, so nothing else but the standard library is imported at the top.
from environment import describe_hardware, hardware_line

PROMPT = 32
SHORT = 4
VLLM_STOCK, VLLM_STOCK_INT8 = "vllm int4", "vllm int4, int8 activations"
ENGINES = ("transformers", "cloq", "vllm", "vllm + cloq", VLLM_STOCK, VLLM_STOCK_INT8)
# What vLLM's own kernel computes with is said by an environment variable.
STOCK_INT8 = {VLLM_STOCK: "0", VLLM_STOCK_INT8: "1"}
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        default=f"smollm2-demo,{SYNTHETIC}",
        help=f'as `cloq run` takes them, or "{SYNTHETIC}" (default: %(default)s)',
    )
    parser.add_argument("--engines", help=f"some of: {'; '.join(ENGINES)}; separated by ; (default: all)")
    parser.add_argument("--synthetic-layers", type=int, default=22, help="(default: %(default)s)")
    parser.add_argument("--bits", default="2,4", help="(default: %(default)s)")
    parser.add_argument("--adapters", default="0,1,8", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="of the longer answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every engine (default: as torch does)")
    parser.add_argument("--vllm-python", help="interpreter with vLLM and this package; without it vLLM is left out")
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def prompts(rows: int, vocabulary: int) -> list[list[int]]:
    """Return the token ids of so many prompts."""
    import random

    generator = random.Random(rows)
    return [[generator.randrange(vocabulary) for _ in range(PROMPT)] for _ in range(rows)]


def generate_with(model: Any, rows: int, names: list[str]) -> Callable[[int], None]:
    """Return a function that lets transformers answer `rows` prompts, each with its adapter, at a length."""
    import torch
    from peft.tuners.lora import LoraLayer

    ids = torch.tensor(prompts(rows, model.config.vocab_size))
    if len(names) > 1:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(
                    lambda module, inputs, options: (inputs, options | {"adapter_names": names}), with_kwargs=True
                )

    def run(length: int) -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            )

    return run


def step_seconds(run: Callable[[int], None], tokens: int, rounds: int) -> float:
    """Return the time of one step of decoding, the median over rounds."""

    def timed(length: int) -> float:
        started = time.perf_counter()
        run(length)
        return time.perf_counter() - started

    timed(SHORT)
    found = []
    for _ in range(rounds):
        short = timed(SHORT)
        found.append((timed(tokens) - short) / (tokens - SHORT))
    return statistics.median(found)


class Bench:
    """The rows so far, and what is still to be measured.

    Args:
        options: of the command line.
        rows: that are there already.
        write: called after every row.
    """

    def __init__(self, options: argparse.Namespace, rows: list[Row], write: Callable[[list[Row]], None]) -> None:
        self.options, self.rows, self.write = options, rows, write
        self.counts = sorted({int(count) for count in options.adapters.split(",")})
        self.bits = [int(width) for width in options.bits.split(",")]
        self.engines = options.engines.split(";") if options.engines else list(ENGINES)
        unknown = [engine for engine in self.engines if engine not in ENGINES]
        if unknown:
            raise SystemExit(f"there is no engine {unknown[0]!r}; allowed are {'; '.join(ENGINES)}.")
        if not options.vllm_python:
            left = [engine for engine in self.engines if engine.startswith("vllm")]
            if left:
                print(f"left out, because --vllm-python was not given: {'; '.join(left)}", file=sys.stderr)
            self.engines = [engine for engine in self.engines if engine not in left]

    def missing(self, model: str, engine: str, bits: int | None, counts: list[int]) -> list[tuple[int, int]]:
        """Return (adapters, sequences) that are not measured yet, of these counts of adapters."""
        most = max(1, *self.counts)
        wanted = {(0, batch) for batch in (1, most) if 0 in counts} | {(count, count) for count in counts if count}
        there = {
            (row["adapters"], row["sequences"])
            for row in self.rows
            if (row["model"], row["engine"], row["bits"]) == (model, engine, bits)
        }
        return sorted(wanted - there)

    def note(self, model: str, engine: str, bits: int | None, adapters: int, batch: int, run: Any) -> None:
        """Measure a row and keep it."""
        self.keep(model, engine, bits, adapters, batch, step_seconds(run, self.options.tokens, self.options.rounds))

    def keep(self, model: str, engine: str, bits: int | None, adapters: int, batch: int, seconds: float) -> None:
        """Write a row, unless something else took the machine's time meanwhile."""
        if seconds <= 0:
            print(
                f"not kept: {model}, {engine}: longer answers took less time; leave the machine alone", file=sys.stderr
            )
            return
        row = {"model": model, "engine": engine, "bits": bits, "adapters": adapters, "sequences": batch}
        self.rows.append(row | {"seconds": seconds, "tokens_per_second": batch / seconds})
        self.write(self.rows)
        show(self.rows[-1:])

    def in_this_process(self, files: Files) -> None:
        """Measure transformers in float, and `cloq_export.load`."""
        import torch

        from cloq_export.engines.transformers.loading import load

        if "transformers" in self.engines:
            todo = self.missing(files.label, "transformers", None, [0])
            model = files.float_model() if todo else None
            for count, batch in todo:
                self.note(files.label, "transformers", None, count, batch, generate_with(model, batch, []))
            del model
        for bits in self.bits if "cloq" in self.engines else []:
            for count, batch in self.missing(files.label, "cloq", bits, self.counts):
                model = load(files.quantized(bits, "gptq_v2"), dtype=torch.bfloat16)
                names = add_adapters(model, count)
                self.note(files.label, "cloq", bits, count, batch, generate_with(model, batch, names))
                del model
                gc.collect()

    def setups(self, files: Files) -> Iterator[tuple[str, int | None, Callable[[], Path]]]:
        """Yield engine, bits and folder of everything that vLLM serves."""
        if "vllm" in self.engines:
            yield "vllm", None, lambda: files.float_folder
        for bits in self.bits if "vllm + cloq" in self.engines else []:
            yield "vllm + cloq", bits, functools.partial(files.quantized, bits, "gptq_v2")
        for engine in STOCK_INT8:
            if engine in self.engines and 4 in self.bits:
                yield engine, 4, functools.partial(files.quantized, 4, "compressed_tensors")

    def in_vllm(self, files: Files, threads: int) -> None:
        """Measure what vLLM serves: first without room for adapters, then with."""
        for engine, bits, folder in self.setups(files):
            for counts in ([0] if 0 in self.counts else [], [count for count in self.counts if count]):
                todo = self.missing(files.label, engine, bits, counts)
                if not todo:
                    continue
                job = {
                    "model": str(folder()),
                    "adapters": [str(files.adapter(number)) for number in range(max(count for count, _ in todo))],
                    "rows": todo,
                    "tokens": self.options.tokens,
                    "rounds": self.options.rounds,
                    "vocabulary": files.vocabulary,
                }
                variables = {"VLLM_CPU_INT4_W4A8": STOCK_INT8.get(engine, "0")}
                if engine in STOCK_INT8:
                    variables["VLLM_PLUGINS"] = "none-of-them"
                found = call_vllm(self.options.vllm_python, job, threads, variables, files.place)
                for (count, batch), seconds in zip(todo, found, strict=True):
                    self.keep(files.label, engine, bits, count, batch, seconds)


def call_vllm(python: str, job: Mapping[str, Any], threads: int, variables: Mapping[str, str], place: Path) -> Any:
    """Run `serve_with_vllm` in a process of its own; return what it found.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    from cloq_export.engines.vllm.process import engine_environment

    result = place / "result.json"
    result.unlink(missing_ok=True)
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    ran = subprocess.run(
        [python, str(Path(__file__).resolve()), "--worker", json.dumps({**job, "result": str(result)})],
        env=os.environ | engine_environment(1, threads=threads) | more | dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not result.exists():
        tail = ran.stdout.splitlines()[-20:]
        raise SystemExit("\n".join([f"vLLM ended with {ran.returncode}; its last lines:", *tail]))
    return json.loads(result.read_text(encoding="utf-8"))


def serve_with_vllm(job: Mapping[str, Any]) -> None:
    """Measure the rows of a job with vLLM, and write the seconds of a step of each to the file that it names."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # Without this package's plugin vLLM's int4 kernel dies of an illegal instruction unless something asked for AMX.
    torch.cpu._init_amx()  # type: ignore[attr-defined]
    adapters = [LoRARequest(f"adapter{i}", i + 1, folder) for i, folder in enumerate(job["adapters"])]
    options: dict[str, Any] = {}
    if adapters:
        config = json.loads((Path(job["adapters"][0]) / "adapter_config.json").read_text(encoding="utf-8"))
        targets = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
        options = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": len(adapters)}
        options |= {"max_cpu_loras": len(adapters), "lora_target_modules": targets}
    engine = LLM(
        model=job["model"],
        dtype="bfloat16",
        max_model_len=PROMPT + job["tokens"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    found = []
    for count, batch in job["rows"]:
        asked = [{"prompt_token_ids": ids} for ids in prompts(batch, job["vocabulary"])]
        lora = adapters[:batch] if count else None

        def run(length: int, asked: Any = asked, lora: Any = lora) -> None:
            sampling = SamplingParams(temperature=0.0, max_tokens=length, detokenize=False)
            answers = engine.generate(asked, sampling, lora_request=lora, use_tqdm=False)
            lengths = [len(answer.outputs[0].token_ids) for answer in answers]
            if lengths != [length] * len(asked):
                raise SystemExit(f"answers of {length} tokens were asked for, and came with {lengths}.")

        found.append(step_seconds(run, job["tokens"], job["rounds"]))
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # vLLM's own threads can keep an interpreter that has nothing left to do


def show(rows: list[Row]) -> None:
    """Print rows."""
    for row in rows:
        print(
            f"{row['model'][:28]:28} {row['engine']:28} {row['bits'] or '':>4} {row['adapters']:>8} "
            f"{row['sequences']:>9} {row['seconds'] * 1e3:>8.1f} {row['tokens_per_second']:>8.1f}",
            flush=True,
        )


def read_rows(path: Path | None, settings: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a report that was measured with these settings.

    Raises:
        SystemExit: the report was measured with others.
    """
    if path is None or not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["options"] != settings:
        raise SystemExit(f"{path} was measured with {report['options']}, not {dict(settings)}; give another --json.")
    rows: list[Row] = report["rows"]
    return rows


def main() -> None:
    """Run the benchmark."""
    options = parse_arguments()
    if options.worker:
        serve_with_vllm(json.loads(options.worker))
        return
    import torch

    from cloq_export.engines.vllm.facts import engine_facts
    from cloq_export.files.atomic import write_json
    from cloq_export.files.versions import environment
    from cloq_export.kernels import cpu

    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    settings = {
        "rank": RANK,
        "prompt": PROMPT,
        "answer": [SHORT, options.tokens],
        "rounds": options.rounds,
        "dtype": "bfloat16",
        "group_size": 64,
        "threads": threads,
    }
    versions = environment()
    if options.vllm_python:
        versions["vllm"] = engine_facts(options.vllm_python).version
    report: dict[str, Any] = {
        "hardware": describe_hardware(),
        "versions": versions,
        "kernels": cpu.describe(),
        "options": settings,
    }

    def write(rows: list[Row]) -> None:
        if options.json:
            write_json(options.json, report | {"rows": rows}, sort_keys=False)

    bench = Bench(options, read_rows(options.json, settings), write)
    print(hardware_line(report["hardware"]))
    print(f"{'model':28} {'engine':28} {'bits':>4} {'adapters':>8} {'sequences':>9} {'ms/step':>8} {'tokens/s':>8}")
    show(bench.rows)
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="cloq-decode-") as place:
            files = Files(name, options.synthetic_layers, Path(place))
            bench.in_this_process(files)
            bench.in_vllm(files, threads)


if __name__ == "__main__":
    main()
