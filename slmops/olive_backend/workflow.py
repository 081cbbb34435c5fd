"""What is Olive told to do? The settings of a fine-tune as one workflow, every default that would bite written out.

Olive's own defaults are bfloat16, rank 64, three epochs, gradient checkpointing, a constant rate, a paged optimizer
and an input that it joins into blocks; none of them is in force here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.errors import InvalidInput

# The component in it is `slmops_token_rows`; it also seeds the adapter's initial weights.
USER_SCRIPT = Path(__file__).with_name("user_script.py")

VARIANTS = ("LoRA", "DoRA", "LoHa", "LoKr")
# Their passes take the setting, as a LoRA pass does, and PEFT's configs of them have no such thing (olive 0.13, lora.py:589 and :636).
WITHOUT_DROPOUT = ("LoHa", "LoKr")

# transformers' "constant" ignores the warm-up.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Recipe:
    """The settings of one adapter; see `slmops.config.FinetuneSettings` for what they mean."""

    quantized: bool
    rank: int
    alpha: float
    dropout: float
    epochs: float
    max_steps: int | None
    batch_size: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_gradient_norm: float
    seed: int
    variant: str = "LoRA"
    """Olive's pass where the base is not quantized: LoRA, DoRA, LoHa or LoKr."""

    def steps(self, rows: int) -> int:
        """Return the number of optimizer steps, counted as slmops's own trainer counts them."""
        return self.max_steps or max(1, round(-(-rows // self.batch_size) * self.epochs))


def compose(base: Path, rows_file: Path, rows: int, work: Path, recipe: Recipe, targets: list[str], *, cuda: bool) -> dict[str, Any]:
    """Return the workflow.

    Args:
        base: model folder.
        rows_file: JSONL of `input_ids` and `labels`.
        rows: how many there are; another number is an error of the run.
        work: folder of everything that Olive writes; a fresh one, as the key of its cache has no data in it.
        recipe: the settings.
        targets: names of the layers to adapt.
        cuda: train on a GPU, in bfloat16; otherwise on the CPU, in float32.

    Raises:
        InvalidInput: an unknown schedule.
    """
    dtype = "bfloat16" if cuda else "float32"
    config: dict[str, Any] = {
        "r": recipe.rank,
        "alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "torch_dtype": dtype,
        "device_map": "auto" if cuda or recipe.quantized else None,
        "allow_tf32": False,
        "train_data_config": "train",
        "training_args": training_arguments(recipe, recipe.steps(rows), work, cuda=cuda),
    }
    if recipe.variant in WITHOUT_DROPOUT:
        del config["lora_dropout"]
    if recipe.quantized:
        config |= {"double_quant": True, "quant_type": "nf4", "compute_dtype": dtype}
    else:
        config["target_modules"] = targets
    return {
        "input_model": {"type": "HfModel", "model_path": str(base), "task": "text-generation"},
        "data_configs": [
            {
                "name": "train",
                "type": "DataContainer",
                "user_script": str(USER_SCRIPT),
                "load_dataset_config": {"type": "slmops_token_rows", "params": {"path": str(rows_file), "rows": rows}},
                "pre_process_data_config": {"type": "skip_pre_process"},
            }
        ],
        "passes": {"adapter": {"type": "QLoRA" if recipe.quantized else recipe.variant, "config": config}},
        "evaluate_input_model": False,
        # no dot in the last part: Olive takes a name with a suffix for a file (engine.py:199)
        "output_dir": str(work / "output"),
        "cache_dir": str(work / "cache"),
        "log_severity_level": 1,
    }


def training_arguments(recipe: Recipe, steps: int, work: Path, *, cuda: bool) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer."""
    if recipe.schedule not in _SCHEDULES:
        raise InvalidInput(f"schedule '{recipe.schedule}' is none of {', '.join(_SCHEDULES)}", "choose one of them")
    return {
        "output_dir": str(work / "trainer"),
        "overwrite_output_dir": True,  # otherwise Olive goes on from whatever lies there
        "max_steps": steps,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": _SCHEDULES[recipe.schedule],
        "warmup_steps": recipe.warmup_steps,  # Olive's warmup_ratio is dropped without a word
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_gradient_norm,
        "optim": "adamw_torch",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "gradient_checkpointing": False,
        "use_cpu": not cuda,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would print the last good loss in place of nan
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
