"""`verify`: one export through the float model, the reference, our runtime and an engine, and a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from cloq_export.artifact.adapters import AdapterShelf, carried_note, read_bound_adapter
from cloq_export.artifact.artifact import Artifact
from cloq_export.artifact.certificate import verify_certificate, verify_run
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session
from cloq_export.engines.decoding import end_tokens
from cloq_export.engines.protocol import ServedModel
from cloq_export.engines.transformers.reference import ReferenceModel, reference_model
from cloq_export.engines.transformers.served import float_model, packed_model, tokens_per_batch
from cloq_export.errors import CalibrationError, FormatError, GateMissedError, UsageError
from cloq_export.files.atomic import make_folder
from cloq_export.files.versions import environment
from cloq_export.formats.onnx.blocks import INT8
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.peft import Adapter, write_adapter
from cloq_export.models.context import context_length
from cloq_export.models.source import LoadedModel, open_model
from cloq_export.parity import generation, liveness
from cloq_export.parity.answers import Answers
from cloq_export.parity.gate import (
    JUDGED,
    SIGNIFICANCE,
    binding_limits,
    default_limits,
    explain_miss,
    judge,
    merged_limits,
    read_gate_file,
    tie_gap,
)
from cloq_export.parity.isolation import measure_isolation
from cloq_export.parity.numerics import compare_greedy, compare_logprobs, measure_logprobs
from cloq_export.parity.perplexity import check_windows
from cloq_export.parity.provenance import NOT_RECORDED, PROVEN, Finding, probe_differences
from cloq_export.parity.quality import perplexity_entry
from cloq_export.parity.questions import DEFAULT_QUESTIONS, blindness, question_facts
from cloq_export.parity.report import FORMAT_VERSION, REPORT_FORMAT, collect_metrics, write_report
from cloq_export.parity.scales import SCALE_LIMIT, measure_scales
from cloq_export.parity.tasks import (
    PERPLEXITY,
    Questions,
    Task,
    expand_names,
    find_task,
    gate_key,
    load_questions,
    task_entry,
)
from cloq_export.recipe import CHOICES
from cloq_export.texts.corpora import evaluation_text, evaluation_tokens, tokenize_text
from cloq_export.texts.tokens import TextTokens
from cloq_export.verbs.made_before import MadeBefore, compare_float_part

if TYPE_CHECKING:
    from cloq_export.engines.vllm.options import EngineSettings
    from cloq_export.formats.onnx.reading import OnnxExport

RUNTIME_NAMES = ("hf", "vllm", "vllm-server", "onnx")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
# Half precision hides a module's effect in rounding; more tokens average it out.
_LIVENESS_SEQUENCES = {"float32": 1}
_LIVENESS_SEQUENCES_HALF = 4
_ISOLATION_LENGTHS = (64, 48, 57)
_PROMPT_TOKENS = 32
# The longest text that is served unless a length is typed, and the prompts that are continued in mixed batches.
_LONGEST = 2048
_MIXED_PROMPTS = 4
# Tokens on which the scales of modules are measured, all that are served in half precision, and tokens of each window
# on which modules are compared at first.
_SCALE_TOKENS = {"float32": 1024}
_SCREENED_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What `verify` is asked to do.

    Args:
        reference: the float model: a folder, a hub id or a GGUF file.
        runtime: what serves: "hf", "vllm", "vllm-server", or "onnx" for an ONNX export.
        adapters: NAME=FOLDER, a name in the export, or a folder; none takes all that the export has.
        tasks: "ppl", and any of `task_names()`, as TASK or TASK=FILE, or a group of them.
        gate: a gate file; None takes the default limits.
        dtype: of the served activations.
        device: of the float model, the reference and the transformers runtime.
        text: as in `evaluate`.
        window: tokens in a window.
        windows: how many at most.
        bos: what each window and each prompt of the text begins with: "auto", "never" or "always".
        gsm8k: file of its problems; None takes the data folder's or the hub's.
        problems: how many questions of each task, from the start, which must be there; None takes up to 100.
        shots: worked examples before each problem.
        prompts: greedy continuations that are compared.
        new_tokens: tokens in each of them.
        longest: length of the longest text that is measured and continued; None takes what the model is served with,
            as far as the text, memory and 2048 tokens go.
        liveness_tokens: tokens on which modules are shown to be live.
        seed: of the bootstrap.
        force: take adapters of another base; the report says so.
        python: the interpreter of the environment in which vLLM is installed; None is this one.
        out: folder for parity.json and parity.html; None writes none.
        run: the run that the export was made from, whose artefacts are compared too; None takes what the export
            records of it.
        other_reference: take a float model that is not the one that the run was made from; the report says so.
    """

    reference: str
    runtime: str = "hf"
    adapters: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("ppl",)
    gate: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    text: str = "wikitext2"
    window: int = 512
    windows: int = 16
    bos: str = "auto"
    gsm8k: str | None = None
    problems: int | None = None
    shots: int = 0
    prompts: int = 32
    new_tokens: int = 32
    longest: int | None = None
    liveness_tokens: int = 64
    seed: int = 0
    force: bool = False
    python: Path | None = None
    out: Path | None = None
    run: Path | None = None
    other_reference: bool = False


Opener = Callable[[Path, Mapping[str, Path], VerifyOptions], ServedModel]


