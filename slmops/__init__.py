"""slmops: from a small language model and a data file to a package proven on the device.

Every verb of the command line is a function here: `slmops.finetune("MODEL", "DATA", out="OUT")`. They are loaded when
first used, so that `import slmops` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from slmops.environment import disable_telemetry

__version__ = "0.1.0"

disable_telemetry()

# verb -> module that holds it
VERBS = {
    "bench": "slmops.benchmark",
    "doctor": "slmops.diagnosis",
    "evaluate": "slmops.evaluation",
    "export": "slmops.exporting",
    "exports": "slmops.exporting",
    "finetune": "slmops.training",
    "generate": "slmops.runtime",
    "inspect_data": "slmops.data",
    "make_demo": "slmops.demo",
    "merge": "slmops.adapters",
    "pack": "slmops.packing",
    "prepare_data": "slmops.data",
    "quickstart": "slmops.pipeline",
    "run": "slmops.pipeline",
    "run_workflow": "slmops.olive_backend",
    "show": "slmops.lineage",
    "verify": "slmops.verification",
}

__all__ = ["__version__", *VERBS]


def __getattr__(name: str) -> Any:
    if name in VERBS:
        return getattr(import_module(VERBS[name]), name)
    raise AttributeError(f"module 'slmops' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *VERBS])
