"""How do activations get two dimensions, (tokens of all rows, width), so that Gemm can take them?

onnxruntime's Gemm adds a third operand and reads a transposed one, and takes matrices only. Linear layers, norms and
elementwise operators do not care; attention, the cut to the last token and the logits keep (rows, tokens, width), and
stand between two Reshapes, which copy nothing.
"""

from __future__ import annotations

import numpy as np

from slmops import environment
from slmops.graph.linears import Model, Node, Value

_EMBEDDINGS = ("Gather", "GatherBlockQuantized")
# Operators that work on the last axis alone, and which of their inputs are activations.
_ROWWISE = {
    "MatMulNBits": (0,),
    "MatMul": (0,),
    "SimplifiedLayerNormalization": (0,),
    "LayerNormalization": (0,),
    "SkipSimplifiedLayerNormalization": (0, 1),
    "SkipLayerNormalization": (0, 1),
    "Split": (0,),
}
_ELEMENTWISE = ("Add", "Mul", "Sigmoid", "Tanh", "Relu", "Gelu", "FastGelu", "QuickGelu")
_ALL, _LAST = "all tokens", "last token"


def flatten(model: Model) -> set[Value]:
    """Give the activations of a decoder graph two dimensions where its operators allow it, in place.

    Returns:
        The values that have two dimensions now.
    """
    rewriter = _Flattening(model)
    for node in list(model.graph):
        rewriter.visit(node)
    return rewriter.flat


class _Flattening:
    """Walks a graph in order, and knows of each activation how many tokens it holds and how many dimensions it has."""

    def __init__(self, model: Model) -> None:
        self.graph = model.graph
        self.ids = next(value for value in self.graph.inputs if value.name == "input_ids")
        self.tokens: dict[Value, str] = {}
        """Of every activation, (rows, tokens, width) or flat: whether it holds all tokens or the last one."""
        self.flat: set[Value] = set()
        self.twins: dict[Value, Value] = {}
        """The other form of an activation, where it was needed."""
        self.shapes: dict[str, Value] = {}

    def visit(self, node: Node) -> None:
        places = self._activations(node)
        if places:
            for place in places:
                node.replace_input_with(place, self._flat(node.inputs[place], node))
            if node.op_type == "Split":
                node.attributes["axis"] = environment.require("onnx_ir", "to rewrite a graph").AttrInt64("axis", -1)
            kind = self.tokens[node.inputs[places[0]]]
            for value in node.outputs:
                self.tokens[value] = kind
                self.flat.add(value)
            return
        for place, value in enumerate(node.inputs):
            if value in self.flat:
                node.replace_input_with(place, self._full(value, node))
        self._begin(node)

    def _activations(self, node: Node) -> tuple[int, ...]:
        """Return which inputs of a node are activations, if it can take them flat; nothing if it cannot."""
        if any(value in self.graph.outputs for value in node.outputs):
            return ()
        places = _ROWWISE.get(node.op_type, ())
        if node.op_type in _ELEMENTWISE:
            places = tuple(i for i, value in enumerate(node.inputs) if not self._constant(value))
        if node.op_type == "MatMul" and not self._constant(node.inputs[1]):
            return ()
        return places if all(node.inputs[i] in self.tokens for i in places) else ()

    def _begin(self, node: Node) -> None:
        """Note the activations that begin at a node which keeps three dimensions."""
        value = node.outputs[0]
        if node.op_type == "GroupQueryAttention" or self._is_embedding(node):
            # After the cut no attention follows, so it sees all tokens.
            self.tokens[value] = _ALL
        elif node.op_type == "Gather" and node.inputs[0] is not None and self.tokens.get(self._origin(node.inputs[0])) == _ALL:
            self.tokens[value] = _LAST

    def _is_embedding(self, node: Node) -> bool:
        """Return whether a node gives the embedding of each token: of one that is looked up by columns, what turns it."""
        if node.op_type == "Transpose":
            source = node.inputs[0].producer()
            return source is not None and source.op_type == "Gather" and self.ids in source.inputs
        columns = node.op_type == "Gather" and "axis" in node.attributes and node.attributes["axis"].as_int() == 1
        return node.op_type in _EMBEDDINGS and self.ids in node.inputs and not columns

    def _origin(self, value: Value) -> Value:
        return self.twins.get(value, value)

    def _constant(self, value: Value | None) -> bool:
        if value is None or value.name in self.graph.initializers:
            return True
        producer = value.producer()
        return producer is not None and producer.op_type == "Constant"

    def _flat(self, value: Value, user: Node) -> Value:
        """Return the flat form of an activation, made before its first user."""
        if value in self.flat:
            return value
        if value not in self.twins:
            onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
            node = onnx_ir.node("Flatten", [value], attributes={"axis": 2}, name=f"{value.name}/2d")
            self.flat.add(self._pair(value, node, user))
        return self.twins[value]

    def _full(self, value: Value, user: Node) -> Value:
        """Return the (rows, tokens, width) form of a flat activation, made before its first user."""
        if value not in self.twins:
            onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
            self._pair(value, onnx_ir.node("Reshape", [value, self._shape(self.tokens[value])], name=f"{value.name}/3d"), user)
        return self.twins[value]

    def _pair(self, value: Value, node: Node, user: Node) -> Value:
        """Insert the node that makes the other form of a value, and remember it."""
        twin = node.outputs[0]
        twin.name, twin.type = f"{node.name}/output_0", value.type
        self.graph.insert_before(user, node)
        self.twins[value], self.twins[twin] = twin, value
        self.tokens[twin] = self.tokens[value]
        return twin

    def _shape(self, tokens: str) -> Value:
        """Return (rows, tokens, -1) for a Reshape, computed once a run from the shape of `input_ids`."""
        if tokens not in self.shapes:
            onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
            stem = f"/flattening/{tokens.replace(' ', '_')}"
            of_ids = {} if tokens == _ALL else {"start": 0, "end": 1}
            ending = onnx_ir.tensor(np.array([-1] if tokens == _ALL else [1, -1], np.int64), name=f"{stem}/width")
            constant = onnx_ir.Value(name=ending.name, shape=ending.shape, type=onnx_ir.TensorType(ending.dtype), const_value=ending)
            self.graph.initializers[constant.name] = constant
            shape = onnx_ir.node("Shape", [self.ids], attributes=of_ids, name=f"{stem}/Shape")
            joined = onnx_ir.node("Concat", [shape.outputs[0], constant], attributes={"axis": 0}, name=f"{stem}/Concat")
            for node in (shape, joined):
                node.outputs[0].name = f"{node.name}/output_0"
            self.graph.insert_before(self.graph[0], [shape, joined])
            self.shapes[tokens] = joined.outputs[0]
        return self.shapes[tokens]
