"""A run that is stopped anywhere goes on to the same adapter; one that learns nothing more is named and ended; all of it is recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import ROWS, TEMPLATES, make_model, write_rows

import slmops
from slmops import artifact, progress
from slmops.config import FinetuneSettings, load
from slmops.errors import BadArtifact, InvalidInput, SlmopsError, Unavailable
from slmops.training import checkpoints
from slmops.training.methods import METHODS
from slmops.training.overfitting import evaluations_since_best, find_turn


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("runs") / "base")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows the rows by heart."""
    return make_model(tmp_path_factory.mktemp("runs") / "learned", learned=ROWS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that contradict what the base knows: what is learned from them makes the validation loss rise."""
    return write_rows(tmp_path_factory.mktemp("rows") / "wrong.jsonl", [row | {"intent": "lamp"} for row in ROWS])


def finetune(base: Path, rows: Path, out: Path, **overrides: Any) -> artifact.Artifact:
    settings: dict[str, Any] = {**TEMPLATES, "validation": rows, "learning_rate": 3e-3, "batch_size": 4, "max_steps": 12, "lora_rank": 4}
    settings |= overrides
    if settings["max_steps"] >= 8 and not settings.keys() & {
        "checkpoint_steps",
        "engine",
    }:  # asked for, for these runs are over in a second
        settings.setdefault("checkpoints", settings.get("evaluations", 4))
    return slmops.finetune(base, rows, out=out, **settings)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[dict[str, Any]]:
    """The curve without what the machine gave, which is never the same."""
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: point[key] for key in point if key not in ("cpu_cores", "memory_bytes")} for point in points]


class Told:
    """A sink of progress that remembers what was said, and presses Ctrl-C after a step."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.steps = at, 0
        self.lines: list[str] = []

    def start(self, label: str, total: int | None, unit: str) -> Told:
        return self

    def advance(self, steps: int = 1, **fields: Any) -> None:
        self.steps += "tokens_per_second" in fields
        if self.at and self.steps == self.at:
            raise KeyboardInterrupt

    def finish(self, task: Any) -> None:
        pass

    def say(self, line: str) -> None:
        self.lines.append(line)


def interrupted(at: int, base: Path, rows: Path, out: Path, **overrides: Any) -> Path:
    with progress.watch(Told(at)), pytest.raises(KeyboardInterrupt):
        finetune(base, rows, out, **overrides)
    return artifact.partial_folder(out) / checkpoints.FOLDER


# Checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_no_pickle(base: Path, rows: Path, tmp_path: Path) -> None:
    folder = interrupted(5, base, rows, tmp_path / "out")
    latest = checkpoints.latest(folder)
    assert latest is not None
    assert latest.name == "checkpoint-3"
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".safetensors"}


def test_what_a_kill_left_half_written_is_never_taken(base: Path, rows: Path, tmp_path: Path) -> None:
    """Half a checkpoint under the name of writing, half the best adapter, and one whose removal was cut short."""
    whole = finetune(base, rows, tmp_path / "whole")
    folder = interrupted(8, base, rows, tmp_path / "out")
    latest = checkpoints.latest(folder)
    assert latest is not None
    (folder / checkpoints.WRITING).mkdir()
    (folder / checkpoints.WRITING / "weights.safetensors").write_bytes((latest / "weights.safetensors").read_bytes()[:100])
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "state.json").write_text("{")
    for file in (folder.parent / checkpoints.BEST).iterdir():
        file.unlink()
        file.write_bytes(b"half")
    resumed = finetune(base, rows, tmp_path / "out", resume=True)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    assert losses(resumed.path) == losses(whole.path)
    assert not list(resumed.path.rglob("*checkpoint*"))


