"""Workflows run: what `slmops olive run` makes is what the slmops command makes, and what Olive would swallow is an error."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import ROWS, make_adapter, make_export, make_model, write_rows

import slmops
from slmops import artifact
from slmops.errors import BadArtifact, InvalidInput, RunFailed, Unavailable

pytest.importorskip("olive", reason="needs the extra slmops[olive]")

from slmops.olive_backend import problems
from slmops.olive_backend.package_config import package_config
from slmops.olive_backend.process import child_environment
from slmops.olive_backend.run_process import own_error
from slmops.olive_backend.running import LOG

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "olive_configs"


def workflow(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name).read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that knows its rows by heart, and a LoRA on it."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model", learned=ROWS)
    make_adapter(folder / "adapter", folder / "model")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that olive_configs/README.md asks for, and we are in it."""
    (tmp_path / "olive_configs").symlink_to(CONFIGS)
    for name in ("model", "adapter"):
        (tmp_path / name).symlink_to(made / name)
    write_rows(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_package_config_has_olives_passes_and_ours():
    passes = package_config()["passes"]
    assert {"LoRA", "MergeAdapterWeights", "SlmopsExport", "SlmopsPack"} <= set(passes)


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("unknown setting", {"precison": "int4"}, "passes.export: unknown key 'precison' (did you mean precision?)"),
    ("the workflow says where", {"out": "x"}, "passes.export: unknown key 'out'"),
    ("the target says for what", {"device": "cpu"}, "passes.export: unknown key 'device'"),
    ("wrong type", {"block_size": "many"}, "passes.export: Olive refuses it: block_size"),
    ("out of bounds", {"block_size": 3}, "passes.export: bad settings: block_size: must be greater than or equal to 16"),
    ("no such precision", {"precision": "int3"}, "passes.export: bad settings: precision: must be"),
    ("impossible on this target", {"precision": "fp16"}, "passes.export: precision fp16 does not run on cpu"),
    ("a list without a search", {"precision": ["int4", "int8"]}, "passes.export: Olive refuses it: precision"),
]


@pytest.mark.parametrize(("change", "expected"), [(change, text) for _, change, text in CHANGES], ids=[name for name, _, _ in CHANGES])
def test_what_a_pass_of_ours_would_refuse_is_said_before_anything_runs(place: Path, change: dict[str, Any], expected: str):
    wrong = workflow("int4_cpu.json")
    wrong["passes"]["export"]["config"] |= change
    found = problems(wrong)
    assert any(problem.startswith(expected) for problem in found), found


def test_each_candidate_of_a_search_is_foretold(place: Path):
    wrong = workflow("search_cpu.json")
    wrong["passes"]["export"]["config"]["precision"] = ["int4", "fp16"]
    found = problems(wrong)
    assert found
    assert all("fp16" in problem for problem in found)


def test_a_provider_that_slmops_exports_nothing_for(place: Path):
    wrong = workflow("int4_cpu.json")
    wrong["systems"]["cpu"]["accelerators"][0] = {"device": "gpu", "execution_providers": ["ROCMExecutionProvider"]}
    assert any("slmops exports nothing for ROCMExecutionProvider" in problem for problem in problems(wrong))


