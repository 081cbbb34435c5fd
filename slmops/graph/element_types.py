"""Of which element type is every value of a graph? Followed from inputs and weights through the nodes.

What slmops writes keeps no types of inner values, and onnx knows no shape inference for the operators of `com.microsoft`.
"""

from __future__ import annotations

from typing import Any

from slmops import environment
from slmops.graph.linears import Model, Node

_BOOLEAN = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"})
_INTEGER = frozenset({"ArgMax", "ArgMin", "NonZero", "Shape", "Size"})
# Operator -> the input that each of its outputs has the type of; all others: the first one. None: float32.
_OUTPUT_OF: dict[str, tuple[int | None, ...]] = {
    "GatherBlockQuantized": (2,),
    "GroupQueryAttention": (0, 3, 4),
    "SimplifiedLayerNormalization": (1, None),
    "SkipLayerNormalization": (0, None, None, 0),
    "SkipSimplifiedLayerNormalization": (0, None, None, 0),
    "Where": (1,),
}


def element_types(model: Model) -> dict[str, Any]:
    """Return the `onnx_ir.DataType` of each value by its name; a value whose type cannot be told is left out."""
    types: dict[str, Any] = {}
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype is not None:
            types[value.name] = value.dtype
    for node in model.graph:
        for index, value in enumerate(node.outputs):
            found = _output_type(node, index, types)
            if value.name and found is not None:
                types[value.name] = found
    return types


def is_float(dtype: Any) -> bool:
    """Tell a floating-point type from integers and booleans."""
    return dtype is not None and dtype.name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


def _output_type(node: Node, index: int, types: dict[str, Any]) -> Any:
    ir = environment.require("onnx_ir", "to read a graph")
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Constant", "ConstantOfShape"):
        value = node.attributes.get("value")
        if value is not None:
            return value.as_tensor().dtype
        names = {"value_float": "FLOAT", "value_floats": "FLOAT", "value_int": "INT64", "value_ints": "INT64"}
        return next((ir.DataType[dtype] for name, dtype in names.items() if name in node.attributes), ir.DataType.FLOAT)
    if node.op_type in _BOOLEAN:
        return ir.DataType.BOOL
    if node.op_type in _INTEGER or (node.op_type == "TopK" and index == 1):
        return ir.DataType.INT64
    sources = _OUTPUT_OF.get(node.op_type, (0,))
    source = sources[index] if index < len(sources) else sources[0]
    if source is None:
        return ir.DataType.FLOAT
    value = node.inputs[source] if source < len(node.inputs) else None
    return types.get(value.name) if value is not None else None
