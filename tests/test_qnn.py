"""Graphs of fixed shapes are the graphs that they were made of; compiled for a chip, they say which, and what the NPU takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from tiny import make_adapter, make_export, make_model, write_rows

import slmops
from slmops import artifact, socs, targets
from slmops.config import ExportSettings
from slmops.data import Interface
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.exporting import qnn
from slmops.graph import checking, placement, static
from slmops.graph.linears import load_graph
from slmops.runtime import hugging_face, qnn_plugin
from slmops.runtime.engines import engine_of, open_export
from slmops.runtime.runner import Sampling
from slmops.runtime.static_decoder import DECODE, PORTABLE, PREFILL
from slmops.runtime.static_runner import StaticRunner, choose
from slmops.runtime.torch_runner import TorchRunner

plugin = pytest.mark.skipif(not qnn_plugin.installed(), reason="onnxruntime-qnn is not installed: pip install 'slmops[qnn]'")
NPU = {"device": "npu", "provider": "qnn"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("qnn") / "model")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as an export has it before the compiler: 8 tokens a piece, a cache of 64."""
    folder = tmp_path_factory.mktemp("qnn") / "export"
    folder.mkdir()
    interface = Interface(max_length_tokens=64, stop_token_ids=(2,))
    recipe = qnn.recipe_for("fp16", None, "qnn")
    config = qnn._write_portable(model, folder / PORTABLE, folder / "float", interface, 8, recipe)
    artifact.write_json(folder / "genai_config.json", qnn.pipeline_config(config, interface, 8, 0))
    return folder


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("qnn") / "cpu", model, max_length_tokens=64)


def on_cpu(folder: Path) -> StaticRunner:
    return StaticRunner(folder, 1, way="plain", facts={})


