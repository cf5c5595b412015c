"""Whether a model that transformers has loaded is the one that its files hold: complete, tied as it says, finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cloq_export.errors import NonFiniteError, SourceError
from cloq_export.models.placeholders import is_placeholder
from cloq_export.models.weight_names import loaded_names

if TYPE_CHECKING:
    from cloq_export.models.weight_files import WeightFiles


def refuse_gaps(name: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a model whose files do not fill it.

    Args:
        name: of the model, for messages.
        model: as transformers loaded it.
        report: what transformers says of the loading.

    Raises:
        SourceError: weights are missing, have other shapes, or could not be read.
    """
    kind = type(model).__name__
    missing = sorted(report.get("missing_keys") or ())
    ends = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if any(
            parameter is getattr(end(), "weight", None)
            for end in (model.get_output_embeddings, model.get_input_embeddings)
        )
    ]
    if len(missing) == 1 and missing[0] in ends:
        raise SourceError(
            f"{name} lacks {missing[0]}, and its config.json says that {kind} does not tie head and embeddings "
            "(tie_word_embeddings: false, or the default of the class); it is incomplete, or the config is wrong. "
            "Fetch it again, or, if the model ties them, set tie_word_embeddings to true."
        )
    if missing:
        # A wrapper of a training (torch.compile, data parallelism) leaves its name in every tensor's.
        others = sorted(report.get("unexpected_keys") or ())
        beside = f", and holds {others[0]}, which {kind} has no place for" if others else ""
        raise SourceError(
            f"{name} lacks {len(missing)} weights of {kind}, {missing[0]} among them{beside}; it is "
            "incomplete or belongs to another architecture than its config.json says"
            + (
                ", or its tensors carry names of another program: save it again with transformers."
                if others
                else ". Fetch it again."
            )
        )
    mismatched = sorted(str(entry[0]) for entry in report.get("mismatched_keys") or ())
    if mismatched:
        raise SourceError(
            f"{name} holds {len(mismatched)} weights of other shapes than {kind} has, {mismatched[0]} among "
            "them; its config.json is another model's. Fetch it again."
        )
    errors = list(report.get("error_msgs") or ())
    if errors:
        raise SourceError(
            f"the weights of {name} cannot be read ({' '.join(str(errors[0]).split())[:200]}); fetch it again."
        )


def give_padding_back(model: Any, files: WeightFiles) -> None:
    """Give embeddings the row of the padding token that their files hold, where loading has left zeros in its place.

    Some classes (Youtu's) begin that row anew after they are loaded; what else reads the files has the row.

    Args:
        model: as transformers loaded it.
        files: its weight files.
    """
    zeroed = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.padding_idx is not None
        and not is_placeholder(module.weight)
        and not bool(module.weight[module.padding_idx].any())
    }
    for entry in loaded_names(model, files.headers, model.state_dict()) if zeroed else ():
        module = zeroed.get(entry.name)
        if module is None or entry.pattern is not None or files.headers[entry.stored][1] != tuple(module.weight.shape):
            continue
        row = files.files[entry.stored].read_as_mapped(entry.stored)[module.padding_idx]
        with torch.no_grad():
            module.weight[module.padding_idx] = row.to(module.weight.dtype)


def refuse_untied(name: str, model: Any) -> None:
    """Refuse a folder whose config ties what its weights hold apart: every reader behind it would tie again.

    Args:
        name: of the model, for the message.
        model: as transformers loaded it.

    Raises:
        SourceError: it does.
    """
    promised = model.get_expanded_tied_weights_keys(all_submodels=True)
    apart = sorted(set(promised) - set(model.all_tied_weights_keys))
    if apart:
        raise SourceError(
            f"{name} contradicts itself: its config.json, or the default of {type(model).__name__}, ties "
            f"{apart[0]} to {promised[apart[0]]} (tie_word_embeddings), and its files hold two that differ. If both "
            "were trained, set tie_word_embeddings to false in config.json; if not, delete the one that is not meant."
        )


def check_finite(model: nn.Module) -> None:
    """Check that no weight or buffer of a model in memory holds NaN or Inf.

    Args:
        model: any module; what stands for weights on disk is left out, which are checked when they are read.

    Raises:
        NonFiniteError: names the first tensor that does.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not is_placeholder(tensor):
            require_finite(name, tensor)


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Check that a weight holds no NaN or Inf.

    Raises:
        NonFiniteError: it does.
    """
    # A sum is finite only if every term is; it is asked first because it makes no temporary tensor.
    if bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise NonFiniteError(
            f"the weight {name} holds {bad} NaN or Inf values of {tensor.numel()}; the model is damaged. Fetch or "
            "save it again."
        )
