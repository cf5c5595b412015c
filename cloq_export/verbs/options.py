"""What each verb can be asked, with the words that explain it; the command line makes its flags of these classes.

Nothing here needs torch, so that `cloq VERB --help` is quick.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from cloq_export.errors import UsageError
from cloq_export.recipe import CHOICES, EXPORT_FORMATS, FIELDS
from cloq_export.recipe.checks import Options, at_least, between, one_of, option


def refuse_unmeant(options: Any) -> None:
    """Refuse values beyond what the fields of an option class allow.

    Args:
        options: an instance of such a class.

    Raises:
        UsageError: names the first of them.
    """
    known = Options(type(options))
    for name in known.fields:
        value = getattr(options, name)
        faults = known.faults(name, value, shown=f"`{name}`") if value is not None else []
        if faults:
            raise UsageError(f"{faults[0]}.")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export or a conversion is asked to be."""

    format: str | None = option(
        None,
        "A layout, merged (plain 16-bit weights), onnx, or adapters alone (peft, onnx-adapter); unless given, the "
        "target's best, or the layout of the source.",
        one_of(EXPORT_FORMATS),
    )
    target: str | None = option(
        None,
        "Check that this engine can read the export, e.g. vllm==0.33, transformers, gptqmodel, sglang.",
        metavar="ENGINE[==VERSION]",
    )
    device: str = option("any", "Where the target runs.", one_of(("any", "cpu", "cuda")))
    adapters: tuple[str, ...] = option(
        (),
        "Adapter to put in; can be repeated. Unless given, all that the source has.",
        flag="--adapter",
        metavar="NAME|FOLDER",
    )
    split: str = option(
        "stored",
        "How A and B share their product: as stored, or evenly, for engines that compute in float16.",
        one_of(("stored", "balanced")),
    )
    expert_pairs: str = option(
        "single",
        "Pairs of a mixture's experts, in a peft export: one for each linear layer, as engines read them, or one for "
        "each tensor of a model that holds experts fused (PEFT's target_parameters).",
        one_of(("single", "stacked")),
    )
    pad_rank: int | None = option(None, "Pad every pair with zeros to this rank.", at_least(1))
    dtype: str = option("bfloat16", "Of a merged export.", one_of(("bfloat16", "float16")))
    style: str | None = option(
        None,
        "Of an ONNX graph: ONNX Runtime's own operator (the default), or DequantizeLinear and MatMul.",
        one_of(("matmulnbits", "qdq")),
    )
    two_bit: str | None = option(
        None,
        "Of 2-bit codes in an ONNX graph: exact in 4-bit containers (the default), or 2-bit with activations rounded "
        "to int8.",
        one_of(("exact", "compact")),
    )
    opset: int | None = option(None, "Of an ONNX graph; unless given, the least that fits.", at_least(1))
    force: bool = option(False, "Take an adapter of another base; the export and its card will say so.")
    out: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Folder to write; unless given, it lies in RUN/exports.", metavar="FOLDER"
    )


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and on what."""

    text: str = option(FIELDS["eval_text"].default, "wikitext2, gsm8k, embedded, a file or a hub id.")
    window: int = option(
        FIELDS["eval_window"].default, "Tokens in a window; each window stands on its own.", at_least(2)
    )
    windows: int = option(FIELDS["eval_windows"].default, "How many windows, from the start of the text.", at_least(1))
    bos: str | None = option(
        None,
        "Begin token before each window: where the tokenizer puts one by itself (auto), never, or always; unless "
        "given, as the run has it, else auto.",
        one_of(CHOICES["bos"]),
    )
    reference: str | None = option(
        None, "The float model; unless given, the one that the run was made from.", metavar="MODEL"
    )
    adapter: str | None = option(
        None, "Adapter to measure; unless given, the run's own or the only one there is.", metavar="NAME|FOLDER"
    )
    force: bool = option(False, "Take an adapter of another base; the result says so.")
    stream: str = option(
        FIELDS["stream"].default,
        "Read the weights of the float model from disk block by block: where it would not fit into free memory, "
        "always, or never.",
        one_of(CHOICES["stream"]),
    )
    tasks: tuple[str, ...] = option(
        ("ppl",),
        "What is measured: ppl, gsm8k, word-problems, svamp, mawps, aqua, boolq, ..., or the groups arithmetic and "
        "commonsense; docs/tasks.md has them all.",
        metavar="ppl,TASK[=FILE],...",
        separator=",",
    )
    problems: int | None = option(None, "Questions of each task, from its start; unless given, all.", at_least(1))
    shots: int = option(0, "Worked examples before each.", at_least(0))
    out: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "For answers, from which an interrupted call goes on, and tasks.json.", metavar="FOLDER"
    )


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What a server is asked to be; `engine_options` are further options of vLLM's own server."""

    adapters: tuple[str, ...] = option(
        (),
        "An adapter to serve besides those of EXPORT; can be repeated.",
        flag="--adapter",
        metavar="NAME=FOLDER",
    )
    default: str | None = option(
        None, "The adapter that answers to the model's own name and to plain requests.", metavar="NAME"
    )
    name: str | None = option(None, "The model's own name; unless given, the folder's.")
    host: str = option("127.0.0.1", "Address to listen at.")
    port: int = option(8000, "Port; 0 takes a free one.", between(0, 65535))
    dtype: str | None = option(
        None,
        "Of the activations; unless given, float32 on a CPU and float16 on a GPU.",
        one_of(("float32", "float16", "bfloat16")),
    )
    max_model_len: int | None = option(None, "Longest prompt with its answer, in tokens.", at_least(1))
    max_lora_rank: int | None = option(None, "Rank that adapters may have, also those that are loaded later.")
    max_loras: int | None = option(None, "Adapters in one batch.", at_least(1))
    kv_cache_gib: int | None = option(None, "Memory for keys and values on a CPU.", at_least(1))
    threads: int | None = option(None, "Threads on a CPU.", at_least(1))
    python: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Interpreter of the environment that has vLLM; unless given, this one."
    )
    force: bool = option(False, "Serve adapters that are bound to another base.")
    trust_adapters: bool = option(False, "Serve adapters that do not say which base they belong to.")
    deterministic: bool = option(False, "Give a request the same bits alone and in every batch, on a CPU.")
    adapter_roots: tuple[str, ...] = option(
        (),
        "Folder from which adapters may be loaded while it serves, with all that lies in it; can be repeated. Without "
        "it only the adapters of the start can be loaded anew.",
        flag="--adapter-root",
        metavar="FOLDER",
    )
    api_key_file: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "File with the key that requests must carry; unless given, VLLM_API_KEY of the environment."
    )
    ssl_certfile: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Certificate of the server in PEM form, for https."
    )
    ssl_keyfile: Path | None = option(None, "Key of that certificate, not encrypted.")  # noqa: RUF009 (as above)
    ssl_ca_certs: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Certificates of which one must have signed that of each client; unless given, clients need none."
    )
    shutdown_timeout: int = option(
        30, "Seconds in which requests under way may end after SIGTERM or Ctrl-C; 0 ends them at once.", at_least(0)
    )
    skip_proof: bool = option(False, "Open the port without proving the default adapter first.")
    timeout: float = option(1800, "Seconds to wait for the start.", at_least(1))
    verbose: bool = option(False, "Show vLLM's lines from the start; unless given, once it answers.")
    engine_options: tuple[str, ...] = ()
