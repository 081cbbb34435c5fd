"""Which rows are held out? Chosen by a seed, and never so that a question stands on both sides."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from slmops.data.formats import detect_format, question_and_answer
from slmops.data.interface import Interface
from slmops.data.rows import Row, columns_of, row_text
from slmops.errors import InvalidInput

FEWEST = 16
"""Fewer rows than this say too little about which adapter is best."""
_BLOCK = 16  # consecutive pieces of a text that stay together


def split(
    rows: Sequence[Row],
    share: float,
    seed: int,
    *,
    prompt_template: str | None = None,
    completion_template: str | None = None,
) -> tuple[list[Row], list[Row]]:
    """Set a share of the rows aside; both parts keep the order of the rows.

    Args:
        rows: all rows.
        share: share for validation, of 0 (none) to 1; at least 16 rows are taken, or half of the rows where there are
            fewer than 32.
        seed: the same seed and rows give the same split.
        prompt_template: with it, rows that ask the same by it stay together; without, rows of equal prompt or question.
        completion_template: see there.

    Returns:
        (training rows, validation rows).

    Raises:
        InvalidInput: all rows are the same, so that none can be held out.
    """
    rows = list(rows)
    if not share:
        return rows, []
    wanted = min(max(round(share * len(rows)), FEWEST), len(rows) // 2)
    if not wanted:
        return rows, []
    key = _key(rows, prompt_template, completion_template)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    order = list(groups)
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for name in order:
        if len(chosen) >= wanted:
            break
        if len(chosen) + len(groups[name]) <= max(wanted, len(rows) // 2):
            chosen.update(groups[name])
    if not chosen:
        raise InvalidInput(f"all {len(rows)} rows are the same: none can be held out", "give different rows, or --validation-share 0")
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def overlap(
    train: Sequence[Row], validation: Sequence[Row], *, prompt_template: str | None = None, completion_template: str | None = None
) -> int:
    """Count the validation rows whose question stands in the training rows too."""
    if not train or not validation:
        return 0
    key = _key([*train, *validation], prompt_template, completion_template, blocks=False)
    known = {key(row) for row in train}
    return sum(key(row) in known for row in validation)


def _key(rows: list[Row], prompt_template: str | None, completion_template: str | None, *, blocks: bool = True) -> Callable[[Row], str]:
    """Return what tells rows apart: what they ask, or the whole row where its format is not known."""
    interface = Interface(prompt_template=prompt_template, completion_template=completion_template)
    try:
        row_format = detect_format(columns_of(rows), prompt_template=prompt_template, completion_template=completion_template)
    except InvalidInput:
        if completion_template is not None:
            raise
        return row_text
    block = max(1, min(_BLOCK, len(rows) // 64))

    def key(row: Row) -> str:
        if blocks and row_format == "text" and "pieces" in row:
            return f"{row['document']}/{(row['piece'] - 1) // block}"
        return question_and_answer(row, row_format, interface)[0]

    return key
