"""How does a fine-tune run through Olive's LoRA or QLoRA pass, and come out as the adapter that our own trainer writes?

With the same rows, settings and seed the result is bit for bit that of PEFT under a plain transformers.Trainer
(measured with olive-ai 0.13.0 at equal thread counts).
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import artifact, environment, hashes
from slmops.errors import InvalidInput, RunFailed
from slmops.olive_backend.linears import adapted, choose_targets, linear_layers
from slmops.olive_backend.process import execute
from slmops.olive_backend.requirements import require_olive
from slmops.olive_backend.workflow import VARIANTS, WITHOUT_DROPOUT, Recipe, compose

# What PEFT calls a layer's tensors, behind the layer's name: LoRA and DoRA, LoHa, LoKr.
_TENSOR = re.compile(r"\.(lora|hada|lokr)_\w+(\.weight)?$")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class OliveRun:
    """What a training run reports."""

    history: list[dict[str, Any]]
    """One entry a step, in the form of the Trainer's `log_history`: step, loss, learning_rate, grad_norm, epoch."""
    steps: int
    loop_seconds: float
    """Seconds of the training loop alone, without loading and saving."""
    trainable_parameters: int
    peak_memory_bytes: int
    """Peak resident memory of Olive's process."""


def train_adapter(
    base: Path,
    rows: list[tuple[list[int], list[int]]],
    folder: Path,
    *,
    quantized: bool,
    rank: int,
    alpha: float,
    dropout: float,
    target_modules: list[str] | None,
    epochs: float,
    max_steps: int | None,
    batch_size: int,
    gradient_accumulation: int,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    weight_decay: float,
    max_gradient_norm: float,
    seed: int,
    threads: int = 1,
    variant: str = "LoRA",
) -> OliveRun:
    """Train an adapter with Olive and write its PEFT files into `folder`; beside it, a work folder lives meanwhile.

    Args:
        base: Hugging Face folder.
        rows: (ids, labels) of each row; label -100 is not counted. They are all used, each as it is.
        folder: where `adapter_config.json` and `adapter_model.safetensors` go; after a failure, Olive's log.
        quantized: QLoRA: the base frozen in nf4 with double quantization.
        rank: of the adapter.
        alpha: scale of the adapter: alpha / rank.
        dropout: on the adapter's input.
        target_modules: linear layers to adapt; None: all but the head.
        epochs: passes over the rows, where `max_steps` is None.
        max_steps: optimizer steps.
        batch_size: rows in a batch.
        gradient_accumulation: must be 1.
        learning_rate: the peak.
        schedule: "linear", "cosine" or "constant", after the warm-up.
        warmup_steps: steps in which the rate rises.
        weight_decay: of AdamW.
        max_gradient_norm: gradients are clipped to it.
        seed: of the adapter's initial weights, the dropout and the order of rows.
        threads: of its operators.
        variant: Olive's pass: LoRA, DoRA, LoHa or LoKr; with `quantized`, LoRA.

    Raises:
        InvalidInput: a setting that Olive's pass cannot honour, or no rows.
        Unavailable: Olive, or bitsandbytes for QLoRA, is missing.
        RunFailed: Olive failed, made no model, stopped early, left a layer out, or training diverged.
    """
    if gradient_accumulation != 1:
        raise InvalidInput(
            f"gradient_accumulation {gradient_accumulation}: Olive averages over batches, not over tokens (it switches the Trainer's own way off)",
            "use a larger --batch-size, or --engine peft",
        )
    if not rows:
        raise InvalidInput("there are no rows to train on", "give at least one")
    refuse_variant(variant, quantized=quantized, dropout=dropout)
    require_olive("for --method qlora with --engine olive" if quantized else "for --engine olive", quantized=quantized)
    recipe = Recipe(
        quantized=quantized,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_gradient_norm=max_gradient_norm,
        seed=seed,
        variant=variant,
    )
    layers = linear_layers(base)
    return _run(base, rows, folder, recipe, layers, choose_targets(layers, target_modules, quantized=quantized), threads)


def refuse_variant(variant: str, *, quantized: bool, dropout: float) -> None:
    """Raise InvalidInput where Olive has no such pass, or would leave a setting out without a word."""
    if variant not in VARIANTS or (quantized and variant != "LoRA"):
        known = ", ".join(VARIANTS)
        raise InvalidInput(f"Olive has no {'quantized ' if quantized else ''}pass {variant}", f"it has {known}, and QLoRA")
    if dropout and variant in WITHOUT_DROPOUT:
        raise InvalidInput(f"lora_dropout {dropout}: PEFT's {variant} has no dropout on the input, and Olive drops it", "leave it out")


def _run(
    base: Path, rows: list[tuple[list[int], list[int]]], folder: Path, recipe: Recipe, layers: list[str], targets: list[str], threads: int
) -> OliveRun:
    cuda = environment.require("torch", "to train").cuda.is_available()
    base, parent = base.resolve(), folder.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Olive copies the whole base model into its output (olive 0.13, cache.py:589): beside OUT, not into a small /tmp.
    environment.need_disk(parent, hashes.size_bytes(base), "Olive's copy of the base model")
    with TemporaryDirectory(prefix="slmops-olive-", dir=parent) as scratch:
        work = Path(scratch)
        rows_file = work / "rows.jsonl"
        with rows_file.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in rows)
        workflow = compose(base, rows_file, len(rows), work, recipe, targets, cuda=cuda)
        (work / "workflow.json").write_text(json.dumps(workflow, indent=2), encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            outcome = execute(work, recipe.steps(len(rows)), cuda=cuda, threads=threads)
            parameters = _check_layers(outcome.adapter, adapted(layers, targets))
        except RunFailed as error:
            if (work / "olive.log").is_file():
                shutil.copyfile(work / "olive.log", folder / "olive.log")
            raise RunFailed(error.message, error.hint) from None
        _write(outcome.adapter, folder, base)
    return OliveRun(outcome.history, outcome.steps, outcome.loop_seconds, parameters, outcome.peak_memory_bytes)


def _check_layers(adapter: Path, expected: Sequence[str]) -> int:
    """Return the number of an adapter's parameters, once it is seen to sit on the layers asked for and no other."""
    environment.require("safetensors", "to read an adapter")
    from safetensors import safe_open

    with safe_open(adapter / _WEIGHTS, framework="np") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  (no mapping)
    found = {_TENSOR.sub("", name.removeprefix("base_model.model.")) for name in shapes}
    wrong = sorted(found.symmetric_difference(expected))
    if wrong:
        raise RunFailed(
            f"Olive adapted {len(found)} layers, and {len(expected)} were asked for; the first that differs: {wrong[0]}",
            "use --engine peft",
        )
    return sum(math.prod(shape) for shape in shapes.values())


def _write(adapter: Path, folder: Path, base: Path) -> None:
    """Copy the PEFT files, the config in the form that PEFT itself writes."""
    shutil.copyfile(adapter / _WEIGHTS, folder / _WEIGHTS)
    details = json.loads((adapter / _CONFIG).read_text(encoding="utf-8"))
    scale = "lora_alpha" if "lora_alpha" in details else "alpha"
    if float(details[scale]).is_integer():
        details[scale] = int(details[scale])  # Olive's field is a float
    details["task_type"] = "CAUSAL_LM"  # left out of LoHa's and LoKr's (lora.py:604 and :668)
    details["target_modules"] = sorted(details["target_modules"])  # a set in PEFT: its order follows the hash seed
    details["base_model_name_or_path"] = str(base)
    artifact.write_json(folder / _CONFIG, details)
