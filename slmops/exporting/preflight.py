"""What can be known of an export before any weight is loaded, and what bounds its length?"""

from __future__ import annotations

from pathlib import Path

from slmops import environment
from slmops.artifact import Artifact, Draft
from slmops.data import Interface, choose_interface
from slmops.errors import RunFailed
from slmops.graph.shapes import DEFAULT_POSITIONS, Shape, read_shape, refuse_unrunnable
from slmops.runtime import hugging_face

# Peak memory and disk over the model's float32 bytes, by the bits of the weights, and the memory that the libraries take whatever the
# model (docs/memory.md). What is quantized is held as it will be stored; of a float graph the file is mapped. Other
# roads than the CPU's (None) hold the model in float.
_MEMORY: dict[int | None, float] = {4: 0.4, 8: 0.65, 0: 1.0, None: 1.4}
_DISK: dict[int | None, float] = {4: 0.5, 8: 0.8, 0: 1.3, None: 2.0}
_MEMORY_OF_LIBRARIES = 1_000_000_000


def preflight(model: Path, out: Path, bits: int | None = None) -> Shape:
    """Refuse what cannot work, before any weight is loaded.

    Args:
        model: Hugging Face folder.
        out: to be written.
        bits: of the weights of a graph for the CPU, 0 for float; None: for another device, or not known.

    Raises:
        Unavailable: the builder does not know the architecture, or the runtime cannot run its shape.
        RunFailed: too little memory or disk.
    """
    shape = read_shape(model)
    refuse_unrunnable(shape)
    float32_bytes = 4 * hugging_face.parameter_count(model)
    needed, (_, available) = round(_MEMORY[bits] * float32_bytes) + _MEMORY_OF_LIBRARIES, environment.memory_bytes()
    if available and needed > available:
        raise RunFailed(
            f"the export needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available",
            f"close other programs{', use --precision int4' if bits in (0, 8) else ''} or use a larger machine",
        )
    environment.need_disk(out.parent, round(_DISK[bits] * float32_bytes), "the export")
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