def test_a_kill_while_the_artefact_is_written_loses_nothing(learned: Path, wrong: Path, rows: Path, tmp_path: Path) -> None:
    """The best adapter had been moved to its final name already: it is that of an evaluation before the checkpoint."""
    settings: dict[str, Any] = {"validation": rows, "learning_rate": 2e-2}
    whole = finetune(learned, wrong, tmp_path / "whole", **settings)
    folder = interrupted(11, learned, wrong, tmp_path / "out", **settings)
    for file in (folder.parent / checkpoints.BEST).iterdir():
        file.replace(folder.parent / file.name)
    resumed = finetune(learned, wrong, tmp_path / "out", resume=True, **settings)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)


def test_the_losses_between_two_logs_are_not_forgotten(base: Path, rows: Path, tmp_path: Path) -> None:
    """Losses are logged every second step here, and the checkpoint is of an odd one."""
    settings: dict[str, Any] = {"max_steps": 200, "checkpoint_steps": 63, "validation": None, "validation_share": 0}
    whole = finetune(base, rows, tmp_path / "whole", **settings)
    interrupted(64, base, rows, tmp_path / "out", **settings)
    resumed = finetune(base, rows, tmp_path / "out", resume=True, **settings)
    assert len(losses(whole.path)) == 100
    assert losses(resumed.path) == losses(whole.path)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)


def test_a_run_without_checkpoints_leaves_nothing_behind(base: Path, rows: Path, tmp_path: Path) -> None:
    with progress.watch(Told(8)), pytest.raises(KeyboardInterrupt):
        finetune(base, rows, tmp_path / "out", checkpoints=0)
    assert list(tmp_path.glob("out*")) == []


def test_a_resume_may_ask_for_other_checkpoints_and_for_nothing_else(base: Path, rows: Path, tmp_path: Path) -> None:
    whole = finetune(base, rows, tmp_path / "whole")
    interrupted(5, base, rows, tmp_path / "out")
    with pytest.raises(InvalidInput, match="lora_rank: 8, was 4"):
        finetune(base, rows, tmp_path / "out", resume=True, lora_rank=8)
    resumed = finetune(base, rows, tmp_path / "out", resume=True, checkpoint_steps=2)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [({}, 100, 25), ({}, 7, None), ({"checkpoints": 0}, 100, None), ({"checkpoints": 3}, 7, 3), ({"checkpoint_steps": 9}, 5, 9)],
)
def test_how_often_checkpoints_are_written(settings: dict[str, Any], steps: int, expected: int | None) -> None:
    assert checkpoints.interval(load(FinetuneSettings, None, **settings).run, steps) == expected


def test_checkpoints_that_nobody_asked_for_are_written_seldom(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from slmops.training.watching import Seldom

    asked, seldom = (load(FinetuneSettings, None, **settings).run for settings in ({"checkpoints": 4}, {}))
    assert (checkpoints.seconds_apart(asked), checkpoints.seconds_apart(seldom)) == (0.0, 30.0)
    state, control = TrainerState(), TrainerControl()
    for seconds, written in ((30.0, False), (0.0, True)):
        watch = Seldom(seconds)
        control.should_save = True
        watch.on_step_end(TrainingArguments(tmp_path), state, control)
        assert control.should_save == written
    watch = Seldom(30.0)
    watch.last -= 31
    control.should_save = True
    watch.on_step_end(TrainingArguments(tmp_path), state, control)
    assert control.should_save
    watch.on_save(TrainingArguments(tmp_path), state, control)
    watch.on_step_end(TrainingArguments(tmp_path), state, control)
    assert not control.should_save


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"checkpoints": 2, "checkpoint_steps": 5}, InvalidInput, "two ways"),
        ({"patience": 4}, InvalidInput, "never reached"),
        ({"engine": "olive", "patience": 2}, InvalidInput, "has no patience"),
        ({"engine": "olive", "processes": 2}, InvalidInput, "has no processes"),
        ({"patience": 2, "validation": None, "validation_share": 0}, InvalidInput, "no validation rows"),
        ({"report_to": ["comet"]}, InvalidInput, "report_to"),
        ({"resume": True}, BadArtifact, "no checkpoint"),
    ],
)
def test_wrong_settings_of_a_run(
    base: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], error: type[SlmopsError], text: str
) -> None:
    with pytest.raises(error, match=text):
        finetune(base, rows, tmp_path / "out", **settings)
    assert list(tmp_path.glob("out*")) == []


