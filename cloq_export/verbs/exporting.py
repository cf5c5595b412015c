"""Deployable folders: an export of a run, a conversion of any checkpoint, an adapter of its own, an upload.

Every folder is complete or absent, is read back and compared before it gets its name, and carries a certificate and a
model card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from cloq_export import __version__
from cloq_export.artifact.adapters import ADAPTERS_NAME, AdapterShelf, forced_note, read_bound_adapter
from cloq_export.artifact.certificate import Certificate, certify_checkpoint, verify_certificate, write_certificate
from cloq_export.artifact.checkpoint import Checkpoint
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, export_checkpoint
from cloq_export.artifact.empty_model import float_part, tied_head
from cloq_export.artifact.hub import is_left_out
from cloq_export.artifact.hub import push as upload
from cloq_export.artifact.merged import MergedReport, export_merged
from cloq_export.artifact.model_card import base_license, write_model_card
from cloq_export.artifact.provenance import (
    ADAPTER_KEY,
    LARGEST_PRODUCT_ERROR,
    AdapterRecord,
    BaseRecord,
    read_base_record,
    write_base_record,
)
from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.compress.session import Session, open_planned, refuse_other_source, refuse_unfinished
from cloq_export.errors import FormatError, RunDirectoryError, UnsupportedModelError, UsageError
from cloq_export.files.spelled_paths import command_line
from cloq_export.formats.layout import Layout
from cloq_export.formats.onnx.blocks import STYLES, TWO_BIT, Style, TwoBit
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.peft import Adapter, read_adapter, write_adapter
from cloq_export.formats.peft.pairs import balanced, padded, product_difference, uniform
from cloq_export.formats.registry import LAYOUTS
from cloq_export.formats.targets.preflight import Decision, preflight
from cloq_export.formats.targets.snippets import load_snippets
from cloq_export.formats.targets.table import Exported, parse_target, read_table
from cloq_export.models.saving import save_source_files
from cloq_export.models.source import LoadedModel, ModelSource
from cloq_export.recipe import EXPORT_FORMATS, Recipe
from cloq_export.types import LoraPair
from cloq_export.verbs.recording import export_record, read_adapter_record, run_record

MERGED, PEFT, ONNX, ONNX_ADAPTER = "merged", "peft", "onnx", "onnx-adapter"
ALONE = (PEFT, ONNX_ADAPTER)
MERGED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SPLITS = ("stored", "balanced")
# An export does not know where it will lie.
_PLACEHOLDER = "PATH/TO/EXPORT"
# What a run was made from, as far as its exports have to say it.
SOURCE_REPORT = "source"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export is asked to be.

    Args:
        format: a layout of `LAYOUTS`, "merged" (plain 16-bit weights with one adapter in them), "onnx" (a decoder graph
            with its adapters), "peft" or "onnx-adapter" (adapters alone); None takes the target's best, or the layout
            of the source.
        target: the engine that will read it, e.g. "vllm==0.33"; None checks nothing.
        device: where the target runs: "any", "cpu" or "cuda".
        out: the folder to make; None lies in the run.
        adapters: names in the source, or adapter folders; none takes all that the source has (for "merged" the
            recipe's own).
        split: "stored", or "balanced" for engines that compute in float16.
        pad_rank: rank that every pair is padded to; None pads none.
        dtype: of a merged export: "bfloat16" or "float16".
        style: of an ONNX graph: "matmulnbits" (if None) or "qdq".
        two_bit: of 2-bit codes in an ONNX graph: "exact" (if None) or "compact".
        opset: of an ONNX graph; None takes the least that fits.
        force: take adapters that are bound to another base, and note it in the export.
    """

    format: str | None = None
    target: str | None = None
    device: str = "any"
    out: Path | None = None
    adapters: tuple[str, ...] = ()
    split: str = "stored"
    pad_rank: int | None = None
    dtype: str = "bfloat16"
    style: str | None = None
    two_bit: str | None = None
    opset: int | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """An adapter as it goes into an export.

    Args:
        name: of the folder that it gets.
        pairs: module -> pair, split and padded as asked.
        record: what was done to it, for the side file and the certificate.
        provenance: what it was when it was made; None if nothing recorded that.
    """

    name: str
    pairs: Mapping[str, LoraPair]
    record: Mapping[str, Any]
    provenance: AdapterRecord | None

    @property
    def extra(self) -> dict[str, Any]:
        """Return what its side file says beside the base."""
        return {**self.record, **({ADAPTER_KEY: self.provenance.to_json()} if self.provenance else {})}


