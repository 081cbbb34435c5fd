"""Training by Olive's passes: the same tokens and labels in, the same PEFT folder out."""

from __future__ import annotations

from pathlib import Path

from slmops.config import FinetuneSettings
from slmops.data import Corpus
from slmops.errors import InvalidInput
from slmops.runtime import hugging_face, loading
from slmops.training import methods
from slmops.training.engines.outcome import Run, last_train_loss, pairs_of, total_steps

# Olive's passes for methods other than LoRA on a base in nf4 or in float.
_OLIVE_PASSES = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
OLIVE_DIFFERS = (
    "the last adapter of the run is kept, not the one of the lowest validation loss, which is measured once, at the end",
    "rows come in random order and are padded, not grouped by length and joined",
    "the whole model computes logits for every token, in PEFT's layers as they are",
)
"""What `--engine olive` does in another way than `--engine peft`, for its manifest."""


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
    rows, held_out = pairs_of(train), pairs_of(validation)
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
        train_loss=last_train_loss(done.history),
        validation_loss=loss,
        loop_seconds=done.loop_seconds,
        steps=done.steps,
        history=done.history,
        trainable_parameters=done.trainable_parameters,
        peak_memory_bytes=done.peak_memory_bytes,
    )
