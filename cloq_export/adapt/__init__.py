"""From a weight, its quantized form and its input statistics to a LoRA pair."""

from cloq_export.adapt.cloq import CloqOptions, CloqResult, init_cloq
from cloq_export.adapt.root import GramRoot, cholesky_root, eigen_root
from cloq_export.adapt.stored import stored_pair
from cloq_export.adapt.svd import init_svd

__all__ = [
    "CloqOptions",
    "CloqResult",
    "GramRoot",
    "cholesky_root",
    "eigen_root",
    "init_cloq",
    "init_svd",
    "stored_pair",
]
