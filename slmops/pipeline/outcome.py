"""What does a pipeline report? Each step with its status, the few figures that matter, and its whole document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "skipped", "failed"]

# verb -> label and place in the document of the figures that a summary shows
_FIGURES = {
    "demo": {"rows": "rows", "parameters": "parameters", "train_loss": "metrics.train_loss"},
    "prepare": {"rows": "rows"},
    "finetune": {"train_loss": "metrics.train_loss", "validation_loss": "metrics.validation_loss", "rows": "rows"},
    "merge": {"size_bytes": "size_bytes"},
    "export": {"precision": "precision", "size_bytes": "size_bytes", "bytes_per_parameter": "bytes_per_parameter"},
    "pack": {"precision": "precision", "size_bytes": "size_bytes"},
    "verify": {"passed": "passed", "failed_stage": "failed_stage"},
    "bench": {f"{name}_ratio": f"ratio.{name}" for name in ("decode", "prefill", "size")},
}


@dataclass(frozen=True)
class StepResult:
    """What became of one step."""

    name: str
    verb: str
    status: Status
    seconds: float
    """Spent on it in this run."""
    artifact: Path | None
    """The folder that it wrote; None for a measure."""
    result: dict[str, Any]
    """The step's own document."""
    reason: str = ""
    """Why it failed."""

    def figures(self) -> dict[str, Any]:
        """Return the figures of the step that a summary shows."""
        if self.verb == "evaluate":
            return {name: value_of(self.result, f"metrics.{name}") for name in self.result.get("metrics") or {}}
        found = {label: value_of(self.result, place) for label, place in _FIGURES[self.verb].items()}
        return {label: value for label, value in found.items() if value is not None}

    def summary(self) -> str:
        """Return the figures in one line."""
        if self.verb == "verify":
            return "every stage passed" if self.result.get("passed") else ""
        if self.verb == "bench":
            return ", ".join(f"{name.removesuffix('_ratio')} {value:.3g} x" for name, value in self.figures().items())
        return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.figures().items())

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        document = {"name": self.name, "verb": self.verb, "command": self.verb, "status": self.status, "seconds": round(self.seconds, 3)}
        if self.artifact is not None:
            document["artifact"] = str(self.artifact)
        return document | {"reason": self.reason or self.summary(), "figures": self.figures(), "document": self.result}


@dataclass(frozen=True)
class PipelineResult:
    """What became of a pipeline."""

    pipeline: Path
    out: Path
    steps: tuple[StepResult, ...]
    not_run: tuple[str, ...]
    """Steps after one that failed."""
    seconds: float

    @property
    def failed(self) -> StepResult | None:
        """The step whose gate was not met, or None."""
        return next((step for step in self.steps if step.status == "failed"), None)

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return self.failed is None

    def step(self, name: str) -> StepResult | None:
        """Return the step of that name, where it ran or was skipped."""
        return next((step for step in self.steps if step.name == name), None)

    def document(self) -> dict[str, Any]:
        """Return what `slmops run --json` prints; `passed: false` ends the command with exit code 5."""
        failed = self.failed
        return {
            "command": "run",
            "ok": self.passed,
            "passed": self.passed,
            "failed_step": failed.name if failed else None,
            "reason": f"step {failed.name}: {failed.reason}" if failed else "",
            "pipeline": str(self.pipeline),
            "out": str(self.out),
            "steps": [step.document() for step in self.steps],
            "not_run": list(self.not_run),
            "seconds": round(self.seconds, 3),
            "warnings": [f"{step.name}: {text}" for step in self.steps for text in step.result.get("warnings") or []],
        }


def value_of(document: Mapping[str, Any], place: str) -> Any:
    """Return what stands at a dotted place of a document; of an estimate or a spread its value; None where nothing does."""
    found: Any = document
    for part in place.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found.get("value", found.get("median")) if isinstance(found, Mapping) else found
