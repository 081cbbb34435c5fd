"""Can a run that was stopped go on, and is it the same run? Its checkpoints lie in the partial folder, with what they are of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops import artifact
from slmops.config import FinetuneSettings, flat
from slmops.errors import BadArtifact, InvalidInput

FOLDER = "checkpoints"
ANY = f"{FOLDER}/checkpoint-*"
_RUN = "run.json"
# Settings that a run may be resumed with in another form: they change nothing of what is trained.
_FREE = ("resume", "force")


def prepare(partial: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Make way for a new run, or check that there is something to resume and that it is of the same run.

    Args:
        partial: where the run writes.
        identity: of the run (`identity`).
        resume: go on from its last checkpoint.

    Raises:
        BadArtifact: `resume` is set, and there is no checkpoint to go on from.
        InvalidInput: `resume` is set, and the checkpoints are of another run.
    """
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
        return
    folder = partial / FOLDER
    if latest(folder) is None or not (folder / _RUN).is_file():
        raise BadArtifact(f"there is no checkpoint in {partial} to go on from", "start it without --resume")
    then = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    changed = [f"{key}: {value!r}, was {then.get(key)!r}" for key, value in identity.items() if value != then.get(key)]
    if changed:
        raise InvalidInput(
            f"the run that was stopped had other settings: {'; '.join(changed)}", "give the same, or start it without --resume"
        )


def begin(partial: Path, identity: dict[str, Any]) -> None:
    """Write down which run the checkpoints will be of."""
    (partial / FOLDER).mkdir(exist_ok=True)
    artifact.write_json(partial / FOLDER / _RUN, identity)


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def lowest_validation_loss(checkpoint: Path) -> float | None:
    """Return the lowest validation loss that the run had when the checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
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
    dataset = None if data is None else artifact.fingerprint(data) if Path(data).exists() else str(data)
    others = {f"file {role}": artifact.fingerprint(place) for role, place in files.items()}
    return {**values, "base": artifact.fingerprint(base), "dataset": dataset, "quantized_base": quantized_base, **others}
