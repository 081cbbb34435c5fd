"""Which matrices does an OpenVINO IR hold, how are they stored, and what are they in float?

optimum-intel keeps the names of the PyTorch parameters (`self.model.layers.0.mlp.up_proj.weight`), and nncf puts between a
constant of codes and its product: Convert, Subtract (zero point), Multiply (scale), Reshape (groups), Convert. What a
device multiplies with is asked of OpenVINO itself, which folds these nodes; nothing is unpacked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact

# OpenVINO's models and nodes; its stubs do not say what a node's class has.
Ir = Any

MODEL = "openvino_model.xml"
ROW = "row"
"""Block size of a recipe: a scale a row."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PRODUCTS = {"MatMul": 1, "Gather": 0}
"""Nodes that read a matrix, and at which input."""
_DEQUANTIZING = {"Convert", "Subtract", "Multiply", "Reshape"}


@dataclass(frozen=True)
class Matrix:
    """One matrix of an IR."""

    name: str
    """Of the model's parameter: `model.layers.0.mlp.up_proj.weight`."""
    shape: tuple[int, int]
    """(outputs, inputs)"""
    bits: int
    """Of a stored weight; 32 and 16 are float."""
    group_size: int
    """Inputs that share a scale; 0 where it is float, all of a row's inputs where a row has one scale."""
    symmetric: bool
    """It has no zero points."""
    value: Any
    """OpenVINO's output that gives it in float."""
    scale: Any
    """The constant of its scales; None where it is float."""

    @property
    def is_float(self) -> bool:
        """It is not quantized."""
        return self.group_size == 0

    @property
    def kind(self) -> str:
        """`up_proj`, `lm_head` ..."""
        return kind_of(self.name)

    @property
    def stored(self) -> str:
        """Say how it is stored, for people."""
        return _stored(self.bits, self.group_size, self.symmetric, self.shape[1])


def read_ir(path: Path) -> Ir:
    """Read an IR; its weights stay in their file until they are asked for.

    Raises:
        Unavailable: openvino is missing.
        BadArtifact: no such file, or not an IR.
    """
    openvino = environment.require("openvino", "to read an OpenVINO export")
    if not path.is_file() or not path.with_suffix(".bin").is_file():
        raise BadArtifact(f"{path} or its .bin is missing", "export the model again, or copy the folder again")
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise BadArtifact(f"OpenVINO cannot read {path}: {reason(error)}", "export the model again, or copy the folder again") from error


def matrices(ir: Ir) -> list[Matrix]:
    """Return the matrices of an IR in the order of execution; one that a tied head reads too is listed once."""
    found: dict[str, Matrix] = {}
    for node in ir.get_ordered_ops():
        place = _PRODUCTS.get(node.get_type_name())
        if place is None:
            continue
        value = node.input(place).get_source_output()
        constant, scale = _constants(value.get_node())
        if constant is None or value.get_partial_shape().rank.get_length() != 2 or not _name(constant).endswith(".weight"):
            continue
        matrix = _matrix(value, constant, scale)
        found.setdefault(matrix.name, matrix)
    return list(found.values())


def weights(matrix: Matrix) -> np.ndarray:
    """Return a matrix as the device multiplies with it: (outputs, inputs) float32."""
    openvino = environment.require("openvino", "to read an OpenVINO export")
    alone = openvino.Model([matrix.value], [], "weights")
    compiled = openvino.Core().compile_model(alone, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled([])[0], np.float32)


def steps(matrix: Matrix) -> np.ndarray | None:
    """Return the step of each group, (outputs, groups); None for a float matrix."""
    return None if matrix.scale is None else np.abs(matrix.scale.get_data(dtype=np.float32)).reshape(matrix.shape[0], -1)


def hugging_face_weights(ir: Ir) -> dict[str, np.ndarray]:
    """Return the matrices by the names that the Hugging Face model gives them, (outputs, inputs) float32."""
    return {matrix.name: weights(matrix) for matrix in matrices(ir)}


