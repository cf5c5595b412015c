"""ONNX exports against the reference and against the float graph: logits, greedy text, decode tokens per second.

Runs that `cloq run` made are exported in each style with their adapters; `--grids` rounds the model's weights to
nearest on further grids, without adapters. Correctness is measured before speed. Rows are written as they come, and
rows that the JSON file holds are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from environment import describe_hardware, hardware_line, model_folder

from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource
from cloq_export.engines.onnx.engine import OnnxModel
from cloq_export.engines.onnx.export import export_onnx
from cloq_export.engines.onnx.float_graph import GENAI_CONFIG, build_graph
from cloq_export.engines.transformers.loading import dequantized_model
from cloq_export.engines.transformers.served import float_model
from cloq_export.files.atomic import write_json
from cloq_export.files.fingerprint import base_fingerprint
from cloq_export.formats.onnx.record import ADAPTER_NAME, GraphOptions
from cloq_export.models.library_calls import quiet_transformers
from cloq_export.models.saving import save_source_files
from cloq_export.models.source import LoadedModel, open_model
from cloq_export.quantize.layers import QuantizeOptions, quantize_group
from cloq_export.texts.corpora import evaluation_text, tokenize_text
from cloq_export.types import QuantizedLayer, QuantSpec
from cloq_export.verbs.export import export
from cloq_export.verbs.options import ExportOptions

PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "torch", "transformers")
PROMPT_TOKENS = 16
# The adapter's name in the table where none is used.
BASE = "none"
# Beside the styles of an export: the same weights in a float32 graph.
FLOAT = "float32"


@dataclasses.dataclass(frozen=True)
class Case:
    """One export that is measured.

    Args:
        name: of the run, or "rtn".
        bits: of its codes.
        group_size: of its grid.
        style: of the graph.
        two_bit: how 2-bit codes are stored.
        write: makes the export in a folder.
        adapters: what is measured of it; None is the base alone.
        reference: from an adapter to the dequantized float32 model.
    """

    name: str
    bits: int
    group_size: int
    style: str
    two_bit: str
    write: Callable[[Path], None]
    adapters: tuple[str | None, ...]
    reference: Callable[[str | None], Any]

    @property
    def key(self) -> dict[str, Any]:
        """Return what tells a row of this case from others."""
        return {name: getattr(self, name) for name in ("name", "bits", "group_size", "style", "two_bit")}


def run_cases(loaded: LoadedModel, run: Path, styles: Sequence[str]) -> list[Case]:
    """Return the cases of one finished run, the float graph of its dequantized base first: what rounding alone does."""
    checkpoint = Checkpoint.open(run)
    spec = checkpoint.grids.default
    names = sorted(path.name for path in (run / "adapters").iterdir())
    kinds = [(style, "exact") for style in styles]
    if spec.bits == 2:
        kinds.append(("matmulnbits", "compact"))

    def writer(style: str, two_bit: str) -> Callable[[Path], None]:
        compact = two_bit if two_bit == "compact" else None

        def write(out: Path) -> None:
            export(run, ExportOptions(format="onnx", style=style, two_bit=compact, out=out))

        return write

    def reference(adapter: str | None) -> Any:
        return dequantized_model(run, adapter, merged=False)

    def write_float(out: Path) -> None:
        model = reference(None)
        with quiet_transformers():
            model.save_pretrained(out / "model")
        save_source_files(loaded, out / "model")
        build_graph(out / "model", out)

    grid = (run.name, spec.bits, spec.group_size)
    return [
        Case(*grid, FLOAT, "exact", write_float, (None,), reference),
        *(Case(*grid, style, two_bit, writer(style, two_bit), (None, *names), reference) for style, two_bit in kinds),
    ]


def grid_case(loaded: LoadedModel, modules: Sequence[str], spec: QuantSpec, style: str) -> Case:
    """Return the case of a model whose weights are rounded to nearest."""
    layers: dict[str, QuantizedLayer] = {}

    def quantized() -> dict[str, QuantizedLayer]:
        if not layers:
            for module in modules:
                weight = loaded.model.get_submodule(module).weight.detach().float()
                layers[module] = quantize_group([weight], spec, None, QuantizeOptions(method="rtn")).layers[0]
        return layers

    # A style that there is not is refused there.
    options = GraphOptions(style=cast(Any, style))

    def write(out: Path) -> None:
        source = LayerSource.of_mapping(quantized())
        floats = FloatPart.of_model(loaded.model, source, save_files=lambda folder: save_source_files(loaded, folder))
        export_onnx(out, source, floats, options, base_fingerprint=base_fingerprint(layers.items()))

    def reference(_adapter: str | None) -> Any:
        model = open_model(loaded.source.name).model
        with torch.no_grad():
            for module, layer in quantized().items():
                model.get_submodule(module).weight.copy_(layer.dequantize())
        return model

    return Case("rtn", spec.bits, spec.group_size, style, "exact", write, (None,), reference)


def measure_exactness(case: Case, model: Any, adapter: str | None, prompts: list[list[int]], new: int) -> dict:
    """Return the largest difference of a logit, and how many greedy texts are the reference's."""
    reference = case.reference(adapter)
    widest, mean, largest = 0.0, [], 0.0
    for ids in prompts[:8]:
        with torch.no_grad():
            wanted = reference(input_ids=torch.tensor([ids])).logits[0].numpy()
        difference = np.abs(model.logits(ids, adapter) - wanted)
        widest, largest = max(widest, float(difference.max())), max(largest, float(np.abs(wanted).max()))
        mean.append(float(difference.mean()))
    texts = float_model(reference).generate(prompts, [None] * len(prompts), new)
    same = sum(model.generate([ids], [adapter], new)[0] == text for ids, text in zip(prompts, texts, strict=True))
    return {
        "logit_difference_max": widest,
        "logit_difference_mean": statistics.mean(mean),
        "logit_max": largest,
        "greedy_same": same,
        "greedy_prompts": len(prompts),
    }


