"""How does plain text become full-length blocks, with every token of it learned once?

Documents follow each other in one stream, the stop token after each, and the stream is cut into blocks of one length
(as GPT-3 was trained: Brown et al. 2020, arXiv 2005.14165, appendix B, without a mask between documents). At a cut no
loss is lost: where the model has a BOS, each block begins with one, which predicts the first token after the cut;
without one, a block begins with the last token of the block before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from slmops.data.corpus import Corpus, join_pieces, repeats, row_format_of
from slmops.data.encoding import NOT_COUNTED, Encoded, draft_row, encode_drafts
from slmops.data.interface import Interface
from slmops.data.rows import Row
from slmops.data.tokenizer import Tokenizer
from slmops.errors import InvalidInput

_UNCUT = 1 << 60


def encode_blocks(rows: Sequence[Row], tokenizer: Tokenizer, interface: Interface, *, length_tokens: int | None = None) -> Corpus:
    """Turn plain text into blocks of `length_tokens`; only the last one may be shorter.

    Pieces of one text file that follow each other are one document again. Where pieces were taken out of it (for
    validation), BOS marks the seam, or without one the stop token; that token is not learned.

    Args:
        rows: plain text (a column `text`, or the pieces of text files), or any rows with a completion template that
            makes a text of their columns.
        tokenizer: of the model.
        interface: gives BOS, stop token and the longest sequence.
        length_tokens: of a block; None: the interface's longest sequence.

    Raises:
        InvalidInput: no rows, rows that are no plain text, or no token to learn.
    """
    rows = list(rows)
    if not rows:
        raise InvalidInput("there are no rows", "give at least one")
    row_format = row_format_of(rows, interface)
    if row_format != "text" and (row_format != "template" or interface.prompt_template is not None):
        raise InvalidInput(
            f"plain text is needed, and the rows are of the format {row_format}",
            "give text files or a column text, or a --completion-template alone that makes a text of the columns",
        )
    drafts = [replace(draft, row=i) for i, row in enumerate(rows) for draft in draft_row(row, tokenizer, interface, row_format)]
    drafts = join_pieces(rows, drafts) if row_format == "text" else drafts
    documents = encode_drafts(drafts, tokenizer, interface.model_copy(update={"max_length_tokens": _UNCUT}))
    ids, counted = _stream(documents, [draft.ends for draft in drafts], interface)
    blocks = list(_cut(ids, counted, interface.bos_token_id, length_tokens or interface.max_length_tokens))
    if not blocks:
        raise InvalidInput(f"none of the {len(rows)} rows has a token to learn: the loss would count nothing", "give some text")
    duplicates, _ = repeats(rows, row_format, interface)
    return Corpus(
        sequences=blocks,
        row_format=row_format,
        rows=len(rows),
        tokens_total=sum(len(block.ids) for block in blocks),
        tokens_supervised=sum(len(block.labels) - block.labels.count(NOT_COUNTED) for block in blocks),
        duplicates=duplicates,
        warnings=[f"{duplicates} of {len(rows)} rows repeat an earlier row"] if duplicates else [],
    )


def _stream(documents: Sequence[Encoded], whole: Sequence[bool], interface: Interface) -> tuple[list[int], list[bool]]:
    """Put documents one after the other; return the ids, and which of them are to be learned.

    Args:
        documents: each with BOS in front and the stop token behind, as the interface says.
        whole: the document came to its end; False: it goes on elsewhere (pieces of it were set aside).
        interface: of the model.
    """
    ids: list[int] = []
    counted: list[bool] = []
    bos, stop = interface.bos_token_id, interface.stop_token_ids[:1]
    before_whole = True
    for document, ends in zip(documents, whole, strict=True):
        own = [label != NOT_COUNTED for label in document.labels]
        start = 0
        if bos is not None and ids[-1:] == [bos] == document.ids[:1]:
            start = 1  # the stop token is BOS too: one is enough
        elif bos is None and ids and not before_whole:
            ids, counted = [*ids, *stop], [*counted, *[False] * len(stop)]
        elif bos is None and ids:
            own[:1] = [True]  # the stop token before it predicts it
        ids += document.ids[start:]
        counted += own[start:]
        before_whole = ends
    return ids, counted


def _cut(ids: list[int], counted: list[bool], bos: int | None, length: int) -> Iterator[Encoded]:
    """Yield the blocks of a stream."""
    at = 0
    while at < len(ids):
        front = ids[max(at - 1, 0) : at] if bos is None else [] if ids[at] == bos and not counted[at] else [bos]
        end = min(at + length - len(front), len(ids))
        # A stop token that is BOS too would stand first in the next block, where nothing predicts it.
        if end < len(ids) and ids[end] == bos and counted[end] and end - at > 1:
            end -= 1
        labels = [NOT_COUNTED] * len(front) + [i if c else NOT_COUNTED for i, c in zip(ids[at:end], counted[at:end], strict=True)]
        labels[:1] = [NOT_COUNTED]
        if any(label != NOT_COUNTED for label in labels):
            yield Encoded(front + ids[at:end], labels, len(front))
        at = end
