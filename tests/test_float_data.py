"""What is written while the builder works is what its graph reads; and a graph that nobody foresaw is written as it is."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from tiny import make_model

import slmops
from slmops import hashes
from slmops.graph import float_data
from slmops.graph.float_data import FloatData, foreseen
from slmops.graph.linears import embedding, load_graph, weights
from slmops.graph.stored_weights import StoredWeights
from slmops.runtime.genai_runner import GenaiRunner

IDS = [1, 40, 7, 99, 15]
LAYER = "model.layers.0"
QKV = tuple(f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", tie_word_embeddings=request.param)


def expected(stored: StoredWeights, matrix: float_data.Matrix) -> bytes:
    stacked = np.concatenate([stored[name] for name in matrix.parameters])
    return np.ascontiguousarray(stacked.T if matrix.transposed else stacked).tobytes()


def graph_of(matrices: list[float_data.Matrix]) -> onnx_ir.Model:
    """A graph that holds nothing but matrices, as `load_built` gives them."""
    values = []
    for number, matrix in enumerate(matrices):
        tensor = onnx_ir.tensor(np.zeros(matrix.shape, np.float32), name=f"m{number}")
        value = onnx_ir.Value(name=tensor.name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        value.meta["source"] = {"parameters": list(matrix.parameters), "transposed": matrix.transposed}
        values.append(value)
    return onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}), ir_version=10)


def test_matrices_are_foreseen_one_behind_the_other(model: Path) -> None:
    stored = StoredWeights(model)
    found = list(foreseen(stored))
    by_names = {matrix.parameters: matrix for matrix in found}
    assert by_names[QKV].transposed
    assert (f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight") in by_names
    assert by_names["model.embed_tokens.weight",].transposed == ("lm_head.weight" not in list(stored)), "a tied embedding is the head's"
    end = 0
    for matrix in found:
        assert matrix.offset == end
        end += matrix.length
    assert end == 4 * sum(np.prod(stored.shape(name)) for name in stored if len(stored.shape(name)) == 2)


@pytest.mark.parametrize("pieces", [0, 1, 5, 10_000])
@pytest.mark.parametrize("piece_bytes", [4 * 64 * 7, 1 << 20], ids=["some rows", "whole"])
def test_every_matrix_is_written_once_the_graph_has_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, piece_bytes: int
) -> None:
    """However much of it the builder left time for."""
    monkeypatch.setattr(float_data, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(float_data, "_TURNED", 16)
    stored = StoredWeights(model)
    left = iter(range(pieces))
    with closing(FloatData(model, tmp_path / "data")) as written:
        if pieces:
            written.work(lambda: next(left, None) is not None)
        graph = graph_of(list(foreseen(stored)))
        rest = onnx_ir.tensor(np.arange(100, dtype=np.float32), name="norm")
        value = onnx_ir.Value(name="norm", shape=rest.shape, type=onnx_ir.TensorType(rest.dtype), const_value=rest)
        graph.graph.initializers["norm"] = value
        known = written.give(graph)
    content = (tmp_path / "data").read_bytes()
    assert {name: record.sha256 for name, (_, record) in known.items()} == {"data": hashlib.sha256(content).hexdigest()}
    assert known["data"][0] == hashes.stamp(tmp_path / "data")
    assert isinstance(value.const_value, onnx_ir.ExternalTensor)
    assert value.const_value.tobytes() == rest.tobytes()
    del graph.graph.initializers["norm"]
    for matrix in foreseen(stored):
        assert content[matrix.offset : matrix.offset + matrix.length] == expected(stored, matrix), matrix.parameters
    for matrix, value in zip(foreseen(stored), graph.graph.initializers.values(), strict=True):
        assert value.const_value is not None
        assert value.const_value.tobytes() == expected(stored, matrix)


def test_a_graph_that_was_not_foreseen_keeps_its_matrices(model: Path, tmp_path: Path) -> None:
    graph = graph_of(list(foreseen(StoredWeights(model)))[:-1])
    with closing(FloatData(model, tmp_path / "data")) as written:
        written.work(lambda: True)
        assert written.give(graph) == {}
    assert not (tmp_path / "data").exists()
    assert not any(isinstance(value.const_value, onnx_ir.ExternalTensor) for value in graph.graph.initializers.values())


@pytest.mark.slow
def test_an_export_is_the_same_model_whether_it_was_foreseen_or_not(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, sizes = [], []
    for name in ("foreseen", "not"):
        if name == "not":
            monkeypatch.setattr(float_data, "FUSED", {})
        out = slmops.export(model, out=tmp_path / name, precision="fp32").path
        sizes.append((out / "model.onnx.data").stat().st_size)
        runner = GenaiRunner(out, 1)
        (found,) = runner.logits([IDS])
        logits += [found, runner.runtime_logits(IDS)]
        runner.close()
    np.testing.assert_array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits[1], logits[3])
    assert sizes[0] == sizes[1], "nothing lies in the file that the graph does not read"


@pytest.mark.slow
def test_a_float_embedding_is_not_turned_when_the_graph_is_loaded(model: Path, tmp_path: Path) -> None:
    """onnxruntime would keep the turned one beside the head's: the largest matrix twice."""
    out = slmops.export(model, out=tmp_path / "out", precision="fp32").path
    for name in ("model.onnx", "model_full.onnx"):
        graph = load_graph(out / name)
        turned = [node for node in graph.graph if node.op_type == "Transpose" and node.inputs[0].name in graph.graph.initializers]
        assert not turned, name
        table = embedding(graph)
        assert table is not None
        np.testing.assert_array_equal(weights(graph, table), StoredWeights(model)["model.embed_tokens.weight"])
