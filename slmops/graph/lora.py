"""How does a decoder graph take adapters? Each linear layer gets a LoRA pair as optional inputs, at next to no cost.

A pair is `A` (inputs, rank) and `B` (outputs, rank), PEFT's own layout of B, its scale multiplied in; the layer's
product y becomes `y + (x A) B'`. Both are graph inputs whose defaults have rank 0, so a session without an adapter
computes the base exactly, and any rank fits. Every pair has a symbolic rank of its own: with one shared name,
onnxruntime 1.31 reuses buffers across layers and fails when the ranks of two layers differ.

What it costs is measured in microseconds an operator and in bytes a token (a 135M shape, rank 16, 2 threads; decode as a
share of the base's):

- MatMul, MatMul and Add on fused projections, the obvious way: 0.73, and 0.93 without an adapter.
- Activations kept in two dimensions, so that Gemm adds the base's product itself (two operators a layer, not three): 0.76
  and 0.95-1.0. The two dimensions are `flatten`'s work.
- B as (outputs, rank), which Gemm reads in one pass: 0.78.
- gate and up with pairs of their own behind the graph's Split, so that no zeros of a block-diagonal B are read: 0.79.

Nothing is left to trim: of a trained adapter of rank 16 (SNIPS intents, all linears) it takes 16 directions to keep a layer's change
within 3 %, and 14 within 10 %.

Queries, keys and values stay one pair: their zeros cost less than the four operators that would avoid them.

What is left is the bytes (none of onnxruntime's products reads fewer: docs/libraries.md) and the 300 inputs, which cost 5 % by themselves. An
operator of our own reads half of them, in one input: 0.88, and prompts 0.9 of the base's speed. `save_fast_twin` writes the graph, for machines that have it (`slmops.runtime.operators`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slmops import environment
from slmops.errors import Unavailable
from slmops.graph.flattening import flatten
from slmops.graph.linears import HEAD, Linear, Model, Node, Value, linears, load_graph, parts, product_of
from slmops.graph.rewriting import ADAPTED, FAST, FULL, MAIN

# Names of inputs have at most 15 characters up to layer 999: longer ones are copied to the heap at every run, and 300 of
# them cost a 135M shape 7 % of its decode speed.
A, B = ".A", ".B"
ADAPTER, DOMAIN, OPERATOR = "adapter", "slmops", "Lora"
"""The one input of the graph for our operator, and the operator's name."""
_WAY_OUT = "merge the adapter and export it as a package of its own"


@dataclass(frozen=True)
class Slot:
    """One LoRA pair that a graph takes."""

    name: str
    """Number and kind of the layer, `12.gate_proj`: with `A` or `B`, the name of an input."""
    inputs: int
    outputs: int
    parts: tuple[tuple[str, int], ...]
    """Parameters of the Hugging Face model that the pair changes, stacked along its outputs, and the rows of each."""


