"""What is in an `.onnx_adapter` file, and does it fit the graph? The checks that onnxruntime does not make.

The runtime takes any tensors under any names: a wrong shape, half of the pairs or another base's adapter load without a
word, and fail at first use or never. So a file is read and checked here before the runtime sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact
from slmops.graph.lora import A, B

SUFFIX = ".onnx_adapter"

Tensors = dict[str, np.ndarray]
"""By graph input: `LAYER.lora_A` (inputs, rank) and `LAYER.lora_B` (outputs, rank), float32, the scale in B."""


def write_adapter(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write an adapter file."""
    ort = environment.require("onnxruntime", "to write an adapter file")
    content = ort.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # held: the runtime keeps no copy of their memory
    content.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    content.export_adapter(str(path))


def read_adapter(path: Path) -> Tensors:
    """Read an adapter file.

    Raises:
        BadArtifact: no such file, or not an adapter file.
    """
    ort = environment.require("onnxruntime", "to read an adapter file")
    if not path.is_file():
        raise BadArtifact(f"{path} is missing", "copy the package again")
    try:
        parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        # A copy: the arrays are views of memory that the file's object owns.
        return {name: np.array(value.numpy()) for name, value in parameters.items()}
    except Exception as error:  # the binding's own classes derive from Exception alone
        if not isinstance(error, RuntimeError | ValueError) and not type(error).__module__.startswith("onnxruntime"):
            raise
        raise BadArtifact(f"{path} is not an adapter file: {str(error).splitlines()[0][:200]}", "copy the package again") from error


def problems(tensors: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> list[str]:
    """Say what keeps an adapter from working on a graph, one line each.

    Args:
        tensors: of the adapter.
        widths: the first dimension of every LoRA input of the graph.
    """
    lines = [f"{name} is no input of the graph" for name in tensors if name not in widths]
    layers = sorted({name.removesuffix(A).removesuffix(B) for name in tensors})
    if not layers:
        lines.append("it holds no tensors")
    for layer in layers:
        pair = tensors.get(layer + A), tensors.get(layer + B)
        if pair[0] is None or pair[1] is None:
            lines.append(f"{layer} has {'B without A' if pair[0] is None else 'A without B'}")
            continue
        lines += _pair_problems(layer, pair[0], pair[1], widths)
    return lines


def widths(slots: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the first dimension of every LoRA input, from a package's `slots`: layer -> [inputs, outputs]."""
    return {layer + side: size for layer, sizes in slots.items() for side, size in zip((A, B), sizes, strict=True)}


def combine(adapters: Sequence[tuple[float, Mapping[str, np.ndarray]]]) -> Tensors:
    """Return the weighted sum of adapters as one adapter: their pairs side by side along the rank, the weight in B.

    With A = [A1 | A2] and B = [w1 B1 | w2 B2], A B' = w1 A1 B1' + w2 A2 B2'; ranks and layers may differ.
    """
    result: Tensors = {}
    for layer in sorted({name.removesuffix(A).removesuffix(B) for _, tensors in adapters for name in tensors}):
        held = [(weight, tensors) for weight, tensors in adapters if layer + A in tensors]
        result[layer + A] = np.concatenate([tensors[layer + A] for _, tensors in held], axis=1)
        result[layer + B] = np.concatenate([np.float32(weight) * tensors[layer + B] for weight, tensors in held], axis=1)
    return result


def _pair_problems(layer: str, a: np.ndarray, b: np.ndarray, widths: Mapping[str, int]) -> list[str]:
    lines = []
    for name, array in ((layer + A, a), (layer + B, b)):
        if array.dtype != np.float32:
            lines.append(f"{name} is {array.dtype}, and float32 is wanted")
        if array.ndim != 2 or array.shape[0] != widths.get(name, -1):
            lines.append(f"{name} is shaped {array.shape}, and ({widths.get(name)}, rank) is wanted")
        elif not np.isfinite(array).all():
            lines.append(f"{name} has values that are not finite")
    if a.ndim == b.ndim == 2 and a.shape[1] != b.shape[1]:
        lines.append(f"{layer} has A of rank {a.shape[1]} and B of rank {b.shape[1]}")
    return lines
