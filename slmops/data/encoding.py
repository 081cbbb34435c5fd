"""Which token ids does a row become, and which of them does the loss count?

Prompt and completion are encoded one after the other, the completion as the prompt's continuation: the ids of the
prompt that a device will feed are exactly the first ids of the row that was trained on. A row is first cut into
segments of text, counted or not; segments of all rows are then encoded in rounds, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slmops.data.formats import RowFormat, chat, is_chat, pair
from slmops.data.interface import Interface
from slmops.data.rows import Row
from slmops.data.templates import parse, value_text
from slmops.data.tokenizer import Tokenizer
from slmops.data.turns import draft_chat, draft_question
from slmops.errors import InvalidInput

NOT_COUNTED = -100
"""Label of a token that the loss leaves out (torch's `ignore_index`)."""


@dataclass(frozen=True)
class Encoded:
    """One sequence to train on."""

    ids: list[int]
    labels: list[int]
    """The id where the loss counts the token, -100 elsewhere. Not shifted: labels[t] is the token at t itself."""
    prompt_tokens: int
    """So many ids at the start are the prompt of the (last) answer."""
    truncated: int = 0
    """So many tokens of the row were cut off."""
    row: int = 0
    """Index of the row that it comes from, in `encode_rows`."""


@dataclass(frozen=True)
class Draft:
    """A sequence as text: segments, each counted by the loss or not."""

    segments: tuple[tuple[str, bool], ...]
    ends: bool = True
    """Append the stop token (where the text does not carry its own)."""
    row: int = 0
    """Index of the row that it comes from."""
    splits: bool = False
    """A long one becomes several sequences instead of being cut: plain text."""
    bos: bool = True
    """Put the interface's BOS in front; a chat template writes its own."""


def draft_row(row: Row, tokenizer: Tokenizer, interface: Interface, row_format: RowFormat) -> list[Draft]:
    """Return the sequences of a row as text: one, or one an assistant's turn where the chat template demands it."""
    if is_chat(row_format, interface):
        messages, tools = chat(row, row_format)
        return [Draft(segments, ends, bos=False) for segments, ends in draft_chat(messages, tools, tokenizer, interface)]
    prompt, completion = pair(row, row_format, interface)
    ends = row_format != "text" or row.get("piece") == row.get("pieces")
    segments = ((prompt, interface.train_on == "all"), (completion, True)) if prompt else ((completion, True),)
    return [Draft(segments, ends, splits=not prompt)]


def encode(row: Row, tokenizer: Tokenizer, interface: Interface, row_format: RowFormat) -> Encoded:
    """Return a row as one sequence; of a row that becomes several, the last, which ends in the (last) answer.

    Raises:
        InvalidInput: the row lacks a field, or the chat template refuses it.
    """
    return encode_drafts(draft_row(row, tokenizer, interface, row_format), tokenizer, interface)[-1]


def encode_drafts(drafts: Sequence[Draft], tokenizer: Tokenizer, interface: Interface) -> list[Encoded]:
    """Encode sequences of text, all together."""
    return [piece for pieces in encode_each(drafts, tokenizer, interface) for piece in pieces]


def encode_each(drafts: Sequence[Draft], tokenizer: Tokenizer, interface: Interface) -> list[list[Encoded]]:
    """Encode sequences of text; each becomes one, or several where it is a plain text that is too long."""
    ids: list[list[int]] = [[] for _ in drafts]
    counted: list[list[bool]] = [[] for _ in drafts]
    answer = [0] * len(drafts)
    for round_number in range(max((len(draft.segments) for draft in drafts), default=0)):
        present = [i for i, draft in enumerate(drafts) if round_number < len(draft.segments)]
        texts = [drafts[i].segments[round_number][0] for i in present]
        for i, piece in zip(present, tokenizer.encode_batch(texts, after=[ids[i] for i in present]), strict=True):
            answer[i] = len(ids[i])  # the last segment is the answer
            ids[i] += piece
            counted[i] += [drafts[i].segments[round_number][1]] * len(piece)
    return [_assemble(draft, ids[i], counted[i], answer[i], interface) for i, draft in enumerate(drafts)]


def encode_prompt(row: Row, tokenizer: Tokenizer, interface: Interface, row_format: RowFormat) -> list[int]:
    """Return the ids after which the model is to answer: exactly the first ids of the row as it is trained on.

    A plain text is itself the prompt. A row without an answer (as on a device) is asked all the same.

    Raises:
        InvalidInput: the row lacks a field of the prompt, or the chat template refuses it.
    """
    if row_format == "text":
        return with_bos(tokenizer.encode(value_text(row.get("text"))), interface)[: interface.max_length_tokens - 1]
    whole = _answered(row, row_format, interface)
    if whole:
        encoded = encode(row, tokenizer, interface, row_format)
        return encoded.ids[: encoded.prompt_tokens]
    if is_chat(row_format, interface):
        messages, tools = chat(row, row_format)
        return prompt_of_chat(messages, tools, tokenizer, interface)
    text = parse(interface.prompt_template or "").render(row) if row_format == "template" else pair(row, row_format, interface)[0]
    return with_bos(tokenizer.encode(text), interface)[: interface.max_length_tokens - 1]


def prompt_of_chat(messages: list, tools: list | None, tokenizer: Tokenizer, interface: Interface) -> list[int]:
    """Return the ids of a chat that the assistant is to go on with."""
    draft = Draft(draft_question(messages, tools, tokenizer, interface), ends=False)
    ids: list[int] = []
    for text, _ in draft.segments:
        ids += tokenizer.encode_batch([text], after=[ids])[0]
    return ids


def expected_text(row: Row, interface: Interface, row_format: RowFormat) -> str:
    """Return the answer that a row expects: the completion, or what the assistant says last.

    Raises:
        InvalidInput: a plain text expects none, or the row lacks the field.
    """
    if row_format == "text":
        raise InvalidInput(
            "plain text has no answer to compare with", "use --metric perplexity, or give --prompt-template and --completion-template"
        )
    if row_format in ("messages", "conversations"):
        messages, _ = chat(row, row_format)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise InvalidInput("a chat has no turn of the assistant: there is nothing to compare with", "end each chat with the answer")
        last = answers[-1]
        return value_text(last.get("content")) or value_text(last.get("tool_calls"))
    if row_format == "prompt_completion" and isinstance(row.get("completion"), list):
        return value_text(row["completion"][-1].get("content"))
    return pair(row, row_format, interface)[1]


def with_bos(ids: list[int], interface: Interface) -> list[int]:
    """Put BOS in front where the interface says so and the text does not begin with it already."""
    bos = interface.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _answered(row: Row, row_format: RowFormat, interface: Interface) -> bool:
    if row_format == "template":
        return all(field in row for field in parse(interface.completion_template or "").fields)
    if row_format in ("messages", "conversations"):
        return any(message["role"] == "assistant" for message in chat(row, row_format)[0])
    return row.get("completion" if row_format == "prompt_completion" else "output") is not None


def _assemble(draft: Draft, ids: list[int], counted: list[bool], answer: int, interface: Interface) -> list[Encoded]:
    """Put BOS in front and the stop token behind, and bring the sequence to its length."""
    stop = interface.stop_token_ids[:1]
    if draft.ends and stop and ids[-1:] != [*stop]:
        ids, counted = [*ids, *stop], [*counted, True]
    if draft.bos and (complete := with_bos(ids, interface)) is not ids:
        ids, counted, answer = complete, [False, *counted], answer + 1
    front = int(interface.bos_token_id is not None and ids[:1] == [interface.bos_token_id])
    if draft.splits:
        return _pieces(ids, counted, front, interface.max_length_tokens, draft.row)
    kept = _keep(len(ids), answer, front, interface.max_length_tokens)
    chosen = [ids[i] for part in kept for i in part]
    labels = [ids[i] if counted[i] else NOT_COUNTED for part in kept for i in part]
    labels[:1] = [NOT_COUNTED] * len(labels[:1])  # nothing predicts the first token
    prompt_tokens = len(kept[0]) + len(kept[1])
    return [Encoded(chosen, labels, prompt_tokens, len(ids) - len(chosen), draft.row)]


def _keep(total: int, answer: int, front: int, limit: int) -> tuple[range, range, range]:
    """Choose the positions of an over-long sequence to keep: (BOS, prompt, answer).

    The prompt loses its beginning, so that the answer stays whole. Where the answer alone is too long it loses its
    end, and the prompt keeps at most half of the room: an answer without its question teaches nothing.
    """
    front = min(front, answer)
    room = limit - front
    if total - answer > room:
        prompt = min(answer - front, room // 2)
        return range(front), range(answer - prompt, answer), range(answer, answer + room - prompt)
    prompt = min(answer - front, room - (total - answer))
    return range(front), range(answer - prompt, answer), range(answer, total)


def _pieces(ids: list[int], counted: list[bool], front: int, limit: int, row: int) -> list[Encoded]:
    """Cut a plain text into sequences of at most `limit` tokens, BOS in front of each; none of it is lost."""
    head, room = ids[:front], limit - front
    found = []
    for start in range(front, max(len(ids), front + 1), room):
        piece = head + ids[start : start + room]
        labels = [NOT_COUNTED] * front + [
            i if c else NOT_COUNTED for i, c in zip(piece[front:], counted[start : start + room], strict=True)
        ]
        labels[:1] = [NOT_COUNTED] * len(labels[:1])
        found.append(Encoded(piece, labels, front, 0, row))
    return found
