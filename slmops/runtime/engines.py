"""Which engine runs an exported folder, which of its files are the model, and how is it opened?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops.runtime.runner import ExportRunner


@dataclass(frozen=True)
class Engine:
    """A runtime of exported models."""

    name: str
    title: str
    """As messages say it."""
    marker: str
    """The file that a folder of it has."""
    weights: tuple[str, ...]
    """Patterns of the files that hold weights."""
    files: tuple[str, ...]
    """Patterns of all files of the model: weights, graphs, adapters."""
    library: str
    """What `slmops bench` imports before it times the loading."""


ENGINES = (
    Engine(
        "openvino",
        "OpenVINO",
        "openvino_model.xml",
        ("openvino_model.bin",),
        ("openvino_model.xml", "openvino_model.bin"),
        "openvino_genai",
    ),
    # Before onnxruntime-genai's own: a device without the plugin's Python package runs it by genai (`decoder-pipeline`).
    Engine("qnn", "a Qualcomm NPU", "prefill.onnx", ("*_qnn.bin",), ("*.onnx", "*_qnn.bin"), "onnxruntime"),
    Engine("genai", "onnxruntime-genai", "genai_config.json", ("*.data",), ("*.onnx", "*.data", "*.onnx_adapter"), "onnxruntime_genai"),
)


def engine_of(folder: Path) -> Engine | None:
    """Return the engine of an exported folder; None where it is none."""
    return next((engine for engine in ENGINES if (folder / engine.marker).is_file()), None)


def weights_bytes(folder: Path) -> int:
    """Return the size of an exported folder's weights."""
    engine = engine_of(folder)
    return sum(file.stat().st_size for pattern in engine.weights for file in folder.glob(pattern)) if engine is not None else 0


def model_bytes(folder: Path) -> int:
    """Return the size of an exported folder's model: graphs, weights and adapters."""
    engine = engine_of(folder)
    return sum(file.stat().st_size for pattern in engine.files for file in folder.rglob(pattern)) if engine is not None else 0


def open_export(folder: Path, threads: int) -> ExportRunner:
    """Load an exported folder by its engine, without adapters."""
    engine = engine_of(folder)
    if engine is not None and engine.name == "openvino":
        from slmops.runtime.openvino_runner import OpenvinoRunner

        return OpenvinoRunner(folder, threads)
    if engine is not None and engine.name == "qnn":
        from slmops.runtime.static_runner import StaticRunner

        return StaticRunner(folder, threads)
    from slmops.runtime.genai_runner import GenaiRunner

    return GenaiRunner(folder, threads)
