"""Codes on a grid are what onnxruntime multiplies with; the graph that ships computes what PyTorch computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_export, make_model, make_tokenizer

from slmops.errors import BadArtifact, InvalidInput, RunFailed, raise_if_killed
from slmops.graph import checking
from slmops.graph.building import bounded_copy
from slmops.graph.linears import embedding, hugging_face_weights, layer_name, linears, load_graph, parts, weights
from slmops.graph.quantization import Quantized, Scheme, pack, quantize, unpack
from slmops.graph.rewriting import DATA, FULL, MAIN, quantize_graph

SCHEMES = [Scheme(4, 16), Scheme(4, 32), Scheme(4, 64), Scheme(8, 32), Scheme(8, 128)]
IDS = [1, *range(5, 40)]


def matrix(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(outputs, inputs)) * 0.05).astype(np.float32)


def slow_dequantize(codes: np.ndarray, scales: np.ndarray, points: np.ndarray | None, scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    """Read packed tensors element by element, as ContribOperators.md defines MatMulNBits."""
    outputs, inputs = shape
    result = np.zeros(shape, np.float32)
    for n in range(outputs):
        for k in range(inputs):
            block, at = divmod(k, scheme.block_size)
            if scheme.bits == 8:
                code = int(codes[n, block, at])
                point = int(points[n, block]) if points is not None else 128
            else:
                code = int(codes[n, block, at // 2]) >> 4 * (at % 2) & 15
                point = int(points[n, block // 2]) >> 4 * (block % 2) & 15 if points is not None else 8
            result[n, k] = (code - point) * scales[n, block]
    return result


def session(graph: Any) -> Any:
    import onnx
    import onnxruntime as ort

    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def product(x: np.ndarray, tensors: tuple[np.ndarray, ...], scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    """Multiply with onnxruntime's MatMulNBits, in float."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["codes", "scales", "points"][: len(tensors)]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["y"],
        domain="com.microsoft",
        K=shape[1],
        N=shape[0],
        bits=scheme.bits,
        block_size=scheme.block_size,
        accuracy_level=0,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in zip(names, tensors, strict=True)],
    )
    return session(graph).run(None, {"x": x})[0]


