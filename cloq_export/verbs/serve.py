"""An export or a run as an OpenAI-compatible server, checked before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cloq_export.artifact.adapters import AdapterShelf, carried_note, unbound_note
from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.probe_record import TokenizerRecord
from cloq_export.engines.vllm.closed_server import ClosedServer
from cloq_export.engines.vllm.plan import ServerOptions, ServerPlan, curl_line, plan_server
from cloq_export.engines.vllm.plugin.adapters import check_name
from cloq_export.engines.vllm.server import VllmServer, Watch
from cloq_export.errors import EngineError, SourceError, UsageError
from cloq_export.files.spelled_paths import expand_user
from cloq_export.formats.peft.codec import read_adapter, read_bound_fingerprint
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.gate import HALF_PROBE_LIMIT, float32_limit
from cloq_export.parity.start_proof import DefaultAnswer, StartProof, prove_default
from cloq_export.process.progress import show_waiting
from cloq_export.process.termination import interrupted_by_termination
from cloq_export.verbs.options import ServeOptions, refuse_unmeant
from cloq_export.verbs.verification.made_before import MadeBefore


@dataclasses.dataclass(frozen=True)
class Serving:
    """What a server that answers serves.

    Args:
        url: of the server.
        name: the model's own name.
        default: the adapter that answers to it; None if that is the quantized base itself.
        base_name: the name of the base without an adapter.
        models: every name that is answered to.
        options: what vLLM was started with.
        curl: a line to try it.
        proof: what was found of the default before the port opened; None if it was not looked for.
        notes: what may surprise.
    """

    url: str
    name: str
    default: str | None
    base_name: str
    models: Sequence[str]
    options: Mapping[str, Any]
    curl: str
    proof: StartProof | None
    notes: Sequence[str]

    @classmethod
    def of(cls, plan: ServerPlan, proof: StartProof | None, notes: Sequence[str]) -> Serving:
        """Return what a plan has become; `notes` are those on its adapters."""
        notes = [*notes, "the default was not proven" if proof is None else proof.sentence()]
        if plan.default is None:
            notes = [*notes, f"there is no adapter, so {plan.name} is the quantized base itself"]
        if plan.needs_adapter:
            notes = [*notes, f"the base needs its adapter, so {plan.base_name} is not served"]
        if plan.lets_strangers_in:
            notes.append(f"whoever reaches {plan.host}:{plan.port} may ask this server: `api_key_file` sets a key")
        names = (plan.url, plan.name, plan.default, plan.base_name, plan.served_names)
        return cls(*names, dict(plan.options), curl_line(plan), proof, notes)

    def to_json(self) -> dict[str, Any]:
        """Return what `cloq serve --json` prints."""
        return dataclasses.asdict(self)


def serve(
    export: Path,
    options: ServeOptions,
    *,
    announce: Callable[[Serving], None],
    console: Console | None = None,
) -> None:
    """Serve an export until the program is interrupted or told to end.

    Args:
        export: an export, a checkpoint folder, or a run directory.
        options: what is asked.
        announce: called once with what is served, when the server answers.
        console: where progress goes; None is standard error.

    Raises:
        UsageError: options that make no sense, or a port that is taken.
        BindingError: an adapter belongs to another base.
        GateMissedError: the server does not compute with its default adapter as its files say.
        EngineError: the server did not start, or ended by itself; its last lines are in the message.
        CloqError: anything else that a user can mend.
    """
    console = console or Console(stderr=True)
    plan = plan_serving(export, options)
    notes = [*adapter_notes(export, options), *unbound_notes(export, plan)]
    default = None if options.skip_proof else default_answer(export, plan, notes)
    proofs: list[StartProof] = []

    def prove(closed: ClosedServer) -> None:
        if default is not None:
            proofs.append(prove_default(closed, default))

    with contextlib.suppress(KeyboardInterrupt), interrupted_by_termination():
        errors = sys.stderr  # a bar stands in for it while it is shown
        what = f"starting vLLM with {plan.name} at {plan.url}; loading takes a while"
        with show_waiting(what, console) as waiting:
            watch = Watch(echo=errors, early_echo=errors if options.verbose else None, waiting=waiting)
            server = VllmServer(plan, timeout=options.timeout, watch=watch, prove=prove)
        with server:
            announce(Serving.of(plan, proofs[0] if proofs else None, notes))
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
    refuse_unmeant(options)
    adapters = served_adapters(export)
    default = options.default
    for text in options.adapters:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UsageError(f"the adapter {text!r:.80} is not of the form NAME=FOLDER.")
        check_name(name, taken=adapters)
        adapters[name] = Path(folder)
    run = Artifact.open(export).run
    if default is None and len(adapters) > 1 and run is not None:
        own = run.recipe.adapter_name
        default = own if own in adapters else None
    asked = {field.name: getattr(options, field.name) for field in dataclasses.fields(ServerOptions)}
    return plan_server(export, adapters, ServerOptions(**asked | {"default": default}))


def default_answer(export: Path, plan: ServerPlan, notes: list[str]) -> DefaultAnswer:
    """Return what plain requests are to be answered with, as the files say.

    Args:
        export: as in `serve`.
        plan: of the server.
        notes: gets what is to be said of a record that cannot be read.

    Raises:
        UsageError: texts of the served length have nothing to predict.
        CloqError: a file is damaged.
    """
    checkpoint = Checkpoint.open(export)
    name = plan.default
    folders = {} if name is None else {name: plan.adapters[name]}
    adapters = {each: read_adapter(folder) for each, folder in folders.items()}
    made = MadeBefore.read(export, checkpoint, folders, adapters, run=None, serves_all=False)
    notes += [f"{finding.what}: {finding.reason}" for finding in made.unread]
    recorded = made.probe(name)
    record = None if name is None else made.records.get(name)
    if record is not None and record.base_fingerprint != checkpoint.noted_fingerprint:
        recorded = None  # forced onto another base, where it says something else
    if recorded is None:
        try:
            probes = TokenizerRecord.of(read_tokenizer(checkpoint.folder)).probes()
        except SourceError as error:
            raise SourceError(f"{error} To serve without a proof of the default adapter, use `skip_proof`.") from None
    else:
        probes = [list(ids) for ids in recorded.token_ids]
    # One place is left for the answer that vLLM makes of each.
    probes = [ids[: plan.options["max_model_len"] - 1] for ids in probes]
    if min(map(len, probes), default=0) < 2:
        raise UsageError("a proof needs texts of two tokens and an answer; serve with a larger `max_model_len`.")
    if recorded is not None:
        logprobs = tuple(kept[: len(ids) - 1] for kept, ids in zip(recorded.logprobs, probes, strict=True))
        recorded = dataclasses.replace(recorded, token_ids=tuple(map(tuple, probes)), logprobs=logprobs)
    exact = plan.options["dtype"] == "float32" and (recorded is None or recorded.precision == "float32")
    bits = min(spec.bits for spec in checkpoint.specs.values())
    return DefaultAnswer(
        adapter=name,
        pairs={} if name is None else adapters[name].pairs,
        token_ids=probes,
        recorded=recorded,
        limit=float32_limit(bits) if exact else HALF_PROBE_LIMIT,
        base_answers=not plan.needs_adapter,
    )


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


def unbound_notes(export: Path, plan: ServerPlan) -> list[str]:
    """Return what is to be said of adapters that name no base and are served because they are trusted."""
    base = Artifact.open(export).checkpoint
    return [
        unbound_note(name, base) for name, folder in plan.adapters.items() if read_bound_fingerprint(folder) is None
    ]
