"""Workflows run: what `slmops olive run` makes is what the slmops command makes, and what Olive would swallow is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import ROWS, make_adapter, make_model, write_rows

import slmops
from slmops import artifact
from slmops.cli import main
from slmops.errors import BadArtifact, InvalidInput, Unavailable

pytest.importorskip("olive", reason="needs the extra slmops[olive]")

from slmops.olive_backend import problems
from slmops.olive_backend.package_config import package_config
from slmops.olive_backend.process import child_environment
from slmops.olive_backend.run_process import own_error
from slmops.olive_backend.running import LOG, WorkflowRun

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "olive_configs"


def workflow(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name).read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that knows its rows by heart, and two LoRAs on it."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model", learned=ROWS)
    make_adapter(folder / "adapter", folder / "model", scale=0.5)  # one that changes the text
    make_adapter(folder / "loud", folder / "model", seed=1, scale=0.5)
    return folder


def furnish(folder: Path, made: Path) -> None:
    """Make a folder what olive_configs/README.md asks for."""
    (folder / "olive_configs").symlink_to(CONFIGS)
    for name in ("model", "adapter", "loud"):
        (folder / name).symlink_to(made / name)
    write_rows(folder / "rows.jsonl")


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that olive_configs/README.md asks for, and we are in it."""
    furnish(tmp_path, made)
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


# --- real runs: each start of Olive costs seconds, so one process takes most of them, one after the other

# What `slmops olive run` starts is `run_process.main`. Whoever asks for a host is written down, until the process has ended.
BATCH = """
import sys
from pathlib import Path

def listen(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        with open("hosts.txt", "a") as stream:
            print(event, arguments, file=stream)

sys.addaudithook(listen)
from slmops.olive_backend.run_process import main
for work in sys.argv[1:]:
    try:
        main(Path(work))
    except Exception as error:
        print(work, repr(error))
"""


