"""The only place where stages meet: one function per verb of the command line."""

from cloq_export.verbs.exporting import ExportOptions, convert, export, push
from cloq_export.verbs.verbs import adapt, adapt_checkpoint, evaluate, inspect, quantize, run
from cloq_export.verbs.verification.options import VerifyOptions
from cloq_export.verbs.verify import planned_gates, verify

__all__ = [
    "ExportOptions",
    "VerifyOptions",
    "adapt",
    "adapt_checkpoint",
    "convert",
    "evaluate",
    "export",
    "inspect",
    "planned_gates",
    "push",
    "quantize",
    "run",
    "verify",
]
