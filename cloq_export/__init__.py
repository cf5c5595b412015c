"""Turn a causal language model into a 2/3/4-bit checkpoint with CLoQ adapters, and measure what is served.

Names are imported when they are first used, so that `import cloq_export` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloq_export.engines.transformers.loading import dequantized_model, load
    from cloq_export.errors import CloqError
    from cloq_export.integrations import register
    from cloq_export.recipe import PRESETS, Recipe, load_recipe
    from cloq_export.types import LayerCertificate, LayerStats, LoraPair, Perplexity, QuantizedLayer, QuantSpec

__version__ = "0.1.0"

_HOMES = {
    "CloqError": "cloq_export.errors",
    "LayerCertificate": "cloq_export.types",
    "LayerStats": "cloq_export.types",
    "LoraPair": "cloq_export.types",
    "PRESETS": "cloq_export.recipe",
    "Perplexity": "cloq_export.types",
    "QuantSpec": "cloq_export.types",
    "QuantizedLayer": "cloq_export.types",
    "Recipe": "cloq_export.recipe",
    "dequantized_model": "cloq_export.engines.transformers.loading",
    "load": "cloq_export.engines.transformers.loading",
    "load_recipe": "cloq_export.recipe",
    "register": "cloq_export.integrations",
}

__all__ = [
    "PRESETS",
    "CloqError",
    "LayerCertificate",
    "LayerStats",
    "LoraPair",
    "Perplexity",
    "QuantSpec",
    "QuantizedLayer",
    "Recipe",
    "__version__",
    "dequantized_model",
    "load",
    "load_recipe",
    "register",
]


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module on first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'cloq_export' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
