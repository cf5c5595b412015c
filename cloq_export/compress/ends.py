"""Head and embeddings: codes of their own for the two matrices outside of a model's blocks, where a recipe asks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from cloq_export.compress.plan import ModulePlan
from cloq_export.compress.problem import SolvedLayer
from cloq_export.errors import RecipeError, ShapeError, UnsupportedModelError
from cloq_export.formats.registry import LAYOUTS
from cloq_export.models.stream import BlockStream
from cloq_export.models.tied_head import is_tied
from cloq_export.quantize import reach_fault
from cloq_export.recipe import Recipe
from cloq_export.types import QuantSpec


def plan_ends(model: nn.Module, recipe: Recipe) -> dict[str, ModulePlan]:
    """Return what happens to head and embeddings, as far as a recipe gives them codes; none has an adapter.

    Args:
        model: the float model.
        recipe: every option of the run.

    Returns:
        Full module name -> plan.

    Raises:
        RecipeError: the model has no such matrix, ties both and one alone would get codes, or the layout has no place.
        ShapeError: the grid does not fit.
    """
    asked = {"head_bits": recipe.head_bits, "embedding_bits": recipe.embedding_bits}
    if not any(asked.values()):
        return {}
    if recipe.budget or recipe.codes_from:
        other = "budget" if recipe.budget else "codes_from"
        raise RecipeError(
            f"{' and '.join(asked)} give head and embeddings codes, and {other} is about the layers of blocks alone; "
            f"leave one of them out."
        )
    if is_tied(model) and not all(asked.values()):
        given = next(name for name, bits in asked.items() if bits)
        raise RecipeError(
            f"{given} is {asked[given]}, but head and embeddings of this model are one tensor, which would be stored "
            "as codes and as floats then; set both head_bits and embedding_bits, or neither."
        )
    plans: dict[str, ModulePlan] = {}
    for option, kind, getter in (
        ("head_bits", nn.Linear, "get_output_embeddings"),
        ("embedding_bits", nn.Embedding, "get_input_embeddings"),
    ):
        if not asked[option]:
            continue
        module: Any = getattr(model, getter, lambda: None)()
        name = next((name for name, each in model.named_modules() if each is module), "")
        if not isinstance(module, kind) or (kind is nn.Linear and type(module).forward is not nn.Linear.forward):
            raise RecipeError(
                f"{option} is {asked[option]}, and {type(model).__name__} has no {kind.__name__} there that codes can "
                f"stand for (it is {type(module).__name__}); leave {option} at 0."
            )
        layout, spec = LAYOUTS[recipe.format], QuantSpec(asked[option], recipe.group_size, symmetric=True)
        if kind is nn.Embedding and not layout.holds_embeddings:
            raise RecipeError(
                f"the layout {recipe.format} has no place for codes of embeddings; choose format=compressed_tensors, "
                "or leave embedding_bits at 0."
            )
        out_features, in_features = module.weight.shape
        try:
            spec.group_count(in_features)
            layout.check_packable(out_features, in_features, spec, name=name)
        except ShapeError as error:
            raise ShapeError(f"{name}: {str(error).removeprefix(f'{name}: ')} Or leave {option} at 0.") from None
        if fault := reach_fault(module.weight.detach(), spec):
            raise RecipeError(f"{name} cannot get codes: {fault}; leave {option} at 0.")
        plans[name] = ModulePlan(name, spec, rank=0)
    return plans


class _Reached(Exception):
    """What a module was given, carried out of the model around it."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given


def head_inputs(stream: BlockStream, head: nn.Module, batch: int, hidden: torch.Tensor) -> torch.Tensor:
    """Return what the head is given behind the last block, without computing logits.

    Args:
        stream: of the model.
        head: its head.
        batch: number of the batch that `hidden` belongs to.
        hidden: states after the last block, (windows, seqlen, hidden).

    Raises:
        UnsupportedModelError: the model does not call its head.
    """

    def leave(_: nn.Module, given: tuple[Any, ...]) -> None:
        raise _Reached(given[0])

    handle = head.register_forward_pre_hook(leave)
    try:
        stream.differentiable_logits(batch, hidden, slice(None))
    except _Reached as reached:
        return reached.given
    finally:
        handle.remove()
    raise UnsupportedModelError(
        f"{type(stream.model).__name__} does not call its head; leave `head_bits` at 0, so that it stays float."
    )


def as_it_should_be(layer: SolvedLayer) -> SolvedLayer:
    """Return a finished head or embeddings without the note that no token calibrated embeddings.

    They are looked up: the row of a token is what it is, whatever else the text holds.
    """
    certificate = layer.certificate
    if certificate.tokens:
        return layer
    return dataclasses.replace(layer, certificate=dataclasses.replace(certificate, notes=certificate.notes[1:]))
