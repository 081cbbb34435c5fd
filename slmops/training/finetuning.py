"""From a model and a data file to an adapter: what does `slmops finetune` do, step by step?

Out comes a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) with the best validation loss of the run,
beside it the base's tokenizer, the validation rows, the loss curve, and the manifest with the interface: templates and
stop token, which every later step takes from there.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import artifact, environment, progress
from slmops.artifact import Artifact, Draft
from slmops.config import FinetuneSettings, flat, load
from slmops.data import Corpus, Interface, Tokenizer, choose_interface, encode_rows, load_splits, overlap, split
from slmops.data.tokenizer_files import copy_tokenizer
from slmops.errors import BadArtifact, InvalidInput, RunFailed
from slmops.runtime import hugging_face
from slmops.training import methods

if TYPE_CHECKING:
    from slmops.training.trainer import Row


@dataclass(frozen=True)
class Material:
    """What a run trains on."""

    interface: Interface
    train: Corpus
    validation: Corpus
    validation_rows: list[dict[str, Any]]


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


def finetune(model: str | Path, data: str | Path, *, out: str | Path, config: Any = None, **overrides: Any) -> Artifact:
    """Fine-tune a model with an adapter.

    Args:
        model: a Hugging Face folder, or an artefact of kind "model".
        data: rows (`slmops.data.read_rows`), or a prepared dataset.
        out: the adapter folder to write.
        config: YAML file or mapping of `FinetuneSettings`.
        overrides: single settings, such as `learning_rate=1e-3`.

    Raises:
        InvalidInput: settings or data are wrong.
        BadArtifact: the model has no safe weights, or `out` is occupied.
        Unavailable: a library of the `train` extra is missing.
        RunFailed: training diverged.
    """
    settings = load(FinetuneSettings, config, **overrides)
    out, run = Path(out), settings.run
    artifact.refuse_occupied(out, force=run.force)
    base = resolve_base(model)
    methods.refuse_unsupported(base)
    checkpoints = artifact.partial_folder(out) / "checkpoints"
    if run.resume and not checkpoints.is_dir():
        raise BadArtifact(f"there is no checkpoint of {out} to go on from", "start it without --resume")
    if not run.resume and checkpoints.exists():
        shutil.rmtree(artifact.partial_folder(out))
    with artifact.create(out, kind="adapter", command="finetune", config=flat(settings), force=run.force, keep_partial=True) as draft:
        material = prepare(base, data, settings, draft)
        trained = train(base, material, settings, draft)
        finish(draft, base, data, material, trained, settings)
    return draft.done()


def resolve_base(model: str | Path) -> Path:
    """Return the folder of the model to train on.

    Raises:
        BadArtifact: it is an artefact of slmops of another kind, or holds no safe weights.
    """
    folder = Path(model)
    if not folder.exists() and str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return _download(str(model))
    found = artifact.find(folder) if folder.is_dir() else None
    if found is not None and found.manifest.kind != "model":
        raise BadArtifact(
            f"{folder} is {artifact.article(found.manifest.kind)}, and a model is needed", "fine-tune the base, or merge the adapter first"
        )
    if found is not None:
        artifact.check(found)
    return artifact.require_model(folder)


def prepare(base: Path, data: str | Path, settings: FinetuneSettings, draft: Draft) -> Material:
    """Read, split and encode the rows; every loss on the way is a warning of the draft."""
    given = settings.data
    rows, validation, templates = load_splits(data, validation=given.validation, rows=given.rows, max_rows=given.max_rows)
    interface, warnings = choose_interface(
        base,
        rows,
        prompt_template=given.prompt_template or templates.prompt_template,
        completion_template=given.completion_template or templates.completion_template,
        train_on=given.train_on,
        stop_token=given.stop_token,
        max_length_tokens=given.max_length_tokens,
    )
    progress.say(f"stop token: {interface.stop_reason}")
    asked = {"prompt_template": interface.prompt_template, "completion_template": interface.completion_template}
    if validation is None:
        rows, validation = split(rows, given.validation_share, settings.run.seed, **asked)
    elif shared := overlap(rows, validation, **asked):
        warnings.append(f"{shared} validation rows stand in the training data too: the validation loss is too good")
    tokenizer = Tokenizer.load(base)
    train = encode_rows(rows, tokenizer, interface)
    held_out = encode_rows(validation, tokenizer, interface) if validation else Corpus.empty()
    for warning in (*warnings, *train.warnings):
        draft.warn(warning)
    return Material(interface, train, held_out, validation)


def train(base: Path, material: Material, settings: FinetuneSettings, draft: Draft) -> Run:
    """Train the adapter with the engine asked for; it lies in the draft's folder afterwards."""
    if settings.method.engine == "olive":
        return train_with_olive(base, material, settings, draft)
    return train_with_peft(base, material, settings, draft.folder)


def train_with_olive(base: Path, material: Material, settings: FinetuneSettings, draft: Draft) -> Run:
    """Train with Olive's LoRA or QLoRA pass, on the same tokens and labels.

    Raises:
        InvalidInput: a setting that Olive's pass does not have.
    """
    from slmops import olive_backend
    from slmops.training.trainer import validation_loss

    run, optimizer, method = settings.run, settings.optimizer, settings.method
    lacking = [name for name, given in (("resume", run.resume), ("precision bf16", run.precision == "bf16")) if given]
    if lacking:
        raise InvalidInput(f"engine olive: Olive's pass has no {', '.join(lacking)}", "leave it out, or use --engine peft")
    rows, held_out = _pairs(material.train), _pairs(material.validation)
    steps = total_steps(settings, len(rows))
    done = olive_backend.train_adapter(
        base,
        rows,
        draft.folder,
        quantized=method.method == "qlora",
        rank=method.lora_rank,
        alpha=method.lora_alpha or 2 * method.lora_rank,
        dropout=method.lora_dropout,
        target_modules=method.target_modules,
        epochs=optimizer.epochs,
        max_steps=steps,
        batch_size=optimizer.batch_size,
        gradient_accumulation=optimizer.gradient_accumulation,
        learning_rate=optimizer.learning_rate or methods.default_learning_rate(hugging_face.parameter_count(base)),
        schedule=optimizer.schedule,
        warmup_steps=round(optimizer.warmup_share * steps),
        weight_decay=optimizer.weight_decay,
        max_gradient_norm=optimizer.max_gradient_norm,
        seed=run.seed,
    )
    draft.warn("engine olive keeps the last adapter, not the one of the best validation loss, and pads rows in the order of its sampler")
    loss = None
    if held_out:
        adapted = hugging_face.load_adapted(base, draft.folder, nf4=method.method == "qlora")
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


