"""Training by our own trainer with PEFT: what is loaded, made fast, trained and kept, in this order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from slmops import environment, progress
from slmops.config import FinetuneSettings, flat
from slmops.data import Corpus
from slmops.runtime import hugging_face, loading
from slmops.runtime.quantized_base import QuantizedBase
from slmops.training import checkpoints, methods, processes
from slmops.training.engines.outcome import Run, last_train_loss, pairs_of
from slmops.training.engines.plan import foretell, precision_of, training_arguments
from slmops.training.objectives.material import AS_SFT, Course, Setup
from slmops.training.precision import held_in
from slmops.training.processes import Team
from slmops.training.tracking import trackers


def train_with_peft(
    base: Path,
    train: Corpus,
    validation: Corpus,
    settings: FinetuneSettings,
    folder: Path,
    package: QuantizedBase | None = None,
    course: Course = AS_SFT,
    *,
    out: Path,
    team: Team,
) -> Run:
    """Train with our own trainer (`slmops.training.trainer`); keeps the adapter of the lowest validation loss.

    Args:
        base: Hugging Face folder of the model.
        train: rows to learn.
        validation: rows to choose the best adapter by.
        settings: of the run.
        folder: to write the adapter to.
        package: whose quantized weights take the place of the model's own.
        course: what the objective does otherwise than sft.
        out: where the adapter will lie in the end; trackers write beside it.
        team: the processes that train together.

    Raises:
        RunFailed: the run will not fit into memory.
    """
    transformers = hugging_face.quiet_libraries()
    from slmops.training.trainer import Watcher
    from slmops.training.watching import Observer

    environment.require("torch", "to train").set_num_threads(team.threads(settings.run.threads, loading.default_threads(base)))
    environment.keep_freed_memory()
    foretold = foretell(base, train, validation, settings, package, course, team)
    transformers.set_seed(settings.run.seed)
    recomputes = foretold is not None and foretold.recomputes
    model, parameters = course.model() if course.model is not None else _adapted(base, settings, package, recomputes=recomputes)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    arguments, steps = training_arguments(settings, folder, course.rows_per_epoch(train), parameters, bool(validation.rows), team)
    best = folder / checkpoints.BEST

    def keep(adapted: Any) -> None:
        _keep(trainer, adapted, best, team)

    trainer = _trainer(Setup(course, train, validation, model, arguments, keep, settings.run.precision == "int8"), settings, team)
    processes.check_together(team, trainer.accelerator)
    checkpoint = checkpoints.latest(folder / checkpoints.FOLDER) if settings.run.resume else None
    done = trainer.begin_with(checkpoint, best)
    names = (settings.run.report_to or []) if team.leads else []
    with trackers(names, out, flat(settings), done) as told, progress.task("finetune", total=steps, unit="steps") as task:
        task.advance(done)
        for callback in (Observer(told), Watcher(task, train.tokens_total / max(1, len(trainer.order)))):
            trainer.add_callback(callback)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        if validation.rows and not _evaluated_last(trainer):
            trainer.evaluate()
        loop_seconds = time.perf_counter() - started
    if trainer.sharded and not validation.sequences:
        _keep(trainer, trainer.model, best, team)
    if team.leads:
        methods.write_trained(trainer.model, best, folder)
    return Run(
        train_loss=last_train_loss(trainer.state.log_history),
        validation_loss=trainer.best_loss if validation.rows else None,
        loop_seconds=loop_seconds,
        steps=trainer.state.global_step,
        history=trainer.state.log_history,
        trainable_parameters=trainable,
        peak_memory_bytes=environment.peak_memory_bytes(),
        estimate=foretold.document(environment.peak_gpu_bytes() or environment.peak_memory_bytes(), loop_seconds)
        if foretold is not None
        else None,
        step=trainer.prepared.document() if hasattr(trainer, "prepared") else {},
    )


def _adapted(base: Path, settings: FinetuneSettings, package: QuantizedBase | None, *, recomputes: bool) -> tuple[Any, int]:
    """Return the base with the method's trainable weights, and the number of its own parameters."""
    quantized = settings.method.method == "qlora"
    model: Any = methods.load_base(base, quantized=quantized, precision=held_in(precision_of(settings, package)), package=package)
    parameters = sum(p.numel() for p in model.parameters())
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return methods.attach_adapter(model, settings.method), parameters


def _trainer(setup: Setup, settings: FinetuneSettings, team: Team) -> Any:
    """Return the trainer of the course, or ours, with what is done beside the steps."""
    from transformers import PrinterCallback

    from slmops.training.watching import Patience, Seldom

    trainer = setup.course.trainer(setup) if setup.course.trainer is not None else _own_trainer(setup, settings)
    team.drop_apart(settings.run.seed)
    trainer.remove_callback(PrinterCallback)
    apart = checkpoints.seconds_apart(settings.run) if team.size == 1 else 0.0
    for callback in (*methods.callbacks_for(settings.method, setup.model), Patience(settings.run.patience), Seldom(apart)):
        trainer.add_callback(callback)
    return trainer


def _own_trainer(setup: Setup, settings: FinetuneSettings) -> Any:
    from slmops.training.trainer import SupervisedTrainer, step_of

    rows, held_out = pairs_of(setup.train), pairs_of(setup.validation)
    step = step_of(setup.model, rows, setup.arguments.device, int8=setup.int8)
    return SupervisedTrainer(setup.model, setup.arguments, rows, held_out, settings.run.seed, step, setup.keep, order=setup.course.order)


def _keep(trainer: Any, model: Any, best: Path, team: Team) -> None:
    if trainer.sharded:
        processes.save_sharded(trainer.accelerator, model, best, leads=team.leads)
    elif team.leads:
        methods.save_trained(model, best)


def _evaluated_last(trainer: Any) -> bool:
    return any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history)
