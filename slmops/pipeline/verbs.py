"""Which verbs can be a step of a pipeline, what does each start from, and what does it make?"""

from __future__ import annotations

from dataclasses import dataclass

from slmops import config
from slmops.config import Settings

DECIDED = ("out", "force", "resume", "predictions", "plan", "into", "remove")
"""Settings that the pipeline decides for every step: where it writes and what, and whether it replaces or goes on."""


@dataclass(frozen=True)
class Verb:
    """What a pipeline must know of a verb."""

    settings: type[Settings]
    function: str
    """Its name in `slmops`."""
    takes: tuple[str, ...]
    """Kinds of artefact that it can start from."""
    makes: str | None
    """Kind of the artefact that it writes; None for a measure, which gives a document."""
    falls_back: str | None = None
    """What it starts from where no earlier step fits: the pipeline's `model` or `data`."""
    nearest: bool = True
    """It starts from the nearest earlier step that makes what it takes; otherwise only where `use` names one."""
    rows: bool = False
    """It takes rows as its second argument (`data`)."""
    paths: tuple[str, ...] = ()
    """Settings that name a file, a folder or an earlier step."""
    named: tuple[str, ...] = ()
    """Settings that a mapping gives by the adapters' names, as `adapter: {intent: STEP}`; on the command line NAME=PATH."""


VERBS = {
    "demo": Verb(config.DemoSettings, "make_demo", (), "model"),
    "prepare": Verb(config.PrepareSettings, "prepare_data", ("dataset",), "dataset", "data", nearest=False),
    # Several fine-tunes of one base are the common case, not one on top of another's merged model.
    "finetune": Verb(
        config.FinetuneSettings,
        "finetune",
        ("model",),
        "adapter",
        "model",
        nearest=False,
        rows=True,
        paths=("validation", "quantized_base", "retain", "replay"),
        named=("task", "task_validation"),
    ),
    "merge": Verb(config.MergeSettings, "merge", ("adapter",), "model", paths=("base",)),
    # An adapter counts: exporting the base past it would lose the fine-tune without a word.
    "export": Verb(config.ExportSettings, "export", ("model", "adapter"), "export", "model"),
    "pack": Verb(config.PackSettings, "pack", ("model", "export"), "package", "model", nearest=False, named=("adapter",)),
    "verify": Verb(
        config.VerifySettings, "verify", ("export", "package"), None, "model", paths=("baseline", "base", "data"), named=("data",)
    ),
    "evaluate": Verb(config.EvaluateSettings, "evaluate", ("export", "package", "model", "adapter"), None, "model", rows=True),
    "bench": Verb(config.BenchSettings, "bench", ("export", "package"), None, "model", paths=("baseline", "data")),
}
