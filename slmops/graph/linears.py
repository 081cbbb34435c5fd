"""Which linear layers does a decoder graph hold, how are they stored, and what are their weights in float?

Reads graphs that onnxruntime-genai's builder wrote, and those that slmops made of them: plain MatMul with a float
weight, or MatMulNBits with a quantized one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact
from slmops.graph.quantization import Quantized, Scheme, unpack

# onnx_ir types every name, shape and producer as possibly absent; in a loaded graph they are there.
Model = Any
Node = Any
Value = Any

HEAD = "lm_head"
EMBEDDING = "model.embed_tokens"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What the builder stacks along the outputs, in that order."""


@dataclass(frozen=True)
class Linear:
    """One matrix of a graph: a linear layer, or the embedding."""

    name: str
    """As the builder names it: `model.layers.0.attn.qkv_proj`, `lm_head`."""
    inputs: int
    outputs: int
    scheme: Scheme | None
    """None where the weight is float."""
    accuracy_level: int | None
    """Of MatMulNBits: 4 multiplies in int8 (onnxruntime 1.31, ContribOperators)."""
    tensors: tuple[str, ...]
    """Names of the initializers: weight, or codes, scales and zero points."""
    outputs_first: bool = False
    """A float weight is stored (outputs, inputs), as an untied embedding is; MatMul wants (inputs, outputs)."""


def load_graph(path: Path) -> Model:
    """Load a graph; its large tensors stay in their file until they are read.

    Raises:
        BadArtifact: no such file, or not an ONNX model.
    """
    onnx_ir = environment.require("onnx_ir", "to read an ONNX graph")
    if not path.is_file():
        raise BadArtifact(f"{path} is missing", "export the model again")
    try:
        return onnx_ir.load(path)
    except (ValueError, OSError, RuntimeError) as error:
        raise BadArtifact(f"{path} is not an ONNX model that can be read: {error}", "export the model again") from error
    except Exception as error:  # google.protobuf's DecodeError has no public base class
        if type(error).__name__ != "DecodeError":
            raise
        raise BadArtifact(f"{path} is not an ONNX model", "export the model again") from error


def linears(model: Model) -> list[Linear]:
    """Return the linear layers of a graph, in the order of execution; the head is last."""
    found = []
    for node in model.graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or weight.name not in model.graph.initializers or weight in model.graph.inputs:
            continue  # an initializer that is an input too is the default of an adapter's
        if node.op_type == "MatMul" and weight.shape is not None and len(weight.shape) == 2:
            inputs, outputs = (int(size) for size in weight.shape.numpy())
            found.append(Linear(layer_name(weight.name), inputs, outputs, None, None, (weight.name,)))
        elif node.op_type == "MatMulNBits":
            found.append(_quantized(node))
    return found


def embedding(model: Model) -> Linear | None:
    """Return how the token embedding is stored; `outputs` is the vocabulary. None where the graph has none."""
    for node in model.graph:
        if node.op_type == "GatherBlockQuantized":
            scheme = Scheme(_integer(node, "bits"), _integer(node, "block_size"))
            codes = _source(node.inputs[0])
            scales = node.inputs[2]
            names = (codes, *(value.name for value in node.inputs[2:4] if value is not None))
            vocabulary = int(scales.shape[0])
            blocks = int(scales.shape[1]) if len(scales.shape) > 1 else int(scales.shape.numpy()[0])
            return Linear(EMBEDDING, blocks * scheme.block_size, vocabulary, scheme, None, names)
        if node.op_type == "Gather" and any(value is not None and value.name == "input_ids" for value in node.inputs):
            name = _source(node.inputs[0])
            shape = model.graph.initializers[name].shape.numpy()
            # The head's (inputs, vocabulary): by the builder's Transpose, or along its columns (`rewriting.look_up_in_head`).
            tied = node.inputs[0].producer() is not None or ("axis" in node.attributes and node.attributes["axis"].as_int() == 1)
            vocabulary, width = (shape[1], shape[0]) if tied else (shape[0], shape[1])
            return Linear(EMBEDDING, int(width), int(vocabulary), None, None, (name,), outputs_first=not tied)
    return None


