"""One function per verb: open, check, walk, write, measure, and say what was done."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.artifact.adapters import AdapterShelf, forced_note, read_bound_adapter
from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.inspection import describe
from cloq_export.artifact.merged import is_merged
from cloq_export.artifact.provenance import ProbeRecord, Quality
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.artifact.run_layers import natural_order
from cloq_export.artifact.stored_sizes import stored_sizes
from cloq_export.compress.budgeting import (
    with_choices_of,
)
from cloq_export.compress.job import budgeted_recipe, certificate_report, compress_model, finish_layers, started_run
from cloq_export.compress.session import (
    Session,
    open_planned,
    refuse_other_source,
    refuse_unfinished,
    source_fingerprint,
)
from cloq_export.compress.solve import ALTERNATIONS
from cloq_export.engines.transformers.loading import load
from cloq_export.engines.transformers.served import float_model
from cloq_export.errors import CalibrationError, MissingPackageError, RunDirectoryError, UsageError
from cloq_export.files.atomic import make_folder
from cloq_export.files.spelled_paths import command_line
from cloq_export.formats.peft import WEIGHTS_NAME, read_adapter, write_adapter
from cloq_export.models.source import LoadedModel, find_source, open_model
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.perplexity import check_windows
from cloq_export.parity.perplexity import evaluate as measure
from cloq_export.parity.tasks import PERPLEXITY, expand_names
from cloq_export.recipe import Recipe
from cloq_export.texts.corpora import (
    EMBEDDED,
    WIKITEXT2,
    CalibrationText,
    evaluation_text,
    evaluation_tokens,
    load_text,
)
from cloq_export.texts.tokens import TextTokens
from cloq_export.types import LayerCertificate, LoraPair, QuantizedLayer
from cloq_export.verbs.answering import Subject, answer_tasks, group_means, read_questions
from cloq_export.verbs.exporting import (
    SOURCE_REPORT,
    license_of,
    public_name,
    write_run_checkpoint,
)
from cloq_export.verbs.recording import CODES_ALONE, note_adapter, probe_model, record_answers, record_base

_SHOWN_WARNINGS = 5
# Which text a run was calibrated on; the recipe names it, and the content behind a name may change.
TEXT_REPORT = "calibration"


def run(
    recipe: Recipe,
    out: Path,
    *,
    demo: bool = False,
    console: Console | None = None,
    check: Callable[[LoadedModel], None] | None = None,
) -> dict[str, Any]:
    """Go from a model to a measured checkpoint with its adapter, continuing what an earlier call has done.

    Args:
        recipe: every option.
        out: the run directory.
        demo: without WikiText-2 at hand, calibrate and measure on the text that Python itself carries.
        console: where progress goes; None is standard error.
        check: called with the model before any work; refuses what a later step could not do.

    Returns:
        The summary: what was measured, where the files are, what to type next.

    Raises:
        CloqError: anything a user can mend, in one line.
    """
    if recipe.codes_from:
        _refuse_codes_of_alternations(recipe)
    recipe = with_choices_of(out, _with_grid_of_codes(recipe))
    session = Session(recipe, console or Console(stderr=True))
    calibration, judging = _texts(session, demo=demo)
    with _open_run(session, out) as directory:
        _bind_text(directory, calibration)

        def refuse(loaded: LoadedModel) -> None:
            tokens = evaluation_tokens(loaded.tokenizer, judging.text, recipe.eval_window, recipe.bos)
            check_windows(loaded.model, tokens, window=recipe.eval_window, windows=recipe.eval_windows)
            if check is not None:
                check(loaded)

        recipe = session.recipe = budgeted_recipe(session, directory, calibration, refuse)
        model = compress_model(session, directory, recipe, calibration, refuse)
        _note_source(directory, model)
        _write_adapter(session, directory, recipe.adapter_name)
        write_run_checkpoint(session, directory, model)
        probes: dict[str, ProbeRecord] = {}
        perplexity = session.timed(
            "measure",
            lambda: _measure(
                session, out, judging, recipe.eval_window, recipe.eval_windows, recipe.bos, model, probes=probes
            ),
        )
        directory.write_report("evaluation", perplexity)
        record_base(
            session,
            directory,
            model.tokenizer,
            model_name=public_name(recipe.model),
            probes=probes,
            quality=_quality(recipe, perplexity),
        )
        directory.set_state("done")
        return _summary(session, directory, perplexity)


def quantize(recipe: Recipe, out: Path, *, demo: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Make codes, scales and zeros for every layer, without adapters.

    Args:
        recipe: every option; its rank is kept for `adapt`.
        out: the run directory.
        demo: as in `run`.
        console: where progress goes.

    Returns:
        The summary.

    Raises:
        CloqError: anything a user can mend.
    """
    recipe_of_codes = recipe.changed({"rank": 0, "overrides": _without_ranks(recipe)})
    session = Session(with_choices_of(out, recipe_of_codes), console or Console(stderr=True))
    calibration = _calibration_text(session, demo=demo)
    with _open_run(session, out) as directory:
        _bind_text(directory, calibration)
        session.recipe = budgeted_recipe(session, directory, calibration)
        model = compress_model(session, directory, session.recipe, calibration)
        _note_source(directory, model)
        write_run_checkpoint(session, directory, model)
        record_base(session, directory, model.tokenizer, model_name=public_name(recipe.model))
        directory.set_state("quantized")
        summary = _summary(session, directory, None)
        summary["next"] = [
            command_line("cloq", "adapt", out, "--rank", recipe.rank or 64),
            command_line("cloq", "export", out),
        ]
        return summary


