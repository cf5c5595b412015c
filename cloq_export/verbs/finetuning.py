"""Fine-tune the adapter of a run over its packed codes; the base that trains is the base that serves."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cloq_export.adapt import stored_pair
from cloq_export.artifact.adapters import read_bound_adapter
from cloq_export.artifact.checkpoint import Checkpoint, checkpoint_folder
from cloq_export.artifact.pair_record import pair_digest, pairs_digest
from cloq_export.artifact.provenance import ProbeRecord, TrainingRecord
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session
from cloq_export.compress.solve import ADAPTER_DTYPES
from cloq_export.engines.transformers.loading import load
from cloq_export.errors import BindingError, DivergedError, RunDirectoryError, UsageError
from cloq_export.files.atomic import write_bytes, write_json
from cloq_export.files.safe_json import read_json
from cloq_export.files.spelled_paths import command_line
from cloq_export.formats.peft import read_adapter, write_adapter
from cloq_export.formats.peft.codec import WEIGHTS_NAME
from cloq_export.models.context import context_length
from cloq_export.models.precision import has_fast_bfloat16
from cloq_export.models.tokenizer_files import read_tokenizer
from cloq_export.parity.plots import line_plot, standalone
from cloq_export.parity.questions import TrainedOn
from cloq_export.process.host_memory import MemoryWatch, keep_freed_memory
from cloq_export.recipe import FineTuneRecipe, Recipe
from cloq_export.texts.examples import AnyExample, ChatExample, Example, ExampleSet
from cloq_export.texts.named_sets import load_examples
from cloq_export.train.sequences import SequenceCounts, Sequences, make_sequences
from cloq_export.train.trainer import DTYPES, Training, load_parameters, newest_checkpoint, step_of, train_adapter
from cloq_export.types import LoraPair
from cloq_export.verbs.recording import note_adapter, place_pairs, probe_model

# The start that is no adapter of a run: A as PEFT draws it, B zero (GPTQ-LoRA).
ZERO_START = "zero"
ZERO_RANK = 64

_RECORD = "finetune.json"
_START = "start"
_CHECKPOINTS = "checkpoints"
_LAST_GOOD = "last-good"


def finetune(
    run_path: Path, recipe: FineTuneRecipe, *, examples: ExampleSet | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Train an adapter of a run on examples, continuing what an earlier call has begun.

    Only A and B are trained, in float32; the codes stay packed, and the layers compute from them. The adapter with the
    least evaluation loss becomes `RUN/adapters/NAME`, bound to the run's base.

    Args:
        run_path: a run that holds its checkpoint.
        recipe: every option; data must be named.
        examples: taken instead of what data names.
        console: where progress goes; None is standard error.

    Returns:
        The summary: losses before and after, where the files are, what to type next.

    Raises:
        UsageError: no data is named, an adapter of that name exists, an option does not fit the model, or an
            interrupted call had other options.
        DataError: the data cannot be read, or no sequence comes of it.
        BindingError: the codes of the base are not those of its fingerprint, or not those of an interrupted call.
        RunDirectoryError: the run has no checkpoint or no adapter to start from.
        DivergedError: the loss became NaN or Inf; the last good adapter is kept in the run's work folder.
    """
    if not recipe.data:
        raise UsageError("no examples were named; give a set, a file or a hub id with --data.")
    session = Session(Recipe(), console or Console(stderr=True))
    directory = RunDirectory.open(run_path)
    if not directory.checkpoint_path.is_dir():
        raise RunDirectoryError(
            f"{run_path} has no checkpoint yet; finish it with: cloq run {directory.recipe['model']} --out {run_path}"
        )
    session.recipe = Recipe.from_mapping(directory.recipe)
    target = directory.adapter_path(recipe.name)
    work = directory.path / "work" / f"finetune-{recipe.name}"
    if recipe.name == session.recipe.adapter_name and session.recipe.rank:
        raise UsageError(
            f"the adapter {recipe.name!r} was made together with the codes; give the trained one another --name."
        )
    if target.exists() and not work.exists():
        raise UsageError(f"{target} exists already; choose another --name, or delete that folder first.")
    with _held(directory) as is_first:
        base = session.timed("read model", lambda: _checked_base(run_path, directory))
        data = session.timed("read data", lambda: _read_data(session, recipe, run_path, examples))
        with _first_process(is_first):
            start = _start_of(directory, base, recipe, work)
            record = _record(recipe, base.fingerprint, start, data)
            _begin_or_continue(work, record)
        device, dtype = training_device(recipe)
        model = session.timed(
            "read model", lambda: load(run_path, start, device=_own_device(device), dtype=dtype, trainable=True)
        )
        check_length(model, recipe)
        alphas = {name: pair.alpha for name, pair in read_adapter(start).pairs.items()}
        training = _train(session, model, data, recipe, work / _CHECKPOINTS, device, dtype, alphas, work, base)
        pairs = trained_pairs(model, alphas, ADAPTER_DTYPES[session.recipe.adapter_dtype])
        if is_first:
            # As they are stored: what the record says is then what every reader of the files must find.
            place_pairs(model, pairs)
            probe = probe_model(model, read_tokenizer(checkpoint_folder(run_path)))
            _write(session, directory, recipe, base, pairs, record, training, start, probe, data)
            finished = work.with_name(f".{work.name}.finished")
            shutil.rmtree(finished, ignore_errors=True)
            work.rename(finished)
            shutil.rmtree(finished, ignore_errors=True)
            with contextlib.suppress(OSError):  # another adapter may be in the making there
                work.parent.rmdir()
    return _summary(session, directory, recipe, training, data, dtype)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What is learned and what it is evaluated on, as sequences and as their origin.

    Args:
        learned: sequences to learn.
        evaluated: sequences to evaluate on, or None.
        origins: "data" and perhaps "eval_data": where from, and the hash.
        questions: what `TrainedOn` keeps of the prompts that are learned from.
    """

    learned: Sequences
    evaluated: Sequences | None
    origins: Mapping[str, Mapping[str, str]]
    questions: str = ""


@dataclasses.dataclass(frozen=True)
class _Base:
    """The checkpoint that is trained over."""

    checkpoint: Checkpoint
    fingerprint: str


def training_device(recipe: FineTuneRecipe) -> tuple[torch.device, torch.dtype]:
    """Return where a recipe trains and in which precision.

    Raises:
        UsageError: CUDA is asked for and there is none.
    """
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu.")
    device = torch.device(name)
    if recipe.precision != "auto":
        return device, DTYPES[recipe.precision]
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return device, torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def read_training_data(
    recipe: FineTuneRecipe, tokenizer: Any, examples: ExampleSet | None = None, *, bos: str
) -> TrainingData:
    """Read the examples that a recipe names, and hold some of them out where it names none to evaluate on.

    What is held out is a plain text's end, so that nothing learned overlaps it, or examples spread evenly over the
    others: many sets are sorted.

    Args:
        recipe: data, eval_data, eval_samples, seqlen and too_long.
        tokenizer: of the model.
        examples: taken instead of what data names.
        bos: what a sequence of plain text begins with, as in `make_sequences`.

    Raises:
        DataError: the data cannot be read, or no sequence comes of it.
    """
    found = examples or load_examples(recipe.data)
    origins = {"data": _origin(found)}
    learned: tuple[AnyExample, ...] = found.examples

    def sequences(examples: tuple[AnyExample, ...], origin: str) -> Sequences:
        return make_sequences(examples, tokenizer, recipe.seqlen, too_long=recipe.too_long, bos=bos, origin=origin)

    if not recipe.eval_samples:
        return TrainingData(sequences(learned, found.origin), None, origins)
    if recipe.eval_data:
        other = load_examples(recipe.eval_data)
        origins["eval_data"] = _origin(other)
        evaluated = _first(sequences(other.examples, other.origin), recipe.eval_samples)
        return TrainingData(sequences(learned, found.origin), evaluated, origins)
    if all(isinstance(example, Example) and example.prompt is None for example in learned):
        whole = sequences(learned, found.origin)
        # At least as much is learned as evaluated.
        held_out = min(recipe.eval_samples, len(whole.rows) // 2)
        if held_out == 0:
            return TrainingData(whole, None, origins)
        kept = dataclasses.replace(whole, rows=whole.rows[:-held_out])
        return TrainingData(kept, dataclasses.replace(whole, rows=whole.rows[-held_out:]), origins)
    held_out = min(recipe.eval_samples, len(learned) // 2)
    if held_out == 0:
        return TrainingData(sequences(learned, found.origin), None, origins)
    places = {number * len(learned) // held_out for number in range(held_out)}
    rest = tuple(example for place, example in enumerate(learned) if place not in places)
    chosen = tuple(learned[place] for place in sorted(places))
    return TrainingData(sequences(rest, found.origin), sequences(chosen, found.origin), origins)


def trained_pairs(model: nn.Module, alphas: Mapping[str, float], dtype: torch.dtype) -> dict[str, LoraPair]:
    """Return the pairs of a model that PEFT wrapped under the name "default".

    Args:
        model: with its adapter.
        alphas: full module name -> alpha.
        dtype: in which the pairs are stored, see `stored_pair`.

    Raises:
        NonFiniteError: an entry is NaN or Inf.
    """
    pairs = {}
    for name, alpha in alphas.items():
        layer: Any = model.get_submodule(name)
        lora_a, lora_b = (side["default"].weight.detach().to("cpu") for side in (layer.lora_A, layer.lora_B))
        pairs[name] = stored_pair(lora_a, lora_b, dtype, alpha=alpha)
    return pairs


def zero_pairs(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], seed: int) -> dict[str, LoraPair]:
    """Return pairs that change nothing yet: A uniform in `+-1/sqrt(in)` as PEFT draws it, B zero, scaling 1.

    Args:
        shapes: full module name -> (out, in).
        ranks: full module name -> rank.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, (out_features, in_features) in shapes.items():
        rank = min(ranks[name], out_features, in_features)
        # Kaiming's uniform distribution with a = sqrt(5).
        lora_a = (2 * torch.rand(rank, in_features, generator=generator) - 1) / math.sqrt(in_features)
        pairs[name] = LoraPair(lora_a, torch.zeros(out_features, rank), float(rank))
    return pairs


