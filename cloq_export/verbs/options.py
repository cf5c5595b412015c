"""What each verb can be asked, with the words that explain it; the command line makes its flags of these classes.

Nothing here needs torch, so that `cloq VERB --help` is quick.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from cloq_export.errors import UsageError
from cloq_export.recipe import CHOICES, EXPORT_FORMATS, FIELDS


def option(default: Any, text: str, **more: Any) -> Any:
    """Return a field that is an option.

    Args:
        default: its value unless given; `dataclasses.MISSING` if it must be.
        text: what it means.
        more: "choices", "least" and "most" limit the value; "metavar" stands for it in the help; "flag" is its flag
            if that is not its name; "separator" stands between the parts of a value that is typed in one word.
    """
    return dataclasses.field(default=default, metadata={"help": text, **more})


def refuse_unmeant(options: Any) -> None:
    """Refuse values beyond what the fields of an option class allow.

    Args:
        options: an instance of such a class.

    Raises:
        UsageError: names the first of them.
    """
    for field in dataclasses.fields(options):
        value, facts = getattr(options, field.name), field.metadata
        if value is None:
            continue
        if "choices" in facts and value not in facts["choices"]:
            near = difflib.get_close_matches(str(value), facts["choices"], n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"`{field.name}` is {value!r}; allowed are {', '.join(facts['choices'])}.{hint}")
        if "least" in facts and value < facts["least"]:
            raise UsageError(f"`{field.name}` is {value}; it must be at least {facts['least']}.")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export or a conversion is asked to be."""

    format: str | None = option(
        None,
        "A layout, merged (plain 16-bit weights), onnx, or adapters alone (peft, onnx-adapter); unless given, the "
        "target's best, or the layout of the source.",
        choices=EXPORT_FORMATS,
    )
    target: str | None = option(
        None,
        "Check that this engine can read the export, e.g. vllm==0.33, transformers, gptqmodel, sglang.",
        metavar="ENGINE[==VERSION]",
    )
    device: str = option("any", "Where the target runs.", choices=("any", "cpu", "cuda"))
    adapters: tuple[str, ...] = option(
        (),
        "Adapter to put in; can be repeated. Unless given, all that the source has.",
        flag="--adapter",
        metavar="NAME|FOLDER",
    )
    split: str = option(
        "stored",
        "How A and B share their product: as stored, or evenly, for engines that compute in float16.",
        choices=("stored", "balanced"),
    )
    pad_rank: int | None = option(None, "Pad every pair with zeros to this rank.", least=1)
    dtype: str = option("bfloat16", "Of a merged export.", choices=("bfloat16", "float16"))
    style: str | None = option(
        None,
        "Of an ONNX graph: ONNX Runtime's own operator (the default), or DequantizeLinear and MatMul.",
        choices=("matmulnbits", "qdq"),
    )
    two_bit: str | None = option(
        None,
        "Of 2-bit codes in an ONNX graph: exact in 4-bit containers (the default), or 2-bit with activations rounded "
        "to int8.",
        choices=("exact", "compact"),
    )
    opset: int | None = option(None, "Of an ONNX graph; unless given, the least that fits.", least=1)
    force: bool = option(False, "Take an adapter of another base; the export and its card will say so.")
    out: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Folder to write; unless given, it lies in RUN/exports.", metavar="FOLDER"
    )


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and on what."""

    text: str = option(FIELDS["eval_text"].default, "wikitext2, gsm8k, embedded, a file or a hub id.")
    window: int = option(FIELDS["eval_window"].default, "Tokens in a window; each window stands on its own.", least=2)
    windows: int = option(FIELDS["eval_windows"].default, "How many windows, from the start of the text.", least=1)
    bos: str | None = option(
        None,
        "Begin token before each window: where the tokenizer puts one by itself (auto), never, or always; unless "
        "given, as the run has it, else auto.",
        choices=CHOICES["bos"],
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
        choices=CHOICES["stream"],
    )
    tasks: tuple[str, ...] = option(
        ("ppl",),
        "What is measured: ppl, gsm8k, word-problems, svamp, mawps, aqua, boolq, ..., or the groups arithmetic and "
        "commonsense; docs/tasks.md has them all.",
        metavar="ppl,TASK[=FILE],...",
        separator=",",
    )
    problems: int | None = option(None, "Questions of each task, from its start; unless given, all.", least=1)
    shots: int = option(0, "Worked examples before each.", least=0)
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
    port: int = option(8000, "Port; 0 takes a free one.", least=0, most=65535)
    dtype: str | None = option(
        None,
        "Of the activations; unless given, float32 on a CPU and float16 on a GPU.",
        choices=("float32", "float16", "bfloat16"),
    )
    max_model_len: int | None = option(None, "Longest prompt with its answer, in tokens.", least=1)
    max_lora_rank: int | None = option(None, "Rank that adapters may have, also those that are loaded later.")
    max_loras: int | None = option(None, "Adapters in one batch.", least=1)
    kv_cache_gib: int | None = option(None, "Memory for keys and values on a CPU.", least=1)
    threads: int | None = option(None, "Threads on a CPU.", least=1)
    python: Path | None = option(  # noqa: RUF009 (it returns a field)
        None, "Interpreter of the environment that has vLLM; unless given, this one."
    )
    force: bool = option(False, "Serve adapters that are bound to another base.")
    trust_adapters: bool = option(False, "Serve adapters that do not say which base they belong to.")
    deterministic: bool = option(
        False, "Packed layers and their adapters give a token the same bits in every batch, on a CPU."
    )
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
        30, "Seconds in which requests under way may end after SIGTERM or Ctrl-C; 0 ends them at once.", least=0
    )
    skip_proof: bool = option(False, "Open the port without proving the default adapter first.")
    timeout: float = option(1800, "Seconds to wait for the start.", least=1)
    verbose: bool = option(False, "Show vLLM's lines from the start; unless given, once it answers.")
    engine_options: tuple[str, ...] = ()