_KILLED = """
import os, signal, sys
import slmops
from slmops import progress
from test_training_runs import Told, finetune
from pathlib import Path

class Killer(Told):
    def advance(self, steps=1, **fields):
        self.steps += "tokens_per_second" in fields
        if self.at and self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

base, rows, out, at, resume = sys.argv[1:]
with progress.watch(Killer(int(at))):
    finetune(Path(base), Path(rows), Path(out), resume=resume == "1", lora_dropout=0.1, max_steps=24)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 13])
def test_kill_9_and_resume_in_new_processes(base: Path, rows: Path, tmp_path: Path, at: int) -> None:
    """Step 2: before the first checkpoint, so that it begins again. benchmarks/kill_and_resume.py does ten on a real model."""

    def run(out: str, step: int, resume: bool) -> int:
        words = [str(base), str(rows), str(tmp_path / out), str(step), str(int(resume))]
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        return subprocess.run([sys.executable, "-c", _KILLED, *words], env={**os.environ, "PYTHONPATH": paths}, check=False).returncode

    assert run("whole", 0, False) == 0
    assert run("out", at, False) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert run("out", 0, True) == 0
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


# The end of a run --------------------------------------------------------------------------------------------------


def history(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """Ten steps of a training loss, then a validation loss, and again."""
    found: list[dict[str, Any]] = []
    for i, (train, validation) in enumerate(points):
        found += [{"step": 10 * i + step, "loss": train} for step in range(1, 11)]
        found.append({"step": 10 * (i + 1), "eval_loss": validation})
    return found


@pytest.mark.parametrize(
    ("points", "step"),
    [
        ([(3.0, 2.0), (2.0, 1.5), (1.0, 1.8), (0.5, 2.0)], 20),
        ([(3.0, 2.0), (2.0, 1.5), (1.0, 1.8)], None),  # one evaluation says nothing
        ([(3.0, 2.0), (2.0, 1.5), (1.0, 1.505), (0.5, 1.51)], None),  # within a percent
        ([(3.0, 2.0), (2.0, 1.5), (2.5, 1.8), (2.6, 2.0)], None),  # the training loss rises too: no overfitting
        ([(3.0, 2.0), (2.0, 1.5), (1.0, 1.8), (0.5, 1.4)], None),  # it came back
        ([], None),
    ],
)
def test_overfitting_is_a_validation_loss_that_turns_while_the_training_loss_falls(
    points: list[tuple[float, float]], step: int | None
) -> None:
    turn = find_turn(history(*points))
    assert (turn.step if turn else None) == step
    if turn:
        assert str(turn).startswith(
            "overfitting: the validation loss turned at step 20 (1.5, then 2 at step 40) while the training loss fell"
        )
        assert (turn.train_before, turn.train_after) == (2.5, 0.75)


def test_evaluations_since_the_best() -> None:
    assert evaluations_since_best(history((1, 3.0), (1, 2.0), (1, 2.5), (1, 2.0))) == 2
    assert evaluations_since_best([]) == 0


def test_a_run_that_learns_nothing_more_is_named_and_ended(learned: Path, wrong: Path, rows: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"validation": rows, "learning_rate": 1e-2, "max_steps": 40, "evaluations": 20, "patience": 3}
    told = Told()
    with progress.watch(told):
        made = finetune(learned, wrong, tmp_path / "out", **settings)
    facts = made.manifest.facts
    evaluated = [point["validation_loss"] for point in losses(made.path) if "validation_loss" in point]
    best = evaluated.index(min(evaluated))
    assert len(evaluated) == best + 1 + 3
    assert facts["ended_early"] == {"step": 2 * len(evaluated), "of": 40}
    assert facts["steps"] == 2 * len(evaluated)
    assert any(line.startswith(f"ended at step {facts['steps']}: 3 evaluations") for line in told.lines)
    # Named once while it ran, and a warning of the artefact.
    assert len([line for line in told.lines if line.startswith("overfitting")]) == 1
    assert facts["overfitting"]["step"] == 2 * (best + 1)
    assert any("overfitting" in warning and f"step {2 * (best + 1)} is kept" in warning for warning in made.manifest.warnings)
    # Stopped and resumed, it ends where it ended.
    interrupted(facts["steps"] - 1, learned, wrong, tmp_path / "again", **settings)
    resumed = finetune(learned, wrong, tmp_path / "again", resume=True, **settings)
    assert adapter_bytes(resumed.path) == adapter_bytes(made.path)
    assert resumed.manifest.facts["ended_early"] == facts["ended_early"]


def test_use_of_the_machine_is_in_history_manifest_and_picture(base: Path, rows: Path, tmp_path: Path) -> None:
    made = finetune(base, rows, tmp_path / "out")
    points = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert all(point["memory_bytes"] > 50e6 for point in points)
    assert max(point["cpu_cores"] for point in points) > 0.2
    usage = made.manifest.facts["usage"]
    assert usage["memory_bytes"] == max(point["memory_bytes"] for point in points)
    assert 0 < usage["cpu_cores"] <= (os.cpu_count() or 1) + 0.5


# Trackers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_tracker_that_is_not_here_is_refused_before_anything_is_loaded(rows: Path, tmp_path: Path, name: str) -> None:
    if find_spec(name):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(Unavailable, match="--report-to") as caught:
        finetune(tmp_path / "no such model", rows, tmp_path / "out", report_to=[name])
    assert caught.value.exit_code == 3
    assert caught.value.hint == f"pip install 'slmops[{name}]'"


def test_tensorboard_gets_the_curve(base: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings: dict[str, Any] = {"report_to": "tensorboard"}
    interrupted(8, base, rows, tmp_path / "out", **settings)
    made = finetune(base, rows, tmp_path / "out", resume=True, **settings)
    events = EventAccumulator(str(tmp_path / "out.tracking" / "tensorboard"))
    events.Reload()
    for name in ("loss", "validation_loss"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        curve = [(point["step"], pytest.approx(point[name], rel=1e-6)) for point in losses(made.path) if name in point]
        assert told == curve, "what lies past the checkpoint is there once"
    assert "memory_bytes" in events.Tags()["scalars"]


def test_mlflow_gets_the_curve(base: Path, rows: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    made = finetune(base, rows, tmp_path / "out", report_to="mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'out.tracking' / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("slmops").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora_rank"] == "4"
    told = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "validation_loss")]
    assert told == [(point["step"], point["validation_loss"]) for point in losses(made.path) if "validation_loss" in point]


@pytest.mark.slow
def test_wandb_stays_on_this_machine(base: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    finetune(base, rows, tmp_path / "out", report_to="wandb")
    runs = list((tmp_path / "out.tracking" / "wandb" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1
    assert b"validation_loss" in runs[0].read_bytes()


# Methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "qlora"])
def test_every_method_goes_on_to_what_it_would_have_been(base: Path, rows: Path, tmp_path: Path, method: str) -> None:
    """AdaLoRA's checkpoint knows how important each rank was, prefix's the network that makes the prefix."""
    settings: dict[str, Any] = {"method": method, "lora_rank": None, "max_steps": 16, "evaluations": 5}
    whole = finetune(base, rows, tmp_path / "whole", **settings)
    interrupted(11, base, rows, tmp_path / "out", **settings)
    resumed = finetune(base, rows, tmp_path / "out", resume=True, **settings)
    weights = [file.name for file in whole.path.glob("*.safetensors")]
    assert weights
    for name in (*weights, "adapter_config.json"):
        if (whole.path / name).is_file():
            assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert losses(resumed.path) == losses(whole.path)
