"""How did the loss move? As data (`metrics.jsonl`) and as a picture (`loss.png`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_curve(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the training history of a Trainer (`state.log_history`) as JSON lines and as a picture."""
    points = [_point(entry) for entry in history if "loss" in entry or "eval_loss" in entry]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")
    draw_curve(folder / "loss.png", points)


def draw_curve(path: Path, points: list[dict[str, Any]]) -> None:
    """Draw training and validation loss over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
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
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _point(entry: dict[str, Any]) -> dict[str, Any]:
    names = {
        "step": "step",
        "epoch": "epoch",
        "loss": "loss",
        "eval_loss": "validation_loss",
        "learning_rate": "learning_rate",
        "grad_norm": "gradient_norm",
    }
    tasks = {f"validation_{key.removeprefix('eval_')}": value for key, value in entry.items() if key.startswith("eval_loss_")}
    return {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry} | tasks
