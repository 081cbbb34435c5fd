r"""How does a row become text by a template? `{field}` takes a column, `{{` and `}}` are braces.

A value that is not text is written as compact JSON in its own key order, so that a template can ask for structured
answers: `'{text}\nSlots: '` -> `'{slots}'`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from slmops.errors import InvalidInput

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template."""

    source: str
    parts: tuple[tuple[str, bool], ...]
    """(literal text, False) or (name of a column, True), in order."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that it takes, each once, in order."""
        return tuple(dict.fromkeys(text for text, is_field in self.parts if is_field))

    def render(self, row: Mapping[str, Any]) -> str:
        """Fill in a row's values.

        Raises:
            InvalidInput: the row lacks a column.
        """
        return "".join(self._value(name, row) if is_field else name for name, is_field in self.parts)

    def check(self, columns: Iterable[str]) -> None:
        """Raise InvalidInput, naming the field and the columns there are, unless `columns` has every field."""
        columns = list(columns)
        for name in self.fields:
            if name not in columns:
                near = get_close_matches(name, columns, n=1)
                hint = f"did you mean {{{near[0]}}}?" if near else "name one of the columns; a brace as such is written {{ or }}"
                raise InvalidInput(
                    f"template {self.source!r} names the field '{name}', and the columns are: {', '.join(columns) or 'none'}", hint
                )

    def _value(self, name: str, row: Mapping[str, Any]) -> str:
        if name not in row:
            self.check(row)
        return value_text(row[name])


def render(template: str, row: Mapping[str, Any]) -> str:
    """Render a template with a row; see `Template`."""
    return parse(template).render(row)


@lru_cache(maxsize=256)
def parse(source: str) -> Template:
    """Parse a template.

    Raises:
        InvalidInput: a single brace, or a field without a name.
    """
    parts: list[tuple[str, bool]] = []
    end = 0
    for match in _PART.finditer(source):
        parts.append((source[end : match.start()], False))
        end = match.end()
        if match.group() in ("{{", "}}"):
            parts.append((match.group()[0], False))
        elif match.group(1):
            parts.append((match.group(1).strip(), True))
        else:
            raise InvalidInput(
                f"template {source!r} has a stray '{match.group()}' at character {match.start() + 1}",
                "a column is written {name}, a brace as such {{ or }}",
            )
    parts.append((source[end:], False))
    return Template(source, tuple(part for part in parts if part[0]))


def value_text(value: Any) -> str:
    """Return a value as the text that a template shows: text as it is, nothing for None, anything else as compact JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def is_empty(value: Any) -> bool:
    """Tell whether a field says nothing: None, or text of only blanks, or an empty list or mapping."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, (list, dict)) and not value)
