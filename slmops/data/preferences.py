"""Which of two answers is the better one? Rows of preferences, and the token ids of both answers after one prompt.

Each answer is encoded exactly as a completion is in fine-tuning: the same templates, the same BOS, the same stop token
behind it. A row gives `prompt`, `chosen` and `rejected` (text, or lists of messages); or two whole chats, `chosen` and
`rejected`, that begin alike; or any columns, with a template for each of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slmops.data.corpus import row_format_of
from slmops.data.encoding import NOT_COUNTED, Encoded, draft_row, encode_drafts
from slmops.data.formats import RowFormat
from slmops.data.interface import Interface
from slmops.data.rows import Row, columns_of
from slmops.data.templates import is_empty, parse, value_text
from slmops.data.tokenizer import Tokenizer
from slmops.errors import InvalidInput

_COLUMNS_HINT = (
    "give the columns prompt, chosen and rejected, or whole chats as chosen and rejected, or "
    "--prompt-template, --chosen-template and --rejected-template"
)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as token ids; the stop token stands behind each answer."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    truncated: int = 0
    """Tokens that the longest sequence cost the pair."""
    row: int = 0

    @property
    def both(self) -> tuple[Encoded, Encoded]:
        """Chosen and rejected as sequences of which the answer counts."""
        n = len(self.prompt_ids)
        chosen, rejected = (
            Encoded(self.prompt_ids + answer, [NOT_COUNTED] * n + answer, n) for answer in (self.chosen_ids, self.rejected_ids)
        )
        return chosen, rejected


def preference_rows(rows: Sequence[Row], *, chosen_template: str | None = None, rejected_template: str | None = None) -> list[Row]:
    """Bring preferences into rows whose better answer is an ordinary completion, the worse one being beside it.

    Returns:
        With templates the rows as they are; else rows `prompt`, `completion`, `rejected`, or of chats `messages`, `rejected`.

    Raises:
        InvalidInput: a template or a column is missing, or a row's value is of the wrong kind; the message says which row.
    """
    rows = list(rows)
    if chosen_template is not None or rejected_template is not None:
        if chosen_template is None or rejected_template is None:
            lacking = "chosen" if chosen_template is None else "rejected"
            raise InvalidInput(f"--{lacking}-template is missing", "give both: the better answer, and the worse one")
        parse(rejected_template).check(columns_of(rows))
        return rows
    columns = columns_of(rows)
    answer = "completion" if "completion" in columns else "messages" if "messages" in columns else "chosen"
    if "rejected" not in columns or answer not in columns:
        raise InvalidInput(f"the rows hold no preferences; their columns are {', '.join(columns) or 'none'}", _COLUMNS_HINT)
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(row if answer != "chosen" else _canonical(row))
        except InvalidInput as error:
            raise InvalidInput(f"row {number}: {error.message}", error.hint) from None
    return found


def encode_pairs(
    rows: Sequence[Row], tokenizer: Tokenizer, interface: Interface, *, rejected_template: str | None = None
) -> tuple[list[Pair], list[str]]:
    """Turn the rows of `preference_rows` into token ids.

    A pair that is too long loses the beginning of its prompt; then both answers follow the same, shorter prompt.

    Returns:
        (pairs, warnings): pairs whose two answers are the same tokens say nothing and are left out.

    Raises:
        InvalidInput: a row lacks a field, has no prompt, or no pair is left; the message says which row.
    """
    rows = list(rows)
    row_format = row_format_of(rows, interface)
    worse = interface.model_copy(update={"completion_template": rejected_template}) if rejected_template is not None else interface
    drafts = []
    for number, row in enumerate(rows, 1):
        try:
            better = draft_row(row, tokenizer, interface, row_format)[-1]
            drafts += [better, draft_row(_with_rejected(row, row_format), tokenizer, worse, row_format)[-1]]
            if len(better.segments) < 2:
                raise InvalidInput("it has no prompt: preferences are between answers to one", _COLUMNS_HINT)
        except InvalidInput as error:
            raise InvalidInput(f"row {number}: {error.message}", error.hint) from None
    encoded = encode_drafts(drafts, tokenizer, interface)
    pairs = [_pair(encoded[2 * i], encoded[2 * i + 1], i) for i in range(len(rows))]
    return _kept(pairs, interface)


def _canonical(row: Row) -> Row:
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    rest = {key: value for key, value in row.items() if key not in ("prompt", "chosen")}
    if not isinstance(chosen, list):
        if is_empty(prompt):
            raise InvalidInput("it has no prompt: preferences are between answers to one", _COLUMNS_HINT)
        return {**rest, "prompt": prompt, "completion": value_text(chosen), "rejected": value_text(rejected)}
    if not isinstance(rejected, list) or not (prompt is None or isinstance(prompt, list)):
        raise InvalidInput("chosen is a list of messages, and prompt or rejected is not", _COLUMNS_HINT)
    if prompt is None:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise InvalidInput("its two chats have no beginning in common that would be the prompt", _COLUMNS_HINT)
    return {**rest, "messages": [*prompt, *chosen], "rejected": [*prompt, *rejected]}


def _with_rejected(row: Row, row_format: RowFormat) -> Row:
    """Return the row with the worse answer in the better one's place; a template finds it by itself."""
    column: dict[Any, str] = {"messages": "messages", "prompt_completion": "completion"}
    return {**row, column[row_format]: row.get("rejected")} if row_format in column else row


def _pair(chosen: Encoded, rejected: Encoded, row: int) -> Pair:
    # A longer answer costs a prompt more of its beginning: what both kept is the shorter one.
    prompts = chosen.ids[: chosen.prompt_tokens], rejected.ids[: rejected.prompt_tokens]
    answers = chosen.ids[chosen.prompt_tokens :], rejected.ids[rejected.prompt_tokens :]
    return Pair(min(prompts, key=len), *answers, max(chosen.truncated, rejected.truncated), row)


def _kept(pairs: list[Pair], interface: Interface) -> tuple[list[Pair], list[str]]:
    kept = [pair for pair in pairs if pair.chosen_ids != pair.rejected_ids]
    warnings = []
    if alike := len(pairs) - len(kept):
        warnings.append(f"{alike} of {len(pairs)} rows prefer an answer to itself and were left out")
    if cut := [pair.truncated for pair in kept if pair.truncated]:
        warnings.append(
            f"{len(cut)} of {len(pairs)} pairs are longer than {interface.max_length_tokens} tokens and were cut: {sum(cut)} tokens lost"
        )
    if not kept:
        raise InvalidInput(f"none of the {len(pairs)} rows prefers one answer to another", _COLUMNS_HINT)
    return kept, warnings
