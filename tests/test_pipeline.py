"""Pipelines: what a file means, every mistake of it at once, what is skipped and what runs again, gates, a killed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import COMPLETION, PROMPT, ROWS, make_export, make_model, write_rows

from slmops import artifact
from slmops.errors import BadArtifact, InvalidInput
from slmops.pipeline import PipelineResult, run
from slmops.pipeline.gates import missed, parse_bar
from slmops.pipeline.plan import Plan, Reference, choose_steps, read_plan
from slmops.pipeline.running import config_of
from slmops.pipeline.state import key_of

TEMPLATES = f"prompt_template: {json.dumps(PROMPT)}, completion_template: {json.dumps(COMPLETION)}"
FINETUNE = f"{{{TEMPLATES}, max_steps: 30, batch_size: 8, validation_share: 0, lora_rank: 4, learning_rate: 5e-3}}"
ROAD = f"""
model: base
data: train.jsonl
out: runs
steps:
  finetune: {FINETUNE}
  merge: {{}}
  export: {{precision: int8}}
  verify: {{data: test.jsonl, threads: 1}}
  evaluate: {{data: test.jsonl, threads: 1}}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with random weights."""
    return make_model(tmp_path_factory.mktemp("pipeline-model") / "base")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of 64 are too small to share; a busy machine would spend minutes on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data and something that looks like a model, enough to plan with."""
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "test.jsonl")
    (tmp_path / "base").mkdir()
    return tmp_path


@pytest.fixture
def road(tmp_path: Path, models: Path) -> Path:
    """A pipeline file that runs."""
    (tmp_path / "base").symlink_to(models)
    write_rows(tmp_path / "train.jsonl")
    write_rows(tmp_path / "test.jsonl", ROWS[:4])
    return write(tmp_path, ROAD)


def write(folder: Path, text: str) -> Path:
    (folder / "road.yaml").write_text(text)
    return folder / "road.yaml"


def plan(folder: Path, steps: str, head: str = "model: base\ndata: train.jsonl\n") -> Plan:
    return read_plan(write(folder, f"{head}steps:\n{steps}"))


def source(found: Plan, name: str) -> str | None:
    step = next(step for step in found.steps if step.name == name)
    reference = step.inputs["source"]
    return reference.step or Path(str(reference.place)).name


def statuses(result: PipelineResult) -> dict[str, str]:
    return {step.name: step.status for step in result.steps}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# What a file means


def test_each_step_starts_from_the_nearest_earlier_one_that_fits(place: Path):
    found = read_plan(write(place, ROAD))
    assert [source(found, step.name) for step in found.steps] == ["base", "finetune", "merge", "export", "export"]
    assert found.out == place / "runs"
    assert found.steps[0].inputs["data"] == Reference(place=str(place / "train.jsonl"))


def test_an_export_after_a_finetune_without_merge_takes_the_adapter_and_not_the_base(place: Path):
    found = plan(place, "  finetune: {}\n  export: {}\n")
    assert source(found, "export") == "finetune"


def test_an_export_without_a_finetune_takes_the_model(place: Path):
    assert source(plan(place, "  export: {}\n"), "export") == "base"


def test_names_use_and_steps_as_baselines(place: Path):
    found = plan(
        place,
        "  a: {verb: finetune}\n  b: {verb: finetune, seed: 1}\n  merge: {use: a}\n  int8: {verb: export, precision: int8}\n"
        "  fp32: {verb: export, use: merge, precision: fp32}\n  base: {verb: evaluate, use: model, data: test.jsonl}\n"
        "  bench: {use: int8, baseline: fp32}\n  alone: {verb: bench, baseline: none}\n",
    )
    assert [source(found, step.name) for step in found.steps] == ["base", "base", "a", "merge", "merge", "base", "int8", "fp32"]
    assert found.steps[6].inputs["baseline"] == Reference(step="fp32")
    assert "baseline" not in found.steps[7].inputs
    assert [step.name for step in choose_steps(found, ["bench"])] == ["a", "merge", "int8", "fp32", "bench"]


