"""Which settings do the verbs after training have? One model a verb."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import field_validator

from slmops.config.base import Settings, setting

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Metric = Literal["exact_match", "accuracy", "f1", "perplexity"]
EvaluateMetric = Literal["exact_match", "accuracy", "f1", "perplexity", "pairwise_accuracy"]
"""What `evaluate` counts; preferences have no answer that the other verbs could compare."""
Strategy = Literal[
    "cat",
    "linear",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
"""What PEFT's `add_weighted_adapter` can do (peft 0.21)."""


class InspectSettings(Settings):
    """`slmops data inspect`."""

    model: str | None = setting(None, "model folder whose tokenizer and templates are used; without it, text only")
    prompt_template: str | None = setting(None, "text of the prompt; {field} takes a column", escapes=True)
    completion_template: str | None = setting(None, "text to learn after the prompt", escapes=True)
    rows: Literal["auto", "lines", "document"] = setting("auto", "what a row of a .txt file is")
    max_length_tokens: int | None = setting(None, "longest row in tokens (default: 1024 or the model's own limit)", ge=8)
    train_on: Literal["completion", "all"] = setting("completion", "tokens that the loss counts")
    stop_token: str | None = setting(None, "token that ends an answer, as text or id")
    validation: Path | None = setting(None, "validation rows, to look for overlap with DATA")
    examples: int = setting(3, "rows to show token by token", ge=0, le=50)


class PrepareSettings(Settings):
    """`slmops data prepare`."""

    prompt_template: str | None = setting(None, "text of the prompt; {field} takes a column", escapes=True)
    completion_template: str | None = setting(None, "text to learn after the prompt", escapes=True)
    rows: Literal["auto", "lines", "document"] = setting("auto", "what a row of a .txt file is")
    validation_share: float = setting(0.05, "share set aside for validation (at least 16 rows)", ge=0, lt=1)
    keep_duplicates: bool = setting(False, "keep rows that repeat an earlier one")
    seed: int = setting(0, "seed of the split", ge=0)
    force: bool = setting(False, "replace an output folder that slmops wrote")


class MergeSettings(Settings):
    """`slmops merge`."""

    base: str | None = setting(None, "base model (default: the one the adapter was trained on)")
    strategy: Strategy = setting("cat", "how several adapters become one; cat is the exact weighted sum, whatever their ranks")
    weights: list[float] | None = setting(None, "weight of each adapter, in order, such as 0.7,0.3 (default: 1/N each, their mean)")
    density: float | None = setting(None, "share of values that ties, dare and magnitude_prune keep (default: 0.5)", gt=0, le=1)
    svd_rank: int | None = setting(None, "rank that the svd strategies keep (default: the largest of the adapters')", ge=1)
    into: Literal["base", "adapter"] = setting("base", "write a merged model, or one combined adapter")
    seed: int = setting(0, "seed of what dare drops", ge=0)
    data: list[str] | None = setting(None, "NAME=FILE: rows to score that adapter's task on, before and after the merge")
    max_rows: int | None = setting(None, "of each --data use only the first N rows", ge=1)
    threads: int | None = setting(None, "threads of the scoring (default: one for a tiny model, else all cores)", ge=1)
    plan: bool = setting(False, "write nothing; foretell what a quantizer would leave of the fine-tune")
    precision: Literal["int8", "int4"] | None = setting(None, "precision that --plan looks at (default: int4)")
    block_size: int | None = setting(None, "block size that --plan looks at (default: by the layer's width)", ge=16)
    force: bool = setting(False, "replace an output folder that slmops wrote")

    @field_validator("weights", mode="before")
    @classmethod
    def _split_weights(cls, value: Any) -> Any:
        """Take `0.7,0.3` for the two numbers."""
        if not isinstance(value, (str, list, tuple)):
            return value
        parts = [value] if isinstance(value, str) else list(value)
        return [piece for part in parts for piece in (part.split(",") if isinstance(part, str) else [part])]

    @field_validator("data", mode="before")
    @classmethod
    def _name_data(cls, value: Any) -> Any:
        """Take a mapping of names to files for the `NAME=FILE` of each."""
        return [f"{name}={file}" for name, file in value.items()] if isinstance(value, Mapping) else value


