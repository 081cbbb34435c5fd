"""What did a fine-tune change? The same measure on the model before and with the adapter after, row by row.

Both run in PyTorch on the weights that the adapter learned on (nf4 and `--quantized-base` too). The change is paired:
its interval is that of the rows' own changes, far narrower than the two intervals beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import progress, results
from slmops.config import FinetuneSettings
from slmops.data import Encoded, Interface, Tokenizer
from slmops.evaluation import perplexity, token_losses
from slmops.results import Estimate
from slmops.runtime import hugging_face, loading, quantized_base
from slmops.runtime.loading import Loaded
from slmops.runtime.quantized_base import QuantizedBase
from slmops.runtime.torch_runner import TorchRunner


@dataclass(frozen=True)
class Score:
    """A metric, and each row's part in it for a paired comparison."""

    estimate: Estimate
    rows: list[float]
    """1 or 0 for right or wrong; nats (a token, for perplexity)."""
    weights: list[int]
    """1, or the row's number of tokens."""
    metric: str


Measure = Callable[[Loaded], dict[str, Score]]
"""Scores a loaded model, by the name of what is measured."""


@dataclass(frozen=True)
class Effect:
    """One measure before and after."""

    before: Score
    after: Score

    @property
    def change(self) -> Estimate:
        """After against before: the relative change of a perplexity, the difference of anything else."""
        differences = [b - a for a, b in zip(self.before.rows, self.after.rows, strict=True)]
        nats = results.mean(differences, weights=self.before.weights)
        if self.before.metric != "perplexity":
            return nats
        value, low, high = (math.expm1(min(x, 700.0)) for x in (nats.value, nats.low, nats.high))
        return Estimate(value, low, high, nats.n)

    def document(self) -> dict[str, Any]:
        """Return the JSON form: metric, before, after, change."""
        estimates = {"before": self.before.estimate, "after": self.after.estimate, "change": self.change}
        return {"metric": self.before.metric, **{name: estimate.document() for name, estimate in estimates.items()}}


def measure(
    base: Path, folder: Path, settings: FinetuneSettings, interface: Interface, package: QuantizedBase | None, measures: Sequence[Measure]
) -> dict[str, Effect]:
    """Run every measure on the base, then on base and adapter.

    Args:
        base: folder of the model.
        folder: the adapter just written; it has no manifest yet.
        settings: of the run.
        interface: of the adapter.
        package: whose quantized weights are the base; None: the model's own.
        measures: see `Measure`.
    """
    threads = settings.run.threads or loading.default_threads(base)
    tokenizer = Tokenizer.load(base)
    if package is not None:
        model: Any = quantized_base.load_dequantized(base, package)
    elif settings.method.method == "qlora":
        model = hugging_face.load_base_of(base, folder, nf4=True)
    else:
        model = hugging_face.load_model(base)
    found: list[dict[str, Score]] = []
    for name, adapted in (("before", False), ("after", True)):
        progress.say(f"measured {name} the fine-tune")
        model = _after(model, folder, base) if adapted else model
        loaded = Loaded(TorchRunner(model, folder if adapted else base, threads), tokenizer, interface, None, "model")
        found.append({key: score for one in measures for key, score in one(loaded).items()})
    return {name: Effect(before, found[1][name]) for name, before in found[0].items()}


def _after(model: Any, folder: Path, base: Path) -> Any:
    """Put what was trained on the base; a model that was trained as a whole takes its place."""
    if (folder / "adapter_config.json").is_file():
        return hugging_face.attach(model, folder, base)
    return hugging_face.load_model(folder)


def perplexity_of(loaded: Loaded, sequences: Sequence[Encoded]) -> Score:
    """Score a model by its perplexity on sequences."""
    losses = token_losses(loaded, sequences)
    counted = [loss for loss in losses if loss.tokens]
    nats = [loss.nats / loss.tokens for loss in counted]
    return Score(perplexity(losses), nats, [loss.tokens for loss in counted], "perplexity")