def verify(export: Path, options: VerifyOptions, *, console: Console | None = None) -> dict[str, Any]:
    """Measure whether what is served equals what was trained, and judge it by the gate.

    Args:
        export: an export or a checkpoint folder.
        options: what to measure and how.
        console: where progress goes; None is standard error.

    Returns:
        dict: the report, as parity.json holds it; "passed" is the verdict, and "files" names what was written.

    Raises:
        UsageError: options that cannot be meant.
        GateMissedError: the text is shorter than one window, so that nothing can be judged.
        CloqError: the model, an adapter or the engine cannot be loaded, so that nothing can be measured.
    """
    plan = _Plan.make(Path(export), options)
    _check_engine(plan)
    if options.out is not None:
        make_folder(options.out)
    session = Session(console or Console(stderr=True))
    report = _Verification(plan, session).run()
    if options.out is not None:
        report["files"] = write_report(options.out, report)
    return report


def planned_gates(export: Path, options: VerifyOptions) -> dict[str, float]:
    """Return the limits that `verify` would judge by, from headers alone.

    Args:
        export: as in `verify`.
        options: as in `verify`.

    Raises:
        CloqError: as `verify`, for what is wrong with options, gate file, export or adapters.
    """
    return _Plan.make(Path(export), options).limits


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What was asked, checked against the files as far as that is cheap."""

    export: Path
    options: VerifyOptions
    checkpoint: Checkpoint | OnnxExport
    folders: Mapping[str, Path]
    adapters: Mapping[str, Adapter]
    made: MadeBefore
    limits: dict[str, float]

    @classmethod
    def make(cls, export: Path, options: VerifyOptions) -> _Plan:
        chosen = {} if options.gate is None else read_gate_file(options.gate)
        _check_options(options)
        artifact = Artifact.open(export)
        if artifact.kind == "merged export":
            raise UsageError(
                f"{export} is a merged export, which has no codes and no adapter to verify; give the quantized export."
            )
        checkpoint, folders, adapters = (_read_onnx if artifact.kind == "onnx export" else _read_checkpoint)(
            artifact, options
        )
        made = MadeBefore.read(export, checkpoint, folders, adapters, run=options.run, serves_all=not options.adapters)
        defaults = default_limits(
            options.dtype,
            min(spec.bits for spec in checkpoint.specs.values()),
            tuple(_asked_tasks(options)),
            adapters=len(adapters),
            packed=_measures_packed(options),
            rounded=_rounds_activations(checkpoint),
        )
        defaults |= made.limits(options, defaults)
        return cls(export, options, checkpoint, folders, adapters, made, merged_limits(defaults, chosen))

    @property
    def bits(self) -> int:
        """Return the smallest width among the layers."""
        return min(spec.bits for spec in self.checkpoint.specs.values())

    @property
    def subjects(self) -> list[str | None]:
        """Return what is measured on text: every adapter, or the base if there is none."""
        return list(self.adapters) or [None]


def _read_checkpoint(
    artifact: Artifact, options: VerifyOptions
) -> tuple[Checkpoint | OnnxExport, dict[str, Path], dict[str, Adapter]]:
    if options.runtime == "onnx":
        raise UsageError(f"{artifact.path} is no ONNX export; make one with: cloq export RUN --format onnx")
    checkpoint = artifact.checkpoint
    folders = _adapter_folders(artifact.adapters, options.adapters)
    return (
        checkpoint,
        folders,
        {name: read_bound_adapter(path, checkpoint, force=options.force) for name, path in folders.items()},
    )


def _read_onnx(
    artifact: Artifact, options: VerifyOptions
) -> tuple[Checkpoint | OnnxExport, dict[str, Path], dict[str, Adapter]]:
    if options.runtime != "onnx" or options.dtype != "float32":
        raise UsageError(
            f"{artifact.path} is an ONNX export, whose graph computes in float32; verify it with --runtime onnx and "
            "without --dtype."
        )
    require_packages()
    from cloq_export.formats.onnx.reading import OnnxExport
    from cloq_export.verbs import onnx_stand_in

    opened = OnnxExport.open(artifact.path)
    folders = _adapter_folders(artifact.adapters, options.adapters)
    adapters = {
        name: onnx_stand_in.read_fitting_adapter(path, opened, force=options.force) for name, path in folders.items()
    }
    return opened, folders, adapters


def _rounds_activations(checkpoint: Checkpoint | OnnxExport) -> bool:
    """Return whether a kernel of the export rounds activations to int8, as compact 2-bit graphs ask for."""
    return not isinstance(checkpoint, Checkpoint) and any(
        module.blocks.accuracy_level == INT8 for module in checkpoint.record.modules.values()
    )


def _open_hf(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    return packed_model(export, adapters, dtype=DTYPES[options.dtype], device=options.device, force=options.force)


def _open_vllm(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.vllm.engine import EngineStart, VllmModel

    return VllmModel(export, adapters, _engine_settings(options), EngineStart(python=options.python))


def _engine_settings(options: VerifyOptions) -> EngineSettings:
    from cloq_export.engines.vllm.options import EngineSettings

    return EngineSettings(dtype=options.dtype, force=options.force)


def _open_vllm_server(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.vllm.plan import ServerOptions
    from cloq_export.engines.vllm.server import VllmServer

    asked = ServerOptions(dtype=options.dtype, python=options.python, force=options.force)
    return VllmServer.start(export, adapters, asked)


def _open_onnx(export: Path, adapters: Mapping[str, Path], options: VerifyOptions) -> ServedModel:
    from cloq_export.engines.onnx.engine import OnnxModel

    return OnnxModel(export, adapters, force=options.force)


# Runtime -> what opens it; engines are imported when they are asked for.
OPENERS: dict[str, Opener] = {
    "hf": _open_hf,
    "vllm": _open_vllm,
    "vllm-server": _open_vllm_server,
    "onnx": _open_onnx,
}


def _check_engine(plan: _Plan) -> None:
    """Refuse what vLLM would refuse at its start: long before that, the float model and the reference are measured."""
    options = plan.options
    if not isinstance(plan.checkpoint, Checkpoint) or not options.runtime.startswith("vllm"):
        return
    from cloq_export.engines.vllm.facts import engine_facts
    from cloq_export.engines.vllm.options import engine_options

    engine_options(plan.checkpoint, plan.folders, _engine_settings(options))
    engine_facts(options.python)


class _Verification:
    """One call: what is measured, phase by phase, with one dense model in memory at a time beside the engine."""

    def __init__(self, plan: _Plan, session: Session) -> None:
        self.plan, self.options, self.session = plan, plan.options, session
        self.missing: list[dict[str, str]] = []
        self.numerics: list[dict[str, Any]] = []
        self.perplexity: list[dict[str, Any]] = []
        self.greedy: list[dict[str, Any]] = []
        self.liveness: list[dict[str, Any]] = []
        self.decoding: list[dict[str, Any]] = []
        self.scales: dict[str, Any] | None = None
        self.isolation: dict[str, Any] | None = None
        # Adapter -> hashes of the questions and prompts that it was trained on, as far as they are known.
        self.training_hashes: Mapping[str, Container[str]] = plan.made.trained_on()
        self.tasks: dict[str, tuple[Task, Questions]] = {}
        # Task -> (float, reference or served; adapter) -> answers.
        self.answers: dict[str, dict[tuple[str, str | None], Answers]] = {}
        self.noise_floor: dict[str, Any] | None = None
        self.findings: list[Finding] = []
        # Of the layers, where the certificate has read them already.
        self.digests: dict[str, str] | None = None
        self.float_part: list[Finding] = []
        self.last_steps: list[dict[str, Any]] = []
        self._phases: list[str] = []
        self._since = 0.0
        # What the reference is read from; for an ONNX export a checkpoint with its integers stands in.
        self.base, self.folders = plan.export, plan.folders
        # The adapters whose modules are shown to be live one by one.
        self.shown_live = {} if _rounds_activations(plan.checkpoint) else plan.adapters

    def run(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="cloq-verify-") as place:
            return self._run(Path(place))

    def _run(self, place: Path) -> dict[str, Any]:
        plan, options = self.plan, self.options
        with self._phase("certificate"):
            certificate = self._certificate()
        with self._phase("provenance"):
            self.findings += plan.made.findings(self.digests)
        text = evaluation_text(options.text)
        self._read_questions()
        with self._phase("float"):
            source = self._measure_float(text.text, place)
        reference = reference_model(self.base, self.folders, device=options.device, force=options.force)
        with self._phase("reference"):
            self._measure_reference(reference)
        if _measures_packed(options):
            with self._phase("packed"):
                self._measure_packed()
        with self._phase("served"):
            self._measure_served(reference)
        report = self._report(certificate, source, {"text": text.origin, "text_sha256": text.sha256})
        report["metrics"] = collect_metrics(report)
        blind = self._blind()
        report["judged"] = {"passed": not (reasons := self._not_judged(blind)), "reasons": reasons}
        report["metrics"][JUDGED] = float(not reasons)
        report["gates"] = judge(
            plan.limits, report["metrics"], blind | ({JUDGED: "; ".join(reasons)} if reasons else {})
        )
        report["passed"] = all(verdict["passed"] for verdict in report["gates"])
        return report

    def _certificate(self) -> dict[str, Any]:
        try:
            run = _run_of(self.plan.export)
            repeated = verify_certificate(self.plan.export) if run is None else verify_run(run)
        except FormatError as error:
            return {"passed": False, "files": None, "modules": None, "not_covered": [], "reason": str(error)}
        self.digests = dict(repeated.digests)
        return {
            "passed": True,
            "files": repeated.files,
            "modules": repeated.modules,
            "not_covered": list(repeated.not_covered),
            "reason": None,
        }

    def _read_questions(self) -> None:
        """Read the questions, which is cheap, before anything that is not."""
        options = self.options
        for name, file in _asked_tasks(options).items():
            task = find_task(name)
            questions = load_questions(task, file, count=options.problems or DEFAULT_QUESTIONS, shots=options.shots)
            self.tasks[name], self.answers[name] = (task, questions), {}

    def _cut(self, tokens: torch.Tensor, bare: torch.Tensor) -> None:
        """Cut windows, prompts and probes from a text's tokens: with begin tokens where windows are cut, and bare."""
        options, begin = self.options, self.begin
        count = min(options.windows, tokens.numel() // options.window)
        self.windows = tokens[: count * options.window].view(count, options.window).tolist()
        width = min(_PROMPT_TOKENS, options.window) - len(begin)
        # Prompts are spread over the whole of what was read, so that they are not all of one page.
        flat = bare[: count * (options.window - len(begin))].tolist()
        # One text from the start, begun once.
        self.longest = [*begin, *bare[: self.length - len(begin)].tolist()]
        step = max(1, (len(flat) - width) // max(1, options.prompts))
        starts = range(0, len(flat) - width + 1, step)
        self.prompts = [begin + flat[start : start + width] for start in list(starts)[: options.prompts]]
        probes = _LIVENESS_SEQUENCES.get(options.dtype, _LIVENESS_SEQUENCES_HALF)
        self.probes = [window[: options.liveness_tokens] for window in self.windows[:probes]]
        self.isolated = [
            window[: min(length, options.window)]
            for window, length in zip(self.windows * len(_ISOLATION_LENGTHS), _ISOLATION_LENGTHS, strict=False)
        ]

    def _measure_float(self, text: str, place: Path) -> dict[str, str]:
        """Open the float model, cut the text with its tokenizer, measure it, and let go of it."""
        options, checkpoint = self.options, self.plan.checkpoint
        loaded = open_model(options.reference, dtype=torch.float32)
        _refuse_other_model(loaded, checkpoint)
        with self._phase("float part"):
            self.findings += self.plan.made.findings_of_reference(loaded, other=options.other_reference)
            self.float_part = compare_float_part(checkpoint, loaded)
        if not isinstance(checkpoint, Checkpoint):
            from cloq_export.verbs.onnx_stand_in import write_stand_in

            self.base, self.folders = write_stand_in(place, checkpoint, loaded, self.plan.adapters)
        self.tokenizer, self.ends = loaded.tokenizer, end_tokens(loaded.model)
        self.begin = list(TextTokens(loaded.tokenizer).window_begin(options.bos))
        tokens = evaluation_tokens(loaded.tokenizer, text, options.window, options.bos)
        try:
            check_windows(loaded.model, tokens, window=options.window, windows=options.windows)
        except CalibrationError as error:
            raise GateMissedError(f"nothing was judged: {error}") from None
        bare = tokenize_text(loaded.tokenizer, text)
        self.length = self._longest_length(loaded.model, len(self.begin) + bare.numel())
        self.places = _changing_places(loaded.config)
        self._cut(tokens, bare)
        model = float_model(loaded.model.to(options.device))
        alone: list[str | None] = [None] * len(self.windows)
        self.session.say(f"measure the float model on {len(self.windows)} windows of {options.window} tokens, twice")
        self.float_logprobs = measure_logprobs(model, self.windows, alone)
        self.noise_floor = compare_logprobs(measure_logprobs(model, self.windows, alone), self.float_logprobs)
        self._add_perplexity("float", None, self.float_logprobs)
        self._answer("float", model, None)
        longest = [] if options.dtype == "float32" else measure_logprobs(model, [self.longest], [None])
        if options.dtype != "float32":
            # In place: a second copy would double the memory that the float model takes.
            rounded = float_model(loaded.model.to(DTYPES[options.dtype]))
            logprobs = measure_logprobs(rounded, self.windows, alone)
            self._add_numerics("float in served precision", "float", None, logprobs, self.float_logprobs)
            rounded_longest = measure_logprobs(rounded, [self.longest], [None])
            self._add_numerics("float in served precision, at length", "float", None, rounded_longest, longest)
        return {"name": options.reference, "fingerprint": loaded.source.fingerprint}

    def _measure_reference(self, reference: ReferenceModel) -> None:
        plan = self.plan
        self.reference_logprobs: dict[str | None, list[torch.Tensor]] = {}
        self.longest_logprobs: dict[str | None, list[torch.Tensor]] = {}
        self.expected: dict[str | None, list[list[int]]] = {}
        self.without: dict[str, dict[str, list[torch.Tensor]]] = {}
        self.probed: dict[str, list[torch.Tensor]] = {}
        self.session.say(f"measure the reference with {', '.join(plan.adapters) or 'no adapter'}")
        for number, adapter in enumerate(plan.subjects):
            logprobs = measure_logprobs(reference, self.windows, [adapter] * len(self.windows))
            self.reference_logprobs[adapter] = logprobs
            self._add_numerics("reference", "float", adapter, logprobs, self.float_logprobs)
            self._add_perplexity("reference", adapter, logprobs)
            self.longest_logprobs[adapter] = measure_logprobs(reference, [self.longest], [adapter])
            mine = self._prompts_of(number)
            self.expected[adapter] = reference.generate(mine, [adapter] * len(mine), self.options.new_tokens)
            self._answer("reference", reference, adapter)
        for adapter, read in self.shown_live.items():
            self.session.say(f"leave out each of {len(read.pairs)} modules of {adapter} in turn")
            with self._phase("liveness"):
                self.probed[adapter], self.without[adapter] = self._left_out(reference, adapter, list(read.pairs))

    def _left_out(
        self, reference: ReferenceModel, adapter: str, modules: Sequence[str]
    ) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        probed = measure_logprobs(reference, self.probes, [adapter] * len(self.probes))
        return probed, liveness.left_out(reference, self.probes, adapter, modules)

    def _measure_packed(self) -> None:
        plan = self.plan
        model = packed_model(self.base, self.folders, device=self.options.device, force=self.options.force)
        for adapter in plan.subjects:
            with self._attempt(f"packed runtime, {adapter or 'base'}"):
                logprobs = measure_logprobs(model, self.windows, [adapter] * len(self.windows))
                self._add_numerics("packed", "reference", adapter, logprobs, self.reference_logprobs[adapter])
                self._add_perplexity("packed", adapter, logprobs)

    def _measure_served(self, reference: ReferenceModel) -> None:
        plan, options = self.plan, self.options
        self.session.say(f"serve with {options.runtime} in {options.dtype}")
        self.served_logprobs: dict[str | None, list[torch.Tensor]] = {}
        with self._served(plan.folders) as served:
            for number, adapter in enumerate(plan.subjects):
                self._serve_text(served, adapter)
                self._serve_longest(served, reference, adapter)
                self._serve_greedy(served, reference, adapter, number)
                with self._attempt(f"tasks, {adapter or 'base'}"):
                    self._answer("served", served, adapter)
                with self._attempt(f"probe of the last step, {adapter or 'base'}"):
                    self._serve_probe(served, adapter)
            if plan.adapters:
                with self._attempt("isolation"), self._phase("isolation"):
                    self.isolation = measure_isolation(served, self.isolated, list(plan.adapters))
                self._serve_mixed(served, reference)
            with self._phase("liveness"):
                found = self._serve_probes(served)
        with self._phase("liveness"):
            self._settle_liveness(found)
        self._measure_scales(reference)

    def _serve_text(self, served: ServedModel, adapter: str | None) -> None:
        with self._attempt(f"served logits, {adapter or 'base'}"):
            logprobs = measure_logprobs(served, self.windows, [adapter] * len(self.windows))
            self._add_numerics("served", "reference", adapter, logprobs, self.reference_logprobs[adapter])
            self._add_perplexity("served", adapter, logprobs)
            self.served_logprobs[adapter] = logprobs

    def _serve_longest(self, served: ServedModel, reference: ReferenceModel, adapter: str | None) -> None:
        """Measure the longest text that is served, and texts that are written behind long prompts."""
        new = min(self.options.new_tokens, max(1, len(self.longest) - 1))
        of = adapter or "base"
        with self._attempt(f"the longest text, {of}"), self._phase("longest"):
            logprobs = measure_logprobs(served, [self.longest], [adapter])
            self._add_numerics("served at length", "reference", adapter, logprobs, self.longest_logprobs[adapter])
        prompts = generation.long_prompts(self.longest, new, self.places) if self.options.prompts else []
        with self._judging("longest", adapter) as judge_written, self._phase("longest"):
            judge_written(reference, prompts, served.generate(prompts, [adapter] * len(prompts), new), new)

    def _serve_probe(self, served: ServedModel, adapter: str | None) -> None:
        """Ask for what the model said at its last step, when it was made."""
        recorded = self.plan.made.probe(adapter)
        if recorded is not None:
            measured = measure_logprobs(served, recorded.token_ids, [adapter] * len(recorded.token_ids))
            self.last_steps.append({"adapter": adapter, **probe_differences(recorded, measured)})

    def _serve_greedy(self, served: ServedModel, reference: ReferenceModel, adapter: str | None, number: int) -> None:
        mine = self._prompts_of(number)
        new = self.options.new_tokens
        with self._judging("greedy", adapter) as judge_written, self._phase("greedy"):
            texts = served.generate(mine, [adapter] * len(mine), new) if mine else []
            # First: a token that no model knows is refused here.
            judge_written(reference, mine, texts, new)
            if mine:
                compared = compare_greedy(
                    served,
                    reference,
                    mine,
                    self.expected[adapter],
                    adapter,
                    max_new_tokens=new,
                    end_tokens=self.ends,
                    tie=tie_gap(self.plan.bits),
                    measured=texts,
                )
                self.greedy.append({"adapter": adapter, **compared})

    def _serve_mixed(self, served: ServedModel, reference: ReferenceModel) -> None:
        """Let the base and all adapters write in one batch, and judge what each has written."""
        names: list[str | None] = [None, *self.plan.adapters]
        prompts, new = self.prompts[:_MIXED_PROMPTS], self.options.new_tokens
        found: dict[str | None, Any] = {}
        if prompts:
            with self._attempt("texts of a mixed batch"), self._phase("isolation"):
                found = generation.mixed_texts(served, prompts, names, new)
        for name in names:
            with self._judging("mixed", name) as judge_written, self._phase("isolation"):
                judge_written(reference, *found.get(name, ([], [])), new)

    @contextlib.contextmanager
    def _judging(self, kind: str, adapter: str | None) -> Iterator[Callable[..., None]]:
        """Note a row of texts whatever becomes of it: one that is missing makes its figures missing."""
        rows = []

        def judge_written(
            reference: ReferenceModel, prompts: Sequence[Any], texts: Sequence[Any], max_new_tokens: int
        ) -> None:
            rows.append(
                generation.judge_texts(
                    reference,
                    prompts,
                    texts,
                    adapter,
                    kind=kind,
                    max_new_tokens=max_new_tokens,
                    end_tokens=self.ends,
                )
            )

        names = {"greedy": "greedy text", "longest": "text behind long prompts", "mixed": "text in a mixed batch"}
        with self._attempt(f"{names[kind]}, {adapter or 'base'}"):
            yield judge_written
        self.decoding.append(rows[0] if rows else generation.missing_row(adapter, kind))

    def _measure_scales(self, reference: ReferenceModel) -> None:
        """Measure the scale of every quantized module, which all adapters share, as the first of them is served."""
        plan, options = self.plan, self.options
        adapter = plan.subjects[0]
        if _rounds_activations(plan.checkpoint) or adapter not in self.served_logprobs:
            return
        wanted = _SCALE_TOKENS.get(options.dtype, len(self.windows) * options.window)
        count = min(len(self.windows), -(-wanted // options.window))
        with self._attempt("scales of modules"), self._phase("scales"):
            self.scales = measure_scales(
                reference,
                self.windows[:count],
                adapter,
                list(plan.checkpoint.specs),
                self.served_logprobs[adapter][:count],
                self.reference_logprobs[adapter][:count],
                screened=min(options.window, _SCREENED_TOKENS),
                limit=plan.limits.get("scale_error_max", SCALE_LIMIT),
                seed=options.seed,
            )

    def _longest_length(self, model: Any, tokens: int) -> int:
        """Return the length of the longest text: what was typed, or what is served as far as one can measure it."""
        options, context = self.options, context_length(model)
        served = min(each for each in (context, _engine_length(self.plan), tokens) if each is not None)
        if options.longest is not None:
            if options.longest > served:
                raise UsageError(
                    f"--longest is {options.longest}; the model is served with up to {context or 'any number of'} "
                    f"tokens and the text has {tokens}: choose {served} or less, or a longer text."
                )
            return options.longest
        return min(served, max(options.window, min(_LONGEST, tokens_per_batch(model))))

    def _question_limit(self, task: str) -> float:
        return self.plan.limits.get(f"{gate_key(task)}_p_value", SIGNIFICANCE)

    def _blind(self) -> dict[str, str]:
        """Return the gates that nothing measured here could have missed, with the reason."""
        found = {}
        for name, (_, questions) in self.tasks.items():
            reason = blindness(len(questions.items), self._question_limit(name))
            if reason:
                found[f"{gate_key(name)}_p_value"] = reason
        return found

    def _not_judged(self, blind: Mapping[str, str]) -> list[str]:
        """Return why nothing was judged of the export, or of a part that verify is there for."""
        reasons = []
        largest = {"greedy_flips": float(sum(row["prompts"] for row in self.greedy))}
        if not set(binding_limits(self.plan.limits, largest)) - set(blind):
            reasons.append("every limit is dropped, or so wide that nothing can miss it")
        if self.plan.adapters and not self.prompts:
            reasons.append("no prompt was continued (--prompts 0), so nothing that the adapters write was looked at")
        if not self.windows:
            reasons.append("the text has no window")
        return reasons

    def _serve_probes(self, served: ServedModel) -> dict[str, list[liveness.Presence]]:
        found: dict[str, list[liveness.Presence]] = {}
        for adapter, read in self.shown_live.items():
            found[adapter] = []
            with self._attempt(f"liveness, {adapter}"):
                found[adapter] = liveness.served_presence(
                    served,
                    self.probes,
                    adapter,
                    self.probed[adapter],
                    self.without[adapter],
                    zero=liveness.zero_products(read.pairs),
                )
        return found

    def _settle_liveness(self, found: Mapping[str, list[liveness.Presence]]) -> None:
        """Show modules whose effect is lost in rounding once more, enlarged; then note what was found."""
        unsettled = {
            name: undecided
            for name, findings in found.items()
            if (undecided := [each for each in findings if each.verdict == liveness.UNDECIDED])
        }
        again: dict[str, list[liveness.Presence]] = {}
        if unsettled:
            with self._attempt("liveness of modules with little effect"):
                again = self._probe_enlarged(unsettled)
        for name, findings in found.items():
            settled = liveness.merged_findings(findings, again.get(name, []))
            if settled and liveness.live_share(settled) is None:
                reason = "the products of all its modules are zero, so there is nothing of it to see"
                self.missing.append({"what": f"liveness, {name}", "reason": reason})
            self.liveness.append(
                {
                    "adapter": name,
                    "sequences": len(self.probes),
                    "tokens": sum(len(ids) - 1 for ids in self.probes),
                    "live_share": liveness.live_share(settled),
                    "modules": [dataclasses.asdict(presence) for presence in settled],
                }
            )

    def _probe_enlarged(
        self, unsettled: Mapping[str, Sequence[liveness.Presence]]
    ) -> dict[str, list[liveness.Presence]]:
        plan = self.plan
        count = sum(map(len, unsettled.values()))
        self.session.say(f"the effect of {count} modules is lost in rounding; probe them enlarged")
        with tempfile.TemporaryDirectory(prefix="cloq-verify-") as place:
            folders, gains = {}, {}
            for name, undecided in unsettled.items():
                pairs, gains[name] = liveness.enlarged_pairs(plan.adapters[name].pairs, undecided)
                folders[name] = Path(place) / name
                base = str(plan.adapters[name].config.get("base_model_name_or_path") or "")
                write_adapter(folders[name], pairs, base_model=base, base_fingerprint=plan.checkpoint.fingerprint)
            reference = reference_model(self.base, folders, device=self.options.device)
            found = {}
            with self._served(folders) as served:
                for name in folders:
                    probed, without = self._left_out(reference, name, list(gains[name]))
                    found[name] = liveness.served_presence(
                        served, self.probes, name, probed, without, gains=gains[name]
                    )
            return found

    @contextlib.contextmanager
    def _served(self, folders: Mapping[str, Path]) -> Iterator[ServedModel]:
        opener = OPENERS[self.options.runtime]
        with self._phase("start"):
            served = opener(self.plan.export, folders, self.options)
        try:
            yield served
        finally:
            served.close()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Book the time of a block under a name, and not under that of the block around it."""
        self._book()
        self._phases.append(name)
        try:
            yield
        finally:
            self._book()
            self._phases.pop()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._phases:
            name = self._phases[-1]
            self.session.seconds[name] = self.session.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """Note what could not be measured, and go on: its figures stay missing, and the gates on them miss."""
        try:
            yield
        except Exception as error:  # an engine raises whatever it runs into; what it did not answer is missing
            reason = " ".join(str(error).split()) or type(error).__name__
            self.missing.append({"what": what, "reason": reason})
            self.session.say(f"{what} could not be measured: {reason}")

    def _prompts_of(self, number: int) -> list[list[int]]:
        """Return the prompts of the subject of this number: they are dealt out in turn, and to each at least one."""
        count = len(self.prompts)
        return self.prompts[number :: len(self.plan.subjects)] or self.prompts[number % max(1, count) :][:1]

    def _add_numerics(
        self,
        measured: str,
        against: str,
        adapter: str | None,
        logprobs: Sequence[torch.Tensor],
        expected: Sequence[torch.Tensor],
    ) -> None:
        row = {"measured": measured, "against": against, "adapter": adapter}
        self.numerics.append(row | compare_logprobs(logprobs, expected))

    def _add_perplexity(self, model: str, adapter: str | None, logprobs: Sequence[torch.Tensor]) -> None:
        if PERPLEXITY in self.options.tasks:
            against = None if model == "float" else self.float_logprobs
            entry = perplexity_entry(logprobs, against, seed=self.options.seed)
            self.perplexity.append({"model": model, "adapter": adapter, **entry})

    def _answer(self, name: str, model: ServedModel, adapter: str | None) -> None:
        of = f" with {adapter}" if adapter else ""
        for task_name, (task, questions) in self.tasks.items():
            with self._phase(task_name), self.session.progress(f"{task_name}, {name}{of}") as advance:
                answers = task.ask(model, self.tokenizer, questions, adapter, advance=advance)
            self.answers[task_name][name, adapter] = answers

    def _task_entries(self) -> dict[str, Any]:
        """Return task -> an entry for each adapter, in which the float model stands too."""
        entries: dict[str, Any] = {}
        for name, (task, questions) in self.tasks.items():
            given = self.answers[name]
            entries[name] = [
                task_entry(task, questions, {model: each for (model, of), each in given.items() if of in own}, adapter)
                | question_facts(
                    len(questions.items),
                    self.options.problems,
                    questions.keys,
                    questions.hashes,
                    self.training_hashes.get(adapter or ""),
                    self._question_limit(name),
                )
                for adapter in self.plan.subjects
                for own in [(None, adapter)]
            ]
        return entries

    def _report(
        self, certificate: Mapping[str, Any], source: Mapping[str, str], text: Mapping[str, str]
    ) -> dict[str, Any]:
        plan, options = self.plan, self.options
        notes = list(self.session.notes)
        fingerprint = plan.checkpoint.fingerprint
        adapters = []
        for name, read in plan.adapters.items():
            bound = read.base_fingerprint == fingerprint
            adapters.append(
                {
                    "name": name,
                    "folder": str(plan.folders[name]),
                    "modules": len(read.pairs),
                    "bound_to_this_base": bound,
                }
            )
            if not bound:
                notes.append(
                    f"the adapter {name} is bound to {read.base_fingerprint or 'no base'}; it was taken by force"
                )
        shelf = AdapterShelf.of(plan.export)
        notes += shelf.notes if not options.adapters else ()
        outside = {name: folder for name, folder in plan.folders.items() if folder not in shelf.folders.values()}
        notes += filter(None, (carried_note(name, folder) for name, folder in outside.items()))
        notes += [
            f"not proven: {each.what}: {each.reason}"
            for each in [*self.findings, *self.float_part]
            if each.verdict == NOT_RECORDED
        ]
        if not adapters:
            notes.append("there is no adapter: liveness and isolation were not measured")
        elif not self.shown_live:
            notes.append(
                "liveness was not measured: the graph rounds activations to int8, in which the effect of a single "
                "module drowns; an exact export of the same base shows it"
            )
        return {
            "format": REPORT_FORMAT,
            "format_version": FORMAT_VERSION,
            "passed": False,
            "judged": {"passed": False, "reasons": []},
            "export": str(plan.export),
            "layout": plan.checkpoint.layout_name,
            "bits": sorted({spec.bits for spec in plan.checkpoint.specs.values()}),
            "base_fingerprint": fingerprint,
            "reference": dict(source),
            "runtime": options.runtime,
            "dtype": options.dtype,
            "adapters": adapters,
            "conditions": {
                **text,
                "window": options.window,
                "windows": len(self.windows),
                "bos": options.bos,
                "begin_tokens": self.begin,
                "tasks": list(options.tasks),
                "prompts": len(self.prompts),
                "new_tokens": options.new_tokens,
                "longest": len(self.longest),
                "liveness_tokens": options.liveness_tokens,
                "seed": options.seed,
                "device": options.device,
                "threads": torch.get_num_threads(),
            },
            "certificate": dict(certificate),
            "provenance": {
                "findings": [finding.to_json() for finding in self.findings],
                "probes": self.last_steps,
                "recorded_ratios": plan.made.recorded_ratios(options, text["text_sha256"]),
            },
            "float_part": [finding.to_json() for finding in self.float_part],
            "noise_floor": self.noise_floor,
            "numerics": self.numerics,
            "quality": {"perplexity": self.perplexity, "tasks": self._task_entries()},
            "greedy": self.greedy,
            "decoding": self.decoding,
            "scales": self.scales,
            "liveness": self.liveness,
            "isolation": self.isolation,
            "layers": _layer_certificates(plan.export),
            "metrics": {},
            "gates": [],
            "missing": self.missing,
            "notes": notes,
            "seconds": dict(self.session.seconds),
            "versions": environment(),
        }


def missed_gates(report: Mapping[str, Any]) -> str | None:
    """Return one line on every gate that a report misses, None if it passes."""
    missed = [explain_miss(verdict) for verdict in report["gates"] if not verdict["passed"]]
    if not missed:
        return None
    reasons = [f"{entry['what']}: {entry['reason']}" for entry in report["missing"]]
    found = [*report["provenance"]["findings"], *report["float_part"]]
    reasons += [f"{each['what']}: {each['reason']}" for each in found if each["verdict"] not in (PROVEN, NOT_RECORDED)]
    if report["certificate"] and report["certificate"]["reason"]:
        reasons.insert(0, report["certificate"]["reason"])
    dead = [
        f"{each['module']} of {row['adapter']} is {each['verdict']}"
        for row in report["liveness"]
        for each in row["modules"]
        if each["verdict"] not in (liveness.LIVE, liveness.ZERO)
    ]
    if dead:
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        reasons.append(f"{', '.join(dead[:3])}{more}")
    return "; ".join([*missed, *reasons, *_where_it_fails(report)])


def _where_it_fails(report: Mapping[str, Any]) -> list[str]:
    """Return which module's scale is off and which text goes wrong where, as far as a gate on it was missed."""
    missed = {verdict["gate"] for verdict in report["gates"] if not verdict["passed"] and verdict["value"] is not None}
    found = []
    if "scale_error_max" in missed:
        worst = report["scales"]["candidates"][0]
        found.append(
            f"the scale of {worst['module']} is off by {worst['error']:+.2%} ± {worst['standard_error']:.2%} "
            f"with {report['scales']['adapter'] or 'the base'}"
        )
    for prefix, kinds in (("decode_gap", ("greedy", "longest")), ("mixed_decode_gap", ("mixed",))):
        rows = [row for row in report["decoding"] if row["kind"] in kinds and row["worst"]]
        if any(gate.startswith(prefix) for gate in missed) and rows:
            row = max(rows, key=lambda each: each["gap_max"])
            found.append(
                f"{row['kind']} text of {row['adapter'] or 'the base'} is worst at token {row['worst']['position']} "
                f"behind prompt {row['worst']['prompt']}"
            )
    return found


def _measures_packed(options: VerifyOptions) -> bool:
    """Return whether our own runtime is measured beside the one that serves: not if it is the same."""
    return options.runtime not in ("hf", "onnx") or options.dtype != "float32"


def _asked_tasks(options: VerifyOptions) -> dict[str, str | None]:
    """Return task -> its file or None, perplexity left out.

    Raises:
        UsageError: there is no such task.
    """
    asked = expand_names([task for task in options.tasks if task != PERPLEXITY])
    if options.gsm8k is not None and "gsm8k" in asked:
        asked["gsm8k"] = asked["gsm8k"] or options.gsm8k
    return asked


def _check_options(options: VerifyOptions) -> None:
    _asked_tasks(options)
    for flag, value, allowed in (
        ("--runtime", options.runtime, RUNTIME_NAMES),
        ("--dtype", options.dtype, tuple(DTYPES)),
        ("--bos", options.bos, CHOICES["bos"]),
    ):
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{flag} is {value!r}; allowed are {', '.join(allowed)}.{hint}")
    for flag, number, least in (
        ("--window", options.window, 2),
        ("--windows", options.windows, 1),
        ("--problems", 1 if options.problems is None else options.problems, 1),
        ("--longest", 2 if options.longest is None else options.longest, 2),
        ("--shots", options.shots, 0),
        ("--prompts", options.prompts, 0),
        ("--new-tokens", options.new_tokens, 1),
        ("--liveness-tokens", options.liveness_tokens, 2),
    ):
        if number < least:
            raise UsageError(f"{flag} is {number}; it must be at least {least}.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device} was asked for, but torch sees no CUDA device; use --device cpu.")


def _adapter_folders(shelf: AdapterShelf, asked: Sequence[str]) -> dict[str, Path]:
    """Return name -> folder of the adapters that are to be served."""
    if not asked:
        return dict(shelf.folders)
    folders: dict[str, Path] = {}
    for text in asked:
        name, separator, place = text.partition("=")
        if not separator or (not _NAME.fullmatch(name) and Path(text).is_dir()):
            place = text
            name = Path(text).name
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"--adapter {text}: {name[:80]!r} cannot be the name of an adapter; letters, digits, '.', '_' and '-' "
                "are allowed, a letter or digit first. Give one with --adapter NAME=FOLDER."
            )
        if name in folders:
            raise UsageError(f"two adapters have the name {name!r}; give one another with --adapter NAME=FOLDER.")
        folders[name] = shelf.find(place)
    return folders


def _refuse_other_model(loaded: LoadedModel, checkpoint: Checkpoint | OnnxExport) -> None:
    """Refuse a float model whose sizes are not those of the export."""
    config = loaded.config.get_text_config()
    for field in ("vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = checkpoint.config.get(field), getattr(config, field, None)
        if mine is not None and theirs is not None and mine != theirs:
            raise UsageError(
                f"{loaded.source.name} has {field} {theirs} and {checkpoint.folder} has {mine}, so the one was not "
                "made from the other; give the float model of this export with --reference."
            )


def _engine_length(plan: _Plan) -> int | None:
    """Return how long a text an engine takes for scoring, None where nothing but the model limits it."""
    if not isinstance(plan.checkpoint, Checkpoint) or not plan.options.runtime.startswith("vllm"):
        return None
    from cloq_export.engines.vllm.options import engine_options

    options = engine_options(plan.checkpoint, plan.folders, _engine_settings(plan.options))
    # Scoring a text asks for one token behind it.
    return int(options["max_model_len"]) - 1


def _changing_places(config: Any) -> list[int]:
    """Return the lengths at which a model changes what it does: a sliding window, or other rotary frequencies."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scaling = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    named = [getattr(text_config, name, None) for name in ("sliding_window", "original_max_position_embeddings")]
    if isinstance(scaling, Mapping):
        named.append(scaling.get("original_max_position_embeddings"))
    return [place for place in named if isinstance(place, int) and place > 0]


def _run_of(export: Path) -> RunDirectory | None:
    """Return the run that a folder is, or whose own checkpoint it is."""
    for folder in (export, export.resolve().parent):
        if RunDirectory.is_run(folder):
            run = RunDirectory.open(folder)
            return run if folder == export or run.checkpoint_path.resolve() == export.resolve() else None
    return None


def _layer_certificates(export: Path) -> list[dict[str, Any]] | None:
    """Return what the run measured of each layer, if the export still lies in its run."""
    for folder in (export, *export.resolve().parents[:2]):
        if RunDirectory.is_run(folder):
            kept = ("module", "bits", "rank", "error_quantized", "error_adapted", "error_bound")
            found = [dataclasses.asdict(certificate) for certificate in RunDirectory.open(folder).certificates()]
            return [{key: entry[key] for key in kept} for entry in found] or None
    return None
