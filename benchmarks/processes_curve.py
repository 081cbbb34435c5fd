r"""Do several processes, or accumulated batches, learn what one process learns from one large batch? The losses, step by step.

    python benchmarks/processes_curve.py MODEL DATA --work DIR --prompt-template '{text}\nIntent:' --completion-template ' {intent}'

Four runs with the same rows in each optimizer step: one process; two and three processes by `--processes`, which share every
batch (three do not divide it); one process that accumulates two half batches. And two processes by `accelerate launch`. All are held against the first, at
every step: training loss, gradient norm, validation loss. Accumulated half batches are cut from another order of rows (by length), so
that run is held against one with whole batches of its own order where an epoch is one step. Prints a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from slmops import artifact

KEYS = ("loss", "gradient_norm", "validation_loss")


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    alone = [sys.executable, "-m", "slmops"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *plain, "-m", "slmops"]
    size, few = options.batch_size, options.batch_size * 2
    runs = [
        ("one process", run(alone, options, "one", size), None),
        ("--processes 2", run(alone, options, "two", size, "--processes", "2"), "one process"),
        ("--processes 3", run(alone, options, "three", size, "--processes", "3"), "one process"),
        ("accelerate launch, 2", run(launcher, options, "launched", size), "one process"),
        (f"one epoch = one step of {few}", run(alone, options, "whole", few, "--max-rows", str(few), "--validation-share", "0"), None),
        (
            f"4 accumulated batches of {few // 4}",
            run(alone, options, "parts", few // 4, "--max-rows", str(few), "--validation-share", "0", "--gradient-accumulation", "4"),
            f"one epoch = one step of {few}",
        ),
    ]
    show(runs)


def run(command: list[str], options: argparse.Namespace, name: str, batch_size: int, *more: str) -> list[dict[str, Any]]:
    """Train in processes of its own; return the points of its curve."""
    out = options.work / name
    if not (out / artifact.MANIFEST).is_file():
        words = ["--prompt-template", options.prompt_template, "--completion-template", options.completion_template]
        words += ["--max-steps", str(options.steps), "--batch-size", str(batch_size), "--quiet", "--threads", "1", *more]
        words += ["--stop-token", options.stop_token] if options.stop_token else []
        done = subprocess.run([*command, "finetune", options.model, options.data, "-o", str(out), *words], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def show(runs: list[tuple[str, list[dict[str, Any]], str | None]]) -> None:
    curves = {name: points for name, points, _ in runs}
    steps = [point["step"] for point in runs[0][1] if "loss" in point]
    chosen = sorted({*steps[:3], *steps[:: max(1, len(steps) // 6)], steps[-1]})
    print(f"{'training loss at step':32}" + "".join(f"{step:>11}" for step in chosen))
    figures = []
    for name, points, against in runs:
        losses = {point["step"]: point["loss"] for point in points if "loss" in point}
        print(f"{name:32}" + "".join(f"{losses[step]:>11.6f}" for step in chosen))
        if against:
            worst = {key: difference(points, curves[against], key) for key in KEYS if any(key in point for point in points)}
            print(f"{'  largest relative difference':32}" + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
            figures.append({"run": name, "against": against, **worst})
    print(json.dumps({"benchmark": "processes_curve", "steps": len(steps), "runs": figures}))


def difference(points: list[dict[str, Any]], others: list[dict[str, Any]], key: str) -> float:
    """Return the largest relative difference of a figure over all steps."""
    ours, theirs = ({point["step"]: point[key] for point in curve if key in point} for curve in (points, others))
    if set(ours) != set(theirs):
        sys.exit(f"{key}: the two runs were measured at different steps")
    return max(abs(ours[step] - theirs[step]) / max(abs(theirs[step]), 1e-12) for step in ours)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompt-template", required=True)
    parser.add_argument("--completion-template", required=True)
    parser.add_argument("--stop-token", default="")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    return parser.parse_args()


if __name__ == "__main__":
    main()
