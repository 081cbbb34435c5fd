"""How does the whole road run from one file? `run` reads a pipeline; `quickstart` writes one for a demo and runs it."""

from slmops.pipeline.demonstration import QuickstartResult, quickstart
from slmops.pipeline.outcome import PipelineResult, StepResult
from slmops.pipeline.running import run

__all__ = ["PipelineResult", "QuickstartResult", "StepResult", "quickstart", "run"]
