"""The commands that measure: `verify`, `evaluate`, `bench`."""

from __future__ import annotations

from typing import Any

import click

import slmops
from slmops.cli.options import Call, command
from slmops.config import BenchSettings, EvaluateSettings, VerifySettings


@command(
    "verify",
    VerifySettings,
    examples=(
        "slmops verify runs/int4",
        "slmops verify runs/int4 --data test.jsonl --metric exact_match",
        "slmops verify PLAIN_GENAI_FOLDER --baseline MODEL --data test.jsonl",
    ),
)
@click.argument("package")
def verify(package: str, call: Call) -> Any:
    """Prove a package.

    Compares PACKAGE with the PyTorch model it came from, stage by stage: files, tokenizer, template, stop tokens,
    graph, logits, text, retention of the fine-tune, a task. Stops at the first stage that breaks and names it.
    Exit code 0: proven; 5: a stage was not met.
    """
    return slmops.verify(package, config=call.config, **call.overrides)


@command(
    "evaluate",
    EvaluateSettings,
    examples=("slmops evaluate runs/int4 test.jsonl", "slmops evaluate runs/adapter test.jsonl --metric f1 --json"),
)
@click.argument("model_or_package")
@click.argument("data")
def evaluate(model_or_package: str, data: str, call: Call) -> Any:
    """Measure on a task.

    MODEL_OR_PACKAGE is a package, a model, or an adapter folder. Answers are generated greedily and kept, one JSONL row
    each. The template travels with the model; give one only to overrule it.
    """
    return slmops.evaluate(model_or_package, data, config=call.config, **call.overrides)


@command(
    "bench",
    BenchSettings,
    examples=(
        "slmops bench runs/int4",
        "slmops bench runs/int4 --data test.jsonl --metric exact_match --json",
        "slmops bench runs/int4 --baseline none",
    ),
)
@click.argument("package")
def bench(package: str, call: Call) -> Any:
    """Measure against PyTorch.

    Loads PACKAGE and its baseline in a process each, alternates their rounds, and compares load time, time to the first
    token, prefill, decode, memory, size and accuracy, each with its spread, the ratios with an interval.
    """
    return slmops.bench(package, config=call.config, **call.overrides)
