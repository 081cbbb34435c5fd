"""The recipes in `adapters/`: their rows, their files, and (slow) that each builds from nothing and meets its gate."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slmops import demo
from slmops.config import flat
from slmops.demo import household, tasks
from slmops.demo.recipes import RECIPES, Recipe
from slmops.pipeline import run
from slmops.pipeline.plan import read_plan

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "adapters").glob("*/pipeline.yaml"))
CARD = ("Task", "Data", "Base", "Settings", "Gate", "Measured", "Limits", "Licence")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The rows


def test_the_rows_are_seeded_balanced_and_in_one_file_each(tmp_path: Path):
    data = demo.write_data(tmp_path / "a")
    parts = [rows_of(path) for path in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == list(data.rows.values()) == [1500, 100, 200]
    assert len({row["text"] for part in parts for row in part}) == 1800
    counts = Counter(row["intent"] for row in parts[0])
    assert set(counts) == set(demo.INTENTS) and max(counts.values()) - min(counts.values()) <= 1
    again, other = demo.write_data(tmp_path / "b"), demo.write_data(tmp_path / "c", seed=1)
    assert [path.read_bytes() for path in again[:4]] == [path.read_bytes() for path in data[:4]]
    assert other.train.read_bytes() != data.train.read_bytes()


def test_no_single_verb_gives_the_intent_away(tmp_path: Path):
    train = rows_of(demo.write_data(tmp_path).train)
    for word in ("set", "turn", "put", "stop", "tell"):
        intents = {row["intent"] for row in train if word in row["text"].split()}
        assert len(intents) >= 2, word


def test_a_text_has_one_answer_in_each_task():
    # Otherwise no model could be right on it: the grammar must not make the same words in two ways that mean different things.
    answers: dict[str, str] = {}
    source = random.Random(1)
    for _ in range(30_000):
        row = tasks.row_of(household.command_of(source, source.choice(demo.INTENTS)))
        text = row.pop("text")
        assert answers.setdefault(text, json.dumps(row)) == json.dumps(row), text


def test_what_is_said_is_what_the_slots_hold(tmp_path: Path):
    for row in rows_of(demo.write_data(tmp_path).train):
        for key, value in row["slots"].items():
            for words in value if isinstance(value, list) else [value]:
                assert key == "device" or isinstance(words, int) or words in row["text"], row


@pytest.mark.parametrize(
    ("parts", "intent", "slots", "reply"),
    [
        (
            (("on", "off"), ("lamp", "lights"), ("room", "attic")),
            "light",
            {"room": "attic", "state": "off"},
            "see to the light in the attic.",
        ),
        ((("number", "forty"), ("room", "hall")), "light", {"room": "hall", "percent": 40}, "see to the light in the hall."),
        ((("food", "milk"), ("food", "tea")), "shopping", {"food": ["milk", "tea"]}, "put the milk on the list."),
        ((("number", "two"), ("duration", "two hours"), ("name", "Tom")), "timer", {"person": "Tom", "hours": 2}, "mind the time for Tom."),
        ((("degrees", "twenty one degrees"),), "heating", {"degrees": 21}, "see to the heating."),
        ((), "door", {}, "see who is there."),
    ],
)
def test_slots_and_reply_of_a_command(parts: tuple[tuple[str, str], ...], intent: str, slots: dict[str, Any], reply: str):
    command = household.Command("please do", intent, parts)
    found = tasks.slots_of(command)
    device = found.pop("device")
    assert found == slots and list(found) == list(slots), "the same keys in the same order"
    assert device not in {tasks.slots_of(household.Command("", other, ()))["device"] for other in demo.INTENTS if other != intent}
    assert tasks.reply_of(command) == f"With pleasure. I will {reply}"


def test_the_plain_text_holds_no_prompt_and_no_row_of_a_task(tmp_path: Path):
    data = demo.write_data(tmp_path)
    text = data.stories.read_text()
    assert not [recipe.prompt for recipe in RECIPES if recipe.prompt in text]
    said = {story.partition(". ")[0] for story in text.split("\n\n")}
    rows = {row["text"] for path in (data.train, data.validation, data.test) for row in rows_of(path)}
    assert len(said) > 5000 and not said & rows
    assert 100_000 < len(text) < 2_000_000
    assert not re.search(r"\{\w+\}|@", text)  # a list of the grammar that was not filled in


# The files


def test_the_recipes_are_there():
    assert [folder.name for folder in FOLDERS] == sorted(recipe.folder for recipe in RECIPES)
    assert len(FOLDERS) >= 3
    kinds = {(recipe.rank, recipe.targets) for recipe in RECIPES}
    assert len(kinds) == len(RECIPES), "ranks and layers differ on purpose"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_pipeline_file_is_what_the_code_writes(recipe: Recipe):
    file = ROOT / "adapters" / recipe.folder / "pipeline.yaml"
    assert file.read_text() == recipe.pipeline(), "python -m slmops.demo.recipes adapters"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_recipe_is_whole(folder: Path):
    plan = read_plan(folder / "pipeline.yaml")
    finetunes = [step for step in plan.steps if step.verb == "finetune"]
    gates = [step for step in plan.steps if step.gate]
    assert len(finetunes) == 1 and gates, "an adapter and its gate"
    files = [gates[0].inputs["data"].file, finetunes[0].inputs["data"].file, finetunes[0].inputs["validation"].file]
    assert len(set(files)) == 3, "trained, chosen and measured on three files"

    card = (folder / "README.md").read_text()
    assert [name for name in CARD if f"**{name}.**" not in card] == []
    settings = flat(finetunes[0].settings)
    assert f"rank {settings['lora_rank']}" in card
    assert all(name in card for name in settings["target_modules"] or ["all linear layers"])
    assert f"{gates[0].gate[0].figure} of at least {gates[0].gate[0].value:g}" in card.replace("exact match", "exact_match")


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_recipe_builds_from_nothing_and_meets_its_gate(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    copies = tmp_path_factory.getbasetemp() / "adapters"  # the recipes share the base that the first of them makes
    shutil.copytree(folder, copies / folder.name)
    result = run(copies / folder.name / "pipeline.yaml")
    assert result.passed, result.failed
    step = next(step for step in result.steps if step.verb == "finetune")
    before, after, packed, proof = (result.step(f"{step.name}_{what}") for what in ("before", "after", "packed", "package_proof"))
    assert before is not None and before.figures()["exact_match"] <= 0.05
    assert after is not None and after.figures()["exact_match"] >= 0.9
    assert packed is not None and packed.figures()["exact_match"] >= 0.9
    stages = {stage["name"]: stage["status"] for stage in proof.result["stages"]} if proof is not None else {}
    assert stages["adapters"] == stages["self_test"] == "pass", stages
