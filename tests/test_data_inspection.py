"""Splitting, overlap, `data inspect` and `data prepare`."""

from __future__ import annotations

import json

import pytest
from data_models import llama_like

from slmops import hashes
from slmops.data import encode_rows, inspect_data, load_splits, overlap, prepare_data, read_rows, split
from slmops.errors import BadArtifact, InvalidInput

ROWS = [{"prompt": f"question {i}", "completion": f" answer {i % 7}"} for i in range(400)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_split_is_seeded_and_takes_at_least_16_rows():
    train, validation = split(ROWS, 0.05, 0)
    assert (len(train), len(validation)) == (380, 20) and overlap(train, validation) == 0
    assert split(ROWS, 0.05, 0) == (train, validation) and split(ROWS, 0.05, 1)[1] != validation
    assert sorted(train + validation, key=json.dumps) == sorted(ROWS, key=json.dumps)
    assert len(split(ROWS[:100], 0.05, 0)[1]) == 16
    assert len(split(ROWS[:10], 0.05, 0)[1]) == 5 and split(ROWS[:1], 0.05, 0)[1] == []
    assert split(ROWS, 0, 0) == (ROWS, [])


def test_repeats_and_equal_questions_stay_on_one_side():
    rows = [dict(row, id=i) for i, row in enumerate(ROWS[:50] * 4)]
    train, validation = split(rows, 0.2, 3)
    assert overlap(train, validation) == 0 and len(validation) == 40
    by_template = [{"q": i % 20, "a": i} for i in range(100)]
    train, validation = split(by_template, 0.2, 0, prompt_template="{q}", completion_template="{a}")
    assert {row["q"] for row in train} & {row["q"] for row in validation} == set()
    with pytest.raises(InvalidInput, match="all 20 rows are the same"):
        split([ROWS[0]] * 20, 0.1, 0)


def test_text_is_held_out_in_runs(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"piece {i}" for i in range(1024)))
    train, validation = split(read_rows(tmp_path / "a.txt"), 0.05, 0)
    numbers = [row["piece"] for row in validation]
    assert len(numbers) == 64 and sum(b != a + 1 for a, b in zip(numbers, numbers[1:], strict=False)) <= 3
    assert overlap(train, validation) == 0


def test_real_overlap(shared):
    snips = shared / "data" / "snips"
    assert overlap(read_rows(snips / "train.jsonl"), read_rows(snips / "test.jsonl")) == 6


def test_inspect_shows_what_a_run_trains_on(tmp_path):
    model = llama_like(tmp_path / "model")
    data = write(tmp_path / "a.jsonl", ROWS)
    held_out = write(tmp_path / "v.jsonl", [*ROWS[:3], {"prompt": "new", "completion": "x"}])
    found = inspect_data(data, model=str(model), examples=2, validation=held_out)
    document = json.loads(json.dumps(found.document()))
    assert (
        document["command"] == "data inspect" and document["ok"] and document["rows"] == 400 and document["format"] == "prompt_completion"
    )
    assert document["overlap"] == 3 and document["validation_rows"] == 4
    assert "3 of 4 validation rows ask what a training row asks too" in document["warnings"]
    assert sum(count for *_, count in document["lengths"]["histogram"]) == 400
    assert (
        document["lengths"]["unit"] == "tokens"
        and document["lengths"]["shortest"] <= document["lengths"]["median"] <= document["lengths"]["longest"]
    )
    from slmops.data import Tokenizer

    corpus = encode_rows(ROWS, Tokenizer.load(model), found.interface)
    assert document["tokens"] == {"total": corpus.tokens_total, "supervised": corpus.tokens_supervised}
    assert len(document["examples"]) == 2
    tokens = document["examples"][1]["tokens"]
    assert [token["id"] for token in tokens] == corpus.sequences[1].ids
    assert tokens[-1] == {"text": "</s>", "id": 2, "supervised": True} and not tokens[0]["supervised"]
    assert "the tokenizer names it" in document["interface"]["stop_reason"]


def test_inspect_without_a_model_shows_text(tmp_path):
    document = inspect_data(write(tmp_path / "a.jsonl", ROWS), examples=1).document()
    assert document["lengths"]["unit"] == "characters" and document["model"] is None
    assert document["examples"][0]["tokens"] == (
        {"text": "question 0", "id": None, "supervised": False},
        {"text": " answer 0", "id": None, "supervised": True},
    )


def test_inspect_refuses_what_is_wrong(tmp_path):
    data = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(BadArtifact, match="no such model folder"):
        inspect_data(data, model=str(tmp_path / "none"))
    with pytest.raises(InvalidInput, match="names the field 'promt'"):
        inspect_data(data, prompt_template="{promt}", completion_template="{completion}")
    with pytest.raises(InvalidInput, match="exmples: unknown setting"):
        inspect_data(data, exmples=1)


def test_prepare_cleans_splits_and_fingerprints(tmp_path):
    rows = [*ROWS, ROWS[0], ROWS[1], {"prompt": "no answer", "completion": " "}]
    made = prepare_data(write(tmp_path / "a.jsonl", rows), out=tmp_path / "out", seed=1)
    facts = made.document()
    assert (facts["rows"], facts["without_answer"], facts["duplicates"]) == (403, 1, 2) and len(facts["warnings"]) == 2
    assert facts["splits"]["train"]["rows"] == 380 and facts["splits"]["validation"]["rows"] == 20
    assert facts["splits"]["train"]["sha256"] == hashes.sha256_file(tmp_path / "out" / "train.jsonl")
    again = prepare_data(tmp_path / "a.jsonl", out=tmp_path / "again", seed=1)
    assert again.manifest.facts == made.manifest.facts and again.manifest.files == made.manifest.files
    other = prepare_data(tmp_path / "a.jsonl", out=tmp_path / "other", seed=2, keep_duplicates=True)
    assert other.manifest.facts["splits"] != made.manifest.facts["splits"] and len(read_rows(tmp_path / "other")) > 380
    with pytest.raises(BadArtifact, match="not empty"):
        prepare_data(tmp_path / "a.jsonl", out=tmp_path / "out")


def test_prepared_dataset_brings_its_splits_and_templates(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": {"b": i, "a": 1}} for i in range(64)])
    prepare_data(data, out=tmp_path / "out", prompt_template="{text}\n", completion_template="{label}")
    train, validation, templates = load_splits(tmp_path / "out")
    assert len(train) == 48 and validation is not None and len(validation) == 16
    assert tuple(templates) == ("{text}\n", "{label}")
    assert inspect_data(tmp_path / "out").document()["format"] == "template"
    assert load_splits(tmp_path / "out", validation=data)[1] == read_rows(data)
    assert load_splits(data)[1] is None
    with (tmp_path / "out" / "train.jsonl").open("a") as stream:
        stream.write('{"text": "planted", "label": 1}\n')
    with pytest.raises(BadArtifact, match="train.jsonl"):
        load_splits(tmp_path / "out")


def test_prepare_of_text_with_other_columns_drops_no_label(tmp_path):
    rows = [{"text": f"t{i // 2}", "label": "x" if i % 4 else "y"} for i in range(80)]
    made = prepare_data(write(tmp_path / "a.jsonl", rows), out=tmp_path / "out")
    # t0 stands there as y and as x; t1 twice as x.
    assert made.manifest.facts["duplicates"] == 20 and "not used: label" in " ".join(made.manifest.warnings)


def test_prepare_without_any_answer_leaves_nothing_behind(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(InvalidInput, match="none of the 1 rows"):
        prepare_data(data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
