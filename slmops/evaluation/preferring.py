"""Does a model prefer the better of two answers? By its likelihood, or of a reward model by its score.

A language model prefers the answer that it holds more likely: the margin is log p(chosen | prompt) - log p(rejected |
prompt), in nats, summed over the answer's tokens and its stop token. A reward model prefers the higher score.
"""

from __future__ import annotations

from collections.abc import Sequence

from slmops import results
from slmops.data import Pair
from slmops.evaluation.losses import token_losses
from slmops.results import Estimate
from slmops.runtime.loading import Loaded
from slmops.runtime.reward_model import RewardModel


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
    return {"pairwise_accuracy": results.proportion(right, len(margins)), "margin": results.mean(margins)}
