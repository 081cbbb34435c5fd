"""How do `data inspect` and `data prepare` show rows: what is learned of them, how long they are, what was lost?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from slmops.cli.display.figures import duration, number, share
from slmops.cli.display.layout import Page, shell

if TYPE_CHECKING:
    from rich.text import Text

_BAR_WIDTH = 30
_MOST_CHARACTERS = 3000


def inspected(page: Page, document: Mapping[str, Any]) -> None:
    """Write format and counts, some rows token by token, the lengths, and the warnings."""
    tokens, interface = document.get("tokens") or {}, document.get("interface") or {}
    page.facts(
        [
            ("rows", f"{number(document.get('rows'))}, format {document.get('format')}"),
            ("columns", ", ".join(document.get("columns") or ())),
            ("tokens", _tokens(tokens)),
            ("validation rows", number(document.get("validation_rows"))),
            ("prompt template", _quoted(interface.get("prompt_template"))),
            ("completion template", _quoted(interface.get("completion_template"))),
            ("chat template", "the tokenizer's" if interface.get("chat_template") else ""),
            ("stop token", interface.get("stop_reason") or ""),
        ]
    )
    for example in document.get("examples") or []:
        _example(page, example)
    _lengths(page, document.get("lengths") or {})
    page.text()
    page.warnings(document)
    if not document.get("model"):
        page.text("text only: with --model FOLDER each row is shown in that model's tokens", "dim")


def prepared(page: Page, document: Mapping[str, Any]) -> None:
    """Write what was kept, how it was split, and the next command."""
    out = document.get("artifact", "")
    splits = document.get("splits") or {}
    page.heading(f"dataset written to {out}")
    page.facts(
        [
            ("rows read", f"{number(document.get('rows'))}, format {document.get('format')}"),
            *((name, f"{number(part.get('rows'))} rows") for name, part in splits.items()),
            ("without answer", number(document.get("without_answer") or None)),
            ("duplicates", number(document.get("duplicates") or None)),
            ("time", duration(document.get("seconds"))),
        ]
    )
    page.warnings(document)
    if out:
        page.next(f"slmops finetune MODEL {shell(out)} -o runs/adapter")


def _tokens(tokens: Mapping[str, Any]) -> str:
    total, supervised = tokens.get("total"), tokens.get("supervised")
    if not total:
        return ""
    return f"{number(total)}, of which {number(supervised)} are learned ({share((supervised or 0) / total)})"


def _example(page: Page, example: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    cut = f", {number(example['truncated'])} tokens cut off" if example.get("truncated") else ""
    page.text()
    page.heading(f"row {example.get('row')}{cut}")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for learned, tokens in groupby(example.get("tokens") or [], key=lambda token: bool(token.get("supervised"))):
        label = Text("learned", style="bold green") if learned else Text("given", style="dim")
        grid.add_row(label, _run(list(tokens), "bold green" if learned else ""))
    page.add(grid)


def _run(tokens: Sequence[Mapping[str, Any]], style: str) -> Text:
    """Return tokens of one label, a bar between two of them; a very long run is cut in the middle."""
    from rich.text import Text

    text = Text()
    for index, token in enumerate(tokens):
        if len(text) > _MOST_CHARACTERS:
            text.append(f" ... {len(tokens) - index} more tokens", style="dim")
            break
        if index:
            text.append("|", style="dim")
        text.append(_visible(token.get("text")), style=style)
    return text


def _lengths(page: Page, lengths: Mapping[str, Any]) -> None:
    if not lengths:
        return
    unit = lengths.get("unit", "")
    page.text()
    page.heading(f"lengths in {unit}")
    page.text(", ".join(f"{name} {number(lengths.get(name))}" for name in ("shortest", "median", "p95", "p99", "longest")))
    bins = lengths.get("histogram") or []
    most = max((count for *_, count in bins), default=0)
    block = "█" if (page.console.encoding or "").lower().startswith("utf") else "#"
    rows = [f"{number(low)} to {number(high)}" if high != low else number(low) for low, high, _ in bins]
    width = max((len(row) for row in rows), default=0)
    for row, (_, _, count) in zip(rows, bins, strict=True):
        bar = block * round(_BAR_WIDTH * count / most) if most else ""
        page.text(f"{row:>{width}} {bar or ('.' if count else '')} {number(count)}")


def _quoted(template: str | None) -> str:
    return f"'{_visible(template)}'" if template else ""


def _visible(text: Any) -> str:
    """Return text with its line ends and tabs written out."""
    return str(text or "").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