def train_with_peft(base: Path, material: Material, settings: FinetuneSettings, folder: Path) -> Run:
    """Train with our own trainer."""
    transformers = hugging_face.quiet_libraries()
    from slmops.training.trainer import SupervisedTrainer, Watcher

    transformers.set_seed(settings.run.seed)
    model = methods.load_base(base, quantized=settings.method.method == "qlora", precision=settings.run.precision)
    parameters = sum(p.numel() for p in model.parameters())
    model = methods.attach_adapter(model, settings.method)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows, held_out = _pairs(material.train), _pairs(material.validation)
    arguments, steps = training_arguments(settings, folder, len(rows), parameters, bool(held_out))
    best = folder / "best.safetensors"
    trainer = SupervisedTrainer(model, arguments, rows, held_out, settings.run.seed, lambda m: save_adapter_weights(m, best))
    trainer.remove_callback(transformers.PrinterCallback)
    if settings.run.resume:
        restore_best(trainer)
    with progress.task("finetune", total=steps, unit="steps") as task:
        trainer.add_callback(Watcher(task, material.train.tokens_total / max(1, len(trainer.order))))
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=True if settings.run.resume else None)
        if held_out and not _evaluated_last(trainer):
            trainer.evaluate()
        loop_seconds = time.perf_counter() - started
    write_adapter(trainer.model, best if best.exists() else None, folder)
    return Run(
        train_loss=_last_train_loss(trainer.state.log_history),
        validation_loss=trainer.best_loss if held_out else None,
        loop_seconds=loop_seconds,
        steps=trainer.state.global_step,
        history=trainer.state.log_history,
        trainable_parameters=trainable,
        peak_memory_bytes=environment.peak_memory_bytes(),
    )


def training_arguments(settings: FinetuneSettings, folder: Path, rows: int, parameters: int, validates: bool) -> tuple[Any, int]:
    """Return the Trainer's arguments and the number of optimizer steps."""
    from transformers import TrainingArguments

    optimizer, run = settings.optimizer, settings.run
    steps = total_steps(settings, rows)
    every = math.ceil(steps / run.evaluations)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=optimizer.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        learning_rate=optimizer.learning_rate or methods.default_learning_rate(parameters),
        lr_scheduler_type=optimizer.schedule if optimizer.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(optimizer.warmup_share * steps),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_gradient_norm,
        seed=run.seed,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return arguments, steps


def total_steps(settings: FinetuneSettings, rows: int) -> int:
    """Return the number of optimizer steps of a run."""
    optimizer = settings.optimizer
    per_epoch = math.ceil(math.ceil(rows / optimizer.batch_size) / optimizer.gradient_accumulation)
    return optimizer.max_steps or max(1, round(per_epoch * optimizer.epochs))


def save_adapter_weights(model: Any, path: Path) -> None:
    """Write an adapter's tensors, as PEFT names them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, path)
    path.chmod(0o644)  # safetensors writes for the owner only


def write_adapter(model: Any, best: Path | None, folder: Path) -> None:
    """Write the PEFT folder with the best adapter of the run and remove what only the run needed."""
    model.save_pretrained(folder, safe_serialization=True)
    if best is not None:
        best.replace(folder / "adapter_model.safetensors")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def restore_best(trainer: Any) -> None:
    """After a resume, let only a lower validation loss than before the stop replace the best adapter."""
    checkpoints = sorted(Path(trainer.args.output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if not checkpoints:
        return
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    trainer.best_loss = min(losses, default=trainer.best_loss)


def finish(draft: Draft, base: Path, data: str | Path, material: Material, trained: Run, settings: FinetuneSettings) -> None:
    """Write what lies beside the adapter, and the manifest's fields."""
    from slmops.training.curve import write_curve

    if not math.isfinite(trained.train_loss):
        raise RunFailed(f"training diverged: the loss ended at {trained.train_loss}", "lower --learning-rate, or check the data")
    write_curve(draft.folder, trained.history)
    copy_tokenizer(base, draft.folder)
    with (draft.folder / "validation.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in material.validation_rows)
    draft.add_input("base", base)
    draft.add_input("dataset", data)
    draft.interface = material.interface.model_dump(mode="json")
    draft.metrics = {"train_loss": {"value": trained.train_loss}, "validation_loss": {"value": trained.validation_loss}}
    corpus = material.train
    draft.facts = {
        "method": settings.method.method,
        "engine": settings.method.engine,
        "rows": corpus.rows,
        "validation_rows": len(material.validation_rows),
        "tokens": {"total": corpus.tokens_total, "supervised": corpus.tokens_supervised},
        "steps": trained.steps,
        "loop_seconds": round(trained.loop_seconds, 3),
        "peak_memory_bytes": trained.peak_memory_bytes,
        "trainable_parameters": trained.trainable_parameters,
        "stop_reason": material.interface.stop_reason,
    }


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
