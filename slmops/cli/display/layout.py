"""What is every page of results made of? A heading, a list of facts, tables, warnings, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slmops.cli.display.figures import NONE, number

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_STYLES = {
    "pass": "green",
    "ok": "green",
    "done": "green",
    "yes": "green",
    "tested": "green",
    "fail": "bold red",
    "failed": "bold red",
    "error": "bold red",
    "inconclusive": "yellow",
    "other": "yellow",
    "warning": "yellow",
    "missing": "dim",
    "skipped": "dim",
    "no": "dim",
}
_MOST_WARNINGS = 12


@dataclass
class Page:
    """Writes the parts of a result to a console, plain where that is no terminal."""

    console: Console

    def heading(self, text: str, style: str = "bold") -> None:
        """Write a line that stands out."""
        self.console.print(text, style=style)

    def text(self, line: str = "", style: str = "") -> None:
        """Write a line, wrapped where it is too long."""
        self.console.print(line, style=style)

    def facts(self, rows: Sequence[tuple[str, Any]]) -> None:
        """Write names and values, those without a value left out."""
        from rich.table import Table

        shown = [(name, value if isinstance(value, str) else number(value)) for name, value in rows]
        shown = [(name, value) for name, value in shown if value not in ("", NONE)]
        if shown:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="cyan", no_wrap=True)
            grid.add_column(overflow="fold")
            for name, value in shown:
                grid.add_row(name, value)
            self.console.print(grid)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), status: int | None = None) -> None:
        """Write a table; `right` columns are aligned right, column `status` is coloured by what it says."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index in right else "left", overflow="fold", no_wrap=index == 0)
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) if index == status else Text(cell) for index, cell in enumerate(row)))
        self.console.print(table)

    def add(self, renderable: RenderableType) -> None:
        """Write something that rich can draw."""
        self.console.print(renderable)

    def warnings(self, document: Mapping[str, Any]) -> None:
        """Write the document's warnings, one a line."""
        warnings = document.get("warnings") or []
        for line in warnings[:_MOST_WARNINGS]:
            self.console.print(f"warning: {line}", style="yellow")
        if len(warnings) > _MOST_WARNINGS:
            self.console.print(f"... and {len(warnings) - _MOST_WARNINGS} more warnings (see --json)", style="yellow")

    def next(self, *commands: str) -> None:
        """Write what to type next, not wrapped, to be copied."""
        self.console.print()
        for index, command in enumerate(commands):
            self.console.print(f"{'next' if not index else '    '}  {command}", soft_wrap=True, style="bold")


def shell(path: Any) -> str:
    """Return a path as a shell takes it."""
    import shlex

    return shlex.quote(str(path))


def beside(path: Any, name: str) -> str:
    """Return a sibling of a path for the next command's output, quoted for a shell."""
    from pathlib import Path

    return shell(Path(str(path)).parent / name)
