"""Results as JSON holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar


class Result:
    """A frozen dataclass whose fields are the keys of its JSON object."""

    levelled: ClassVar[str] = ""
    """Name of a field, itself a result, whose keys stand behind the other keys; empty if there is none."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as the report holds it."""
        entries = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return entries | entries.pop(self.levelled, {})


def plain(value: Any) -> Any:
    """Return a value with results as objects and tuples as lists."""
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value
