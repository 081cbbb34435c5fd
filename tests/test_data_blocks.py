"""Plain text in full-length blocks: every token is learned exactly once, whatever BOS and stop token the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_models import TEXTS, byte_level, llama_like

from slmops.data import NOT_COUNTED, Interface, Tokenizer, encode_blocks, read_rows
from slmops.errors import InvalidInput

DOCUMENTS = [" ".join(TEXTS), "Play it again.", "What is it?\n\nIt is jazz, and it goes on for a while, as music does."]


def setting(folder: Path, kind: str) -> tuple[Tokenizer, Interface]:
    """A tokenizer with BOS 1 and stop 2, one whose BOS is its stop token as well, and one without BOS."""
    tokenizer = Tokenizer.load(byte_level(folder) if kind == "no bos" else llama_like(folder))
    bos, stop = {"bos": (1, 2), "bos is stop": (1, 1), "no bos": (None, 2)}[kind]
    return tokenizer, Interface(bos_token_id=bos, stop_token_ids=(stop,), max_length_tokens=16)


@pytest.mark.parametrize("kind", ["bos", "bos is stop", "no bos"])
def test_every_token_is_learned_once_and_in_order(tmp_path: Path, kind: str) -> None:
    tokenizer, interface = setting(tmp_path, kind)
    corpus = encode_blocks([{"text": text} for text in DOCUMENTS], tokenizer, interface)
    learned = [label for block in corpus.sequences for label in block.labels if label != NOT_COUNTED]
    stop = interface.stop_token_ids[0]
    expected = [i for text in DOCUMENTS for i in [*tokenizer.encode(text), stop]]
    assert learned == (expected if interface.bos_token_id is not None else expected[1:])  # nothing stands before the very first
    assert corpus.tokens_supervised == len(learned)
    for block in corpus.sequences:
        assert all(label in (NOT_COUNTED, token) for token, label in zip(block.ids, block.labels, strict=True))
        assert block.labels[0] == NOT_COUNTED, "nothing predicts the first token of a sequence"


@pytest.mark.parametrize("kind", ["bos", "bos is stop", "no bos"])
def test_blocks_are_full_and_begin_as_the_model_is_asked(tmp_path: Path, kind: str) -> None:
    tokenizer, interface = setting(tmp_path, kind)
    blocks = encode_blocks([{"text": text} for text in DOCUMENTS], tokenizer, interface).sequences
    # A stop token that is BOS too never begins a block, where it would not be learned: the block before is one longer or shorter.
    shortest = 15 if kind == "bos is stop" else 16
    assert len(blocks) > 5
    assert all(shortest <= len(block.ids) <= 16 for block in blocks[:-1])
    if interface.bos_token_id is not None:
        assert all(block.ids[0] == interface.bos_token_id for block in blocks)
    else:
        assert all(after.ids[0] == before.ids[-1] for before, after in zip(blocks, blocks[1:], strict=False))


def test_pieces_of_a_file_are_one_document_again_and_a_gap_is_no_end(tmp_path: Path) -> None:
    tokenizer, interface = setting(tmp_path, "bos")
    file = tmp_path / "text.md"
    file.write_text("one two\n\nthree\n\nfour\n\nfive six")
    rows = read_rows(file)
    whole = encode_blocks(rows, tokenizer, interface, length_tokens=200).sequences[0]
    assert whole.ids == [1, *tokenizer.encode("one two"), *_rest(tokenizer, ["one two", "\n\nthree", "\n\nfour", "\n\nfive six"]), 2]
    gapped = encode_blocks([rows[0], rows[2], rows[3]], tokenizer, interface, length_tokens=200).sequences[0]
    assert gapped.ids.count(2) == 1, "the text does not end where pieces were taken out"
    seam = gapped.ids.index(1, 1)
    assert gapped.labels[seam] == NOT_COUNTED, "and BOS, which marks the seam, is not learned"


def _rest(tokenizer: Tokenizer, segments: list[str]) -> list[int]:
    ids = tokenizer.encode(segments[0])
    start = len(ids)
    for text in segments[1:]:
        ids = ids + tokenizer.encode_batch([text], after=[ids])[0]
    return ids[start:]


@pytest.mark.parametrize(
    ("rows", "changes", "text"),
    [
        ([], {}, "no rows"),
        ([{"prompt": "a", "completion": "b"}], {}, "plain text is needed"),
        ([{"text": "a"}], {"prompt_template": "{text}", "completion_template": "{text}"}, "plain text is needed"),
    ],
)
def test_what_is_no_plain_text_is_refused(tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, str], text: str) -> None:
    tokenizer, interface = setting(tmp_path, "bos")
    with pytest.raises(InvalidInput, match=text):
        encode_blocks(rows, tokenizer, interface.model_copy(update=changes))


def test_a_completion_template_makes_a_text_of_columns(tmp_path: Path) -> None:
    tokenizer, interface = setting(tmp_path, "bos")
    own = interface.model_copy(update={"completion_template": "{title}: {body}"})
    blocks = encode_blocks([{"title": "jazz", "body": "it is music"}], tokenizer, own).sequences
    assert blocks[0].ids == [1, *tokenizer.encode("jazz: it is music"), 2]
