"""The commands that use what was made: `generate`, `run`, `show`."""

from __future__ import annotations

import time
from typing import Any

import click

import slmops
from slmops.cli.options import Call, command
from slmops.cli.session import Session
from slmops.config import GenerateSettings, RunPipelineSettings


@command(
    "generate",
    GenerateSettings,
    examples=(
        "slmops generate runs/int4 'play some jazz'",
        "slmops generate runs/int4 'Once upon a time' --raw --temperature 0.8 --seed 1",
    ),
)
@click.argument("package")
@click.argument("prompt")
def generate(package: str, prompt: str, call: Call) -> Any:
    """Generate text.

    PROMPT is put into the template that travels with PACKAGE, unless --raw. The answer is written as it comes and ends
    at a stop token or after --max-new-tokens.
    """
    session: Session = click.get_current_context().obj
    started, pieces = time.perf_counter(), []
    for piece in slmops.generate(package, prompt, config=call.config, **call.overrides):
        pieces.append(piece)
        if not session.as_json:
            session.stdout.write(piece)
            session.stdout.flush()
    if not session.as_json:
        session.stdout.write("\n")
        session.streamed = True
    seconds = round(time.perf_counter() - started, 3)
    return {"prompt": prompt, "text": "".join(pieces), "tokens": len(pieces), "seconds": seconds}


@command("run", RunPipelineSettings, examples=("slmops run pipeline.yaml", "slmops run pipeline.yaml --only export --only verify"))
@click.argument("pipeline")
def run(pipeline: str, call: Call) -> Any:
    """Run a pipeline.

    PIPELINE is a YAML file of steps. A step whose inputs and settings have not changed is skipped; the run stops at the
    first gate that is not met (exit code 5), and goes on from there when started again.
    """
    return slmops.run(pipeline, config=call.config, **call.overrides)


@command("show", None, examples=("slmops show runs/int4", "slmops show runs/int4 --json"))
@click.argument("path")
def show(path: str, call: Call) -> Any:
    """Show a folder.

    PATH is a folder that slmops wrote: an adapter, model, package, dataset, evaluation ... Shows its manifest and the
    steps that led to it, as far as their folders are still there.
    """
    return slmops.show(path)
