"""How do our rows reach Olive untouched? Olive imports this file (`user_script` of a data config) before any pass runs.

It registers the component `slmops_token_rows` and makes Olive seed the adapter's initial weights: Olive makes them
before the Trainer, which alone sets the seed (olive 0.13, passes/pytorch/lora.py:375 and :451), so that two runs with
one seed would differ.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

IGNORED = -100


def token_row(ids: list[int], labels: list[int], where: str) -> dict[str, list[int]]:
    """Return a row as the Trainer takes it.

    Args:
        ids: the tokens.
        labels: the token where the loss counts it, -100 elsewhere; not shifted.
        where: the row's place, for the message.

    Raises:
        ValueError: the row would not train on what it says. (Olive lets a ValueError through, and swallows most others.)
    """
    if not ids or len(ids) != len(labels):
        raise ValueError(f"{where}: {len(ids)} tokens and {len(labels)} labels")
    if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
        raise ValueError(f"{where}: no token to learn")
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise ValueError(f"{where}: a label is neither {IGNORED} nor its token")
    # Without the mask Olive takes another attention path; without labels, it trains on the prompt too.
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def slmops_token_rows(path: str, rows: int | None = None) -> list[dict[str, list[int]]]:
    """Read a JSONL file of `input_ids` and `labels`, exactly as written.

    Args:
        path: the file.
        rows: how many there must be.

    Raises:
        ValueError: a row that cannot be trained on, no rows, or another number of them.
    """
    with Path(path).open(encoding="utf-8") as stream:
        given = [json.loads(line) for line in stream]
    if not given or (rows is not None and len(given) != rows):
        raise ValueError(f"{path}: {len(given)} rows, expected {rows or 'some'}")
    return [token_row(row["input_ids"], row["labels"], f"{path}:{number}") for number, row in enumerate(given, 1)]


def seed_adapters() -> None:
    """Make Olive seed right before it makes an adapter."""
    from olive.passes.pytorch.lora import LoRA

    original = LoRA.init_adapters
    if hasattr(original, "__wrapped__"):
        return  # this file was imported before, under another name

    @functools.wraps(original)
    def init_adapters(self: Any, model: Any, config: Any, **kwargs: Any) -> Any:
        import transformers

        transformers.set_seed(int((config.training_args.extra_args or {}).get("seed", 42)))  # 42: the Trainer's default
        return original(self, model, config, **kwargs)

    LoRA.init_adapters = init_adapters


def register() -> None:
    """Make the component known to Olive."""
    from olive.data.registry import Registry

    Registry.register_dataset("slmops_token_rows")(slmops_token_rows)


register()
seed_adapters()
