"""How did the loss move? As data (`metrics.jsonl`) and as a picture (`loss.png`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slmops.training import usage


def write_curve(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the training history of a Trainer (`state.log_history`) as JSON lines and as a picture."""
    points = [point_of(entry) for entry in history if "loss" in entry or "eval_loss" in entry]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")
    draw_curve(folder / "loss.png", points)


def draw_curve(path: Path, points: list[dict[str, Any]]) -> None:
    """Draw training and validation loss over steps, and below them, where it was measured, what the run took of the machine."""
    from matplotlib.figure import Figure

    measured = any("memory_bytes" in point for point in points)
    figure = Figure(figsize=(7, 5.2 if measured else 4), dpi=120, layout="constrained")
    if measured:
        axes, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_usage(lower, points)
    else:
        axes = lower = figure.subplots()
    tasks = dict.fromkeys(key for point in points for key in point if key.startswith("validation_loss_"))
    for key, label, style in (
        ("loss", "training", {"color": "#7a8ca5", "linewidth": 1.2}),
        *(
            (key, key.removeprefix("validation_loss_"), {"linewidth": 0.9, "linestyle": "--", "marker": ".", "markersize": 4})
            for key in tasks
        ),
        ("validation_loss", "validation", {"color": "#c2410c", "marker": "o", "markersize": 4}),
    ):
        curve = [(point["step"], point[key]) for point in points if key in point]
        if curve:
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, label=f"{label} ({losses[-1]:.3f} at the end)", **style)
    values = [point[key] for point in points for key in ("loss", "validation_loss") if key in point]
    if values and max(values) > 20 * max(min(values), 1e-6):
        axes.set_yscale("log")
    lower.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _draw_usage(axes: Any, points: list[dict[str, Any]]) -> None:
    """Draw cores in use (left scale) and memory (right scale)."""
    right = axes.twinx()
    for panel, key, label, unit, color in (
        (axes, "cpu_cores", "cores", 1, "#0f766e"),
        (right, "memory_bytes", "memory", 2**30, "#6d28d9"),
        (right, "gpu_memory_bytes", "GPU memory", 2**30, "#db2777"),
    ):
        curve = [(point["step"], point[key] / unit) for point in points if key in point]
        if curve:
            steps, values = zip(*curve, strict=True)
            panel.plot(steps, values, color=color, linewidth=1.2, label=label)
            panel.set_ylim(bottom=0)
    axes.set_ylabel("cores in use", color="#0f766e")
    right.set_ylabel("memory (GiB)", color="#6d28d9")
    if any("gpu_memory_bytes" in point for point in points):
        right.legend(frameon=False, fontsize=7)
    for panel in (axes, right):
        panel.spines["top"].set_visible(False)
    axes.grid(alpha=0.25)


def point_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of a Trainer's history under our names."""
    names = {
        "step": "step",
        "epoch": "epoch",
        "loss": "loss",
        "eval_loss": "validation_loss",
        "learning_rate": "learning_rate",
        "grad_norm": "gradient_norm",
        **{name: name for name in usage.FIELDS},
    }
    tasks = {f"validation_{key.removeprefix('eval_')}": value for key, value in entry.items() if key.startswith("eval_loss_")}
    return {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry} | tasks