@pytest.mark.parametrize(
    ("content", "error", "expected"),
    [
        (None, InvalidInput, "no such file"),
        ('{\n "passes": ,\n}', InvalidInput, "line 2: broken JSON"),
        ("[]", InvalidInput, "holds a list, not a workflow"),
        ('{"passes": {}}', InvalidInput, "says no output_dir"),
        ('{"output_dir": "a.b"}', InvalidInput, "Olive takes a name with a dot for a file"),
        ('{"output_dir": "mine"}', BadArtifact, "output_dir mine is not empty"),
    ],
)
def test_what_is_refused_without_olive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, error: type[Exception], expected: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    if content is not None:
        (tmp_path / "w.json").write_text(content)
    with pytest.raises(error, match=expected):
        slmops.run_workflow("w.json")
    if error is BadArtifact:
        with pytest.raises(error, match="was not written by Olive"):
            slmops.run_workflow("w.json", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_an_error_of_slmops_keeps_its_kind_under_olives():
    try:
        try:
            raise Unavailable("not here", "install it")
        except Unavailable as inner:
            raise ValueError("not here (install it)") from inner
    except ValueError as outer:
        assert own_error(outer) is outer.__cause__
    assert own_error(ValueError("of Olive's own")) is None


def figures(folder: Path) -> dict[str, str]:
    """Hashes of what a package computes with."""
    return {name: artifact.sha256_file(folder / name) for name in ("model.onnx.data", "genai_config.json")}


@pytest.mark.slow
def test_int4_is_what_the_command_makes(place: Path):
    document = slmops.run_workflow("olive_configs/int4_cpu.json", threads=1).document()
    assert (document["artifact"], document["kind"], document["level"]) == ("int4_out", "export", "executed")
    assert figures(place / "int4_out") == figures(make_export(place / "by_command", place / "model", "int4"))
    found = artifact.load("int4_out")
    artifact.check(found)
    assert found.find("baseline") == (place / "model").resolve()  # Olive copied the folder out of its cache
    assert "Running pass export:slmopsexport" in (place / "int4_out" / LOG).read_text()
    with pytest.raises(BadArtifact, match="not empty"):
        slmops.run_workflow("olive_configs/int4_cpu.json")


@pytest.mark.slow
def test_plain_olive_runs_int8_with_our_package_config(place: Path):
    variables = {**child_environment(place, cuda=False, threads=1), "TMPDIR": str(place)}
    listed = subprocess.run(
        [sys.executable, "-m", "slmops.olive_backend.package_config"], env=variables, capture_output=True, text=True, check=True
    )
    (place / "package_config.json").write_text(listed.stdout)
    command = [sys.executable, "-m", "olive", "run", "--config", "olive_configs/int8_cpu.json", "--package-config", "package_config.json"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert artifact.load("int8_out").manifest.facts["precision"] == "int8"
    artifact.check(artifact.load("int8_out"))


@pytest.mark.slow
def test_olives_merge_is_pefts_also_of_a_bfloat16_base(place: Path):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    (place / "model").unlink()
    original = make_model(place / "model")
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(original)
    document = slmops.run_workflow("olive_configs/merge.json", threads=1).document()
    assert (document["artifact"], document["kind"]) == ("merged_out/model", "model")
    base = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, str(place / "adapter")).merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    merged = load_file(place / "merged_out" / "model" / "model.safetensors")
    assert len(merged) == 20
    assert all(torch.equal(tensor, exact[name]) for name, tensor in merged.items())


@pytest.mark.slow
def test_a_package_with_an_adapter(place: Path):
    (place / "adapter").unlink()
    make_adapter(place / "adapter", place / "model", scale=0.5)  # one that changes the text
    document = slmops.run_workflow("olive_configs/pack_cpu.json", threads=1).document()
    assert (document["artifact"], document["kind"], document["level"]) == ("package_out", "package", "executed")
    plain = "".join(slmops.generate("package_out", "play some jazz", raw=True, max_new_tokens=6))
    adapted = "".join(slmops.generate("package_out", "play some jazz", raw=True, max_new_tokens=6, adapter=["intent"]))
    assert plain != adapted


@pytest.mark.slow
def test_fp16_for_cuda_is_built(place: Path):
    document = slmops.run_workflow("olive_configs/fp16_cuda.json", threads=1).document()
    assert (document["provider"], document["precision"]) == ("cuda", "fp16")
    assert document["level"] in ("built", "executed")  # executed where there is such a GPU


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra slmops[qnn]")
def test_int4_for_qnn_is_compiled(place: Path):
    document = slmops.run_workflow("olive_configs/int4_qnn.json", threads=1).document()
    assert (document["provider"], document["level"], document["model_type"].lower()) == ("qnn", "compiled", "compositemodel")
    assert {"prefill.onnx", "decode.onnx", "portable"} <= {file.name for file in (place / "qnn_out").iterdir()}
    artifact.check(artifact.load("qnn_out"))


@pytest.mark.slow
def test_openvino_runs_where_it_is_and_says_what_is_missing_where_not(place: Path):
    if find_spec("openvino_genai") is None:
        with pytest.raises(Unavailable, match="openvino.* not installed"):
            slmops.run_workflow("olive_configs/int4_openvino.json", threads=1)
        assert not (place / "openvino_out").exists()
        return
    document = slmops.run_workflow("olive_configs/int4_openvino.json", threads=1).document()
    assert (document["provider"], document["level"]) == ("openvino", "executed")


@pytest.mark.slow
def test_a_search_takes_the_smallest_that_loses_nothing(place: Path):
    document = slmops.run_workflow("olive_configs/search_cpu.json", threads=1).document()
    assert len(document["runs"]) == 4
    good = [run for run in document["runs"] if run["metrics"]["answers-exact_match"] >= 0.99]
    taken = next(run for run in document["runs"] if run["best"])
    assert taken["metrics"]["size-bytes"] == min(run["metrics"]["size-bytes"] for run in good)
    assert document["precision"] == taken["config"]["precision"]
    assert len({run["metrics"]["size-bytes"] for run in document["runs"]}) == 4


@pytest.mark.slow
def test_a_pass_that_fails_is_an_error_with_olives_line(place: Path):
    """Olive alone ends with exit code 0 here."""
    broken = copy.deepcopy(workflow("merge.json"))
    del broken["input_model"]["adapter_path"]
    (place / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(RunFailed, match="Olive made no model of broken.json: RuntimeError: No adapter path found"):
        slmops.run_workflow("broken.json", threads=1)
    assert [file.name for file in (place / "merged_out").iterdir()] == [LOG]
