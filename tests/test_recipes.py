"""The rule of a precision looks at a layer's shape; its block always divides the layer, so nothing is ever padded."""

from __future__ import annotations

import pytest

from slmops.errors import InvalidInput
from slmops.graph.linears import HEAD, Linear
from slmops.graph.quantization import Scheme
from slmops.graph.recipes import block_by_rule, recipe_for

KERNEL_BLOCKS = (16, 32, 64, 128, 256)  # what onnxruntime's CPU kernel takes


def layer(name: str, inputs: int) -> Linear:
    return Linear(name, inputs, 64, None, None, ("weight",))


@pytest.mark.parametrize(
    ("inputs", "four_bit", "eight_bit"),
    [
        (192, 32, 64),  # three blocks of 64 ruin it
        (512, 32, 64),  # 8 scales a row with 64: one too few
        (576, 64, 64),  # SmolLM2-135M: 9 scales a row
        (896, 64, 64),  # Qwen2.5-0.5B
        (1024, 64, 64),  # 8 with 128
        (1152, 128, 64),  # 9 with 128
        (1280, 128, 64),  # 5 with 256: one too few
        (1536, 256, 64),  # six 256s are as good as twelve 128s
        (2048, 256, 64),
        (4096, 256, 64),
        (48, 16, 16),
        (64, 32, 64),
        (96, 32, 32),
        (16, 16, 16),
        (4864, 256, 64),
        (11008, 256, 64),
        (2080, 32, 32),  # 65 x 32
    ],
)
def test_block_size_by_width(inputs: int, four_bit: int, eight_bit: int) -> None:
    assert block_by_rule(inputs, 4) == four_bit
    assert block_by_rule(inputs, 8) == eight_bit


@pytest.mark.parametrize("bits", [4, 8])
def test_the_rule_never_pads(bits: int) -> None:
    for inputs in range(16, 8192, 16):
        block = block_by_rule(inputs, bits)
        assert inputs % block == 0, f"{inputs} inputs would be padded to blocks of {block}"
        assert block in KERNEL_BLOCKS
        if bits == 4 and block > 32:
            assert inputs // block >= (6 if block == 256 else 9)


@pytest.mark.parametrize("inputs", [8, 100, 1000, 15, 24])
def test_a_layer_that_no_block_divides_is_refused_by_its_width(inputs: int) -> None:
    with pytest.raises(InvalidInput, match=f"a layer of {inputs} inputs") as caught:
        block_by_rule(inputs, 4)
    assert caught.value.exit_code == 2
    assert "fp32" in caught.value.hint


def test_int4_keeps_queries_keys_and_values_in_8_bits_and_says_so() -> None:
    recipe = recipe_for("int4")
    names = [f"model.layers.3.attn.{name}" for name in ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")]
    found = {name.rsplit(".", 1)[-1]: recipe.scheme(layer(name, 576)) for name in names}
    eight = Scheme(8, 64)
    assert found == {"qkv_proj": eight, "q_proj": eight, "k_proj": eight, "v_proj": eight, "o_proj": Scheme(4, 64)}
    assert recipe.scheme(layer("model.layers.3.mlp.gate_up_proj", 576)) == Scheme(4, 64)
    assert recipe.scheme(layer("model.layers.3.mlp.down_proj", 1536)) == Scheme(4, 256)
    assert recipe.scheme(layer(HEAD, 576)) == Scheme(4, 64)
    document = recipe.document()
    assert document["id"] == "cpu-int4"
    assert document["options"]["bits"] == 4
    assert document["options"]["accuracy_level"] == 4
    assert document["options"]["layers"]["qkv_proj"] == {"bits": 8, "block_size": 64}
    assert document["options"]["layers"]["down_proj"] == {"bits": 4, "block_size": 256}


def test_int8_is_8_bits_everywhere() -> None:
    recipe = recipe_for("int8")
    names = ("model.layers.0.attn.qkv_proj", "model.layers.0.mlp.down_proj", HEAD)
    assert {recipe.scheme(layer(name, 192)) for name in names} == {Scheme(8, 64)}


def test_a_block_size_asked_for_is_kept_on_every_layer_or_refused() -> None:
    recipe = recipe_for("int4", 128)
    assert recipe.scheme(layer(HEAD, 512)) == Scheme(4, 128)
    assert recipe.scheme(layer("model.layers.0.attn.qkv_proj", 512)) == Scheme(8, 128)
    with pytest.raises(InvalidInput, match="128 does not divide the 192 inputs of lm_head") as caught:
        recipe.scheme(layer(HEAD, 192))
    assert caught.value.exit_code == 2
    assert "use 32" in caught.value.hint


@pytest.mark.parametrize("block", [20, 48, 512, 1024])
def test_block_sizes_that_no_kernel_takes(block: int) -> None:
    with pytest.raises(InvalidInput, match=f"block_size: {block} is none of 16, 32, 64, 128, 256"):
        recipe_for("int4", block)


def test_float_has_no_blocks() -> None:
    recipe = recipe_for("fp32")
    assert recipe.document() == {"id": "cpu-fp32", "options": {"bits": 32}}
    with pytest.raises(InvalidInput, match="fp32 weights have no blocks"):
        recipe_for("fp32", 32)
