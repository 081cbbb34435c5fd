"""What do all rows together become, and what was lost on the way? Each loss is an error or a counted warning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmops.data.encoding import NOT_COUNTED, Draft, Encoded, draft_row, encode_each
from slmops.data.formats import RowFormat, detect_format, empty_columns, question_and_answer, used_columns
from slmops.data.interface import Interface
from slmops.data.rows import Row, columns_of
from slmops.data.tokenizer import Tokenizer
from slmops.errors import InvalidInput


@dataclass(frozen=True)
class Corpus:
    """Sequences to train on, and the counts of what became of the rows."""

    sequences: list[Encoded]
    row_format: RowFormat = "text"
    rows: int = 0
    tokens_total: int = 0
    tokens_supervised: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    duplicates: int = 0
    """Rows that ask and answer the same as an earlier one."""
    contradictions: int = 0
    """Rows that ask the same as an earlier one and answer otherwise."""
    nothing_to_learn: int = 0
    """Rows of which the loss counts no token; they are left out."""
    empty_fields: dict[str, int] = field(default_factory=dict)
    """Column -> rows in which it says nothing."""
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls) -> Corpus:
        """Return a corpus of nothing."""
        return cls([])

    def document(self) -> dict[str, Any]:
        """Return the counts as JSON."""
        return {
            "rows": self.rows,
            "sequences": len(self.sequences),
            "format": self.row_format,
            "tokens": {"total": self.tokens_total, "supervised": self.tokens_supervised},
            "truncated": {"rows": self.truncated_rows, "tokens": self.truncated_tokens},
            "duplicates": self.duplicates,
            "contradictions": self.contradictions,
            "nothing_to_learn": self.nothing_to_learn,
            "empty_fields": self.empty_fields,
        }


def row_format_of(rows: Sequence[Row], interface: Interface) -> RowFormat:
    """Return the format of rows, given the templates of the interface."""
    return detect_format(
        columns_of(list(rows)), prompt_template=interface.prompt_template, completion_template=interface.completion_template
    )


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, interface: Interface) -> Corpus:
    """Turn rows into the sequences that are trained on.

    Pieces of one text file that follow each other are joined again, with the blank line between them, and cut at the
    longest length only.

    Raises:
        InvalidInput: no rows, a row that lacks a field (the message says which row), or not one token to learn.
    """
    rows = list(rows)
    if not rows:
        raise InvalidInput("there are no rows", "give at least one")
    row_format = row_format_of(rows, interface)
    drafts: list[Draft] = []
    for number, row in enumerate(rows):
        try:
            drafts += [replace(draft, row=number) for draft in draft_row(row, tokenizer, interface, row_format)]
        except InvalidInput as error:
            raise InvalidInput(f"row {number + 1}: {error.message}", error.hint) from None
    if row_format == "text":
        drafts = join_pieces(rows, drafts)
    encoded = [sequence for sequences in encode_each(drafts, tokenizer, interface) for sequence in sequences]
    return _counted(rows, row_format, drafts, encoded, interface)


def repeats(rows: Sequence[Row], row_format: RowFormat, interface: Interface) -> tuple[int, int]:
    """Count the rows that repeat an earlier one, and those that ask the same as one and answer otherwise."""
    answers: dict[str, set[str]] = {}
    duplicates = contradictions = 0
    for row in rows:
        if "pieces" in row:  # of a text: a heading may come again
            continue
        question, answer = question_and_answer(row, row_format, interface)
        known = answers.setdefault(question, set())
        duplicates += answer in known
        contradictions += bool(known) and answer not in known
        known.add(answer)
    return duplicates, contradictions


def join_pieces(rows: Sequence[Row], drafts: list[Draft]) -> list[Draft]:
    """Join drafts of pieces that follow each other in one document."""
    found: list[Draft] = []
    for draft in drafts:
        row = rows[draft.row]
        before = rows[draft.row - 1] if draft.row else {}
        follows = "piece" in row and before.get("document") == row.get("document") and before.get("piece") == row["piece"] - 1
        if follows and found:
            text = f"\n\n{draft.segments[0][0]}"
            found[-1] = replace(found[-1], segments=(*found[-1].segments, (text, True)), ends=draft.ends)
        else:
            found.append(draft)
    return found


def _counted(rows: list[Row], row_format: RowFormat, drafts: list[Draft], encoded: list[Encoded], interface: Interface) -> Corpus:
    useful = [sequence for sequence in encoded if any(label != NOT_COUNTED for label in sequence.labels)]
    if not useful:
        raise InvalidInput(
            f"none of the {len(rows)} rows has a token to learn: the loss would count nothing",
            "check the completion template or column, and --max-length-tokens",
        )
    duplicates, contradictions = repeats(rows, row_format, interface)
    corpus = Corpus(
        sequences=useful,
        row_format=row_format,
        rows=len(rows),
        tokens_total=sum(len(sequence.ids) for sequence in useful),
        tokens_supervised=sum(len(sequence.labels) - sequence.labels.count(NOT_COUNTED) for sequence in useful),
        truncated_rows=len({sequence.row for sequence in encoded if sequence.truncated}),
        truncated_tokens=sum(sequence.truncated for sequence in encoded),
        duplicates=duplicates,
        contradictions=contradictions,
        nothing_to_learn=len({draft.row for draft in drafts} - {sequence.row for sequence in useful}),
        empty_fields=dict(Counter(name for row in rows for name in empty_columns(row, row_format, interface))),
    )
    return replace(corpus, warnings=warnings_of(corpus, rows, len(drafts), interface))


def warnings_of(corpus: Corpus, rows: list[Row], drafts: int, interface: Interface) -> list[str]:
    """Say each loss in one line, with its count."""
    found = []
    if corpus.truncated_rows:
        found.append(
            f"{corpus.truncated_rows} of {corpus.rows} rows are longer than {interface.max_length_tokens} tokens and were cut: "
            f"{corpus.truncated_tokens} tokens lost"
        )
    if corpus.duplicates:
        found.append(f"{corpus.duplicates} of {corpus.rows} rows repeat an earlier row")
    if corpus.contradictions:
        found.append(f"{corpus.contradictions} rows ask the same as an earlier row and answer otherwise")
    for name, count in corpus.empty_fields.items():
        found.append(f"the field '{name}' is empty in {count} of {corpus.rows} rows")
    if corpus.nothing_to_learn:
        found.append(f"{corpus.nothing_to_learn} rows have no token to learn and were left out")
    if corpus.row_format in ("messages", "conversations") and drafts > corpus.rows:
        found.append("the chat template writes earlier turns differently once later ones follow: each answer is trained on by itself")
    if unused := unused_columns(rows, corpus.row_format, interface):
        found.append(f"trained on the column 'text' alone; not used: {', '.join(unused)} (templates can use them)")
    return found


def unused_columns(rows: Sequence[Row], row_format: RowFormat, interface: Interface) -> list[str]:
    """Return what else rows have that look like plain text: perhaps they are none, and a template was forgotten."""
    if row_format != "text":
        return []
    return [name for name in columns_of(list(rows)) if name not in used_columns(row_format, interface)]
