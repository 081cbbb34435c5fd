"""What does a package store, whatever engine runs it? The graph of onnxruntime-genai, or the IR of OpenVINO, behind one face."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slmops import targets
from slmops.errors import BadArtifact
from slmops.graph import checking, ir, linears, placement
from slmops.graph.rewriting import FULL
from slmops.runtime.engines import engine_of
from slmops.runtime.openvino_folder import stop_tokens_of
from slmops.runtime.static_decoder import DECODE, PORTABLE, PREFILL

Part = tuple[str, np.ndarray, np.ndarray | None]
"""A parameter of the Hugging Face model: its name, what the package multiplies with, (outputs, inputs) float32, and the step of
each block, (outputs, blocks), None where it is float."""
Shapes = Mapping[str, tuple[int, ...]]


class Stored(Protocol):
    """The weights of a package and what its runtime is told."""

    runtime: str
    """The runtime of a device, for messages."""
    config_file: str
    """Where that reads its stop tokens."""

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens at which the runtime ends an answer by itself."""
        ...

    @property
    def precision(self) -> str:
        """As the stored weights tell it."""
        ...

    @property
    def schemes(self) -> dict[str, int]:
        """How many layers are stored how."""
        ...

    def parts(self, shapes: Shapes) -> Iterator[Part]:
        """Yield the linear layers by the parameters of the Hugging Face model."""
        ...

    def weights(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """Return all matrices by the names of the Hugging Face model, (outputs, inputs) float32."""
        ...

    def problems(self, facts: Mapping[str, Any] | None, shapes: Shapes) -> list[str]:
        """Compare what is stored with the model's parameters and the recipe of the manifest's facts; return one line per difference."""
        ...


def stored_of(folder: Path) -> Stored:
    """Return what a folder stores."""
    engine = engine_of(folder)
    if engine is not None and engine.name == "openvino":
        return StoredIr(folder)
    return StoredStatic(folder) if engine is not None and engine.name == "qnn" else StoredGraph(folder)


class StoredGraph:
    """A graph that onnxruntime-genai runs."""

    runtime = "onnxruntime-genai"
    config_file = "genai_config.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its `genai_config.json`."""
        try:
            return json.loads((self.folder / self.config_file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadArtifact(f"{self.folder} has no genai_config.json that can be read: {error}", "export the model again") from None

    @cached_property
    def path(self) -> Path:
        """The graph with all logits."""
        return self.folder / FULL if (self.folder / FULL).is_file() else self.folder / self.config["model"]["decoder"]["filename"]

    @cached_property
    def graph(self) -> linears.Model:
        """That graph; its large tensors stay in their file until they are read."""
        return linears.load_graph(self.path)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """See `Stored`."""
        raw = self.config["model"].get("eos_token_id")
        return tuple(raw) if isinstance(raw, list) else () if raw is None else (raw,)

    @property
    def precision(self) -> str:
        """See `Stored`."""
        bits = [linear.scheme.bits for linear in linears.linears(self.graph) if linear.scheme is not None]
        if bits:
            return f"int{min(bits)}"
        matrices = [value for value in self.graph.graph.initializers.values() if value.shape is not None and len(value.shape) == 2]
        types = {str(value.dtype) for value in matrices}
        return "fp16" if "FLOAT16" in types else "bf16" if "BFLOAT16" in types else "fp32"

    @property
    def schemes(self) -> dict[str, int]:
        """See `Stored`."""
        return _counted(self._scheme(linear) for linear in linears.linears(self.graph))

    def _scheme(self, linear: linears.Linear) -> str:
        if linear.scheme is not None:
            return f"{linear.scheme.bits} bits, blocks of {linear.scheme.block_size}"
        return str(self.graph.graph.initializers[linear.tensors[0]].dtype.name).lower()

    def parts(self, shapes: Shapes) -> Iterator[Part]:
        """See `Stored`."""
        for linear in linears.linears(self.graph):
            weight = linears.weights(self.graph, linear)
            steps = np.abs(linears.quantized(self.graph, linear).scales) if linear.scheme is not None else None
            for name, rows in linears.parts(linear.name, shapes):
                yield name, weight[rows], steps[rows] if steps is not None else None

    def weights(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Stored`."""
        return linears.hugging_face_weights(self.graph, shapes)

    def problems(self, facts: Mapping[str, Any] | None, shapes: Shapes) -> list[str]:
        """See `Stored`."""
        lines = self._layer_problems(shapes)
        if facts is None or "recipe" not in facts:
            return lines
        target = targets.find(facts["device"], facts["provider"], facts["precision"]) if "provider" in facts else None
        return lines + checking.problems(self.folder, facts["recipe"]["options"], target)

    def _layer_problems(self, shapes: Shapes) -> list[str]:
        """Say which layers are none of the model's, or have another size."""
        found = linears.linears(self.graph)
        lines = (
            [f"{linear.name} is no layer of the baseline" for linear in found if not linears.parts(linear.name, shapes)] if shapes else []
        )
        lines += [
            f"{linear.name} has {linear.outputs} outputs, and the baseline {total}"
            for linear in found
            if (total := sum(rows.stop - rows.start for _, rows in linears.parts(linear.name, shapes))) not in (0, linear.outputs)
        ]
        return lines


class StoredStatic(StoredGraph):
    """Graphs of fixed shapes, compiled for an NPU: their weights are read in the plain graphs that they were compiled from."""

    runtime = "the decode graph"

    @cached_property
    def path(self) -> Path:
        """The plain graph of a prompt's pieces."""
        return self.folder / PORTABLE / PREFILL

    def problems(self, facts: Mapping[str, Any] | None, shapes: Shapes) -> list[str]:
        """See `Stored`; and whether the compiled files are for the chip of the manifest, and hold what it says the NPU takes."""
        if facts is None or "recipe" not in facts:
            return []
        lines = self._layer_problems(shapes)
        for name in (PREFILL, DECODE):
            lines += checking.static_problems(self.folder / PORTABLE / name, facts["recipe"]["options"])
            lines += [f"{name}: {line}" for line in placement.compiled_problems(self.folder / PORTABLE / name, self.folder / name, facts)]
        return lines


class StoredIr:
    """An IR that openvino-genai runs."""

    runtime = "openvino-genai"
    config_file = "generation_config.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def matrices(self) -> list[ir.Matrix]:
        """The matrices of the IR."""
        self._ir = ir.read_ir(self.folder / ir.MODEL)  # its nodes live as long as it does
        return ir.matrices(self._ir)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """See `Stored`."""
        return stop_tokens_of(self.folder)

    @property
    def precision(self) -> str:
        """See `Stored`."""
        bits = [matrix.bits for matrix in self.matrices if not matrix.is_float]
        return f"int{min(bits)}" if bits else f"fp{min((matrix.bits for matrix in self.matrices), default=32)}"

    @property
    def schemes(self) -> dict[str, int]:
        """See `Stored`."""
        return _counted(matrix.stored for matrix in self.matrices)

    def parts(self, shapes: Shapes) -> Iterator[Part]:
        """See `Stored`."""
        return ((matrix.name, ir.weights(matrix), ir.steps(matrix)) for matrix in self.matrices)

    def weights(self, shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Stored`."""
        return {matrix.name: ir.weights(matrix) for matrix in self.matrices}

    def problems(self, facts: Mapping[str, Any] | None, shapes: Shapes) -> list[str]:
        """See `Stored`."""
        options = facts["recipe"]["options"] if facts is not None and "recipe" in facts else None
        return ir.problems(self.matrices, options, shapes)


def _counted(names: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts
