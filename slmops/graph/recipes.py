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
# Products in int8 with the activations quantized a block at a time: 2.4 x the decode speed of float products on AVX512-VNNI.
ACCURACY_LEVEL = 4
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
    float_bits: int = 32
    """Of the weights that are not quantized, and of the activations."""
    accuracy_level: int = ACCURACY_LEVEL
    """Of MatMulNBits: 4 lets a kernel round the activations to 8 bits, 0 does not (onnxruntime, docs/ContribOperators.md)."""
    quantized_embedding: bool = True
    """The provider has a kernel that reads a quantized embedding."""
    even_blocks: bool = False
    """A row has an even number of 4-bit blocks."""
    largest_block: int = _BLOCK_SIZES[0]
    chosen: dict[str, Scheme] = field(default_factory=dict)

    def scheme(self, linear: Linear) -> Scheme:
        """Return a layer's scheme, and remember it for the manifest: see `rule`."""
        scheme = self.rule(linear)
        self.chosen[_kind(linear)] = scheme
        return scheme

    def rule(self, linear: Linear) -> Scheme:
        """Return a layer's scheme.

        Raises:
            InvalidInput: no block size divides the layer, or the one asked for does not.
        """
        bits = 8 if _kind(linear) in _FRAGILE else self.bits
        return Scheme(bits, self._block(linear, bits))

    def document(self) -> dict[str, Any]:
        """Return the recipe as manifests hold it."""
        options: dict[str, Any] = {"bits": self.bits or self.float_bits}
        if self.bits:
            options["layers"] = {kind: {"bits": s.bits, "block_size": s.block_size} for kind, s in self.chosen.items()}
            options |= {"zero_points": True, "accuracy_level": self.accuracy_level, "rounding": "least squares"}
            if not self.quantized_embedding:
                options["embedding"] = "float"
        return {"id": self.name, "options": options}

    def _block(self, linear: Linear, bits: int) -> int:
        if self.block_size is None:
            return block_by_rule(linear.inputs, bits, largest=self.largest_block, even=self.even_blocks)
        if linear.inputs % self.block_size:
            raise InvalidInput(
                f"block_size: {self.block_size} does not divide the {linear.inputs} inputs of {linear.name}",
                f"use {block_by_rule(linear.inputs, bits)}, or leave it out: the rule never pads",
            )
        return self.block_size


def _kind(linear: Linear) -> str:
    return linear.name.rsplit(".", 1)[-1]


def block_by_rule(inputs: int, bits: int, *, largest: int = _BLOCK_SIZES[0], even: bool = False) -> int:
    """Return the block size for a layer of so many inputs; it divides them.

    Args:
        inputs: of the layer.
        bits: 4 or 8.
        largest: that the provider's kernels take.
        even: a row must have an even number of 4-bit blocks.

    Raises:
        InvalidInput: no block size divides them.
    """
    dividing = [block for block in _BLOCK_SIZES if inputs % block == 0 and block <= largest]
    dividing = [block for block in dividing if not (even and bits == 4 and inputs // block % 2)]
    if not dividing:
        raise InvalidInput(f"no block size divides a layer of {inputs} inputs (they are multiples of 16)", "use --precision fp32")
    if bits == 8:
        wanted = _EIGHT_BIT_BLOCK
    else:
        wanted = next((block for block, scales in _LARGE_BLOCKS if block in dividing and inputs // block >= scales), _SMALL_BLOCK)
    return max((block for block in dividing if block <= wanted), default=dividing[-1])


# What a provider's kernels ask of a recipe, beside the precision. None of them computes MatMulNBits in int8 at accuracy level 4
# but WebGPU, whose builder sets it. Blocks of 32 to 128 are those of CUDA's fast kernels (onnxruntime, CheckFpAIntBEligibility
# in contrib_ops/cuda/quantization/matmul_nbits.cc). DirectML has no GatherBlockQuantized, and reads 4-bit zero points of an
# even number of blocks only (`slmops.graph.kernels`).
_OF_PROVIDER: dict[str, dict[str, Any]] = {
    "cuda": {"accuracy_level": 0, "largest_block": 128},
    "dml": {"accuracy_level": 0, "largest_block": 128, "quantized_embedding": False, "even_blocks": True},
    "webgpu": {"largest_block": 128},
}


def recipe_for(precision: str, block_size: int | None = None, provider: str = "cpu") -> Recipe:
    """Return the recipe of a precision for a provider.

    Raises:
        InvalidInput: a block size that no kernel takes, or for a float precision.
    """
    own = _OF_PROVIDER.get(provider, {})
    float_bits = 32 if precision == "fp32" or provider not in ("cuda", "dml", "trt-rtx", "webgpu") else 16
    if precision not in ("int4", "int8"):
        if block_size is not None:
            raise InvalidInput(f"block_size: {precision} weights have no blocks", "leave --block-size out")
        return Recipe(name=f"{provider}-{precision}", bits=0, float_bits=float_bits)
    known = [block for block in reversed(_BLOCK_SIZES) if block <= own.get("largest_block", _BLOCK_SIZES[0])]
    if block_size is not None and block_size not in known:
        raise InvalidInput(f"block_size: {block_size} is none of {', '.join(map(str, known))}", "leave --block-size out")
    bits = 8 if precision == "int8" else 4
    return Recipe(name=f"{provider}-{precision}", bits=bits, block_size=block_size, float_bits=float_bits, **own)