def product_of(model: Model, linear: Linear) -> Node:
    """Return the node that multiplies with a layer's weights."""
    return next(
        node for node in model.graph if len(node.inputs) > 1 and node.inputs[1] is not None and node.inputs[1].name == linear.tensors[0]
    )


def weights(model: Model, linear: Linear) -> np.ndarray:
    """Return the weights of a layer as the device multiplies with them: (outputs, inputs) float32."""
    if linear.scheme is not None:
        return quantized(model, linear).dequantize()[:, : linear.inputs]
    weight = _array(model, linear.tensors[0]).astype(np.float32, copy=False)
    return weight if linear.outputs_first else weight.T


def quantized(model: Model, linear: Linear) -> Quantized:
    """Return the codes, scales and zero points of a quantized layer."""
    assert linear.scheme is not None
    codes, scales, *points = (_array(model, name) for name in linear.tensors)
    return unpack(codes, scales, points[0] if points else None, linear.scheme, linear.outputs)


def layer_name(initializer: str) -> str:
    """Return the layer of an initializer: `model.layers.0.attn.o_proj.MatMul.weight_Q4` is of `model.layers.0.attn.o_proj`."""
    return initializer.split(".MatMul.weight")[0]


def parts(layer: str, parameters: Mapping[str, tuple[int, ...]]) -> list[tuple[str, slice]]:
    """Say which parameters of the Hugging Face model a layer of the graph holds, stacked along its outputs.

    The builder fuses q, k and v (and gate and up) into one matrix, in that order, unless the model has them fused already.

    Args:
        layer: name of a layer of the graph.
        parameters: shape of each parameter of the Hugging Face model.

    Returns:
        (parameter, its rows in the layer's (outputs, inputs) weight) each; empty where the model has no such layer.
    """
    own = layer.replace(".attn.", ".self_attn.")
    if layer == HEAD and f"{HEAD}.weight" not in parameters:
        own = EMBEDDING  # tied
    if f"{own}.weight" in parameters:
        return [(f"{own}.weight", slice(0, parameters[f"{own}.weight"][0]))]
    stem, _, last = own.rpartition(".")
    found, start = [], 0
    for name in (f"{stem}.{part}.weight" for part in FUSED.get(last, ())):
        if name not in parameters:
            return []
        rows = parameters[name][0]
        found.append((name, slice(start, start + rows)))
        start += rows
    return found


def hugging_face_weights(model: Model, parameters: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the graph's matrices by the names that the Hugging Face model gives them, (outputs, inputs) float32.

    What the graph has as vectors (norms, biases) is never quantized and not in the result.

    Raises:
        BadArtifact: a linear layer of the graph is none of the model's.
    """
    result: dict[str, np.ndarray] = {}
    for linear in linears(model):
        found = parts(linear.name, parameters)
        if not found:
            raise BadArtifact(
                f"the graph's layer {linear.name} is no layer of the baseline model", "give the model that the package was exported from"
            )
        weight = weights(model, linear)
        for name, rows in found:
            result[name] = weight[rows]
    table = embedding(model)
    if table is not None and f"{EMBEDDING}.weight" in parameters:
        result.setdefault(f"{EMBEDDING}.weight", weights(model, table))
    return result


def _quantized(node: Any) -> Linear:
    names = tuple(value.name for value in node.inputs[1:4] if value is not None)
    scheme = Scheme(_integer(node, "bits"), _integer(node, "block_size"))
    level = node.attributes.get("accuracy_level")
    return Linear(layer_name(names[0]), _integer(node, "K"), _integer(node, "N"), scheme, level.as_int() if level is not None else 0, names)


def _integer(node: Any, attribute: str) -> int:
    return int(node.attributes[attribute].as_int())


def _source(value: Any) -> str:
    """Return the initializer behind a value, through the Reshape or Transpose that a tied embedding needs."""
    while (node := value.producer()) is not None:
        value = node.inputs[0]
    return value.name


def _array(model: Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    if tensor is None:
        raise BadArtifact(f"the graph's tensor {name} has no content", "export the model again")
    return tensor.numpy()
