"""How does `slmops run` go through its steps? Skip what is done, run the rest, stop at the first gate that is not met."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import slmops
from slmops import artifact, progress
from slmops.config import RunPipelineSettings, flat, load
from slmops.errors import BadArtifact, GateFailed, RunFailed, SlmopsError
from slmops.pipeline import gates
from slmops.pipeline.outcome import PipelineResult, StepResult
from slmops.pipeline.plan import Plan, Step, choose_steps, named_inputs, read_plan
from slmops.pipeline.state import State, key_of, read_state, refuse_foreign
from slmops.pipeline.verbs import VERBS


def run(pipeline: str | Path, *, config: Any = None, **overrides: Any) -> PipelineResult:
    """Run a pipeline file.

    A step is skipped when its inputs' content, its settings and slmops's version are those of the time when it was
    done and what it gave is still whole. A fine-tune that was killed goes on from its last checkpoint.

    Args:
        pipeline: the YAML file (`slmops.pipeline.plan` says what it holds).
        config: YAML file or mapping of `RunPipelineSettings`.
        overrides: `only`, the steps to run, with what they need; `fresh`, to run every step again.

    Returns:
        What became of each step; `passed` is False where a gate was not met, and the steps after it did not run.

    Raises:
        InvalidInput: anything wrong in the file, all at once, before anything runs.
        BadArtifact: a step would replace what this pipeline did not write.
        SlmopsError: a step's own error, with the step's name before its message.
    """
    settings = load(RunPipelineSettings, config, **overrides)
    started = time.perf_counter()
    plan = read_plan(pipeline)
    steps = choose_steps(plan, settings.only)
    state = read_state(plan.out)
    refuse_foreign(plan, steps, state)
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailed(f"could not make {plan.out}: {error.strerror or error}", "check the path and its permissions") from error
    results: list[StepResult] = []
    for step in steps:
        results.append(_take(plan, step, state, fresh=settings.fresh))
        if results[-1].status == "failed":
            progress.say(f"step {step.name} failed: {results[-1].reason}")
            break
    not_run = tuple(step.name for step in steps[len(results) :])
    return PipelineResult(plan.file, plan.out, tuple(results), not_run, time.perf_counter() - started)


def _take(plan: Plan, step: Step, state: State, *, fresh: bool) -> StepResult:
    """Skip or run one step, and hold its document against the gates."""
    started = time.perf_counter()
    try:
        key = key_of(plan, step)
        document = None if fresh else _kept(plan, step, state, key)
        skipped = document is not None
        if document is None:
            document = _perform(plan, step, state, key, resume=not fresh and _can_resume(plan, step, state, key))
        missed = _missed(step, document)
    except SlmopsError as error:
        raise type(error)(f"step {step.name}: {error.message}", error.hint) from error
    status = "failed" if missed else "skipped" if skipped else "done"
    folder = plan.out / step.name if VERBS[step.verb].makes is not None else None
    return StepResult(step.name, step.verb, status, time.perf_counter() - started, folder, document, missed)


def _perform(plan: Plan, step: Step, state: State, key: str, *, resume: bool) -> dict[str, Any]:
    """Call the step's verb, and record what it gave."""
    goes_on = " (goes on from its last checkpoint)" if resume else ""
    verb = VERBS[step.verb]
    arguments = [plan.place(step.inputs[role]) for role in ("source", *(("data",) if verb.rows else ())) if role in step.inputs]
    progress.say(f"step {step.name}: {' '.join([step.verb, *arguments[:1]])}{goes_on}")
    started = time.perf_counter()
    state.begin(step, key)
    try:
        result = getattr(slmops, verb.function)(*arguments, config=config_of(plan, step) | _decided(plan, step, resume), **_out(plan, step))
        document = dict(result.document())
    except GateFailed as error:
        document = {"command": step.verb, "ok": False, "passed": False, "error": error.document(), "warnings": []}
    except SlmopsError:
        state.fail(step, key)
        raise
    if verb.makes is None:
        artifact.write_json(_document_file(plan, step), document)
    digest = None if verb.makes is None else artifact.load(plan.out / step.name).manifest.digest
    state.end(step, key, seconds=time.perf_counter() - started, digest=digest)
    return document


def config_of(plan: Plan, step: Step) -> dict[str, Any]:
    """Return the settings that a step's verb is called with, its inputs in their places.

    A verb may tell what was asked for from a default: `pack` of an export refuses another precision than the export's.
    """
    verb = VERBS[step.verb]
    config = flat(step.settings, given=True) | {
        role: plan.place(reference) for role, reference in step.inputs.items() if role in verb.paths
    }
    for setting in verb.named:
        if found := named_inputs(setting, step.inputs):
            config[setting] = [f"{name}={plan.place(reference)}" for name, reference in found.items()]
    return config


def _decided(plan: Plan, step: Step, resume: bool) -> dict[str, Any]:
    """Return the settings that are the pipeline's to decide (`verbs.DECIDED`)."""
    if step.verb == "evaluate":
        return {"predictions": str(plan.out / f"{step.name}.predictions.jsonl")}
    if VERBS[step.verb].makes is None:
        return {}
    return {"force": True} | ({"resume": resume} if step.verb == "finetune" else {})


def _out(plan: Plan, step: Step) -> dict[str, Any]:
    return {"out": plan.out / step.name} if VERBS[step.verb].makes is not None else {}


def _kept(plan: Plan, step: Step, state: State, key: str) -> dict[str, Any] | None:
    """Return the document of a step that need not run again, or None."""
    if not state.is_done(step, key):
        return None
    document = _kept_artifact(plan, step, state) if VERBS[step.verb].makes is not None else _kept_measure(plan, step)
    if document is not None:
        progress.say(f"step {step.name}: skipped, nothing that it depends on has changed")
    return document


def _kept_artifact(plan: Plan, step: Step, state: State) -> dict[str, Any] | None:
    try:
        found = artifact.load(plan.out / step.name)
        artifact.check(found)
    except BadArtifact as error:
        progress.say(f"step {step.name} runs again: {error.message}")
        return None
    return found.document() if found.manifest.digest == state.steps[step.name].get("digest") else None


def _kept_measure(plan: Plan, step: Step) -> dict[str, Any] | None:
    try:
        document = json.loads(_document_file(plan, step).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # What was not proven is tried again: a look at the same figures would not tell whether the cause is gone.
    return None if document.get("passed") is False else document


def _can_resume(plan: Plan, step: Step, state: State, key: str) -> bool:
    """Whether a fine-tune was stopped with these settings and left a whole checkpoint; half-written ones are removed."""
    if step.verb != "finetune" or not state.was_stopped(step, key):
        return False
    import shutil

    whole = 0
    for checkpoint in (artifact.partial_folder(plan.out / step.name) / "checkpoints").glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # what transformers writes last
            whole += 1
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return whole > 0


def _missed(step: Step, document: dict[str, Any]) -> str:
    """Say which gate of a step was not met; nothing where all were."""
    problems = gates.missed(step.gate, document)
    if document.get("passed") is False:
        stage, error = document.get("failed_stage"), document.get("error") or {}
        problems.insert(0, f"stage {stage} was not met" if stage else error.get("message", "it did not pass"))
    return "; ".join(problems)


def _document_file(plan: Plan, step: Step) -> Path:
    return plan.out / f"{step.name}.json"
