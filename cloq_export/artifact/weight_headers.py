"""Which files of a folder hold the weights, and the headers of their tensors."""

from __future__ import annotations

import re
from pathlib import Path

from cloq_export.artifact.quantization_description import QUANTIZE_CONFIG_NAME
from cloq_export.errors import FormatError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_paths import require_inside
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.files.shards import INDEX_NAME, WEIGHTS_NAME

_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]*\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors", re.ASCII)
# Safetensors files that hold no weights of their own: adapters, and Mistral's copy of the weights.
_NO_WEIGHTS = ("adapter_", "adapter.", "consolidated", "eora", "optimizer", "training_")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_headers(folder: Path) -> tuple[dict[str, TensorFile], dict[str, tuple[str, tuple[int, ...]]]]:
    """Return the file and the header of every tensor of a folder, quantized or not.

    Args:
        folder: the checkpoint folder.

    Returns:
        (tensor name -> its file, tensor name -> (dtype code of safetensors, shape)).

    Raises:
        FormatError: a file is missing or damaged, lies elsewhere, or the files do not belong together.
    """
    index = _index_name(folder)
    weight_map = None if index is None else _read_index(folder, index)
    names = _weight_names(folder) if weight_map is None else sorted(set(weight_map.values()))
    files: dict[str, TensorFile] = {}
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        if not (folder / name).is_file():
            _explain_missing(folder, name, index=index)
    for name in names:
        path = require_inside(folder, folder / name)
        file = TensorFile(path)
        for tensor, header in file.headers.items():
            if tensor in files:
                raise FormatError(
                    f"{path} and {files[tensor].path} both hold {tensor}; the folder mixes two checkpoints."
                )
            if weight_map is not None and weight_map.get(tensor) != name:
                raise FormatError(
                    f"{path} holds {tensor}, but {index} says {weight_map.get(tensor)!r:.80}; the folder mixes "
                    "two checkpoints: write or fetch it again."
                )
            files[tensor], headers[tensor] = file, header
    for tensor in weight_map or {}:
        if tensor not in files:
            raise FormatError(
                f"{folder / str(index)} promises {tensor!r:.80}, which no file holds; fetch or write it again."
            )
    return files, headers


def _index_name(folder: Path) -> str | None:
    """Return the index of a folder's weight files: of the usual name, or the only other one."""
    if (folder / INDEX_NAME).exists() or (folder / WEIGHTS_NAME).exists():
        return INDEX_NAME if (folder / INDEX_NAME).exists() else None
    others = sorted(
        path.name for path in folder.glob("*.safetensors.index.json") if not path.name.startswith(_NO_WEIGHTS)
    )
    return others[0] if len(others) == 1 else None


def _weight_names(folder: Path) -> list[str]:
    """Return the weight files of a folder without an index: the usual one, or those that older tools wrote."""
    if (folder / WEIGHTS_NAME).exists():
        return [WEIGHTS_NAME]
    present = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith(_NO_WEIGHTS))
    numbered = [match for name in present if (match := _NUMBERED.fullmatch(name)) is not None]
    if present and len(numbered) == len(present) and len({(match["stem"], match["count"]) for match in numbered}) == 1:
        stem, count = numbered[0]["stem"], numbered[0]["count"]
        whole = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        missing = [name for name in whole if name not in present]
        if missing:
            raise FormatError(f"{folder / missing[0]} does not exist, but {present[0]} is there; fetch it again.")
        return present
    if len(present) <= 1:
        return present or [WEIGHTS_NAME]
    named = _base_name(folder)
    if named in present:
        return [named]
    raise FormatError(
        f"{folder} holds {', '.join(present[:4])}{' and more' if len(present) > 4 else ''}, and nothing says which "
        f"of them are the weights; leave one, or rename it to {WEIGHTS_NAME}."
    )


def _base_name(folder: Path) -> str | None:
    """Return the weight file that AutoGPTQ's own config names, or None."""
    path = folder / QUANTIZE_CONFIG_NAME
    name = read_json(require_inside(folder, path)).get("model_file_base_name") if path.is_file() else None
    return f"{name}.safetensors" if isinstance(name, str) else None


def _read_index(folder: Path, name: str) -> dict[str, str]:
    """Return tensor name -> file name from an index."""
    path = folder / name
    weight_map = read_json(require_inside(folder, path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no weight_map; the file is damaged: fetch or write it again.")
    for tensor, shard in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(shard, str) or _SHARD_NAME.fullmatch(shard) is None:
            raise FormatError(
                f"{path} puts {tensor[:80]!r} into {str(shard)[:80]!r}; expected the name of a .safetensors file in "
                "the same folder."
            )
    return weight_map


def _explain_missing(folder: Path, name: str, *, index: str | None) -> None:
    if index is not None:
        raise FormatError(f"{folder / name} does not exist, but {index} names it; fetch or write it again.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise FormatError(
            f"{folder} holds {pickles[0]:.80} but no {name}; only safetensors files are read, because a pickle can run "
            "any code. Convert the checkpoint first: load it where you trust it, with the tool that wrote it, and save "
            "it as safetensors."
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf", ".npz"))
    if others:
        raise FormatError(
            f"{folder} holds {others[0]:.80}, but no weights under a name that transformers or GPTQ tools give them, "
            f"such as {name}; if these are the weights, with the names of transformers inside, rename the file."
        )
    raise FormatError(f"{folder / name} does not exist; fetch or write the checkpoint again.")