def write_run_checkpoint(session: Session, directory: RunDirectory, loaded: LoadedModel) -> None:
    """Write RUN/checkpoint in the layout of the recipe, read it back, and certify it.

    Args:
        session: of the call.
        directory: the run, all layers finished.
        loaded: its float model.

    Raises:
        CloqError: a layer does not fit the layout, the disk is full, or what was read back differs.
    """
    layers = LayerSource.of_run(directory)
    floats = FloatPart.of_model(
        loaded.model, layers, dtype=loaded.source.dtype, save_files=lambda folder: save_source_files(loaded, folder)
    )

    def write() -> None:
        export_checkpoint(
            directory.checkpoint_path,
            layers,
            floats,
            layout=LAYOUTS[session.recipe.format],
            max_shard_bytes=session.recipe.max_shard_bytes,
            finish=lambda folder, fingerprint: certify_checkpoint(folder, layers, floats, base_fingerprint=fingerprint),
        )

    session.timed("write", write)


def export(run_path: Path, options: ExportOptions, *, console: Console | None = None) -> dict[str, Any]:
    """Write a deployable folder from a run: a checkpoint with its adapters, merged weights, or adapters alone.

    The float original is not needed: what is not quantized is taken from the run's own checkpoint, one tensor in
    memory at a time.

    Args:
        run_path: a run whose layers are all quantized.
        options: what is asked.
        console: where progress goes; None is standard error.

    Returns:
        dict: "format", "target", "files", "certificate", "adapters", "notes", "seconds", "next".

    Raises:
        UsageError: options that contradict each other, or a target that cannot read this, with what works.
        BindingError: an adapter belongs to another base.
        CloqError: anything else that a user can mend.
    """
    directory = RunDirectory.open(run_path)
    recipe = Recipe.from_mapping(directory.recipe)
    session = Session(recipe, console or Console(stderr=True))
    with directory:
        checkpoint = _own_checkpoint(session, directory)
        layers = LayerSource.of_run(directory)
        names = _asked_adapters(session, directory.adapters, options)
        if options.format == MERGED and not options.adapters and recipe.adapter_name in names:
            names = [recipe.adapter_name]
        facts = _run_facts(directory, recipe)
        made = _noted(session, lambda: run_record(directory))
        return _export(session, run_path, checkpoint, layers, names, options, facts, made)


