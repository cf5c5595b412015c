"""`cloq serve`: an export or a run as an OpenAI-compatible server, checked before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cloq_export.artifact.adapters import AdapterShelf, carried_note
from cloq_export.artifact.checkpoint import checkpoint_folder
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.engines.vllm.plan import ServerOptions, ServerPlan, curl_line, plan_server
from cloq_export.engines.vllm.plugin.adapters import check_name
from cloq_export.engines.vllm.server import VllmServer
from cloq_export.errors import EngineError, UsageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.process.progress import show_waiting
from cloq_export.process.termination import interrupted_by_termination
from cloq_export.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What a server is asked to be.

    Args:
        adapters: "NAME=FOLDER" of adapters that are served beside those of the export.
        default: the adapter that plain requests get; None takes the only one, or the one that a run's recipe names.
        name: the model's own name; None takes the folder's.
        host: address to listen at.
        port: 0 takes a free one.
        dtype: of the activations; None takes float32 on the CPU and float16 on CUDA.
        max_model_len: longest prompt with its answer; None takes the model's own, or what the memory holds.
        max_lora_rank: rank that adapters may have; None takes what the served ones need.
        max_loras: adapters in one batch; None takes all, at most 8.
        kv_cache_gib: memory for keys and values on the CPU; None takes a share of what is free.
        threads: threads on the CPU; None leaves it to vLLM.
        python: interpreter of the engine's environment; None is this one.
        force: take adapters of another base.
        timeout: seconds after which a start is given up.
        verbose: show the engine's lines from the start.
        engine_options: more options of vLLM's server.
    """

    adapters: tuple[str, ...] = ()
    default: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str | None = None
    max_model_len: int | None = None
    max_lora_rank: int | None = None
    max_loras: int | None = None
    kv_cache_gib: int | None = None
    threads: int | None = None
    python: Path | None = None
    force: bool = False
    timeout: float = 1800
    verbose: bool = False
    engine_options: tuple[str, ...] = ()


def serve(
    export: Path,
    options: ServeOptions,
    *,
    announce: Callable[[Mapping[str, Any]], None],
    console: Console | None = None,
) -> None:
    """Serve an export until the program is interrupted or told to end.

    Args:
        export: an export, a checkpoint folder, or a run directory.
        options: what is asked.
        announce: called once with what is served, when the server answers.
        console: where progress goes; None is standard error.

    Raises:
        UsageError: options that cannot be meant, or a port that is taken.
        BindingError: an adapter belongs to another base.
        EngineError: the server did not start, or ended by itself; its last lines are in the message.
        CloqError: anything else that a user can mend.
    """
    console = console or Console(stderr=True)
    plan = plan_serving(export, options)
    notes = adapter_notes(export, options)
    with contextlib.suppress(KeyboardInterrupt), interrupted_by_termination():
        errors = sys.stderr  # a bar stands in for it while it is shown
        what = f"starting vLLM with {plan.name} at {plan.url}; loading takes a while"
        with show_waiting(what, console) as waiting:
            early = errors if options.verbose else None
            server = VllmServer(plan, timeout=options.timeout, echo=errors, early_echo=early, waiting=waiting)
        with server:
            announce(_describe(plan, server.models(), notes))
            code = server.wait()
            raise EngineError(
                f"the vLLM server ended by itself (exit code {code}); its last lines:\n{server.last_lines()}"
            )
    console.print("stopped", markup=False)


def plan_serving(export: Path, options: ServeOptions) -> ServerPlan:
    """Return the server that `serve` would start, after all checks that need no engine.

    Raises:
        CloqError: as `serve`.
    """
    found = served_adapters(export)
    default = options.default
    for text in options.adapters:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UsageError(f"the adapter {text!r:.80} is not of the form NAME=FOLDER.")
        check_name(name, taken=found)
        found[name] = Path(folder)
    if default is None and len(found) > 1 and RunDirectory.is_run(export):
        own = Recipe.from_mapping(RunDirectory.open(export).recipe).adapter_name
        default = own if own in found else None
    asked = {field.name: getattr(options, field.name) for field in dataclasses.fields(ServerOptions)}
    return plan_server(export, found, ServerOptions(**asked | {"default": default}))


def served_adapters(export: Path) -> dict[str, Path]:
    """Return name -> folder of the adapters that an export or a run holds, by name.

    Raises:
        FormatError: there is no checkpoint.
    """
    checkpoint_folder(export)
    return dict(AdapterShelf.of(export).folders)


def adapter_notes(export: Path, options: ServeOptions) -> list[str]:
    """Return what is to be said of adapters: folders that are none, and folders outside that hold more than one."""
    outside = dict(text.split("=", 1) for text in options.adapters)
    carried = [carried_note(name, expand_user(folder)) for name, folder in outside.items()]
    return [*AdapterShelf.of(export).notes, *filter(None, carried)]


def _describe(plan: ServerPlan, models: list[str], adapter_notes: list[str]) -> dict[str, Any]:
    notes = list(adapter_notes)
    if plan.default is None:
        notes.append(f"there is no adapter, so {plan.name} is the quantized base itself")
    return {
        "url": plan.url,
        "name": plan.name,
        "default": plan.default,
        "base_name": plan.base_name,
        "models": models,
        "options": dict(plan.options),
        "curl": curl_line(plan),
        "notes": notes,
    }
