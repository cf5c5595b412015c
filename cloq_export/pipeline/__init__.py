"""The only place where stages meet: one function per verb of the command line."""

from cloq_export.pipeline.verbs import adapt, evaluate, export, inspect, quantize, run

__all__ = ["adapt", "evaluate", "export", "inspect", "quantize", "run"]
