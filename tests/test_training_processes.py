"""Several processes learn what one learns: each batch is shared out row by row, one writes and speaks, and all end together."""

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

import psutil
import pytest
from test_training_runs import Told
from tiny import COMPLETION, PROMPT, ROWS, TEMPLATES, make_model, write_rows

import slmops
from slmops import artifact, progress
from slmops.errors import InvalidInput, RunFailed
from slmops.training import processes
from slmops.training.batches import IGNORED, Batches
from slmops.training.launching import Replay, error_document, read_lines
from slmops.training.processes import SharedBatches, Team, find_team


class Epochs:
    """Batches as the trainer's loader takes them."""

    def __init__(self, rows: int, size: int) -> None:
        self.batches = Batches([5 + i % 7 for i in range(rows)], size, 0)
        self.batch_size, self.drop_last, self.number = size, False, 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches.epoch(self.number)


@pytest.mark.parametrize(("rows", "size", "count"), [(40, 8, 2), (41, 8, 3), (9, 4, 2), (5, 4, 4), (3, 8, 5)])
def test_the_shares_of_a_batch_are_the_batch(rows: int, size: int, count: int) -> None:
    whole = Epochs(rows, size)
    shared = [SharedBatches(Epochs(rows, size), index, count) for index in range(count)]
    for epoch in range(3):
        for part in (whole, *shared):
            part.set_epoch(epoch)
        shares = [list(part) for part in shared]
        assert {len(share) for share in shares} == {len(whole)}, "each process has equally many batches"
        for number, batch in enumerate(whole):
            taken = [row for share in shares for row in share[number]]
            assert sorted(row for row in taken if row >= 0) == sorted(batch)
            assert max(len(share[number]) for share in shares) - min(len(share[number]) for share in shares) <= 1


@pytest.mark.parametrize(("rows", "size", "count"), [(40, 8, 2), (41, 8, 3), (9, 4, 2), (3, 8, 5)])
def test_even_shares_have_the_mean_of_the_batch(rows: int, size: int, count: int) -> None:
    """The mean of their means, as gradients are averaged."""
    value = [float(i * i) for i in range(rows)]
    shares = [list(SharedBatches(Epochs(rows, size), index, count, even=True)) for index in range(count)]
    for number, batch in enumerate(Epochs(rows, size)):
        means = [sum(value[row] for row in share[number]) / len(share[number]) for share in shares]
        assert sum(means) / count == pytest.approx(sum(value[row] for row in batch) / len(batch))
        assert len({len(share[number]) for share in shares}) == 1


def test_a_process_without_a_row_computes_on_one_of_which_nothing_counts() -> None:
    (share,) = SharedBatches(Epochs(1, 4), 1, 2)
    assert share == [-1]
    rows = [([1, 5, 2], [IGNORED, 5, 2])]
    assert processes.row_of(rows, share[0], IGNORED) == ([1, 5, 2], [IGNORED] * 3)
    assert processes.row_of(rows, 0, IGNORED) == rows[0]


def test_the_team_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_team(2) == Team()
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    team = find_team(1)
    assert (team, team.leads) == (Team(3, 4, 2), False)
    assert team.threads(None, 8) == 4
    assert team.threads(3, 8) == 3
    assert find_team(4) == team
    with pytest.raises(InvalidInput, match="2 are asked for, and the launcher has started 4"):
        find_team(2)


def test_the_words_of_a_worker_reach_its_launcher(tmp_path: Path) -> None:
    from slmops import progress
    from slmops.training.worker import Relay

    class Heard:
        def __init__(self) -> None:
            self.events: list[Any] = []

        def start(self, label: str, total: int | None, unit: str) -> Heard:
            self.events.append((label, total, unit))
            return self

        def advance(self, steps: int = 1, **fields: Any) -> None:
            self.events.append((steps, fields))

        def finish(self, task: Any) -> None:
            self.events.append("finished")

        def say(self, line: str) -> None:
            self.events.append(line)

    path = tmp_path / "events.jsonl"
    with progress.watch(Relay(path)):
        progress.say("two processes")
        with progress.task("finetune", total=2, unit="steps") as task:
            task.advance(1, loss=0.5)
    path.write_bytes(path.read_bytes() + b'{"half a li')
    heard, replay = Heard(), Replay()
    with progress.watch(heard):
        lines, place = read_lines(path, 0)
        for line in lines:
            replay.show(json.loads(line))
    assert heard.events == ["two processes", ("finetune", 2, "steps"), (1, {"loss": 0.5}), "finished"]
    assert read_lines(path, place) == ([], place)
    assert error_document(RunFailed("no", "yes")) == {"exit_code": 1, "message": "no", "hint": "yes", "foreseen": True}
    assert error_document(ValueError("a\nb"))["message"] == "ValueError: a b"


# Whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("processes") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows: with batches of four, the last has one row, and one of two processes none."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [*ROWS, {"text": "stop the music", "intent": "music"}])


def command(base: Path, rows: Path, out: Path, *more: str) -> list[str]:
    words = ["--prompt-template", PROMPT, "--completion-template", COMPLETION, "--validation", str(rows), "--batch-size", "4"]
    words += ["--lora-rank", "4", "--learning-rate", "3e-3", "--threads", "1", "--precision", "fp32", *more]
    return ["-m", "slmops", "finetune", str(base), str(rows), "-o", str(out), *words]


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_curve(ours: Path, theirs: Path) -> None:
    assert [point["step"] for point in curve(ours)] == [point["step"] for point in curve(theirs)]
    for a, b in zip(curve(ours), curve(theirs), strict=True):
        shared = {"loss", "validation_loss", "gradient_norm"} & set(b)
        assert shared <= set(a)
        for key in shared:
            assert a[key] == pytest.approx(b[key], rel=1e-3), (key, a["step"])


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(base: Path, rows: Path, tmp_path: Path) -> None:
    for out, more in (("one", ()), ("two", ("--processes", "2"))):
        done = subprocess.run(
            [sys.executable, *command(base, rows, tmp_path / out, "--max-steps", "12", "--json", *more)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["processes"] == (2 if more else 1), "one document, of one process"
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launched = subprocess.run(
        [sys.executable, *launcher, *command(base, rows, tmp_path / "launched", "--max-steps", "12", "--json")],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["processes"] == 2
    assert_same_curve(tmp_path / "launched", tmp_path / "one")


PAIRS = {"prompt_template": PROMPT, "chosen_template": COMPLETION, "rejected_template": " {other}"}
MEAN_LOSS = """
class Mean:
    def __call__(self, model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = logits.transpose(1, 2).log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        counted = labels >= 0
        return -((losses * counted).sum(1) / counted.sum(1)).mean()
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["multitask", "dpo", "reward", "a loss of one's own"])
def test_two_processes_learn_another_objective_as_one_does(objective: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """Nine rows in batches of four: the last cannot be shared out."""
    other = {"music": "light", "light": "weather", "weather": "music"}
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    pairs = write_rows(tmp_path / "pairs.jsonl", [row | {"other": other[row["intent"]]} for row in found])
    (tmp_path / "mean.py").write_text(MEAN_LOSS)
    settings: dict[str, Any] = {"batch_size": 4, "lora_rank": 4, "learning_rate": 3e-3, "threads": 1, "precision": "fp32", "max_steps": 6}
    if objective == "multitask":
        data: Path | None = None
        settings |= {"objective": objective, "task": [f"a={rows}", f"b={rows}"], "task_weight": ["a=2", "b=1"], **TEMPLATES}
        settings |= {"task_validation": [f"a={rows}", f"b={rows}"]}
    elif objective in ("dpo", "reward"):
        data = pairs
        settings |= {"objective": objective, "validation": pairs, **PAIRS}
    else:
        data = rows
        settings |= {"loss": f"{tmp_path / 'mean.py'}:Mean", "validation": rows, **TEMPLATES}
    one = slmops.finetune(base, data, out=tmp_path / "one", **settings)
    two = slmops.finetune(base, data, out=tmp_path / "two", processes=2, **settings)
    assert two.manifest.facts["processes"] == 2
    assert_same_curve(two.path, one.path)
    assert any("validation_loss" in point for point in curve(two.path))
    assert two.manifest.metrics["validation_loss"]["value"] == pytest.approx(one.manifest.metrics["validation_loss"]["value"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_that_were_stopped_go_on_to_the_same_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TEMPLATES, "validation": rows, "batch_size": 4, "lora_rank": 4, "lora_dropout": 0.1, "threads": 1}
    settings |= {"max_steps": 200, "evaluations": 20, "processes": 2}

    class Stopper(Told):
        def advance(self, steps: int = 1, **fields: Any) -> None:
            self.steps += "tokens_per_second" in fields
            if self.steps == 40:
                raise KeyboardInterrupt

    whole = slmops.finetune(base, rows, out=tmp_path / "whole", **settings)
    with progress.watch(Stopper()), pytest.raises(KeyboardInterrupt):
        slmops.finetune(base, rows, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidInput, match="processes: 1, was 2"):
        slmops.finetune(base, rows, out=tmp_path / "out", resume=True, **(settings | {"processes": 1}))
    resumed = slmops.finetune(base, rows, out=tmp_path / "out", resume=True, **settings)
    files = [made.path / "adapter_model.safetensors" for made in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def started(arguments: list[str], partial: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a run of two processes, and return it with its workers once it has a checkpoint."""
    run = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(partial.glob("checkpoints/checkpoint-*")):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.05)
    return run, psutil.Process(run.pid).children()


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code", "text"), [("interrupt", 130, "--resume"), ("kill a worker", 1, "process 1 of 2 was stopped")])
def test_all_processes_end_together(base: Path, rows: Path, tmp_path: Path, sign: str, code: int, text: str) -> None:
    out = tmp_path / "out"
    arguments = command(base, rows, out, "--max-steps", "100000", "--checkpoint-steps", "20", "--evaluations", "1", "--processes", "2")
    run, workers = started(arguments, artifact.partial_folder(out))
    assert len(workers) == 2
    if sign == "interrupt":
        run.send_signal(signal.SIGINT)
    else:
        workers[1].kill()
    _, said = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert text in said.splitlines()[-1] + said.splitlines()[-2]
    gone, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    assert not out.exists()
    assert list(artifact.partial_folder(out).glob("checkpoints/checkpoint-*")), "a stopped run can go on"


@pytest.mark.slow
def test_workers_end_when_their_launcher_is_killed(base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command(base, rows, out, "--max-steps", "100000", "--checkpoint-steps", "20", "--evaluations", "1", "--processes", "2")
    run, workers = started(arguments, artifact.partial_folder(out))
    run.kill()
    run.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.slow
def test_an_error_of_the_workers_is_one_line_of_the_command(base: Path, rows: Path, tmp_path: Path) -> None:
    arguments = command(base, rows, tmp_path / "out", "--target-modules", "no_such", "--processes", "2")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no_such" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


# Files for accelerate ----------------------------------------------------------------------------------------------

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "docs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_every_config_and_its_command(path: Path) -> None:
    """By accelerate's own loader, which refuses unknown keys, and its launcher's parser with the command in the file's head."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "multi-node": "MULTI_GPU"}
    assert config.distributed_type.value == kinds[path.stem]
    assert config.num_processes > 1
    assert config.num_machines == (2 if path.stem == "multi-node" else 1)
    line = next(line for line in path.read_text().splitlines() if line.startswith("# accelerate launch "))
    words = line.removeprefix("# accelerate launch ").replace("MACHINE", "1").split()
    parsed = launch_command_parser().parse_args(words)
    assert Path(parsed.config_file).name == path.name
    assert parsed.module
    assert (parsed.training_script, parsed.training_script_args[0]) == ("slmops", "finetune")


def test_the_page_names_every_config() -> None:
    page = (CONFIGS[0].parent.parent / "processes.md").read_text()
    assert all(f"accelerate/{path.name}" in page for path in CONFIGS)
    assert page.count("not executed here") >= 3


def test_the_fsdp_config_is_one_that_its_plugin_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the launcher hands it over, in the environment."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    config: Any = load_config_from_file(str(CONFIGS[0].parent / "fsdp.yaml"))
    for name, value in config.fsdp_config.items():
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert str(plugin.state_dict_type).endswith("FULL_STATE_DICT")
    assert plugin.reshard_after_forward is True