def curve_plot(curves: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the plot of training and evaluation losses over steps, a picture that stands alone.

    Args:
        curves: label -> a `TrainingCurve` as a mapping.
    """
    series: list[tuple[str, list[float], list[float]]] = []
    for label, curve in curves.items():
        front = f"{label}, " if label else ""
        for name, key in (("learned", "losses"), ("held out", "evaluations")):
            points = curve[key]
            if points:
                series.append(
                    (f"{front}{name}", [float(p["step"]) for p in points], [float(p["loss"]) for p in points])
                )
    return standalone(line_plot(series, x_label="step", y_label="loss, nats per token")).encode("utf-8")


@contextlib.contextmanager
def _held(directory: RunDirectory) -> Iterator[bool]:
    """Hold the run's lock in the first process of a launcher; give whether this is that process."""
    if int(os.environ.get("RANK", "0")) == 0:
        with directory:
            directory.lock()
            yield True
    else:
        yield False


@contextlib.contextmanager
def _first_process(is_first: bool) -> Iterator[None]:
    """Let the first process of a launcher prepare the files, and the others read them afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        yield


def _own_device(device: torch.device) -> torch.device:
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _checked_base(run_path: Path, directory: RunDirectory) -> _Base:
    """Return the run's checkpoint if its codes are those that it was written with."""
    checkpoint = Checkpoint.open(run_path)
    computed = checkpoint.computed_fingerprint()
    if computed != checkpoint.fingerprint:
        raise BindingError(
            f"the codes of {directory.checkpoint_path} are {computed}, but it says {checkpoint.fingerprint}: the "
            "base was changed after it was written. Fetch it again, or make a new run."
        )
    return _Base(checkpoint, computed)


def _read_data(session: Session, recipe: FineTuneRecipe, run_path: Path, examples: ExampleSet | None) -> TrainingData:
    found = examples or load_examples(recipe.data)
    data = read_training_data(recipe, read_tokenizer(checkpoint_folder(run_path)), found, bos=session.recipe.bos)
    data = dataclasses.replace(data, questions=TrainedOn.of(_prompts(found)))
    for what, sequences in (("examples to learn", data.learned), ("examples to evaluate on", data.evaluated)):
        if sequences is not None:
            session.notes.extend(_count_notes(what, sequences.counts, recipe))
    if recipe.eval_samples and data.evaluated is None:
        session.notes.append("too few examples to hold any out: nothing was evaluated, and the last adapter is kept")
    return data


def _prompts(found: ExampleSet) -> Iterator[str]:
    """Yield what the examples ask: prompts, and what users say in chats."""
    for example in found.examples:
        if isinstance(example, ChatExample):
            yield from (message.content for message in example.messages if message.role == "user")
        elif example.prompt is not None:
            yield example.prompt


def _count_notes(what: str, counts: SequenceCounts, recipe: FineTuneRecipe) -> Iterator[str]:
    if counts.truncated:
        yield f"{counts.truncated} of {counts.examples} {what} were cut to {recipe.seqlen} tokens"
    if counts.dropped:
        yield f"{counts.dropped} of {counts.examples} {what} were left out: too long for {recipe.seqlen} tokens"
    if counts.turns_left_out:
        yield (
            f"{counts.turns_left_out} answers of {what} are not learned: the chat template rewrites earlier turns, or "
            "does not ask for them"
        )
    if counts.straddled:
        yield (
            f"{counts.straddled} of {counts.examples} {what} have a token across the border of what is asked and what "
            "is learned (a blank at the end of the prompt, for example): both were tokenized apart there"
        )


def _origin(found: ExampleSet) -> dict[str, str]:
    return {"origin": found.origin, "sha256": found.sha256}


def _first(sequences: Sequences, count: int) -> Sequences:
    return dataclasses.replace(sequences, rows=sequences.rows[:count])


def _start_of(directory: RunDirectory, base: _Base, recipe: FineTuneRecipe, work: Path) -> Path:
    """Return the folder of the adapter to start from."""
    if recipe.start != ZERO_START:
        name = recipe.start or str(directory.recipe["adapter_name"])
        if not recipe.start and name not in directory.adapters.folders:
            raise RunDirectoryError(
                f"{directory.path} has no adapter {name!r} to start from; make one with `cloq adapt {directory.path}`, "
                f"or start from nothing with --start {ZERO_START}."
            )
        folder = directory.adapters.find(name)
        read_bound_adapter(folder, base.checkpoint, force=False)
        return folder
    folder = work / _START
    if not folder.exists():
        recipe_of_run = Recipe.from_mapping(directory.recipe)
        shapes = {name: directory.layer_file(name).shape for name in base.checkpoint.specs}
        ranks = {name: recipe_of_run.override_for(name).get("rank", recipe_of_run.rank) or ZERO_RANK for name in shapes}
        write_adapter(
            folder,
            zero_pairs(shapes, ranks, recipe.seed),
            base_model=recipe_of_run.model,
            base_fingerprint=base.fingerprint,
        )
    return folder


def _record(recipe: FineTuneRecipe, fingerprint: str, start: Path, data: TrainingData) -> dict[str, Any]:
    """Return what an interrupted call must agree on with the one that continues it."""
    return {
        "options": recipe.to_mapping(),
        "base_fingerprint": fingerprint,
        "start_sha256": hashlib.sha256((start / WEIGHTS_NAME).read_bytes()).hexdigest(),
        **data.origins,
    }


def _begin_or_continue(work: Path, record: Mapping[str, Any]) -> None:
    path = work / _RECORD
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        return
    begun = read_json(path)
    name = record["options"]["name"]
    newest = newest_checkpoint(work / _CHECKPOINTS)
    after = f"step {step_of(newest)}" if newest else "its start"
    if begun.get("base_fingerprint") != record["base_fingerprint"]:
        raise BindingError(
            f"the base has changed since {after} of {name!r} (now {record['base_fingerprint']}, then "
            f"{begun.get('base_fingerprint')}); restore the run's checkpoint, or delete {work} to begin anew."
        )
    options = begun.get("options")
    held = options if isinstance(options, Mapping) else {}
    faults = [
        f"{key}: {held.get(key)!r} then, {value!r} now"
        for key, value in record["options"].items()
        if held.get(key) != value
    ]
    faults += [
        f"{key} has other content than then" for key in ("data", "eval_data") if begun.get(key) != record.get(key)
    ]
    if begun.get("start_sha256") != record["start_sha256"]:
        faults.append("the adapter to start from has changed")
    if faults:
        raise UsageError(
            f"the adapter {name!r} was begun with other options and not finished ({'; '.join(faults)}); give the same "
            f"ones to finish it, choose another --name, or delete {work}."
        )


def check_length(model: nn.Module, recipe: FineTuneRecipe) -> None:
    """Refuse sequences that are longer than the model's context.

    Raises:
        UsageError: they are.
    """
    limit = context_length(model)
    if limit is not None and recipe.seqlen > limit:
        raise UsageError(
            f"a sequence has {recipe.seqlen} tokens, but this model reads at most {limit}; choose --seqlen {limit} or "
            "less."
        )


def _train(
    session: Session,
    model: nn.Module,
    data: TrainingData,
    recipe: FineTuneRecipe,
    checkpoints: Path,
    device: torch.device,
    dtype: torch.dtype,
    alphas: Mapping[str, float],
    work: Path,
    base: _Base,
) -> Training:
    learned = data.learned
    session.say(
        f"training on {len(learned.rows)} sequences ({learned.learned} learned of {learned.tokens} tokens) of "
        f"{data.origins['data']['origin']}, in {str(dtype).removeprefix('torch.')} on {device}"
    )
    try:
        return run_training(session, model, data, recipe, checkpoints, device, dtype)
    except DivergedError as error:
        newest = newest_checkpoint(checkpoints)
        if newest is None:
            kept = "there is no good checkpoint yet"
        else:
            load_parameters(model, newest)
            folder = work / _LAST_GOOD
            pairs = trained_pairs(model, alphas, torch.float32)
            write_adapter(folder, pairs, base_model=session.recipe.model, base_fingerprint=base.fingerprint)
            kept = f"the adapter of step {step_of(newest)} is kept in {folder}"
        raise DivergedError(
            f"{error} (learning rate {recipe.learning_rate:g}): the training diverged; {kept}. Begin anew under "
            "another --name with a lower --learning-rate."
        ) from None


def run_training(
    session: Session,
    model: nn.Module,
    data: TrainingData,
    recipe: FineTuneRecipe,
    checkpoints: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> Training:
    """Train a model's adapter with a progress bar, and book time and memory.

    Args:
        session: notes, times and the console.
        model: A and B ask for gradients.
        data: what is learned.
        recipe: every option.
        checkpoints: folder for them.
        device: where.
        dtype: of the activations.

    Raises:
        DivergedError: as `train_adapter`.
    """
    keep_freed_memory()
    watch = MemoryWatch()
    with session.progress("fine-tune") as progress:
        training: Training = session.timed(
            "train",
            lambda: train_adapter(
                model,
                data.learned,
                data.evaluated,
                recipe,
                checkpoints,
                device=device,
                dtype=dtype,
                progress=progress,
            ),
        )
    session.memory = watch.stop()
    if training.resumed_at:
        session.notes.append(f"continued from step {training.resumed_at}")
    return training


def _write(
    session: Session,
    directory: RunDirectory,
    recipe: FineTuneRecipe,
    base: _Base,
    pairs: Mapping[str, LoraPair],
    record: Mapping[str, Any],
    training: Training,
    start: Path,
    probe: ProbeRecord,
    data: TrainingData,
) -> None:
    curve = dataclasses.asdict(training.curve)
    trained = TrainingRecord(
        steps=curve["steps"],
        kept_step=curve["kept_step"],
        kept_loss=curve["kept_loss"],
        last_loss=curve["losses"][-1]["loss"] if curve["losses"] else None,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        data_sha256=record["data"]["sha256"],
        questions=data.questions,
        start=pairs_digest({module: pair_digest(pair) for module, pair in read_adapter(start).pairs.items()}),
    )
    write_adapter(
        directory.adapter_path(recipe.name),
        pairs,
        base_model=session.recipe.model,
        base_fingerprint=base.fingerprint,
        # No path: what an adapter says of itself may be published.
        extra={
            "finetuned": {
                "start_sha256": record["start_sha256"],
                "data_sha256": record["data"]["sha256"],
                "learning_rate": recipe.learning_rate,
                "steps": curve["steps"],
                "kept_step": curve["kept_step"],
                "kept_loss": curve["kept_loss"],
            },
            **note_adapter(
                recipe.name,
                pairs,
                base_fingerprint=base.fingerprint,
                probe=probe,
                training=trained,
            ),
        },
    )
    directory.write_report(report_name(recipe.name), {**record, **curve})
    write_bytes(plot_path(directory, recipe.name), curve_plot({"": curve}))


def report_name(adapter: str) -> str:
    """Return the name of the report of an adapter's training."""
    return f"finetune-{adapter}"


def plot_path(directory: RunDirectory, adapter: str) -> Path:
    """Return where the plot of an adapter's training stands."""
    return directory.path / "reports" / f"{report_name(adapter)}.svg"


def _summary(
    session: Session,
    directory: RunDirectory,
    recipe: FineTuneRecipe,
    training: Training,
    data: TrainingData,
    dtype: torch.dtype,
) -> dict[str, Any]:
    curve = training.curve
    before = curve.evaluations[0]["loss"] if curve.evaluations else None
    train_seconds = session.seconds.get("train", 0.0)
    return {
        "run": str(directory.path),
        "adapter": recipe.name,
        "start": recipe.start or session.recipe.adapter_name,
        "data": data.origins["data"]["origin"],
        "precision": str(dtype).removeprefix("torch."),
        "sequences": len(data.learned.rows),
        "steps": curve.steps,
        "kept_step": curve.kept_step,
        "loss": {
            "first": curve.losses[0]["loss"] if curve.losses else None,
            "last": curve.losses[-1]["loss"] if curve.losses else None,
            "held_out_before": before,
            "held_out_kept": curve.kept_loss,
        },
        "held_out_perplexity": {
            "before": _exponential(before),
            "kept": _exponential(curve.kept_loss),
        },
        "seconds": session.seconds,
        "seconds_per_step": train_seconds / max(1, curve.steps - training.resumed_at),
        "peak_memory_bytes": session.memory.peak if session.memory else None,
        "files": {
            "adapter": str(directory.adapter_path(recipe.name)),
            "report": str(directory.path / "reports" / f"{report_name(recipe.name)}.json"),
            "plot": str(plot_path(directory, recipe.name)),
        },
        "next": [
            command_line("cloq", "eval", directory.path, "--adapter", recipe.name),
            command_line("cloq", "export", directory.path, "--adapter", recipe.name),
        ],
        "notes": session.notes,
    }


def _exponential(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))
