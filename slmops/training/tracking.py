"""Where else do a run's figures go? TensorBoard, MLflow or Weights & Biases, in a folder beside the adapter, never over the network.

Each is asked for one thing, to take a point of the curve; names and units are those of `metrics.jsonl`. transformers' own
callbacks for them choose place and network by environment variables, and send the machine's name along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from slmops import environment
from slmops.errors import Unavailable


class Tracker(Protocol):
    """Where the points of a run go."""

    def log(self, point: dict[str, Any], step: int) -> None:
        """Take the figures of an optimizer step."""
        ...


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose library is not here; nothing is imported.

    Raises:
        Unavailable: one is missing.
    """
    for name in names:
        if find_spec(name) is None:
            distribution, extra = environment.PROVIDED_BY[name]
            raise Unavailable(f"{distribution} is not installed; it is needed for --report-to {name}", f"pip install 'slmops[{extra}]'")


def folder_beside(out: Path) -> Path:
    """Return where the trackers of the run that writes `out` write."""
    return out.parent / f"{out.name}.tracking"


@contextmanager
def trackers(names: Sequence[str], out: Path, settings: dict[str, Any], first_step: int = 0) -> Iterator[list[Tracker]]:
    """Open trackers for a run, and close them when it is over, however it ends.

    Args:
        names: "tensorboard", "mlflow", "wandb".
        out: the adapter that the run will write; the trackers' files go beside it (`folder_beside`).
        settings: of the run, flat.
        first_step: of a run that goes on.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    place = folder_beside(out).resolve()
    with ExitStack() as stack:
        yield [stack.enter_context(_OPEN[name](place / name, out.name, given, first_step)) for name in dict.fromkeys(names)]


@contextmanager
def _tensorboard(folder: Path, name: str, settings: dict[str, Any], first_step: int) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    class Board:
        def log(self, point: dict[str, Any], step: int) -> None:
            for key, value in figures(point).items():
                writer.add_scalar(key, value, step)
            writer.flush()  # live, and a kill loses nothing

    # What an earlier part of the run wrote past the checkpoint that it goes on from is struck out.
    writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))
    try:
        yield Board()
    finally:
        writer.close()


@contextmanager
def _mlflow(folder: Path, name: str, settings: dict[str, Any], first_step: int) -> Iterator[Tracker]:
    mlflow: Any = environment.require("mlflow", "for --report-to mlflow")

    class Experiment:
        def log(self, point: dict[str, Any], step: int) -> None:
            for key, value in figures(point).items():
                client.log_metric(run, key, value, step=step)

    folder.mkdir(parents=True, exist_ok=True)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    known = client.get_experiment_by_name("slmops")
    experiment = known.experiment_id if known else client.create_experiment("slmops", artifact_location=(folder / "files").as_uri())
    run = client.create_run(experiment, run_name=name, tags={"first_step": str(first_step)}).info.run_id
    for key, value in settings.items():
        client.log_param(run, key, str(value)[:500])  # MLflow's own limit is 6,000 characters
    try:
        yield Experiment()
    except BaseException:
        client.set_terminated(run, "FAILED")
        raise
    client.set_terminated(run)


@contextmanager
def _wandb(folder: Path, name: str, settings: dict[str, Any], first_step: int) -> Iterator[Tracker]:
    wandb: Any = environment.require("wandb", "for --report-to wandb")

    class Weights:
        def log(self, point: dict[str, Any], step: int) -> None:
            run.log(figures(point), step=step)

    folder.mkdir(parents=True, exist_ok=True)
    quiet = wandb.Settings(silent=True, disable_git=True, disable_code=True, console="off")
    run = wandb.init(project="slmops", name=name, dir=str(folder), mode="offline", config=settings, settings=quiet)
    try:
        yield Weights()
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def figures(point: dict[str, Any]) -> dict[str, float]:
    """Return the finite figures of a point but its step."""
    return {key: float(value) for key, value in point.items() if key != "step" and math.isfinite(float(value))}


_OPEN = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
