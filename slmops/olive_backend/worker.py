"""What runs in Olive's process? `python -P -m slmops.olive_backend.worker WORK`, with the workflow in WORK.

It tells its parent through files: `events.jsonl`, a line for each step, and `result.json`, written last. Exit codes:
3, the workflow has a key that Olive would drop; 4, Olive ended without a model.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from slmops import environment

REFUSED, NO_MODEL = 3, 4


def watch_trainer(events: Path) -> None:
    """Write what every Trainer of this process logs to `events`, and stop one whose loss is not finite."""
    from transformers import TrainerCallback, trainer

    class Reporter(TrainerCallback):
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            entry = state.log_history[-1]
            if "loss" in entry:
                self.write(entry)
                control.should_training_stop |= not math.isfinite(entry["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.write({"ended_at": state.global_step, "seconds": time.perf_counter() - self.started})

        def write(self, event: dict[str, Any]) -> None:
            with events.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event) + "\n")

    trainer.DEFAULT_CALLBACKS.append(Reporter)  # type: ignore[arg-type]


def main(work: Path) -> int:
    """Run the workflow."""
    from slmops.olive_backend.validation import problems

    workflow = json.loads((work / "workflow.json").read_text(encoding="utf-8"))
    found = problems(workflow)
    if found:
        sys.stderr.write("\n".join(found) + "\n")
        return REFUSED
    watch_trainer(work / "events.jsonl")
    from olive.workflows import run

    output: Any = run(workflow, tempdir=str(work / "tmp"))
    if output is None or not output.has_output_model():
        return NO_MODEL
    details = output.get_best_candidate().olive_model_config or {}
    adapter = Path(details.get("config", {}).get("adapter_path") or work / "none")
    if not (adapter / "adapter_model.safetensors").is_file():
        return NO_MODEL
    result = {"adapter": str(adapter), "not_finite": not_finite(adapter), "peak_memory_bytes": environment.peak_memory_bytes()}
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def not_finite(adapter: Path) -> list[str]:
    """Return the names of an adapter's tensors that hold a value that is no number."""
    from safetensors.torch import load_file

    return [name for name, tensor in load_file(adapter / "adapter_model.safetensors").items() if not bool(tensor.isfinite().all())]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
