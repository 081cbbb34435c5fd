"""The stop token: which sources agree, what the model has seen, what the user says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_models import CHATML, byte_level, llama_like, table_with_unseen, write_model

from slmops.data import Tokenizer, choose_interface
from slmops.data.untrained import judge
from slmops.errors import InvalidInput

IMPOSSIBLE = [0xC0, 0xC1, *range(0xF5, 0x100)]
TEXT = [{"text": "a"}]


def llama_model(folder, unseen, *, tokenizer_eos="</s>", noise=1e-3, bfloat16=False, generation=None, **config):
    """A model with Llama's tokenizer, whose rows of impossible bytes and of `unseen` lie together."""
    llama_like(folder)
    tokenizer = Tokenizer.load(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer_eos
    if tokenizer_eos is None:
        del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    bytes_ = [tokenizer.id(f"<0x{byte:02X}>") for byte in IMPOSSIBLE]
    assert None not in bytes_
    write_model(folder, table_with_unseen(tokenizer.vocabulary_size, [*unseen, *bytes_], noise=noise), bfloat16=bfloat16, **config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return folder


def test_real_model_stops_with_the_token_it_has_seen(shared):
    interface, warnings = choose_interface(shared / "models" / "stories3m", TEXT)
    assert interface.stop_token_ids == (1,) and interface.bos_token_id == 1 and interface.max_length_tokens == 512
    assert "config.json says <s> (1)" in interface.stop_reason and "has never seen </s> (2)" in interface.stop_reason
    assert warnings == []
    folder = shared / "models" / "stories3m"
    found = judge(folder, Tokenizer.load(folder), [0, 1, 2, 13, 500])
    assert {i: evidence.seen for i, evidence in found.items()} == {0: "never", 1: "seen", 2: "never", 13: "seen", 500: "seen"}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_disagreement_is_settled_by_what_was_seen(tmp_path, bfloat16):
    folder = llama_model(tmp_path / "a", unseen=[2], eos_token_id=1, bfloat16=bfloat16)
    assert choose_interface(folder, TEXT)[0].stop_token_ids == (1,)
    # The other way round: here the tokenizer is right and the config is wrong.
    folder = llama_model(tmp_path / "b", unseen=[1], eos_token_id=1, bfloat16=bfloat16)
    assert choose_interface(folder, TEXT)[0].stop_token_ids == (2,)


def test_disagreement_of_seen_tokens_keeps_both(tmp_path):
    interface, warnings = choose_interface(llama_model(tmp_path, unseen=[], eos_token_id=1), TEXT)
    assert interface.stop_token_ids == (1, 2) and "seen both" in interface.stop_reason and warnings == []


def test_what_cannot_be_told_is_said(tmp_path):
    # Unused rows as scattered as all others: no evidence either way.
    interface, warnings = choose_interface(llama_model(tmp_path, unseen=[2], eos_token_id=1, noise=1.0), TEXT)
    assert interface.stop_token_ids == (1, 2)
    assert "cannot be told" in interface.stop_reason and len(warnings) == 1 and "--stop-token" in warnings[0]


def test_no_weights_means_unknown(tmp_path):
    folder = byte_level(tmp_path)
    assert judge(folder, Tokenizer.load(folder), [2])[2].seen == "unknown"
    assert choose_interface(folder, TEXT)[0].stop_token_ids == (2,)


def test_output_layer_decides_where_it_is_not_tied(tmp_path):
    folder = llama_like(tmp_path)
    tokenizer = Tokenizer.load(folder)
    unseen = [2, *(tokenizer.id(f"<0x{byte:02X}>") for byte in IMPOSSIBLE)]
    size = tokenizer.vocabulary_size
    write_model(folder, table_with_unseen(size, []), output=table_with_unseen(size, unseen), eos_token_id=1)
    assert judge(folder, tokenizer, [1, 2])[2].seen == "never"


def test_reserved_tokens_and_rows_beyond_the_vocabulary_are_references(tmp_path):
    reserved = tuple(f"<|reserved_{i}|>" for i in range(5))
    folder = byte_level(tmp_path, specials=reserved)
    tokenizer = Tokenizer.load(folder)
    unseen = [2, *(tokenizer.id(token) for token in reserved)]
    write_model(folder, table_with_unseen(tokenizer.vocabulary_size, unseen))
    assert judge(folder, tokenizer, [1, 2]) and judge(folder, tokenizer, [2])[2].seen == "never"
    assert judge(folder, tokenizer, [1])[1].seen == "seen"
    folder = byte_level(tmp_path / "padded")
    tokenizer = Tokenizer.load(folder)
    size = tokenizer.vocabulary_size
    write_model(folder, table_with_unseen(size + 8, [2, *range(size, size + 8)]))
    assert judge(folder, tokenizer, [2])[2].seen == "never" and judge(folder, tokenizer, [1])[1].seen == "seen"
    table = table_with_unseen(size + 8, [])
    table[2] = 0
    write_model(folder, table)
    assert judge(folder, tokenizer, [2])[2].seen == "never"


def test_agreement_needs_no_choice_but_a_never_seen_token_is_warned_of(tmp_path):
    folder = llama_model(tmp_path / "a", unseen=[], eos_token_id=2, generation=[2, 1])
    interface, warnings = choose_interface(folder, TEXT)
    assert interface.stop_token_ids == (2, 1) and warnings == []
    folder = llama_model(tmp_path / "b", unseen=[2], eos_token_id=2)
    interface, warnings = choose_interface(folder, TEXT)
    assert interface.stop_token_ids == (2,) and "never seen its stop token </s> (2)" in warnings[0]


def test_explicit_stop_token_wins_and_is_checked(tmp_path):
    folder = llama_model(tmp_path, unseen=[2], eos_token_id=1)
    for given in ("2", "</s>"):
        interface, warnings = choose_interface(folder, TEXT, stop_token=given)
        assert interface.stop_token_ids == (2,) and "--stop-token" in interface.stop_reason
        assert "never seen" in warnings[0]
    assert choose_interface(folder, TEXT, stop_token="<s>")[1] == []
    with pytest.raises(InvalidInput, match="tokens here"):
        choose_interface(folder, TEXT, stop_token="the end")
    with pytest.raises(InvalidInput, match="the vocabulary has"):
        choose_interface(folder, TEXT, stop_token="99999")


def test_no_stop_token_at_all(tmp_path):
    folder = byte_level(tmp_path, eos=None)
    with pytest.raises(InvalidInput, match="no stop token") as caught:
        choose_interface(folder, TEXT)
    assert "--stop-token" in caught.value.hint


def test_chat_stops_at_the_end_of_a_turn_and_at_the_models_own_eos(tmp_path):
    folder = byte_level(tmp_path, chat_template=CHATML, eos="<|endoftext|>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 0, "max_position_embeddings": 2048}))
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    interface, _ = choose_interface(folder, rows)
    assert interface.stop_token_ids == (2, 0) and "ends the assistant's turn" in interface.stop_reason
    assert interface.max_length_tokens == 1024 and interface.bos_token_id is None
    # Without rows (somebody else's package) a chat model is asked as one; plain text on it is not.
    assert choose_interface(folder, [])[0].stop_token_ids == (2, 0)
    assert choose_interface(folder, TEXT)[0].stop_token_ids == (0,)


def test_length_beyond_the_model_is_refused(tmp_path):
    folder = write_model(byte_level(tmp_path), np.ones((400, 4), np.float32), eos_token_id=2)
    assert choose_interface(folder, TEXT)[0].max_length_tokens == 64
    assert choose_interface(folder, TEXT, max_length_tokens=64)[0].max_length_tokens == 64
    with pytest.raises(InvalidInput, match="the model has 64 positions"):
        choose_interface(folder, TEXT, max_length_tokens=65)
