"""How do float weights become codes on a grid, and back?

Weights are quantized in blocks along the input dimension; each block has a scale and a zero point:
`weight = (code - zero_point) * scale`. This is what onnxruntime's MatMulNBits and GatherBlockQuantized compute
(onnxruntime 1.31, docs/ContribOperators.md), so a dequantized matrix here is the matrix that the device multiplies with.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

# The range of 4 bits is shrunk by these before rounding: clipping the rarest values buys a finer step for all others. In blocks of up to 64
# no further ones win (on Gaussian, heavy-tailed and trained weights, 0.00 % of the squared error); in 256 they are worth 1.4 %.
_SHRINK, _SHRINK_LONG, _LONG_BLOCK = (0.95, 0.9), (0.95, 0.9, 0.85, 0.8), 128
# Weights per piece of work. Smaller ones would stay nearer to a core, but the interpreter, which threads share, would be what they wait for:
# 64 K take 2.2 times as long.
_PIECE = 1 << 18
# Blocks whose codes are turned back at a time: where there is a power of two of them, all at once takes five times as long.
_TURNED = 256


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized."""

    bits: int
    """4 or 8."""
    block_size: int
    """Weights that share a scale: 16, 32, 64, 128 or 256, and a divisor of the input dimension."""


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix of `outputs` x `inputs` weights."""

    codes: np.ndarray
    """(outputs, blocks, block_size), uint8, below 2 ** bits."""
    scales: np.ndarray
    """(outputs, blocks), float32."""
    zero_points: np.ndarray
    """(outputs, blocks), uint8."""
    scheme: Scheme

    def dequantize(self) -> np.ndarray:
        """Return the weights, (outputs, inputs) float32."""
        steps = self.codes.astype(np.float32) - self.zero_points.astype(np.float32)[..., None]
        return (steps * self.scales[..., None]).reshape(self.codes.shape[0], -1)


def quantize(weight: np.ndarray, scheme: Scheme, threads: int | None = None) -> Quantized:
    """Quantize a matrix, choosing each block's scale and zero point by least squares.

    Each block tries a few ranges; for each, codes are rounded and the scale is fitted to them in closed form (as the
    k-quants of llama.cpp do); the one of the smallest squared error wins. The result depends on the weights alone.

    Args:
        weight: (outputs, inputs), float.
        scheme: bits and block size; the block size divides `inputs`.
        threads: that share the work; all of the machine's unless given.

    Raises:
        ValueError: the block size does not divide the input dimension.
    """
    outputs, inputs = weight.shape
    if inputs % scheme.block_size:
        raise ValueError(f"block size {scheme.block_size} does not divide {inputs} inputs")
    blocks = inputs // scheme.block_size
    rows = max(1, _PIECE // inputs)
    pieces = [weight[at : at + rows] for at in range(0, outputs, rows)]

    def work(piece: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _quantize_blocks(piece.astype(np.float32, copy=False).reshape(-1, scheme.block_size), scheme.bits)

    if threads == 1:
        done = [work(piece) for piece in pieces]
    else:
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            done = list(pool.map(work, pieces))
    codes, scales, zero_points = (np.concatenate(parts) for parts in zip(*done, strict=True))
    return Quantized(
        codes=codes.reshape(outputs, blocks, scheme.block_size),
        scales=scales.reshape(outputs, blocks),
        zero_points=zero_points.reshape(outputs, blocks),
        scheme=scheme,
    )


Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Weights, scales and zero points in the layout of MatMulNBits: see `pack`."""


def pack(matrix: Quantized) -> Packed:
    """Return (weights, scales, zero points) in the layout of MatMulNBits: the low nibble is the earlier of two codes.

    Returns:
        weights (outputs, blocks, block_size * bits / 8) uint8, scales (outputs, blocks) float32, zero points
        (outputs, ceil(blocks * bits / 8)) uint8.
    """
    if matrix.scheme.bits == 8:
        return matrix.codes, matrix.scales, matrix.zero_points
    return _nibbles(matrix.codes), matrix.scales, _nibbles(matrix.zero_points)


