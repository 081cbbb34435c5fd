"""The quickstart: its demo data, and the whole road end to end with its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slmops import artifact, demo
from slmops.cli.commands import root
from slmops.data import choose_interface
from slmops.errors import BadArtifact, InvalidInput
from slmops.pipeline import quickstart
from slmops.pipeline.demonstration import _NEXT


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The demo's data


def test_the_data_is_seeded_balanced_and_without_overlap(tmp_path: Path):
    data = demo.write_data(tmp_path / "a")
    train, test = rows_of(data.train), rows_of(data.test)
    assert (len(train), len(test)) == (1500, 200)
    assert len({row["text"] for row in (*train, *test)}) == 1700
    counts = Counter(row["intent"] for row in train)
    assert set(counts) == set(demo.INTENTS) and max(counts.values()) - min(counts.values()) <= 1
    again, other = demo.write_data(tmp_path / "b"), demo.write_data(tmp_path / "c", seed=1)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in data]
    assert other.train.read_bytes() != data.train.read_bytes()


def test_no_single_verb_gives_the_intent_away(tmp_path: Path):
    train = rows_of(demo.write_data(tmp_path).train)
    for word in ("set", "turn", "put", "stop", "tell"):
        intents = {row["intent"] for row in train if word in row["text"].split()}
        assert len(intents) >= 2, word


def test_the_plain_text_holds_no_prompt_of_the_task(tmp_path: Path):
    text = demo.write_data(tmp_path).stories.read_text()
    assert "Intent" not in text
    assert 100_000 < len(text) < 2_000_000
    assert "{" not in text and "@" not in text


def test_data_that_is_the_same_is_left_alone(tmp_path: Path):
    before = demo.write_data(tmp_path).train.stat().st_mtime_ns
    assert demo.write_data(tmp_path).train.stat().st_mtime_ns == before


# What it refuses, and what it says next


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(BadArtifact, match="was not written by the quickstart"):
            quickstart(out=tmp_path, force=force)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(BadArtifact, match="is a file"):
        quickstart(out=tmp_path / "notes.txt")
    with pytest.raises(InvalidInput, match="precision"):
        quickstart(out=tmp_path / "new", precision="int3")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("line", _NEXT)
def test_what_to_type_next_is_a_command(line: str):
    program, verb, *words = line.replace("@PRECISION@", "int4").split()
    assert program == "slmops"
    command = root.get_command(None, verb)  # pyright: ignore[reportArgumentType]
    assert command is not None
    command.make_context(verb, words)


# The whole road


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart") / "demo"


def typed(*words: str) -> tuple[dict[str, Any], str]:
    """Type a quickstart; return its document and what it said on stderr."""
    command = [sys.executable, "-c", "from slmops.cli import main; main()", "quickstart", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_whole_road_offline_and_proven(folder: Path):
    document, _ = typed("-o", str(folder))
    assert document["ok"] and document["passed"]
    assert [step["status"] for step in document["steps"]] == ["done"] * 8
    figures = document["figures"]
    assert figures["exact_match_base"] <= 0.05
    assert figures["exact_match_finetuned"] >= 0.95
    assert figures["exact_match_package"] >= figures["exact_match_finetuned"] - 0.01
    assert figures["verified"] is True
    assert figures["size_bytes"] < 900_000  # of one million weights, 512 bytes of vocabulary a token included
    assert figures["size_ratio"] > 4
    assert figures["decode_ratio"] > 1
    assert document["bench"]["ratio"]["decode"]["value"] == figures["decode_ratio"]
    assert document["sample"] == {"prompt": "turn off the lights in the attic", "text": "light"}
    assert document["next"][0].startswith("slmops finetune ")
    stages = {stage["name"]: stage["status"] for stage in document["steps"][5]["document"]["stages"]}
    assert stages["logits"] == stages["retention"] == "pass"
    assert (folder / "NEXT.md").read_text().count("@") == 0

    interface, warnings = choose_interface(folder / "base", [])
    assert warnings == []
    assert interface.stop_token_ids == (2,) and interface.bos_token_id == 1
    assert artifact.load(folder / "base").manifest.facts["parameters"] == 984_192


@pytest.mark.slow
def test_again_in_the_same_folder_nothing_is_done_again(folder: Path):
    document, said = typed("-o", str(folder))
    assert [step["status"] for step in document["steps"]] == ["skipped"] * 8
    assert "pre-train" not in said
    assert document["figures"]["verified"] is True

    # Another precision: the fine-tune stays.
    document, _ = typed("-o", str(folder), "--precision", "int8")
    assert [step["status"] for step in document["steps"]] == ["skipped"] * 4 + ["done"] * 4
    assert document["figures"]["exact_match_package"] >= document["figures"]["exact_match_finetuned"] - 0.005
