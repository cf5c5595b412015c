"""The float decoder graph that an ONNX export is cut from, made by exporters of others in a process of their own.

ONNX Runtime GenAI's model builder comes first: its graphs have a fused attention with a cache of keys and values. For
an architecture that it lacks, transformers' exporter traces the model. Run as a module, this file is that exporter's
process.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cloq_export.errors import FormatError, MissingPackageError, UnsupportedModelError
from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.models.library_calls import NO_CODE

GENAI_CONFIG = "genai_config.json"
BUILDER = "onnxruntime-genai"
TRACER = "transformers"
# What the tensors of a graph are called, in the words of genai_config.json.
TENSOR_NAMES = {
    "inputs": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    },
    "outputs": {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    },
}

_TAIL = 12
_UNSUPPORTED = "model is not currently supported"
# ONNX Runtime GenAI asks for the kind of model only where a graph needs special care; a plain decoder is any of them.
_PLAIN_DECODER = "llama"


@dataclasses.dataclass(frozen=True)
class FloatGraph:
    """A float decoder graph on disk.

    Args:
        path: model.onnx, with its weights beside it.
        genai_config: content of genai_config.json.
        exporter: which program made it, with its version.
        notes: why it was not the first choice; empty if it was.
    """

    path: Path
    genai_config: dict[str, Any]
    exporter: str
    notes: tuple[str, ...] = ()


def build_graph(model: Path, scratch: Path, outputs: Collection[int] = ()) -> FloatGraph:
    """Return the graph of ONNX Runtime GenAI's builder.

    Args:
        model: a float model folder.
        scratch: an existing folder to write into.
        outputs: the numbers of outputs of its linears, the head left out.

    Raises:
        UnsupportedModelError: the builder lacks the architecture, or would take another linear for the head.
        FormatError: the builder failed otherwise; the message ends with its last words.
    """
    name = _exporter_name(BUILDER)
    vocabulary = read_json(model / "config.json").get("vocab_size")
    if vocabulary in outputs:
        # It would write a graph whose logits come from the wrong layer, without a word.
        raise UnsupportedModelError(
            f"{name} takes any linear with {vocabulary} outputs, as many as the vocabulary has tokens, for the head, "
            "and this model has another one."
        )
    out = scratch / "built"
    arguments = ["-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out), "-p", "fp32", "-e", "cpu"]
    code, tail = _run(
        [*arguments, "-c", str(scratch / "cache"), "--extra_options", "fuse_qkv=false", "hf_remote=false"]
    )
    if code and any(_UNSUPPORTED in line for line in tail):
        raise UnsupportedModelError(f"{name} does not know {_architecture(model)}.")
    if code or not (out / "model.onnx").is_file():
        raise FormatError(f"{name} could not export {_architecture(model)}: {_last_words(tail)}")
    return FloatGraph(out / "model.onnx", read_json(out / GENAI_CONFIG), f"{name}, model builder")


def trace_graph(model: Path, scratch: Path, reason: str) -> FloatGraph:
    """Return the graph that transformers' exporter traces, with the inputs and outputs named as the builder does.

    Args:
        model: a float model folder.
        scratch: an existing folder to write into.
        reason: why the builder's graph is not taken.

    Raises:
        MissingPackageError: onnxscript is not installed.
        UnsupportedModelError: it cannot export the architecture either.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise MissingPackageError(
            f"{reason} The other exporter, transformers', needs onnxscript, which is not installed; install it with "
            "`pip install cloq-export[onnx]`."
        )
    out = scratch / "traced"
    out.mkdir()
    code, tail = _run(["-m", __name__, str(model), str(out)])
    name = _exporter_name(TRACER)
    if code or not (out / "model.onnx").is_file():
        raise UnsupportedModelError(
            f"{reason} {name} could not export it either: {_last_words(tail)} Serve this model with another format, "
            "e.g. `format=gptq_v2`."
        )
    note = f"{reason} The float graph was traced by {name} instead: its attention is not fused, so it is slower."
    return FloatGraph(out / "model.onnx", read_json(out / GENAI_CONFIG), f"{name}, traced", (note,))


def _run(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """Return the exit code of a Python program and the last lines that it wrote."""
    environment = {
        # A folder of the working directory may have a library's name.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, lines[-_TAIL:]


def _last_words(tail: Sequence[str]) -> str:
    words = tail[-1][:300] if tail else "it wrote nothing"
    return words if words.endswith(".") else f"{words}."


def _exporter_name(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _architecture(model: Path) -> str:
    names = read_json(model / "config.json").get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "this model"


def _trace(model_folder: Path, out: Path) -> None:
    """Export a model with a cache of keys and values as transformers' exporter does it, and describe it."""
    import onnx_ir as ir
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, **NO_CODE).eval()
    config = model.config.get_text_config()
    # Sizes that occur nowhere else: equal ones would be taken for one and the same.
    batch, past, new = 2, 5, 3
    with torch.no_grad():
        ids = torch.arange(batch * past).view(batch, past) % config.vocab_size
        cache = model(input_ids=ids, use_cache=True).past_key_values
        program = OnnxExporter().export(
            model,
            {
                "input_ids": ids[:, :new].contiguous(),
                "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
                "position_ids": torch.arange(past, past + new).expand(batch, new).contiguous(),
                "past_key_values": cache,
            },
            OnnxConfig(dynamic=True),
        )
    graph = program.model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.name = _renamed(str(value.name))
    present = {str(value.name) for value in graph.outputs}
    keys = [value for value in graph.inputs if str(value.name).endswith(".key")]
    if not keys or any(f"present.{number}.value" not in present for number in range(len(keys))):
        raise SystemExit("its cache is not made of keys and values alone.")
    shape = keys[0].shape
    assert shape is not None
    ir.save(program.model, out / "model.onnx", external_data="model.onnx.data")
    ends = getattr(model.generation_config, "eos_token_id", None) or config.eos_token_id
    padding = getattr(config, "pad_token_id", None)
    first_end = ends[0] if isinstance(ends, list) else ends
    context = getattr(config, "max_position_embeddings", None) or 2048
    names = {str(value.name) for value in graph.inputs}
    decoder = {
        "session_options": {"log_id": BUILDER, "provider_options": []},
        "filename": "model.onnx",
        "head_size": int(cache.layers[0].keys.shape[-1]),
        "hidden_size": config.hidden_size,
        # Not every graph has both of these inputs.
        "inputs": {
            key: name
            for key, name in TENSOR_NAMES["inputs"].items()
            if name in names or key not in ("attention_mask", "position_ids")
        },
        "outputs": TENSOR_NAMES["outputs"],
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(keys),
        "num_key_value_heads": int(cache.layers[0].keys.shape[1]),
    }
    write_json(
        out / GENAI_CONFIG,
        {
            "model": {
                "bos_token_id": config.bos_token_id,
                "context_length": context,
                "decoder": decoder,
                "eos_token_id": ends,
                "pad_token_id": first_end if padding is None else padding,
                "type": _PLAIN_DECODER,
                "vocab_size": config.vocab_size,
            },
            # The keys and values of a traced graph grow: they are new tensors at every step.
            "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
        },
    )


def _renamed(name: str) -> str:
    """Return the builder's name for an input or output of transformers' exporter."""
    side, _, rest = name.partition(".past_key_values.layers.")
    if not rest:
        return name
    number, _, part = rest.partition(".")
    return f"{'past_key_values' if side == 'input' else 'present'}.{number}.{part.removesuffix('s')}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parsed = parser.parse_args()
    _trace(parsed.model, parsed.out)
