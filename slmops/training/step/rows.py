"""How do rows of unlike length lie side by side without padding, and never see each other?

The rows of a batch are joined to one sequence of N tokens, so that linear layers, norms and activations compute nothing
for padding. Only attention looks at more than one token: there, each row stands in a line of its own (rows, longest).

Tokens that all rows begin with, a system prompt or the first token alone, stand in the sequence once: with the same
tokens before them they have the same hidden states in every row, and their gradient is the sum of what the rows give.
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
        lengths: tokens of each row, those that it shares included.
        multiple: the number of joined tokens is one of this.
        shared: so many tokens are the first of every row, and stand in the sequence once, before all others; fewer than any row has.
    """

    lengths: Sequence[int]
    multiple: int = 1
    shared: int = 0
    longest: int = field(init=False)
    counts: torch.Tensor = field(init=False)
    """(rows): the lengths."""
    starts: torch.Tensor = field(init=False)
    """(rows): where each row's own tokens begin, those behind the shared ones."""
    longest_tokens: torch.Tensor = field(init=False)
    """(longest): the tokens of a row that has so many."""
    real: int = field(init=False)
    """Tokens of the rows; those they share count once."""
    tokens: int = field(init=False)
    """And with those that belong to none."""
    lines: torch.Tensor | None = field(init=False)
    """(rows x longest): the token at each place of the lines, the row's last where it has none; None where lines are the tokens."""
    places: torch.Tensor | None = field(init=False)
    """(tokens): the place of each token in the lines, the first for one of no row; None where lines are the tokens."""

    def __post_init__(self) -> None:
        lengths = torch.tensor(list(self.lengths))[:, None]
        longest, real = max(self.lengths), sum(self.lengths) - self.shared * (len(self.lengths) - 1)
        tokens = rounded_up(real, self.multiple)
        own = lengths - self.shared
        starts = own.cumsum(0) - own
        within = torch.arange(longest)[None, :]
        token = torch.minimum(within, lengths - 1) + starts * (within >= self.shared)
        lines = places = None
        if self.shared or min(self.lengths) != longest or tokens != real:
            lines, first = token.flatten(), (torch.arange(len(lengths)) == 0)[:, None]
            standing = ((within < lengths) & ((within >= self.shared) | first)).flatten().nonzero().flatten()
            places = torch.cat([standing, torch.zeros(tokens - real, dtype=torch.long)])
        which = token[list(self.lengths).index(longest)]
        own_starts = (starts + self.shared).flatten()
        values = {"longest": longest, "longest_tokens": which, "counts": lengths.flatten(), "starts": own_starts}
        values |= {"real": real, "tokens": tokens, "lines": lines, "places": places}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def positions(self) -> torch.Tensor:
        """Return the place of each token in its row (tokens), 0 for one of no row."""
        own = (torch.arange(self.shared, length) for length in self.lengths)
        return torch.cat([torch.arange(self.shared), *own, torch.zeros(self.tokens - self.real, dtype=torch.long)])

    def to_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring values (tokens, width) into lines (rows, longest, width)."""
        placed = values if self.lines is None else values.index_select(0, self.lines)
        return placed.view(len(self.lengths), self.longest, -1)

    def from_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring lines (rows, longest, width) back to the joined tokens (tokens, width)."""
        flat = values.reshape(len(self.lengths) * self.longest, -1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def gradient_to_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring gradients (tokens, width) into lines, zero where a line has no token; of shared ones, the first line has all."""
        if self.places is None:
            return values.reshape(len(self.lengths), self.longest, -1)
        lines = values.new_zeros(len(self.lengths) * self.longest, values.shape[-1])
        return lines.index_copy_(0, self.places[: self.real], values[: self.real]).view(len(self.lengths), self.longest, -1)

    def gradient_from_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Bring gradients (rows, longest, width) back to the joined tokens: summed where rows share one, zero where it is of none."""
        found = self.from_lines(values)
        if self.shared:
            found[: self.shared] += values.reshape(len(self.lengths), self.longest, -1)[1:, : self.shared].sum(0)
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
