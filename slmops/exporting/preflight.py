"""What can be known of an export before any weight is loaded, and what bounds its length?"""

from __future__ import annotations

from pathlib import Path

from slmops import environment
from slmops.artifact import Artifact, Draft
from slmops.data import Interface, choose_interface
from slmops.errors import RunFailed
from slmops.graph.shapes import DEFAULT_POSITIONS, Shape, read_shape, refuse_unrunnable
from slmops.runtime import hugging_face

# Peak memory over the model's float32 bytes, and what the libraries take whatever the model (`benchmarks/export_memory.py`): the
# builder holds the model as it is stored, and onnxruntime a float32 graph with an embedding that it transposes.
_MEMORY_FACTOR, _MEMORY_OF_LIBRARIES = 1.4, 1_000_000_000


def preflight(model: Path, out: Path) -> Shape:
    """Refuse what cannot work, before any weight is loaded.

    Raises:
        Unavailable: the builder does not know the architecture, or the runtime cannot run its shape.
        RunFailed: too little memory or disk.
    """
    shape = read_shape(model)
    refuse_unrunnable(shape)
    float32_bytes = 4 * hugging_face.parameter_count(model)
    needed, (_, available) = round(_MEMORY_FACTOR * float32_bytes) + _MEMORY_OF_LIBRARIES, environment.memory_bytes()
    if available and needed > available:
        raise RunFailed(
            f"the export needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available",
            "close other programs or use a larger machine",
        )
    environment.need_disk(out.parent, 2 * float32_bytes, "the export")
    return shape


def choose_bounded_interface(source: Path, found: Artifact | None, shape: Shape, asked: int | None, draft: Draft) -> Interface:
    """Return the interface that came with the model, or choose one, with the export's bound on the length.

    Args:
        source: the model's folder.
        found: its artefact.
        shape: of the model.
        asked: longest prompt and answer together, as the user wants it.
        draft: takes the warnings.
    """
    limit = min(asked or DEFAULT_POSITIONS, shape.positions)
    if found is not None and found.manifest.interface is not None:
        interface = Interface.model_validate(found.manifest.interface)
    else:
        interface, warnings = choose_interface(source, [], max_length_tokens=limit)
        for warning in warnings:
            draft.warn(warning)
    if asked and asked > shape.positions:
        draft.warn(f"max_length_tokens: {asked} is more than the model's {shape.positions} positions; bounded to them")
    return interface.model_copy(update={"max_length_tokens": limit})
