"""The weight files of a float model: all there, float, and nothing in them that the model has no place for."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from cloq_export.errors import SourceError, UnsupportedModelError
from cloq_export.files.safe_json import read_json
from cloq_export.files.safe_tensors import TensorFile
from cloq_export.models.low_precision import DecodedTensors, LowPrecision, find_low_precision
from cloq_export.models.stated_quantization import StatedQuantization, stated_quantization
from cloq_export.models.weight_names import loaded_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHARDS = "model-*-of-*.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHOWN = 3
# Last parts of names under which only quantized weights and their grids are stored.
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_shape|weight_zero_point|absmax|quant_map|nested_absmax|SCB|W_q|codes"
    r"|codebooks|Qidxs|trellis|(weight|[a-z_]+_proj)_(blocks|scales)|quant_state\.[\w.]+)$"
)
_SCALE = re.compile(r"(scale|scales|scale_inv|absmax|SCB|qzeros|zero_point|scale_\d)$")
# What models compute for themselves and older writers stored besides the weights.
_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb|rotary_embedding|rotary_pos_emb|rotary)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"
    r"|(^|\.)(attn|attention|crossattention|self_attention|self_attn)\.masked_bias$|(^|\.)position_ids$"
)
_LAYER = re.compile(r"(.*?\blayers\.\d+)\.")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|crossattention|self_attention|self_attn)\.bias$")


# What reads a tensor by its name.
TensorReader: TypeAlias = TensorFile | DecodedTensors


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The headers of a model's weight files; no tensor is read yet.

    Args:
        paths: the files.
        files: tensor name -> the file that holds it.
        headers: tensor name -> (dtype code of safetensors, shape).
        low_precision: weight that is decoded from floats of 8 or 4 bits -> where it comes from.
        idle: scales of activations and of the cache, which no weight depends on.
    """

    paths: tuple[Path, ...]
    files: Mapping[str, TensorReader]
    headers: Mapping[str, tuple[str, tuple[int, ...]]]
    low_precision: Mapping[str, LowPrecision] = dataclasses.field(default_factory=dict)
    idle: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> WeightFiles:
        """Find the weight files of a folder and read their headers, which also finds truncated files.

        Args:
            folder: the model's folder.

        Returns:
            The files.

        Raises:
            SourceError: there are none, one is missing or empty, or they do not belong together.
            FormatError: a file is damaged.
        """
        weight_map = _read_index(folder)
        names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise SourceError(
                f"{folder} lacks {len(absent)} of {len(names)} weight files, {absent[0]} among them; fetch them again."
            )
        files: dict[str, TensorFile] = {}
        for name in names:
            file = TensorFile(folder / name)
            for tensor in file.headers:
                if tensor in files:
                    raise SourceError(
                        f"{file.path} and {files[tensor].path.name} both hold {tensor}; the folder mixes two models. "
                        "Fetch it again into an empty folder."
                    )
                if weight_map is not None and weight_map.get(tensor) != name:
                    said = weight_map.get(tensor)
                    raise SourceError(
                        f"{file.path} holds {tensor}, which {INDEX_FILE} "
                        f"{'does not list' if said is None else f'puts into {said}'}; the folder mixes two models, or "
                        "the index is another model's. Fetch it again into an empty folder."
                    )
                files[tensor] = file
        stray = sorted({path.name for path in folder.glob(_SHARDS)} - set(names))
        if stray:
            raise SourceError(
                f"{folder} holds {len(stray)} weight files that do not belong to its model, {stray[0]} among them: "
                f"{INDEX_FILE if weight_map is not None else SINGLE_FILE} says nothing of them. Two downloads were "
                "mixed; fetch the model again into an empty folder, or delete what is not meant."
            )
        lacking = sorted(set(weight_map or ()) - set(files))
        if lacking:
            raise SourceError(
                f"{folder / INDEX_FILE} promises {len(lacking)} tensors that no file holds, {lacking[0]} among them; "
                "the download is incomplete, or the index is another model's. Fetch it again."
            )
        if not files:
            raise SourceError(
                f"{folder / names[0]} holds no tensor at all; the model was not saved whole. Fetch it again."
            )
        headers = {tensor: file.headers[tensor] for tensor, file in files.items()}
        return cls(tuple(folder / name for name in names), files, headers)

    def decoded(self, blocks: Sequence[tuple[int, int]]) -> WeightFiles:
        """Return these files with the weights that are stored as floats of 8 or 4 bits decoded while they are read.

        Args:
            blocks: rows and columns of one scale, as the config says; none where it does not.

        Raises:
            SourceError: a weight is stored twice, as such floats and as others.
        """
        found, idle = find_low_precision(self.headers, blocks)
        twice = [name for name, each in found.items() if name != each.numbers and name in self.headers]
        if twice:
            raise SourceError(
                f"{self.files[twice[0]].paths(twice[0])[0]} holds {twice[0]} beside {found[twice[0]].numbers}, which "
                "decodes to it; two models were mixed. Fetch it again into an empty folder."
            )
        files = {name: file for name, file in self.files.items() if isinstance(file, TensorFile)}
        reader = DecodedTensors(files, found)
        gone = {part for each in found.values() for part in each.parts} | set(idle)
        kept = {name: file for name, file in self.files.items() if name not in gone}
        headers = {name: header for name, header in self.headers.items() if name not in gone}
        return dataclasses.replace(
            self,
            files={**kept, **dict.fromkeys(found, reader)},
            headers={**headers, **reader.headers},
            low_precision=found,
            idle=tuple(idle),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what is said of weights that are decoded."""
        if not self.low_precision:
            return ()
        kinds = collections.Counter(each.kind for each in self.low_precision.values())
        counted = ", ".join(f"{count} from {kind}" for kind, count in sorted(kinds.items()))
        idle = f"; {len(self.idle)} scales of activations and the cache are left out" if self.idle else ""
        return (f"{len(self.low_precision)} weights are decoded with their scales ({counted}){idle}",)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of most stored numbers; decoded ones count as bfloat16, as their models are run."""
        sizes: collections.Counter[torch.dtype] = collections.Counter()
        for name, (code, shape) in self.headers.items():
            if code in _FLOATS:
                kind = torch.bfloat16 if name in self.low_precision else _FLOATS[code]
                sizes[kind] += torch.Size(shape).numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32


def open_weights(name: str, folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """Open the weight files of a model, those of 8- and 4-bit floats as what they decode to; refuse other codes.

    Args:
        name: of the model, for messages.
        folder: its folder.
        config: content of config.json.

    Returns:
        The files, in which every weight is a float.

    Raises:
        SourceError: files are missing, or do not belong together.
        FormatError: a file is damaged.
        UnsupportedModelError: the model is quantized in another way; the message names the method, or the tensors.
    """
    weights = WeightFiles.open(folder)
    statements = stated_quantization(folder, config)
    # The label says integer codes and the tensors are floats with scales: neither is trusted.
    if all(statement.is_float for statement in statements):
        weights = weights.decoded([block for each in statements for block in each.blocks])
    refuse_quantized(name, statements, weights)
    return weights


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return tensor name -> file name, or None for a model in one file."""
    index = folder / INDEX_FILE
    single = (folder / SINGLE_FILE).is_file()
    if not index.is_file():
        if single:
            return None
        if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
            raise SourceError(
                f"{folder} has its weights only in pickled files, which can run code when they are opened; only "
                "safetensors and GGUF are read. Save the model again with safetensors."
            )
        others = sorted(path.name for path in folder.glob("*.safetensors*"))
        remedy = (
            f"; it holds {listed(others)}. If these are the float weights, rename the file or the index to those"
            if others
            else ". Fetch the model again"
        )
        raise SourceError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}{remedy}.")
    weight_map = read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if (
        not isinstance(weight_map, dict)
        or not names
        or not all(isinstance(name, str) and Path(name).name == name for name in names)
    ):
        raise SourceError(f"{index} has no usable weight_map; it is damaged. Fetch the model again.")
    if single and names != {SINGLE_FILE}:
        raise SourceError(
            f"{folder} holds {SINGLE_FILE} and {INDEX_FILE}, which names other files: two models in one folder, and "
            "readers differ in which they take. Delete the one that is not meant."
        )
    return weight_map


def refuse_quantized(name: str, statements: Sequence[StatedQuantization], weights: WeightFiles) -> None:
    """Refuse a model whose weights are quantized, by what it says anywhere and by what it holds.

    Args:
        name: of the model, for the message.
        statements: what its folder says.
        weights: its files.

    Raises:
        UnsupportedModelError: it is quantized; the message names the method, or the tensors.
    """
    packed = _packed(weights)
    if statements and not weights.low_precision:
        where, method = statements[0].where, statements[0].method
        floats = all(code in _FLOATS for code, _ in weights.headers.values()) and not packed
        raise UnsupportedModelError(
            f"{name} is already quantized (method {method}), as {where} says; float weights can be quantized, and "
            "fp8, MXFP4 and NVFP4 weights with their scales beside them. "
            + (
                "Its files hold float weights alone: if they were decoded, delete that entry; otherwise fetch the "
                "model again."
                if floats
                else "Give the full-precision model it was made from."
            )
        )
    if packed:
        kind, tensors = next(iter(packed.items()))
        contrary = "" if statements else ", though its config does not say so"
        scales = [tensor for tensor in weights.headers if _SCALE.search(tensor)]
        beside = f", and {len(scales)} scales ({listed(scales)})" if scales else ""
        own = next((scale for scale in scales if scale.startswith(tensors[0].removesuffix("_packed"))), None)
        if own is not None:
            beside += f", the first of shape {weights.headers[tensors[0]][1]} beside {weights.headers[own][1]}"
        raise UnsupportedModelError(
            f"{name} is already quantized{contrary}: it holds {len(tensors)} tensors of "
            f"{kind} ({listed(tensors)}){beside}; only float weights can be quantized, and fp8, "
            "MXFP4 and NVFP4 weights whose scales fit them. Give the full-precision model it was made from."
        )


def _packed(weights: WeightFiles) -> dict[str, list[str]]:
    """Return kind of codes -> the tensors of files that hold them."""
    packed: dict[str, list[str]] = {}
    for tensor, (code, _) in weights.headers.items():
        short = tensor.rpartition(".")[2]
        if code not in _FLOATS and code.startswith(("F8", "F6", "F4")):
            kind = "fp8" if code.startswith("F8") else "fp6" if code.startswith("F6") else "fp4"
        elif code not in _FLOATS and (short == "weight" or _PACKED.search(tensor)):
            kind = {"I8": "int8", "U8": "uint8, int8 or two 4-bit codes to a byte"}.get(code, "packed integers")
        elif _PACKED.search(tensor):
            kind = "scales or codes"
        else:
            continue
        packed.setdefault(f"{kind}, {code}", []).append(tensor)
    return packed


def refuse_left_over(name: str, model: PreTrainedModel, unexpected: Sequence[str], weights: WeightFiles) -> list[str]:
    """Refuse tensors that were loaded into nothing, except those that cannot change what the model computes.

    Left out may be: what the model computes for itself, biases that are zero, and what the model's own class in
    transformers declares to leave out.

    Args:
        name: of the model, for the message.
        model: as transformers loaded it.
        unexpected: names that transformers found no place for.
        weights: its files.

    Returns:
        list: what was left out, for the run's notes.

    Raises:
        SourceError: a tensor has no place in the model, or is stored as integers where the model has floats.
        UnsupportedModelError: what has no place are scales of quantized weights.
    """
    places = dict(model.state_dict())
    called = {each.stored: each.name for each in loaded_names(model, weights.headers, places) if each.name in places}
    wrong = [
        tensor
        for tensor, (code, _) in weights.headers.items()
        if code not in _FLOATS and tensor in called and places[called[tensor]].is_floating_point()
    ]
    if wrong:
        raise SourceError(
            f"{name} stores {len(wrong)} tensors as {weights.headers[wrong[0]][0]} where {type(model).__name__} has "
            f"float weights ({listed(wrong)}); they are codes of a quantized model. Give the full-precision model."
        )
    declared: list[str] = []
    zeros: list[str] = []
    homeless: list[str] = []
    patterns = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    layers = {match.group(1) for match in map(_LAYER.match, places) if match}
    for tensor in sorted(set(weights.headers) - set(places) - set(unexpected)):
        if _is_computed(tensor, weights) or not any(pattern.search(tensor) for pattern in patterns):
            continue
        if _CAUSAL_MASK.search(tensor):
            # A pattern for the causal masks of old files, taken as it stands, also covers real biases.
            (declared if _is_zero(tensor, weights) else homeless).append(tensor)
            continue
        layer = _LAYER.match(tensor)
        # The tensors of a layer that is there were loaded under another name (experts are fused).
        if layer is None or layer.group(1) not in layers:
            declared.append(tensor)
    for tensor in sorted(_stored_name(tensor, weights) for tensor in unexpected):
        if _is_computed(tensor, weights):
            continue
        (zeros if "bias" in tensor.rpartition(".")[2] and _is_zero(tensor, weights) else homeless).append(tensor)
    scales = [tensor for tensor in homeless if _SCALE.search(tensor)]
    if scales:
        raise UnsupportedModelError(
            f"{name} holds {len(scales)} scales that {type(model).__name__} has no place for ({listed(scales)}): its "
            "weights are quantized, though its config does not say so; only float weights can be quantized. Give the "
            "full-precision model it was made from."
        )
    if homeless:
        raise SourceError(
            f"{name} holds {len(homeless)} tensors that {type(model).__name__} has no place for "
            f"({listed(homeless)}); without them it would compute something else. Its config.json is another model's, "
            "or this architecture needs another class: give the model as transformers saves it."
        )
    notes = []
    if declared:
        notes.append(
            f"{len(declared)} tensors of {name} were left out, as {type(model).__name__} of transformers declares: "
            f"{listed(declared)}"
        )
    if zeros:
        notes.append(f"{len(zeros)} biases of {name} that are zero and have no place were left out: {listed(zeros)}")
    return notes


def _stored_name(tensor: str, weights: WeightFiles) -> str:
    """Return the name on disk of a tensor that transformers renamed while it looked for a place."""
    if tensor in weights.headers:
        return tensor
    tail = tensor
    while "." in tail:
        tail = tail.partition(".")[2]
        alike = [name for name in weights.headers if name == tail or name.endswith(f".{tail}")]
        if len(alike) == 1:
            return alike[0]
        if alike:
            break
    return tensor


def _is_computed(tensor: str, weights: WeightFiles) -> bool:
    if _COMPUTED.search(tensor):
        return True
    header = weights.headers.get(tensor)
    return header is not None and _CAUSAL_MASK.search(tensor) is not None and len(header[1]) == 4


def _is_zero(tensor: str, weights: WeightFiles) -> bool:
    file = weights.files.get(tensor)
    return file is not None and not bool(file.read(tensor).any())


def listed(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are, for a message."""
    more = f", {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
