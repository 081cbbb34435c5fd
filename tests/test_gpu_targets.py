"""Exports for a GPU on a machine without one: built, looked up node by node, computed by a float twin, and honest about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny import make_model, write_rows

import slmops
from slmops import artifact, environment, probe, targets
from slmops.cli import main
from slmops.errors import RunFailed, SlmopsError, Unavailable
from slmops.graph import checking, float_twin
from slmops.graph.element_types import element_types
from slmops.graph.kernels import kernel_problems, placement
from slmops.graph.linears import linears, load_graph
from slmops.graph.recipes import block_by_rule, recipe_for
from slmops.graph.rewriting import FULL, MAIN
from slmops.runtime import providers

CUDA_FP16 = targets.find("gpu", "cuda", "fp16")
CUDA_BF16 = targets.find("gpu", "cuda", "bf16")
DML_INT4 = targets.find("gpu", "dml", "int4")
GPU = [target for target in targets.TARGETS if target.road == "genai-gpu"]


def small_graph(dtype: ir.DataType = ir.DataType.FLOAT16, *, product: str = "MatMul", domain: str = "") -> Any:
    """ids -> Gather -> product with one weight -> logits, beside a cache that passes through."""
    numbers = np.random.default_rng(0).normal(0, 0.3, (8, 8)).astype(dtype.numpy())
    weight = ir.Value(name="w", type=ir.TensorType(dtype), shape=ir.Shape([8, 8]), const_value=ir.tensor(numbers, name="w"))
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, 3]))
    past = ir.Value(name="past_key_values.0.key", type=ir.TensorType(dtype), shape=ir.Shape([1, 3]))
    gather = ir.node("Gather", [weight, ids], name="embed")
    gather.outputs[0].name = "embedded"
    multiply = ir.node(product, [gather.outputs[0], weight], domain=domain, name="head")
    logits = multiply.outputs[0]
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(dtype), ir.Shape([1, 3, 8])
    keep = ir.node("Relu", [past], name="keep")
    keep.outputs[0].name, keep.outputs[0].type, keep.outputs[0].shape = "present.0.key", ir.TensorType(dtype), past.shape
    graph = ir.Graph(
        [ids, past],
        [logits, keep.outputs[0]],
        nodes=[gather, multiply, keep],
        initializers=[weight],
        opset_imports={"": 21, "com.microsoft": 1},
    )
    return ir.Model(graph, ir_version=10)


# ---- the table -----------------------------------------------------------------------------------------------------


def test_every_target_says_what_runs_it_and_how_it_was_checked():
    assert len({(t.device, t.provider, t.precision) for t in targets.TARGETS}) == len(targets.TARGETS)
    for target in targets.TARGETS:
        document = target.document()
        assert all(document[key] for key in ("recipe", "check", "runtime_package", "road", "level")), target.name
        assert targets.find(target.device, target.provider, target.precision) is target
        assert targets.find(target.device, target.ort_provider, target.precision).precision == target.precision


def test_a_gpu_is_cuda_unless_somebody_says_otherwise():
    assert targets.find("gpu", None, "int4").provider == "cuda"


@pytest.mark.parametrize(
    ("device", "provider", "precision", "reason", "hint"),
    [
        ("cpu", None, "fp16", "no fp16 kernels", "use --device cpu --precision int8, int4 or fp32"),
        ("gpu", "cuda", "fp32", "without a producer", "use --device gpu --precision int8, int4, fp16 or bf16"),
        ("gpu", "dml", "int8", "no graph for it", "use --device gpu --provider dml --precision int4 or fp16"),
        ("gpu", "webgpu", "bf16", "WebGPU has no bf16", "use --device gpu --provider webgpu --precision int8, int4 or fp16"),
        ("gpu", "trt-rtx", "int4", "no graph for it", "use --device gpu --provider trt-rtx --precision fp16 or bf16"),
        ("gpu", "cudaa", "int4", "did you mean cuda", "use --device gpu --precision int4"),
        ("gpu", "qnn", "int4", "no provider 'qnn' for device gpu", "use --device gpu --precision int4"),
        ("tpu", None, "int4", "no target for device 'tpu'", "use --device cpu --precision int4"),
    ],
)
def test_an_impossible_pair_is_refused_with_the_nearest(device: str, provider: str | None, precision: str, reason: str, hint: str):
    with pytest.raises(Unavailable, match=reason) as caught:
        targets.find(device, provider, precision)
    assert caught.value.exit_code == 3
    assert caught.value.hint == hint


def test_recipes_keep_to_what_the_providers_kernels_take():
    for name in ("cuda", "webgpu", "dml"):
        assert max(block_by_rule(inputs, 4, largest=recipe_for("int4", None, name).largest_block) for inputs in range(64, 8192, 64)) == 128
    dml = recipe_for("int4", None, "dml")
    assert dml.even_blocks and not dml.quantized_embedding
    for inputs in range(64, 8192, 64):
        block = block_by_rule(inputs, 4, largest=dml.largest_block, even=True)
        assert inputs % block == 0 and inputs // block % 2 == 0
    assert block_by_rule(576, 4) == 64  # nine blocks: right on a CPU
    assert block_by_rule(576, 4, even=True) == 32
    with pytest.raises(SlmopsError, match="256 is none of 16, 32, 64, 128"):
        recipe_for("int4", 256, "cuda")
    assert recipe_for("fp16", None, "cuda").document() == {"id": "cuda-fp16", "options": {"bits": 16}}


# ---- planted faults of a graph: each is told by its name -----------------------------------------------------------


def test_a_sound_graph_has_no_problems():
    assert kernel_problems(small_graph(), CUDA_FP16) == []
    assert placement(small_graph()).provider == 3


@pytest.mark.parametrize("target", [t for t in GPU if t.precision == "fp16"], ids=lambda t: t.provider)
def test_an_operator_that_the_provider_lacks(target: targets.Target):
    [line] = kernel_problems(small_graph(product="LinearAttention", domain="com.microsoft"), target)
    assert line == f"head: com.microsoft.LinearAttention has no kernel on {target.provider} that slmops knows of"


def test_an_operator_without_a_kernel_in_the_types():
    model = small_graph(ir.DataType.BFLOAT16)
    lines = kernel_problems(model, targets.find("gpu", "dml", "fp16"))
    assert "head: MatMul has no bfloat16 kernel on dml" in lines
    assert "embed: Gather has no bfloat16 kernel on dml" in lines


def test_a_product_left_in_float32():
    lines = kernel_problems(small_graph(ir.DataType.FLOAT), CUDA_FP16)
    assert "head: MatMul is computed in float32, and float16 was asked for" in lines
    assert "logits is float32, and the runtime expects float16" in lines
    assert "past_key_values.0.key is float32, and the runtime expects float16" in lines


def test_two_types_in_one_node():
    model = small_graph()
    other = ir.Value(
        name="w2",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([8, 8]),
        const_value=ir.tensor(np.ones((8, 8), np.float32), name="w2"),
    )
    model.graph.initializers["w2"] = other
    next(node for node in model.graph if node.name == "head").replace_input_with(1, other)
    assert "head: MatMul takes float16 and float32 at once" in kernel_problems(model, CUDA_FP16)


def test_logits_declared_otherwise_than_computed():
    model = small_graph(ir.DataType.BFLOAT16)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert kernel_problems(model, CUDA_BF16) == ["logits is declared float32 and computed in bfloat16"]


def test_dml_and_an_odd_number_of_four_bit_blocks():
    model = small_graph(product="MatMulNBits", domain="com.microsoft")
    node = next(node for node in model.graph if node.name == "head")
    for name, value in {"K": 96, "N": 8, "bits": 4, "block_size": 32}.items():
        node.attributes[name] = ir.AttrInt64(name, value)
    assert kernel_problems(model, DML_INT4) == []  # without zero points the middle of the range is read
    points = ir.Value(
        name="z", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([16]), const_value=ir.tensor(np.zeros(16, np.uint8), name="z")
    )
    model.graph.initializers["z"] = points
    model.graph.remove(node, safe=False)
    again = ir.node(
        "MatMulNBits", [*node.inputs, node.inputs[1], points], domain="com.microsoft", name="head", attributes=dict(node.attributes)
    )
    again.outputs[0].name, again.outputs[0].type = "logits", ir.TensorType(ir.DataType.FLOAT16)
    model.graph.outputs[0] = again.outputs[0]
    model.graph.append(again)
    assert any("has 3 blocks a row" in line for line in kernel_problems(model, DML_INT4))


# ---- the float twin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "digits"), [(ir.DataType.FLOAT16, 11), (ir.DataType.BFLOAT16, 8)])
def test_the_twin_rounds_where_the_graph_does(tmp_path: Path, dtype: ir.DataType, digits: int):
    import onnxruntime as ort

    model = small_graph(dtype)
    weight = model.graph.initializers["w"].const_value.numpy().astype(np.float32)
    float_twin.to_float(model)
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT}
    assert element_types(model)["logits"] == ir.DataType.FLOAT
    ir.save(model, tmp_path / "twin.onnx")
    session = ort.InferenceSession(tmp_path / "twin.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([[1, 5, 2]])
    logits, kept = session.run(None, {"input_ids": ids, "past_key_values.0.key": np.full((1, 3), 1 / 3, np.float32)})
    exact = weight[ids[0]] @ weight
    assert np.abs(logits[0] - exact).max() <= np.abs(exact).max() * 2.0**-digits
    assert not np.array_equal(logits[0], exact), "the product was not rounded"
    np.testing.assert_array_equal(logits.astype(dtype.numpy()).astype(np.float32), logits)
    np.testing.assert_array_equal(kept, np.full((1, 3), 1 / 3, np.float32))  # the cache is written in place


def test_a_cache_in_bfloat16_has_its_type():
    import onnxruntime as ort

    from slmops.runtime.decoder import _value

    array = np.zeros((1, 2, 4, 8), np.uint16)
    assert _value(ort, array).element_type() == 16
    assert _value(ort, array.astype(np.float16)).element_type() == 10


# ---- what is missing on this machine --------------------------------------------------------------------------------


def here(target: targets.Target) -> bool:
    return providers.absence(target.ort_provider) is None


def test_a_missing_plugin_is_told_by_its_name_and_line():
    target = targets.find("gpu", "trt-rtx", "fp16")
    if here(target):
        pytest.skip("this machine has TensorRT-RTX")
    with pytest.raises(Unavailable, match="is made for trt-rtx, which is not here") as caught:
        providers.require_provider(target, "PKG")
    assert caught.value.exit_code == 3
    assert "pip install onnxruntime-ep-nv-tensorrt-rtx" in caught.value.hint


def test_wheels_for_cpu_and_gpu_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A second flavour is planted as its installer leaves it: a .dist-info on the path."""
    from slmops import diagnosis

    for name in ("onnxruntime_gpu", "onnxruntime_genai_cuda"):
        planted = tmp_path / f"{name}-1.0.dist-info"
        planted.mkdir()
        (planted / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    environment.version_of.cache_clear()
    providers.absence.cache_clear()
    try:
        assert environment.clashing_flavours() == [("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-genai", "onnxruntime-genai-cuda")]
        with pytest.raises(Unavailable, match="onnxruntime and onnxruntime-gpu are both installed and overwrite each other") as caught:
            providers.require_provider(CUDA_FP16, "PKG")
        assert caught.value.hint.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")
        problems = diagnosis._flavour_problems()
        assert [problem.severity for problem in problems] == ["error", "error"]
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problems[0].fix
    finally:
        environment.version_of.cache_clear()
        providers.absence.cache_clear()


def test_a_cuda_environment_lacks_nothing(monkeypatch: pytest.MonkeyPatch):
    """The flavours for CUDA are onnxruntime too: nobody is told to install the CPU's over them."""
    from slmops import diagnosis

    versions = {**environment.TESTED, "onnxruntime-gpu": "1.31.1", "onnxruntime-genai-cuda": "0.18.0"}
    del versions["onnxruntime"], versions["onnxruntime-genai"]
    monkeypatch.setattr(environment, "version_of", versions.get)
    packages = tuple(diagnosis._package(name, tested) for name, tested in environment.TESTED.items())
    assert diagnosis._version_problems(packages) == []
    assert diagnosis._flavour_problems() == []


def test_a_probe_names_what_is_missing():
    for name, module in probe.PLUGINS.items():
        if not probe.plugin_installed(name):
            assert probe.session(name) == {"error": f"{module.replace('_', '-')} is not installed"}
    assert "answer" in probe.ask("session", "CPUExecutionProvider")


def test_a_config_names_its_provider():
    def config(*names: str) -> dict[str, Any]:
        return {"model": {"decoder": {"session_options": {"provider_options": [{name: {}} for name in names]}}}}

    assert providers.provider_of(config()) is None
    assert providers.provider_of(config("cpu")) is None
    for target in GPU:
        found = providers.provider_of(config(target.config_name))
        assert found is not None and found.provider == target.provider
    with pytest.raises(Unavailable, match="for the provider VitisAI"):
        providers.provider_of(config("VitisAI"))


# ---- real exports ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import ROWS

    return make_model(tmp_path_factory.mktemp("gpu") / "model", learned=ROWS)


@pytest.fixture(scope="module")
def cuda(model: Path) -> Path:
    if here(CUDA_FP16):
        pytest.skip("this machine has CUDA: its package would be executed")
    return slmops.export(model, out=model.parent / "cuda", device="gpu", precision="fp16").path


@pytest.mark.slow
@pytest.mark.parametrize(("provider", "precision"), [("cuda", "bf16"), ("webgpu", "int4"), ("dml", "int4"), ("trt-rtx", "fp16")])
def test_a_package_for_a_provider_that_is_not_here_is_proven_by_its_twin(model: Path, tmp_path: Path, provider: str, precision: str):
    target = targets.find("gpu", provider, precision)
    if here(target):
        pytest.skip(f"this machine has {provider}")
    made = slmops.export(model, out=tmp_path / "gpu", device="gpu", provider=provider, precision=precision)
    facts = made.manifest.facts
    assert (facts["level"], facts["checked"]["executed"], facts["recipe"]["id"]) == ("built", False, f"{provider}-{precision}")
    assert any("not executed" in warning for warning in made.manifest.warnings)
    config = json.loads((made.path / "genai_config.json").read_text())
    assert [name for option in config["model"]["decoder"]["session_options"]["provider_options"] for name in option] == [target.config_name]
    schemes = {linear.scheme.bits for linear in linears(load_graph(made.path / MAIN)) if linear.scheme}
    assert schemes == ({4, 8} if precision == "int4" else set())
    # The bars of int4 are for models; one this small loses more, and what is asked here is whether the twin computes it.
    bars = {"kl_bar": 1.0, "top1_bar": 0.2} if precision == "int4" else {}
    result = slmops.verify(made.path, threads=1, data=write_rows(tmp_path / "rows.jsonl", rows_of_text()), **bars)
    assert result.level == "built; numerics by a float twin on the CPU"
    status = {stage.name: stage.status for stage in result.stages}
    assert status["graph"] == status["logits"] == "pass", [stage.explanation for stage in result.stages]
    assert status["self_test"] == "skipped"
    assert any("float twin" in warning for warning in result.warnings)


@pytest.mark.slow
def test_a_broken_package_is_seen_though_nothing_here_can_run_it(model: Path, cuda: Path, tmp_path: Path):
    import shutil

    rows = write_rows(tmp_path / "rows.jsonl", rows_of_text())
    # A weight that is another one: the twin is made of the package's own files.
    broken = shutil.copytree(cuda, tmp_path / "weights")
    graph = load_graph(cuda / FULL)
    down = next(linear for linear in linears(graph) if linear.name.endswith("0.mlp.down_proj"))
    place = graph.graph.initializers[down.tensors[0]].const_value
    with (broken / "model.onnx.data").open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(np.full(place.length // 2, 0.5, np.float16).tobytes())
    artifact.seal(broken)
    result = slmops.verify(broken, threads=1, data=rows, baseline=str(model))
    assert result.failed_stage == "logits"
    # An operator that CUDA does not have.
    other = shutil.copytree(cuda, tmp_path / "operator")
    for name in (MAIN, FULL):
        planted = load_graph(cuda / name)
        sigmoid = next(node for node in planted.graph if node.op_type == "Sigmoid")
        sigmoid.op_type, sigmoid.domain = "Swish", "com.microsoft"
        ir.save(planted, other / name)
    artifact.seal(other)
    result = slmops.verify(other, threads=1, data=rows, baseline=str(model))
    assert result.failed_stage == "graph"
    assert "com.microsoft.Swish has no kernel on cuda" in result.stages[-1].explanation
    # A node without an attribute that it needs: its operator and types are right.
    for name in (MAIN, FULL):
        planted = load_graph(cuda / name)
        del next(node for node in planted.graph if node.op_type == "GroupQueryAttention").attributes["num_heads"]
        ir.save(planted, other / name)
    artifact.seal(other)
    result = slmops.verify(other, threads=1, data=rows, baseline=str(model))
    assert result.failed_stage == "graph"
    assert "num_heads" in result.stages[-1].explanation
    # A config that would run it elsewhere.
    config = shutil.copytree(cuda, tmp_path / "config")
    content = json.loads((config / "genai_config.json").read_text())
    content["model"]["decoder"]["session_options"]["provider_options"] = []
    (config / "genai_config.json").write_text(json.dumps(content))
    assert any("names the providers []" in line for line in checking.problems(config, {"bits": 16}, CUDA_FP16))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "evaluate", "bench", "verify --self-test"])
def test_what_must_execute_is_refused_in_one_line(cuda: Path, tmp_path: Path, command: str, capfd: pytest.CaptureFixture[str]):
    rows = write_rows(tmp_path / "rows.jsonl")
    words = {
        "generate": ["generate", cuda, "play some jazz"],
        "evaluate": ["evaluate", cuda, rows, "--prompt-template", "{text}", "--completion-template", "{intent}"],
        "bench": ["bench", cuda, "--baseline", "none", "--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2"],
        "verify --self-test": ["verify", cuda, "--self-test"],
    }[command]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    error = capfd.readouterr().err
    assert ended.value.code == 3, error
    assert "is made for cuda, which is not here" in error
    assert "slmops[cuda]" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_graph_that_fails_its_checks_is_no_export(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A provider's table that loses an operator stands for a builder that begins to use one that the provider lacks."""
    from slmops.graph import kernels

    lessened = {key: value for key, value in kernels._KERNELS["cuda"].items() if key[1] != "GroupQueryAttention"}
    monkeypatch.setitem(kernels._KERNELS, "cuda", lessened)
    with pytest.raises(RunFailed, match="GroupQueryAttention has no kernel on cuda"):
        slmops.export(model, out=tmp_path / "out", device="gpu", precision="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapters_at_run_time_are_refused_for_a_gpu(model: Path, tmp_path: Path):
    with pytest.raises(Unavailable, match="gpu cuda int4 takes no adapters at run time") as caught:
        slmops.pack(model, adapter=["a=runs/a"], out=tmp_path / "package", device="gpu")
    assert "slmops merge" in caught.value.hint


@pytest.mark.slow
def test_an_export_for_a_gpu_takes_no_adapters_either(cuda: Path, tmp_path: Path):
    with pytest.raises(Unavailable, match="gpu cuda fp16 takes no adapters at run time"):
        slmops.pack(cuda, adapter=["a=runs/a"], out=tmp_path / "package")


def rows_of_text() -> list[dict[str, Any]]:
    from tiny import ROWS

    # Enough tokens for an agreement of 99 %: 381 without one that differs.
    return [{"text": f"{a['text']}\nIntent: {a['intent']}\n{b['text']}"} for a in ROWS for b in ROWS][::2]