def test_a_finetune_takes_the_prepared_data(place: Path):
    found = plan(place, "  prepare: {}\n  finetune: {}\n  evaluate: {data: prepare}\n")
    assert found.steps[1].inputs["data"] == Reference(step="prepare")
    assert found.steps[2].inputs["data"] == Reference(step="prepare")


def test_a_hub_id_is_not_a_path(place: Path):
    found = plan(place, "  finetune: {}\n", head="model: org/small-model\ndata: org/rows:train\n")
    assert found.steps[0].inputs["source"] == Reference(place="org/small-model")
    assert found.steps[0].inputs["data"] == Reference(place="org/rows:train")
    (place / "models").mkdir()
    with pytest.raises(InvalidInput, match="model: no such file or folder: .*models/small"):
        plan(place, "  finetune: {}\n", head="model: models/small\ndata: train.jsonl\n")


def test_out_is_beside_the_file_by_default(place: Path):
    assert plan(place, "  export: {}\n").out == place / "road-runs"


def test_a_file_that_an_earlier_step_will_have_written(place: Path):
    found = plan(place, "  house: {verb: demo}\n  finetune: {use: house, data: house/data/train.jsonl, validation: house/data/v.jsonl}\n")
    assert found.steps[0].inputs == {}
    assert found.steps[1].inputs["source"] == Reference(step="house")
    assert found.steps[1].inputs["data"] == Reference(step="house", file="data/train.jsonl")
    assert found.place(found.steps[1].inputs["validation"]) == str(found.out / "house" / "data" / "v.jsonl")
    assert [step.name for step in choose_steps(found, ["finetune"])] == ["house", "finetune"]
    # It is told by its content, and one that is not there is named before the verb looks for it on the hub.
    written = found.out / "house" / "data" / "train.jsonl"
    written.parent.mkdir(parents=True)
    write_rows(written)
    with pytest.raises(InvalidInput, match="step house wrote no file data/v.jsonl"):
        key_of(found, found.steps[1])
    write_rows(written.with_name("v.jsonl"))
    key = key_of(found, found.steps[1])
    write_rows(written, ROWS[:3])
    assert key_of(found, found.steps[1]) != key


def test_adapters_by_name_are_steps_or_folders(place: Path):
    (place / "theirs").mkdir()
    steps = "  a: {verb: finetune}\n  b: {verb: finetune, seed: 1}\n  pack: {adapter: {intent: a, slots: b, other: theirs}}\n"
    found = plan(place, steps)
    step = found.steps[2]
    assert step.needs == ("a", "b")
    assert step.inputs["adapter.intent"] == Reference(step="a")
    assert step.inputs["adapter.other"] == Reference(place=str(place / "theirs"))
    runs = found.out
    assert config_of(found, step)["adapter"] == [f"intent={runs / 'a'}", f"slots={runs / 'b'}", f"other={place / 'theirs'}"]
    # `pack` of an export takes the export's precision: a default must not look like something that was asked for.
    assert set(config_of(found, step)) == {"adapter"}
    # A name is part of what a package is; where an adapter lies is not.
    for folder, content in (("a", "1"), ("b", "2")):
        (runs / folder).mkdir(parents=True)
        (runs / folder / "adapter_model.safetensors").write_text(content)
    key = key_of(found, step)
    renamed = plan(place, steps.replace("intent: a", "intention: a"))
    assert key_of(renamed, renamed.steps[2]) != key
    (place / "copy").mkdir()
    (place / "copy" / "adapter_model.safetensors").write_text("1")
    moved = plan(place, steps.replace("intent: a", "intent: copy"))
    assert key_of(moved, moved.steps[2]) == key


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ("[a]", "steps.pack.adapter: must map names"),
        ("{in/tent: a}", "steps.pack.adapter: must map names"),
        ("{intent: merge}", "steps.pack.adapter.intent: merge makes model, and adapter is needed"),
        ("{intent: evaluate}", "steps.pack.adapter.intent: evaluate makes no folder, and adapter is needed"),
        ("{intent: aa}", "steps.pack.adapter.intent: no such file or folder"),
    ],
)
def test_what_is_no_adapter_by_name(place: Path, adapters: str, message: str):
    with pytest.raises(InvalidInput) as caught:
        plan(place, f"  a: {{verb: finetune}}\n  merge: {{}}\n  evaluate: {{data: test.jsonl}}\n  pack: {{adapter: {adapters}}}\n")
    assert message in caught.value.message


