"""How does a decoder graph get shapes that an NPU's compiler takes: so many tokens a run, a cache of a fixed length?

The builder's graph grows with its prompt, and keeps attention, rotation and cache in one operator that few compilers know
(GroupQueryAttention). Here both go. A graph of T tokens and a cache of S positions takes

    input_ids (1, T)  past_seq_len (1, 1)  total_seq_len (1)  past_key_values.*.key, .value (1, heads, S, head size)

and gives logits (1, T, vocabulary) and the whole cache, present.*.key, .value, with the T new positions written in. These are
the inputs that onnxruntime-genai's `decoder-pipeline` feeds (onnxruntime-genai 0.18, WindowedInputIDs): `past_seq_len` is the
position of the last of the T tokens, and `total_seq_len` always S, which nothing here needs.

Padding stands after a prompt. What it writes into the cache lies at positions later than any real token's, so the causal mask
hides it, and the next token overwrites the first of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import Unavailable
from slmops.graph.linears import Model, Node, Value

PAST_LENGTH, TOTAL_LENGTH = "past_seq_len", "total_seq_len"
# Far below every score and inside float16, in which an NPU adds it.
_MASKED = -3e4
_NORMS = {"SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization", "SkipLayerNormalization": "LayerNormalization"}
# Inputs of GroupQueryAttention that change what it computes, and that are not written out here (onnxruntime 1.31, ContribOperators).
_UNKNOWN_INPUTS = {9: "position_ids", 10: "attention_bias", 11: "head_sink"}


def make_static(model: Model, *, tokens: int, capacity: int, head_size: int) -> None:
    """Give a decoder graph of the builder fixed shapes, in place.

    Args:
        model: all logits; its linear layers may be quantized.
        tokens: T, that a run takes.
        capacity: S, positions of the cache.
        head_size: of a key, in numbers.

    Raises:
        Unavailable: its attention does something that is not written out here.
    """
    rewriter = _Static(model, tokens, capacity, head_size)
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            rewriter.attention(node)
        elif node.op_type in _NORMS:
            rewriter.norm(node)
    rewriter.finish()


def dynamic_dimensions(model: Model) -> list[str]:
    """Return the inputs and outputs of a graph that have no fixed shape, as `name (1, ?, 64)`."""
    lines = []
    for value in [*model.graph.inputs, *model.graph.outputs]:
        sizes = list(value.shape) if value.shape is not None else ["?"]
        if not all(isinstance(size, int) for size in sizes):
            lines.append(f"{value.name} ({', '.join(str(size) if isinstance(size, int) else '?' for size in sizes)})")
    return lines


class _Static:
    """Writes out what the operators of one graph do, with nodes of fixed shapes."""

    def __init__(self, model: Model, tokens: int, capacity: int, head_size: int) -> None:
        self.ir: Any = environment.require("onnx_ir", "to rewrite a graph")
        self.model, self.graph = model, model.graph
        self.tokens, self.capacity, self.head_size = tokens, capacity, head_size
        self.first = next(iter(model.graph))
        self.place: Node = self.first
        """New nodes stand before it."""
        self.masks: dict[int, Value] = {}
        self.tables: dict[str, Value] = {}
        self.positions, self.written, self.kept = self._positions()

    def norm(self, node: Node) -> None:
        """Write a sum and a norm in place of an operator of both; the sum goes on beside the norm."""
        self.place = node
        x, skip, *weights = node.inputs
        plain = node.op_type == "SkipSimplifiedLayerNormalization"
        scale, bias = weights[0], None if plain or len(weights) < 2 else weights[1]
        added = self._op("Add", [x, skip], f"{node.name}/sum")
        extra = weights[1] if plain and len(weights) > 1 else weights[2] if not plain and len(weights) > 2 else None
        if extra is not None:
            added = self._op("Add", [added, extra], f"{node.name}/sum_bias")
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()} | ({"stash_type": 1} if plain else {})
        inputs = [added, scale] if bias is None else [added, scale, bias]
        self._replace(node.outputs[0], self._op(_NORMS[node.op_type], inputs, f"{node.name}/norm", attributes))
        if len(node.outputs) > 3 and node.outputs[3] is not None:
            self._replace(node.outputs[3], added)

    def attention(self, node: Node) -> None:
        """Write attention out: heads apart, rotated, keys and values into the cache, scores, mask, softmax, sum."""
        heads, kv_heads, scale = self._understood(node)
        self.place, stem, size = node, node.name, self.head_size
        query, key, value = self._parts(node, heads, kv_heads)
        query, key = self._rotated(node, query, f"{stem}/q"), self._rotated(node, key, f"{stem}/k")
        cache = []
        for new, past, present in ((key, node.inputs[3], node.outputs[1]), (value, node.inputs[4], node.outputs[2])):
            name = f"{stem}/{'k' if new is key else 'v'}"
            moved = self._op("MatMul", [self.written, new], f"{name}/moved")
            kept = self._op("Mul", [past, self.kept], f"{name}/kept")
            full = self._op("Add", [kept, moved], f"{name}/cache")
            self._replace(present, full)
            cache.append(full)
        # Queries that share keys stand in one matrix: (1, kv heads, heads a key * tokens, size), and no key is repeated.
        group = heads // kv_heads * self.tokens
        query = self._reshape(
            self._op("Mul", [query, self._number(scale)], f"{stem}/scaled"), (1, kv_heads, group, size), f"{stem}/grouped"
        )
        turned = self._op("Transpose", [cache[0]], f"{stem}/turned", {"perm": [0, 1, 3, 2]})
        scores = self._op("MatMul", [query, turned], f"{stem}/scores")
        scores = self._reshape(scores, (1, heads, self.tokens, self.capacity), f"{stem}/scores_by_head")
        cap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
        if cap:
            bent = self._op("Tanh", [self._op("Mul", [scores, self._number(1 / cap)], f"{stem}/capped")], f"{stem}/tanh")
            scores = self._op("Mul", [bent, self._number(cap)], f"{stem}/cap")
        scores = self._op("Add", [scores, self._mask(node)], f"{stem}/masked")
        shares = self._op("Softmax", [scores], f"{stem}/shares", {"axis": -1})
        shares = self._reshape(shares, (1, kv_heads, group, self.capacity), f"{stem}/shares_grouped")
        mixed = self._reshape(self._op("MatMul", [shares, cache[1]], f"{stem}/mixed"), (1, heads, self.tokens, size), f"{stem}/by_head")
        joined = self._op("Transpose", [mixed], f"{stem}/joined", {"perm": [0, 2, 1, 3]})
        self._replace(node.outputs[0], self._reshape(joined, (1, self.tokens, heads * size), f"{stem}/output"))

    def finish(self) -> None:
        """Drop what is no longer used, and set the shapes of inputs and outputs."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        kept = {PAST_LENGTH, TOTAL_LENGTH, "input_ids"}
        self.graph.inputs[:] = [value for value in self.graph.inputs if value.name in kept or value.name.startswith("past_key_values.")]
        RemoveUnusedNodesPass()(self.model)
        shape = self.ir.Shape
        for value in [*self.graph.inputs, *self.graph.outputs]:
            if value.name.startswith(("past_key_values.", "present.")):
                value.shape = shape([1, value.shape[1], self.capacity, self.head_size])
        ids = next(value for value in self.graph.inputs if value.name == "input_ids")
        ids.shape, ids.dtype = shape([1, self.tokens]), self.ir.DataType.INT32
        logits = self.graph.outputs[0]
        logits.shape = shape([1, self.tokens, logits.shape[2]])

    def _positions(self) -> tuple[Value, Value, Value]:
        """Return the tokens' positions (T), which of the cache's positions each token writes (S, T), and which stay (S, 1)."""
        integers = self.ir.DataType.INT32
        past = self.ir.Input(PAST_LENGTH, shape=self.ir.Shape([1, 1]), type=self.ir.TensorType(integers))
        total = self.ir.Input(TOTAL_LENGTH, shape=self.ir.Shape([1]), type=self.ir.TensorType(integers))
        self.graph.inputs.extend([past, total])
        steps = np.arange(1 - self.tokens, 1, dtype=np.int32)
        row = self._op("Add", [past, self._constant("static/steps", steps[None])], "static/positions_row")  # (1, T)
        self.row = row
        cells = self._constant("static/cells", np.arange(self.capacity, dtype=np.int32)[:, None])  # (S, 1)
        written = self._op("Cast", [self._op("Equal", [cells, row], "static/is_written")], "static/written", {"to": 1})
        # One row of the cache holds at most one new token.
        axis = self._constant("static/axis", np.array([1], np.int64))
        taken = self._op("ReduceSum", [written, axis], "static/taken", {"keepdims": 1})
        kept = self._op("Sub", [self._number(1.0), taken], "static/kept")
        return self._reshape(row, (self.tokens,), "static/positions"), written, kept

    def _mask(self, node: Node) -> Value:
        """Return what is added to scores, (1, 1, T, S): nothing where a token may look, a very low number elsewhere."""
        window = node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else -1
        if window not in self.masks:
            behind, self.place = self.place, self.first
            name = f"static/mask_{window if window > 0 else 'all'}"
            at = self._reshape(self.row, (self.tokens, 1), f"{name}/at")
            cells = self._constant(f"{name}/cells", np.arange(self.capacity, dtype=np.int32)[None])
            hidden = self._op("Cast", [self._op("Greater", [cells, at], f"{name}/later")], f"{name}/hidden", {"to": 1})
            if window > 0:  # a token sees itself and the window - 1 before it
                last = self._op("Sub", [at, self._constant(f"{name}/window", np.array([[window - 1]], np.int32))], f"{name}/last")
                gone = self._op("Cast", [self._op("Less", [cells, last], f"{name}/before")], f"{name}/gone", {"to": 1})
                hidden = self._op("Add", [hidden, gone], f"{name}/unseen")
            low = self._op("Mul", [hidden, self._number(_MASKED)], f"{name}/low")
            self.masks[window] = self._reshape(low, (1, 1, self.tokens, self.capacity), name)
            self.place = behind
        return self.masks[window]

    def _understood(self, node: Node) -> tuple[int, int, float]:
        """Return heads, key and value heads, and the scale of scores."""
        unknown = [name for place, name in _UNKNOWN_INPUTS.items() if len(node.inputs) > place and node.inputs[place] is not None]
        for name in ("rotary_interleaved", "smooth_softmax"):
            if name in node.attributes and node.attributes[name].as_int() > 0:
                unknown.append(name)
        if unknown:
            raise Unavailable(
                f"a graph of fixed shapes cannot be made of this model: its attention uses {', '.join(unknown)}",
                "export it for --device cpu, or take a base of the Llama, Qwen or Phi3 family",
            )
        heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 0.0
        return heads, kv_heads, scale or float(1 / np.sqrt(self.head_size))

    def _parts(self, node: Node, heads: int, kv_heads: int) -> list[Value]:
        """Return queries, keys and values, each (1, heads, T, size)."""
        size = self.head_size
        if node.inputs[1] is None:
            sizes = self._constant("static/qkv", np.array([heads * size, kv_heads * size, kv_heads * size], np.int64))
            parts = self._ops("Split", [node.inputs[0], sizes], f"{node.name}/split", 3, {"axis": -1})
        else:
            parts = list(node.inputs[:3])
        result = []
        for part, count, name in zip(parts, (heads, kv_heads, kv_heads), "qkv", strict=True):
            apart = self._reshape(part, (1, self.tokens, count, size), f"{node.name}/{name}/apart")
            result.append(self._op("Transpose", [apart], f"{node.name}/{name}/by_head", {"perm": [0, 2, 1, 3]}))
        return result

    def _rotated(self, node: Node, x: Value, stem: str) -> Value:
        """Rotate the two halves of the rotated part of each head by the angles of its position."""
        if "do_rotary" not in node.attributes or not node.attributes["do_rotary"].as_int():
            return x
        cos, sin = (self._angles(node.inputs[place]) for place in (7, 8))
        half = int(node.inputs[7].shape[1])
        rest = self.head_size - 2 * half
        sizes = self._constant(f"static/halves_{half}", np.array([half, half, *([rest] if rest else [])], np.int64))
        low, high, *more = self._ops("Split", [x, sizes], f"{stem}/halves", 3 if rest else 2, {"axis": -1})
        product = lambda a, b, name: self._op("Mul", [a, b], f"{stem}/{name}")  # noqa: E731
        turned_low = self._op("Sub", [product(low, cos, "low_cos"), product(high, sin, "high_sin")], f"{stem}/low")
        turned_high = self._op("Add", [product(high, cos, "high_cos"), product(low, sin, "low_sin")], f"{stem}/high")
        return self._op("Concat", [turned_low, turned_high, *more], f"{stem}/rotated", {"axis": -1})

    def _angles(self, table: Value) -> Value:
        """Return the rows of a table of cosines or sines at the tokens' positions, (1, 1, T, half)."""
        if table.name not in self.tables:
            behind, self.place = self.place, self.first
            rows = self._op("Gather", [self._bounded(table), self.positions], f"static/{table.name}/rows", {"axis": 0})
            self.tables[table.name] = self._reshape(rows, (1, 1, self.tokens, int(table.shape[1])), f"static/{table.name}")
            self.place = behind
        return self.tables[table.name]

    def _bounded(self, table: Value) -> Value:
        """Return a table with a row for each position of the cache and no more."""
        array = table.const_value.numpy() if table.const_value is not None else None
        if array is None or len(array) < self.capacity:
            raise Unavailable(
                f"a graph of fixed shapes cannot be made of this model: its table {table.name} has no row for each of {self.capacity} positions",
                "export it for --device cpu, or with a smaller --max-length-tokens",
            )
        return self._constant(f"static/{table.name}/table", array[: self.capacity])

    def _number(self, value: float) -> Value:
        return self._constant(f"static/number_{value!r}", np.array([value], np.float32))

    def _constant(self, name: str, array: np.ndarray) -> Value:
        if name not in self.graph.initializers:
            tensor = self.ir.tensor(np.ascontiguousarray(array), name=name)
            value = self.ir.Value(name=name, shape=tensor.shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def _reshape(self, value: Value, sizes: Sequence[int], name: str) -> Value:
        shape = self._constant(f"static/shape_{'_'.join(map(str, sizes))}", np.array(sizes, np.int64))
        return self._op("Reshape", [value, shape], name)

    def _op(self, kind: str, inputs: Sequence[Value | None], name: str, attributes: dict[str, Any] | None = None) -> Value:
        return self._ops(kind, inputs, name, 1, attributes)[0]

    def _ops(
        self, kind: str, inputs: Sequence[Value | None], name: str, outputs: int, attributes: dict[str, Any] | None = None
    ) -> list[Value]:
        node = self.ir.node(kind, list(inputs), attributes=attributes, name=name, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}/{index}"
        self.graph.insert_before(self.place, node)
        return list(node.outputs)

    def _replace(self, old: Value, new: Value) -> None:
        """Let a value take another's place, also as an output of the graph, where the name is kept."""
        if old.is_graph_output():
            name, kind = old.name, old.type
            old.name = f"{name}/old"
            shape = old.shape
            self.graph.outputs[:] = [new if value is old else value for value in self.graph.outputs]
            new.name, new.type, new.shape = name, kind, shape
        old.replace_all_uses_with(new)
