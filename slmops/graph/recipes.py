"""How is each layer of a model quantized for a target? A rule on the layer's shape, measured, and never padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slmops.errors import InvalidInput
from slmops.graph.linears import Linear
from slmops.graph.quantization import Scheme

_BLOCK_SIZES = (256, 128, 64, 32, 16)  # what onnxruntime 1.31's CPU kernel takes (512 is refused at load)
# Of a 4-bit layer: block size, and the fewest scales that a row must keep with it. Larger blocks are faster (a prompt of
# 128 tokens: 64 takes 0.91 of the time of 32, 128 takes 0.70, 256 takes 0.61) and coarser: three 64s a row ruin a 192-wide
# model (KL 0.35 against 0.27 with 32), while six 256s in place of twelve 128s cost a down projection next to nothing
# (0.288 against 0.280).
_LARGE_BLOCKS, _SMALL_BLOCK = ((256, 6), (128, 9), (64, 9)), 32
# The projections of queries, keys and values hold 10 % of the weights and a quarter of what 4 bits lose (measured layer
# kind by layer kind); in 8 bits they take a third of the loss away, and a prompt runs faster, not slower.
_FRAGILE = ("qkv_proj", "q_proj", "k_proj", "v_proj")
_EIGHT_BIT_BLOCK = 64


@dataclass(frozen=True)
class Recipe:
    """The rule of one precision."""

    name: str
    bits: int
    """0: weights stay float."""
    block_size: int | None = None
    """Asked for by the user: for every layer that it divides."""
    chosen: dict[str, Scheme] = field(default_factory=dict)

    def scheme(self, linear: Linear) -> Scheme:
        """Return a layer's scheme, and remember it for the manifest.

        Raises:
            InvalidInput: no block size divides the layer, or the one asked for does not.
        """
        kind = linear.name.rsplit(".", 1)[-1]
        bits = 8 if kind in _FRAGILE else self.bits
        scheme = Scheme(bits, self._block(linear, bits))
        self.chosen[kind] = scheme
        return scheme

    def document(self) -> dict[str, Any]:
        """Return the recipe as manifests hold it."""
        options: dict[str, Any] = {"bits": self.bits or 32}
        if self.bits:
            options["layers"] = {kind: {"bits": s.bits, "block_size": s.block_size} for kind, s in self.chosen.items()}
            options |= {"zero_points": True, "accuracy_level": 4, "rounding": "least squares"}
        return {"id": self.name, "options": options}

    def _block(self, linear: Linear, bits: int) -> int:
        if self.block_size is None:
            return block_by_rule(linear.inputs, bits)
        if linear.inputs % self.block_size:
            raise InvalidInput(
                f"block_size: {self.block_size} does not divide the {linear.inputs} inputs of {linear.name}",
                f"use {block_by_rule(linear.inputs, bits)}, or leave it out: the rule never pads",
            )
        return self.block_size


def block_by_rule(inputs: int, bits: int) -> int:
    """Return the block size for a layer of so many inputs; it divides them.

    Raises:
        InvalidInput: no block size divides them.
    """
    dividing = [block for block in _BLOCK_SIZES if inputs % block == 0]
    if not dividing:
        raise InvalidInput(f"no block size divides a layer of {inputs} inputs (they are multiples of 16)", "use --precision fp32")
    if bits == 8:
        wanted = _EIGHT_BIT_BLOCK
    else:
        wanted = next((block for block, scales in _LARGE_BLOCKS if block in dividing and inputs // block >= scales), _SMALL_BLOCK)
    return max((block for block in dividing if block <= wanted), default=dividing[-1])


def recipe_for(precision: str, block_size: int | None = None) -> Recipe:
    """Return the recipe of a precision for the CPU.

    Raises:
        InvalidInput: a block size that no kernel takes, or for a float precision.
    """
    if precision not in ("int4", "int8"):
        if block_size is not None:
            raise InvalidInput(f"block_size: {precision} weights have no blocks", "leave --block-size out")
        return Recipe(name=f"cpu-{precision}", bits=0)
    if block_size is not None and block_size not in _BLOCK_SIZES:
        raise InvalidInput(f"block_size: {block_size} is none of {', '.join(map(str, reversed(_BLOCK_SIZES)))}", "leave --block-size out")
    if precision == "int8":
        return Recipe(name="cpu-int8", bits=8, block_size=block_size)
    return Recipe(name="cpu-int4", bits=4, block_size=block_size)
