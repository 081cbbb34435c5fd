"""Can a run that was stopped go on, and is it the same run? Its checkpoints lie in the partial folder, with what they are of.

A checkpoint is written under another name and renamed when it is whole (`complete`), and what a kill left under that name
is never taken. What it holds: `slmops.training.saved_state`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops import artifact, hashes, progress
from slmops.config import FinetuneSettings, RunSettings, flat
from slmops.errors import BadArtifact, InvalidInput

FOLDER = "checkpoints"
ANY = f"{FOLDER}/checkpoint-*"
WRITING = "writing"
BEST = "best"
"""Folder of what had the lowest validation loss so far, within the folder that is written, and within a checkpoint."""
TRAINER_STATE = "trainer_state.json"
_RUN = "run.json"
# Settings that a run may be resumed with in another form: they change nothing of what is trained.
_FREE = ("resume", "force", "checkpoints", "checkpoint_steps", "report_to")
# A shorter run is over sooner than its checkpoint would be of use.
_FEWEST_STEPS = 8
_SECONDS_APART = 30.0


def interval(settings: RunSettings, steps: int) -> int | None:
    """Return after how many steps each a checkpoint is written; None: never.

    Args:
        settings: of the run; unless they say otherwise, as often as validation is measured, and never in a very short run.
        steps: optimizer steps of the whole run.

    Raises:
        InvalidInput: the settings say it twice.
    """
    if settings.checkpoint_steps is not None:
        if settings.checkpoints is not None:
            raise InvalidInput("checkpoints and checkpoint_steps say the same thing in two ways", "give one of them")
        return settings.checkpoint_steps
    count = settings.checkpoints
    if count is None:
        count = settings.evaluations if steps >= _FEWEST_STEPS else 0
    return math.ceil(steps / count) if count else None


def seconds_apart(settings: RunSettings) -> float:
    """Return how far apart checkpoints are at least: where nobody said how many, little is lost by fewer.

    Processes that train together write theirs together, and their clocks differ: none is left out there.
    """
    said = settings.checkpoints is not None or settings.checkpoint_steps is not None or settings.processes > 1
    return 0.0 if said else _SECONDS_APART


def prepare(partial: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make way for a new run, or check that there is something to resume and that it is of the same run.

    Args:
        partial: where the run writes.
        identity: of the run (`identity`).
        resume: go on from its last checkpoint; from its beginning, if it was killed before the first.

    Raises:
        BadArtifact: `resume` is set, and no run was stopped here.
        InvalidInput: `resume` is set, and the run that was stopped is another.
    """
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
        return
    folder = partial / FOLDER
    if not (folder / _RUN).is_file():
        raise BadArtifact(f"there is no checkpoint in {partial} to go on from", "start it without --resume")
    then = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    changed = [f"{key}: {value!r}, was {then.get(key)!r}" for key, value in identity.items() if value != then.get(key)]
    if changed:
        raise InvalidInput(
            f"the run that was stopped had other settings: {'; '.join(changed)}", "give the same, or start it without --resume"
        )
    found = latest(folder)
    progress.say(
        f"resumed from step {step_of(found)}" if found else "resumed from the beginning: it was stopped before its first checkpoint"
    )


def begin(partial: Path, identity: dict[str, Any]) -> None:
    """Write down which run the checkpoints will be of."""
    (partial / FOLDER).mkdir(exist_ok=True)
    artifact.write_json(partial / FOLDER / _RUN, identity)


def complete(written: Path, folder: Path, step: int) -> None:
    """Give a checkpoint that is whole its name, and remove the ones before it."""
    place = of_step(folder, step)
    shutil.rmtree(place, ignore_errors=True)
    written.rename(place)
    for other in folder.glob("checkpoint-*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)
    shutil.rmtree(folder / WRITING, ignore_errors=True)


def remove(partial: Path) -> None:
    """Remove what only a resume needs; call it when everything else has been written."""
    shutil.rmtree(partial / FOLDER, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None."""
    found = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE).is_file()]
    return max(found, key=step_of, default=None)


def of_step(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


def restore_best(checkpoint: Path | None, best: Path) -> None:
    """Put the best of a checkpoint in its place, or nothing: what lies there may be of a later step, or half written."""
    shutil.rmtree(best, ignore_errors=True)
    if checkpoint is not None and (checkpoint / BEST).is_dir():
        # No links here: what a kill left at its final name may be one already, and renaming one link to another does nothing.
        shutil.copytree(checkpoint / BEST, best, copy_function=shutil.copyfile)


def keep_best(best: Path, place: Path) -> None:
    """Put the files of a folder into another too, as links where the file system has them: a whole model is large.

    A better one is written as new files, so that a link keeps what it was.
    """
    if best.is_dir():
        shutil.copytree(best, place, copy_function=_link)


def _link(source: str, place: str) -> None:
    try:
        Path(place).hardlink_to(source)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, place)


def lowest_validation_loss(checkpoint: Path) -> float | None:
    """Return the lowest validation loss that the run had when the checkpoint was written."""
    state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return min((entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry), default=None)


def identity(
    base: Path, data: str | Path | None, settings: FinetuneSettings, quantized_base: str | None, files: Mapping[str, Path]
) -> dict[str, Any]:
    """Return what makes a run the run that it is: its settings, and the content of what it learns on and from.

    Args:
        base: folder of the model.
        data: rows, or a dataset's id; None where the objective has files of its own.
        settings: of the run.
        quantized_base: hash of the weights of `--quantized-base`, wherever they lie.
        files: what else it learns from, by role.
    """
    values = {key: value for key, value in flat(settings).items() if key not in _FREE}
    dataset = None if data is None else hashes.fingerprint(data) if Path(data).exists() else str(data)
    others = {f"file {role}": hashes.fingerprint(place) for role, place in files.items()}
    return {**values, "base": hashes.fingerprint(base), "dataset": dataset, "quantized_base": quantized_base, **others}


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])
