"""Who trains? Our own trainer with PEFT, or Olive's pass: the same tokens and labels in, the same PEFT folder out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import environment, progress
from slmops.config import FinetuneSettings, flat
from slmops.data import Corpus
from slmops.errors import InvalidInput, RunFailed
from slmops.runtime import hugging_face, loading
from slmops.runtime.quantized_base import QuantizedBase
from slmops.training import checkpoints, methods, processes
from slmops.training.objectives.material import AS_SFT, Course, Setup
from slmops.training.precision import choose_precision
from slmops.training.processes import Team
from slmops.training.tracking import trackers

if TYPE_CHECKING:
    from slmops.training.trainer import Row


# Olive's passes for methods other than LoRA on a base in nf4 or in float.
_OLIVE_PASSES = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
OLIVE_DIFFERS = (
    "the last adapter of the run is kept, not the one of the lowest validation loss, which is measured once, at the end",
    "rows come in random order and are padded, not grouped by length and joined",
    "the whole model computes logits for every token, in PEFT's layers as they are",
)
"""What `--engine olive` does in another way than `--engine peft`, for its manifest."""


@dataclass(frozen=True)
class Run:
    """What a trainer, whichever engine it is, reports back."""

    train_loss: float
    validation_loss: float | None
    loop_seconds: float
    steps: int
    history: list[dict[str, Any]]
    trainable_parameters: int
    peak_memory_bytes: int


def train_with_olive(base: Path, train: Corpus, validation: Corpus, settings: FinetuneSettings, folder: Path) -> Run:
    """Train with Olive's LoRA, QLoRA, DoRA, LoHa or LoKr pass, on the same tokens and labels.

    Raises:
        InvalidInput: a setting that Olive's pass does not have.
    """
    from slmops import olive_backend
    from slmops.training.trainer import validation_loss

    run, optimizer, method = settings.run, settings.optimizer, settings.method
    lacking = [name for name, given in (("resume", run.resume), ("precision bf16", run.precision == "bf16")) if given]
    if lacking:
        raise InvalidInput(f"engine olive: Olive's pass has no {', '.join(lacking)}", "leave it out, or use --engine peft")
    rows, held_out = _pairs(train), _pairs(validation)
    steps = total_steps(settings, len(rows))
    done = olive_backend.train_adapter(
        base,
        rows,
        folder,
        quantized=method.method == "qlora",
        variant=_OLIVE_PASSES.get(method.method, "LoRA"),
        rank=method.lora_rank,
        alpha=method.lora_alpha or 2 * method.lora_rank,
        dropout=method.lora_dropout,
        target_modules=method.target_modules,
        epochs=optimizer.epochs,
        max_steps=steps,
        batch_size=optimizer.batch_size,
        gradient_accumulation=optimizer.gradient_accumulation,
        learning_rate=optimizer.learning_rate or methods.default_learning_rate(hugging_face.parameter_count(base), method.method),
        schedule=optimizer.schedule,
        warmup_steps=round(optimizer.warmup_share * steps),
        weight_decay=optimizer.weight_decay,
        max_gradient_norm=optimizer.max_gradient_norm,
        seed=run.seed,
        threads=run.threads or loading.default_threads(base),
    )
    loss = None
    if held_out:
        adapted = hugging_face.load_adapted(base, folder, nf4=method.method == "qlora")
        loss = validation_loss(adapted, held_out, 4 * optimizer.batch_size)
    return Run(
        train_loss=_last_train_loss(done.history),
        validation_loss=loss,
        loop_seconds=done.loop_seconds,
        steps=done.steps,
        history=done.history,
        trainable_parameters=done.trainable_parameters,
        peak_memory_bytes=done.peak_memory_bytes,
    )


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
    """
    transformers = hugging_face.quiet_libraries()
    from slmops.training.trainer import SupervisedTrainer, Watcher
    from slmops.training.watching import Observer, Patience, Seldom

    environment.require("torch", "to train").set_num_threads(team.threads(settings.run.threads, loading.default_threads(base)))
    environment.keep_freed_memory()
    transformers.set_seed(settings.run.seed)
    model, parameters = course.model() if course.model is not None else _adapted(base, settings, package)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows, held_out = _pairs(train), _pairs(validation)
    arguments, steps = training_arguments(settings, folder, course.rows_per_epoch(train), parameters, bool(validation.rows), team)
    best = folder / checkpoints.BEST

    def keep(adapted: Any) -> None:
        _keep(trainer, adapted, best, team)

    if course.trainer is not None:
        trainer = course.trainer(Setup(course, train, validation, model, arguments, keep))
    else:
        layout = _layout(model, rows)
        team.drop_apart(settings.run.seed)
        trainer = SupervisedTrainer(model, arguments, rows, held_out, settings.run.seed, layout, keep, order=course.order)
    processes.check_together(team, trainer.accelerator)
    trainer.remove_callback(transformers.PrinterCallback)
    own = (Patience(settings.run.patience), Seldom(checkpoints.seconds_apart(settings.run) if team.size == 1 else 0.0))
    for callback in (*methods.callbacks_for(settings.method, model), *own):
        trainer.add_callback(callback)
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
    if trainer.sharded and not held_out:
        _keep(trainer, trainer.model, best, team)
    if team.leads:
        methods.write_trained(trainer.model, best, folder)
    return Run(
        train_loss=_last_train_loss(trainer.state.log_history),
        validation_loss=trainer.best_loss if validation.rows else None,
        loop_seconds=loop_seconds,
        steps=trainer.state.global_step,
        history=trainer.state.log_history,
        trainable_parameters=trainable,
        peak_memory_bytes=environment.peak_memory_bytes(),
    )


