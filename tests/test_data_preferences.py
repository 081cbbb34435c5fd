"""Two answers to one prompt: each has the very ids that fine-tuning on it as a completion would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_models import CHATML, byte_level, llama_like

from slmops.data import Interface, Tokenizer, encode_pairs, encode_rows, preference_rows
from slmops.errors import InvalidInput

ROW = {"text": "Play some jazz", "intent": "PlayMusic", "other": "GetWeather"}
TEMPLATES = {"prompt_template": "{text}\nIntent:", "completion_template": " {intent}"}
USER = {"role": "user", "content": "Play some jazz"}


def plain(folder: Path, **changes: Any) -> tuple[Tokenizer, Interface]:
    return Tokenizer.load(llama_like(folder)), Interface(bos_token_id=1, stop_token_ids=(2,), max_length_tokens=64, **changes)


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_templates_give_the_ids_of_sft(tmp_path: Path) -> None:
    tokenizer, interface = plain(tmp_path, **TEMPLATES)
    rows = preference_rows([ROW], chosen_template=" {intent}", rejected_template=" {other}")
    (pair,), warnings = encode_pairs(rows, tokenizer, interface, rejected_template=" {other}")
    for template, answer in ((" {intent}", pair.chosen_ids), (" {other}", pair.rejected_ids)):
        sequence = encode_rows([ROW], tokenizer, interface.model_copy(update={"completion_template": template})).sequences[0]
        assert pair.prompt_ids + answer == sequence.ids
        assert len(pair.prompt_ids) == sequence.prompt_tokens
        assert answer[-1] == 2 and answer.count(2) == 1, "the stop token, once"
    assert not warnings


def test_columns_give_the_ids_of_prompt_and_completion(tmp_path: Path) -> None:
    tokenizer, interface = plain(tmp_path)
    rows = preference_rows([{"prompt": "Play some jazz", "chosen": " yes", "rejected": " no"}])
    (pair,), _ = encode_pairs(rows, tokenizer, interface)
    for completion, answer in ((" yes", pair.chosen_ids), (" no", pair.rejected_ids)):
        sequence = encode_rows([{"prompt": "Play some jazz", "completion": completion}], tokenizer, interface).sequences[0]
        assert pair.prompt_ids + answer == sequence.ids
    assert preference_rows(rows) == rows, "rows that were brought into form once are left alone"


@pytest.mark.parametrize("whole", [False, True])
def test_messages_with_a_prompt_or_as_whole_chats_give_the_ids_of_chats(tmp_path: Path, whole: bool) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=CHATML))
    interface = Interface(chat_template=CHATML, stop_token_ids=(2,), max_length_tokens=128)
    front = [USER] if whole else []
    row: dict[str, Any] = {"chosen": [*front, said("yes")], "rejected": [*front, said("no")]}
    rows = preference_rows([row if whole else {**row, "prompt": [USER]}])
    (pair,), _ = encode_pairs(rows, tokenizer, interface)
    for answer, ids in (("yes", pair.chosen_ids), ("no", pair.rejected_ids)):
        sequence = encode_rows([{"messages": [USER, said(answer)]}], tokenizer, interface).sequences[0]
        assert pair.prompt_ids + ids == sequence.ids
        assert len(pair.prompt_ids) == sequence.prompt_tokens


def test_a_pair_that_is_too_long_keeps_both_answers_behind_one_prompt(tmp_path: Path) -> None:
    tokenizer, interface = plain(tmp_path)
    interface = interface.model_copy(update={"max_length_tokens": 24})
    row = {"prompt": "Play some jazz in the kitchen and turn on the light", "chosen": " yes", "rejected": " no, not in the kitchen"}
    (pair,), warnings = encode_pairs(preference_rows([row]), tokenizer, interface)
    assert pair.prompt_ids[0] == 1
    assert max(len(sequence.ids) for sequence in pair.both) <= 24
    assert pair.chosen_ids == encode_pairs(preference_rows([row]), tokenizer, plain(tmp_path)[1])[0][0].chosen_ids
    assert pair.truncated > 0 and "1 of 1 pairs are longer than 24 tokens" in warnings[0]


def test_rows_that_prefer_nothing_are_counted_and_left_out(tmp_path: Path) -> None:
    tokenizer, interface = plain(tmp_path)
    rows = preference_rows([{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    pairs, warnings = encode_pairs(rows, tokenizer, interface)
    assert [pair.row for pair in pairs] == [1]
    assert warnings == ["1 of 2 rows prefer an answer to itself and were left out"]


@pytest.mark.parametrize(
    ("rows", "templates", "text"),
    [
        ([{"prompt": "a", "chosen": "b"}], {}, "hold no preferences; their columns are prompt, chosen"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "", "chosen": "b", "rejected": "c"}], {}, "row 2: it has no prompt"),
        ([{"chosen": "b", "rejected": "c"}], {}, "row 1: it has no prompt"),
        ([{"chosen": [said("b")], "rejected": [said("c")]}], {}, "row 1: its two chats have no beginning in common"),
        ([{"chosen": [said("b")], "rejected": "c"}], {}, "row 1: chosen is a list"),
        ([ROW], {"chosen_template": " {intent}"}, "--rejected-template is missing"),
        ([ROW], {"chosen_template": " {intent}", "rejected_template": " {othr}"}, "names the field 'othr'"),
    ],
)
def test_what_is_no_preference_is_refused(rows: list[dict[str, Any]], templates: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        preference_rows(rows, **templates)
