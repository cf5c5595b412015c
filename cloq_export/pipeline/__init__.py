"""The only place where stages meet: one function per verb of the command line."""

from cloq_export.pipeline.exporting import ExportOptions, convert, export, push
from cloq_export.pipeline.verbs import adapt, adapt_checkpoint, evaluate, inspect, quantize, run

__all__ = [
    "ExportOptions",
    "adapt",
    "adapt_checkpoint",
    "convert",
    "evaluate",
    "export",
    "inspect",
    "push",
    "quantize",
    "run",
]
