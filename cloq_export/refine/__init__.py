"""From solved layers to better ones: their numbers are trained together on the output of the block or the model."""

from cloq_export.refine.trained_layer import BLOCK_RATES, MODEL_RATES, Rates, TrainedLayer
from cloq_export.refine.training import (
    JUDGEMENTS,
    Objective,
    OutputObjective,
    Record,
    Refinement,
    Schedule,
    Standing,
    TrainableLayer,
    divergence,
    gradients_by,
    held_out_batches,
    held_out_error,
    relative_error,
    squared_error,
    train_layers,
    zeros_for_none,
)

__all__ = [
    "BLOCK_RATES",
    "JUDGEMENTS",
    "MODEL_RATES",
    "Objective",
    "OutputObjective",
    "Rates",
    "Record",
    "Refinement",
    "Schedule",
    "Standing",
    "TrainableLayer",
    "TrainedLayer",
    "divergence",
    "gradients_by",
    "held_out_batches",
    "held_out_error",
    "relative_error",
    "squared_error",
    "train_layers",
    "zeros_for_none",
]
