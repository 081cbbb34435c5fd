"""The training step: what a batch costs is decided here. `prepare_step` makes a model's step fast without changing what it computes."""

from slmops.training.step.layouts import Layout, Padded
from slmops.training.step.preparing import Step, prepare_step

__all__ = ["Layout", "Padded", "Step", "prepare_step"]