def save_adapted_twins(folder: Path, parameters: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Let an export take adapters: write `model_adapters.onnx`, the last token's logits, and the graph with all logits anew.

    `model.onnx` stays as it is, the base alone. All three read the tensors of one data file.

    Args:
        folder: with the twins of an export.
        parameters: shape of each parameter of the Hugging Face model.

    Returns:
        The pairs that the graphs take.
    """
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    for source, written in ((MAIN, ADAPTED), (FULL, FULL)):
        graph = load_graph(folder / source)
        found = add_slots(graph, parameters)
        onnx_ir.save(graph, folder / written)
    return found


def save_fast_twin(folder: Path, parameters: Mapping[str, tuple[int, ...]]) -> list[list[tuple[str, list[int]]]]:
    """Write `model_adapters_fast.onnx`: the last token's logits, an adapter as one input, all pairs of a layer by one operator of ours.

    Args:
        folder: with the twins of an export.
        parameters: shape of each parameter of the Hugging Face model.

    Returns:
        For each node of the operator, in order: the slots of its layer, and of each the outputs of its parts.
    """
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    model = load_graph(folder / MAIN)
    default = onnx_ir.tensor(np.zeros(0, np.uint8), name=ADAPTER)
    adapter = onnx_ir.Value(name=ADAPTER, shape=onnx_ir.Shape(["bytes"]), type=onnx_ir.TensorType(default.dtype), const_value=default)
    layers = []
    for linear in linears(model):
        own = _slots_of(model, linear, parameters) if linear.name != HEAD else []
        if own:
            product = product_of(model, linear)
            y = _after_bias(model, product)
            users = list(y.uses())
            node = onnx_ir.node(OPERATOR, [product.inputs[0], y, adapter], attributes={"layer": len(layers)}, domain=DOMAIN)
            node.outputs[0].name = f"lora.{len(layers)}"
            model.graph.insert_after(y.producer(), node)
            for use in users:
                use.node.replace_input_with(use.idx, node.outputs[0])
            layers.append([(slot.name, [rows for _, rows in slot.parts]) for slot in own])
    model.graph.inputs.append(adapter)
    model.graph.initializers[ADAPTER] = adapter
    model.opset_imports[DOMAIN] = 1
    onnx_ir.save(model, folder / FAST)
    return layers


def slots(model: Model, parameters: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Return the LoRA pairs that a graph can take, in the order of execution: for every linear layer but the head.

    Args:
        model: a graph of an export.
        parameters: shape of each parameter of the Hugging Face model.
    """
    return [slot for linear in linears(model) if linear.name != HEAD for slot in _slots_of(model, linear, parameters)]


def add_slots(model: Model, parameters: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """Let a graph take LoRA pairs, in place; return its slots.

    Args:
        model: a graph of an export, without adapters.
        parameters: shape of each parameter of the Hugging Face model.

    Raises:
        Unavailable: a layer is used in a way that adapters cannot follow.
    """
    flat = flatten(model)
    found = []
    for linear in linears(model):
        own = _slots_of(model, linear, parameters) if linear.name != HEAD else []
        product = product_of(model, linear)
        split = _split(product)
        places = [_after_bias(model, product)] if len(own) == 1 else list(split.outputs) if split is not None else []
        if len(places) != len(own) and linear.name != HEAD:
            raise Unavailable(f"the graph splits {linear.name} in a way that adapters cannot follow", _WAY_OUT)
        for slot, place in zip(own, places, strict=False):
            _add_pair(model, slot, product.inputs[0], place, two_dimensional=place in flat)
        found += own
    twice = [name for name, count in Counter(slot.name for slot in found).items() if count > 1]
    if twice:
        raise Unavailable(f"two layers would share the adapter inputs {twice[0]}", _WAY_OUT)
    return found


def _slots_of(model: Model, linear: Linear, parameters: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    held = [(name, rows.stop - rows.start) for name, rows in parts(linear.name, parameters)]
    if len(held) == 2 and _split(product_of(model, linear)) is not None:
        return [Slot(_short(part[0].removesuffix(".weight")), linear.inputs, part[1], (part,)) for part in held]
    return [Slot(_short(linear.name), linear.inputs, linear.outputs, tuple(held))] if held else []


def _short(layer: str) -> str:
    number = re.search(r"\.layers\.(\d+)\.", layer)
    kind = layer.rpartition(".")[2].replace("gate_up_proj", "gate_up")  # whole it would be too long from layer 0 on
    return f"{number[1]}.{kind}" if number else layer


def _split(product: Node) -> Node | None:
    """Return the Split that alone takes a layer's product: the builder's fused gate and up have one."""
    users = [use.node for use in product.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == "Split" else None


def _after_bias(model: Model, product: Node) -> Value:
    """Return a layer's product, or what it is once its bias is added: onnxruntime fuses the two, and may go on doing so."""
    value = product.outputs[0]
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and any(v.name in model.graph.initializers for v in users[0].inputs):
        return users[0].outputs[0]
    return value


def _add_pair(model: Model, slot: Slot, x: Value, y: Value, *, two_dimensional: bool) -> None:
    """Put `y + (x A) B'` in the place of y."""
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    rank = f"r{len(model.graph.inputs)}"
    a = _optional_input(model, slot.name + A, slot.inputs, rank)
    b = _optional_input(model, slot.name + B, slot.outputs, rank)
    users = list(y.uses())
    if two_dimensional:
        down = onnx_ir.node("Gemm", [x, a])
        nodes = [down, onnx_ir.node("Gemm", [down.outputs[0], b, y], attributes={"transB": 1})]
    else:
        down = onnx_ir.node("MatMul", [x, a])
        up = onnx_ir.node("FusedMatMul", [down.outputs[0], b], attributes={"transB": 1}, domain="com.microsoft")
        nodes = [down, up, onnx_ir.node("Add", [y, up.outputs[0]])]
    # Short names: they are half of what a pair adds to the file of the graph.
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{slot.name}.{number}"
    model.graph.insert_after(y.producer(), nodes)
    for use in users:
        use.node.replace_input_with(use.idx, nodes[-1].outputs[0])


def _optional_input(model: Model, name: str, width: int, rank: str) -> Value:
    """Add a graph input (width, rank) whose default has rank 0."""
    onnx_ir = environment.require("onnx_ir", "to rewrite a graph")
    default = onnx_ir.tensor(np.zeros((width, 0), np.float32), name=name)
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape([width, rank]), type=onnx_ir.TensorType(default.dtype), const_value=default)
    model.graph.inputs.append(value)
    model.graph.initializers[name] = value
    return value
