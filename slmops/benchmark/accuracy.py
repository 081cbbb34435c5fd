"""Does the faster model still answer as the other one does? The same rows, as the same ids, on both sides.

With rows and a metric: the metric of each side and their paired difference. Without: a small neutral text, on which KL
divergence, agreement of the most likely token, and perplexity need no answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from slmops import progress, results
from slmops.benchmark.sides import Side
from slmops.data import Encoded, Interface, Row, Tokenizer, encode_rows
from slmops.evaluation import Answer, Question, RowLoss, answers_of, longest_answer_tokens, perplexity, questions_of, score
from slmops.evaluation.neutral import text_pieces
from slmops.results import Estimate


@dataclass
class Accuracy:
    """Metrics of each side, in the order of the sides, and candidate minus baseline."""

    metrics: list[dict[str, Estimate]]
    difference: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Rows to measure on, as ids."""

    metric: str
    questions: list[Question]
    sequences: list[Encoded]
    interface: Interface
    tokenizer: Tokenizer
    warnings: tuple[str, ...] = ()

    @property
    def ids(self) -> list[list[int]]:
        """The ids of every prompt, or of every sequence where nothing is asked."""
        return [question.prompt_ids for question in self.questions] or [sequence.ids for sequence in self.sequences]


def task_of(rows: Sequence[Row], metric: str, tokenizer: Tokenizer, interface: Interface) -> Task:
    """Turn rows into a task.

    Raises:
        InvalidInput: a row lacks a field, or plain text is to be answered.
    """
    if metric == "perplexity":
        corpus = encode_rows(rows, tokenizer, interface)
        return Task(metric, [], corpus.sequences, interface, tokenizer, tuple(corpus.warnings))
    questions = questions_of(rows, tokenizer, interface)
    cut = sum(question.truncated > 0 for question in questions)
    warnings = (f"{cut} of {len(rows)} rows are longer than {interface.max_length_tokens} tokens and were cut",) if cut else ()
    return Task(metric, questions, [], interface, tokenizer, warnings)


def measure_task(sides: Sequence[Side], task: Task) -> Accuracy:
    """Measure a task on every side, the candidate first."""
    if task.metric == "perplexity":
        return _compare_losses([_losses(side, task.sequences) for side in sides])
    answers = [_answers(side, task) for side in sides]
    found = Accuracy([{task.metric: score(some, task.metric)} for some in answers])
    if len(answers) == 2:
        found.difference[task.metric] = difference(answers[0], answers[1], task.metric)
    return found


def measure_text(sides: Sequence[Side], tokenizer: Tokenizer, interface: Interface) -> Accuracy:
    """Measure the neutral text: perplexity of each side and, of a candidate beside a baseline, KL and top-1 agreement."""
    pieces = text_pieces(tokenizer, interface)
    if len(sides) == 1:
        sequences = [Encoded(ids, [-100, *ids[1:]], 0) for ids in pieces]
        return Accuracy([{"perplexity": perplexity(_losses(sides[0], sequences))}])
    candidate, baseline = sides
    losses: list[list[RowLoss]] = [[], []]
    kl, same, positions = [], 0, []
    with TemporaryDirectory(prefix="slmops-bench-") as folder, progress.task("compare", total=len(pieces), unit="pieces") as shown:
        file = str(Path(folder) / "logits.npy")  # one piece at a time: bounded whatever the vocabulary
        for ids in pieces:
            losses[1].append(RowLoss(baseline.ask("write_logits", ids=ids, file=file), len(ids) - 1))
            compared = candidate.ask("compare_logits", ids=ids, file=file)
            losses[0].append(RowLoss(compared["nats"], len(ids) - 1))
            kl.append(sum(compared["divergences"]) / len(ids))
            same += compared["same_top"]
            positions.append(len(ids))
            shown.advance()
    found = _compare_losses(losses)
    found.metrics[0]["kl_nats"] = replace(results.mean(kl, positions), unit="nats")
    found.metrics[0]["top1_agreement"] = results.proportion(same, sum(positions))
    return found


def difference(candidate: Sequence[Answer], baseline: Sequence[Answer], metric: str) -> Estimate:
    """Return candidate minus baseline over the same rows; of F1, of the share that is right, which is what is paired."""
    found = results.paired_difference([answer.correct for answer in candidate], [answer.correct for answer in baseline])
    if metric != "f1":
        return found
    gap = score(candidate, metric).value - score(baseline, metric).value
    return Estimate(gap, gap + found.low - found.value, gap + found.high - found.value, found.n)


def _answers(side: Side, task: Task) -> list[Answer]:
    order = sorted(range(len(task.questions)), key=lambda i: len(task.questions[i].prompt_ids))
    with progress.task(f"answer ({side.model.role})", total=len(order), unit="rows") as shown:
        generated: list[Any] = side.ask(
            "generate",
            shown.advance,
            prompts=[task.questions[i].prompt_ids for i in order],
            max_new_tokens=longest_answer_tokens(task.questions),
            stop_token_ids=list(task.interface.stop_token_ids),
        )
    place = {i: at for at, i in enumerate(order)}
    return answers_of(task.questions, [generated[place[i]] for i in range(len(order))], task.tokenizer)


def _losses(side: Side, sequences: Sequence[Encoded]) -> list[RowLoss]:
    with progress.task(f"perplexity ({side.model.role})"):
        found = side.ask("losses", sequences=[{"ids": sequence.ids, "labels": sequence.labels} for sequence in sequences])
    return [RowLoss(**loss) for loss in found]


def _compare_losses(losses: Sequence[Sequence[RowLoss]]) -> Accuracy:
    found = Accuracy([{"perplexity": perplexity(one)} for one in losses])
    if len(losses) == 2:
        gaps = [(ours.nats - theirs.nats) / ours.tokens for ours, theirs in zip(*losses, strict=True)]
        gap = results.mean(gaps, [loss.tokens for loss in losses[0]])
        level = math.exp(min(700.0, math.log(found.metrics[1]["perplexity"].value)))
        # Of perplexities, in their own unit: the baseline's, times what the candidate's nats a token add to it.
        low, value, high = (level * math.expm1(min(700.0, x)) for x in (gap.low, gap.value, gap.high))
        found.difference["perplexity"] = Estimate(value, low, high, gap.n)
    return found
