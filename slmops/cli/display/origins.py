"""How does `show` report what a folder holds and where it came from?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slmops.cli.display.built import recipe_line, roads
from slmops.cli.display.figures import NONE, duration, number, size
from slmops.cli.display.layout import Page

if TYPE_CHECKING:
    from rich.tree import Tree

_STATES = {"gone": "not there any more", "changed": "manifest changed since", "plain": ""}
_LONGEST = 200


def lineage(page: Page, document: Mapping[str, Any]) -> None:
    """Write the manifest's facts, settings and figures, and the tree of inputs."""
    manifest = document.get("manifest") or {}
    files = manifest.get("files") or {}
    page.heading(f"{document.get('artifact')}: {manifest.get('kind', 'folder')}")
    page.facts(
        [
            ("made by", f"slmops {manifest.get('command')} (version {manifest.get('version')})"),
            ("made on", manifest.get("created")),
            ("time", duration(manifest.get("seconds"))),
            ("files", f"{len(files)}, {size(document.get('size_bytes'))}"),
            *(
                _fact(name, value)
                for name, value in (manifest.get("facts") or {}).items()
                if name not in ("size_bytes", "slots", "fast_layers", "adapters", "roads")
            ),
            *roads((manifest.get("facts") or {}).get("roads")),
            ("adapters", _adapters((manifest.get("facts") or {}).get("adapters"))),
            *((name.replace("_", " "), _short(value)) for name, value in (manifest.get("metrics") or {}).items()),
        ]
    )
    _section(page, "text in and out", manifest.get("interface"))
    _section(page, "settings", manifest.get("config"))
    page.text()
    page.add(_tree(document))
    for warning in manifest.get("warnings") or ():
        page.text(f"warning when it was made: {warning}", "yellow")
    page.warnings(document)


def _section(page: Page, title: str, values: Mapping[str, Any] | None) -> None:
    shown = [(f"  {name}", _short(value)) for name, value in (values or {}).items() if value not in (None, "", [])]
    if shown:
        page.text()
        page.heading(title)
        page.facts(shown)


def _tree(document: Mapping[str, Any]) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    tree = Tree(Text(f"{document.get('artifact')} ({document.get('kind')})", style="bold"))
    _branches(tree, document.get("lineage") or [])
    return tree


def _branches(tree: Tree, origins: list[Mapping[str, Any]]) -> None:
    from rich.text import Text

    for origin in origins:
        made = f" ({origin['kind']}, {origin.get('command')}, {origin.get('created')})" if origin.get("kind") else ""
        state = _STATES.get(str(origin.get("state")), "")
        text = Text(f"{origin.get('role')}: {origin.get('path')}{made}")
        if state:
            text.append(f"  {state}", style="yellow")
        _branches(tree.add(text), origin.get("inputs") or [])


def _adapters(adapters: Any) -> str:
    """Return a package's adapters, or how an adapter came about, in one line."""
    if not isinstance(adapters, Mapping):
        return _fact("adapters", adapters)[1] if adapters else ""
    return ", ".join(f"{name} (rank {', '.join(map(str, details.get('ranks', [])))})" for name, details in adapters.items())


def _fact(name: str, value: Any) -> tuple[str, str]:
    if name == "recipe":
        return name, recipe_line(value)
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes").replace("_", " "), size(value)
    if name.endswith("_seconds"):
        return name.removesuffix("_seconds").replace("_", " "), duration(value)
    return name.replace("_", " "), _short(value)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) and ("\n" in value or value != value.strip()) else number(value)
    if text == NONE:
        return ""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
