"""Ids and labels of rows: what the loss counts, what is cut, and that a prompt is a prefix of its row."""

from __future__ import annotations

import time

import pytest
from data_models import CHATML, LLAMA, REASONING, TOOLS, byte_level, llama_like

from slmops.data import Interface, Tokenizer, choose_interface, encode, encode_prompt, encode_rows, expected_text, read_rows
from slmops.errors import InvalidInput

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "Fine."},
        {"role": "user", "content": "And the light?"},
        {"role": "assistant", "content": "On, in the kitchen."},
    ]
}
PLAIN = Interface(bos_token_id=1, stop_token_ids=(2,), max_length_tokens=64)


def counted(sequence):
    """The ids that the loss counts, in runs."""
    runs, open_run = [], False
    for label in sequence.labels:
        if label == -100:
            open_run = False
        else:
            runs = [*runs[:-1], [*runs[-1], label]] if open_run else [*runs, [label]]
            open_run = True
    return runs


def test_real_rows_as_the_road_trains_on_them(shared):
    folder = shared / "models" / "stories3m"
    rows = read_rows(shared / "data" / "snips" / "train.jsonl")
    interface, _ = choose_interface(folder, rows, prompt_template="{text}\nIntent:", completion_template=" {intent}")
    tokenizer = Tokenizer.load(folder)
    encode_rows(rows[:64], tokenizer, interface)
    started = time.perf_counter()
    corpus = encode_rows(rows, tokenizer, interface)
    assert time.perf_counter() - started < 10  # 0.9 s on two quiet cores
    assert (corpus.rows, len(corpus.sequences), corpus.tokens_total, corpus.tokens_supervised) == (13784, 13784, 427619, 106127)
    assert (corpus.duplicates, corpus.truncated_rows) == (169, 0)
    assert corpus.warnings == ["169 of 13784 rows repeat an earlier row"]
    for row, sequence in list(zip(rows, corpus.sequences, strict=True))[:200]:
        assert sequence.ids[0] == 1 and sequence.labels[0] == -100  # BOS, which is the stop token too, is asked, not learned
        assert sequence.ids[-1] == 1 == sequence.labels[-1]
        assert sequence.ids.count(1) == 2
        prompt = encode_prompt(row, tokenizer, interface, "template")
        assert prompt == sequence.ids[: sequence.prompt_tokens] == [1, *tokenizer.encode(row["text"] + "\nIntent:")]
        assert sequence.labels[: len(prompt)] == [-100] * len(prompt) and sequence.labels[len(prompt) :] == sequence.ids[len(prompt) :]
        assert tokenizer.decode(sequence.ids[len(prompt) : -1], after=prompt) == expected_text(row, interface, "template")
        # No blank too many: the same ids as the whole text at once.
        assert sequence.ids[1:-1] == tokenizer.encode(f"{row['text']}\nIntent: {row['intent']}")


