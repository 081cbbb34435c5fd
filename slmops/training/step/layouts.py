"""How does a batch of rows reach the model, and how does the loss come back? Joined where the model can, padded elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from slmops.training.batches import IGNORED, collate
from slmops.training.step.head import Head, summed_cross_entropy
from slmops.training.step.lora import Focus
from slmops.training.step.rows import KEY, Rows, rounded_up

Row = tuple[Sequence[int], Sequence[int]]


class Layout(Protocol):
    """A way to bring rows to a model."""

    name: str

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Make a batch of rows (ids, labels); its `targets` hold -100 where nothing is counted."""
        ...

    def summed_loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Return the cross entropy of a batch, in nats, summed over its supervised tokens."""
        ...


class Padded:
    """Rows padded on the left, for models that must see a mask; see `slmops.training.batches`."""

    name = "padded"

    def __init__(self, model: nn.Module) -> None:
        self.keeps = keeps_logits(model)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch of `slmops.training.batches.collate`."""
        return collate(rows)

    def summed_loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Ask for the last positions' logits, where the model can leave out others."""
        targets, kept = batch["targets"], batch["logits_to_keep"]
        extra = {"logits_to_keep": kept} if self.keeps else {}
        masks = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        logits = model(input_ids=batch["input_ids"], use_cache=False, **masks, **extra).logits[:, -kept:]
        counted = targets != IGNORED
        return functional.cross_entropy(logits[counted].float(), targets[counted], reduction="sum")


class Joined:
    """Rows joined to one sequence without padding; only attention tells them apart (`slmops.training.step.rows`).

    The loss is computed inside the model's own forward, where wrappers (PEFT, DistributedDataParallel) expect the work.

    Args:
        causal: a causal language model of transformers whose attention is `slmops.training.step.attention`.
        multiple: tokens of a batch, and supervised ones, are filled up to one of this.
        focus: of the last MLP.
    """

    name = "joined"

    def __init__(self, causal: nn.Module, multiple: int = 1, focus: Focus | None = None) -> None:
        self.head = Head(causal)
        self.focus = focus or Focus()
        self.multiple = multiple
        self.shares = not _drops(causal)
        self.own_forward = causal.forward
        causal.forward = self._forward  # type: ignore[method-assign]

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Join rows.

        Returns:
            `input_ids` and `position_ids` (1, tokens); `rows`; `supervised` (positions), where the next token is counted,
            each once; `targets` (positions), that token, or -100 for a position that only fills up.
        """
        joined = Rows([len(ids) - 1 for ids, _ in rows], self.multiple, shared_beginning(rows) if self.shares else 0)
        labels = torch.tensor([IGNORED] * joined.shared + [label for _, row in rows for label in row[1 + joined.shared :]])
        labels = functional.pad(labels, (0, joined.tokens - joined.real), value=IGNORED)
        supervised, others = (labels != IGNORED).nonzero().flatten(), (labels == IGNORED).nonzero().flatten()
        filled = rounded_up(max(1, len(supervised)), self.multiple) - len(supervised)  # a process's share may count nothing
        supervised = torch.cat([supervised, others[:filled]])
        tokens = [*rows[0][0][: joined.shared], *(token for ids, _ in rows for token in ids[joined.shared : -1])]
        return {
            "input_ids": torch.tensor([*tokens, *([0] * (joined.tokens - joined.real))])[None],
            "position_ids": joined.positions()[None],
            "rows": joined,
            "supervised": supervised,
            "targets": labels[supervised],
        }

    def summed_loss(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Compute the logits of supervised positions only, a chunk at a time."""
        return model(**batch)

    def hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: Rows, supervised: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the decoder's last hidden states (tokens, width); only those of supervised positions are right, where these are given."""
        self.focus.positions = supervised  # until the next pass: activation checkpoints compute this one again on the way back
        return self.head.inner(input_ids=input_ids, position_ids=position_ids, use_cache=False, **{KEY: rows}).last_hidden_state[0]

    def _forward(self, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
        if rows is None:
            self.focus.positions = None
            return self.own_forward(*args, **kwargs)
        hidden = self.hidden(kwargs["input_ids"], kwargs["position_ids"], rows, kwargs["supervised"])
        return summed_cross_entropy(self.head, hidden.index_select(0, kwargs["supervised"]), kwargs["targets"])


def shared_beginning(rows: Sequence[Row]) -> int:
    """Return how many tokens all rows begin with, none of which predicts a supervised one; 0 for a row alone.

    Every row keeps one token of its own.
    """
    if len(rows) == 1:
        return 0
    ids: list[Any] = [ids for ids, _ in rows]
    most = max(0, min(map(len, ids)) - 2)
    # In the order of a dictionary, whatever the first and the last begin with, all between them do.
    shared = next((place for place, (a, b) in enumerate(zip(min(ids), max(ids), strict=False)) if a != b), most)
    for _, labels in rows:
        shared = min(shared, most)
        if labels[1 : shared + 1].count(IGNORED) < shared:
            shared = next(place for place in range(shared) if labels[place + 1] != IGNORED)
    return min(shared, most)


def _drops(causal: Any) -> bool:
    """Tell whether anything is dropped at random: each row then has its own, at tokens that it shares too."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in causal.modules())
    return modules or any(value for name, value in vars(causal.config).items() if name.endswith(("dropout", "pdrop", "_drop")))


def keeps_logits(model: nn.Module) -> bool:
    """Tell whether a model can compute the last positions' logits only."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return "logits_to_keep" in inspect.signature(causal.forward).parameters
