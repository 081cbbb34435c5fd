"""What does each task lose when its adapter is merged with others? Scored before and after, on the same rows.

Before is base + that adapter alone; after is the merged model; both in PyTorch, both asked with that adapter's own
templates and stop tokens. Rows with answers count by exact match, plain text by perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import results
from slmops.adapters.sources import Source
from slmops.artifact import Draft
from slmops.config import MergeSettings
from slmops.data import Interface, Row, Tokenizer, choose_interface, encode_rows, row_format_of
from slmops.errors import InvalidInput
from slmops.evaluation import answer_rows, bounded, perplexity, score, token_losses
from slmops.evaluation.evaluating import held_out_rows
from slmops.results import Estimate
from slmops.runtime import hugging_face, loading
from slmops.runtime.loading import Loaded
from slmops.runtime.torch_runner import TorchRunner


@dataclass(frozen=True)
class Task:
    """One adapter's task: its rows, and how they are asked."""

    source: Source
    rows: list[Row]
    interface: Interface
    tokenizer: Tokenizer
    metric: str
    """`exact_match`, or `perplexity` of plain text."""


@dataclass(frozen=True)
class Score:
    """What a model reached on a task: the estimate, and each row's part in it for a paired comparison."""

    estimate: Estimate
    rows: list[float]
    """1 or 0 for right or wrong; of perplexity the mean nats of the row's tokens."""
    tokens: list[int]
    """Weight of each row: 1, or its number of tokens."""


@dataclass(frozen=True)
class After:
    """The tasks with their scores before the merge, to be held against those after it."""

    tasks: Sequence[Task]
    before: Sequence[Score]

    def score(self, merged: Any, draft: Draft, settings: MergeSettings) -> None:
        """Score the merged model on every task, and write the regret table into the draft."""
        if not self.tasks:
            return
        table = []
        for task, before in zip(self.tasks, self.before, strict=True):
            after = measure(merged, task, settings)
            lost = points_lost(task.metric, before, after)
            if lost.low > _REGRETTABLE:
                draft.warn(
                    f"{task.source.name} lost {lost.value:.3g} {lost.unit} by the merge: other --weights or another --strategy may lose "
                    "less, and as a runtime adapter of its own (`slmops pack`) it loses nothing"
                )
            table.append(
                {
                    "name": task.source.name,
                    "metric": task.metric,
                    "before": before.estimate.document(),
                    "after": after.estimate.document(),
                    "points_lost": lost.value,
                    "low": lost.low,
                    "high": lost.high,
                    "rows": len(task.rows),
                }
            )
        draft.facts["regret"] = table
        draft.metrics |= {f"points_lost {row['name']}": {key: row[name] for key, name in _ESTIMATE} for row in table}


# Points, or percent of perplexity, that a task surely lost before it is worth a warning.
_REGRETTABLE = 1.0
_ESTIMATE = (("value", "points_lost"), ("low", "low"), ("high", "high"), ("n", "rows"))


def read_tasks(sources: Sequence[Source], settings: MergeSettings) -> list[Task]:
    """Read the rows of each task that is to be scored, before anything is loaded.

    Raises:
        InvalidInput: not `NAME=FILE`, a name that is no adapter's, or rows that cannot be read or asked.
    """
    by_name = {source.name: source for source in sources}
    tasks: list[Task] = []
    for item in settings.data or []:
        name, equals, file = item.partition("=")
        if not equals or name not in by_name:
            problem = f"{name} is none of the adapters" if equals else f"{item} is not NAME=FILE"
            raise InvalidInput(f"data: {problem}", f"the adapters' names are {', '.join(by_name)}: --data {next(iter(by_name))}=FILE")
        if any(task.source.name == name for task in tasks):
            raise InvalidInput(f"data: {name} is given twice", "give one file an adapter")
        tasks.append(_task(by_name[name], file, settings))
    return tasks


def score_alone(tasks: Sequence[Task], settings: MergeSettings) -> list[Score]:
    """Score each task on base + its adapter alone, on the weights that it learned on."""
    scores = []
    for task in tasks:
        model = hugging_face.load_adapted(task.source.base, task.source.folder)
        scores.append(measure(model, task, settings))
    return scores


def measure(model: Any, task: Task, settings: MergeSettings) -> Score:
    """Score a model in memory on a task.

    Raises:
        InvalidInput: rows that cannot be asked.
    """
    folder = task.source.base
    runner = TorchRunner(model, folder, settings.threads or loading.default_threads(folder))
    loaded = Loaded(runner, task.tokenizer, bounded(task.interface, runner), None, "model")
    if task.metric == "perplexity":
        losses = [loss for loss in token_losses(loaded, encode_rows(task.rows, task.tokenizer, loaded.interface)) if loss.tokens]
        return Score(perplexity(losses), [loss.nats / loss.tokens for loss in losses], [loss.tokens for loss in losses])
    answers = answer_rows(loaded, task.rows)
    return Score(score(answers, "exact_match"), [float(answer.correct) for answer in answers], [1] * len(answers))


def points_lost(metric: str, before: Score, after: Score) -> Estimate:
    """Estimate what a task lost, paired over its rows.

    Returns:
        Points of exact match (0 to 100); of perplexity, percent that it rose by.
    """
    if metric == "perplexity":
        rise = results.mean([b - a for a, b in zip(before.rows, after.rows, strict=True)], before.tokens)
        value, low, high = (100 * math.expm1(min(nats, 700.0)) for nats in (rise.value, rise.low, rise.high))
        return Estimate(value, low, high, rise.n, "%")
    lost = results.paired_difference(before.rows, after.rows)
    return Estimate(100 * lost.value, 100 * lost.low, 100 * lost.high, lost.n, "points")


def _task(source: Source, file: str, settings: MergeSettings) -> Task:
    rows, templates = held_out_rows(file, max_rows=settings.max_rows)
    folder = source.folder if (source.folder / "tokenizer.json").is_file() else source.base
    interface = source.interface or choose_interface(Path(folder), rows)[0]
    if interface.completion_template is None and templates.completion_template is not None:
        interface = interface.model_copy(update=templates._asdict())
    metric = "perplexity" if row_format_of(rows, interface) == "text" else "exact_match"
    return Task(source, rows, interface, Tokenizer.load(folder), metric)