def adapt(run_path: Path, changes: Mapping[str, Any], *, console: Console | None = None) -> dict[str, Any]:
    """Make an adapter for the codes that a run holds, on the same calibration tokens.

    Args:
        run_path: a run whose layers are all quantized.
        changes: recipe options that differ from the run's, e.g. rank or adapter_name.
        console: where progress goes.

    Returns:
        The summary.

    Raises:
        UsageError: an option would change the codes, the rank is 0, or an adapter of that name exists.
        RunDirectoryError: the run is not finished, or an interrupted call used other options.
    """
    directory = RunDirectory.open(run_path)
    base_recipe = Recipe.from_mapping(directory.recipe)
    asked = {"rank": 64, **changes} if base_recipe.rank == 0 else dict(changes)
    frozen = sorted(set(asked) - set(_ADAPTER_OPTIONS))
    if frozen:
        raise UsageError(
            f"{', '.join(frozen)} would change the codes, and adapt keeps them; allowed are "
            f"{', '.join(_ADAPTER_OPTIONS)}. Make another run with: cloq run {base_recipe.model} --out OTHER"
        )
    recipe = base_recipe.changed(asked)
    if recipe.rank == 0:
        raise UsageError("the rank is 0, which makes no adapter; choose one with --rank.")
    _refuse_codes_of_alternations(recipe)
    session = Session(recipe, console or Console(stderr=True))
    work = directory.path / "work" / f"adapt-{recipe.adapter_name}"
    target = directory.adapter_path(recipe.adapter_name)
    if target.exists() and recipe.adapter_name == base_recipe.adapter_name and base_recipe.rank:
        raise UsageError(
            f"the adapter {recipe.adapter_name!r} was made together with the codes; give the new one another name with "
            "--adapter-name."
        )
    if target.exists() and not work.exists():
        raise UsageError(
            f"{target} exists already; choose another name with --adapter-name, or delete that folder first."
        )
    if RunDirectory.is_run(work):
        begun = Recipe.from_mapping(RunDirectory.open(work).recipe)
        differing = begun.difference(recipe)
        if differing:
            raise UsageError(
                f"the adapter {recipe.adapter_name!r} was begun with other options and not finished "
                f"({'; '.join(differing)}); give the same ones to finish it, choose another --adapter-name, or delete "
                f"{work}."
            )
    with (
        directory,
        started_run(work, recipe, directory.source_fingerprint) as parts,
    ):
        loaded, plan = open_planned(session, recipe)
        refuse_other_source(loaded, directory)
        refuse_unfinished(directory, plan)
        calibration = calibration_text_of(session, directory)
        _bind_text(directory, calibration)
        finish_layers(session, loaded, plan, parts, recipe, calibration, _codes_of(directory))
        _write_adapter(session, directory, recipe.adapter_name, parts)
        certificates = parts.certificates()
        directory.write_report(f"adapter-{recipe.adapter_name}", certificate_report(certificates))
    # Renamed first: a kill halfway through the removal must not leave what looks like an interrupted call.
    finished = work.with_name(f".{work.name}.finished")
    shutil.rmtree(finished, ignore_errors=True)
    work.rename(finished)
    shutil.rmtree(finished, ignore_errors=True)
    with contextlib.suppress(OSError):  # another adapter may be in the making there
        work.parent.rmdir()
    summary = _summary(session, directory, None, certificates, adapter=recipe.adapter_name)
    summary["next"] = [command_line("cloq", "export", run_path), command_line("cloq", "eval", run_path)]
    return summary


