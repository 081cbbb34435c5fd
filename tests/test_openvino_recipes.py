"""What is known of an OpenVINO export without OpenVINO: recipes that fit the model, and refusals that say the way out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import make_adapter, make_model

import slmops
from slmops import artifact, environment, targets
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.graph.ir_building import ir_recipe
from slmops.runtime.engines import engine_of, model_bytes, weights_bytes
from slmops.runtime.loading import kind_of
from slmops.runtime.openvino_folder import length_of, stop_tokens_of


def shapes(width: int, middle: int, *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a Llama of one layer, or of a Phi3, which has q, k and v in one."""
    attention = {"qkv_proj": (3 * width, width)} if fused else {f"{name}_proj": (width, width) for name in "qkv"}
    layers = {
        **{f"self_attn.{name}": shape for name, shape in attention.items()},
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (middle, width),
        "mlp.down_proj": (width, middle),
    }
    found: dict[str, tuple[int, ...]] = {f"model.layers.0.{name}.weight": shape for name, shape in layers.items()}
    return {"model.embed_tokens.weight": (1000, width), "model.layers.0.input_layernorm.weight": (width,), **found}


@pytest.mark.parametrize(
    ("width", "middle", "group"),
    [
        (192, 512, 32),  # stories3m: 128, optimum-intel's own choice, does not divide 192
        (576, 1536, 64),  # SmolLM 135M
        (2048, 8192, 256),
        (80, 208, 16),
    ],
)
def test_the_group_divides_every_matrix_of_four_bits(width: int, middle: int, group: int) -> None:
    recipe = ir_recipe("int4", "cpu", shapes(width, middle))
    assert recipe.passes[0]["group_size"] == group
    assert not width % group and not middle % group
    assert recipe.layers["down_proj"] == {"bits": 4, "block_size": group}
    for kind in ("q_proj", "k_proj", "v_proj", "embed_tokens"):
        assert recipe.layers[kind] == {"bits": 8, "block_size": "row"}
    assert recipe.document()["options"]["zero_points"] is True
    assert "input_layernorm" not in recipe.layers


def test_fused_projections_are_in_eight_bits_too() -> None:
    assert ir_recipe("int4", "cpu", shapes(192, 512, fused=True)).layers["qkv_proj"]["bits"] == 8


@pytest.mark.parametrize(("width", "group", "block"), [(192, -1, "row"), (256, 128, 128)])
def test_an_npu_gets_no_zero_points_and_groups_that_it_takes(width: int, group: int, block: object) -> None:
    recipe = ir_recipe("int4", "npu", shapes(width, 4 * width))
    assert recipe.passes[0] == {"mode": "int4_sym", "group_size": group, "backup": "int8_sym", "leave": []}
    assert recipe.layers["q_proj"] == {"bits": 4, "block_size": block}
    assert recipe.document()["options"]["zero_points"] is False
    assert recipe.properties == {}


def test_a_cpu_computes_the_same_on_every_machine() -> None:
    """Left alone, the plugin takes bf16 where the processor has it."""
    assert ir_recipe("fp32", "cpu", {}).properties == {"EXECUTION_MODE_HINT": "ACCURACY"}
    assert ir_recipe("int4", "cpu", shapes(192, 512)).properties == {"INFERENCE_PRECISION_HINT": "f32"}


def test_a_group_size_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(InvalidInput, match="128 does not divide the 192 inputs of model.layers.0") as caught:
        ir_recipe("int4", "cpu", shapes(192, 512), 128)
    assert "use 32" in caught.value.hint
    assert ir_recipe("int4", "cpu", shapes(192, 512), 64).passes[0]["group_size"] == 64
    with pytest.raises(InvalidInput, match="one scale a row"):
        ir_recipe("int8", "cpu", shapes(192, 512), 64)


def test_levels_claim_what_was_run() -> None:
    levels = {(target.device, target.level) for target in targets.TARGETS if target.provider == "openvino"}
    assert levels == {("cpu", "executed"), ("gpu", "built"), ("npu", "built")}


@pytest.mark.skipif(environment.builds_openvino(), reason="needs an environment without optimum-intel")
def test_without_the_extra_the_hint_says_where_it_goes(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(Unavailable, match="optimum-intel.* not installed") as caught:
        slmops.export(model, out=tmp_path / "out", provider="openvino", device="cpu", precision="int4")
    assert caught.value.exit_code == 3
    assert "pip install 'slmops[openvino]' in an environment of its own" in caught.value.hint
    assert not (tmp_path / "out").exists() and not artifact.partial_folder(tmp_path / "out").exists()


def test_pack_for_openvino_names_merge(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model)
    with pytest.raises(Unavailable, match="no adapters at run time") as caught:
        slmops.pack(model, adapter=[f"a={adapter}"], out=tmp_path / "out", provider="openvino", device="cpu", precision="int4")
    assert caught.value.exit_code == 3
    assert "slmops export MERGED --device cpu --provider openvino" in caught.value.hint


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 99}')
    assert kind_of(tmp_path) == "model"
    assert engine_of(tmp_path) is None
    (tmp_path / "openvino_model.xml").write_text("12")
    (tmp_path / "openvino_model.bin").write_text("345")
    assert kind_of(tmp_path) == "export"
    engine = engine_of(tmp_path)
    assert engine is not None and engine.name == "openvino"
    assert (weights_bytes(tmp_path), model_bytes(tmp_path)) == (3, 5)
    # What optimum-intel writes says nothing of a length but the model's; what slmops writes does.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "max_length": 20}')
    assert (length_of(tmp_path), stop_tokens_of(tmp_path)) == (99, (5, 6))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5, "max_length": 64}')
    assert (length_of(tmp_path), stop_tokens_of(tmp_path)) == (64, (5,))


def test_without_openvino_such_a_folder_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino_model.xml").write_text("")
    monkeypatch.setitem(sys.modules, "openvino", None)
    from slmops.runtime import open_model

    with pytest.raises(Unavailable, match="openvino is not installed") as caught:
        open_model(tmp_path)
    assert "slmops[openvino]" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadArtifact, match="holds no model, adapter or export") as caught:
        kind_of(tmp_path / "empty")
    assert "openvino_model.xml" in caught.value.hint and "genai_config.json" in caught.value.hint
