"""Train an adapter of a run over its packed codes; the base that trains is the base that serves."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from torch import nn

from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.problem import ADAPTER_DTYPES
from cloq_export.compress.session import Session
from cloq_export.engines.transformers.loading import load
from cloq_export.errors import BindingError, RunDirectoryError, UsageError
from cloq_export.formats.peft import read_adapter
from cloq_export.models.context import context_length, require_known_tokens
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.process.host_memory import MemoryWatch, keep_freed_memory
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.texts.examples import ExampleSet
from cloq_export.texts.named_sets import load_examples
from cloq_export.train.data import TrainingData, read_training_data
from cloq_export.train.launched import Placement, first_process_first, held_by_first
from cloq_export.train.pairs import place_pairs, trained_pairs
from cloq_export.train.trainer import Training, train_adapter
from cloq_export.verbs.held_out import calibrated_tokens, notes_on_held_out
from cloq_export.verbs.recording import probe_model
from cloq_export.verbs.run_files import remove_finished
from cloq_export.verbs.training_result import TrainedRecord, TrainingResult, files_of_training, write_trained
from cloq_export.verbs.training_start import TrainingStart, keep_last_good

_CHECKPOINTS = "checkpoints"


def finetune(
    run_path: Path, recipe: FineTuneRecipe, *, examples: ExampleSet | None = None, console: Console | None = None
) -> TrainingResult:
    """Train an adapter of a run on examples, continuing what an earlier call has begun.

    Only A and B are trained, in float32; the codes stay packed, and the layers compute from them. The adapter with the
    least evaluation loss becomes `RUN/adapters/NAME`, bound to the run's base.

    Args:
        run_path: a run that holds its checkpoint.
        recipe: every option; data must be named.
        examples: taken instead of what data names.
        console: where progress goes; None is standard error.

    Returns:
        TrainingResult: losses before and after, where the files are, what to type next.

    Raises:
        UsageError: no data is named, an adapter of that name exists, an option does not fit the model, or an
            interrupted call had other options.
        DataError: the data cannot be read, or no sequence comes of it.
        BindingError: the codes of the base are not those of its fingerprint, or not those of an interrupted call.
        RunDirectoryError: the run has no checkpoint or no adapter to start from.
        DivergedError: the loss became NaN or Inf; the last good adapter is kept in the run's work folder.
    """
    if not recipe.data:
        raise UsageError("no examples were named; give a set, a file or a hub id with `data`.")
    directory = RunDirectory.open(run_path)
    run_recipe = directory.recipe
    work = directory.path / "work" / f"finetune-{recipe.name}"
    _refuse_taken_name(directory, run_recipe, recipe, work)
    session = Session(console or Console(stderr=True))
    with held_by_first(directory) as is_first:
        base = session.timed("read model", lambda: _checked_base(run_path, directory))
        source = session.timed("read data", lambda: examples or load_examples(recipe.data))
        tokenizer = read_tokenizer(checkpoint_folder(run_path))
        data = session.timed("read data", lambda: read_training_data(recipe, tokenizer, source, bos=run_recipe.bos))
        session.notes.extend(data.notes(recipe))
        calibrated = calibrated_tokens(directory, data.held_out, recipe.start or run_recipe.adapter_name)
        session.notes.extend(notes_on_held_out(directory, data, calibrated))
        with first_process_first():
            start = TrainingStart.begin_or_continue(directory, base, recipe, data, work / _CHECKPOINTS)
        placement = Placement.of(recipe)
        model = session.timed(
            "read model",
            lambda: load(run_path, start.adapter, device=placement.own_device, dtype=placement.dtype, trainable=True),
        )
        check_length(model, recipe)
        check_tokens(model, data)
        alphas = {name: pair.alpha for name, pair in read_adapter(start.adapter).pairs.items()}
        with keep_last_good(model, work / _CHECKPOINTS, alphas, recipe, start):
            training = run_training(session, model, data, recipe, work / _CHECKPOINTS, placement)
        pairs = trained_pairs(model, alphas, ADAPTER_DTYPES[run_recipe.adapter_dtype])
        if is_first:
            # As they are stored, so that the record describes what a reader of the files computes.
            place_pairs(model, pairs)
            record = TrainedRecord(source, probe_model(model, tokenizer), data.held_out, calibrated)
            write_trained(directory, start, recipe, pairs, training.curve, record)
            remove_finished(work)
    return TrainingResult(
        run=directory.path,
        recipe=recipe,
        start=recipe.start or run_recipe.adapter_name,
        data=data.data.origin,
        sequences=len(data.learned.rows),
        precision=placement.precision,
        training=training,
        seconds=session.seconds,
        memory=session.memory,
        files=files_of_training(directory, recipe.name),
        notes=session.notes,
    )


def run_training(
    session: Session,
    model: nn.Module,
    data: TrainingData,
    recipe: FineTuneRecipe,
    checkpoints: Path,
    placement: Placement,
) -> Training:
    """Train a model's adapter with a progress bar, and note time and memory.

    Args:
        session: notes, times and the console.
        model: A and B ask for gradients.
        data: what is learned.
        recipe: every option.
        checkpoints: folder for them.
        placement: where, and in which precision.

    Raises:
        DivergedError: as `train_adapter`.
    """
    learned = data.learned
    session.say(
        f"training on {len(learned.rows)} sequences ({learned.learned} learned of {learned.tokens} tokens) of "
        f"{data.data.origin}, in {placement.precision} on {placement.device}"
    )
    keep_freed_memory()
    watch = MemoryWatch()
    with session.progress("fine-tune") as progress:
        training: Training = session.timed(
            "train", lambda: train_adapter(model, data, recipe, checkpoints, placement, progress)
        )
    session.memory = watch.stop()
    if training.resumed_at:
        session.notes.append(f"continued from step {training.resumed_at}")
    return training


def check_length(model: nn.Module, recipe: FineTuneRecipe) -> None:
    """Refuse sequences that are longer than the model's context.

    Raises:
        UsageError: they are.
    """
    limit = context_length(model)
    if limit is not None and recipe.seqlen > limit:
        raise UsageError(
            f"a sequence has {recipe.seqlen} tokens, but this model reads at most {limit}; choose `seqlen={limit}` or "
            "less."
        )


def check_tokens(model: nn.Module, data: TrainingData) -> None:
    """Refuse sequences with tokens that the model has no embedding for.

    Raises:
        DataError: there is one.
    """
    for sequences in (data.learned, data.evaluated):
        for row in sequences.rows if sequences is not None else ():
            require_known_tokens(model, row["input_ids"], "the tokens to learn")


def _refuse_taken_name(directory: RunDirectory, run_recipe: Recipe, recipe: FineTuneRecipe, work: Path) -> None:
    if not directory.checkpoint_path.is_dir():
        raise RunDirectoryError(
            f"{directory.path} has no checkpoint yet; finish it with: cloq run {run_recipe.model} --out "
            f"{directory.path}"
        )
    if recipe.name == run_recipe.adapter_name and run_recipe.rank:
        raise UsageError(
            f"the adapter {recipe.name!r} was made together with the codes; give the trained one another `name`."
        )
    target = directory.adapter_path(recipe.name)
    if target.exists() and not work.exists():
        raise UsageError(f"{target} exists already; choose another `name`, or delete that folder first.")


def _checked_base(run_path: Path, directory: RunDirectory) -> Checkpoint:
    """Return the run's checkpoint if its codes are those that it was written with."""
    checkpoint = Checkpoint.open(run_path)
    computed = checkpoint.computed_fingerprint()
    if computed != checkpoint.fingerprint:
        raise BindingError(
            f"the codes of {directory.checkpoint_path} are {computed}, but it says {checkpoint.fingerprint}: the "
            "base was changed after it was written. Fetch it again, or make a new run."
        )
    return checkpoint
