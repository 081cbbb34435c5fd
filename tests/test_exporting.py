"""What cannot run is refused before any weight is loaded; what is written says how long it may be and where it stops."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import POSITIONS, ROWS, TEMPLATES, make_adapter, make_export, make_model, make_tokenizer, write_rows

import slmops
from slmops import artifact, progress
from slmops.data import Interface
from slmops.errors import BadArtifact, InvalidInput, RunFailed, SlmopsError, Unavailable
from slmops.graph.shapes import read_shape
from slmops.runtime.hugging_face import parameter_count

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
}


def config_only(folder: Path, weights: bytes = b"these are no weights", **config: Any) -> Path:
    """Write a model folder whose weights cannot be loaded: whatever is refused by its config never looked at them."""
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(_LLAMA | config))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def refused(source: Path, out: Path, error: type[SlmopsError], text: str, **settings: Any) -> SlmopsError:
    with pytest.raises(error, match=text) as caught:
        slmops.export(source, out=out, **settings)
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert not out.exists()
    assert not artifact.partial_folder(out).exists()
    return caught.value


def test_stories260k_is_refused_for_its_head_dim(shared: Path, tmp_path: Path) -> None:
    error = refused(shared / "models/stories260k", tmp_path / "out", Unavailable, "head_dim is 8")
    assert error.exit_code == 3
    assert "hidden_size / num_attention_heads" in error.hint


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_attention_heads": 8}, "head_dim is 8"),
        ({"head_dim": 24}, "head_dim is 24"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM cannot be exported"),
        ({"architectures": ["T5ForConditionalGeneration"], "num_attention_heads": None}, "T5ForConditionalGeneration"),
    ],
)
def test_a_shape_that_cannot_run_is_refused_before_weights_are_read(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    assert refused(config_only(tmp_path / "model", **config), tmp_path / "out", Unavailable, text).exit_code == 3


def test_t5_and_gpt2_configs_as_they_are(tmp_path: Path) -> None:
    """Their configs lack the fields of a Llama's, and the name is still what they are refused by."""
    for name in ("T5ForConditionalGeneration", "GPT2LMHeadModel", "FalconForCausalLM"):
        model = tmp_path / name
        make_tokenizer(model)
        (model / "config.json").write_text(json.dumps({"architectures": [name], "n_embd": 32}))
        (model / "model.safetensors").write_bytes(b"garbage")
        assert refused(model, tmp_path / "out", Unavailable, name).exit_code == 3


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{not json", "config.json"),
        ("[]", "config.json"),
        (json.dumps(_LLAMA | {"architectures": None}), "config.json"),
        (json.dumps({"architectures": ["LlamaForCausalLM"]}), "hidden_size"),
    ],
    ids=["broken", "a list", "no architecture", "no heads"],
)
def test_a_config_that_describes_no_decoder_is_refused(tmp_path: Path, config: str, text: str) -> None:
    model = config_only(tmp_path / "model")
    (model / "config.json").write_text(config)
    assert refused(model, tmp_path / "out", BadArtifact, text).exit_code == 4


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    error = refused(config_only(tmp_path / "model"), tmp_path / "out", BadArtifact, "model.safetensors")
    assert error.exit_code == 4


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"precision": "fp16"}, Unavailable, "no fp16 kernels"),
        ({"precision": "bf16"}, Unavailable, "no bf16 kernels"),
        ({"device": "npu", "precision": "bf16"}, Unavailable, "npu"),
        ({"device": "gpu", "provider": "metal"}, Unavailable, "no provider 'metal'"),
        ({"precision": "int3"}, InvalidInput, "precision"),
        ({"precision": "fp32", "block_size": 32}, InvalidInput, "no blocks"),
        ({"block_size": 48}, InvalidInput, "48 is none of"),
        ({"precision": "int4,int8"}, InvalidInput, "are several exports"),
        ({"precision": "int4,int4"}, InvalidInput, "names one twice"),
        ({"precision": "int4,int7"}, InvalidInput, "or several of them"),
        ({"max_length_tokens": 4}, InvalidInput, "max_length_tokens"),
    ],
    ids=str,
)
def test_settings_that_no_target_has(tmp_path: Path, settings: dict[str, Any], error: type[SlmopsError], text: str) -> None:
    refused(config_only(tmp_path / "model"), tmp_path / "out", error, text, **settings)


