"""The quickstart: what it refuses, and the whole road end to end with its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops import artifact
from slmops.cli.commands import root
from slmops.data import choose_interface
from slmops.demo.recipes import RECIPES
from slmops.errors import BadArtifact, InvalidInput
from slmops.pipeline import quickstart
from slmops.pipeline.demonstration import _NEXT

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
    assert {step["status"] for step in document["steps"]} == {"done"}
    figures = document["figures"]
    assert figures["exact_match_base"] <= 0.05
    assert figures["exact_match_finetuned"] >= 0.95
    for recipe in RECIPES[1:]:
        assert figures[f"exact_match_{recipe.name}"] >= recipe.gate
    assert figures["package_verified"] is True
    assert all(figures[f"exact_match_{recipe.name}_packed"] >= recipe.gate for recipe in RECIPES)
    assert figures["exact_match_package"] >= figures["exact_match_finetuned"] - 0.01
    assert figures["verified"] is True
    assert figures["size_bytes"] < 900_000  # of one million weights, 512 bytes of vocabulary a token included
    assert figures["size_ratio"] > 4
    assert figures["decode_ratio"] > 1
    assert document["bench"]["ratio"]["decode"]["value"] == figures["decode_ratio"]
    assert document["sample"] == {"prompt": "turn off the lights in the attic", "text": "light"}
    assert document["answers"] == {
        "intent": "light",
        "slots": '{"device":"lamp","room":"attic","state":"off"}',
        "replies": "With pleasure. I will see to the light in the attic.",
    }
    assert document["next"][0].startswith("slmops finetune ")
    verify = next(step for step in document["steps"] if step["name"] == "verify")
    stages = {stage["name"]: stage["status"] for stage in verify["document"]["stages"]}
    assert stages["logits"] == stages["retention"] == "pass"
    assert (folder / "NEXT.md").read_text().count("@") == 0

    interface, warnings = choose_interface(folder / "runs" / "household", [])
    assert warnings == []
    assert interface.stop_token_ids == (2,) and interface.bos_token_id == 1
    assert artifact.load(folder / "runs" / "household").manifest.facts["parameters"] == 984_192


@pytest.mark.slow
def test_again_in_the_same_folder_nothing_is_done_again(folder: Path):
    document, said = typed("-o", str(folder))
    assert {step["status"] for step in document["steps"]} == {"skipped"}
    assert "pre-train" not in said
    assert document["figures"]["verified"] is True

    # Another precision: fine-tunes stay, but for the one that learns on the quantized base.
    document, _ = typed("-o", str(folder), "--precision", "int8")
    statuses = {step["name"]: step["status"] for step in document["steps"]}
    packed = {f"{recipe.name}_packed" for recipe in RECIPES}
    assert {name for name, status in statuses.items() if status == "done"} == {
        *("household_int8", "package", "package_proof", "export", "verify", "evaluate", "bench"),
        *("slots", "slots_before", "slots_after"),
        *packed,
    }
    assert {status for name, status in statuses.items() if name in ("household", "intent", "replies", "merge")} == {"skipped"}
    assert document["figures"]["exact_match_package"] >= document["figures"]["exact_match_finetuned"] - 0.005
