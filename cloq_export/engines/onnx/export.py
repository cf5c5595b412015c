"""Write an ONNX export: a decoder graph that carries a base's integers, its adapters, and what else engines need."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cloq_export.artifact.certificate import certified_layer, refuse_difference
from cloq_export.artifact.checkpoint_writer import FloatPart, LayerSource, WriteSettings
from cloq_export.artifact.merged import MergedAdapter, MergedReport, export_merged
from cloq_export.artifact.quantization_description import CONFIG_NAME
from cloq_export.engines.onnx.float_graph import GENAI_CONFIG, FloatGraph, build_graph, trace_graph
from cloq_export.errors import FormatError, UnsupportedModelError
from cloq_export.files.atomic import translate_os_errors, write_folder, write_json
from cloq_export.files.fingerprint import combine_digests
from cloq_export.formats.onnx.graph import plan_blocks, quantize_graph
from cloq_export.formats.onnx.matching import GraphLayers, UnmatchedLinearError
from cloq_export.formats.onnx.packages import require_packages
from cloq_export.formats.onnx.reading import OnnxExport
from cloq_export.formats.onnx.record import RECORD_NAME, GraphOptions, GraphRecord, is_onnx_export

ACCURACY_OPTION = "session.qdq_matmulnbits_accuracy_level"
"""Session option of ONNX Runtime: how it computes a DequantizeLinear that it fuses with its MatMul."""

_SCRATCH = ".scratch"


@dataclasses.dataclass(frozen=True)
class OnnxReport:
    """An ONNX export as it was written and read back.

    Args:
        record: what lies in the graph.
        modules: module -> what was compared, for the certificate.
    """

    record: GraphRecord
    modules: Mapping[str, Mapping[str, Any]]


def export_onnx(
    folder: str | os.PathLike[str],
    layers: LayerSource,
    floats: FloatPart,
    options: GraphOptions,
    *,
    base_fingerprint: str,
    finish: Callable[[Path, OnnxReport], Any] | None = None,
) -> OnnxReport:
    """Write a decoder graph with the integers of a base, whole or not at all.

    The float graph is exported from the dequantized base, not from the original model: what surrounds the quantized
    linears is the same, each linear can be found by its weight, and no original is needed. That exporter holds the
    float model in memory and writes it to disk once; what follows takes one tensor at a time.

    Args:
        folder: the folder to make; an earlier ONNX export of ours there is replaced.
        layers: the quantized layers.
        floats: everything besides them.
        options: how the graph is written.
        base_fingerprint: of the layers; another one than theirs is refused.
        finish: called with the filled folder and the report before the folder gets its name.

    Returns:
        The report.

    Raises:
        MissingPackageError: a package of the extra `onnx` is not installed.
        ShapeError: a grid fits no legal block.
        UsageError: the opset lacks a type.
        UnsupportedModelError: no exporter knows the architecture.
        FormatError: what was read back differs from what was to be written.
        RunDirectoryError: the folder holds other files, the disk is full, or it cannot be written.
    """
    require_packages()
    graph_layers = GraphLayers(layers.specs, layers.shapes, layers.read)
    # Refuses what cannot be stored before anything is made.
    plan_blocks(graph_layers, style=options.style, two_bit=options.two_bit)
    with write_folder(folder, owned=is_onnx_export) as filling:
        scratch = filling / _SCRATCH
        scratch.mkdir()
        model = scratch / "model"
        settings: WriteSettings[MergedReport] = WriteSettings(base_fingerprint=base_fingerprint)
        export_merged(model, layers, floats, MergedAdapter(), dtype=torch.float32, settings=settings)

        def quantize(graph: FloatGraph) -> tuple[FloatGraph, GraphRecord]:
            record = quantize_graph(
                graph.path,
                filling,
                graph_layers,
                options,
                base_fingerprint=base_fingerprint,
                exporter=graph.exporter,
            )
            return graph, record

        try:
            graph, record = quantize(build_graph(model, scratch, {shape[0] for shape in layers.shapes.values()}))
        except (UnsupportedModelError, UnmatchedLinearError) as error:
            graph, record = quantize(trace_graph(model, scratch, str(error)))
        record = dataclasses.replace(record, notes=(*record.notes, *graph.notes), needs_adapter=layers.needs_adapter)
        with translate_os_errors(Path(folder)):
            floats.save_files(filling)
            # As the model folder has it: without what describes another layout.
            shutil.copyfile(model / CONFIG_NAME, filling / CONFIG_NAME)
            shutil.rmtree(scratch)
        write_json(filling / GENAI_CONFIG, _genai_config(graph.genai_config, record), sort_keys=False)
        write_json(filling / RECORD_NAME, record.to_json())
        report = OnnxReport(record, _compared(filling, layers, base_fingerprint))
        if finish is not None:
            finish(filling, report)
    return report


def _genai_config(config: Mapping[str, Any], record: GraphRecord) -> dict[str, Any]:
    """Return the builder's configuration, telling the session to compute a qdq graph as its record says."""
    if record.style != "qdq":
        return dict(config)
    decoder = dict(config["model"]["decoder"])
    level = max(module.blocks.accuracy_level for module in record.modules.values())
    decoder["session_options"] = {**decoder["session_options"], ACCURACY_OPTION: str(level)}
    return {**config, "model": {**config["model"], "decoder": decoder}}


def _compared(folder: Path, layers: LayerSource, base_fingerprint: str) -> dict[str, Any]:
    """Read every integer back out of the graph and compare it with the layer that it came from."""
    export = OnnxExport.open(folder)
    modules: dict[str, Any] = {}
    for module, layer in export.read_layers():
        refuse_difference(layer, layers.read(module), f"{folder}: {module}")
        modules[module] = certified_layer(layer)
    fingerprint = combine_digests({module: entry["sha256"] for module, entry in modules.items()})
    if set(modules) != set(layers.specs) or fingerprint != base_fingerprint:
        raise FormatError(
            f"{folder} was read back as the base {fingerprint}, and {base_fingerprint} was to be written; write it "
            "again."
        )
    return modules