@pytest.fixture(scope="module")
def batch(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the workflows ran that train nothing and search nothing; what each told its parent lies in works/NAME."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("batch")
    furnish(folder, made)
    (folder / "tmp").mkdir()
    for name in ("int8", "fp16"):  # as `slmops export -o int8` makes them: Olive takes a setting of that name for the folder
        (folder / name).mkdir()
    half = make_model(folder / "half")
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    workflows = {name: workflow(f"{name}.json") for name in ("int8_cpu", "pack_cpu", "fp16_cuda", "int4_qnn", "int4_openvino", "merge")}
    workflows["pack_cpu"]["input_model"]["adapter_path"] = "loud"  # beside the one that the file names
    workflows["pack_cpu"]["passes"]["pack"]["config"]["adapter_name"] = "loud"
    workflows["int4_qnn"]["passes"]["export"]["config"] |= {"prefill_tokens": 8, "max_length_tokens": 64}
    workflows["merge"]["input_model"]["model_path"] = half.name
    for name, content in workflows.items():
        (folder / "works" / name / "tmp").mkdir(parents=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
        (folder / "works" / name / "request.json").write_text(json.dumps({"workflow": f"{name}.json", "check": False}))
    command = [sys.executable, "-P", "-c", BATCH, *(f"works/{name}" for name in workflows)]
    with (folder / LOG).open("w") as log:
        subprocess.run(command, cwd=folder, env=child_environment(folder, cuda=True, threads=1), stdout=log, stderr=log, check=True)
    return folder


def documented(batch: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what `slmops olive run` would show of a workflow of the batch; we are in its folder then."""
    monkeypatch.chdir(batch)
    result = batch / "works" / name / "result.json"
    assert result.is_file(), (batch / LOG).read_text()[-3000:]
    return WorkflowRun(Path(f"{name}.json"), Path(workflow(f"{name}.json")["output_dir"]), json.loads(result.read_text())).document()


@pytest.mark.slow
def test_no_workflow_asks_for_a_host(batch: Path):
    """Olive would send a device id, whatever OLIVE_DISABLE_TELEMETRY says; see `environment.NO_TELEMETRY`."""
    assert not (batch / "hosts.txt").exists(), (batch / "hosts.txt").read_text()


@pytest.mark.slow
def test_int8(batch: Path, monkeypatch: pytest.MonkeyPatch):
    document = documented(batch, "int8_cpu", monkeypatch)
    assert (document["artifact"], document["kind"], document["precision"], document["level"]) == ("int8_out", "export", "int8", "executed")
    artifact.check(artifact.load("int8_out"))


@pytest.mark.slow
def test_a_package_with_an_adapter_and_the_one_that_the_model_brings(batch: Path, monkeypatch: pytest.MonkeyPatch):
    document = documented(batch, "pack_cpu", monkeypatch)
    assert (document["artifact"], document["kind"], document["level"]) == ("package_out", "package", "executed")
    texts = {
        "".join(slmops.generate("package_out", "play some jazz", raw=True, max_new_tokens=6, adapter=adapter))
        for adapter in (None, ["intent"], ["loud"])
    }
    assert len(texts) == 3


@pytest.mark.slow
def test_fp16_for_cuda_is_built(batch: Path, monkeypatch: pytest.MonkeyPatch):
    document = documented(batch, "fp16_cuda", monkeypatch)
    assert (document["provider"], document["precision"]) == ("cuda", "fp16")
    assert document["level"] in ("built", "executed")  # executed where there is such a GPU


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime_qnn") is None, reason="needs the extra slmops[qnn]")
def test_int4_for_qnn_is_compiled(batch: Path, monkeypatch: pytest.MonkeyPatch):
    document = documented(batch, "int4_qnn", monkeypatch)
    assert (document["provider"], document["level"], document["model_type"].lower()) == ("qnn", "compiled", "compositemodel")
    assert {"prefill.onnx", "decode.onnx", "portable"} <= {file.name for file in Path("qnn_out").iterdir()}
    artifact.check(artifact.load("qnn_out"))


@pytest.mark.slow
def test_openvino_runs_where_it_is_and_says_what_is_missing_where_not(batch: Path, monkeypatch: pytest.MonkeyPatch):
    if find_spec("openvino_genai") is None:
        error = json.loads((batch / "works" / "int4_openvino" / "error.json").read_text())
        assert error["exit_code"] == Unavailable.exit_code
        assert "openvino" in error["message"] and "not installed" in error["message"]
        return
    document = documented(batch, "int4_openvino", monkeypatch)
    assert (document["provider"], document["level"]) == ("openvino", "executed")


@pytest.mark.slow
def test_olives_merge_is_pefts_also_of_a_bfloat16_base(batch: Path, monkeypatch: pytest.MonkeyPatch):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    document = documented(batch, "merge", monkeypatch)
    assert (document["artifact"], document["kind"]) == ("merged_out/model", "model")
    base = AutoModelForCausalLM.from_pretrained("half", dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, "adapter").merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    merged = load_file("merged_out/model/model.safetensors")
    assert len(merged) == 20
    assert all(torch.equal(tensor, exact[name]) for name, tensor in merged.items())


def code_of(*words: str) -> Any:
    """Return the exit code of `slmops WORDS`."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code


@pytest.mark.slow
def test_a_search_takes_the_smallest_that_loses_nothing(place: Path, capsys: pytest.CaptureFixture[str]):
    searching = workflow("search_cpu.json")
    searching["passes"]["export"]["config"]["block_size"] = [32]
    (place / "search.json").write_text(json.dumps(searching))
    assert code_of("olive", "run", "search.json", "--threads", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["artifact"], document["kind"], document["level"]) == ("search_out", "export", "executed")
    assert {run["config"]["precision"] for run in document["runs"]} == {"int4", "int8"}
    good = [run for run in document["runs"] if run["metrics"]["answers-exact_match"] >= 0.99]
    taken = next(run for run in document["runs"] if run["best"])
    assert taken["metrics"]["size-bytes"] == min(run["metrics"]["size-bytes"] for run in good)
    assert document["precision"] == taken["config"]["precision"]
    assert len({run["metrics"]["size-bytes"] for run in document["runs"]}) == 2
    found = artifact.load("search_out")
    artifact.check(found)
    assert found.find("baseline") == (place / "model").resolve()  # Olive copied the folder out of its cache
    assert "Running pass export:slmopsexport" in (place / "search_out" / LOG).read_text()
    assert code_of("olive", "run", "search.json") == BadArtifact.exit_code
    assert "output_dir search_out is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pass_that_fails_is_an_error_with_olives_line(place: Path, capsys: pytest.CaptureFixture[str]):
    """Olive alone ends with exit code 0 here."""
    broken = workflow("merge.json")
    del broken["input_model"]["adapter_path"]
    (place / "broken.json").write_text(json.dumps(broken))
    assert code_of("olive", "run", "broken.json", "--threads", "1") == 1
    assert "Olive made no model of broken.json: RuntimeError: No adapter path found" in capsys.readouterr().err
    assert [file.name for file in (place / "merged_out").iterdir()] == [LOG]


@pytest.mark.slow
def test_force_replaces_nothing_where_nothing_comes_out(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "int4_out").mkdir()
    (place / "int4_out" / "model_config.json").write_text("{}")  # by which Olive's folders are known
    (place / "model").unlink()
    assert code_of("olive", "run", "olive_configs/int4_cpu.json", "--force") == InvalidInput.exit_code
    assert "input_model: no such folder: model" in capsys.readouterr().err
    assert [file.name for file in (place / "int4_out").iterdir()] == ["model_config.json"]
