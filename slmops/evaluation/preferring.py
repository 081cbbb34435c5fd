"""Does a model prefer the better of two answers? By its likelihood, or of a reward model by its score.

A language model prefers the answer that it holds more likely: the margin is log p(chosen | prompt) - log p(rejected |
prompt), in nats, summed over the answer's tokens and its stop token. A reward model prefers the higher score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifact, progress, results
from slmops.artifact import Artifact
from slmops.config import EvaluateSettings
from slmops.data import Interface, Pair, Row, Tokenizer, encode_pairs, preference_rows
from slmops.errors import InvalidInput
from slmops.evaluation.answering import bounded
from slmops.evaluation.asking import asked_interface
from slmops.evaluation.losses import token_losses
from slmops.results import Estimate
from slmops.runtime import reward_model
from slmops.runtime.loading import Loaded, open_model
from slmops.runtime.package import Selection
from slmops.runtime.reward_model import RewardModel

METRIC = "pairwise_accuracy"


@dataclass(frozen=True)
class Judgement:
    """What a model prefers on rows of preferences."""

    metrics: dict[str, Estimate]
    lines: list[dict[str, Any]]
    """Rows of the predictions file: the text that it prefers, and by how much."""
    warnings: tuple[str, ...]
    threads: int


def likelihood_margins(loaded: Loaded, pairs: Sequence[Pair]) -> list[float]:
    """Return log p(chosen) - log p(rejected) of each pair, in nats."""
    losses = token_losses(loaded, [sequence for pair in pairs for sequence in pair.both])
    return [losses[2 * i + 1].nats - losses[2 * i].nats for i in range(len(pairs))]


def reward_margins(model: RewardModel, pairs: Sequence[Pair]) -> list[float]:
    """Return score(chosen) - score(rejected) of each pair."""
    scores = model.scores([sequence.ids for pair in pairs for sequence in pair.both])
    return [scores[2 * i] - scores[2 * i + 1] for i in range(len(pairs))]


def preference_metrics(margins: Sequence[float]) -> dict[str, Estimate]:
    """Return `pairwise_accuracy`, the share of pairs with a margin above 0, and the mean `margin`."""
    right = sum(margin > 0 for margin in margins)
    return {METRIC: results.proportion(right, len(margins)), "margin": results.mean(margins)}


def is_asked(model: str | Path, settings: EvaluateSettings) -> bool:
    """Tell whether preferences are to be judged: by the metric, or because the model can do nothing else.

    Raises:
        InvalidInput: another metric of a reward model.
    """
    if not reward_model.is_reward(_found(model)):
        return settings.metric == METRIC
    if "metric" in settings.model_fields_set and settings.metric != METRIC:
        raise InvalidInput(f"metric {settings.metric}: {model} is a reward model, which gives no text", f"leave --metric out ({METRIC})")
    return True


def judge(model: str | Path, rows: Sequence[Row], templates: Any, settings: EvaluateSettings, selection: Selection) -> Judgement:
    """Ask a model which answer of each row it prefers.

    Raises:
        InvalidInput: the rows hold no preferences; the message says which row.
        BadArtifact: the model is incomplete or changed.
    """
    found = _found(model)
    rejected = settings.rejected_template
    if rejected is None and found is not None and settings.completion_template is None:
        rejected = (found.manifest.facts.get("preferences") or {}).get("rejected_template")
    if reward_model.is_reward(found):
        if settings.base:
            raise InvalidInput(f"base: without its adapter {model} has no score", "leave --base out")
        scored = reward_model.load_reward(Path(model), threads=settings.threads)
        return _judged(
            rows,
            scored.tokenizer,
            scored.interface,
            settings,
            templates,
            rejected,
            scored.threads,
            lambda pairs: reward_margins(scored, pairs),
        )
    loaded = open_model(model, threads=settings.threads, base_only=settings.base, adapter=selection)
    try:
        interface = bounded(loaded.interface, loaded.runner)
        return _judged(
            rows,
            loaded.tokenizer,
            interface,
            settings,
            templates,
            rejected,
            loaded.runner.threads,
            lambda pairs: likelihood_margins(loaded, pairs),
        )
    finally:
        loaded.runner.close()


def _judged(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    interface: Interface,
    settings: EvaluateSettings,
    templates: Any,
    rejected: str | None,
    threads: int,
    margins_of: Callable[[Sequence[Pair]], list[float]],
) -> Judgement:
    if rejected is None:  # the columns speak: templates that the model travels with are of answers, not of preferences
        asked = interface.model_copy(update={"prompt_template": None, "completion_template": None})
        given = preference_rows(rows)
    else:
        asked = asked_interface(interface, settings, templates)
        given = preference_rows(rows, chosen_template=asked.completion_template, rejected_template=rejected)
    pairs, warnings = encode_pairs(given, tokenizer, asked, rejected_template=rejected)
    progress.say(f"{len(pairs)} pairs, {threads} threads")
    margins = margins_of(pairs)
    lines = [_line(pair, margin, tokenizer) for pair, margin in zip(pairs, margins, strict=True)]
    return Judgement(preference_metrics(margins), lines, tuple(warnings), threads)


def _line(pair: Pair, margin: float, tokenizer: Tokenizer) -> dict[str, Any]:
    chosen, rejected = (tokenizer.decode(ids, after=pair.prompt_ids) for ids in (pair.chosen_ids, pair.rejected_ids))
    return {
        "prompt": tokenizer.decode(pair.prompt_ids, special=True),
        "expected": chosen,
        "predicted": chosen if margin > 0 else rejected,
        "correct": margin > 0,
        "margin": margin,
    }


def _found(model: str | Path) -> Artifact | None:
    return artifact.find(model) if Path(model).is_dir() else None
