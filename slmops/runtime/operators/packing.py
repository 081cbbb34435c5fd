"""How does an adapter lie in memory for our operator? All of it in one run of bytes, in half precision, as it is read.

    header      magic, layers, pairs, 0                                             int32
    layers      first pair, count                                                   int32, one line a layer of the graph
    pairs       rank, inputs, outputs, first output, where A lies, where B lies     int32, offsets in units of 64 bytes
    then        A (rank, inputs), B (rank, outputs) of each pair, the scale in B    fp16

An adapter's file has pairs of fused layers side by side, B with zeros between them (`slmops.packing.pairs`); here each part of a layer has
its own, and no zeros are read. Half precision keeps a number to 5e-4 of itself (a product of the pair to 3e-4 of its size), which is
a tenth of what a weight in 8 bits keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slmops.errors import BadArtifact
from slmops.graph.lora import A, B

Layers = Sequence[Sequence[tuple[str, Sequence[int]]]]
"""By layer of the graph: its slots, and of each the outputs of the parts that are stacked in it."""

_MAGIC, _UNIT = 0x61726F4C, 64


def rounded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an adapter's tensors as half precision keeps them, in float32."""
    result: dict[str, np.ndarray] = {}
    for slot in _slots(tensors):
        a, b, powers = _balanced(tensors[slot + A], tensors[slot + B])
        result[slot + A] = np.ldexp(a.astype(np.float32), -powers)
        result[slot + B] = np.ldexp(b.astype(np.float32), powers)
    return result


def packed(tensors: Mapping[str, np.ndarray], layers: Layers) -> np.ndarray:
    """Return an adapter as our operator reads it, (bytes,) uint8.

    Args:
        tensors: of its file, by the inputs of `model_adapters.onnx`; layers without a pair are not in it.
        layers: of the graph that calls the operator.
    """
    places: list[tuple[int, int]] = []
    pairs: list[tuple[int, int, int, int]] = []
    arrays: list[np.ndarray] = []
    for layer in layers:
        first, output = len(pairs), 0
        for slot, parts in layer:
            held = slot + A in tensors
            a, b, _ = _balanced(tensors[slot + A], tensors[slot + B]) if held else (_NONE, _NONE, None)
            start = 0
            for outputs in parts:
                own = b[start : start + outputs]
                used = np.flatnonzero(own.any(axis=0))
                if used.size:
                    pairs.append((used.size, a.shape[0], outputs, output))
                    arrays += [a[:, used].T, own[:, used].T]
                start, output = start + outputs, output + outputs
        places.append((first, len(pairs) - first))
    return _joined(places, pairs, arrays)


_NONE = np.zeros((0, 0), np.float16)


def _joined(places: list[tuple[int, int]], pairs: list[tuple[int, int, int, int]], arrays: list[np.ndarray]) -> np.ndarray:
    at = _units(16 + 8 * len(places) + 24 * len(pairs))
    offsets = []
    for array in arrays:
        offsets.append(at)
        at += _units(array.nbytes)
    result = np.zeros(at * _UNIT, np.uint8)
    lines = [(*pair, *offsets[2 * i : 2 * i + 2]) for i, pair in enumerate(pairs)]
    tables = (np.array(part, "<i4").reshape(-1) for part in ((_MAGIC, len(places), len(pairs), 0), places, lines))
    head = np.concatenate(list(tables)).view(np.uint8)
    result[: head.size] = head
    for offset, array in zip(offsets, arrays, strict=True):
        result[offset * _UNIT :][: array.nbytes] = np.ascontiguousarray(array, "<f2").reshape(-1).view(np.uint8)
    return result


def _units(size: int) -> int:
    return -(-size // _UNIT)


def _slots(tensors: Mapping[str, np.ndarray]) -> list[str]:
    return [name.removesuffix(A) for name in tensors if name.endswith(A)]


def _balanced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A and B in half precision, and the power of two by which each column of A was raised and B's lowered.

    A small B (a rank that hardly learned) would lose its digits below 6e-5: what A has too much of, B gets.
    """
    largest = [np.abs(side).max(axis=0, initial=0) for side in (a, b)]
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.round(np.log2(largest[1] / largest[0]) / 2)
    powers = np.where(np.isfinite(powers), powers, 0).astype(np.int32)
    with np.errstate(over="ignore"):
        halves = np.ldexp(a, powers).astype(np.float16), np.ldexp(b, -powers).astype(np.float16)
    if not all(np.isfinite(side).all() for side in halves):
        raise BadArtifact(
            "the adapter has numbers that half precision cannot hold", "train it again: a LoRA pair's product of 1e9 is no fine-tune"
        )
    return *halves, powers
