"""Opsets, and what onnx's own checker says of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from cloq_export.errors import FormatError, UsageError
from cloq_export.formats.onnx.blocks import Style
from cloq_export.formats.onnx.record import GRAPH_NAME, ModuleRecord

MICROSOFT = "com.microsoft"

# Type of a code in a DequantizeLinear -> the first opset that knows it there with blocks.
CODE_TYPES = {2: (ir.DataType.UINT2, 25), 4: (ir.DataType.UINT4, 21), 8: (ir.DataType.UINT8, 21)}
# Opset -> the first version of the file format that may import it, where that is more than exporters write by default.
_IR_VERSIONS = ((25, 13), (24, 12), (23, 11), (21, 10))
# ONNX Runtime registers these in the standard domain, where onnx's checker does not know them.
_RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})


def needed_opset(modules: Mapping[str, ModuleRecord], style: Style) -> int:
    """Return the least opset that has the types of a graph's linears; 1 if only ONNX Runtime's own are used."""
    if style == "matmulnbits":
        return 1
    return max(CODE_TYPES[module.blocks.bits][1] for module in modules.values())


def check_graph(folder: Path) -> None:
    """Let onnx's checker read a graph from disk.

    Operators that ONNX Runtime registers in the standard domain are looked at as its own, which the checker leaves
    alone; the loader of ONNX Runtime knows them.

    Raises:
        FormatError: the checker refuses it.
    """
    model = onnx.load(str(folder / GRAPH_NAME), load_external_data=False)
    for node in model.graph.node:
        if not node.domain and node.op_type in _RUNTIME_OPERATORS:
            node.domain = MICROSOFT
    # Beside the original, because the checker looks for the external data there.
    place = folder / f".{GRAPH_NAME}.checked"
    try:
        onnx.save(model, str(place))
        onnx.checker.check_model(str(place))
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FormatError(f"onnx's checker refuses {folder / GRAPH_NAME}: {reason}") from None
    finally:
        place.unlink(missing_ok=True)


def set_opset(model: ir.Model, needed: int, wanted: int | None) -> int:
    """Let the graph import an opset in which its operators mean the same, and return it."""
    present = model.opset_imports.get("", 1)
    chosen = max(needed, present) if wanted is None else wanted
    newest = onnx.defs.onnx_opset_version()
    if chosen < needed:
        raise UsageError(
            f"opset {chosen} has no DequantizeLinear for these codes; {needed} is the least: choose `opset={needed}` "
            "or more, or `style=matmulnbits`."
        )
    if not 1 <= chosen <= newest:
        raise UsageError(f"opset {chosen} is unknown to the installed onnx; it knows 1 to {newest}.")
    if chosen != present:
        used = {node.op_type for node in model.graph.all_nodes() if not node.domain} - _RUNTIME_OPERATORS
        for operator in sorted(used):
            if not _means_the_same(operator, present, chosen):
                raise UsageError(
                    f"{operator} is another operator in opset {chosen} than in {present}, which the float graph was "
                    f"exported with; choose `opset={present}`, or leave it out."
                )
        model.opset_imports[""] = chosen
        least = next((version for opset, version in _IR_VERSIONS if chosen >= opset), 0)
        model.ir_version = max(model.ir_version, least)
    return chosen


def _means_the_same(operator: str, first: int, second: int) -> bool:
    """Return whether an operator of two opsets differs at most by what types it takes, and takes more in the later."""
    try:
        older, newer = (onnx.defs.get_schema(operator, opset) for opset in sorted((first, second)))
    except onnx.defs.SchemaError:
        return False
    if older.since_version == newer.since_version:
        return True
    if second < first:
        return False  # the graph may use a type that only the later one takes

    def signature(schema: Any) -> Any:
        return (
            [(item.name, item.option, item.type_str) for item in (*schema.inputs, *schema.outputs)],
            sorted(
                (name, attribute.type, attribute.required, attribute.default_value.SerializeToString())
                for name, attribute in schema.attributes.items()
            ),
        )

    types = [{item.type_param_str: set(item.allowed_type_strs) for item in s.type_constraints} for s in (older, newer)]
    wider = types[0].keys() == types[1].keys() and all(types[0][key] <= types[1][key] for key in types[0])
    return wider and signature(older) == signature(newer)
