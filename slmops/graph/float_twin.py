"""What would a 16-bit graph compute? The same graph in float32, with its very weights, rounded where the graph rounds.

A CPU has no kernels for most of a float16 or bfloat16 graph. Its float twin has them: every 16-bit weight becomes the
float32 number that it is, and the output of every node that the graph keeps in 16 bits is rounded to them. Inside a node
the twin computes in float32, as the GPU's kernels accumulate. What it leaves out: roundings inside a fused operator (the
probabilities of an attention, the keys after a fused rotation) and the order of a GPU's sums.

It is made of the package's files, not of the model, so that what is wrong with the package is seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from slmops import artifact, environment
from slmops.graph.element_types import element_types
from slmops.graph.linears import Model, Value, load_graph
from slmops.graph.rewriting import DATA, FULL, MAIN

_HALVES = ("FLOAT16", "BFLOAT16")


def write_float_twin(package: Path, out: Path) -> Path:
    """Write the float twin of a package as a folder that the CPU runs: both graphs and the config.

    Args:
        package: an export in 16-bit floats, its products quantized or not.
        out: an empty folder.

    Raises:
        BadArtifact: a graph is missing or cannot be read.
    """
    ir = environment.require("onnx_ir", "to write a graph")
    full = load_graph(package / FULL)
    places = _places(full)
    to_float(full)
    ir.save(full, out / FULL, external_data=DATA)
    written = ir.load(out / FULL).graph.initializers
    main = load_graph(package / MAIN)
    shared = {name: written[name] for name, place in _places(main).items() if places.get(name) == place and name in written}
    to_float(main, shared)
    ir.save(main, out / MAIN)
    config = json.loads((package / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    config["model"]["decoder"]["filename"] = MAIN
    artifact.write_json(out / "genai_config.json", config)
    return out


def to_float(model: Model, shared: dict[str, Value] | None = None) -> None:
    """Turn a graph in 16-bit floats into float32 in place, rounding what it rounds.

    Args:
        model: the graph.
        shared: float32 tensors of another graph on the same data file, taken instead of a copy.
    """
    types = element_types(model)
    _convert_weights(model, shared or {})
    for value in (*model.graph.inputs, *model.graph.outputs):
        _declare(value)
    cache = {value.name for value in model.graph.outputs if value.name.startswith("present.")}
    for node in list(model.graph):
        _convert_attributes(node)
        for value in node.outputs:
            _declare(value)
            dtype = types.get(value.name)
            # The cache is written in place and cannot be rounded after the fact.
            if dtype is not None and dtype.name in _HALVES and value.name not in cache:
                _round(model, node, value, dtype)


def _convert_weights(model: Model, shared: dict[str, Value]) -> None:
    ir = environment.require("onnx_ir", "to write a graph")
    for name, value in model.graph.initializers.items():
        if name in shared:
            value.const_value, value.type = shared[name].const_value, shared[name].type
        elif value.dtype is not None and value.dtype.name in _HALVES:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=name)
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _convert_attributes(node: Any) -> None:
    ir = environment.require("onnx_ir", "to write a graph")
    if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()).name in _HALVES:
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    value = node.attributes.get("value") if node.op_type in ("Constant", "ConstantOfShape") else None
    if value is not None and value.as_tensor().dtype.name in _HALVES:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.as_tensor().numpy().astype(np.float32)))


def _round(model: Model, node: Any, value: Value, dtype: Any) -> None:
    """Let everybody who reads a value read it rounded to 16 bits."""
    ir = environment.require("onnx_ir", "to write a graph")
    name = value.name
    down = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=f"{name}/round")
    up = ir.node("Cast", [down.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}/rounded")
    uses = list(value.uses())
    up.outputs[0].shape, up.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_after(node, [down, up])
    for use in uses:
        if use.node is not down:
            use.node.replace_input_with(use.idx, up.outputs[0])
    value.name, down.outputs[0].name, up.outputs[0].name = f"{name}/exact", f"{name}/half", name
    model.graph.outputs[:] = [up.outputs[0] if output is value else output for output in model.graph.outputs]


def _declare(value: Value) -> None:
    ir = environment.require("onnx_ir", "to write a graph")
    if value.dtype is not None and value.dtype.name in _HALVES:
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _places(model: Model) -> dict[str, tuple[Any, ...]]:
    """Return where each large tensor lies in the data file."""
    ir = environment.require("onnx_ir", "to read a graph")
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: (t.location, t.offset, t.length) for name, t in tensors.items() if isinstance(t, ir.ExternalTensor)}
