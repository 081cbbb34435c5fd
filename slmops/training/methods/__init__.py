"""What is trained, and what stays frozen? One table of methods, by the names that `--method` takes."""

from slmops.training.methods.bases import find_quantized_base, load_base, refuse_unsupported
from slmops.training.methods.outcome import find_roads, leave_room, write_stops
from slmops.training.methods.peft_configs import refuse_unknown_targets
from slmops.training.methods.saving import save_trained, write_trained
from slmops.training.methods.table import (
    METHODS,
    Method,
    attach_adapter,
    callbacks_for,
    default_learning_rate,
    method_of,
    refuse_foreign,
    without_foreign,
)

__all__ = [
    "METHODS",
    "Method",
    "attach_adapter",
    "callbacks_for",
    "default_learning_rate",
    "find_quantized_base",
    "find_roads",
    "leave_room",
    "load_base",
    "method_of",
    "refuse_foreign",
    "refuse_unknown_targets",
    "refuse_unsupported",
    "save_trained",
    "without_foreign",
    "write_stops",
    "write_trained",
]
