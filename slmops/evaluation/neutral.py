"""Which text is a model measured on when nobody gave rows? Ten paragraphs of different kinds, of our own writing."""

from __future__ import annotations

from importlib import resources

from slmops.data import Interface, Tokenizer
from slmops.data.encoding import with_bos

_PIECE_TOKENS = 128


def neutral_text() -> str:
    """Return the text, its paragraphs apart by blank lines."""
    return resources.files("slmops.evaluation").joinpath("neutral.txt").read_text(encoding="utf-8")


def text_pieces(tokenizer: Tokenizer, interface: Interface) -> list[list[int]]:
    """Return the neutral text as ids: a piece a paragraph, cut at 128 tokens or the model's own length."""
    longest = min(_PIECE_TOKENS, interface.max_length_tokens)
    found = []
    for ids in tokenizer.encode_batch(neutral_text().strip().split("\n\n")):
        found += [
            piece for start in range(0, len(ids), longest - 1) if len(piece := with_bos(ids[start : start + longest - 1], interface)) > 1
        ]
    return found
