"""From a solved block to a better one: what its layers hold is trained together on what the block puts out."""

from cloq_export.refine.clipped_layer import ClippedLayer
from cloq_export.refine.trained_layer import TrainedLayer
from cloq_export.refine.training import (
    Refinement,
    TrainableLayer,
    held_out_error,
    relative_error,
    squared_error,
    train_layers,
)

__all__ = [
    "ClippedLayer",
    "Refinement",
    "TrainableLayer",
    "TrainedLayer",
    "held_out_error",
    "relative_error",
    "squared_error",
    "train_layers",
]
