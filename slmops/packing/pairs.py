"""How do the tensors of a PEFT folder become those of a graph's inputs?

PEFT holds A (rank, inputs) and B (outputs, rank) and multiplies by alpha / rank, or alpha / sqrt(rank) for rsLoRA
(Kalajdzievski 2023, arXiv 2312.03732). A graph's input takes A transposed, and B with the scale in it. A layer that the
graph fuses of several takes their pairs side by side along the rank, B with zeros where a pair has no rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import environment
from slmops.errors import BadArtifact, Unavailable
from slmops.graph.lora import A, B, Slot
from slmops.runtime.adapter_files import Tensors

_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


@dataclass(frozen=True)
class Pair:
    """The LoRA of one parameter: `B @ A * scale` is what is added to its weight."""

    a: np.ndarray
    """(rank, inputs)"""
    b: np.ndarray
    """(outputs, rank)"""
    scale: float


def read_pairs(adapter: Path, config: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the pairs of a LoRA folder by the parameter that each changes, such as `model.layers.0.mlp.up_proj.weight`.

    Raises:
        Unavailable: a tensor that is no A or B of a linear layer.
        BadArtifact: an A without its B, or ranks that do not fit.
    """
    safetensors = environment.require("safetensors", "to read an adapter")
    sides: dict[str, dict[str, np.ndarray]] = {}
    with safetensors.safe_open(adapter / "adapter_model.safetensors", framework="pt") as stored:  # numpy has no bfloat16
        for key in stored.keys():  # noqa: SIM118
            match = _NAME.fullmatch(key.removeprefix(_PREFIX))
            if match is None:
                raise Unavailable(
                    f"{adapter} holds {key}, which is no LoRA of a linear layer", f"give it a package of its own: slmops merge {adapter}"
                )
            sides.setdefault(match["module"], {})[match["side"]] = stored.get_tensor(key).float().numpy()
    pairs = {}
    for module, held in sides.items():
        if set(held) != {"A", "B"} or held["A"].ndim != 2 or held["A"].shape[0] != held["B"].shape[1]:
            raise BadArtifact(f"{adapter}: the pair of {module} is not whole", "copy the adapter again, or train it again")
        pairs[f"{module}.weight"] = Pair(held["A"], held["B"], scale_of(module, held["A"].shape[0], config))
    if not pairs:
        raise BadArtifact(f"{adapter} holds no tensors", "copy the adapter again, or train it again")
    return pairs


def scale_of(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies a module's product by; the first pattern of `alpha_pattern` that fits its name wins."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
    alpha = float(patterns[own] if own is not None else config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def graph_tensors(pairs: Mapping[str, Pair], slots: Sequence[Slot], adapter: Path) -> Tensors:
    """Return the tensors of an adapter file.

    Raises:
        Unavailable: the graph has no place for a pair (the embedding, the head).
        BadArtifact: a pair of another shape than the base's layer.
    """
    taken = {name for slot in slots for name, _ in slot.parts}
    lost = sorted(set(pairs) - taken)
    if lost:
        raise Unavailable(
            f"{adapter} adapts {lost[0].removesuffix('.weight')}, which a graph computes without adapters",
            f"give it a package of its own: slmops merge {adapter} -o MERGED, then slmops export MERGED -o PACKAGE",
        )
    tensors: Tensors = {}
    for slot in slots:
        held = [(name, pairs[name]) for name, _ in slot.parts if name in pairs]
        if held:
            for name, pair in held:
                _refuse_misfit(name, pair, slot, adapter)
            tensors[slot.name + A] = np.ascontiguousarray(np.concatenate([pair.a for _, pair in held]).T)
            tensors[slot.name + B] = _stacked(slot, dict(held))
    return tensors


def _stacked(slot: Slot, held: Mapping[str, Pair]) -> np.ndarray:
    """Return B (outputs, all ranks): each pair's in its own rows and columns."""
    result = np.zeros((slot.outputs, sum(pair.b.shape[1] for pair in held.values())), np.float32)
    row = column = 0
    for name, rows in slot.parts:
        if name in held:
            b = held[name].b
            result[row : row + rows, column : column + b.shape[1]] = np.float32(held[name].scale) * b
            column += b.shape[1]
        row += rows
    return result


def _refuse_misfit(name: str, pair: Pair, slot: Slot, adapter: Path) -> None:
    rows = dict(slot.parts)[name]
    if pair.a.shape[1] != slot.inputs or pair.b.shape[0] != rows:
        raise BadArtifact(
            f"{adapter}: {name} is ({pair.b.shape[0]}, {pair.a.shape[1]}), and the base's is ({rows}, {slot.inputs})",
            "pack it with the base that it was trained on",
        )