def rounded_to_nearest(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Plain asymmetric round-to-nearest: what the least squares have to beat."""
    x = weight.reshape(weight.shape[0], -1, scheme.block_size)
    top = 2**scheme.bits - 1
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / top
    zero = np.rint(-low / step)
    return ((np.clip(np.rint(x / step) + zero, 0, top) - zero) * step).reshape(weight.shape)


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


# Quantization ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_packed_codes_are_those_of_the_operator_definition(scheme: Scheme, blocks: int) -> None:
    weight = matrix(7, blocks * scheme.block_size)
    quantized = quantize(weight, scheme)
    codes, scales, points = pack(quantized)
    assert codes.shape == (7, blocks, scheme.block_size * scheme.bits // 8)
    assert points.shape == (7, -(-blocks * scheme.bits // 8))
    assert codes.dtype == points.dtype == np.uint8
    np.testing.assert_array_equal(slow_dequantize(codes, scales, points, scheme, weight.shape), quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_unpack_is_the_inverse_of_pack(scheme: Scheme, blocks: int) -> None:
    quantized = quantize(matrix(5, blocks * scheme.block_size), scheme)
    again = unpack(*pack(quantized), scheme, 5)
    for ours, theirs in ((again.codes, quantized.codes), (again.scales, quantized.scales), (again.zero_points, quantized.zero_points)):
        np.testing.assert_array_equal(ours, theirs)
    # The builder stores scales and zero points flat.
    codes, scales, points = pack(quantized)
    np.testing.assert_array_equal(unpack(codes, scales.ravel(), points.ravel(), scheme, 5).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_onnxruntime_multiplies_with_the_dequantized_matrix(scheme: Scheme, blocks: int, rows: int) -> None:
    weight = matrix(24, blocks * scheme.block_size)
    quantized = quantize(weight, scheme)
    x = np.random.default_rng(1).normal(size=(rows, weight.shape[1])).astype(np.float32)
    found = product(x, pack(quantized), scheme, weight.shape)
    np.testing.assert_allclose(found, x @ quantized.dequantize().T, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_zero_points_mean_the_middle_of_the_range(bits: int) -> None:
    scheme = Scheme(bits, 32)
    random = np.random.default_rng(2)
    middle = Quantized(
        random.integers(0, 2**bits, (8, 3, 32), np.uint8),
        random.random((8, 3), np.float32),
        np.full((8, 3), 1 << (bits - 1), np.uint8),
        scheme,
    )
    codes, scales, _ = pack(middle)
    x = random.normal(size=(2, 96)).astype(np.float32)
    expected = unpack(codes, scales, None, scheme, 8).dequantize()
    np.testing.assert_array_equal(expected, middle.dequantize())
    found = product(x, (codes, scales), scheme, (8, 96))
    np.testing.assert_allclose(found, x @ expected.T, atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize(("scheme", "most"), [(Scheme(4, 32), 0.93), (Scheme(4, 128), 0.90), (Scheme(8, 32), 1.0)], ids=str)
def test_least_squares_beat_rounding_to_nearest(scheme: Scheme, most: float) -> None:
    weight = matrix(64, 512)
    ours, theirs = nmse(quantize(weight, scheme).dequantize(), weight), nmse(rounded_to_nearest(weight, scheme), weight)
    assert ours <= most * theirs, (ours, theirs)
    # And in no single block are they worse, but for the rounding of the arithmetic.
    blocks = (weight.shape[0], -1, scheme.block_size)
    worse = ((quantize(weight, scheme).dequantize() - weight) ** 2).reshape(blocks).sum(-1)
    plain = ((rounded_to_nearest(weight, scheme) - weight) ** 2).reshape(blocks).sum(-1)
    assert (worse <= plain * 1.001 + 1e-12).all()


def test_what_a_grid_can_hold_comes_back_exactly() -> None:
    random = np.random.default_rng(3)
    codes, points = random.integers(0, 16, (4, 6, 32)), random.integers(0, 16, (4, 6, 1))
    codes[..., :2] = (0, 15)  # the whole range is in use
    weight = ((codes - points) * 0.125).astype(np.float32).reshape(4, -1)
    np.testing.assert_allclose(quantize(weight, Scheme(4, 32)).dequantize(), weight, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "block",
    [np.zeros(32), np.ones(32), -np.ones(32), np.linspace(1, 2, 32), -np.linspace(1, 2, 32), np.eye(32)[3], 1e-20 * np.ones(32)],
    ids=["zeros", "ones", "minus ones", "positive", "negative", "one outlier", "denormal"],
)
def test_blocks_at_the_edge(bits: int, block: np.ndarray) -> None:
    quantized = quantize(block[None].astype(np.float32), Scheme(bits, 32))
    assert np.isfinite(quantized.scales).all()
    assert quantized.codes.max() < 2**bits
    # Zero is on every grid, so the range is [0, max] or [min, 0]; rounding evenly takes a step / sqrt(12) of it.
    error = np.sqrt(((quantized.dequantize()[0] - block) ** 2).mean())
    assert error <= 0.3 * np.abs(block).max() / (2**bits - 1) + 1e-12


def test_quantization_does_not_depend_on_the_pieces_it_is_done_in() -> None:
    weight = matrix(300, 1024)
    whole, part = quantize(weight, Scheme(4, 64)), quantize(weight[123:125], Scheme(4, 64))
    np.testing.assert_array_equal(whole.codes[123:125], part.codes)
    np.testing.assert_array_equal(whole.scales[123:125], part.scales)


@pytest.mark.parametrize(("inputs", "block"), [(96, 64), (33, 32), (100, 16)])
def test_a_block_size_that_does_not_divide_is_refused_and_nothing_is_padded(inputs: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"{block} does not divide {inputs}"):
        quantize(matrix(4, inputs), Scheme(4, block))


# Graphs ------------------------------------------------------------------------------------------------------------


def tied_graph(head: np.ndarray) -> Any:
    """Return the shortest decoder with a tied embedding, as the builder writes one: ids -> Gather(Transpose(W)) -> MatMul(W)."""
    import onnx
    import onnx_ir
    from onnx import TensorProto, helper, numpy_helper

    vocabulary, width = head.shape
    nodes = [
        helper.make_node("Transpose", ["lm_head.MatMul.weight"], ["table"], perm=[1, 0], name="/model/embed_tokens/Transpose"),
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"], name="/model/embed_tokens/Gather"),
        helper.make_node("MatMul", ["hidden", "lm_head.MatMul.weight"], ["logits"], name="/lm_head/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", vocabulary]),
            helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "tokens", width]),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(head.T), "lm_head.MatMul.weight")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return onnx_ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


@pytest.mark.parametrize("scheme", [Scheme(4, 16), Scheme(4, 32), Scheme(8, 32), Scheme(8, 64)], ids=str)
def test_a_tied_embedding_reads_the_rows_of_the_quantized_head(scheme: Scheme) -> None:
    import onnx_ir
    import onnxruntime as ort

    head = matrix(40, 192)
    model = tied_graph(head)
    table = embedding(model)
    assert table is not None
    assert (table.inputs, table.outputs, table.scheme) == (192, 40, None)
    np.testing.assert_array_equal(weights(model, table), head)
    quantize_graph(model, lambda linear: scheme)
    expected = quantize(head, scheme).dequantize()
    assert sorted(node.op_type for node in model.graph) == ["GatherBlockQuantized", "MatMulNBits", "Reshape"]
    assert {linear.scheme for linear in linears(model)} == {scheme}
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert stored <= head.size * scheme.bits // 8 + 5 * head.size // scheme.block_size + 16, "the table lies there once"
    table = embedding(model)
    assert table is not None
    assert (table.inputs, table.outputs, table.scheme) == (192, 40, scheme)
    np.testing.assert_array_equal(weights(model, table), expected)
    ids = np.array([[0, 3, 39, 17]], np.int64)
    running = ort.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Any = running.run(["logits", "hidden"], {"input_ids": ids})
    logits, hidden = outputs
    np.testing.assert_array_equal(hidden[0], expected[ids[0]])
    # MatMulNBits rounds its activations to 8 bits, a block at a time.
    assert nmse(logits[0], expected[ids[0]] @ expected.T) < 1e-3


def test_layers_of_the_graph_are_matched_to_parameters() -> None:
    shapes = {
        "model.embed_tokens.weight": (320, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.k_proj.weight": (32, 64),
        "model.layers.0.self_attn.v_proj.weight": (32, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 128),
        "model.layers.1.self_attn.qkv_proj.weight": (128, 64),
    }
    prefix = "model.layers.0.self_attn"
    assert parts("model.layers.0.attn.qkv_proj", shapes) == [
        (f"{prefix}.q_proj.weight", slice(0, 64)),
        (f"{prefix}.k_proj.weight", slice(64, 96)),
        (f"{prefix}.v_proj.weight", slice(96, 128)),
    ]
    assert parts("model.layers.1.attn.qkv_proj", shapes) == [("model.layers.1.self_attn.qkv_proj.weight", slice(0, 128))]
    assert parts("lm_head", shapes) == [("model.embed_tokens.weight", slice(0, 320))]
    assert parts("lm_head", {**shapes, "lm_head.weight": (320, 64)}) == [("lm_head.weight", slice(0, 320))]
    assert parts("model.layers.0.mlp.gate_up_proj", shapes) == []
    assert parts("model.layers.7.mlp.down_proj", shapes) == []
    assert layer_name("model.layers.0.attn.o_proj.MatMul.weight_Q4") == "model.layers.0.attn.o_proj"


def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match=r"model\.onnx is missing"):
        load_graph(tmp_path / MAIN)
    (tmp_path / MAIN).write_bytes(b"this is no protobuf" * 40)
    with pytest.raises(BadArtifact, match="not an ONNX model"):
        load_graph(tmp_path / MAIN)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [({}, 256), ({"rope_parameters": {"rope_type": "default"}}, 256), ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, 32768)],
    ids=["none", "default", "llama3"],
)
def test_positions_are_bounded_where_the_angles_allow_it(tmp_path: Path, rope: dict[str, Any], expected: int) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"max_position_embeddings": 32768, **rope}))
    (source / "model.safetensors").write_bytes(b"weights")
    copy = bounded_copy(source, tmp_path / "copy", 256)
    assert json.loads((copy / "config.json").read_text())["max_position_embeddings"] == expected
    assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((source / "config.json").read_text())["max_position_embeddings"] == 32768


@pytest.mark.slow
def test_a_shorter_phi3_is_not_taken_for_one_of_long_rope(tmp_path: Path) -> None:
    """The builder compares max_position_embeddings with the original ones; both are bounded together."""
    source = make_other(tmp_path / "model", "Phi3", original_max_position_embeddings=128)
    made = make_export(tmp_path / "export", source, "fp32", max_length_tokens=64)
    assert nmse(graph_logits(made)[0], torch_logits(source)) <= 1e-10


# The real builder --------------------------------------------------------------------------------------------------

_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def make_other(folder: Path, family: str, **config: Any) -> Path:
    """Write a tiny model of another family, with biases and norms that are not at their neutral values."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**(_SHAPE | config)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    model.save_pretrained(folder)
    return make_tokenizer(folder)


_MODELS = {
    "llama tied": lambda folder: make_model(folder),
    "llama untied": lambda folder: make_model(folder, tie_word_embeddings=False),
    "qwen2 biases": lambda folder: make_other(folder, "Qwen2"),
    "qwen3 norms": lambda folder: make_other(folder, "Qwen3", head_dim=32, tie_word_embeddings=True),
    "phi3 fused": lambda folder: make_other(folder, "Phi3", original_max_position_embeddings=128),
}


@pytest.fixture(scope="module", params=list(_MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _MODELS[request.param](tmp_path_factory.mktemp("models") / request.param.replace(" ", "-"))


def torch_logits(folder: Path, own: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Return PyTorch's logits for IDS, with some parameters replaced."""
    import torch

    from slmops.runtime.hugging_face import load_model

    network: Any = load_model(folder).eval()
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in (own or {}).items():
            if name in parameters:
                parameters[name].copy_(torch.tensor(value))
        return network(torch.tensor([IDS])).logits[0].numpy()


def graph_logits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of both twins for IDS: (tokens, vocabulary) and (vocabulary,)."""
    from slmops.runtime.decoder import Cache
    from slmops.runtime.genai_runner import GenaiRunner

    runner = GenaiRunner(folder, 2)
    full = next(runner.logits([IDS]))
    shipped = runner.shipped
    assert shipped.last_only
    last = shipped.run(np.array([IDS]), np.array([len(IDS)]), Cache(shipped, 1, len(IDS)).arrays)
    runner.close()
    assert last.shape[:2] == (1, 1)
    return full, last[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-10), ("int8", 1e-3), ("int4", 1e-3)])
def test_a_built_graph_computes_what_pytorch_computes(model: Path, tmp_path: Path, precision: str, most: float) -> None:
    """int8 and int4 against PyTorch on the graph's own weights: what is left is the rounding of activations to 8 bits."""
    made = make_export(tmp_path / "export", model, precision)
    full, last = graph_logits(made)
    graph = load_graph(made / FULL)
    own = hugging_face_weights(graph, _shapes(model))
    reference = torch_logits(model, own)
    assert {name for name, shape in _shapes(model).items() if len(shape) == 2} == set(own), "every matrix is accounted for"
    assert nmse(full, reference) <= most
    assert nmse(last, full[-1]) <= max(most / 10, 1e-10)
    if precision == "fp32":
        assert np.abs(full - torch_logits(model)).max() <= 2e-4
    else:
        assert {linear.scheme.bits for linear in linears(graph) if linear.scheme} == ({4, 8} if precision == "int4" else {8})
        assert all(linear.scheme for linear in linears(graph))


def _shapes(model: Path) -> dict[str, tuple[int, ...]]:
    from slmops.runtime.hugging_face import parameter_shapes

    return parameter_shapes(model)


@pytest.mark.slow
def test_the_embedding_lies_on_disk_once_and_checking_sees_every_difference(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", vocab_size=4096, num_hidden_layers=1)
    from slmops import artifact

    made = {name: make_export(tmp_path / name, source, **settings) for name, settings in _EXPORTS.items()}
    options = {name: artifact.load(folder).manifest.facts["recipe"]["options"] for name, folder in made.items()}
    # int4 in blocks of 32 with zero points and scales: 0.64 bytes a weight, stored once (twice would be 1.28).
    table = 4096 * 64
    assert (made["int4"] / DATA).stat().st_size < 0.75 * table + 64 * 1024
    assert (made["int8"] / DATA).stat().st_size < 1.2 * table + 96 * 1024
    for name, folder in made.items():
        assert checking.problems(folder, options[name]) == []
    other_block = checking.problems(made["int4 in 16"], options["int4"])
    assert any("has 4 bits in blocks of 16, and the recipe says 4 in 32" in line for line in other_block)
    assert any("is float, and 4 bits were asked for" in line for line in checking.problems(made["fp32"], options["int4"]))
    assert any("and float was asked for" in line for line in checking.problems(made["int8"], options["fp32"]))
    assert any("accuracy level 4" in line for line in checking.problems(made["int4"], options["int4"] | {"accuracy_level": 1}))
    shutil.copyfile(made["int8"] / FULL, made["int4"] / FULL)
    foreign = checking.problems(made["int4"], options["int4"])
    assert any("twin" in line for line in foreign), foreign


_EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4 in 16": {"precision": "int4", "block_size": 16},
}


@pytest.mark.slow
def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    made = make_export(tmp_path / "export", make_model(tmp_path / "model"), "fp32")
    other = {"model.embed_tokens.weight": (320, 64)}
    with pytest.raises(BadArtifact, match="is no layer of the baseline model"):
        hugging_face_weights(load_graph(made / FULL), other)


def test_an_error_of_the_builder_is_one_line(tmp_path: Path) -> None:
    from slmops.graph.building import _failure

    message, hint = _failure(1, "Traceback (most recent call last):\n  File x\nValueError: no such thing\n 10%| 3.2it/s]\n")
    assert message == "the model builder failed: ValueError: no such thing"
    assert hint
    for code in (-9, 137):
        with pytest.raises(RunFailed, match=r"the builder was stopped by the system, most likely for lack of memory"):
            raise_if_killed("the builder", code, "use less")
    raise_if_killed("the builder", 1, "use less")
    assert InvalidInput.exit_code == 2
