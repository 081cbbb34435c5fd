"""In which order, and in which shape, do rows reach the model?

Rows of like length are put into one batch, so that little is computed on padding; batches come in random order, so
that the gradient does not drift with length. Rows are padded on the left: completions then end together, and only the
last few positions need logits (`logits_to_keep`), which on a small model with a real vocabulary is most of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

IGNORED = -100
# Rows are shuffled, cut into stretches of this many batches, and sorted by length only within a stretch.
_STRETCH = 50


@dataclass(frozen=True)
class Batches:
    """Batches of row numbers, in an order that depends on the seed and the epoch alone.

    Args:
        lengths: length of each row in tokens.
        batch_size: rows in a batch; the last one may be smaller.
        seed: of the order.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def epoch(self, number: int) -> Iterator[list[int]]:
        """Yield the batches of one epoch."""
        random = np.random.default_rng((self.seed, number))
        lengths = np.asarray(self.lengths)
        order = random.permutation(len(lengths))
        stretch = self.batch_size * _STRETCH
        batches = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            part = part[np.argsort(lengths[part], kind="stable")]
            batches += [part[at : at + self.batch_size] for at in range(0, len(part), self.batch_size)]
        for index in random.permutation(len(batches)):
            yield batches[index].tolist()


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int = 0) -> dict[str, Any]:
    """Pad rows on the left into one batch.

    Args:
        rows: (ids, labels) of each row, of equal length; label -100 is not counted. Position t predicts label t+1.
        pad_token_id: any valid id; padding is masked out.

    Returns:
        `input_ids` (batch, tokens - 1); `targets` (batch, kept), aligned with the last `kept` positions;
        `logits_to_keep`, the number of them; and, only where rows differ in length, `attention_mask` and
        `position_ids`, so that a batch without padding takes the attention's fast causal path.
    """
    import torch

    inputs = [ids[:-1] for ids, _ in rows]
    targets = [labels[1:] for _, labels in rows]
    longest = max(len(ids) for ids in inputs)
    kept = max(len(row) - _first_counted(row) for row in targets)
    input_ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    kept_targets = torch.full((len(rows), kept), IGNORED, dtype=torch.long)
    for i, (ids, row) in enumerate(zip(inputs, targets, strict=True)):
        input_ids[i, longest - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        tail = row[-kept:]
        kept_targets[i, kept - len(tail) :] = torch.tensor(tail, dtype=torch.long)
    batch: dict[str, Any] = {"input_ids": input_ids, "targets": kept_targets, "logits_to_keep": kept}
    lengths = torch.tensor([len(ids) for ids in inputs])
    if bool((lengths != longest).any()):
        batch |= _padding(lengths, longest)
    return batch


def _padding(lengths: torch.Tensor, longest: int) -> dict[str, torch.Tensor]:
    import torch

    offset = (longest - lengths)[:, None]
    position = torch.arange(longest)[None, :] - offset
    return {"attention_mask": (position >= 0).long(), "position_ids": position.clamp(min=0)}


def _first_counted(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels) - 1)
