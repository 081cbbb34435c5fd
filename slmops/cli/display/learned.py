"""How does `finetune` report what its objective brought: the tasks, what changed on held-out rows, what was unlearned?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.cli.display.figures import estimate, number
from slmops.cli.display.layout import Page


def learned(page: Page, document: Mapping[str, Any]) -> None:
    """Write a table of the tasks, and one of what was measured before and after, where there are any."""
    _tasks(page, document)
    changed = [(_measured(name, effect), effect) for name, effect in (document.get("effects") or {}).items()]
    old = document.get("forgetting")
    if old:
        changed.append((f"{old.get('data')} ({old.get('metric')}, old data)", old))
    if changed:
        page.text()
        rows = [(name, number(effect["before"]["value"]), number(effect["after"]["value"]), _change(effect)) for name, effect in changed]
        page.table(("before and after", "base", "fine-tuned", "change"), rows, right=(1, 2))


def objective(document: Mapping[str, Any]) -> str:
    """Return the objective in words, with what it was made of; nothing for plain sft."""
    name, loss, blocks = document.get("objective", "sft"), document.get("loss"), document.get("blocks")
    if loss:
        return f"{name}, loss {loss.get('class')} of {loss.get('file')}"
    if blocks:
        return f"{name}, {number(blocks.get('count'))} blocks of {number(blocks.get('tokens'))} tokens"
    return "" if name == "sft" else str(name)


def replayed(document: Mapping[str, Any]) -> str:
    """Return what was mixed in, in one line."""
    old = document.get("replay")
    if not old:
        return ""
    tokens = f", {old['share_of_supervised_tokens']:.0%} of what the loss counts"
    return f"{number(old['rows_per_epoch'])} rows of {old['data']} an epoch, {old['share']:.0%} of the rows{tokens}"


def _tasks(page: Page, document: Mapping[str, Any]) -> None:
    metrics = document.get("metrics") or {}
    rows = [
        (
            name,
            number(task.get("rows")),
            number(task.get("rows_per_epoch")),
            f"{task.get('share', 0):.0%}",
            number((metrics.get(f"validation_loss_{name}") or {}).get("value")),
        )
        for name, task in (document.get("tasks") or {}).items()
    ]
    if rows:
        page.text()
        page.table(("task", "rows", "drawn an epoch", "share", "validation loss"), rows, right=(1, 2, 3, 4))


def _measured(name: str, effect: Mapping[str, Any]) -> str:
    metric = str(effect.get("metric", ""))
    return (metric if metric == name else f"{name} {metric}").replace("_", " ")


def _change(effect: Mapping[str, Any]) -> str:
    change = effect["change"]
    if effect.get("metric") != "perplexity":
        return estimate(change)
    return f"{change['value']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]"
