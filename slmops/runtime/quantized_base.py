"""What does a package really multiply with, and how does a PyTorch model get the very same weights?

A package's matrices are codes on a grid. Dequantized, and put into the float model in place of its own, they make the
model that the device has, up to its arithmetic: the frozen base of an adapter that is trained on what ships
(`finetune --quantized-base`), and the twin that `verify` holds a package against.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops import artifact, environment
from slmops.artifact import Artifact
from slmops.errors import BadArtifact, Unavailable
from slmops.graph.linears import hugging_face_weights, load_graph
from slmops.graph.rewriting import FULL
from slmops.runtime import hugging_face
from slmops.runtime.engines import engine_of

if TYPE_CHECKING:
    from torch import nn

ROLE = "quantized_base"
"""Of the input that an adapter's manifest names; its hash is `weights_hash`."""


@dataclass(frozen=True)
class QuantizedBase:
    """An export or a package whose weights are the frozen base of an adapter."""

    folder: Path
    sha256: str
    """`weights_hash` of its weights."""
    facts: dict[str, Any]
    """Its kind, precision, block size asked for (None: by rule) and recipe: what it takes to make it again."""

    @property
    def is_float(self) -> bool:
        """Its weights are not quantized: training on them is training on the model itself."""
        return self.facts["precision"] == "fp32"


def find_quantized_base(folder: Path, base: Path) -> QuantizedBase:
    """Return an export or a package as the frozen base of an adapter, once it is seen to be of that very model.

    Args:
        folder: an export, or a package (its base is taken, without its adapters).
        base: the Hugging Face folder of the model that is fine-tuned.

    Raises:
        BadArtifact: neither, incomplete or changed, or made of another model.
        Unavailable: the library that reads graphs is missing.
    """
    engine = engine_of(folder)
    if engine is not None and engine.name != "genai":
        raise Unavailable(
            f"{folder} is an export for {engine.title}, and adapters are trained on the weights of one for onnxruntime only",
            f"slmops export {base} -o OUT --device cpu, or train without --quantized-base",
        )
    environment.require("onnx_ir", "to read the weights of a quantized base")
    found = artifact.load(folder, kinds=("export", "package"))
    artifact.check(found)
    recorded = found.manifest.input("baseline")
    if recorded is None or not recorded.matches(base):
        raise BadArtifact(
            f"{folder} was not made of {base}: it is a quantized {recorded.path if recorded else 'model that it does not name'}",
            f"export that very model: slmops export {base} -o OUT",
        )
    facts, config = found.manifest.facts, found.manifest.config
    kept = {
        "kind": found.manifest.kind,
        "block_size": config.get("block_size"),
        **{name: facts.get(name) for name in ("precision", "recipe")},
    }
    return QuantizedBase(folder, weights_hash(read_weights(folder, base)), kept)


def read_weights(folder: Path, base: Path) -> dict[str, np.ndarray]:
    """Return the matrices of an export or a package, dequantized: by the model's names, (outputs, inputs) float32.

    Raises:
        BadArtifact: no graph there, or one of another model.
    """
    return hugging_face_weights(load_graph(folder / FULL), hugging_face.parameter_shapes(base))


def weights_hash(values: Mapping[str, np.ndarray]) -> str:
    """Return a hash of dequantized weights, the same whatever folder they lie in and however its file is laid out.

    Not of the data file: a package with adapters orders its tensors otherwise than the export of the same base, and a
    grid that was computed again gives the same weights. (code - zero point) * scale is one exact difference and one
    rounded product, so every machine gets the same bits.
    """
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(values[name], dtype="<f4").data)
    return digest.hexdigest()


def load_dequantized(base: Path, quantized: QuantizedBase, *, precision: str = "fp32") -> nn.Module:
    """Load a model with the weights of its export or package in place of its own.

    Args:
        base: the Hugging Face folder that it was made of.
        quantized: where the weights are, and which they must be.
        precision: of the weights in memory: fp32 holds them exactly, bf16 rounds them.

    Raises:
        BadArtifact: other weights than those named, or they do not fit the model.
    """
    values = read_weights(quantized.folder, base)
    if weights_hash(values) != quantized.sha256:
        raise BadArtifact(
            f"{quantized.folder} does not hold the quantized weights asked for: their hash differs", _way_out(base, quantized)
        )
    model = hugging_face.load_model(base, precision=precision)
    put_weights(model, values)
    return model


