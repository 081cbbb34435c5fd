"""Of several sources of rows: how many of each come in an epoch, and which?

Each source gives the same number of rows every epoch. It walks through its rows in a random order, and begins a new
order only when all of them have come: in any stretch of epochs no row comes twice more than another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slmops.training.batches import Batches


@dataclass(frozen=True)
class Source:
    """Rows of one origin: how many there are, and how many come in an epoch."""

    name: str
    rows: int
    drawn: int


@dataclass(frozen=True)
class Mixture:
    """Batches of row numbers that draw from several sources; what `Batches` is for one.

    Args:
        sources: the rows are numbered through them, in order.
        lengths: length of each row in tokens.
        batch_size: rows in a batch; the last one may be smaller.
        seed: of the order.
    """

    sources: tuple[Source, ...]
    lengths: Sequence[int]
    batch_size: int
    seed: int

    @property
    def drawn(self) -> int:
        """Rows of an epoch."""
        return sum(source.drawn for source in self.sources)

    def __len__(self) -> int:
        return -(-self.drawn // self.batch_size)

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Yield the batches of one epoch; rows of all sources share batches, by their length."""
        rows = self.rows_of(number)
        for batch in Batches([self.lengths[row] for row in rows], self.batch_size, self.seed).epoch(number):
            yield [rows[at] for at in batch]

    def rows_of(self, number: int) -> list[int]:
        """Return the numbers of the rows that an epoch draws."""
        found: list[int] = []
        first = 0
        for index, source in enumerate(self.sources):
            at = np.arange(number * source.drawn, (number + 1) * source.drawn)
            for round_number in range(at[0] // source.rows, at[-1] // source.rows + 1) if source.drawn else ():
                order = np.random.default_rng((self.seed, index, round_number)).permutation(source.rows)
                found += (first + order[at[at // source.rows == round_number] % source.rows]).tolist()
            first += source.rows
        return found


def shares(rows: Sequence[int], *, temperature: float = 1.0, weights: Sequence[float] | None = None) -> list[float]:
    """Return the share of each source in what is drawn.

    By weights, p_i ~ w_i. Without, p_i ~ n_i^(1/T): temperature-scaled mixing (T5: Raffel et al. 2020, arXiv 1910.10683,
    section 3.5.2; mT5: Xue et al. 2021, arXiv 2010.11934, section 3.1, whose alpha is 1/T). T = 1 is by size; as T
    grows the sources come equally often.

    Args:
        rows: n_i of each source.
        temperature: T, at least 1.
        weights: w_i of each source, in place of its size.
    """
    raw = list(weights) if weights is not None else [n ** (1 / temperature) for n in rows]
    return [value / sum(raw) for value in raw]


def apportioned(total: int, parts: Sequence[float]) -> list[int]:
    """Split `total` rows by shares that sum to 1: whole numbers, the largest remainders rounded up, none of them 0."""
    exact = [total * part for part in parts]
    counts = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return [max(1, count) for count in counts]