def hollow_weights(path: Path, parameters: int) -> None:
    """Write a safetensors file of any size that takes no disk: a header, and a hole."""
    header = json.dumps({"model.weight": {"dtype": "F32", "shape": [parameters], "data_offsets": [0, 4 * parameters]}}).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + 4 * parameters)


def test_too_little_memory_is_said_before_work_begins(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model")
    hollow_weights(model / "model.safetensors", 100_000_000_000)
    error = refused(model, tmp_path / "out", RunFailed, "needs about 161.0 GB of memory")
    assert error.exit_code == 1
    error = refused(model, tmp_path / "out", RunFailed, "needs about 401.0 GB of memory", precision="fp32")
    assert "--precision int4" in error.hint


def test_too_little_disk_is_said_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    model = config_only(tmp_path / "model")
    hollow_weights(model / "model.safetensors", 1_000_000)
    error = refused(model, tmp_path / "out", RunFailed, r"needs about 0\.01 GB on disk at .*, and 0\.00 GB are free", precision="fp32")
    assert error.exit_code == 1


def test_an_occupied_output_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for settings in ({}, {"force": True}):
        with pytest.raises(BadArtifact, match="not empty") as caught:
            slmops.export(config_only(tmp_path / "model"), out=out, **settings)
        assert caught.value.exit_code == 4
    assert (out / "mine.txt").read_text() == "keep"


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with artifact.create(tmp_path / "evaluation", kind="evaluation", command="evaluate") as draft:
        (draft.folder / "predictions.jsonl").write_text("{}")
    assert refused(tmp_path / "evaluation", tmp_path / "out", BadArtifact, "is an evaluation, and a model is needed").exit_code == 4
    assert refused(tmp_path / "gone", tmp_path / "out", BadArtifact, "no such model folder").exit_code == 4


def test_the_shape_is_read_off_config_and_headers(tmp_path: Path) -> None:
    shape = read_shape(make_model(tmp_path / "model"))
    assert (shape.architecture, shape.head_dim, shape.positions) == ("LlamaForCausalLM", 16, 128)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    assert parameter_count(tmp_path / "model") == 320 * 64 + 2 * layer + 64


# Real exports ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_length_and_stop_tokens_are_stored_where_each_reader_looks(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl")
    slmops.finetune(base, rows, out=tmp_path / "adapter", validation=rows, max_steps=1, stop_token="<s>", **TEMPLATES)
    merged = slmops.merge(tmp_path / "adapter", out=tmp_path / "merged")
    made = slmops.export(merged.path, out=tmp_path / "int4", max_length_tokens=96)
    config = json.loads((made.path / "genai_config.json").read_text())
    interface = Interface.model_validate(made.manifest.interface)
    assert interface.stop_token_ids == (1,), "as it was trained, not the model's own 2"
    assert config["model"]["eos_token_id"] == 1
    assert config["model"]["context_length"] == config["search"]["max_length"] == 96
    assert interface.max_length_tokens == made.manifest.facts["max_length_tokens"] == 96
    assert interface.prompt_template == TEMPLATES["prompt_template"]
    assert made.find("baseline") == merged.path
    facts = made.manifest.facts
    sizes = sum((made.path / name).stat().st_size for name in ("model.onnx", "model_full.onnx", "model.onnx.data"))
    assert facts["size_bytes"] == sizes
    assert (facts["precision"], facts["level"], facts["recipe"]["id"]) == ("int4", "executed", "cpu-int4")
    # One step of training is far below a rounding step of int4, and that is all there is to warn of.
    assert [warning.partition(":")[0] for warning in made.manifest.warnings] == ["keep as a runtime adapter"]
    bounded = slmops.export(merged.path, out=tmp_path / "long", precision="fp32", max_length_tokens=4096)
    assert json.loads((bounded.path / "genai_config.json").read_text())["search"]["max_length"] == 128
    assert any("4096 is more than the model's 128 positions" in warning for warning in bounded.manifest.warnings)


@pytest.mark.slow
def test_an_adapter_is_merged_beside_its_export(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    made = slmops.export(adapter, out=tmp_path / "fp32", precision="fp32")
    assert made.find("baseline") == tmp_path / "fp32.merged"
    assert artifact.load(tmp_path / "fp32.merged").manifest.kind == "model"
    result = slmops.verify(made.path, threads=1, data=write_rows(tmp_path / "rows.jsonl", [{"text": row["text"] * 3} for row in ROWS]))
    assert {stage.name: stage.status for stage in result.stages}["retention"] == "pass", [s.explanation for s in result.stages]


@pytest.mark.slow
def test_a_block_size_that_a_layer_refuses_leaves_nothing(tmp_path: Path) -> None:
    error = refused(make_model(tmp_path / "model"), tmp_path / "out", InvalidInput, "128 does not divide the 64 inputs", block_size=128)
    assert error.exit_code == 2


class Labels:
    """A sink of progress that remembers what began."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def start(self, label: str, total: int | None, unit: str) -> Any:
        self.labels.append(label)
        return self

    def advance(self, steps: int = 1, **fields: Any) -> None: ...

    def finish(self, task: Any) -> None: ...

    def say(self, line: str) -> None: ...


@pytest.mark.slow
def test_several_precisions_are_whole_exports_of_one_build(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    alone = make_export(tmp_path / "alone", model, "int4")
    seen = Labels()
    with progress.watch(seen):
        made = slmops.exports(model, out=tmp_path / "both", precision="int4, int8", max_length_tokens=POSITIONS)
    assert seen.labels.count("build the graph") == 1, "the second takes the graph of the first"
    assert [one.path.name for one in made.artifacts] == ["int4", "int8"]
    document = made.document()
    assert document["kind"] == "exports"
    assert set(document["exports"]) == {"int4", "int8"}
    for one in made.artifacts:
        again = artifact.load(one.path, kinds=("export",))
        assert again.manifest.config["precision"] == again.manifest.facts["precision"] == one.path.name
        assert again.find("baseline") == model
        artifact.check(again)
    for name in ("model.onnx", "model_full.onnx", "model.onnx.data"):
        assert (tmp_path / "both" / "int4" / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.slow
def test_a_float_graph_without_data_reads_the_models_files(tmp_path: Path) -> None:
    """Stored in bf16, projections fused, two files: what the graph multiplies with is what the files say."""
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.graph import building
    from slmops.graph.linears import linears, parts, weights
    from slmops.graph.stored_weights import StoredWeights
    from slmops.runtime.hugging_face import parameter_shapes

    model = make_model(tmp_path / "model", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model, max_shard_size="100KB")
    (model / "model.safetensors").unlink()
    assert len(list(model.glob("*.safetensors"))) > 1
    options = building.float_options(model)
    building.build(model, tmp_path / "built", precision="fp32", provider="cpu", context_tokens=64, options=options, sources=True)
    assert not (tmp_path / "built/model.onnx.data").exists(), "every matrix is a stack of the model's own"
    graph, stored = building.load_built(tmp_path / "built", model), StoredWeights(model)
    found = linears(graph)
    assert {linear.name.rpartition(".")[2] for linear in found} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    for linear in found:
        held = weights(graph, linear)
        for name, rows in parts(linear.name, parameter_shapes(model)):
            np.testing.assert_array_equal(held[rows], stored[name])


@pytest.mark.slow
def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    first, second = (make_export(tmp_path / name, model, "int4") for name in ("first", "second"))
    for name in ("model.onnx", "model_full.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.slow
def test_a_graph_that_the_runtime_cannot_run_is_no_export(tmp_path: Path) -> None:
    """A RoPE of 24 of 32 numbers of a head: built without a word, refused at run time."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    positions: dict[str, Any] = {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "vocab_size": 320,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "partial_rotary_factor": 0.75}
    model = Phi3ForCausalLM(Phi3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, **heads, **positions))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    error = refused(tmp_path / "model", tmp_path / "out", Unavailable, "cannot run it: .*GroupQueryAttention", precision="fp32")
    assert error.exit_code == 3
