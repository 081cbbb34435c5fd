r"""Does a run that was killed go on to the adapter that it would have made? `kill -9` at random steps, `--resume`, bytes compared.

    python benchmarks/kill_and_resume.py MODEL DATA --work DIR --prompt-template '{text}\nIntent:' --completion-template ' {intent}'

One run is left alone. Then, for each kill, the same run is started, killed with signal 9 after a random optimizer step (nothing
of Python's runs after that), and resumed in a new process. Three more are killed while a checkpoint is being written: as soon as its
first file is there. Dropout is on, so that the random numbers matter. Compared are the adapter's bytes, every loss of the
history, and the loss of the manifest. Prints a table, and one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import slmops
from slmops import artifact, hashes, progress
from slmops.config import decode_escapes
from slmops.training import checkpoints


class Executioner:
    """A sink of progress that kills its own process after a step."""

    def __init__(self, at: int, counted: int = 0) -> None:
        self.at, self.counted = at, counted

    def start(self, label: str, total: int | None, unit: str) -> Executioner:
        return self

    def advance(self, steps: int = 1, **fields: Any) -> None:
        self.counted += "tokens_per_second" in fields
        if self.at and self.counted == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, task: Any) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def kill_in_writing(folder: Path, after: int) -> None:
    """Kill this process when the checkpoint past step `after` has its first file."""
    while True:
        latest = checkpoints.latest(folder)
        step = checkpoints.step_of(latest) if latest else 0
        if step >= after and (folder / checkpoints.WRITING).is_dir() and any((folder / checkpoints.WRITING).iterdir()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.0002)


def train(options: argparse.Namespace, out: Path, *, resume: bool, at: int = 0, writing: int | None = None) -> int:
    """Train in a process of its own; return its exit code."""
    words = [str(out), str(at), "-1" if writing is None else str(writing), str(int(resume))]
    job = json.dumps({name: str(value) for name, value in vars(options).items()})
    done = subprocess.run([sys.executable, __file__, "--child", job, *words], check=False, capture_output=True)
    return done.returncode


def child(options: dict[str, str], out: Path, at: int, writing: int, resume: bool) -> None:
    if writing >= 0:
        folder = artifact.partial_folder(out) / checkpoints.FOLDER
        threading.Thread(target=kill_in_writing, args=(folder, writing), daemon=True).start()
    with progress.watch(Executioner(at)):
        slmops.finetune(
            options["model"],
            options["data"],
            out=out,
            resume=resume,
            prompt_template=decode_escapes(options["prompt_template"]),
            completion_template=decode_escapes(options["completion_template"]),
            max_rows=int(options["rows"]),
            epochs=float(options["epochs"]),
            evaluations=5,
            checkpoints=5,
            lora_dropout=0.1,
            stop_token=options["stop_token"] or None,
        )


def made(folder: Path) -> dict[str, Any]:
    """Return what two runs have to agree on."""
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "validation_loss", "learning_rate", "gradient_norm")
    found = artifact.load(folder)
    return {
        "adapter": hashes.sha256_file(folder / "adapter_model.safetensors"),
        "history": [{key: point[key] for key in kept if key in point} for point in points],
        "metrics": found.manifest.metrics,
        "steps": found.manifest.facts["steps"],
    }


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    whole = options.work / "whole"
    if not whole.exists() and train(options, whole, resume=False):
        sys.exit("the run that is left alone failed")
    expected = made(whole)
    steps, random_steps = expected["steps"], random.Random(options.seed)
    kills: list[tuple[int, int | None]] = [(random_steps.randrange(1, steps), None) for _ in range(options.kills)]
    kills += [(0, after) for after in (0, steps // 5, 3 * (steps // 5))]
    rows = []
    print(f"{'killed':>30}  {'resumed from':>12}  {'adapter':>12}  history  metrics", flush=True)
    for number, (at, writing) in enumerate(kills):
        out = options.work / f"killed-{number}"
        code = train(options, out, resume=False, at=at, writing=writing)
        if code != -signal.SIGKILL:
            sys.exit(f"the run was to be killed, and ended with {code}")
        latest = checkpoints.latest(artifact.partial_folder(out) / checkpoints.FOLDER)
        step = checkpoints.step_of(latest) if latest else 0
        if train(options, out, resume=True):
            sys.exit("the run did not go on")
        found = made(out)
        where = f"after step {at}" if writing is None else f"writing a checkpoint past {writing}"
        same = {key: found[key] == expected[key] for key in ("adapter", "history", "metrics")}
        rows.append({"killed": where, "resumed_from": step, **same})
        print(f"{where:>30}  {step:>12}  {found['adapter'][:12]}  {same['history']!s:>7}  {same['metrics']!s:>7}", flush=True)
    alike = sum(row["adapter"] and row["history"] and row["metrics"] for row in rows)
    print(f"unbroken: {expected['adapter'][:12]}, {steps} steps; {alike} of {len(rows)} killed runs came to the same, bit for bit")
    print(json.dumps({"benchmark": "kill_and_resume", "steps": steps, "same": alike, "of": len(rows), "rows": rows}))
    sys.exit(alike != len(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompt-template", required=True)
    parser.add_argument("--completion-template", required=True)
    parser.add_argument("--stop-token", default="")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the steps to kill at")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "1")
    else:
        main()