class ExportSettings(Settings):
    """`slmops export`."""

    device: Literal["cpu", "gpu", "npu"] = setting("cpu", "kind of device that the export runs on")
    provider: str | None = setting(
        None, "execution provider, such as webgpu; `slmops doctor` lists them (default: the device's usual one: cpu, cuda, qnn)"
    )
    precision: str = setting(
        "int4", "precision of the weights: fp32, fp16, bf16, int8 or int4; several, as int4,int8, go to OUT/int4 and OUT/int8"
    )
    block_size: int | None = setting(
        None, "weights that share a scale, a power of two that divides the layer (default: by the layer's width)", ge=16
    )
    max_length_tokens: int | None = setting(None, "longest prompt and answer together (default: 2048 or the model's own limit)", ge=16)
    soc: str | None = setting(None, "qnn: chip to compile for, such as 8-gen-3 or sm8650 (default: snapdragon-x-elite)")
    prefill_tokens: int | None = setting(None, "qnn: tokens of a prompt that are computed at once (default: 64)", ge=2, le=1024)
    weights_once: bool = setting(
        False, "qnn: store what both compiled graphs share once; without an NPU such a file cannot be run, and verify compiles anew"
    )
    force: bool = setting(False, "replace an output folder that slmops wrote")

    @field_validator("precision", mode="before")
    @classmethod
    def _name_precisions(cls, value: Any) -> Any:
        """Take `int4, int8` or a list for `int4,int8`; each is one that is known, and none comes twice."""
        if not isinstance(value, (str, list, tuple)):
            return value
        names = [name.strip() for name in (value.split(",") if isinstance(value, str) else map(str, value))]
        if not set(names) <= set(get_args(Precision)):
            *most, last = (repr(name) for name in get_args(Precision))
            raise ValueError(f"must be {', '.join(most)} or {last}, or several of them with commas between")
        if len(set(names)) < len(names):
            raise ValueError(f"{value!r} names one twice")
        return ",".join(names)


class VerifySettings(Settings):
    """`slmops verify`. Bars left out are those of the package's precision."""

    baseline: str | None = setting(None, "PyTorch model to hold the package against (default: the one it was exported from)")
    base: str | None = setting(None, "model before the fine-tune, for the retention stage (default: from the lineage)")
    data: list[str] | None = setting(
        None, "held-out rows, of a package's adapter as NAME=FILE (default: the validation rows of the fine-tune)"
    )
    adapter: list[str] | None = setting(None, "of a package: adapter to prove, by name (default: all, and the base)")
    self_test: bool = setting(False, "run only the self-test that the package carries: no PyTorch, no data")
    metric: Metric | None = setting(None, "task metric to compare as well")
    max_rows: int | None = setting(None, "use only the first N rows", ge=1)
    batch_size: int = setting(32, "rows computed together", ge=1)
    threads: int | None = setting(None, "threads of both sides (default: one for a tiny model, else all cores)", ge=1)
    kl_bar: float | None = setting(None, "highest mean KL divergence from PyTorch, in nats a token", gt=0)
    top1_bar: float | None = setting(None, "lowest share of tokens with the same most likely token", gt=0, le=1)
    nmse_bar: float | None = setting(None, "fp32: highest normalized mean square error of the logits", gt=0)
    difference_bar: float | None = setting(None, "fp32: highest absolute difference of a logit", gt=0)
    task_bar: float | None = setting(None, "most points (0 to 100) that the task metric may lose", ge=0)
    retention_bar: float = setting(0.05, "how far from 1 the fine-tune's share in the weights may be", gt=0, lt=1)
    twin_bar: float = setting(2e-3, "highest KL divergence from PyTorch on the package's own weights", gt=0)
    effect_bar: float = setting(0.1, "how far from 1 the ratio of the fine-tune's effects may be", gt=0, lt=1)
    out: Path | None = setting(None, "write the verification as a folder", flag="--out")
    force: bool = setting(False, "replace an output folder that slmops wrote")


class EvaluateSettings(Settings):
    """`slmops evaluate`."""

    metric: EvaluateMetric = setting("exact_match", "what is counted (of a reward model always pairwise_accuracy)")
    adapter: list[str] | None = setting(None, "adapter of a package, as NAME, or several as NAME=WEIGHT (default: the base alone)")
    base: bool = setting(False, "of an adapter folder: evaluate its base alone")
    prompt_template: str | None = setting(None, "text of the prompt (default: the one that travels with the model)", escapes=True)
    completion_template: str | None = setting(None, "expected text (default: the one that travels with the model)", escapes=True)
    rejected_template: str | None = setting(
        None, "pairwise_accuracy: the worse answer (default: as in training, or the column)", escapes=True
    )
    rows: Literal["auto", "lines", "document"] = setting("auto", "what a row of a .txt file is")
    max_rows: int | None = setting(None, "use only the first N rows", ge=1)
    max_new_tokens: int | None = setting(None, "longest answer (default: the longest expected one + 8)", ge=1)
    batch_size: int = setting(32, "rows computed together", ge=1)
    threads: int | None = setting(None, "threads (default: one for a tiny model, else all cores)", ge=1)
    predictions: Path | None = setting(None, "where the answers go, as JSONL (default: beside the model, in MODEL.evaluations)")


