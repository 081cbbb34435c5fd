"""How do rows of unlike length lie side by side without padding, and never see each other?

The rows of a batch are joined to one sequence of N tokens, so that linear layers, norms and activations compute nothing
for padding. Only attention looks at more than one token: there, each row stands in a line of its own (rows, longest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

KEY = "slmops_rows"
"""Name of the keyword that carries a `Rows` through a model's forward to its attention, and of that attention."""


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, joined, and tokens behind them that belong to none (`multiple`).

    Args:
        lengths: tokens of each row.
        multiple: the number of joined tokens is one of this.
    """

    lengths: Sequence[int]
    multiple: int = 1
    longest: int = field(init=False)
    longest_start: int = field(init=False)
    """First token of a row that has so many."""
    real: int = field(init=False)
    """Tokens of the rows."""
    tokens: int = field(init=False)
    """And with those that belong to none."""
    lines: torch.Tensor | None = field(init=False)
    """(rows x longest): the token at each place of the lines, the row's last where it has none; None where lines are the tokens."""
    places: torch.Tensor | None = field(init=False)
    """(tokens): the place of each token in the lines, the first for one of no row; None where lines are the tokens."""

    def __post_init__(self) -> None:
        longest, real = max(self.lengths), sum(self.lengths)
        tokens = rounded_up(real, self.multiple)
        lines = places = None
        if min(self.lengths) != longest or tokens != real:
            lengths = torch.tensor(list(self.lengths))[:, None]
            starts = lengths.cumsum(0) - lengths
            within = torch.arange(longest)[None, :]
            lines = (starts + torch.minimum(within, lengths - 1)).flatten()
            places = torch.cat([(within < lengths).flatten().nonzero().flatten(), torch.zeros(tokens - real, dtype=torch.long)])
        start = sum(self.lengths[: list(self.lengths).index(longest)])
        values = {"longest": longest, "longest_start": start, "real": real, "tokens": tokens, "lines": lines, "places": places}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def positions(self) -> torch.Tensor:
        """Return the place of each token in its row (tokens), 0 for one of no row."""
        return torch.cat([*(torch.arange(length) for length in self.lengths), torch.zeros(self.tokens - self.real, dtype=torch.long)])

    def to_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring values (tokens, width) into lines (rows, longest, width)."""
        placed = values if self.lines is None else values.index_select(0, self.lines)
        return placed.view(len(self.lengths), self.longest, -1)

    def from_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring lines (rows, longest, width) back to the joined tokens (tokens, width)."""
        flat = values.reshape(len(self.lengths) * self.longest, -1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def gradient_to_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring gradients (tokens, width) into lines, zero where a line has no token."""
        if self.places is None:
            return values.reshape(len(self.lengths), self.longest, -1)
        lines = values.new_zeros(len(self.lengths) * self.longest, values.shape[-1])
        return lines.index_copy_(0, self.places[: self.real], values[: self.real]).view(len(self.lengths), self.longest, -1)

    def gradient_from_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring gradients (rows, longest, width) back to the joined tokens, zero for one of no row."""
        found = self.from_lines(values)
        if self.real < self.tokens:
            found[self.real :] = 0
        return found

    def to(self, device: torch.device | str, **_: object) -> Rows:
        """Return the same with its tensors on a device."""
        moved = object.__new__(Rows)
        for name, value in self.__dict__.items():
            object.__setattr__(moved, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        return moved


def rounded_up(number: int, multiple: int) -> int:
    """Return the lowest multiple that is no less than a number."""
    return -(-number // multiple) * multiple
