"""What does a pipeline's step `demo` write? A base model that nobody has to download, and the rows of its tasks beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from slmops import artifact, progress
from slmops.artifact import Artifact
from slmops.config import DemoSettings, flat, load
from slmops.demo.household import commands
from slmops.demo.pretraining import make_base
from slmops.demo.stories import stories
from slmops.demo.tasks import row_of


class Data(NamedTuple):
    """The files of the demo."""

    stories: Path
    train: Path
    validation: Path
    test: Path
    rows: dict[str, int]
    """Rows of each of the last three."""


def make_demo(*, out: str | Path, config: Any = None, **overrides: Any) -> Artifact:
    """Make the demo's base model, trained from scratch on generated text, with the rows of its tasks in `data/`.

    `data/` holds `train.jsonl`, `validation.jsonl` and `test.jsonl` (no text is in two of them) and `stories.txt`, the
    plain text that the base learned.

    Args:
        out: the folder to write, an artefact of kind "model".
        config: YAML file or mapping of `DemoSettings`.
        overrides: `seed`, `force`. The same seed gives the same bytes on one machine.

    Raises:
        BadArtifact: `out` is occupied.
        Unavailable: a library of the `train` extra is missing.
    """
    progress.say("a tiny base model is trained from scratch on generated text, so that nothing is downloaded")
    settings = load(DemoSettings, config, **overrides)
    with artifact.create(Path(out), kind="model", command="demo", config=flat(settings), force=settings.force) as draft:
        data = write_data(draft.folder / "data", seed=settings.seed)
        documents = data.stories.read_text(encoding="utf-8").split("\n\n")
        made = make_base(documents, draft.folder, seed=settings.seed)
        draft.metrics = {"train_loss": {"value": made["loss"]}}
        draft.facts = {
            "parameters": made["parameters"],
            "precision": "fp32",
            "tokens": {"total": made["tokens"]},
            "rows": sum(data.rows.values()),
            "splits": data.rows,
        }
    return draft.done()


def write_data(folder: Path, *, seed: int = 0, train: int = 1500, validation: int = 100, test: int = 200, documents: int = 6000) -> Data:
    """Write `stories.txt` (documents apart by a blank line) and the three files of rows; no text is in two of the four.

    Args:
        folder: where the files go; made if need be.
        seed: the same seed gives the same bytes.
        train: rows to learn from.
        validation: rows to choose the best adapter by.
        test: rows held out, for gates and proofs.
        documents: plain texts for pre-training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"train": train, "validation": validation, "test": test}
    data = Data(folder / "stories.txt", folder / "train.jsonl", folder / "validation.jsonl", folder / "test.jsonl", rows)
    source = commands(seed)  # each text once
    said = set()
    for name, count in rows.items():
        part = [next(source) for _ in range(count)]
        said |= {command.text for command in part}
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row_of(command)) + "\n" for command in part), encoding="utf-8")
    data.stories.write_text("\n\n".join(stories(seed, documents, without=said)) + "\n", encoding="utf-8")
    return data
