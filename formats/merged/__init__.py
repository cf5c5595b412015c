"""Plain weights with the adapter merged in; see SPEC.md."""

from cloq_export.formats.merged.codec import (
    MERGED_DTYPES,
    MERGED_FORMAT,
    MERGED_NAME,
    Rounding,
    float_blocks,
    is_record,
    merged_blocks,
    merged_record,
)

__all__ = [
    "MERGED_DTYPES",
    "MERGED_FORMAT",
    "MERGED_NAME",
    "Rounding",
    "float_blocks",
    "is_record",
    "merged_blocks",
    "merged_record",
]