def unpack(weights: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, scheme: Scheme, outputs: int) -> Quantized:
    """Read the tensors of a MatMulNBits node; the inverse of `pack`. No zero points means the middle of the range."""
    blocks = scales.size // outputs
    codes = weights.reshape(outputs, blocks, -1)
    if scheme.bits == 4:
        codes = _codes(codes)
    if zero_points is None:
        points = np.full((outputs, blocks), 1 << (scheme.bits - 1), np.uint8)
    elif scheme.bits == 4:
        points = _codes(zero_points.reshape(outputs, -1))[:, :blocks]
    else:
        points = zero_points.reshape(outputs, blocks)
    return Quantized(codes, scales.reshape(outputs, blocks).astype(np.float32), points, scheme)


def _quantize_blocks(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize (blocks, block_size) float32; return codes, scales and zero points.

    Blocks stand side by side meanwhile, (block_size, blocks): what is one number a block then meets its weights in long loops.
    """
    x = np.ascontiguousarray(x.T)
    top = np.float32(2**bits - 1)
    room = np.empty_like(x)
    low, high = np.minimum(x.min(0), 0.0), np.maximum(x.max(0), 0.0)
    step = np.maximum((high - low) / top, np.float32(1e-12))
    zero = np.clip(np.rint(-low / step), 0, top)
    best = _round_and_fit(x, step, zero, top, room)
    shrinks = _SHRINK if len(x) < _LONG_BLOCK else _SHRINK_LONG
    for shrink in shrinks if bits == 4 else ():
        best = _better(best, _round_and_fit(x, step * np.float32(shrink), zero, top, room))
    for offset in (-1, 1) if bits == 4 else ():
        best = _better(best, _round_and_fit(x, best[2], np.clip(zero + np.float32(offset), 0, top), top, room))
    step, zero, scale, _ = _better(best, _round_and_fit(x, best[2], best[1], top, room))
    codes = _rounded(x, step, zero, top, room)
    codes += zero
    turned = np.empty(codes.shape[::-1], np.uint8)
    for at in range(0, len(turned), _TURNED):
        turned[at : at + _TURNED] = codes[:, at : at + _TURNED].astype(np.uint8).T
    return turned, scale, zero.astype(np.uint8)


_Fit = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of each block: the step that codes are rounded with, the zero point, the scale fitted to the codes, and what that takes off the squared error."""


def _round_and_fit(x: np.ndarray, step: np.ndarray, zero: np.ndarray, top: np.float32, room: np.ndarray) -> _Fit:
    """Round x (block_size, blocks) to the grid, then fit the scale to the codes by least squares.

    With d = code - zero the best scale is <d, x> / <d, d>, and it takes <d, x>^2 / <d, d> off the squared error: so
    candidates are compared by that, no residual is ever formed, and codes are kept of none: the winner's are rounded again.
    """
    distance = _rounded(x, step, zero, top, room)
    energy, agreement = np.einsum("ij,ij->j", distance, distance), np.einsum("ij,ij->j", distance, x)
    usable = (energy > 0) & (agreement > 0)
    energy = np.where(usable, energy, np.float32(1))
    scale = np.where(usable, agreement / energy, step)
    return step, zero, scale, np.where(usable, agreement * agreement / energy, np.float32(0))


def _rounded(x: np.ndarray, step: np.ndarray, zero: np.ndarray, top: np.float32, out: np.ndarray) -> np.ndarray:
    """Return code - zero of each weight, (block_size, blocks) float32, in `out`."""
    np.divide(x, step, out=out)
    np.rint(out, out=out)
    np.maximum(out, -zero, out=out)
    return np.minimum(out, top - zero, out=out)


def _better(best: _Fit, other: _Fit) -> _Fit:
    """Return, block by block, the fit of the smaller error."""
    wins = other[3] > best[3]
    step, zero, scale, gain = (np.where(wins, new, old) for old, new in zip(best, other, strict=True))
    return step, zero, scale, gain


def _nibbles(values: np.ndarray) -> np.ndarray:
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _codes(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
