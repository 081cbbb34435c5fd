"""How does `merge` report what it made, what each task lost by it, and what a quantizer would leave of it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.cli.display.built import metrics, recipe_line
from slmops.cli.display.figures import duration, estimate, number, share, size
from slmops.cli.display.layout import Page, beside, shell

_MOST_LAYERS = 8
_STYLES = {"fine to merge": "bold green", "higher precision": "bold yellow", "keep as a runtime adapter": "bold red"}


def merged(page: Page, document: Mapping[str, Any]) -> None:
    """Write size, the check of the merge, the regret table, and the next command; or the plan."""
    if document.get("plan"):
        _plan(page, document["plan"])
        page.warnings(document)
        return
    out, kind = document.get("artifact", ""), document.get("kind", "model")
    page.heading(f"{kind} written to {out}")
    page.facts(
        [
            ("adapters", _adapters(document)),
            ("strategy", document.get("strategy")),
            ("density", number(document.get("density"))),
            ("rank", number(document.get("rank"))),
            ("parameters", number(document.get("parameters") or document.get("trainable_parameters"))),
            ("precision", document.get("precision")),
            ("size", size(document.get("size_bytes"))),
            *((name, value) for name, value in metrics(document) if not name.startswith("points lost")),
            ("time", duration(document.get("seconds"))),
        ]
    )
    _regret(page, document.get("regret") or [])
    page.warnings(document)
    if out and kind == "adapter":
        page.next(f"slmops merge {shell(out)} -o {beside(out, 'merged')}", f"slmops evaluate {shell(out)} DATA")
    elif out:
        page.next(f"slmops export {shell(out)} -o {beside(out, 'int4')} --precision int4")


def _adapters(document: Mapping[str, Any]) -> str:
    parts = document.get("adapters") or []
    return ", ".join(f"{part.get('name')} x {number(part.get('weight'))} (rank {number(part.get('rank'))})" for part in parts)


def _regret(page: Page, rows: list[Mapping[str, Any]]) -> None:
    if not rows:
        return
    page.text()
    page.table(
        ("task", "metric", "before", "after", "lost", "95 % interval"),
        [_regret_row(row) for row in rows],
        right=(4,),
    )
    page.text("Before: base + that adapter alone. Lost: points of exact match, or percent that perplexity rose by.", "dim")


def _regret_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    lost = f"{number(row.get('points_lost'), 3)}{' %' if row.get('metric') == 'perplexity' else ''}"
    interval = f"{number(row.get('low'), 3)} to {number(row.get('high'), 3)}"
    figures = (estimate(row.get("before")), estimate(row.get("after")))
    return str(row.get("name", "")), str(row.get("metric", "")).replace("_", " "), *figures, lost, interval


def _plan(page: Page, plan: Mapping[str, Any]) -> None:
    """Write the advice with its reason, the figures of all layers together, and the layers that suffer most."""
    advice = str(plan.get("advice", ""))
    page.heading(advice, next((style for start, style in _STYLES.items() if advice.startswith(start)), "bold"))
    page.text(str(plan.get("reason") or ""))
    page.facts(
        [
            ("recipe", recipe_line(plan.get("recipe"))),
            ("effect done wrong, foretold", share(plan.get("predicted_loss"))),
            ("noise to signal", number(plan.get("noise_to_signal"), 3)),
            ("share in the weights", f"{number(plan.get('p'))} +- {number(plan.get('p_noise'), 2)}"),
            ("codes changed", share(plan.get("codes_changed"))),
            ("layers changed", number(len(plan.get("layers") or {}))),
        ]
    )
    layers = sorted((plan.get("layers") or {}).items(), key=lambda item: -float(item[1].get("noise_to_signal") or 0))
    page.text()
    page.table(
        ("layer", "scheme", "noise/signal", "p", "codes", "change/step"),
        [_layer(name, figures) for name, figures in layers[:_MOST_LAYERS]],
        right=(2, 3, 4, 5),
    )
    page.text("Codes: the share that the fine-tune changes. Change/step: its size over that of the rounding step.", "dim")
    if len(layers) > _MOST_LAYERS:
        page.text(f"... and {len(layers) - _MOST_LAYERS} layers that suffer less (see --json)", "dim")


def _layer(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"int{figures.get('bits')}/{figures.get('block_size')}",
        number(figures.get("noise_to_signal"), 3),
        number(figures.get("p"), 3),
        share(figures.get("codes_changed")),
        number(figures.get("delta_to_step"), 2),
    )