def test_prompts_in_padded_pieces_and_tokens_one_by_one_are_pytorchs(model: Path, plain: Path) -> None:
    torch, runner = TorchRunner(hugging_face.load_model(model), model, 1), on_cpu(plain)
    rows = [list(np.random.default_rng(length).integers(3, 200, length)) for length in (1, 7, 8, 9, 30, 64)]
    for row, expected, found in zip(rows, torch.logits(rows), runner.logits(rows), strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 2e-4, len(row)
    steps = np.stack(list(runner.greedy_logits(rows[4], 20)))
    (expected,) = torch.logits([[*rows[4], *(int(token) for token in steps[:-1].argmax(-1))]])
    assert np.abs(steps - expected[len(rows[4]) - 1 :]).max() < 2e-4


def test_answers_are_pytorchs(model: Path, plain: Path) -> None:
    torch, runner = TorchRunner(hugging_face.load_model(model), model, 1), on_cpu(plain)
    prompts = [[1, 9, 12], [1, *range(30, 50)]]
    asked: dict[str, Any] = {"max_new_tokens": 12, "stop_token_ids": [2]}
    assert list(runner.generate(prompts, **asked)) == list(torch.generate(prompts, **asked))


def test_a_window_and_a_cap_of_scores_are_kept(plain: Path, exported: Path, tmp_path: Path) -> None:
    """Attention that looks back 4 tokens and bends scores, against onnxruntime's own operator of both."""
    export = tmp_path / "export"
    shutil.copytree(exported, export)
    full = load_graph(export / "model_full.onnx")
    for node in full.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = onnx_ir.AttrInt64("local_window_size", 4)
            node.attributes["softcap"] = onnx_ir.AttrFloat32("softcap", 0.05)
    onnx_ir.save(full, export / "model.onnx")
    (export / "model_full.onnx").unlink()
    row = list(range(20, 40))
    from slmops.runtime.genai_runner import GenaiRunner

    (expected,) = GenaiRunner(export, 1).logits([row])
    for name, tokens in ((PREFILL, 8), (DECODE, 1)):
        graph = load_graph(export / "model.onnx")
        static.make_static(graph, tokens=tokens, capacity=64, head_size=_head_size(export))
        onnx_ir.save(graph, _portable(export) / name, external_data="model.onnx.data")
    _config(plain, export)
    (found,) = on_cpu(export).logits([row])
    (other,) = on_cpu(plain).logits([row])
    assert np.abs(found - expected).max() < 2e-4
    assert np.abs(other - expected).max() > 1e-2


def _portable(export: Path) -> Path:
    (export / PORTABLE).mkdir(exist_ok=True)
    return export / PORTABLE


def _head_size(export: Path) -> int:
    return json.loads((export / "genai_config.json").read_text())["model"]["decoder"]["head_size"]


def _config(source: Path, export: Path) -> None:
    (export / "genai_config.json").write_text((source / "genai_config.json").read_text())


def test_no_dimension_is_left_open_and_one_that_is_gets_found(plain: Path, tmp_path: Path) -> None:
    options = qnn.recipe_for("fp16", None, "qnn").document()["options"]
    assert [checking.static_problems(plain / PORTABLE / name, options) for name in (PREFILL, DECODE)] == [[], []]
    graph = load_graph(plain / PORTABLE / PREFILL)
    graph.graph.inputs[0].shape = onnx_ir.Shape([1, "sequence_length"])
    onnx_ir.save(graph, tmp_path / PREFILL, external_data="model.onnx.data")
    (line,) = checking.static_problems(tmp_path / PREFILL, options)
    assert "no fixed shape" in line


def test_a_dynamic_graph_is_refused_when_it_is_run(plain: Path, tmp_path: Path) -> None:
    graph = load_graph(plain / PORTABLE / PREFILL)
    graph.graph.inputs[0].shape = onnx_ir.Shape([1, "sequence_length"])
    onnx_ir.save(graph, _portable(tmp_path) / PREFILL, external_data="model.onnx.data")
    _config(plain, tmp_path)
    with pytest.raises(Unavailable, match="input_ids has no fixed shape") as caught:
        on_cpu(tmp_path).next_logits([1, 2])
    assert caught.value.exit_code == 3 and "--provider qnn" in caught.value.hint


def test_attention_that_is_not_written_out_is_refused(exported: Path) -> None:
    graph = load_graph(exported / "model_full.onnx")
    node = next(node for node in graph.graph if node.op_type == "GroupQueryAttention")
    node.attributes["smooth_softmax"] = onnx_ir.AttrInt64("smooth_softmax", 1)
    with pytest.raises(Unavailable, match="smooth_softmax"):
        static.make_static(graph, tokens=8, capacity=64, head_size=16)


def test_what_does_not_fit_the_cache_is_refused(plain: Path) -> None:
    runner = on_cpu(plain)
    with pytest.raises(Unavailable, match="holds 64 tokens and cannot grow") as caught:
        list(runner.stream([5] * 64, max_new_tokens=1, stop_token_ids=[]))
    assert caught.value.exit_code == 3 and "--max-length-tokens" in caught.value.hint
    with pytest.raises(Unavailable, match="60 prompt and 5 new tokens"):
        runner.time([5] * 60, new_tokens=5)
    assert len(list(runner.stream([5] * 60, max_new_tokens=50, stop_token_ids=[]))) == 4
    assert len(runner.time([5] * 9, new_tokens=3).token_seconds) == 2


def test_sampling_keeps_the_most_likely() -> None:
    logits, random = np.array([0.0, 3.0, 2.9, -5.0], np.float32), np.random.default_rng(0)
    assert choose(logits, Sampling(), random) == 1
    drawn = [choose(logits, Sampling(temperature=1.0, top_k=2), random) for _ in range(200)]
    assert set(drawn) == {1, 2} and 60 < drawn.count(2) < 130
    assert {choose(logits, Sampling(temperature=1.0, top_p=0.3), random) for _ in range(50)} == {1}


@pytest.mark.parametrize("name", ["8-gen-3", "8gen3", "Snapdragon 8 Gen 3", "SM8650"])
def test_chips_go_by_many_spellings(name: str) -> None:
    assert (socs.find(name).soc_model, socs.find(name).htp_arch) == (57, 75)


def test_an_unknown_chip_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="'8gen9'") as caught:
        slmops.export(model, out=tmp_path / "out", soc="8gen9", **NPU)
    assert caught.value.exit_code == 3
    assert "did you mean" in caught.value.hint and "8-gen" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_no_two_chips_are_alike() -> None:
    assert len({soc.soc_model for soc in socs.SOCS}) == len({soc.name for soc in socs.SOCS}) == len(socs.SOCS)


@pytest.mark.skipif(qnn_plugin.installed(), reason="onnxruntime-qnn is installed here")
def test_without_the_plugin_the_extra_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="onnxruntime-qnn is not installed") as caught:
        slmops.export(model, out=tmp_path / "out", **NPU)
    assert caught.value.exit_code == 3 and "slmops[qnn]" in caught.value.hint


def test_settings_of_the_npu_are_refused_elsewhere(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="soc, prefill_tokens: only for"):
        slmops.export(model, out=tmp_path / "out", soc="8-elite", prefill_tokens=32)


