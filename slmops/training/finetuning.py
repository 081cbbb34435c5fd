"""From a model and a data file to an adapter: what does `slmops finetune` do, step by step?

Out comes the adapter's folder (`adapter_config.json`, `adapter_model.safetensors`), or with `--method full` a model's, of the lowest
validation loss of the run, beside it the base's tokenizer, the validation rows, the loss curve, and the manifest with the interface: templates and
stop token, which every later step takes from there.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from slmops import artifact, environment
from slmops.artifact import Artifact, Draft
from slmops.config import FinetuneSettings, flat, load
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import InvalidInput, RunFailed
from slmops.runtime import quantized_base
from slmops.training import checkpoints, effects, engines, forgetting, launching, methods, objectives, processes, usage
from slmops.training.engines import Run
from slmops.training.objectives import Material, Task
from slmops.training.overfitting import find_turn
from slmops.training.precision import check_int8
from slmops.training.processes import Team
from slmops.training.tracking import require_trackers


def finetune(model: str | Path, data: str | Path | None = None, *, out: str | Path, config: Any = None, **overrides: Any) -> Artifact:
    """Fine-tune a model: train an adapter, or with `method="full"` the model itself.

    Args:
        model: a Hugging Face folder, or an artefact of kind "model".
        data: rows (`slmops.data.read_rows`), or a prepared dataset; None: of objective multitask, whose tasks name theirs.
        out: the folder to write, of an adapter or a model.
        config: YAML file or mapping of `FinetuneSettings`.
        overrides: single settings, such as `learning_rate=1e-3`.

    Raises:
        InvalidInput: settings or data are wrong.
        BadArtifact: the model has no safe weights, `quantized_base` is no export or package of it, or `out` is occupied.
        Unavailable: a library of the `train` extra is missing, or the engine lacks what is asked for.
        RunFailed: training diverged.
    """
    settings = load(FinetuneSettings, config, **overrides)
    out, run = Path(out), settings.run
    methods.refuse_foreign(settings.method)
    artifact.refuse_occupied(out, force=run.force)
    check_run(settings)
    objective = objectives.chosen(settings, data)
    team = processes.find_team(run.processes)
    if run.processes > 1 and team.size == 1:
        return launching.launch(model, data, out, settings)
    base = resolve_base(model)
    methods.refuse_unsupported(base)
    package = methods.find_quantized_base(base, settings.method)
    identity = checkpoints.identity(base, data, settings, package.sha256 if package else None, objectives.files_of(settings))
    identity |= {"processes": team.size}
    if team.leads or run.resume:
        checkpoints.prepare(artifact.partial_folder(out), identity, resume=run.resume)
    kept = methods.without_foreign(settings.method, flat(settings))
    details: dict[str, Any] = {
        "kind": "model" if settings.method.method == "full" else "adapter",
        "command": "finetune",
        "config": kept,
        "force": run.force,
    }
    with processes.shared_draft(team, out, keep=checkpoints.ANY, **details) as draft:
        material = prepare(objective, Task(base, data, settings, draft, package))
        measures = list(material.course.measures)
        if settings.forgetting.retain is not None:
            measures.append(forgetting.retained(settings, base, material.interface))
        if team.leads:
            checkpoints.begin(draft.folder, identity)
        trained = train(base, material, settings, draft, team)
        if team.leads:
            finish(draft, base, data, material, trained, settings)
            if measures:
                found = effects.measure(base, draft.folder, settings, material.interface, package, measures)
                forgetting.record(draft, found, settings)
            draft.facts |= {"processes": team.size}
            checkpoints.remove(draft.folder)
    made = processes.written(team, draft)
    team.part()
    return made


def check_run(settings: FinetuneSettings) -> None:
    """Refuse, before anything is loaded, what would be found out late.

    Raises:
        InvalidInput: settings that contradict each other.
        Unavailable: the library of a tracker is missing.
    """
    run, engine = settings.run, settings.method.engine
    require_trackers(run.report_to or [])
    if run.patience is not None and run.patience >= run.evaluations:
        raise InvalidInput(
            f"patience {run.patience} is never reached: validation is measured {run.evaluations} times in the run",
            f"--evaluations {5 * run.patience}, or less patience",
        )
    given = {"patience": run.patience, "checkpoints": run.checkpoints, "checkpoint_steps": run.checkpoint_steps, "report_to": run.report_to}
    own_step = settings.objective.objective in ("sft", "pretrain", "multitask") and settings.objective.loss is None
    if run.activation_checkpoints == "on" and not own_step:
        raise InvalidInput("activation_checkpoints: objectives dpo and reward and a loss of your own hold activations", "leave it out")
    checks = (
        ("processes", run.processes > 1),
        ("activation_checkpoints", run.activation_checkpoints == "on"),
        ("precision int8", run.precision == "int8"),
    )
    lacking = [name for name, value in (*given.items(), *checks) if value]
    if engine == "olive" and lacking:
        raise InvalidInput(f"engine olive: Olive's pass has no {', '.join(lacking)}", "leave it out, or use --engine peft")
    if run.precision == "int8":
        if not own_step:
            raise InvalidInput("precision int8: objectives dpo and reward and a loss of your own have another step", "leave it out")
        if processes.sharded():
            raise InvalidInput("precision int8: with FSDP or DeepSpeed no process has whole matrices", "leave it out")
        check_int8(settings.method)


def resolve_base(model: str | Path) -> Path:
    """Return the folder of the model to train on.

    Raises:
        BadArtifact: it is an artefact of slmops of another kind, or holds no safe weights.
    """
    folder = Path(model)
    if not folder.exists() and str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return _download(str(model))
    artifact.checked(folder, "model", "fine-tune the base, or merge the adapter first")
    return artifact.require_model(folder)


def prepare(objective: str, task: Task) -> Material:
    """Read, split and encode what the objective trains on; every loss on the way is a warning of the draft."""
    if task.package is not None and task.package.is_float:
        task.draft.warn(f"quantized_base: the weights of {task.package.folder} are not quantized: this trains on the model itself")
    material = objectives.prepare(objective, task)
    if task.settings.forgetting.replay is None:
        return material
    material, warnings = forgetting.with_replay(material, task.settings, task.base)
    for warning in warnings:
        task.draft.warn(warning)
    return material


def train(base: Path, material: Material, settings: FinetuneSettings, draft: Draft, team: Team) -> Run:
    """Train the adapter with the engine asked for; it lies in the draft's folder afterwards."""
    if settings.method.engine == "olive":
        draft.warn(f"engine olive: {'; '.join(engines.OLIVE_DIFFERS)}")
        return engines.train_with_olive(base, material.train, material.validation, settings, draft.folder)
    if settings.run.patience is not None and not material.validation_rows:
        raise InvalidInput(
            "patience: there are no validation rows to see by whether the run still learns", "give --validation, or leave it out"
        )
    rows, held_out = material.train, material.validation
    return engines.train_with_peft(
        base, rows, held_out, settings, draft.folder, material.package, material.course, out=draft.out, team=team
    )


