"""Every key that Olive would drop without a word is found, and every workflow that we ship or write is clean."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import InvalidInput, Unavailable

pytest.importorskip("olive", reason="needs the extra slmops[olive]")

from slmops.olive_backend import problems, validate

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "olive_configs").glob("*.json"))
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of a workflow count from the working directory."""
    monkeypatch.chdir(ROOT)


def lora() -> dict[str, Any]:
    return json.loads((ROOT / "olive_configs" / "lora_cpu.json").read_text())


def settings(workflow: dict[str, Any]) -> dict[str, Any]:
    return workflow["passes"]["adapter"]["config"]


def arguments(workflow: dict[str, Any]) -> dict[str, Any]:
    return settings(workflow)["training_args"]


def component(workflow: dict[str, Any]) -> dict[str, Any]:
    return workflow["data_configs"][0]["load_dataset_config"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_workflow_is_clean(path: Path) -> None:
    assert validate(path) == json.loads(path.read_text())


def test_there_are_workflows() -> None:
    assert {path.name for path in CONFIGS} >= {"lora_cpu.json", "qlora_cpu.json"}


WRONG: list[tuple[str, Change, str]] = [
    ("top key", lambda w: w.update(sedd=1), "workflow: unknown key 'sedd'"),
    ("engine key", lambda w: w.update(engine={"cash_dir": "x"}), "engine: unknown key 'cash_dir' (did you mean cache_dir?)"),
    ("pass type", lambda w: w["passes"]["adapter"].update(type="LoRa2"), "passes.adapter: ValueError: Package configuration for pass"),
    ("pass key", lambda w: settings(w).update(rank=4), "passes.adapter: unknown key 'rank'"),
    ("pass key beside", lambda w: w["passes"]["adapter"].update(lora_alpha=4), "passes.adapter: unknown key 'lora_alpha'"),
    ("training key", lambda w: arguments(w).update(lr=4), "passes.adapter.training_args: unknown key 'lr'"),
    ("nested training key", lambda w: arguments(w).update(extra_args={"lr": 4}), "passes.adapter.training_args: unknown key 'lr'"),
    ("warmup_ratio", lambda w: arguments(w).update(warmup_ratio=0.1), "'warmup_ratio' is dropped by Olive: give warmup_steps"),
    ("fp16", lambda w: arguments(w).update(fp16=True), "'fp16' is dropped by Olive: give the pass's torch_dtype"),
    ("data key", lambda w: w["data_configs"][0].update(max_samples=4), "data_configs[0]: unknown key 'max_samples'"),
    ("component type", lambda w: component(w).update(type="slmops_row"), "data_configs[0]: Olive refuses it: KeyError"),
    ("component parameter", lambda w: component(w)["params"].update(pth=4), "load_dataset_config: unknown key 'pth' (did you mean path?)"),
    ("component lacks", lambda w: component(w)["params"].pop("model"), "load_dataset_config: required key 'model' is missing"),
    ("user script", lambda w: w["data_configs"][0].update(user_script="no.py"), "no.py doesn't exist"),
    ("data name", lambda w: settings(w).update(train_data_config="trian"), "train_data_config: no data config is named 'trian'"),
    ("inline data", lambda w: settings(w).update(train_data_config={"name": "x", "sise": 1}), "train_data_config: unknown key 'sise'"),
    ("model key", lambda w: w["input_model"].update(model_pth="x"), "input_model: unknown key 'model_pth' (did you mean model_path?)"),
    ("model type", lambda w: w["input_model"].update(type="HFModle"), "input_model: unknown type 'HFModle'"),
    ("required", lambda w: settings(w).pop("train_data_config"), "passes.adapter: required key 'train_data_config' is missing"),
    ("rank as text", lambda w: settings(w).update(r="many"), "passes.adapter: Olive refuses it: r: Input should be a valid integer"),
    ("dtype", lambda w: settings(w).update(torch_dtype="float31"), "torch_dtype: 'float31' is none of bfloat16, float16, float32"),
    ("targets as text", lambda w: settings(w).update(target_modules="all-linear"), "target_modules: Input should be a valid list"),
    ("scheduler", lambda w: arguments(w).update(lr_scheduler_type="zigzag"), "training_args: Olive refuses it: ValueError"),
    ("rate as text", lambda w: arguments(w).update(learning_rate="fast"), "learning_rate: Input should be a valid number"),
    ("no passes", lambda w: w.update(passes={}), "passes: must be a mapping, and not empty"),
    ("passes as list", lambda w: w.update(passes=["LoRA"]), "passes: must be a mapping, and not empty"),
    ("pass as text", lambda w: w.update(passes={"a": "LoRA"}), "passes.a: must be a mapping, not a str"),
    ("pass config as text", lambda w: w["passes"]["adapter"].update(config="r=4"), "passes.adapter.config: must be a mapping"),
    ("data as mapping", lambda w: w.update(data_configs={"name": "x"}), "data_configs: must be a list"),
    ("model as text", lambda w: w.update(input_model="model"), "input_model: must be a mapping, and not empty"),
    (
        "name twice",
        lambda w: w["data_configs"].append(copy.deepcopy(w["data_configs"][0])),
        "data_configs: Data config name train is duplicated",
    ),
]


@pytest.mark.parametrize(("change", "expected"), [(change, text) for _, change, text in WRONG], ids=[name for name, _, _ in WRONG])
def test_what_olive_would_drop_is_a_problem(change: Change, expected: str) -> None:
    workflow = lora()
    change(workflow)
    before = copy.deepcopy(workflow)
    found = problems(workflow)
    assert any(expected in problem for problem in found), found
    assert all("\n" not in problem for problem in found)
    assert workflow == before  # Olive changes what it is given; the caller's mapping stays as it is


def test_all_problems_at_once() -> None:
    workflow = lora()
    workflow["sedd"] = 1
    settings(workflow)["rank"] = 4
    arguments(workflow)["warmup_ratio"] = 0.1
    assert len(problems(workflow)) == 3


def test_no_mapping() -> None:
    assert problems(["LoRA"]) == ["workflow: must be a mapping, not a list"]  # type: ignore[arg-type]


def test_validate_names_file_and_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{\n  "passes": ,\n}')
    with pytest.raises(InvalidInput, match=r"broken\.json line 2: broken JSON"):
        validate(broken)
    with pytest.raises(InvalidInput, match="no such file"):
        validate(tmp_path / "none.json")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({**lora(), "sedd": 1}))
    with pytest.raises(
        InvalidInput, match=r"wrong\.json is not a workflow that Olive would follow: workflow: unknown key 'sedd'"
    ) as caught:
        validate(wrong)
    assert caught.value.exit_code == 2


def test_a_qlora_adapter_is_not_merged_into_the_float_base(tmp_path: Path) -> None:
    """Olive would, without a word; of a LoRA adapter it is right."""
    merging = lora()
    merging["passes"]["merge"] = {"type": "MergeAdapterWeights"}
    path = tmp_path / "w.json"
    path.write_text(json.dumps(merging))
    assert validate(path) == merging
    quantized = json.loads((ROOT / "olive_configs" / "qlora_cpu.json").read_text())
    path.write_text(json.dumps(quantized | {"passes": {**quantized["passes"], **{"merge": {"type": "MergeAdapterWeights"}}}}))
    with pytest.raises(Unavailable, match="on the base in float, and it learned on it in nf4") as caught:
        validate(path)
    assert caught.value.exit_code == 3
    assert "slmops finetune MODEL ROWS --method qlora --engine olive" in caught.value.hint


def test_without_olive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tabulate", None)
    with pytest.raises(Unavailable, match="tabulate is not installed; it is needed to check a workflow") as caught:
        problems(lora())
    assert (caught.value.exit_code, caught.value.hint) == (3, "pip install 'slmops[olive]'")