def _adapted(base: Path, settings: FinetuneSettings, package: QuantizedBase | None) -> tuple[Any, int]:
    """Return the base with the method's trainable weights, and the number of its own parameters."""
    method, trains_base = settings.method.method, methods.method_of(settings.method).trains_base
    precision = choose_precision(settings.run.precision, method, exact_base=package is not None, trains_base=trains_base)
    model = methods.load_base(base, quantized=method == "qlora", precision=precision, package=package)
    parameters = sum(p.numel() for p in model.parameters())
    return methods.attach_adapter(model, settings.method), parameters


def _layout(model: Any, rows: list[Row]) -> Any:
    """Return how rows reach the model, made fast where every process has all weights."""
    from slmops.training.step import Padded, prepare_step

    if processes.sharded():
        return Padded(model)
    step = prepare_step(model, rows)
    if step.reason is not None:
        progress.say(f"rows are padded, not joined: {step.reason}")
    return step.layout


def _keep(trainer: Any, model: Any, best: Path, team: Team) -> None:
    if trainer.sharded:
        processes.save_sharded(trainer.accelerator, model, best, leads=team.leads)
    elif team.leads:
        methods.save_trained(model, best)


def training_arguments(
    settings: FinetuneSettings, folder: Path, rows: int, parameters: int, validates: bool, team: Team = processes.ALONE
) -> tuple[Any, int]:
    """Return the Trainer's arguments and the number of optimizer steps."""
    from transformers import TrainingArguments

    optimizer, run = settings.optimizer, settings.run
    steps = total_steps(settings, rows)
    every, saved = math.ceil(steps / run.evaluations), checkpoints.interval(run, steps)
    arguments = TrainingArguments(
        output_dir=str(folder / checkpoints.FOLDER),
        max_steps=steps,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        learning_rate=optimizer.learning_rate or methods.default_learning_rate(parameters, settings.method.method),
        lr_scheduler_type=optimizer.schedule if optimizer.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(optimizer.warmup_share * steps),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_gradient_norm,
        seed=run.seed,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps" if saved else "no",
        save_steps=saved or steps,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        # Without it, processes on a machine without a GPU would not find each other, and each train an adapter alone.
        use_cpu=team.size > 1 and not environment.require("torch", "to train").cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    return arguments, steps


def total_steps(settings: FinetuneSettings, rows: int) -> int:
    """Return the number of optimizer steps of a run."""
    optimizer = settings.optimizer
    per_epoch = math.ceil(math.ceil(rows / optimizer.batch_size) / optimizer.gradient_accumulation)
    return optimizer.max_steps or max(1, round(per_epoch * optimizer.epochs))


def _pairs(corpus: Corpus) -> list[Row]:
    return [(list(sequence.ids), list(sequence.labels)) for sequence in corpus.sequences]


def _evaluated_last(trainer: Any) -> bool:
    return any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history)


def _last_train_loss(history: list[dict[str, Any]]) -> float:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses:
        raise RunFailed("training made no step", "give more rows or more epochs")
    tail = losses[-max(1, len(losses) // 20) :]
    return float(sum(tail) / len(tail))
