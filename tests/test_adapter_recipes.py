"""Every recipe in `adapters/` says what it must, builds from its own data, meets its gate, and works packed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import slmops
from slmops.config import FinetuneSettings, flat, load
from slmops.pipeline import demonstration

RECIPES = sorted(path.parent for path in (ROOT / "adapters").glob("*/finetune.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_whole(recipe: Path) -> None:
    load(FinetuneSettings, recipe / "finetune.yaml")
    gate = yaml.safe_load((recipe / "gate.yaml").read_text())
    assert gate and all(0 < bar <= 1 for bar in gate.values())
    card = (recipe / "README.md").read_text()
    for word in ("task", "data", "base", "method", "gate", "measured", "limits", "licence"):
        assert f"| {word} |" in card
    assert f"[{recipe.name}]({recipe.name}/)" in (recipe.parent / "README.md").read_text()


def test_the_quickstart_trains_the_first_recipe() -> None:
    recipe = ROOT / "adapters" / "household_intent"
    steps = yaml.safe_load(demonstration._PIPELINE.replace("@PRECISION@", "int4").replace("@SEED@", "0"))["steps"]
    assert flat(load(FinetuneSettings, steps["finetune"])) == flat(load(FinetuneSettings, recipe / "finetune.yaml"))
    assert steps["evaluate_finetuned"]["gate"] == steps["evaluate"]["gate"] == yaml.safe_load((recipe / "gate.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_builds_and_meets_its_gate(recipe: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, recipe / "data.py", tmp_path], check=True, capture_output=True)
    rows, gate = tmp_path / "data" / "test.jsonl", yaml.safe_load((recipe / "gate.yaml").read_text())
    adapter = slmops.finetune(
        tmp_path / "base", tmp_path / "data" / "train.jsonl", out=tmp_path / "adapter", config=recipe / "finetune.yaml"
    )
    package = slmops.pack(tmp_path / "base", adapter=[f"it={adapter.path}"], out=tmp_path / "package")
    for metric, bar in gate.items():
        assert slmops.evaluate(tmp_path / "base", rows, metric=metric, config=_templates(recipe)).metrics[metric].high < bar
        assert slmops.evaluate(adapter.path, rows, metric=metric).metrics[metric].value >= bar
        assert slmops.evaluate(package.path, rows, metric=metric, adapter="it").metrics[metric].value >= bar
    found = slmops.verify(package.path, data=f"it={rows}", metric=next(iter(gate)))
    assert found.failed_stage is None, [stage.explanation for stage in found.stages]


def _templates(recipe: Path) -> dict[str, str]:
    settings = yaml.safe_load((recipe / "finetune.yaml").read_text())
    return {key: settings[key] for key in ("prompt_template", "completion_template")}