def problems(found: Sequence[Matrix], options: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Compare an IR's matrices with the model and with the options of its recipe; return one line per difference.

    Args:
        found: the matrices of the IR.
        options: `recipe.options` of its manifest; None where nothing says what was asked.
        shapes: of each parameter of the model.
    """
    names = {matrix.name for matrix in found}
    lines = [f"{name} is not in the IR" for name in shapes if is_matrix(name, shapes) and name not in names]
    for matrix in found:
        if matrix.name not in shapes:
            lines.append(f"{matrix.name} is no matrix of the model")
        elif tuple(shapes[matrix.name]) != matrix.shape:
            lines.append(f"{matrix.name} is {matrix.shape}, and the model's {tuple(shapes[matrix.name])}")
        wanted = wanted_of(matrix, options) if options is not None else matrix.stored
        if wanted != matrix.stored:
            lines.append(f"{matrix.name} is stored in {matrix.stored}, and the recipe says {wanted}")
    return lines


def wanted_of(matrix: Matrix, options: Mapping[str, Any]) -> str:
    """Say how a recipe stores a matrix, in the words of `Matrix.stored`."""
    layers = options.get("layers")
    if layers is None:
        return _stored(options["bits"], 0, symmetric=True, width=0)
    layer = layers.get(matrix.kind)
    if layer is None:
        return "nothing"
    width = matrix.shape[1]
    return _stored(layer["bits"], width if layer["block_size"] == ROW else layer["block_size"], not options["zero_points"], width)


def reason(error: Exception) -> str:
    """Return the last line of an exception of OpenVINO's: the ones before say where in its source it was thrown."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else repr(error)


def _stored(bits: int, group_size: int, symmetric: bool, width: int) -> str:
    if not group_size:
        return f"float{bits}"
    groups = "a scale a row" if group_size == width else f"groups of {group_size}"
    return f"{bits} bits{'' if symmetric else ' with zero points'}, {groups}"


def kind_of(name: str) -> str:
    """Return the kind of layer of a parameter: `up_proj`, `lm_head` ..."""
    return name.removesuffix(".weight").rpartition(".")[2]


def is_matrix(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether a parameter of the model is one of its linear layers, or the embedding."""
    return len(shapes[name]) == 2 and re.search(r"(proj|embed_tokens|lm_head|fc\d?|dense)\.weight$", name) is not None


def _name(constant: Any) -> str:
    """Return the parameter of a constant; OpenVINO renames what it saves in fp16."""
    return constant.get_friendly_name().removeprefix("self.").removesuffix("_compressed")


def _matrix(value: Any, constant: Any, scale: Any) -> Matrix:
    outputs, inputs = (int(size) for size in value.get_shape())
    stored = constant.output(0).get_element_type()
    groups = int(np.prod(scale.output(0).get_shape())) // outputs if scale is not None else 0
    symmetric = not any(node.get_type_name() == "Subtract" for node in _chain(value.get_node()))
    return Matrix(
        _name(constant),
        (outputs, inputs),
        stored.bitwidth,
        inputs // groups if groups else 0,
        symmetric,
        value,
        scale,
    )


def _constants(node: Any) -> tuple[Any, Any]:
    """Return the constant behind a matrix, and that of its scales; (None, None) where no constant is behind it."""
    nodes = _chain(node)
    if nodes[-1].get_type_name() != "Constant" or not {each.get_type_name() for each in nodes[:-1]} <= _DEQUANTIZING:
        return None, None
    scaling = [each for each in nodes if each.get_type_name() == "Multiply"]
    return nodes[-1], _chain(scaling[0].input(1).get_source_output().get_node())[-1] if scaling else None


def _chain(node: Any) -> list[Any]:
    """Return a node, its first input, that one's, and so on."""
    nodes = [node]
    while nodes[-1].get_input_size():
        nodes.append(nodes[-1].input(0).get_source_output().get_node())
    return nodes