class Decoder:
    """A graph in plain ONNX Runtime, asked for one token after another."""

    def __init__(self, folder: Path, threads: int) -> None:
        model = json.loads((folder / GENAI_CONFIG).read_text())["model"]
        decoder, ends = model["decoder"], model["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        for name, value in decoder["session_options"].items():
            if name.startswith("session."):
                options.add_session_config_entry(name, value)
        graph = folder / decoder["filename"]
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._decoder = decoder
        self._run_options = onnxruntime.RunOptions()
        # Held here, since the options of a run do not hold it.
        self._adapter: Any = None

    def with_adapter(self, path: Path) -> Decoder:
        """Return the same session with an adapter active."""
        other = copy.copy(self)
        other._adapter = onnxruntime.LoraAdapter()
        other._adapter.Load(str(path))
        other._run_options = onnxruntime.RunOptions()
        other._run_options.add_active_adapter(other._adapter)
        return other

    def logits(self, ids: Sequence[int], _adapter: None = None) -> np.ndarray:
        """Return the logits of every position of a text."""
        return next(self._steps(list(ids)))[0]

    def generate(self, prompts: Sequence[Sequence[int]], _adapters: Sequence[None], new: int) -> list[list[int]]:
        """Return the most probable continuation of each prompt, an end-of-text token last if there was one."""
        texts: list[list[int]] = []
        for ids in prompts:
            texts.append([])
            for logits in itertools.islice(self._steps(list(ids)), new):
                texts[-1].append(int(logits[0, -1].argmax()))
                if texts[-1][-1] in self._ends:
                    break
        return texts

    def close(self) -> None:
        """Let go of the session."""
        del self._session

    def seconds_per_token(self, ids: Sequence[int], new: int) -> float:
        """Return the time of one new token, the prompt left out."""
        steps = self._steps(list(ids))
        next(steps)
        started = time.perf_counter()
        for _ in range(new):
            next(steps)
        return (time.perf_counter() - started) / new

    def _steps(self, given: list[int]) -> Iterator[np.ndarray]:
        """Give the logits (1, tokens, vocabulary) of a prompt, then those behind each most probable token."""
        decoder, layers = self._decoder, range(self._decoder["num_hidden_layers"])
        past = [decoder["inputs"][f"past_{part}_names"] % n for n in layers for part in ("key", "value")]
        present = [decoder["outputs"][f"present_{part}_names"] % n for n in layers for part in ("key", "value")]
        empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), dtype=np.float32)
        cache, length = dict.fromkeys(past, empty), len(given)
        while True:
            feed = {"input_ids": np.array([given]), "attention_mask": np.ones((1, length), dtype=np.int64), **cache}
            logits, *values = self._session.run(["logits", *present], feed, self._run_options)
            yield logits
            cache, given, length = dict(zip(past, values, strict=True)), [int(logits[0, -1].argmax())], length + 1