def test_train_on_all_counts_the_prompt_but_not_bos(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    row = {"prompt": "Play jazz.", "completion": " PlayMusic"}
    sequence = encode(row, tokenizer, PLAIN.model_copy(update={"train_on": "all"}), "prompt_completion")
    assert sequence.labels == [-100, *sequence.ids[1:]]
    assert sequence.prompt_tokens == 1 + len(tokenizer.encode("Play jazz."))


def test_prompt_without_answer_is_asked_alike(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    row = {"prompt": "Play jazz.", "completion": " PlayMusic"}
    assert encode_prompt({"prompt": "Play jazz."}, tokenizer, PLAIN, "prompt_completion") == encode_prompt(
        row, tokenizer, PLAIN, "prompt_completion"
    )
    interface = PLAIN.model_copy(update={"prompt_template": "{q}\n", "completion_template": "{a}"})
    assert encode_prompt({"q": "x"}, tokenizer, interface, "template") == encode_prompt(
        {"q": "x", "a": "y"}, tokenizer, interface, "template"
    )
    with pytest.raises(InvalidInput, match="names the field 'q'"):
        encode_prompt({"a": "x"}, tokenizer, interface, "template")


def test_stop_token_in_the_text_is_not_doubled(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    sequence = encode({"prompt": "a", "completion": " b</s>"}, tokenizer, PLAIN, "prompt_completion")
    assert sequence.ids[-1] == 2 and sequence.ids.count(2) == 1


def test_chat_counts_every_answer_with_its_end(tmp_path):
    folder = byte_level(tmp_path, chat_template=CHATML)
    tokenizer = Tokenizer.load(folder)
    interface, warnings = choose_interface(folder, [CHAT])
    sequence = encode(CHAT, tokenizer, interface, "messages")
    whole = tokenizer.encode(tokenizer.render_chat(CHAT["messages"]))
    assert sequence.ids == whole[:-1]  # but for the line end after the last <|im_end|>
    assert [tokenizer.decode(run, special=True) for run in counted(sequence)] == ["Fine.<|im_end|>", "On, in the kitchen.<|im_end|>"]
    question = tokenizer.render_chat(CHAT["messages"][:-1], add_generation_prompt=True)
    assert encode_prompt(CHAT, tokenizer, interface, "messages") == tokenizer.encode(question)
    unanswered = {"messages": CHAT["messages"][:-1]}
    from slmops.data import prompt_of_chat

    assert prompt_of_chat(unanswered["messages"], None, tokenizer, interface) == tokenizer.encode(question)
    assert expected_text(CHAT, interface, "messages") == "On, in the kitchen." and warnings == []


def test_bos_of_a_chat_template_is_there_once(tmp_path):
    folder = llama_like(tmp_path, chat_template=LLAMA)
    tokenizer = Tokenizer.load(folder)
    row = {"messages": CHAT["messages"][1:]}
    interface, _ = choose_interface(folder, [row])
    assert interface.bos_token_id == 1 and interface.stop_token_ids == (2,)
    sequence = encode(row, tokenizer, interface, "messages")
    assert sequence.ids == tokenizer.encode(tokenizer.render_chat(row["messages"])) and sequence.ids.count(1) == 1
    assert [tokenizer.decode(run, special=True).strip() for run in counted(sequence)] == ["Fine. </s>", "On, in the kitchen. </s>"]


def test_template_that_rewrites_earlier_turns_trains_turn_by_turn(tmp_path):
    folder = byte_level(tmp_path, chat_template=REASONING)
    tokenizer = Tokenizer.load(folder)
    messages = [dict(message) for message in CHAT["messages"]]
    messages[2]["reasoning_content"], messages[4]["reasoning_content"] = "Sun.", "Dark."
    row = {"messages": messages}
    interface, _ = choose_interface(folder, [row])
    corpus = encode_rows([row], tokenizer, interface)
    assert len(corpus.sequences) == 2 and "each answer is trained on by itself" in corpus.warnings[0]
    for sequence, end in zip(corpus.sequences, (2, 4), strict=True):
        question = tokenizer.render_chat(messages[:end], add_generation_prompt=True)
        assert sequence.ids[: sequence.prompt_tokens] == tokenizer.encode(question)
        answer = f"<think>{messages[end]['reasoning_content']}</think>\n{messages[end]['content']}<|im_end|>"
        assert [tokenizer.decode(run, special=True) for run in counted(sequence)] == [answer]


def test_tool_calls_are_counted(tmp_path):
    folder = byte_level(tmp_path, chat_template=TOOLS)
    tokenizer = Tokenizer.load(folder)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    row = {"messages": [CHAT["messages"][1], {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools}
    interface, _ = choose_interface(folder, [row])
    sequence = encode(row, tokenizer, interface, "messages")
    expected = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call><|im_end|>'
    assert [tokenizer.decode(run, special=True) for run in counted(sequence)] == [expected]
    assert '"name": "weather"' in tokenizer.decode(sequence.ids[: sequence.prompt_tokens])


def test_prompt_and_completion_use_the_chat_template_where_there_is_one(tmp_path):
    folder = byte_level(tmp_path, chat_template=CHATML)
    tokenizer, row = Tokenizer.load(folder), {"prompt": "Hello?", "completion": "Yes."}
    interface, _ = choose_interface(folder, [row])
    text = tokenizer.decode(encode(row, tokenizer, interface, "prompt_completion").ids, special=True)
    assert text == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    own, _ = choose_interface(folder, [row], prompt_template="{prompt}", completion_template="{completion}")
    assert tokenizer.decode(encode(row, tokenizer, own, "template").ids) == "Hello?Yes."


def test_chats_of_a_model_without_template(tmp_path):
    folder = llama_like(tmp_path)
    tokenizer = Tokenizer.load(folder)
    interface, warnings = choose_interface(folder, [CHAT])
    assert "no chat template" in warnings[0]
    sequence = encode(CHAT, tokenizer, interface, "messages")
    assert sequence.ids[0] == 1 and sequence.ids.count(1) == 1
    assert [tokenizer.decode(run, special=True) for run in counted(sequence)] == ["Fine.</s>", "On, in the kitchen.</s>"]
    prompt = encode_prompt(CHAT, tokenizer, interface, "messages")
    assert prompt == sequence.ids[: len(prompt)] and tokenizer.decode(prompt).endswith("User: And the light?\nAssistant:")


def test_long_prompt_is_cut_from_its_left_and_the_answer_stays(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    interface = Interface(bos_token_id=1, stop_token_ids=(2,), max_length_tokens=16)
    row = {"prompt": "qwertzuiop" * 5, "completion": "xyz"}
    prompt, answer = tokenizer.encode(row["prompt"]), tokenizer.encode("xyz")
    sequence = encode(row, tokenizer, interface, "prompt_completion")
    kept = 16 - 1 - len(answer) - 1
    assert sequence.ids == [1, *prompt[-kept:], *answer, 2] and sequence.prompt_tokens == 1 + kept
    assert sequence.truncated == len(prompt) - kept and sequence.labels[sequence.prompt_tokens :] == [*answer, 2]
    assert encode_prompt(row, tokenizer, interface, "prompt_completion") == [1, *prompt[-kept:]]
    exact = {"prompt": row["prompt"][: 16 - 2 - len(answer)], "completion": "xyz"}
    untouched = encode(exact, tokenizer, interface.model_copy(update={"max_length_tokens": 64}), "prompt_completion")
    assert untouched.truncated == 0


def test_long_answer_is_cut_too_and_does_not_learn_to_stop(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    interface = Interface(bos_token_id=1, stop_token_ids=(2,), max_length_tokens=16)
    row = {"prompt": "abc", "completion": "qwertzuiop" * 5}
    corpus = encode_rows([row], tokenizer, interface)
    sequence = corpus.sequences[0]
    prompt, answer = tokenizer.encode("abc"), tokenizer.encode(row["completion"])
    assert sequence.ids == [1, *prompt, *answer[: 15 - len(prompt)]] and 2 not in sequence.ids
    assert corpus.truncated_rows == 1 and corpus.truncated_tokens == len(answer) + 1 - (15 - len(prompt))
    assert f"1 of 1 rows are longer than 16 tokens and were cut: {corpus.truncated_tokens} tokens lost" in corpus.warnings


def test_text_is_split_and_none_of_it_lost(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    interface = Interface(bos_token_id=1, stop_token_ids=(2,), max_length_tokens=10)
    text = "qwertzuiop" * 5
    corpus = encode_rows([{"text": text}, {"text": "abc"}], tokenizer, interface)
    long = [sequence for sequence in corpus.sequences if sequence.row == 0]
    assert [i for sequence in long for i in sequence.ids[1:]] == [*tokenizer.encode(text), 2]
    assert all(
        sequence.ids[0] == 1 and len(sequence.ids) <= 10 and sequence.labels == [-100, *sequence.ids[1:]] for sequence in corpus.sequences
    )
    assert corpus.truncated_tokens == 0 and corpus.tokens_supervised == corpus.tokens_total - len(corpus.sequences)


def test_pieces_of_a_document_are_joined_and_only_its_end_stops(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    (tmp_path / "b.txt").write_text("four\n")
    interface = Interface(bos_token_id=1, stop_token_ids=(2,), max_length_tokens=64)
    rows = read_rows(tmp_path / "a.txt") + read_rows(tmp_path / "b.txt")
    first, second = encode_rows(rows, tokenizer, interface).sequences
    assert tokenizer.decode(first.ids) == "one\n\ntwo\n\nthree" and first.ids[-1] == 2 and second.ids == [1, *tokenizer.encode("four"), 2]
    gap = encode_rows([rows[0], rows[2]], tokenizer, interface).sequences  # the second was held out
    assert len(gap) == 2 and gap[0].ids == [1, *tokenizer.encode("one")] and gap[1].ids[-1] == 2


def test_counts_of_empty_fields_duplicates_and_contradictions(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    rows = [{"prompt": "a", "completion": c} for c in ("x", "x", "y", "")]
    corpus = encode_rows([*rows, {"prompt": None, "completion": "z"}], tokenizer, PLAIN)
    assert (corpus.duplicates, corpus.contradictions, corpus.empty_fields) == (1, 2, {"completion": 1, "prompt": 1})
    assert "the field 'prompt' is empty in 1 of 5 rows" in corpus.warnings
    assert corpus.document()["tokens"]["supervised"] == corpus.tokens_supervised


def test_unused_columns_of_a_text_are_named(tmp_path):
    corpus = encode_rows([{"text": "a", "intent": "b"}], Tokenizer.load(llama_like(tmp_path)), PLAIN)
    assert any("not used: intent" in warning for warning in corpus.warnings)


def test_nothing_to_learn_is_an_error(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=CHATML))
    interface = Interface(chat_template=CHATML, stop_token_ids=(2,))
    unanswered = {"messages": CHAT["messages"][:2]}
    with pytest.raises(InvalidInput, match="none of the 1 rows has a token to learn"):
        encode_rows([unanswered], tokenizer, interface)
    corpus = encode_rows([unanswered, CHAT], tokenizer, interface)
    assert corpus.nothing_to_learn == 1 and len(corpus.sequences) == 1
    with pytest.raises(InvalidInput, match="no rows"):
        encode_rows([], tokenizer, interface)


def test_a_bad_row_is_named(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    interface = PLAIN.model_copy(update={"prompt_template": "{a}", "completion_template": "{b}"})
    with pytest.raises(InvalidInput, match="row 2: template '{b}' names the field 'b', and the columns are: a"):
        encode_rows([{"a": "1", "b": "2"}, {"a": "1"}], tokenizer, interface)


def test_expected_text_of_plain_text_is_refused():
    with pytest.raises(InvalidInput, match="no answer to compare"):
        expected_text({"text": "a"}, PLAIN, "text")
