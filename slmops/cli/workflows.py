"""The commands of `slmops olive`: `olive run`."""

from __future__ import annotations

from typing import Any

import click

import slmops
from slmops.cli.options import Call, command
from slmops.config import RunWorkflowSettings


@command(
    "olive run",
    RunWorkflowSettings,
    examples=(
        "slmops olive run olive_configs/int4_cpu.json",
        "slmops olive run olive_configs/int4_qnn.json --check",
        "slmops olive run my.json --force --json",
    ),
)
@click.argument("workflow")
def run(workflow: str, call: Call) -> Any:
    """Run a workflow.

    WORKFLOW is a JSON file as `olive run` takes it; beside Olive's passes it may name SlmopsExport and SlmopsPack, whose
    parameters are the settings of `slmops export` and `slmops pack`. Relative paths in it count from this folder.

    Every key is checked first. Olive runs in a process of its own, without telemetry and network, its log kept in the workflow's
    output_dir as olive.log. A workflow that makes no model is an error (exit code 1), with Olive's own line about it.
    """
    return slmops.run_workflow(workflow, config=call.config, **call.overrides)
