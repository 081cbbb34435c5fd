"""How does the builder's float graph become the one that ships? Quantized, with the embedding once, and a short head.

Four rewrites, each exact but for the rounding that was asked for:

- `quantize_graph`: every linear layer becomes a MatMulNBits by its scheme. A tied embedding becomes a
  GatherBlockQuantized on the very tensors of the head, so it lies on disk and in memory once.
- `look_up_in_head`: a tied embedding that stays float is read out of the head's matrix.
- `keep_last_token`: what follows the last attention is computed for the last token only, as a prompt needs it.
- `save_twins`: the graph with all logits and the one with the last, two small files on one data file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment, progress
from slmops.errors import RunFailed
from slmops.graph.linears import EMBEDDING, HEAD, Linear, Model, Node, Value, embedding, linears, weights
from slmops.graph.quantization import Packed, Scheme, pack, quantize
from slmops.graph.recipes import ACCURACY_LEVEL

# What is read and turned for the data file at once.
_WRITING_THREADS, _WRITING_BYTES = 4, 256 << 20
MAIN, FULL, ADAPTED, DATA = "model.onnx", "model_full.onnx", "model_adapters.onnx", "model.onnx.data"
FAST = "model_adapters_fast.onnx"
"""As ADAPTED, for machines that have our operator (`slmops.runtime.operators`)."""


def quantize_graph(
    model: Model,
    scheme_of: Callable[[Linear], Scheme],
    *,
    accuracy_level: int = ACCURACY_LEVEL,
    quantized_embedding: bool = True,
    ahead: Callable[[Linear, Scheme], Packed | None] = lambda _linear, _scheme: None,
) -> None:
    """Quantize every linear layer of a float graph, in place, one tensor at a time. Scales have the type of the weights.

    Args:
        model: a graph of the builder in float.
        scheme_of: the scheme of each layer.
        accuracy_level: of every MatMulNBits.
        quantized_embedding: the provider has a kernel for a quantized embedding; without it, the embedding stays float.
        ahead: what `quantize` would give for a layer, where it is there already.
    """
    found = linears(model)
    table = embedding(model) if quantized_embedding else None
    tied = table is not None and any(table.tensors == linear.tensors for linear in found)
    nodes = {
        node.inputs[1].name: node
        for node in model.graph
        if node.op_type == "MatMul" and len(node.inputs) > 1 and node.inputs[1] is not None
    }

    def quantized_tensors(linear: Linear) -> tuple[Scheme, list[Value]]:
        scheme = scheme_of(linear)
        packed = ahead(linear, scheme) or pack(quantize(weights(model, linear), scheme))
        return scheme, _initializers(model, linear.tensors[0], scheme, packed)

    with progress.task("quantize", total=len(found) + (table is not None and not tied), unit="layers") as task:
        for linear in found:
            scheme, values = quantized_tensors(linear)
            _replace_matmul(model, nodes[linear.tensors[0]], linear, scheme, values, accuracy_level)
            if tied and table is not None and linear.tensors == table.tensors:
                _replace_gather(model, scheme, values)
            _drop(model, linear.tensors[0])
            task.advance()
        if table is not None and not tied:
            _replace_gather(model, *quantized_tensors(table))
            _drop(model, table.tensors[0])
            task.advance()


def look_up_in_head(model: Model) -> None:
    """Let a tied float embedding look its tokens up in the head's matrix, (inputs, vocabulary), along its columns, in place.

    The builder's graph turns that matrix for the look-up, and a session keeps the result beside it: the largest matrix twice, and
    the turning each time that the graph is loaded (Qwen2.5-0.5B: 0.54 of 2.5 GB).
    """
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    gather = _look_up(model)
    transpose = gather.inputs[0].producer()
    if transpose is None or transpose.op_type != "Transpose":
        return
    old = gather.outputs[0]
    found = onnx_ir.node("Gather", [transpose.inputs[0], gather.inputs[1]], attributes={"axis": 1}, name=f"{gather.name}/columns")
    found.outputs[0].name = f"{found.name}/output_0"
    turned = onnx_ir.node("Transpose", [found.outputs[0]], attributes={"perm": [1, 2, 0]}, name=gather.name)
    turned.outputs[0].shape, turned.outputs[0].type = old.shape, old.type
    model.graph.insert_before(gather, [found, turned])
    name = old.name
    old.replace_all_uses_with(turned.outputs[0])
    model.graph.remove(gather, safe=True)
    turned.outputs[0].name = name
    if not list(transpose.outputs[0].uses()):
        model.graph.remove(transpose, safe=True)


def keep_last_token(model: Model) -> bool:
    """Compute only the last token after the last attention: its output projection, MLP, norm and head.

    The keys and values of all tokens are made before it, so nothing else changes. Where the graph's last layer does
    not look as expected, only the head is shortened.

    Returns:
        Whether the cut is before the last layer's output projection (False: before the head).
    """
    head = _head(model)
    attention: list[Node] = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    projection: Node | None = _single_user(attention[-1].outputs[0]) if attention else None
    skip = _single_user(projection.outputs[0]) if projection is not None and projection.op_type in ("MatMul", "MatMulNBits") else None
    is_norm = skip is not None and skip.op_type == "SkipSimplifiedLayerNormalization"
    early = projection is not None and skip is not None and is_norm and skip.inputs[1] is projection.outputs[0]
    if projection is not None and skip is not None and early:
        _cut(model, projection, 0, "/model/last_token/attention")
        _cut(model, skip, 0, "/model/last_token/residual")
    else:
        _cut(model, head, 0, "/model/last_token/head")
    logits = model.graph.outputs[0]
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    logits.shape = onnx_ir.Shape([logits.shape[0], 1, logits.shape[2]])
    return early


def save_twins(model: Model, folder: Path) -> None:
    """Write `model_full.onnx` (all logits), `model.onnx` (the last token's) and the data file of both.

    A data file that is there already (`slmops.graph.float_data`) has all of it.

    Raises:
        RunFailed: the graph does not end in `logits`.
    """
    onnx_ir = environment.require("onnx_ir", "to write a graph")
    _forget_inner_shapes(model)
    if (folder / DATA).is_file():
        onnx_ir.save(model, folder / FULL)
    else:
        threads = min(environment.usable_cores(), _WRITING_THREADS)
        onnx_ir.save(model, folder / FULL, external_data=DATA, max_workers=threads, max_in_flight_bytes=_WRITING_BYTES)
    short = onnx_ir.load(folder / FULL)
    keep_last_token(short)
    onnx_ir.save(short, folder / MAIN)


def _initializers(model: Model, stem: str, scheme: Scheme, packed: Packed) -> list[Value]:
    """Register codes, scales and zero points as initializers; return them in the order that the operators want."""
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    values = []
    codes, scales, points = packed
    scales = scales.astype(model.graph.initializers[stem].dtype.numpy(), copy=False)
    for suffix, array in zip((f"_Q{scheme.bits}", "_scales", "_zero_points"), (codes, scales, points), strict=True):
        tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=stem + suffix)
        value = onnx_ir.Value(name=stem + suffix, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.initializers[value.name] = value
        values.append(value)
    return values


def _replace_matmul(model: Model, node: Node, linear: Linear, scheme: Scheme, values: list[Value], accuracy_level: int) -> None:
    attributes = {"K": linear.inputs, "N": linear.outputs, "bits": scheme.bits, "block_size": scheme.block_size}
    _replace(model, node, "MatMulNBits", [node.inputs[0], *values], {**attributes, "accuracy_level": accuracy_level})


def _replace_gather(model: Model, scheme: Scheme, values: list[Value]) -> None:
    """Let the embedding read the quantized table: `values` as MatMulNBits lays them out, its codes seen as a matrix."""
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    gather = _look_up(model)
    ids, transpose = gather.inputs[1], gather.inputs[0].producer()
    codes = values[0]
    blocks, width = int(codes.shape[1]), int(codes.shape[2])
    shape = onnx_ir.tensor(np.array([codes.shape[0], blocks * width], np.int64), name=f"{EMBEDDING}.shape")
    constant = onnx_ir.Value(name=shape.name, shape=shape.shape, type=onnx_ir.TensorType(shape.dtype), const_value=shape)
    model.graph.initializers[constant.name] = constant
    reshape = onnx_ir.node("Reshape", [codes, constant], name=f"/{EMBEDDING.replace('.', '/')}/Reshape")
    reshape.outputs[0].name = f"{reshape.name}/output_0"
    model.graph.insert_before(gather, reshape)
    attributes = {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 1}
    _replace(model, gather, "GatherBlockQuantized", [reshape.outputs[0], ids, *values[1:]], attributes)
    if transpose is not None and not list(transpose.outputs[0].uses()):
        model.graph.remove(transpose, safe=True)


def _look_up(model: Model) -> Node:
    """Return the node that looks the tokens up."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    return next(node for node in model.graph if node.op_type == "Gather" and ids in node.inputs)


def _replace(model: Model, node: Node, operator: str, inputs: list[Any], attributes: dict[str, int]) -> None:
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    old = node.outputs[0]
    new = onnx_ir.node(operator, inputs, attributes=attributes, domain="com.microsoft", name=node.name)
    new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
    model.graph.insert_before(node, new)
    name = old.name
    outputs = [new.outputs[0] if value is old else value for value in model.graph.outputs]
    model.graph.outputs[:] = outputs
    old.replace_all_uses_with(new.outputs[0])
    model.graph.remove(node, safe=True)
    new.outputs[0].name = name


def _cut(model: Model, node: Node, index: int, name: str) -> None:
    """Let an input of a node, shaped (batch, tokens, width), carry its last token only."""
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    source = node.inputs[index]
    last = onnx_ir.tensor(np.array([-1], np.int64), name=f"{name}/index")
    constant = onnx_ir.Value(name=last.name, shape=last.shape, type=onnx_ir.TensorType(last.dtype), const_value=last)
    model.graph.initializers[constant.name] = constant
    # Gather with a one-element index keeps the axis: (batch, 1, width).
    gather = onnx_ir.node("Gather", [source, constant], attributes={"axis": 1}, name=f"{name}/Gather")
    gather.outputs[0].name = f"{name}/output_0"
    gather.outputs[0].type = source.type
    model.graph.insert_before(node, gather)
    node.replace_input_with(index, gather.outputs[0])


def _head(model: Model) -> Node:
    node = model.graph.outputs[0].producer()
    if model.graph.outputs[0].name != "logits" or node is None:
        raise RunFailed(
            "the builder's graph does not end in `logits`", "report the model's architecture: slmops does not know its head yet"
        )
    while node.op_type not in ("MatMul", "MatMulNBits"):
        node = node.inputs[0].producer()
        if node is None:
            raise RunFailed(f"the builder's graph has no {HEAD} before its logits", "report the model's architecture")
    return node


def _single_user(value: Value) -> Any:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 else None


def _drop(model: Model, name: str) -> None:
    value = model.graph.initializers.get(name)
    if value is not None and not list(value.uses()):
        model.graph.initializers.pop(name)


def _forget_inner_shapes(model: Model) -> None:
    """Drop what the builder recorded of inner values: after a cut it is wrong, the runtime infers it, and it is a third of the file."""
    outer = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            if value not in outer:
                value.shape = value.type = None