def measure_speed(decoders: dict[str, Decoder], ids: list[int], new: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return tokens per second of each decoder, which take turns; the ratio is taken within a repeat."""
    first = next(iter(decoders))
    for decoder in decoders.values():
        decoder.seconds_per_token(ids, 2)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        for name, decoder in decoders.items():
            seconds[name].append(decoder.seconds_per_token(ids, new))
    return {
        name: {
            "tokens_per_second": 1 / statistics.median(values),
            "over_float": statistics.median(a / b for a, b in zip(seconds[first], values, strict=True)),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-demo", help="the float model")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="finished runs of that model")
    parser.add_argument("--grids", default="", help="bits:group,... rounded to nearest, e.g. 3:32,4:-1")
    parser.add_argument("--styles", default="matmulnbits,qdq")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="of the timing; 0 times nothing")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--exports", type=Path, help="folder that keeps the exports; unless given, a temporary one")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/onnx_decode.json"))
    asked = parser.parse_args()
    styles = asked.styles.split(",")
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    loaded = open_model(asked.model)
    tokens = tokenize_text(loaded.tokenizer, evaluation_text(asked.text).text)
    step = (tokens.numel() - PROMPT_TOKENS) // asked.prompts
    prompts = [tokens[start : start + PROMPT_TOKENS].tolist() for start in range(0, step * asked.prompts, step)]
    modules = [name for name in dict(loaded.model.named_modules()) if name.endswith("_proj")]
    cases = [case for run in asked.runs for case in run_cases(loaded, run, styles)]
    for text in filter(None, asked.grids.split(",")):
        bits, _, group = text.partition(":")
        cases += [grid_case(loaded, modules, QuantSpec(int(bits), int(group)), style) for style in styles]
    content = json.loads(asked.json.read_text()) if asked.json.exists() else {"rows": [], "speed": []}
    hardware = describe_hardware()
    content |= {"hardware": hardware, "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
    content |= {
        "model": asked.model,
        "text": asked.text,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": asked.new_tokens,
    }
    print(hardware_line(hardware), f"; {threads} threads")
    with tempfile.TemporaryDirectory(prefix="cloq-onnx-") as place:
        home = asked.exports or Path(place)
        folders: dict[str, Path] = {}
        for case in cases:
            folder = home / f"{case.name}-{case.bits}-{case.group_size}-{case.style}-{case.two_bit}"
            done = [row for row in content["rows"] if all(row[key] == value for key, value in case.key.items())]
            if (len(done) < len(case.adapters) or asked.repeats) and not folder.exists():
                case.write(folder)
            if case.adapters != (None,):
                folders[folder.name] = folder
            if len(done) < len(case.adapters):
                names = [name for name in case.adapters if name is not None]
                adapters = {name: folder / "adapters" / name for name in names}
                model: Any
                if case.style == FLOAT:
                    model = Decoder(folder / "built", threads)
                else:
                    model = OnnxModel(folder, adapters, threads=threads)
                for adapter in case.adapters:
                    row = case.key | {"adapter": adapter or BASE}
                    row |= measure_exactness(case, model, adapter, prompts, asked.new_tokens)
                    row |= {"export_bytes": sum(path.stat().st_size for path in folder.rglob("model.onnx*"))}
                    content["rows"].append(row)
                    write_json(asked.json, content)
                    print(row, flush=True)
                model.close()
            if case.adapters == (None,) and not asked.exports and folder.exists():
                shutil.rmtree(folder)
        if asked.repeats and folders:
            source = model_folder(asked.model, home / "model")
            if not (home / "float" / "built").exists():
                (home / "float").mkdir(exist_ok=True)
                build_graph(source, home / "float")
            content["speed"] = []
            for run in asked.runs:
                # A few sessions at a time: each holds the model in memory.
                decoders = {"float": Decoder(home / "float" / "built", threads)}
                for name in [name for name in folders if name.startswith(f"{run.name}-")]:
                    decoders[name] = Decoder(folders[name], threads)
                    for own in sorted((folders[name] / "adapters").iterdir()):
                        decoders[f"{name}+{own.name}"] = decoders[name].with_adapter(own / ADAPTER_NAME)
                measured = measure_speed(decoders, prompts[0], 32, asked.repeats)
                content["speed"] += [{"graph": name, "threads": threads, **values} for name, values in measured.items()]
                write_json(asked.json, content)
            for row in content["speed"]:
                print(f"{row['graph']:50s} {row['tokens_per_second']:8.1f} tokens/s, {row['over_float']:.2f} of float")


if __name__ == "__main__":
    main()