def test_rows_of_a_package_are_given_by_adapter(place: Path):
    found = plan(
        place,
        "  house: {verb: demo}\n  a: {verb: finetune, use: house}\n  pack: {use: house, adapter: {intent: a}}\n"
        "  verify: {data: {intent: house/data/test.jsonl, base: test.jsonl}}\n  bench: {adapter: intent, data: test.jsonl}\n"
        "  evaluate: {adapter: [intent], data: test.jsonl}\n  alone: {verb: verify, data: test.jsonl}\n",
    )
    assert [source(found, name) for name in ("pack", "verify", "bench", "evaluate", "alone")] == ["house", "pack", "pack", "pack", "pack"]
    rows = [f"intent={found.out / 'house' / 'data' / 'test.jsonl'}", f"base={place / 'test.jsonl'}"]
    assert config_of(found, found.steps[3])["data"] == rows
    assert config_of(found, found.steps[4])["adapter"] == config_of(found, found.steps[5])["adapter"] == ["intent"]
    assert config_of(found, found.steps[6])["data"] == str(place / "test.jsonl")


# What is wrong with it


def test_every_mistake_is_reported_at_once_before_anything_runs(place: Path):
    text = """
model: bass
date: train.jsonl
steps:
  finetune: {lerning_rate: 1e-3, epochs: -1, force: true}
  exprot: {}
  merge: {use: finetun}
  mine: {precision: int4}
  verify: {data: tset.jsonl}
  evaluate: {gate: {exact_mach: 0.9, f1: high}}
  bench: 7
"""
    with pytest.raises(InvalidInput) as caught:
        run(write(place, text))
    for part in (
        "date: unknown key (did you mean data?)",
        "model: no such file or folder: ",
        "steps.finetune.lerning_rate: unknown setting (did you mean learning_rate?)",
        "steps.finetune.epochs: must be greater than 0",
        "steps.finetune.force: the pipeline decides it",
        "steps.finetune: needs a data",
        "steps.exprot: unknown step exprot (did you mean export?)",
        "steps.merge.use: no earlier step finetun (did you mean finetune?)",
        "steps.mine: unknown step mine; a name of your own needs `verb: VERB`",
        "steps.verify.data: no such file or folder: ",
        "steps.evaluate.data: name the rows to measure on",
        "steps.evaluate.gate.exact_mach: unknown metric (did you mean exact_match?)",
        "steps.evaluate.gate.f1: 'high' is no bar",
        "steps.bench: must be a mapping of settings, not 7",
    ):
        assert part in caught.value.message, part
    assert caught.value.exit_code == 2
    assert not (place / "road-runs").exists()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("  merge: {}\n", "steps.merge: no earlier step makes the adapter that it needs"),
        ("  verify: {}\n", "steps.verify: no earlier step makes the export or package that it needs"),
        ("  finetune: {}\n  bench: {use: finetune}\n", "steps.bench.use: finetune makes adapter, and export or package is needed"),
        ("  export: {}\n  verify: {}\n  evaluate: {use: verify, data: test.jsonl}\n", "verify makes no folder"),
        ("  export: {use: [1]}\n", "steps.export.use: no earlier step"),
        ("  data: {verb: export}\n", "steps.data: no name for a step"),
        ("  a/b: {verb: export}\n", "steps.a/b: no name for a step"),
        ("  demo: {use: model}\n", "steps.demo.use: it starts from nothing"),
        ("  demo: {}\n  finetune: {data: demo/../../train.jsonl}\n", "demo/../../train.jsonl leaves the folder of step demo"),
        ("  export: {out: here}\n", "steps.export.out: the pipeline decides it"),
        ("  export: {gate: 3}\n", "steps.export.gate: must be a mapping"),
        ("  {}\n", "steps: must be a mapping with at least one step"),
        ("  export: {}\n  export: {}\n", "key given twice: export"),
    ],
)
def test_one_mistake(place: Path, steps: str, message: str):
    with pytest.raises(InvalidInput) as caught:
        plan(place, steps)
    assert message in caught.value.message


