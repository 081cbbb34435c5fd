"""What does Olive get from a pass of ours, and what of its own does it hand us? Folders there, model handlers here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slmops import artifact
from slmops.artifact import Artifact
from slmops.errors import InvalidInput, SlmopsError

_GRAPH = "model.onnx"


@contextmanager
def told_to_olive() -> Iterator[None]:
    """Let an error of slmops end the workflow: Olive swallows all but a few kinds, and ends with exit code 0.

    Raises:
        ValueError: with the error's message and hint.
    """
    try:
        yield
    except SlmopsError as error:
        raise ValueError(f"{error.message} ({error.hint})" if error.hint else error.message) from error


def model_folder(model: Any) -> Path:
    """Return the folder of a Hugging Face model that a pass is given.

    Raises:
        InvalidInput: the model carries an adapter that is not merged, or is no folder.
    """
    if model.adapter_path:
        raise InvalidInput(
            f"the model carries the adapter {model.adapter_path}, and an export of it would be the base alone",
            "put a MergeAdapterWeights pass before this one, or use SlmopsPack",
        )
    return base_folder(model)


def base_folder(model: Any) -> Path:
    """Return the folder of the base model that a pass is given.

    Raises:
        InvalidInput: it is no folder.
    """
    place = Path(str(model.model_path))
    if not place.is_dir():
        raise InvalidInput(f"input_model: no such folder: {place}", "give the folder of a Hugging Face model")
    return place


def handler_of(made: Artifact) -> Any:
    """Return the handler of a folder that slmops wrote, with the manifest made fit for Olive's copying of it."""
    from olive.model import CompositeModelHandler, ONNXModelHandler

    anchored(made)
    folder = made.path
    if (folder / _GRAPH).is_file():
        return ONNXModelHandler(model_path=str(folder), onnx_file_name=_GRAPH)
    # Several graphs, or none of ONNX: with this attribute Olive copies the folder as it is (olive 0.13, cache.py:397).
    graphs = sorted(file.name for file in folder.glob("*.onnx"))
    parts = [ONNXModelHandler(model_path=str(folder), onnx_file_name=name) for name in graphs]
    names = [name.removesuffix(".onnx") for name in graphs]
    return CompositeModelHandler(parts, names, model_path=str(folder), model_attributes={"no_flatten": True})  # pyright: ignore[reportArgumentType]


def anchored(made: Artifact) -> Artifact:
    """Write the inputs of an artefact as absolute paths: Olive copies the folder elsewhere, and relative ones would lead nowhere."""
    inputs = [
        item if item.revision else item.model_copy(update={"path": os.path.normpath(made.path.resolve() / item.path)})
        for item in made.manifest.inputs
    ]
    return artifact.seal(made.path, inputs=inputs)