def adapt_checkpoint(checkpoint: Path, recipe: Recipe, out: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Make a CLoQ adapter for a quantized checkpoint that another tool made, and measure what it mends.

    The result is a run like any other: its codes are the checkpoint's, bit for bit.

    Args:
        checkpoint: a folder in any layout that is read.
        recipe: model is the float original; what concerns codes is not looked at.
        out: the run directory.
        console: where progress goes.

    Returns:
        The summary of `run`.

    Raises:
        CloqError: anything a user can mend.
    """
    return run(recipe.changed({"codes_from": str(checkpoint)}), out, console=console)


def evaluate(
    path: Path,
    text: str,
    window: int,
    windows: int,
    reference: str | None = None,
    *,
    bos: str | None = None,
    adapter: str | None = None,
    force: bool = False,
    tasks: Sequence[str] = (PERPLEXITY,),
    problems: int | None = None,
    shots: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure the float model, Q alone and Q with its adapter: perplexity on the same windows, answers to tasks.

    Args:
        path: a run directory, an export or a checkpoint folder.
        text: "wikitext2", "embedded", a file or a hub id.
        window: tokens in a window.
        windows: windows from the start of the text.
        reference: the float model; None is the run's source, and for a checkpoint none is measured.
        bos: what each window begins with: "auto", "never" or "always"; None is the run's, and for a checkpoint "auto".
        adapter: name or folder; None takes the recipe's own if the run has it, else the only one there is.
        force: take an adapter of another base; the result says so.
        tasks: "ppl", and any of `task_names()`, as TASK or TASK=FILE, or a group of them.
        problems: questions of each task, from the start; None takes all.
        shots: worked examples before each question.
        out: folder for answers, from which an interrupted call goes on, and for tasks.json; None writes none.
        console: where progress goes.

    Returns:
        dict: the JSON object that `cloq eval --json` prints.

    Raises:
        CloqError: anything a user can mend.
    """
    console = console or Console(stderr=True)
    if not tasks:
        raise UsageError(f"--tasks names nothing to measure; name {PERPLEXITY} or a task.")
    asked = expand_names([task for task in tasks if task != PERPLEXITY])
    recipe = Recipe.from_mapping(RunDirectory.open(path).recipe) if RunDirectory.is_run(path) else Recipe()
    session = Session(recipe, console)
    questions = read_questions(asked, problems, shots)
    judging = evaluation_text(text) if PERPLEXITY in tasks else None
    chosen = adapter or _adapter_of(session, path)
    _check_measured(path, chosen, force)
    if questions and out is not None:
        make_folder(out)
    loaded: LoadedModel | None = None
    name = reference or recipe.model
    if name:
        loaded = open_model(name, dtype=torch.float32)
    result: dict[str, Any] = {}
    if judging is not None:
        result = _measure(
            session, path, judging, window, windows, bos or recipe.bos, loaded, adapter=chosen, force=force
        )
    if questions:
        tokenizer = loaded.tokenizer if loaded is not None else _checkpoint_tokenizer(path)
        subjects = _subjects(session, path, loaded, chosen, force)
        result["tasks"] = answer_tasks(session, questions, subjects, tokenizer, chosen, out)
        result["means"] = group_means(result["tasks"])
        if RunDirectory.is_run(path):
            record_answers(RunDirectory.open(path), chosen, questions, result["tasks"])
    if loaded is None:
        session.notes.append("the float model was not measured: name it with --reference")
    if session.notes:
        result["notes"] = list(dict.fromkeys(session.notes))
    return result


def inspect(path: Path, verify: bool = False, *, adapter: str | None = None, force: bool = False) -> dict[str, Any]:
    """Say what an artefact is: layout, bits, groups, fingerprint, sizes, bits per weight.

    Args:
        path: a run, an export, a checkpoint or an adapter folder.
        verify: read every tensor, compute the fingerprint again, and repeat the certificate where there is one.
        adapter: an adapter that is to be served on this base.
        force: describe an adapter of another base instead of refusing it.

    Returns:
        dict, ready for JSON.

    Raises:
        FormatError: nothing known is there, or it is damaged.
        BindingError: the adapter belongs to another base.
    """
    return describe(path, verify=verify, adapter=adapter, force=force).to_json()


def _refuse_codes_of_alternations(recipe: Recipe) -> None:
    if recipe.init in ALTERNATIONS:
        raise UsageError(
            f"init {recipe.init} makes codes of its own, and these are kept; choose init cloq or svd, or make another "
            f"run with --set init={recipe.init}: cloq run {recipe.model} --out OTHER"
        )


# What `adapt` may choose anew: none of it touches the codes.
_ADAPTER_OPTIONS = (
    "rank",
    "init",
    "split",
    "svd",
    "adapter_dtype",
    "adapter_name",
    "device",
    "precision",
    "refine",
    "refine_steps",
)


def _without_ranks(recipe: Recipe) -> dict[str, dict[str, Any]]:
    kept = {
        pattern: {key: value for key, value in settings.items() if key != "rank"}
        for pattern, settings in recipe.overrides.items()
    }
    return {pattern: settings for pattern, settings in kept.items() if settings}


def _texts(session: Session, *, demo: bool) -> tuple[CalibrationText, CalibrationText]:
    """Return the calibration text and the text to measure on; only the demo may fall back, and says so."""
    recipe = session.recipe
    try:
        return load_text(recipe.calibration), evaluation_text(recipe.eval_text)
    except (CalibrationError, MissingPackageError):
        if not demo or (recipe.calibration, recipe.eval_text) != (WIKITEXT2, WIKITEXT2):
            raise
    return embedded_texts(session)


def _calibration_text(session: Session, *, demo: bool) -> CalibrationText:
    """Return the calibration text alone, for steps that measure nothing."""
    try:
        return load_text(session.recipe.calibration)
    except (CalibrationError, MissingPackageError):
        if not demo or session.recipe.calibration != WIKITEXT2:
            raise
    return embedded_texts(session)[0]


def calibration_text_of(session: Session, directory: RunDirectory) -> CalibrationText:
    """Return the text that a run was calibrated on, the one that its demo fell back to if it did."""
    noted = directory.read_report(TEXT_REPORT) if TEXT_REPORT in directory.reports() else {}
    if session.recipe.calibration == WIKITEXT2 and str(noted.get("origin", "")).startswith(EMBEDDED):
        return embedded_texts(session)[0]
    return load_text(session.recipe.calibration)


def embedded_texts(session: Session) -> tuple[CalibrationText, CalibrationText]:
    whole = load_text(EMBEDDED)
    # One text serves both ends: what is measured must not have been calibrated on.
    cut = whole.text.rfind("\n\n", 0, int(len(whole.text) * 0.8))
    session.notes.append(
        "WikiText-2 is not at hand, so the demo calibrates on the first four fifths of the text embedded in Python "
        "(pydoc_data.topics) and measures on the rest: figures are not comparable with those of WikiText-2"
    )
    return (
        CalibrationText.of(whole.text[:cut], f"{whole.origin}, first four fifths"),
        CalibrationText.of(whole.text[cut:], f"{whole.origin}, last fifth"),
    )


def _bind_text(directory: RunDirectory, calibration: CalibrationText) -> None:
    """Note which text a run is calibrated on, and refuse to go on with another one under the same name.

    Raises:
        RunDirectoryError: the text differs from the run's.
    """
    if TEXT_REPORT not in directory.reports():
        directory.write_report(TEXT_REPORT, {"origin": calibration.origin, "sha256": calibration.sha256})
        return
    held = directory.read_report(TEXT_REPORT)
    if held.get("sha256") != calibration.sha256:
        raise RunDirectoryError(
            f"{directory.path} holds a run that was calibrated on another text: {held.get('origin')} (sha256 "
            f"{str(held.get('sha256'))[:12]}…) in the run, {calibration.origin} (sha256 {calibration.sha256[:12]}…) "
            "now. Restore the text to continue the run, or choose another folder with --out."
        )


def _open_run(session: Session, out: Path) -> contextlib.AbstractContextManager[RunDirectory]:
    source = session.timed("read model", lambda: find_source(session.recipe.model))
    fingerprint = session.timed("read model", lambda: source_fingerprint(session.recipe, source.fingerprint))
    return started_run(out, session.recipe, fingerprint)


def _note_source(directory: RunDirectory, loaded: LoadedModel) -> None:
    directory.write_report(SOURCE_REPORT, {"name": loaded.source.name, "license": license_of(loaded.source)})


def _with_grid_of_codes(recipe: Recipe) -> Recipe:
    """Return the recipe with the grid that most layers of the checkpoint have whose codes it keeps."""
    if not recipe.codes_from:
        return recipe
    grids = collections.Counter(Checkpoint.open(recipe.codes_from).specs.values())
    spec = grids.most_common(1)[0][0]
    return recipe.changed({"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric})


def _codes_of(directory: RunDirectory) -> Callable[[str], QuantizedLayer]:
    return directory.read_codes


def _write_adapter(session: Session, directory: RunDirectory, name: str, parts: RunDirectory | None = None) -> None:
    """Write the adapter whose pairs stand in `parts` (the run itself if None), bound to the run's base."""
    source = parts or directory
    pairs: dict[str, LoraPair] = {}
    for module in sorted(source.completed_modules(), key=natural_order):
        lora = source.read_pair(module)
        if lora is not None:
            pairs[module] = lora
    if not pairs:
        return
    fingerprint = directory.base_fingerprint()
    session.timed(
        "write",
        lambda: write_adapter(
            directory.adapter_path(name),
            pairs,
            base_model=session.recipe.model,
            base_fingerprint=fingerprint,
            extra=note_adapter(name, pairs, base_fingerprint=fingerprint),
        ),
    )


def _measure(
    session: Session,
    path: Path,
    text: CalibrationText,
    window: int,
    windows: int,
    bos: str,
    loaded: LoadedModel | None,
    *,
    adapter: str | None = None,
    force: bool = False,
    probes: dict[str, ProbeRecord] | None = None,
) -> dict[str, Any]:
    """Measure from the files on disk, so that what is reported is what was written; `probes` is filled if given."""
    adapter = adapter or _adapter_of(session, path)
    merged = is_merged(path)
    served = (
        open_model(str(path), dtype=torch.float32, untie=True).model
        if merged
        else _served(session, path, adapter, force)
    )
    tokenizer = loaded.tokenizer if loaded is not None else _checkpoint_tokenizer(path)
    tokens = evaluation_tokens(tokenizer, text.text, window, bos)

    def models() -> Iterator[tuple[str, nn.Module]]:
        if loaded is not None:
            yield "float", loaded.model
        if merged:
            yield "merged", served
            return
        if adapter is not None:
            served.disable_adapters()
        if probes is not None:
            probes[CODES_ALONE] = probe_model(served, tokenizer)
        yield "quantized", served
        if adapter is not None:
            served.enable_adapters()
            if probes is not None:
                probes[adapter] = probe_model(served, tokenizer)
            yield "adapter", served

    table = measure(
        models(),
        tokens,
        text=text,
        window=window,
        windows=windows,
        console=session.console,
    )
    return table | {"bos": bos, "begin_tokens": list(TextTokens(tokenizer).window_begin(bos))}


def _quality(recipe: Recipe, perplexity: Mapping[str, Any]) -> Quality:
    """Return what `verify` holds a served model's perplexity against."""
    labels = {"quantized": CODES_ALONE, "adapter": recipe.adapter_name}
    return Quality(
        text=public_name(recipe.eval_text),
        text_sha256=str(perplexity["text_sha256"]),
        window=recipe.eval_window,
        windows=recipe.eval_windows,
        bos=recipe.bos,
        ratio={name: perplexity[label]["ratio_to_float"] for label, name in labels.items() if label in perplexity},
    )


def _subjects(
    session: Session, path: Path, loaded: LoadedModel | None, adapter: str | None, force: bool
) -> Iterator[Subject]:
    """Yield what answers: the float model, and what is on disk, without and with the adapter."""
    if loaded is not None:
        yield Subject("float", float_model(loaded.model), None, loaded.source.fingerprint)
    if is_merged(path):
        merged = open_model(str(path), dtype=torch.float32, untie=True)
        yield Subject("merged", float_model(merged.model), None, merged.source.fingerprint)
        return
    base = Checkpoint.open(path).fingerprint
    served = _served(session, path, adapter, force)
    if adapter is None:
        yield Subject("quantized", float_model(served), None, base)
        return
    served.disable_adapters()
    yield Subject("quantized", float_model(served), None, base)
    served.enable_adapters()
    # Its tensors too: an adapter that was trained on keeps its name.
    digest = hashlib.sha256((AdapterShelf.of(path).find(adapter) / WEIGHTS_NAME).read_bytes()).hexdigest()
    yield Subject("adapter", float_model(served), None, f"{base}+{digest}")


def _check_measured(path: Path, adapter: str | None, force: bool) -> None:
    """Refuse what is not there or does not fit, which is cheap, before anything is measured."""
    if is_merged(path):
        if adapter is not None:
            raise UsageError(f"{path} is a merged export and takes no adapter; leave --adapter out.")
        return
    checkpoint = Checkpoint.open(path)
    if adapter is not None:
        read_bound_adapter(AdapterShelf.of(path).find(adapter), checkpoint, force=force)


def _served(session: Session, path: Path, adapter: str | None, force: bool) -> Any:
    """Return the packed model with its adapter, noting an adapter that was taken by force."""
    if adapter is not None and force:
        read = read_adapter(AdapterShelf.of(path).find(adapter))
        note = forced_note(adapter, read.base_fingerprint, Checkpoint.open(path))
        session.notes += [note] if note else []
    return load(path, adapter, dtype=torch.float32, force=force)


def _adapter_of(session: Session, path: Path) -> str | None:
    """Return the adapter to measure: the recipe's own if it is there, else the only one."""
    shelf = AdapterShelf.of(path)
    session.notes.extend(shelf.notes)
    if session.recipe.adapter_name in shelf.folders:
        return session.recipe.adapter_name
    return shelf.names[0] if len(shelf.folders) == 1 else None


def _checkpoint_tokenizer(path: Path) -> Any:
    return read_tokenizer(checkpoint_folder(path))


def _adapter_files(directory: RunDirectory) -> dict[str, str]:
    return {f"adapter {name}": str(folder) for name, folder in directory.adapters.folders.items()}


def _counted(values: Iterable[int]) -> dict[str, int]:
    """Return how many layers have each value, as JSON holds it."""
    return {str(value): count for value, count in sorted(collections.Counter(values).items())}


def _summary(
    session: Session,
    directory: RunDirectory,
    perplexity: dict[str, Any] | None,
    certificates: list[LayerCertificate] | None = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    recipe = session.recipe
    certificates = directory.certificates() if certificates is None else certificates
    worst = max(certificates, key=lambda c: c.error_adapted if math.isfinite(c.error_adapted) else math.inf)
    warnings = [f"{c.module}: {note}" for c in certificates for note in c.notes]
    shown = warnings[:_SHOWN_WARNINGS]
    if len(warnings) > len(shown):
        shown.append(f"and {len(warnings) - len(shown)} more, in {directory.path / 'reports' / 'layers.json'}")
    adapter = adapter or (recipe.adapter_name if recipe.adapter_name in directory.adapters.folders else None)
    stored: dict[str, Any] = {}
    if directory.checkpoint_path.exists():
        sizes = stored_sizes(directory.path, adapter)
        stored = {
            "bits_per_weight_base": sizes.bits_per_weight,
            "bits_per_weight_with_adapter": sizes.bits_per_weight_with_adapter,
            "checkpoint_bytes": sizes.checkpoint_bytes,
            "adapter_bytes": sizes.adapter_bytes,
            "float_bytes": sizes.float_bytes,
        }
    files = {"run": str(directory.path), "recipe": str(directory.path / "run.json")}
    if directory.checkpoint_path.exists():
        files["checkpoint"] = str(directory.checkpoint_path)
    files |= _adapter_files(directory)
    quoted = json.dumps(str(directory.path), ensure_ascii=False)
    load_line = f"cloq_export.load({quoted}" + (f', adapter="{adapter}")' if adapter else ")")
    return {
        "run": str(directory.path),
        "model": recipe.model,
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "rank": recipe.rank,
        "preset": recipe.preset_name,
        "perplexity": perplexity,
        "seconds": session.seconds,
        "peak_memory_bytes": session.memory.peak if session.memory else None,
        "memory_beyond_model_bytes": session.memory.beyond_start if session.memory else None,
        "stored": stored,
        "layers": {
            "count": len(certificates),
            "worst_error_adapted": worst.error_adapted,
            "worst_module": worst.module,
            **{name: _counted(getattr(c, name) for c in certificates) for name in ("bits", "group_size", "rank")},
            "warnings": shown,
        },
        "files": files,
        "next": [
            command_line("cloq", "inspect", directory.path),
            command_line("cloq", "eval", directory.path, "--windows", 64),
            command_line("python", "-c", f"import cloq_export; model = {load_line}"),
        ],
        "notes": session.notes,
    }