def convert(
    source: Path, options: ExportOptions, *, read_as: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Turn a quantized checkpoint in any layout that is read into another, losslessly or not at all.

    Args:
        source: a checkpoint folder, of ours or of another tool, or an export.
        options: what is asked; `out` is needed.
        read_as: layout to read it as, where its label is wrong.
        console: where progress goes.

    Returns:
        dict: as from `export`.

    Raises:
        UsageError: no folder to write to, or a target that cannot read this.
        FormatError: the checkpoint cannot be read, or the layout cannot hold it.
    """
    session = Session(Recipe(), console or Console(stderr=True))
    if options.out is None:
        raise UsageError("no folder was given; say where the checkpoint is written with --out FOLDER.")
    if options.out.resolve() == source.resolve():
        raise UsageError(f"{source} cannot be converted in place; choose another folder with --out.")
    checkpoint = Checkpoint.open(source, read_as=read_as)
    if read_as is not None:
        session.notes.append(f"read as {read_as}, whatever its config says")
    session.notes.extend(checkpoint.notes)
    layers = LayerSource.of_checkpoint(checkpoint)
    names = _asked_adapters(session, AdapterShelf.of(source), options)
    facts = {"base_model": _named_base(checkpoint), "method": "codes of another checkpoint, unchanged"}
    made = _noted(session, lambda: read_base_record(checkpoint.folder))
    return _export(session, source, checkpoint, layers, names, options, facts, made)


def push(
    folder: Path, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Upload an export to the model hub, after repeating its certificate on the files as they lie here.

    Args:
        folder: an export with a certificate.
        repo_id: `owner/name`.
        private: make a new repository private.
        token: of the hub; None takes the one that the machine is logged in with.
        revision: branch; None is the main one.

    Returns:
        dict: what was uploaded, and where.

    Raises:
        CloqError: the certificate does not hold, or the hub refuses.
    """
    return upload(folder, repo_id, private=private, token=token, revision=revision, verify=_refuse_uncertified)


def _refuse_uncertified(folder: Path) -> None:
    verify_certificate(folder, left_out=is_left_out)


def _noted(session: Session, read: Callable[[], BaseRecord | None]) -> BaseRecord | None:
    """Return what was recorded of a base; a record that cannot be read is noted, and is none."""
    try:
        return read()
    except FormatError as error:
        session.notes.append(f"the provenance of the codes is not carried: {error}")
        return None


def _own_checkpoint(session: Session, directory: RunDirectory) -> Checkpoint:
    """Return the run's own checkpoint, written anew from the float original if it is missing or not of these layers."""
    layers = LayerSource.of_run(directory)
    if not layers.specs:
        raise RunDirectoryError(
            f"{directory.path} has no finished layer; finish it with: cloq run {session.recipe.model} --out "
            f"{directory.path}"
        )
    if directory.checkpoint_path.is_dir():
        checkpoint = Checkpoint.open(directory.checkpoint_path)
        computed = directory.base_fingerprint()
        if checkpoint.grids.base_fingerprint == computed:
            return checkpoint
        session.notes.append("the run's own checkpoint was of other layers, so it was written anew")
    loaded, plan = open_planned(session, session.recipe)
    refuse_other_source(loaded, directory)
    refuse_unfinished(directory, plan)
    write_run_checkpoint(session, directory, loaded)
    return Checkpoint.open(directory.checkpoint_path)


def _export(
    session: Session,
    source: Path,
    checkpoint: Checkpoint,
    layers: LayerSource,
    adapter_names: Sequence[str],
    options: ExportOptions,
    facts: Mapping[str, Any],
    made: BaseRecord | None,
) -> dict[str, Any]:
    """Write one export of any format; what `export` and `convert` share."""
    _check_options(options, adapter_names)
    if options.format == ONNX and isinstance(checkpoint.config.get("text_config"), Mapping):
        raise UnsupportedModelError(
            f"{checkpoint.folder} is a wrapper of the type {checkpoint.config.get('model_type')}, and an ONNX export "
            "is a decoder of text, without the wrapper's other parts; choose another format, e.g. --format gptq_v2."
        )
    fingerprint = checkpoint.fingerprint
    adapters = [_prepared(session, source, name, checkpoint, options) for name in adapter_names]
    _refuse_strangers(adapters, layers, checkpoint)
    format, decision = _choose(session, layers, checkpoint, adapters, options)
    if decision is not None:
        adapters = [_fit_for(session, adapter, decision, options) for adapter in adapters]
    out = options.out or source / "exports" / format
    carried = None
    if format not in (*ALONE, MERGED):
        carried = export_record(session, made, layers, {adapter.name: adapter.provenance for adapter in adapters})
    card = {
        **facts,
        "layout": format,
        "base_fingerprint": fingerprint,
        "adapters": [{"name": adapter.name, **adapter.record} for adapter in adapters],
        "engines": _engines(format, layers, adapters),
        "notes": list(session.notes),
    }
    if format in ALONE:
        if format == ONNX_ADAPTER:
            _require_fit(adapters, layers)
        _write_adapters(session, out, adapters, card, fingerprint)
    elif format == ONNX:
        _require_fit(adapters, layers)
        _write_onnx(session, out, checkpoint, layers, adapters, options, card, fingerprint, carried)
    elif format == MERGED:
        _write_merged(session, out, checkpoint, layers, adapters, options, card, fingerprint)
    else:
        _write_quantized(session, out, checkpoint, layers, LAYOUTS[format], adapters, card, fingerprint, carried)
    return {
        "format": format,
        "target": options.target,
        "devices": None if decision is None else decision.devices,
        "max_lora_rank": None if decision is None else decision.max_lora_rank,
        "base_fingerprint": fingerprint,
        "adapters": [{"name": adapter.name, **adapter.record} for adapter in adapters],
        "files": {"export": str(out)},
        "seconds": session.seconds,
        "notes": session.notes,
        "next": [
            command_line("cloq", "inspect", out, "--verify"),
            *([f"{command_line('cloq', 'verify', out)} --reference MODEL --runtime onnx"] if format == ONNX else []),
            command_line("cloq", "push", out, "OWNER/NAME"),
        ],
    }


def _check_options(options: ExportOptions, adapter_names: Sequence[str]) -> None:
    if options.format is not None and options.format not in EXPORT_FORMATS:
        raise UsageError(f"the format {options.format!r} is unknown; allowed are {', '.join(EXPORT_FORMATS)}.")
    if options.dtype not in MERGED_DTYPES:
        raise UsageError(
            f"a merged export is {' or '.join(MERGED_DTYPES)}, not {options.dtype!r}; choose with --dtype."
        )
    if options.split not in SPLITS:
        raise UsageError(f"the split is {' or '.join(SPLITS)}, not {options.split!r}; choose with --split.")
    if options.format == MERGED and len(adapter_names) > 1:
        raise UsageError(
            f"a merged export holds one adapter, and there are {len(adapter_names)}: {', '.join(adapter_names)}; "
            "choose one with --adapter."
        )
    given = {"--style": options.style, "--two-bit": options.two_bit, "--opset": options.opset}
    typed = [flag for flag, value in given.items() if value is not None]
    if typed and options.format != ONNX:
        raise UsageError(f"{typed[0]} is about ONNX graphs; give it with --format onnx, or leave it out.")
    for flag, value, allowed in (("--style", options.style, STYLES), ("--two-bit", options.two_bit, TWO_BIT)):
        if value is not None and value not in allowed:
            raise UsageError(f"{flag} is {value!r}; allowed are {' and '.join(allowed)}.")
    if options.format in (ONNX, ONNX_ADAPTER):
        require_packages()
    if options.format in ALONE and not adapter_names:
        raise UsageError("there is no adapter to export; make one with `cloq adapt`, or name a folder with --adapter.")


def _choose(
    session: Session,
    layers: LayerSource,
    checkpoint: Checkpoint,
    adapters: Sequence[_Prepared],
    options: ExportOptions,
) -> tuple[str, Decision | None]:
    """Return the format, and what the target's rules say about it."""
    if options.target is None:
        return options.format or checkpoint.grids.layout.name, None
    ranks = [pair.rank for adapter in adapters for pair in adapter.pairs.values()]
    decision = preflight(
        parse_target(options.target),
        # Whoever exports has this package, and the notes say where else it is needed.
        Exported(layers.specs, layers.shapes, ranks, plugin=True),
        layout=None if options.format in ALONE else options.format,
        device=options.device,
    )
    session.notes.extend(decision.notes)
    return (options.format if options.format in ALONE else decision.layout), decision


def _prepared(session: Session, source: Path, name: str, checkpoint: Checkpoint, options: ExportOptions) -> _Prepared:
    """Return an adapter, bound to this base or taken by force, split and padded as asked."""
    folder = AdapterShelf.of(source).find(name)
    read = read_bound_adapter(folder, checkpoint, force=options.force)
    record: dict[str, Any] = {}
    forced = forced_note(folder.name, read.base_fingerprint, checkpoint)
    if forced is not None:
        record["forced"] = True
        record["bound_to"] = read.base_fingerprint
        session.notes.append(forced)
    pairs = dict(read.pairs)
    if options.split == "balanced":
        even = {module: balanced(pair) for module, pair in pairs.items()}
        record["split"] = "balanced"
        lost = max(product_difference(even[module], pairs[module]) for module in pairs)
        record[LARGEST_PRODUCT_ERROR] = lost + read.extra.get(LARGEST_PRODUCT_ERROR, 0.0)
        pairs = even
    if options.pad_rank is not None:
        record["padded_to"] = options.pad_rank
        pairs = {module: padded(pair, options.pad_rank) for module, pair in pairs.items()}
    ranks = sorted({pair.rank for pair in pairs.values()})
    record["rank"] = ranks[0] if len(ranks) == 1 else ranks
    record["modules"] = len(pairs)
    provenance = read_adapter_record(session, folder.name, read.extra, folder)
    return _Prepared(folder.name, pairs, {**_kept_record(read), **record}, provenance)


def _refuse_strangers(adapters: Sequence[_Prepared], layers: LayerSource, checkpoint: Checkpoint) -> None:
    """Refuse pairs for what the checkpoint has not: bound or forced, no reader could place them."""
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            weight = f"{module}.weight"
            shape: tuple[int, ...] | None = layers.shapes.get(module)
            if shape is None and weight in checkpoint.headers:
                shape = checkpoint.headers[weight][1]
            if shape is None and (source := tied_head(checkpoint).get(weight)) is not None:
                shape = checkpoint.headers[source][1]
            fits = (pair.lora_B.shape[0], pair.lora_A.shape[1])
            if shape is None or tuple(shape) != fits:
                seen = "does not hold" if shape is None else f"holds as {tuple(shape)}, not as {fits}"
                raise FormatError(
                    f"the adapter {adapter.name} adapts {module}, which {checkpoint.folder} {seen}; it belongs to "
                    "another model, or its keys were renamed."
                )


def _kept_record(read: Adapter) -> dict[str, Any]:
    """Return what an earlier export noted about an adapter; a force that was used once stays known."""
    kept = ("forced", "bound_to", "split", "padded_to", "uniform", LARGEST_PRODUCT_ERROR)
    return {key: value for key, value in read.extra.items() if key in kept}


def _fit_for(session: Session, adapter: _Prepared, decision: Decision, options: ExportOptions) -> _Prepared:
    """Return an adapter in a form that the target serves as meant."""
    mixed = len({(pair.rank, pair.alpha) for pair in adapter.pairs.values()}) > 1
    if not mixed or read_table().engines[decision.target.name].adapters.patterns:
        return adapter
    made = uniform(adapter.pairs)
    session.notes.append(
        f"{options.target} reads one rank and one alpha for an adapter, so {adapter.name} was brought to rank "
        f"{made.rank} by zeros" + (f"; B of {len(made.inexact)} modules was rounded" if made.inexact else "")
    )
    record = {**adapter.record, "rank": made.rank, "uniform": True}
    if made.inexact:
        lost = max(made.inexact.values())
        record[LARGEST_PRODUCT_ERROR] = lost + record.get(LARGEST_PRODUCT_ERROR, 0.0)
    return dataclasses.replace(adapter, pairs=made.pairs, record=record)


def _write_quantized(
    session: Session,
    out: Path,
    checkpoint: Checkpoint,
    layers: LayerSource,
    layout: Layout,
    adapters: Sequence[_Prepared],
    card: Mapping[str, Any],
    fingerprint: str,
    carried: BaseRecord | None,
) -> None:
    floats = float_part(checkpoint)

    def finish(folder: Path, written: str) -> None:
        _place_adapters(folder / ADAPTERS_NAME, adapters, card, written)
        if carried is not None:
            write_base_record(folder, carried)
        certificate = certify_checkpoint(
            folder, layers, floats, base_fingerprint=written, facts=_certificate_facts(adapters, carried)
        )
        _write_card(folder, {**card, "certificate": _certificate_row(certificate)}, checkpoint)

    def write() -> None:
        with session.progress(f"write {layout.name}") as progress:
            export_checkpoint(
                out,
                layers,
                floats,
                layout=layout,
                max_shard_bytes=session.recipe.max_shard_bytes,
                base_fingerprint=fingerprint,
                finish=finish,
                progress=progress,
            )

    session.timed("write and compare", write)


def _write_merged(
    session: Session,
    out: Path,
    checkpoint: Checkpoint,
    layers: LayerSource,
    adapters: Sequence[_Prepared],
    options: ExportOptions,
    card: Mapping[str, Any],
    fingerprint: str,
) -> None:
    floats = float_part(checkpoint)
    adapter = adapters[0] if adapters else None
    untied = []
    if adapter is not None and any(f"{module}.weight" not in floats.headers for module in adapter.pairs):
        floats = dataclasses.replace(floats, tied=tied_head(checkpoint))
        untied = [name for name in floats.tied if name.removesuffix(".weight") in adapter.pairs]
    session.notes += [f"{name} has a pair, so it is written apart from {floats.tied[name]}" for name in untied]

    def finish(folder: Path, report: MergedReport) -> None:
        certificate = write_certificate(folder, MERGED, fingerprint, report.modules, _certificate_facts(adapters))
        lost = report.rounding["merged"].max_norm
        notes = [
            *session.notes,
            f"Merging rounds each weight once more than serving codes and adapter apart does: at most {lost:.2e} of a "
            "weight matrix's norm here.",
        ]
        row = _certificate_row(certificate)
        _write_card(folder, {**card, "dtype": options.dtype, "notes": notes, "certificate": row}, checkpoint)

    def write() -> None:
        with session.progress("merge") as progress:
            export_merged(
                out,
                layers,
                floats,
                {} if adapter is None else adapter.pairs,
                dtype=MERGED_DTYPES[options.dtype],
                max_shard_bytes=session.recipe.max_shard_bytes,
                base_fingerprint=fingerprint,
                adapter=None if adapter is None else adapter.name,
                finish=finish,
                progress=progress,
            )

    session.timed("write and compare", write)


def _write_adapters(
    session: Session, out: Path, adapters: Sequence[_Prepared], card: Mapping[str, Any], fingerprint: str
) -> None:
    """Write adapters alone: one is the folder itself, several are folders in it."""
    layout = str(card["layout"])
    place = _place_adapter if layout == PEFT else _place_onnx_adapter

    def write() -> None:
        for adapter in adapters:
            folder = out if len(adapters) == 1 else out / adapter.name
            place(folder, adapter, card, fingerprint)
            certificate = write_certificate(folder, layout, fingerprint, {}, _certificate_facts([adapter]))
            library = "peft" if layout == PEFT else "onnxruntime"
            own = {**card, "relation": "adapter", "library_name": library, "certificate": _certificate_row(certificate)}
            write_model_card(folder, {**own, "adapters": [{"name": adapter.name, **adapter.record}]})

    session.timed("write and compare", write)


def _place_adapters(folder: Path, adapters: Sequence[_Prepared], card: Mapping[str, Any], fingerprint: str) -> None:
    for adapter in adapters:
        _place_adapter(folder / adapter.name, adapter, card, fingerprint)


def _place_adapter(folder: Path, adapter: _Prepared, card: Mapping[str, Any], fingerprint: str) -> None:
    """Write one adapter and compare what is read back."""
    write_adapter(
        folder,
        adapter.pairs,
        base_model=str(card["base_model"]),
        base_fingerprint=fingerprint,
        extra=adapter.extra,
    )
    read = read_adapter(folder).pairs
    for module, pair in adapter.pairs.items():
        same = module in read and read[module].alpha == pair.alpha
        if not (
            same and torch.equal(read[module].lora_A, pair.lora_A) and torch.equal(read[module].lora_B, pair.lora_B)
        ):
            raise FormatError(f"{folder}: {module} was read back with other numbers than were written; check the disk.")


def _write_onnx(
    session: Session,
    out: Path,
    checkpoint: Checkpoint,
    layers: LayerSource,
    adapters: Sequence[_Prepared],
    options: ExportOptions,
    card: Mapping[str, Any],
    fingerprint: str,
    carried: BaseRecord | None,
) -> None:
    from cloq_export.engines.onnx.export import OnnxReport, export_onnx

    def finish(folder: Path, report: OnnxReport) -> None:
        for adapter in adapters:
            _place_onnx_adapter(folder / ADAPTERS_NAME / adapter.name, adapter, card, fingerprint)
        if carried is not None:
            write_base_record(folder, carried)
        session.notes.append(
            f"opset {report.record.opset}, float graph of {report.record.exporter}, style {report.record.style}"
        )
        session.notes.extend(report.record.notes)
        facts = _certificate_facts(adapters, carried)
        certificate = write_certificate(folder, ONNX, fingerprint, report.modules, facts)
        row = _certificate_row(certificate)
        _write_card(folder, {**card, "notes": list(session.notes), "certificate": row}, checkpoint)

    def write() -> None:
        session.say("export the float graph; the exporter holds the float model in memory")
        with session.progress("write onnx") as progress:
            export_onnx(
                out,
                layers,
                float_part(checkpoint),
                style=cast(Style, options.style or STYLES[0]),
                two_bit=cast(TwoBit, options.two_bit or TWO_BIT[0]),
                opset=options.opset,
                base_fingerprint=fingerprint,
                finish=finish,
                progress=progress,
            )

    session.timed("write and compare", write)


def _require_fit(adapters: Sequence[_Prepared], layers: LayerSource) -> None:
    from cloq_export.formats.onnx.adapter import require_fit

    for adapter in adapters:
        require_fit(adapter.pairs, layers.shapes, f"the adapter {adapter.name}")


def _place_onnx_adapter(folder: Path, adapter: _Prepared, card: Mapping[str, Any], fingerprint: str) -> None:
    """Write one adapter as ONNX Runtime loads it, and compare what is read back."""
    from cloq_export.formats.onnx.adapter import read_onnx_adapter, same_pairs, write_onnx_adapter

    write_onnx_adapter(
        folder,
        adapter.pairs,
        base_model=str(card["base_model"]),
        base_fingerprint=fingerprint,
        extra=adapter.extra,
    )
    if not same_pairs(read_onnx_adapter(folder).pairs, adapter.pairs):
        raise FormatError(f"{folder} was read back with other numbers than were written; check the disk.")


def _certificate_facts(adapters: Sequence[_Prepared], carried: BaseRecord | None = None) -> dict[str, Any]:
    return {
        "provenance": carried is not None,
        "adapters": {adapter.name: dict(adapter.record) for adapter in adapters},
        "forced": [adapter.name for adapter in adapters if adapter.record.get("forced")],
    }


def _certificate_row(certificate: Certificate) -> dict[str, Any]:
    return {"file": "cloq_certificate.json", "modules": len(certificate.modules), "files": len(certificate.files)}


def _engines(format: str, layers: LayerSource, adapters: Sequence[_Prepared]) -> list[dict[str, str]]:
    """Return how each engine loads the export, ours first, as `model_card` takes it."""
    if format in ALONE:
        return []
    names = [adapter.name for adapter in adapters]
    ranks = [] if format == MERGED else [pair.rank for adapter in adapters for pair in adapter.pairs.values()]
    inside = f"{_PLACEHOLDER}/{ADAPTERS_NAME}/{names[0]}" if names else _PLACEHOLDER
    found: list[dict[str, str]] = []
    if format not in (MERGED, ONNX):
        served = f'cloq_export.load("{_PLACEHOLDER}"' + (f', adapter="{names[0]}")' if names else ")")
        found.append(
            {
                "engine": "cloq_export",
                "version": __version__,
                "snippet": f"import cloq_export\n\nmodel = {served}",
                "language": "python",
                "note": "checks that the adapter belongs to this base",
            }
        )
    exported = Exported(layers.specs, layers.shapes, ranks, plugin=True)
    for entry in load_snippets(format, exported, folder=_PLACEHOLDER, adapter=inside):
        needs = f"; needs {entry['needs']}" if entry["needs"] else ""
        kept = {key: entry[key] for key in ("engine", "version", "snippet", "language")}
        found.append({**kept, "note": f"on {entry['device']}{needs}"})
    return found


def _write_card(folder: Path, facts: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    specs = list(checkpoint.specs.values())
    main = checkpoint.grids.default
    write_model_card(
        folder,
        {
            "bits": sorted({spec.bits for spec in specs}),
            "group_size": main.group_size,
            "symmetric": main.symmetric,
            **base_license(checkpoint.folder),
            **facts,
        },
    )


def _run_facts(directory: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    """Return what the card may say of a run: how it was made, and what was measured of it."""
    facts: dict[str, Any] = {
        "base_model": public_name(recipe.model),
        "method": "codes of another checkpoint, unchanged, with a CLoQ adapter"
        if recipe.codes_from
        else f"{recipe.method} with a CLoQ adapter (preset {recipe.preset_name})",
        "rank": recipe.rank,
    }
    if SOURCE_REPORT in directory.reports():
        facts |= directory.read_report(SOURCE_REPORT).get("license") or {}
    if "evaluation" in directory.reports():
        facts["figures"] = list(_figures(directory.read_report("evaluation"), recipe))
    return facts


def _figures(report: Mapping[str, Any], recipe: Recipe) -> list[dict[str, Any]]:
    labels = {"float": "float model", "quantized": "codes alone", "adapter": "codes with adapter, before fine-tuning"}
    text = str(report.get("text"))
    if Path(text).is_absolute():
        text = public_name(recipe.eval_text)
    conditions = (
        f"{report.get('tokens')} tokens of {text} in windows of {recipe.eval_window}, "
        f"sha256 {str(report.get('text_sha256'))[:12]}"
    )
    return [
        {
            "name": "perplexity",
            "of": label,
            "value": report[key]["perplexity"],
            "standard_error": report[key].get("standard_error"),
            "conditions": conditions,
        }
        for key, label in labels.items()
        if isinstance(report.get(key), Mapping)
    ]


def license_of(source: ModelSource) -> dict[str, str]:
    """Return the licence of a float model, as `model_card` takes it; empty if the model does not say."""
    if source.kind == "gguf":
        return {"license": source.gguf_license} if source.gguf_license else {}
    return base_license(source.folder)


def public_name(name: str) -> str:
    """Return what an export may say of a model or a text: a hub id as it is, of a path only the last part."""
    if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")):
        return Path(name).name
    return name


def _asked_adapters(session: Session, shelf: AdapterShelf, options: ExportOptions) -> list[str]:
    """Return the adapters that are asked for, or all that lie there, noting what was left out."""
    if options.adapters:
        return list(options.adapters)
    session.notes.extend(shelf.notes)
    return shelf.names


def _named_base(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("_name_or_path")
    return public_name(named) if isinstance(named, str) and named else checkpoint.folder.resolve().name