class BenchSettings(Settings):
    """`slmops bench`."""

    adapter: list[str] | None = setting(None, "adapter of a package, as NAME, or several as NAME=WEIGHT (default: the base alone)")
    baseline: str | None = setting(None, "what to compare with (default: the PyTorch model it was exported from); none: measure alone")
    baseline_precision: Literal["fp32", "bf16"] = setting("fp32", "arithmetic of a PyTorch baseline")
    data: str | None = setting(None, "rows for the accuracy on both sides (default: a small text that slmops brings, for KL)")
    metric: Metric | None = setting(None, "accuracy to compare on --data")
    max_rows: int | None = setting(None, "use only the first N rows of --data", ge=1)
    prompt_tokens: int = setting(128, "length of the timed prompt", ge=1)
    new_tokens: int = setting(64, "length of the timed answer", ge=2)
    rounds: int = setting(7, "alternating rounds that count, after warm-up", ge=1)
    threads: int | None = setting(None, "threads of both sides (default: one for a tiny model, else all cores)", ge=1)
    out: Path | None = setting(None, "write the figures as a folder", flag="--out")
    force: bool = setting(False, "replace an output folder that slmops wrote")


class PackSettings(Settings):
    """`slmops pack`."""

    out: Path | None = setting(None, "package to write (a package is changed in place)", flag="--out")
    adapter: list[str] | None = setting(None, "adapter to put in, as NAME=PATH")
    remove: list[str] | None = setting(None, "of a package: adapter to take out, by name")
    device: Literal["cpu", "gpu", "npu"] = setting("cpu", "kind of device that the package runs on")
    provider: str | None = setting(None, "execution provider (default: the device's usual one)")
    precision: Precision = setting("int4", "precision of the base's weights; adapters stay in float")
    block_size: int | None = setting(
        None, "weights that share a scale, a power of two that divides the layer (default: by the layer's width)", ge=16
    )
    max_length_tokens: int | None = setting(None, "longest prompt and answer together (default: 2048 or the model's own limit)", ge=16)
    force: bool = setting(False, "replace an output folder that slmops wrote, or an adapter of the same name")


class GenerateSettings(Settings):
    """`slmops generate`."""

    adapter: list[str] | None = setting(None, "adapter of a package, as NAME, or several as NAME=WEIGHT (default: the base alone)")
    max_new_tokens: int = setting(128, "longest answer", ge=1)
    temperature: float = setting(0.0, "0: the most likely token; higher: more varied", ge=0, le=5)
    top_p: float = setting(1.0, "sample from the smallest set of tokens with this probability", gt=0, le=1)
    top_k: int = setting(0, "sample from so many most likely tokens (0: all)", ge=0)
    seed: int = setting(0, "seed of sampling", ge=0)
    raw: bool = setting(False, "give PROMPT to the model as it is, without the template")
    threads: int | None = setting(None, "threads (default: one for a tiny model, else all cores)", ge=1)


class RunPipelineSettings(Settings):
    """`slmops run`."""

    only: list[str] | None = setting(None, "run only these steps (and what they need)")
    fresh: bool = setting(False, "run every step again, whatever has changed")


class RunWorkflowSettings(Settings):
    """`slmops olive run`."""

    check: bool = setting(False, "only check the workflow: every key, every pass, the target; run nothing")
    threads: int | None = setting(None, "threads of Olive's process (default: all cores)", ge=1)
    force: bool = setting(False, "replace the output folder of an earlier run")


class DemoSettings(Settings):
    """A pipeline's step `demo`."""

    seed: int = setting(0, "seed of the rows, the plain text and the base model", ge=0)
    force: bool = setting(False, "replace an output folder that slmops wrote")


class QuickstartSettings(Settings):
    """`slmops quickstart`."""

    precision: Literal["fp32", "int8", "int4"] = setting("int4", "precision of the package")
    seed: int = setting(0, "seed of the demo", ge=0)
    force: bool = setting(False, "replace an output folder that slmops wrote")
