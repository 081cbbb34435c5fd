"""How is each layer of a model quantized for a target? A rule on the layer's shape, measured, and never padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from slmops.errors import InvalidInput
from slmops.graph.linears import Linear
from slmops.graph.quantization import Scheme

_BLOCK_SIZES = (256, 128, 64, 32, 16)  # what onnxruntime 1.31's CPU kernel takes


@dataclass(frozen=True)
class Recipe:
    """The rule of one precision."""

    name: str
    bits: int
    """0: weights stay float."""
    largest_block: int = 0
    fewest_blocks: int = 0
    """A row of weights has at least so many scales."""
    block_size: int | None = None
    """Asked for by the user: for every layer that it divides."""
    chosen: dict[str, Scheme] = field(default_factory=dict)

    def scheme(self, linear: Linear) -> Scheme:
        """Return a layer's scheme, and remember it for the manifest.

        Raises:
            InvalidInput: no block size divides the layer, or the one asked for does not.
        """
        kind = linear.name.rsplit(".", 1)[-1]
        scheme = Scheme(self.bits, self._block(linear))
        self.chosen[kind] = scheme
        return scheme

    def document(self) -> dict[str, Any]:
        """Return the recipe as manifests hold it."""
        options: dict[str, Any] = {"bits": self.bits or 32}
        if self.bits:
            options["layers"] = {kind: {"bits": s.bits, "block_size": s.block_size} for kind, s in self.chosen.items()}
            options |= {"zero_points": True, "accuracy_level": 4, "rounding": "least squares"}
        return {"id": self.name, "options": options}

    def _block(self, linear: Linear) -> int:
        if self.block_size is not None:
            if linear.inputs % self.block_size:
                raise InvalidInput(
                    f"block_size: {self.block_size} does not divide the {linear.inputs} inputs of {linear.name}",
                    f"use {self._by_rule(linear.inputs)}, or leave it out: the rule never pads",
                )
            return self.block_size
        return self._by_rule(linear.inputs)

    def _by_rule(self, inputs: int) -> int:
        dividing = [block for block in _BLOCK_SIZES if inputs % block == 0]
        if not dividing:
            raise InvalidInput(f"no block size divides a layer of {inputs} inputs (they are multiples of 16)", "use --precision fp32")
        fitting = [block for block in dividing if block <= self.largest_block and inputs // block >= self.fewest_blocks]
        return fitting[0] if fitting else dividing[-1]


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
        return Recipe(name="cpu-int8", bits=8, largest_block=64, fewest_blocks=1, block_size=block_size)
    return Recipe(name="cpu-int4", bits=4, largest_block=128, fewest_blocks=6, block_size=block_size)