def put_weights(model: nn.Module, values: Mapping[str, np.ndarray]) -> None:
    """Overwrite every matrix of a model, in place, so that tied ones stay tied.

    Args:
        model: a causal language model, not yet wrapped.
        values: by the names of its parameters, (outputs, inputs) each.

    Raises:
        BadArtifact: a matrix of the model is not among the values, or of another shape there.
    """
    torch = environment.require("torch", "to load a PyTorch model")
    # Both names of a tied matrix: the file of a model may use either, or both.
    own = dict(model.named_parameters(remove_duplicate=False))
    filled = {own[name].data_ptr() for name in values if name in own}
    empty = sorted(name for name, parameter in own.items() if parameter.dim() == 2 and parameter.data_ptr() not in filled)
    wrong = sorted(name for name, value in values.items() if name in own and tuple(own[name].shape) != value.shape)
    if empty or wrong:
        name = (empty or wrong)[0]
        raise BadArtifact(
            f"the graph's weights are not those of the model: {name} is {'not among them' if empty else 'of another shape'}",
            "give the model that the package was exported from",
        )
    with torch.no_grad():
        for name, value in values.items():
            if name in own:
                own[name].copy_(torch.tensor(value))


def quantized_base_of(adapter: Artifact, base: Path) -> QuantizedBase | None:
    """Return the quantized base that an adapter was trained on; None where it was trained on the model itself.

    Raises:
        BadArtifact: it is gone.
    """
    recorded = adapter.manifest.input(ROLE)
    if recorded is None:
        return None
    place = Path(os.path.normpath(adapter.path / recorded.path))
    quantized = QuantizedBase(place, recorded.sha256, adapter.manifest.facts[ROLE])
    if adapter.find(ROLE) is None:
        raise BadArtifact(
            f"{adapter.path} was trained on the quantized weights of {place}, and they are no longer there",
            _way_out(base, quantized),
        )
    return quantized


def refuse_merge(folder: Path, found: Artifact | None) -> None:
    """Refuse to merge an adapter that was trained on quantized weights: it belongs on them, and `pack` puts it there.

    Into the float model it would add a term that it never saw, the rounding that it learned around: an adapter of
    stories3m's SNIPS intents that answers 0.976 on its coarse base answers 0.731 on the float one. Into the dequantized
    weights the sum is right (0.976 again), but exported it is rounded to another grid than the one it learned on, and
    `verify` could not be trusted to see what that costs. It measures the fine-tune from the float model, so the base's
    rounding E counts as a part of it beside the adapter's D: with the adapter gone the share is still
    |E|^2 / (|E|^2 + |D|^2), which is 0.08 for that adapter, and passes the bar of 0.95 for one a quarter of E.

    Raises:
        Unavailable: it was trained with `--quantized-base`.
    """
    recorded = found.manifest.input(ROLE) if found is not None else None
    if recorded is not None:
        raise Unavailable(
            f"{folder} was trained on the quantized weights of {recorded.path} and belongs on them: it cannot be merged",
            f"keep it as an adapter (slmops pack MODEL --adapter NAME={folder} -o PACKAGE), or train it without --quantized-base",
        )


def twin(folder: Path, weights: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, np.ndarray]]) -> nn.Module:
    """Return the PyTorch model of a folder with a package's weights in place of its own, in float32.

    Args:
        folder: of the model.
        weights: gives the package's matrices, (outputs, inputs), for the shapes of the model's parameters.
    """
    model = hugging_face.load_model(folder)
    put_weights(model, weights(hugging_face.parameter_shapes(folder)))
    return model


def _way_out(base: Path, quantized: QuantizedBase) -> str:
    """Quantization depends on weights and recipe alone: the same export gives the same weights."""
    block = quantized.facts.get("block_size")
    flags = f"--precision {quantized.facts.get('precision')}" + (f" --block-size {block}" if block else "")
    return f"make them again, they come out the same: slmops export {base} -o {quantized.folder} {flags}"