def test_an_unknown_step_to_run_is_named(place: Path):
    with pytest.raises(InvalidInput, match=r"only: exprt: no such step \(did you mean export\?\)"):
        choose_steps(plan(place, "  export: {}\n"), ["exprt"])


# Gates


@pytest.mark.parametrize(
    ("figure", "bar", "value", "meets"),
    [
        ("exact_match", 0.95, 0.95, True),
        ("exact_match", 0.95, 0.949, False),
        ("exact_match", 0.95, float("nan"), False),
        ("exact_match", "<= 0.5", 0.4, True),
        ("perplexity", 12, 11.9, True),
        ("perplexity", 12, 12.1, False),
        ("perplexity", ">= 12", 12.1, True),
    ],
)
def test_both_sides_of_a_gate(figure: str, bar: Any, value: float, meets: bool):
    problems = missed((parse_bar(figure, bar),), {"metrics": {figure: {"value": value}}})
    assert (problems == []) is meets


def test_a_gate_reaches_any_figure_and_refuses_one_that_is_not_there():
    document = {"ratio": {"decode": {"value": 7.5}}, "candidate": {"ttft_ms": {"median": 3.0}}}
    assert missed((parse_bar("ratio.decode", 7), parse_bar("candidate.ttft_ms", 4)), document) == []
    assert missed((parse_bar("ratio.decode", 8),), document) == ["ratio.decode is 7.5, and the gate is ratio.decode >= 8"]
    with pytest.raises(InvalidInput, match="there is no figure ratio.speed"):
        missed((parse_bar("ratio.speed", 8),), document)


# What is skipped, and what runs again


@pytest.mark.slow
def test_only_what_depends_on_a_change_runs_again(road: Path, monkeypatch: pytest.MonkeyPatch):
    runs = road.parent / "runs"
    monkeypatch.chdir(road.parent.parent)  # paths are relative to the file, not to where it is run from
    first = run(road)
    assert first.passed and set(statuses(first).values()) == {"done"}
    document = first.document()
    assert json.loads(json.dumps(document)) == document
    assert [step["command"] for step in document["steps"]] == ["finetune", "merge", "export", "verify", "evaluate"]
    assert document["steps"][2]["figures"]["precision"] == "int8"
    assert document["steps"][3]["document"]["passed"] is True
    predictions = (runs / "evaluate.predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 4

    before = {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()}
    second = run(road)
    assert set(statuses(second).values()) == {"skipped"}
    assert {file: file.stat().st_mtime_ns for file in runs.rglob("*") if file.is_file()} == before
    assert [step.result for step in second.steps] == [step.result for step in first.steps]

    edit(road, "precision: int8", "precision: fp32")
    assert list(statuses(run(road)).values()) == ["skipped", "skipped", "done", "done", "done"]

    write_rows(road.parent / "test.jsonl", ROWS[:5])
    assert list(statuses(run(road)).values()) == ["skipped", "skipped", "skipped", "done", "done"]

    # A damaged artefact is made again; it comes out the same, and what follows stays as it is.
    adapter = runs / "finetune" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-1] + b"\xff")
    assert list(statuses(run(road)).values()) == ["done", "skipped", "skipped", "skipped", "skipped"]
    assert adapter.read_bytes() == content

    edit(road, "learning_rate: 5e-3", "learning_rate: 6e-3")
    assert list(statuses(run(road)).values()) == ["done", "done", "done", "done", "done"]
    assert list(statuses(run(road, only=["merge"], fresh=True)).values()) == ["done", "done"]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """An int4 export of the tiny base."""
    return make_export(tmp_path_factory.mktemp("pipeline-package") / "int4", models, precision="int4")


def measures(folder: Path, package: Path, steps: str) -> Path:
    (folder / "package").symlink_to(package)
    write_rows(folder / "test.jsonl")
    return write(folder, f"model: package\nout: runs\nsteps:\n{steps}")


TWO = f"""
  evaluate: {{data: test.jsonl, threads: 1, {TEMPLATES}, gate: {{exact_match: 1.01}}}}
  again: {{verb: evaluate, data: test.jsonl, threads: 1, {TEMPLATES}}}
"""


