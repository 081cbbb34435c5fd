"""Rows out of files, formats by columns, templates."""

from __future__ import annotations

import json

import pytest

from slmops.data import Interface, Template, detect_format, read_rows, render
from slmops.data.formats import chat, pair
from slmops.data.templates import parse
from slmops.errors import InvalidInput, RunFailed, SlmopsError

ROWS = [{"text": "a", "n": 1}, {"text": "ü", "n": None}]


def test_each_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "b.json", "c.json", "a.parquet"):
        assert read_rows(tmp_path / name) == ROWS, name
    assert read_rows(tmp_path / "a.jsonl", max_rows=1) == ROWS[:1]


def test_csv_with_quotes_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"one, two\nlines",x\r\n\r\n"say ""hi""",y\r\n')
    assert read_rows(tmp_path / "a.csv") == [{"text": "one, two\nlines", "label": "x"}, {"text": 'say "hi"', "label": "y"}]


def test_folder_reads_its_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "2"}')
    (tmp_path / "a.jsonl").write_text('{"text": "1"}')
    (tmp_path / "notes.bin").write_text("x")
    assert [row["text"] for row in read_rows(tmp_path)] == ["1", "2"]


def test_text_is_a_document_of_pieces_or_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n \n\nthree\n")
    assert read_rows(tmp_path / "a.txt") == [
        {"text": "one\ntwo", "document": "a.txt", "piece": 1, "pieces": 2},
        {"text": "three", "document": "a.txt", "piece": 2, "pieces": 2},
    ]
    assert read_rows(tmp_path / "a.txt", rows="lines") == [{"text": "one"}, {"text": "two"}, {"text": "three"}]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"a": 1}\n' * 6 + '{"a": \n', "a.jsonl line 7: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: a list, not an object"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json line 2: broken JSON"),
        ("a.json", '"text"', "holds a str"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 fields, and the header has 2"),
        ("a.csv", "a,a\n1,2\n", "column names must be given and differ"),
        ("a.jsonl", "", "holds no rows"),
        ("a.txt", " \n\n", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.parquet", "no", "cannot be read as parquet"),
        ("a.xlsx", "x", "not a kind of data file"),
    ],
)
def test_bad_files_name_file_line_and_next_step(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=says) as caught:
        read_rows(tmp_path / name)
    assert caught.value.exit_code == 2 and caught.value.hint and "\n" not in caught.value.message


def test_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xe9"}\n')
    with pytest.raises(InvalidInput, match="line 2: not UTF-8"):
        read_rows(tmp_path / "a.jsonl")


def test_missing_paths_empty_folder_and_wrong_row_unit(tmp_path):
    with pytest.raises(InvalidInput, match="no such data file or folder"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match="holds no data file"):
        read_rows(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    with pytest.raises(InvalidInput, match="speaks of text files"):
        read_rows(tmp_path / "a.jsonl", rows="lines")


def test_hub_dataset_that_cannot_be_had_is_one_clear_error():
    with pytest.raises(InvalidInput, match="nobody-here/none-such") as caught:
        read_rows("nobody-here/none-such")
    assert "hub" in caught.value.hint and not isinstance(caught.value, RunFailed) and isinstance(caught.value, SlmopsError)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "completion"], "prompt_completion"),
        (["output", "input", "instruction"], "alpaca"),
        (["instruction", "output"], "alpaca"),
        (["messages", "text"], "messages"),
        (["conversations", "tools"], "conversations"),
        (["text", "intent"], "text"),
    ],
)
def test_formats_by_columns(columns, expected):
    assert detect_format(columns) == expected


def test_templates_win_and_unknown_columns_are_named():
    assert detect_format(["text", "intent"], prompt_template="{text}", completion_template="{intent}") == "template"
    with pytest.raises(InvalidInput, match="no known format: question, answer") as caught:
        detect_format(["question", "answer"])
    assert "--prompt-template" in caught.value.hint
    with pytest.raises(InvalidInput, match="without --completion-template"):
        detect_format(["text"], prompt_template="{text}")
    with pytest.raises(InvalidInput, match="names the field 'intnt', and the columns are: text, intent") as caught:
        detect_format(["text", "intent"], prompt_template="{text}", completion_template="{intnt}")
    assert "{intent}" in caught.value.hint


def test_template_writes_text_json_and_braces():
    row = {"text": "{x}", "slots": {"b": "ü", "a": [1, None]}, "n": 3, "yes": True, "none": None}
    assert render("{{{text}}} {slots} {n}|{yes}|{none}|", row) == '{{x}} {"b":"ü","a":[1,null]} 3|true||'
    assert parse("{a} {b} {a}").fields == ("a", "b") and isinstance(parse("x"), Template)
    for bad in ("{a", "a}", "{}"):
        with pytest.raises(InvalidInput, match="stray"):
            render(bad, {"a": 1})
    with pytest.raises(InvalidInput, match="names the field 'b'"):
        render("{b}", {"a": 1})


def test_sharegpt_becomes_messages_with_tools():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "system": "S",
        "tools": json.dumps(tools),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "three"},
        ],
    }
    messages, found = chat(row, "conversations")
    assert found == tools
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    with pytest.raises(InvalidInput, match="from 'alien'"):
        chat({"conversations": [{"from": "alien", "value": "q"}]}, "conversations")
    for bad in ("text", [], [{"content": "x"}], None):
        with pytest.raises(InvalidInput, match="messages"):
            chat({"messages": bad}, "messages")


def test_alpaca_with_and_without_input():
    prompt, answer = pair({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", Interface())
    assert prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n") and answer == "3"
    assert "### Input" not in pair({"instruction": "Add.", "input": "", "output": "3"}, "alpaca", Interface())[0]
    messages, _ = chat({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca")
    assert messages == [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
