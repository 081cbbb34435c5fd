"""Our operator adds what PEFT's pairs add, whatever their shapes; bytes that are no adapter are an error, never a crash."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_graph import nmse
from tiny import ROWS, make_adapter, make_export, make_model, write_rows

import slmops
from slmops import compiling
from slmops.compiling import library
from slmops.errors import RunFailed
from slmops.graph import checking
from slmops.graph.linears import load_graph
from slmops.graph.lora import A, B, save_adapted_twins, save_fast_twin
from slmops.graph.rewriting import ADAPTED, FAST, FULL, MAIN
from slmops.packing import assembling
from slmops.runtime import operators
from slmops.runtime.decoder import Cache, Decoder
from slmops.runtime.hugging_face import parameter_shapes, read_adapter_config
from slmops.runtime.operators import multiply, packed, rounded
from slmops.runtime.package import Package

compiled = pytest.mark.skipif(operators.library_name() is None, reason=f"nothing is compiled here: {operators.why_not_compiled()}")
IDS = [1, *range(262, 290)]
RANKS = {"a": 4, "b": 7}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def pair(inputs: int, outputs: int, rank: int) -> dict[str, np.ndarray]:
    return {"0" + A: random(inputs, rank), "0" + B: random(outputs, rank, seed=1)}


def ours() -> ctypes.CDLL:
    return library(operators.SOURCE)


# The operator alone -----------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 67])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (37, 53), (15, 9), (576, 192)])
@pytest.mark.parametrize("rank", [1, 3, 4, 13, 16, 40])
def test_it_adds_what_numpy_adds(tokens: int, inputs: int, outputs: int, rank: int) -> None:
    tensors = rounded(pair(inputs, outputs, rank))
    x, y = random(tokens, inputs), random(tokens, outputs)
    right = y + x.astype(np.float64) @ tensors["0" + A] @ tensors["0" + B].T
    assert multiply(ours(), packed(tensors, [[("0", [outputs])]]), 0, x, y) is None
    np.testing.assert_allclose(y, right, atol=2e-6 * float(np.abs(right).max()) * rank**0.5)


@compiled
@pytest.mark.parametrize("tokens", [1, 150])
def test_a_layer_so_large_that_threads_share_it(tokens: int, tmp_path: Path) -> None:
    """In onnxruntime, whose threads do its parts: the same bits as by one thread."""
    import onnx
    import onnxruntime
    from onnx import helper

    inputs, outputs, rank = 4096, 8192, 32
    model = onnx.load_from_string(operators.ONE_NODE)
    for value, width in ((model.graph.input[0], inputs), (model.graph.input[1], outputs), (model.graph.output[0], outputs)):
        value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, ["t", width]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    operators.register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    tensors = rounded(pair(inputs, outputs, rank))
    adapter = packed(tensors, [[("0", [outputs])]])
    x, y = random(tokens, inputs), random(tokens, outputs)
    for _ in range(5):
        found = session.run(None, {"x": x, "p": y, "adapter": adapter})[0]
        alone = y.copy()
        multiply(ours(), adapter, 0, x, alone)
        np.testing.assert_array_equal(found, alone)
    right = y + x.astype(np.float64) @ tensors["0" + A] @ tensors["0" + B].T
    np.testing.assert_allclose(found, right, atol=1e-5 * float(np.abs(right).max()))


@compiled
@pytest.mark.parametrize("rank", [5, 16])
def test_a_token_is_the_same_whatever_stands_beside_it(rank: int) -> None:
    adapter = packed(pair(48, 80, rank), [[("0", [80])]])
    x, y = random(23, 48), random(23, 80)
    whole = y.copy()
    multiply(ours(), adapter, 0, x, whole)
    for count in (1, 2, 9):
        for first in range(23 - count + 1):
            part = y[first : first + count].copy()
            multiply(ours(), adapter, 0, np.ascontiguousarray(x[first : first + count]), part)
            np.testing.assert_array_equal(part, whole[first : first + count])


@compiled
def test_parts_of_a_fused_layer_have_their_own_pairs() -> None:
    """Queries and values have a pair, keys have none; the second layer has two slots, of which one has a pair; the third has nothing."""
    q, v = (random(40, 3, seed=n) for n in (2, 3)), (random(40, 2, seed=4), random(16, 2, seed=5))
    a_q, b_q = q
    stacked = np.zeros((40 + 16 + 16, 5), np.float32)
    stacked[:40, :3], stacked[56:, 3:] = b_q, v[1]
    tensors = {"0.qkv" + A: np.concatenate([a_q, v[0]], axis=1), "0.qkv" + B: stacked} | {
        "0.up" + A: random(40, 4, seed=6),
        "0.up" + B: random(24, 4, seed=7),
    }
    layers = [[("0.qkv", [40, 16, 16])], [("0.gate", [24]), ("0.up", [24])], [("0.down", [40])]]
    adapter, kept = packed(tensors, layers), rounded(tensors)
    assert adapter.nbytes < sum(array.size for array in tensors.values()) * 2 - 2 * 32 * 2, "no zeros"
    x = random(3, 40)
    for layer, outputs in ((0, 72), (1, 48), (2, 40)):
        y = np.zeros((3, outputs), np.float32)
        assert multiply(ours(), adapter, layer, x, y) is None
        right = np.zeros((3, outputs))
        if layer == 0:
            right = x.astype(np.float64) @ kept["0.qkv" + A] @ kept["0.qkv" + B].T
        if layer == 1:
            right[:, 24:] = x.astype(np.float64) @ kept["0.up" + A] @ kept["0.up" + B].T
        np.testing.assert_allclose(y, right, atol=1e-5)


@compiled
@pytest.mark.parametrize(
    "fault",
    ["magic", "cut in the header", "cut in the tables", "cut in the tensors", "layers", "pairs", "rank", "offset", "negative", "outputs"],
)
def test_what_is_no_adapter_is_an_error(fault: str) -> None:
    good = packed(pair(48, 80, 4), [[("0", [80])]])
    whole, words = good.copy(), good.view("<i4").copy()
    place = {"magic": (0, 7), "layers": (1, 1 << 30), "pairs": (5, 9), "rank": (6, 1 << 20), "offset": (10, 1 << 30)}
    place |= {"negative": (11, -5), "outputs": (9, 8)}
    cut = {"cut in the header": 8, "cut in the tables": 32, "cut in the tensors": good.size - 64}
    if fault in place:
        at, value = place[fault]
        words[at] = value
        whole = words.view(np.uint8)
    whole = np.ascontiguousarray(whole[: cut.get(fault, whole.size)])
    x, y = random(2, 48), np.zeros((2, 80), np.float32)
    said = {"magic": "no adapter", "pairs": "no such pairs", "outputs": "another layer's shape", "cut in the header": "no adapter"}
    assert said.get(fault, "ends early") in (multiply(ours(), whole, 0, x, y) or "")
    assert "no such layer" in (multiply(ours(), good, 1, x, y) or "")
    assert "shape" in (multiply(ours(), good, 0, random(2, 64), y) or "")
    assert not y.any()
    assert multiply(ours(), np.zeros(0, np.uint8), 0, x, y) is None and not y.any(), "no bytes: no adapter"


@compiled
def test_it_can_be_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    operators._found.cache_clear()
    monkeypatch.setenv(compiling.SWITCH, "no")
    assert (operators.library_name(), operators.why_not_compiled()) == (None, None)
    operators._found.cache_clear()
    monkeypatch.setenv(compiling.SWITCH, "")
    monkeypatch.setattr(compiling, "compiler", lambda: ["/bin/false"])
    monkeypatch.setattr(compiling, "_kept", lambda *_: None)
    assert operators.library_name() is None and "lora.cpp" in (operators.why_not_compiled() or "")
    operators._found.cache_clear()


@compiled
def test_the_graph_of_one_node_is_what_it_says() -> None:
    from onnx import TensorProto, helper

    def end(name: str, kind: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    ends = [end("x", TensorProto.FLOAT, ["t", 16]), end("p", TensorProto.FLOAT, ["t", 16]), end("adapter", TensorProto.UINT8, ["bytes"])]
    node = helper.make_node("Lora", ["x", "p", "adapter"], ["y"], domain="slmops", layer=0)
    graph = helper.make_graph([node], "g", ends, [end("y", TensorProto.FLOAT, ["t", 16])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("slmops", 1)]
    assert helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString() == operators.ONE_NODE


@compiled
def test_what_onnxruntime_does_not_take_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(operators.progress, "say", said.append)
    monkeypatch.setattr(operators, "ONE_NODE", operators.ONE_NODE.replace(b"Lora", b"Lore"))
    operators._found.cache_clear()
    assert operators.library_name() is None and "does not take" in said[0]
    operators._found.cache_clear()


@compiled
def test_a_library_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.disagreement(ours()) is None
    monkeypatch.setattr(operators, "multiply", lambda *_: None)
    assert "other numbers" in (operators.disagreement(ours()) or "")


# Half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1.0, 1e6])
def test_half_precision_keeps_a_pair_whatever_its_scale(scale: float) -> None:
    tensors = {"0" + A: random(64, 8), "0" + B: np.float32(scale) * random(48, 8, seed=1)}
    tensors["0" + B][:, 3] = 0
    kept = rounded(tensors)
    product, ours = (np.float64(t["0" + A]) @ t["0" + B].T for t in (tensors, kept))
    assert np.linalg.norm(ours - product) <= 4e-4 * np.linalg.norm(product)
    again = rounded(kept)
    assert all(np.array_equal(again[name], kept[name]) for name in kept)


# In a graph -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base", seed=3)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {name: make_adapter(base.parent / name, base, seed=rank, rank=rank) for name, rank in RANKS.items()}


@compiled
@pytest.mark.slow
def test_the_graph_is_the_base_without_an_adapter_and_the_other_graph_with_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    from slmops.packing.pairs import graph_tensors, read_pairs

    folder = make_export(tmp_path / "export", base)
    shapes = parameter_shapes(base)
    slots, layers = save_adapted_twins(folder, shapes), save_fast_twin(folder, shapes)
    assert [[name for name, _ in layer] for layer in layers[:4]] == [
        ["0.qkv_proj"],
        ["0.o_proj"],
        ["0.gate_proj", "0.up_proj"],
        ["0.down_proj"],
    ]
    assert checking.adapter_problems(folder) == []
    config = json.loads((folder / "genai_config.json").read_text())
    graphs = {name: Decoder(folder, config, name, 1) for name in (MAIN, ADAPTED, FULL, FAST)}
    assert [graphs[name].takes_packed for name in (MAIN, ADAPTED, FULL, FAST)] == [False, False, False, True]
    tensors = graph_tensors(read_pairs(adapters["b"], read_adapter_config(adapters["b"])), slots, adapters["b"])
    fast, plain = graphs[FAST].with_adapter({"adapter": packed(tensors, layers)}), graphs[ADAPTED].with_adapter(rounded(tensors))

    def run(decoder: Decoder, *pieces: list[int]) -> np.ndarray:
        cache, end = Cache(decoder, 1, len(IDS)), 0
        for piece in pieces:
            end += len(piece)
            logits = decoder.run(np.array([piece]), np.array([end]), cache.arrays)
        return logits[0, -1]

    for pieces in ([IDS], [IDS[:-1], IDS[-1:]]):
        np.testing.assert_array_equal(run(graphs[FAST], *pieces), run(graphs[MAIN], *pieces))
        assert nmse(run(fast, *pieces), run(plain, *pieces)) <= 1e-11
        assert nmse(run(fast, *pieces), run(graphs[MAIN], *pieces)) > 1e-3, "it has an effect"
    with pytest.raises(RunFailed, match="another layer's shape"):
        run(graphs[FAST].with_adapter({"adapter": packed(tensors, layers[1:])}), IDS)

    graph = load_graph(folder / FAST)
    node = next(node for node in graph.graph if node.op_type == "Lora")
    for use in list(node.outputs[0].uses()):
        use.node.replace_input_with(use.idx, node.inputs[1])
    graph.graph.remove(node)
    import onnx_ir

    onnx_ir.save(graph, folder / FAST)
    assert any(FAST in line for line in checking.adapter_problems(folder))


@pytest.fixture(scope="module")
def package(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembling, "_FAST_BYTES", 0)
        named = [f"{name}={folder}" for name, folder in adapters.items()]
        return slmops.pack(base, out=tmp_path_factory.mktemp("package") / "package", precision="int8", adapter=named).path


def logits(opened: Package, adapter: str | dict[str, float] | None = None) -> np.ndarray:
    return opened.runner(adapter).runtime_logits(IDS)


@compiled
@pytest.mark.slow
def test_a_package_runs_it_and_switches(package: Path) -> None:
    opened = Package(package, threads=1)
    assert opened.runner("a").graph == FAST
    first, other, summed, alone = logits(opened, "a"), logits(opened, "b"), logits(opened, {"a": 0.7, "b": 0.3}), logits(opened)
    for found, again in ((first, "a"), (other, "b"), (summed, {"a": 0.7, "b": 0.3}), (alone, None)):
        np.testing.assert_array_equal(logits(opened, again), found)  # pyright: ignore[reportArgumentType]
    assert nmse(first, other) > 1e-3
    graph = opened.runner("a")
    assert nmse(graph.next_logits(IDS), first) <= 1e-12, "onnxruntime's session of the same graph"
    assert nmse(next(graph.logits([IDS]))[-1], first) <= 1e-5, "the graph with all logits, of onnxruntime's own operators"
    opened.close()


@compiled
@pytest.mark.slow
def test_without_the_operator_onnxruntimes_own_run_the_same_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = {name: logits(Package(package, threads=1), name) for name in ("a", "b")}
    monkeypatch.setattr(operators, "_found", lambda: (None, "no C++ compiler"))
    opened = Package(package, threads=1)
    assert opened.runner("a").graph == ADAPTED
    for name, found in with_it.items():
        assert nmse(logits(opened, name), found) <= 1e-3, "activations in 8 bits round elsewhere"
    assert slmops.verify(package, self_test=True).failed_stage is None
    opened.close()


@compiled
@pytest.mark.slow
def test_the_package_is_proven(package: Path, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"{row['text']} {row['intent']} {number}"} for number in range(20) for row in ROWS]
    )
    # Random weights answer nearly anything, which 8 bits decide otherwise: what is to be seen is that the adapters are whole, and switch.
    bars = {"kl_bar": 0.1, "top1_bar": 0.5}
    report = slmops.verify(package, data=[f"{name}={rows}" for name in ("base", *RANKS)], **bars)
    statuses = {stage.name: (stage.status, stage.explanation) for stage in report.stages}
    assert report.failed_stage is None, statuses
    assert statuses["adapters"][0] == "pass", statuses


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least"), [("int8", assembling._FAST_BYTES), ("fp32", 0)])
def test_a_float_package_and_a_small_one_have_no_such_graph(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, least: int
) -> None:
    monkeypatch.setattr(assembling, "_FAST_BYTES", least)
    made = slmops.pack(base, out=tmp_path / "package", precision=precision, adapter=[f"a={adapters['a']}"])
    assert not (made.path / FAST).exists() and "fast_layers" not in made.manifest.facts


@compiled
@pytest.mark.slow
def test_what_somebody_put_in_the_librarys_place_is_not_loaded(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Package(package, threads=1).runner("a").graph == FAST
    (tmp_path / str(operators.library_name())).write_bytes(b"somebody's")
    opened = Package(package, threads=1)
    assert opened.runner("a").graph == ADAPTED
    assert np.isfinite(logits(opened, "a")).all()


@compiled
@pytest.mark.slow
def test_where_the_runtime_takes_no_library_the_portable_graph_runs(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "library_name", lambda: "no-such-library.so")
    opened = Package(package, threads=1)
    found = logits(opened, "a")
    assert not opened._sessions.fast
    np.testing.assert_array_equal(found, logits(Package(package, threads=1, portable=True), "a"))


@compiled
@pytest.mark.slow
def test_adapters_come_and_go(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = Package(package, threads=2, most_loaded=1)
    own = {name: logits(opened, name) for name in RANKS}
    streams = {name: opened.runner(name).stream(IDS, max_new_tokens=9, stop_token_ids=[2]) for name in RANKS}
    beside = list(zip(*streams.values(), strict=False))
    for name, tokens in zip(RANKS, zip(*beside, strict=True), strict=True):
        assert list(tokens) == next(opened.runner(name).generate([IDS], max_new_tokens=9, stop_token_ids=[2]))[: len(tokens)]
        np.testing.assert_array_equal(logits(opened, name), own[name])
    del streams, beside
    logits(opened, {"a": 0.5})  # room is made for it
    assert opened._library._scratch is not None
    assert len(list(Path(opened._library._scratch.name).iterdir())) == 1, "what is not loaded is not kept"
    opened.close()
    monkeypatch.setattr("slmops.runtime.package.TemporaryDirectory", refuse)
    with pytest.raises(RunFailed, match="laid out"):
        logits(Package(package, threads=1), "a")


def refuse(**_: Any) -> Any:
    raise PermissionError("closed")


@compiled
@pytest.mark.slow
def test_an_adapter_that_is_added_runs_on_it_too(package: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    slmops.pack(copy, remove=["b"])
    slmops.pack(copy, adapter=[f"c={adapters['b']}"])
    assert Package(copy, threads=1).runner("c").graph == FAST
    np.testing.assert_array_equal(logits(Package(copy, threads=1), "c"), logits(Package(package, threads=1), "b"))