def test_pack_says_merge_first(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", model)
    with pytest.raises(Unavailable, match="no adapters at run time") as caught:
        slmops.pack(model, out=tmp_path / "out", adapter=[f"a={adapter}"], **NPU)
    assert "slmops merge" in caught.value.hint and "--provider qnn" in caught.value.hint


def test_the_pad_token_is_one_that_no_prompt_holds() -> None:
    bytes_known = {"model": {"vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>", "byte_fallback": True}, "added_tokens": []}
    assert qnn.pad_token(bytes_known, 8, Interface()) == (2, True)
    assert qnn.pad_token(bytes_known, 2, Interface()) == (0, True)
    special = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<s>", "id": 1}, {"content": "<free>", "id": 2}]}
    assert qnn.pad_token(special, 3, Interface(bos_token_id=1)) == (2, True)
    assert qnn.pad_token(special, 3, Interface(bos_token_id=1, chat_template="<free>")) == (2, False)


def test_the_table_has_the_road() -> None:
    found = [target.precision for target in targets.TARGETS if target.road == "qnn"]
    assert found == ["int4", "int8", "fp16"]
    assert {"soc", "prefill_tokens", "weights_once"} < set(ExportSettings.model_fields)


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not qnn_plugin.installed():
        pytest.skip("onnxruntime-qnn is not installed: pip install 'slmops[qnn]'")
    out = tmp_path_factory.mktemp("qnn") / "int4"
    slmops.export(model, out=out, soc="8-gen-3", prefill_tokens=8, max_length_tokens=70, **NPU)
    return out


@plugin
def test_a_compiled_export_says_its_chip_and_what_the_npu_takes(compiled: Path) -> None:
    facts = artifact.load(compiled).manifest.facts
    assert (facts["level"], facts["soc"]["part"], facts["max_length_tokens"]) == ("compiled", "sm8650", 64)
    assert any("70 is no multiple of 8" in warning for warning in artifact.load(compiled).manifest.warnings)
    for name in ("prefill", "decode"):
        found = facts["placement"][name]
        assert found["nodes_on_npu"] == found["nodes"] - 1 and found["contexts"] == 1
        assert list(found["on_cpu"]) == ["GatherBlockQuantized"]
    assert "no NPU" in facts["executed_on"]
    engine = engine_of(compiled)
    assert engine is not None and engine.name == "qnn"


@plugin
def test_compiled_files_compute_what_the_plain_ones_do(compiled: Path) -> None:
    rows = [[1, *range(20, 31)]]
    runner = open_export(compiled, 1)
    assert isinstance(runner, StaticRunner) and runner.way == "compiled"
    (found,), (expected,) = runner.logits(rows), on_cpu_of(compiled).logits(rows)
    assert 0 < np.abs(found - expected).max() < 0.1
    first, second = runner.greedy_logits([1, 20], 2)
    (again,) = runner.logits([[1, 20, int(first.argmax())]])
    assert np.abs(second - again[2]).max() < 0.1


def on_cpu_of(folder: Path) -> StaticRunner:
    return StaticRunner(folder, 1, way="plain")


@plugin
def test_a_package_for_another_chip_than_it_says_is_found(compiled: Path) -> None:
    facts = artifact.load(compiled).manifest.facts
    wrong = facts | {"soc": socs.find("8-elite").document()}
    plain_graph, graph = compiled / PORTABLE / DECODE, compiled / DECODE
    assert placement.compiled_problems(plain_graph, graph, facts) == []
    (line,) = placement.compiled_problems(plain_graph, graph, wrong)
    assert "compiled for soc_model 57, htp_arch 75, and the package says 8-elite" in line


@plugin
def test_a_damaged_context_is_an_error_of_ours(compiled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled, copy)
    for file in copy.glob("*_qnn.bin"):
        file.unlink()
    with pytest.raises(BadArtifact, match=PREFILL):
        StaticRunner(copy, 1, facts=artifact.load(compiled).manifest.facts).next_logits([1, 2])


@pytest.mark.slow
@plugin
def test_genai_loads_the_package_and_answers_the_same(compiled: Path) -> None:
    import onnxruntime_genai as og
    import onnxruntime_qnn

    og.register_execution_provider_library(qnn_plugin.PROVIDER, onnxruntime_qnn.get_library_path())
    loaded, runner = og.Model(str(compiled)), StaticRunner(compiled, 1)
    prompt = [1, *range(20, 31)]
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    found = []
    while len(found) < 4 and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    expected = list(runner.stream(prompt, max_new_tokens=4, stop_token_ids=()))
    assert found == expected[: len(found)]


@pytest.mark.slow
@plugin
def test_weights_once_is_smaller_and_proven_by_compiling_anew(model: Path, compiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "once"
    slmops.export(model, out=out, soc="8-gen-3", prefill_tokens=8, max_length_tokens=64, weights_once=True, **NPU)
    assert len(list(out.glob("*_qnn.bin"))) == 1
    runner = StaticRunner(out, 1)
    assert runner.way == "compiled anew"
    (found,), (expected,) = runner.logits([[1, 20, 21]]), StaticRunner(compiled, 1).logits([[1, 20, 21]])
    assert np.abs(found - expected).max() < 0.05


@pytest.mark.slow
@plugin
def test_verify_proves_it_and_names_where_it_ran(model: Path, compiled: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    result = slmops.verify(compiled, data=str(rows), max_rows=2, kl_bar=1.0, top1_bar=0.01)
    stages = {stage.name: stage for stage in result.stages}
    assert result.failed_stage is None, result.document()
    assert result.level.startswith("compiled")
    assert any("no NPU" in warning for warning in result.warnings)
    assert stages["logits"].figures["beside_cpu"]["largest_difference"] < 0.1
