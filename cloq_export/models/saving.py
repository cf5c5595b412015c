"""Write a model as the folder that other packages read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloq_export.files.atomic import write_json
from cloq_export.files.safe_json import read_json
from cloq_export.models.companions import copy_companions
from cloq_export.models.experts import fused_experts
from cloq_export.models.library_calls import quiet_transformers
from cloq_export.models.source import LoadedModel
from cloq_export.models.stated_quantization import without_quantization
from cloq_export.models.tied_head import corrected_entries


def save_plain(loaded: LoadedModel, folder: str | Path) -> None:
    """Write a model as the folder that other packages read: float weights, config, tokenizer.

    Args:
        loaded: the model.
        folder: where it goes.
    """
    model: Any = loaded.model
    # A dequantized model still calls itself quantized, which would make its folder unreadable as a float one.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    with quiet_transformers(), fused_experts(model):
        model.save_pretrained(folder)
    save_source_files(loaded, folder)


def save_source_files(loaded: LoadedModel, folder: str | Path) -> list[str]:
    """Write what a model folder needs besides its weights: config, tokenizer, processors, generation settings, licence.

    Files of a Hugging Face folder are copied byte for byte, except a config.json that says of head and embeddings what
    the weights are not; those of a GGUF file are made from its header.

    Args:
        loaded: the model.
        folder: an existing folder.

    Returns:
        list: names of the files written, sorted, with "/" before the name of a file in a folder.
    """
    folder = Path(folder)
    before = set(folder.rglob("*"))
    if loaded.source.kind == "folder":
        written = copy_companions(loaded.source.folder, loaded.source.companions, folder)
        raw = read_json(folder / "config.json")
        # The weights that are written are decoded, whatever the source stored.
        entries = {**without_quantization(raw), **corrected_entries(raw, loaded.config)}
        if entries != raw:
            write_json(folder / "config.json", entries)
        return written
    config = loaded.config.to_diff_dict()
    # Where this machine keeps the GGUF file does not belong into a model folder.
    for private in ("quantization_config", "_name_or_path"):
        config.pop(private, None)
    config["architectures"] = [type(loaded.model).__name__]
    config["dtype"] = str(loaded.source.dtype).removeprefix("torch.")
    with quiet_transformers():
        loaded.tokenizer.save_pretrained(folder)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
    write_json(folder / "config.json", config)
    made = (path for path in set(folder.rglob("*")) - before if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in made)
