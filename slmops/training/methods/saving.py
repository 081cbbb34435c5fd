"""How does what was trained get to disk? An adapter as PEFT or slmops's own kinds write it, a model as transformers does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from slmops.runtime import native


def save_trained(model: Any, folder: Path) -> None:
    """Write what was trained, config and tensors, into a folder of its own; what was there before is replaced.

    With its config: AdaLoRA's says which ranks are left, and that changes in training.
    """
    shutil.rmtree(folder, ignore_errors=True)
    _save(model, folder)


def write_trained(model: Any, best: Path, folder: Path) -> None:
    """Write what was trained: the best of the run, which lies in `best`, or the model as it is where nothing was kept."""
    if best.is_dir():
        for file in best.iterdir():
            (folder / file.name).unlink(missing_ok=True)  # a link to the same file would make the move do nothing
            file.replace(folder / file.name)
        best.rmdir()
    else:
        _save(model, folder)


def _save(model: Any, folder: Path) -> None:
    if hasattr(model, "slmops_adapter"):
        native.save_own(model, folder)
        return
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner only
