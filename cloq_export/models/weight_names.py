"""What transformers' loader calls the tensors of files in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NameInMemory(NamedTuple):
    """The name that the loader gives a tensor of a file.

    Args:
        stored: its name in the file.
        asked: what the loader was asked for, a weight in the place of its packed parts.
        name: what `asked` is called in memory.
        pattern: of the rule by which the loader joins or cuts the tensor; None if it is taken as it is.
        patterns: all that the rule joins, or cuts.
        operations: names of the classes of what the rule does, in order.
        made: all names in memory that the rule fills, `name` first: several where it cuts the tensor.
    """

    stored: str
    asked: str
    name: str
    pattern: str | None
    patterns: tuple[str, ...]
    operations: tuple[str, ...]
    made: tuple[str, ...]


def loaded_names(
    model: PreTrainedModel,
    stored: Iterable[str],
    places: Mapping[str, Any],
    ask: Callable[[str], str] = str,
) -> Iterator[NameInMemory]:
    """Yield what tensors of files are called in a model, in the loader's own order.

    Args:
        model: with or without numbers.
        stored: names in files.
        places: names in memory that a tensor may have.
        ask: gives the name that the loader is asked for in the place of a stored one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    prefix = model.base_model_prefix
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if not isinstance(entry, WeightRenaming)]
    # Some renamings take effect only after an earlier name was seen.
    for one in sorted(stored, key=dot_natural_key):
        asked = ask(one)
        name, pattern = rename_source_key(asked, renamings, converters, prefix, places)
        if name not in places and asked in places:
            name, pattern = rename_source_key(asked, [], [], prefix, places)
        rule = next((entry for entry in converters if pattern in entry.source_patterns), None)
        patterns = () if rule is None else tuple(rule.source_patterns)
        operations = () if rule is None else tuple(type(each).__name__ for each in rule.operations)
        first, *others = [""] if rule is None else rule.target_patterns
        made = (name, *(name.replace(first, other, 1) for other in others))
        yield NameInMemory(one, asked, name, pattern, patterns, operations, made)