@pytest.mark.slow
def test_a_gate_that_is_not_met_stops_the_run_with_exit_5(tmp_path: Path, package: Path, capfd: pytest.CaptureFixture[str]):
    from slmops.cli import main

    file = measures(tmp_path, package, TWO)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--json", "--quiet"])
    document = json.loads(capfd.readouterr().out)
    assert ended.value.code == 5
    assert (document["ok"], document["passed"], document["failed_step"], document["not_run"]) == (False, False, "evaluate", ["again"])
    assert "and the gate is exact_match >= 1.01" in document["steps"][0]["reason"]
    assert not (tmp_path / "runs" / "again.json").exists()

    # The bar is no part of what was measured: a lower one is met by the figures that are there.
    edit(file, "1.01", "0")
    result = run(file)
    assert result.passed
    assert statuses(result) == {"evaluate": "skipped", "again": "done"}


@pytest.mark.slow
def test_a_verify_that_does_not_pass_stops_the_run_and_is_tried_again(tmp_path: Path, package: Path):
    file = measures(tmp_path, package, "  verify: {data: test.jsonl, threads: 1, kl_bar: 1e-12}\n  bench: {}\n")
    for _ in range(2):
        result = run(file)
        assert statuses(result) == {"verify": "failed"}
        assert result.steps[0].reason == "stage logits was not met"
        assert result.not_run == ("bench",)


def test_a_folder_of_somebody_else_is_not_replaced(road: Path):
    (road.parent / "runs" / "merge").mkdir(parents=True)
    (road.parent / "runs" / "merge" / "notes.txt").write_text("mine")
    with pytest.raises(BadArtifact, match="this pipeline did not write it") as caught:
        run(road)
    assert caught.value.exit_code == 4
    assert not (road.parent / "runs" / "finetune").exists()


def test_a_step_that_breaks_is_named(road: Path):
    edit(road, json.dumps(PROMPT), '"{sentence}"')
    with pytest.raises(InvalidInput, match="^step finetune: .*sentence"):
        run(road)
    state = json.loads((road.parent / "runs" / "pipeline.json").read_text())
    assert state["steps"]["finetune"]["status"] == "failed"


def test_a_broken_state_file_is_an_error_and_not_a_fresh_start(road: Path):
    (road.parent / "runs").mkdir()
    (road.parent / "runs" / "pipeline.json").write_text("{")
    with pytest.raises(BadArtifact, match="is not the state of a pipeline"):
        run(road)


# A run that was killed


@pytest.mark.slow
def test_a_killed_finetune_goes_on_from_its_last_checkpoint(road: Path):
    edit(road, "max_steps: 30", "max_steps: 240, evaluations: 12, checkpoints: 12")
    checkpoints = road.parent / "runs" / "finetune.partial" / "checkpoints"
    killed = typed(road)
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None and time.monotonic() < deadline, "no checkpoint to kill it after"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (road.parent / "runs" / "finetune").exists()
    assert json.loads((road.parent / "runs" / "pipeline.json").read_text())["steps"]["finetune"]["status"] == "running"
    (checkpoints / "checkpoint-999").mkdir()  # as a kill in the middle of writing one leaves it

    again = typed(road)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert "goes on from its last checkpoint" in err
    document = json.loads(out)
    assert document["steps"][0]["document"]["steps"] == 240
    manifest = artifact.load(road.parent / "runs" / "finetune").manifest
    assert manifest.config["resume"] is True

    # The same adapter as a run that was never stopped.
    whole = write(road.parent, road.read_text().replace("out: runs", "out: whole"))
    done = run(whole, only=["finetune"])
    assert done.steps[0].result["steps"] == 240
    tensors = [folder / "finetune" / "adapter_model.safetensors" for folder in (road.parent / "runs", road.parent / "whole")]
    assert largest_difference(*tensors) < 1e-6


def typed(road: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from slmops.cli import main; main()", "run", str(road), "--only", "merge", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def largest_difference(first: Path, second: Path) -> float:
    from safetensors.numpy import load_file

    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return max(float(abs(one[name] - other[name]).max()) for name in one)