def finish(draft: Draft, base: Path, data: str | Path | None, material: Material, trained: Run, settings: FinetuneSettings) -> None:
    """Write what lies beside the adapter, and the manifest's fields."""
    from slmops.training.curve import write_curve

    if not math.isfinite(trained.train_loss):
        raise RunFailed(f"training diverged: the loss ended at {trained.train_loss}", "lower --learning-rate, or check the data")
    write_curve(draft.folder, trained.history)
    if draft.kind == "model":
        methods.write_stops(draft.folder, material.interface.stop_token_ids)
    copy_tokenizer(base, draft.folder)
    with (draft.folder / "validation.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in material.validation_rows)
    draft.add_input("base", base)
    files = objectives.files_of(settings) if data is None else {"dataset": data} | objectives.files_of(settings)
    for role, place in files.items():
        draft.add_input(role, place)
    package = material.package
    if package is not None:
        draft.add_input(quantized_base.ROLE, package.folder, package.sha256)
    draft.interface = material.interface.model_dump(mode="json")
    metrics, facts = material.course.close(trained, draft.folder) if material.course.close is not None else ({}, {})
    draft.metrics = {"train_loss": {"value": trained.train_loss}, "validation_loss": {"value": trained.validation_loss}} | metrics
    corpus = material.train
    draft.facts = {
        "objective": settings.objective.objective,
        "method": settings.method.method,
        "engine": settings.method.engine,
        "rows": corpus.rows,
        "validation_rows": len(material.validation_rows),
        "tokens": {"total": corpus.tokens_total, "supervised": corpus.tokens_supervised},
        "steps": trained.steps,
        "loop_seconds": round(trained.loop_seconds, 3),
        "peak_memory_bytes": trained.peak_memory_bytes,
        **({"estimate": trained.estimate} if trained.estimate is not None else {}),
        **trained.step,
        "trainable_parameters": trained.trainable_parameters,
        "stop_reason": material.interface.stop_reason,
        "roads": material.course.facts.get("roads") or methods.find_roads(draft.folder, base, settings.method),
        **({quantized_base.ROLE: package.facts} if package is not None else {}),
        **({"differs_from_peft": list(engines.OLIVE_DIFFERS)} if settings.method.engine == "olive" else {}),
        **told_by_history(draft, trained, engines.total_steps(settings, material.course.rows_per_epoch(corpus))),
        **material.course.facts,
        **facts,
    }


def told_by_history(draft: Draft, trained: Run, steps: int) -> dict[str, Any]:
    """Return what the history shows beside the losses: use of the machine, overfitting (a warning too), an early end."""
    found: dict[str, Any] = {"usage": usage.summary(trained.history)}
    turn = find_turn(trained.history)
    if turn is not None:
        draft.warn(f"{turn}; the adapter of step {turn.step} is kept")
        found["overfitting"] = turn.document()
    if trained.steps < steps:
        found["ended_early"] = {"step": trained.steps, "of": steps}
    return found


def _download(name: str) -> Path:
    """Fetch a model of the hub by its id, safetensors and text files only."""
    hub = environment.require("huggingface_hub", "to download a model")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except (OSError, hub.errors.HfHubHTTPError, hub.errors.HFValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(
            f"no such folder, and the model could not be fetched from the hub: {name} ({reason})", "check the path"
        ) from error
