"""What does an objective prepare? The rows of a run, and what it does otherwise than plain supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slmops.artifact import Draft
from slmops.config import FinetuneSettings
from slmops.data import Corpus, Interface, Row, choose_interface
from slmops.runtime.quantized_base import QuantizedBase
from slmops.training import methods
from slmops.training.effects import Measure
from slmops.training.mixture import Mixture

Figures = tuple[dict[str, Any], dict[str, Any]]
"""Metrics and facts of the manifest."""


@dataclass(frozen=True)
class Course:
    """What an objective does otherwise than sft; whatever is None stays as it is there."""

    order: Mixture | None = None
    """Which rows an epoch draws; None: all, once."""
    model: Callable[[], tuple[Any, int]] | None = None
    """Makes (the model with its adapter, parameters of the base)."""
    trainer: Callable[[Setup], Any] | None = None
    """Makes the trainer; it has `order` (its length is the number of batches of an epoch) and `best_loss`."""
    measures: tuple[Measure, ...] = ()
    """What is measured on the model before, and with the adapter after."""
    close: Callable[[Any, Path], Figures] | None = None
    """Of (the run, the adapter's folder): figures that only the finished run has."""
    facts: dict[str, Any] = field(default_factory=dict)

    def rows_per_epoch(self, train: Corpus) -> int:
        """Return how many rows an epoch has."""
        return self.order.drawn if self.order is not None else len(train.sequences) or train.rows


AS_SFT = Course()


@dataclass(frozen=True)
class Setup:
    """What a trainer is made of."""

    course: Course
    train: Corpus
    validation: Corpus
    model: Any
    arguments: Any
    """transformers' TrainingArguments."""
    keep: Callable[[Any], None]
    """Keeps the adapter of a model as the best so far."""
    int8: bool = False
    """Products with frozen matrices are in int8, where that comes close."""


@dataclass(frozen=True)
class Material:
    """What a run trains on."""

    package: QuantizedBase | None
    """Whose quantized weights are the frozen base; None: the model's own."""
    interface: Interface
    train: Corpus
    validation: Corpus
    validation_rows: list[Row]
    train_rows: list[Row] = field(default_factory=list)
    """The rows that `train` was made of, where an objective needs them again."""
    course: Course = AS_SFT


@dataclass(frozen=True)
class Task:
    """What `finetune` was asked, as an objective needs it."""

    base: Path
    data: str | Path | None
    settings: FinetuneSettings
    draft: Draft
    package: QuantizedBase | None

    def interface(self, rows: Sequence[Row], prompt_template: str | None, completion_template: str | None) -> Interface:
        """Choose the interface for rows; its warnings go into the draft."""
        given = self.settings.data
        interface, warnings = choose_interface(
            self.base,
            rows,
            prompt_template=prompt_template,
            completion_template=completion_template,
            train_on=given.train_on,
            stop_token=given.stop_token,
            max_length_tokens=given.max_length_tokens,
        )
        for warning in warnings:
            self.draft.warn(warning)
        return methods.leave_room(interface, self.base, self.settings.method)


def joined(corpora: Sequence[Corpus], drawn: Sequence[int] | None = None) -> Corpus:
    """Return several corpora as one, their sequences in order.

    Args:
        corpora: at least one.
        drawn: sequences of each that come in an epoch, for the count of tokens; None: all of them.
    """
    parts = [1.0] * len(corpora) if drawn is None else [n / len(c.sequences) for n, c in zip(drawn, corpora, strict=True)]
    return replace(
        corpora[0],
        sequences=[sequence for corpus in corpora for sequence in corpus.sequences],
        rows=sum(corpus.rows for corpus in corpora),
        tokens_total=round(sum(part * corpus.tokens_total for part, corpus in zip(parts, corpora, strict=True))),
        tokens_supervised=round(sum(part * corpus.tokens_supervised for part, corpus in zip(parts, corpora, strict=True))),
        warnings=[],
    )
