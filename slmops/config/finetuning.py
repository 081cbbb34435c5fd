"""Which settings does `slmops finetune` have? Six groups: data, objective, forgetting, method, optimizer, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from slmops.config.base import Settings, setting


class DataSettings(Settings):
    """Which rows are trained on, and how they become tokens."""

    prompt_template: str | None = setting(None, "text of the prompt; {field} takes a column, {{ and }} are braces", escapes=True)
    completion_template: str | None = setting(None, "text to learn after the prompt", escapes=True)
    rows: Literal["auto", "lines", "document"] = setting("auto", "what a row of a .txt file is: the whole document, or each line")
    validation: Path | None = setting(None, "file of validation rows; without it a share of DATA is set aside")
    validation_share: float = setting(0.05, "share of DATA set aside to choose the best adapter by (at least 16 rows)", ge=0, lt=1)
    max_rows: int | None = setting(None, "use only the first N rows", ge=1)
    max_length_tokens: int | None = setting(
        None, "longest row in tokens, longer ones are cut (default: 1024 or the model's own limit)", ge=8
    )
    train_on: Literal["completion", "all"] = setting("completion", "tokens that the loss counts: the completion, or prompt and completion")
    stop_token: str | None = setting(None, "token that ends an answer, as text or id (default: checked and chosen)")


MethodName = Literal[
    "full",
    "lora",
    "qlora",
    "dora",
    "rslora",
    "adalora",
    "loha",
    "lokr",
    "ia3",
    "prefix",
    "prompt",
    "p-tuning",
    "bottleneck",
    "bitfit",
    "loreft",
]
_TASK_KEYS = ("data", "prompt_template", "completion_template", "weight", "validation")


class ObjectiveSettings(Settings):
    """What the loss asks for, and of which rows."""

    objective: Literal["sft", "pretrain", "multitask", "dpo", "reward"] = setting(
        "sft",
        "sft: answers; pretrain: plain text in full-length blocks; multitask: several tasks at once; dpo: one answer above another; "
        "reward: a model that scores answers",
    )
    task: list[str] | None = setting(None, "multitask: NAME=FILE of a task; in YAML also a mapping NAME to file, templates, weight")
    task_prompt_template: list[str] | None = setting(None, "NAME=TEXT of a task (default: --prompt-template)", escapes=True)
    task_completion_template: list[str] | None = setting(None, "NAME=TEXT of a task (default: --completion-template)", escapes=True)
    task_weight: list[str] | None = setting(None, "NAME=X: share of a task in the rows drawn, beside the others' (default: by its rows)")
    task_validation: list[str] | None = setting(None, "NAME=FILE: validation rows of a task; without it a share of its rows")
    task_temperature: float | None = setting(None, "draw tasks by rows^(1/T): 1 by their rows, higher more evenly (default: 1)", ge=1)
    chosen_template: str | None = setting(None, "dpo and reward: the better answer (default: the column chosen)", escapes=True)
    rejected_template: str | None = setting(None, "dpo and reward: the worse answer (default: the column rejected)", escapes=True)
    dpo_beta: float = setting(0.1, "dpo: how dear it is to leave the base; higher stays nearer", gt=0)
    loss: str | None = setting(None, "FILE.py:CLASS: a loss of your own for sft rows; the file is run")
    loss_args: list[str] | None = setting(None, "NAME=VALUE for the constructor of --loss, the value as in YAML")

    @model_validator(mode="before")
    @classmethod
    def _open_tasks(cls, values: Any) -> Any:
        """Take a mapping NAME -> {data, templates, weight, validation} apart into what the flags say."""
        if not isinstance(values, Mapping) or not isinstance(values.get("task"), Mapping):
            return values
        opened: dict[str, Any] = {"task": []}
        for name, given in values["task"].items():
            details = given if isinstance(given, Mapping) else {"data": given}
            unknown = [key for key in details if key not in _TASK_KEYS]
            if unknown or "data" not in details:
                problem = f"{unknown[0]}: unknown" if unknown else "data: missing"
                raise ValueError(f"task {name}: {problem} (a task has {', '.join(_TASK_KEYS)})")
            for key, value in details.items():
                opened.setdefault("task" if key == "data" else f"task_{key}", []).append(f"{name}={value}")
        return {**values, **opened}

    @field_validator("task_prompt_template", "task_completion_template", "task_weight", "task_validation", "loss_args", mode="before")
    @classmethod
    def _name_values(cls, value: Any) -> Any:
        """Take a mapping of names to values for the `NAME=VALUE` of each."""
        return [f"{name}={item}" for name, item in value.items()] if isinstance(value, Mapping) else value


class ForgettingSettings(Settings):
    """What the model could before, and whether it still can."""

    retain: Path | None = setting(None, "old text or rows: measured before and after, with a warning past --retain-bar")
    retain_metric: Literal["perplexity", "exact_match", "accuracy", "f1"] = setting("perplexity", "what is measured on --retain")
    retain_bar: float = setting(0.1, "highest relative rise of perplexity (or fall of the metric) without a warning", ge=0)
    retain_prompt_template: str | None = setting(
        None, "prompt of the --retain rows (default: their own format, or --prompt-template)", escapes=True
    )
    retain_completion_template: str | None = setting(None, "answer of the --retain rows", escapes=True)
    replay: Path | None = setting(None, "old text or rows that are mixed into training")
    replay_share: float = setting(0.1, "share of --replay in the rows of an epoch", gt=0, lt=1)


class MethodSettings(Settings):
    """What is trained."""

    method: MethodName = setting("lora", "what is trained, on a frozen base (full: the whole model); docs/methods.md says which to take")
    engine: Literal["peft", "olive"] = setting("peft", "who trains: slmops's own trainer with PEFT, or Olive's pass")
    lora_rank: int = setting(16, "rank of the adapter (adalora: mean rank that is left at the end)", ge=1, le=1024)
    lora_alpha: float | None = setting(
        None, "scale of the adapter: alpha / rank (default: 2 x rank); rslora: alpha / sqrt(rank) (default: 8)", gt=0
    )
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", ge=0, lt=1)
    quantized_base: Path | None = setting(
        None, "export or package of MODEL whose quantized weights are the frozen base: the adapter learns around their error"
    )
    target_modules: list[str] | None = setting(None, "linear layers to adapt, by name (default: all of them)")
    virtual_tokens: int = setting(20, "learned positions before each row: prefix, prompt and p-tuning", ge=1, le=1024)
    encoder_size: int | None = setting(
        None, "width of the small network that makes them: prefix and p-tuning (default: the model's own width)", ge=1
    )
    bottleneck_size: int = setting(64, "width that a bottleneck layer narrows to", ge=1)
    reft_rank: int = setting(4, "dimensions of the hidden representation that loreft edits", ge=1)
    reft_positions: int | None = setting(None, "loreft edits the first N tokens of a row (default: every token)", ge=1)


class OptimizerSettings(Settings):
    """How the weights move."""

    epochs: float = setting(1.0, "passes over the rows", gt=0)
    max_steps: int | None = setting(None, "stop after so many optimizer steps, whatever the epochs", ge=1)
    batch_size: int = setting(8, "rows in a batch", ge=1)
    gradient_accumulation: int = setting(1, "batches in an optimizer step", ge=1)
    learning_rate: float | None = setting(None, "peak learning rate (default: by the model's size)", gt=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "how the learning rate falls after warm-up")
    warmup_share: float = setting(0.03, "share of the steps in which the learning rate rises", ge=0, lt=1)
    weight_decay: float = setting(0.0, "decoupled weight decay (AdamW)", ge=0)
    max_gradient_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)


class RunSettings(Settings):
    """How the run behaves."""

    precision: Literal["auto", "fp32", "bf16", "int8"] = setting(
        "auto",
        "arithmetic of the frozen base (auto: bf16 where the processor or GPU multiplies it, but fp32 for --quantized-base; "
        "int8: sooner on processors with VNNI, layer by layer where a trial on the first rows comes close)",
    )
    activation_checkpoints: Literal["auto", "on", "off"] = setting(
        "auto", "compute activations twice in place of holding them: a third more time for less memory (auto: where it fits only so)"
    )
    threads: int | None = setting(None, "threads (default: one for a tiny model, else all cores)", ge=1)
    seed: int = setting(0, "seed of everything random: two runs on one machine give the same adapter", ge=0)
    evaluations: int = setting(4, "how often in the run validation is measured and the best adapter kept", ge=1)
    patience: int | None = setting(
        None, "end the run after so many evaluations in a row without a lower validation loss (default: never)", ge=1
    )
    checkpoints: int | None = setting(
        None,
        "how often in the run all that --resume needs is written (default: as often as validation is measured, at least 30 s apart)",
        ge=0,
    )
    checkpoint_steps: int | None = setting(None, "write it every so many optimizer steps instead", ge=1)
    resume: bool = setting(False, "go on from the last checkpoint of a run that was stopped")
    report_to: list[Literal["tensorboard", "mlflow", "wandb"]] | None = setting(
        None, "send the figures of the run to tensorboard, mlflow or wandb too (on this machine: wandb stays offline)"
    )
    processes: int = setting(1, "processes that share every batch, on this machine: what is learned stays the same", ge=1, le=64)
    force: bool = setting(False, "replace an output folder that slmops wrote")


class FinetuneSettings(Settings):
    """All settings of `slmops finetune`."""

    data: DataSettings
    objective: ObjectiveSettings
    forgetting: ForgettingSettings
    method: MethodSettings
    optimizer: OptimizerSettings
    run: RunSettings
