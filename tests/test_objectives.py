"""Objectives train on what they say: TRL sees our ids, tasks come in their shares, a loss of one's own is called and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import COMPLETION, PROMPT, ROWS, TEMPLATES, make_model, write_rows

import slmops
from slmops import artifact
from slmops.cli import main
from slmops.config import FinetuneSettings, load
from slmops.data import Interface, Pair, Tokenizer, encode_pairs, preference_rows
from slmops.errors import BadArtifact, InvalidInput, SlmopsError, Unavailable
from slmops.training import methods, objectives
from slmops.training.engines import training_arguments
from slmops.training.mixture import Mixture, Source, apportioned, shares
from slmops.training.objectives.material import AS_SFT, Setup
from slmops.training.objectives.own_loss import load_loss

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "contrastive_loss.py"
OTHER = {"music": "weather", "weather": "light", "light": "music"}
PREFERRED = [{**row, "other": OTHER[row["intent"]]} for row in ROWS]
PAIRS = {"prompt_template": PROMPT, "chosen_template": COMPLETION, "rejected_template": " {other}"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("objectives") / "base")


@pytest.fixture(scope="module")
def preferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", PREFERRED)


def finetune(base: Path, data: Path | None, out: Path, **overrides: Any) -> artifact.Artifact:
    settings: dict[str, Any] = {
        "lora_rank": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "validation": data,
        "threads": 1,
        "precision": "fp32",
    }
    return slmops.finetune(base, data, out=out, **{key: value for key, value in (settings | overrides).items() if value is not None})


# Mixtures ----------------------------------------------------------------------------------------------------------


def test_shares_follow_size_temperature_and_weights() -> None:
    assert shares([900, 100]) == [0.9, 0.1]
    assert np.allclose(shares([900, 100], temperature=2), [0.75, 0.25])  # sqrt: 30 to 10
    assert np.allclose(shares([900, 100], temperature=1e9), [0.5, 0.5])
    assert shares([900, 100], weights=[1, 3]) == [0.25, 0.75]
    assert apportioned(1000, [0.9, 0.1]) == [900, 100]
    assert apportioned(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert apportioned(10, [0.999, 0.001]) == [10, 1], "every source comes"


def test_a_mixture_draws_its_numbers_and_no_row_twice_before_all_came() -> None:
    sources = (Source("large", 100, 40), Source("small", 7, 10))
    mixture = Mixture(sources, list(range(5, 112)), 8, seed=3)
    seen = np.zeros(107, int)
    for number in range(5):
        batches = list(mixture.epoch(number))
        rows = [row for batch in batches for row in batch]
        assert len(batches) == len(mixture) == 7
        assert sum(row < 100 for row in rows) == 40 and sum(row >= 100 for row in rows) == 10
        seen += np.bincount(rows, minlength=107)
    assert set(seen[:100]) == {2}, "two whole rounds of 100 in five epochs of 40"
    assert seen[100:].max() - seen[100:].min() <= 1
    assert list(mixture.epoch(1)) == list(Mixture(sources, list(range(5, 112)), 8, seed=3).epoch(1))
    assert list(mixture.epoch(1)) != list(Mixture(sources, list(range(5, 112)), 8, seed=4).epoch(1))


# Multitask ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = write_rows(tmp_path_factory.mktemp("tasks") / "rows.jsonl")
    few = write_rows(rows.parent / "few.jsonl", ROWS[:2])
    return {
        "intent": {"data": str(rows), **TEMPLATES, "validation": str(rows)},
        "echo": {"data": str(few), "prompt_template": "{text}\nEcho:", "completion_template": " {text}", "validation": str(few)},
    }


def test_multitask_learns_each_task_and_measures_each(base: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    made = finetune(base, None, tmp_path / "both", objective="multitask", task=tasks, task_temperature=1e9, max_steps=40)
    facts, metrics = made.manifest.facts, made.manifest.metrics
    assert {name: (task["rows"], task["rows_per_epoch"]) for name, task in facts["tasks"].items()} == {"intent": (8, 5), "echo": (2, 5)}
    own = {name: metrics[f"validation_loss_{name}"]["value"] for name in tasks}
    assert metrics["validation_loss"]["value"] == pytest.approx(sum(own.values()) / 2), "the plain mean chooses the best adapter"
    assert max(own.values()) < 0.5 * math.log(320), "half of what knowing nothing costs"
    for name, task in tasks.items():
        asked = {key: task[key] for key in ("prompt_template", "completion_template")}
        loss = slmops.evaluate(made.path, task["data"], metric="perplexity", predictions=tmp_path / "p.jsonl", **asked)
        assert math.log(loss.metrics["perplexity"].value) == pytest.approx(own[name], abs=1e-3)
    curve = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert {f"validation_loss_{name}" for name in tasks} <= {key for point in curve for key in point}
    both = [json.loads(line) for line in (made.path / "validation.jsonl").read_text().splitlines()]
    assert {row["task"] for row in both} == set(tasks)
    # One interface asks all tasks: their rows hold what each template made.
    assert slmops.evaluate(made.path, made.path / "validation.jsonl", predictions=tmp_path / "p.jsonl").rows == 10


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": None}, "there is no task"),
        ({"task": ["intent"]}, "'intent' is no NAME=VALUE"),
        ({"task": ["a=x.jsonl", "a=y.jsonl"]}, "a is named twice"),
        ({"task_weight": ["b=2"]}, "there is no task b"),
        ({"task_weight": ["intent=none"]}, "no number above 0"),
        ({"task_weight": ["intent=2"], "task_temperature": 2}, "both say how often"),
        ({"task": {"intent": {"data": "x", "weigth": 2}}}, "weigth: unknown"),
        ({"validation": "x.jsonl"}, "belongs to no task"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(base: Path, tasks: dict[str, Any], tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        slmops.finetune(base, out=tmp_path / "out", **({"objective": "multitask", "task": tasks} | change))


def test_flags_and_a_mapping_say_the_same(tasks: dict[str, Any]) -> None:
    mapped = load(FinetuneSettings, {"objective": "multitask", "task": {"a": "x.jsonl", "b": {"data": "y.jsonl", "weight": 2}}})
    flags = load(FinetuneSettings, None, objective="multitask", task=["a=x.jsonl", "b=y.jsonl"], task_weight=["b=2"])
    assert mapped == flags


def test_a_pipeline_finds_the_tasks_beside_its_file(base: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    from slmops.pipeline.plan import read_plan

    write_rows(tmp_path / "rows.jsonl")
    step = "{objective: multitask, task: {a: rows.jsonl, b: rows.jsonl}, task_prompt_template: {a: '{text}'}, max_steps: 1}"
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"model: {base}\nsteps:\n  finetune: {step}\n")
    plan = read_plan(file)
    inputs = {role: plan.place(reference) for role, reference in plan.steps[0].inputs.items()}
    assert inputs == {"source": str(base), "task.a": str(tmp_path / "rows.jsonl"), "task.b": str(tmp_path / "rows.jsonl")}
    file.write_text(f"model: {base}\nsteps:\n  finetune: {step[:-1]}, data: rows.jsonl, loss: own.py:Own}}\n")
    with pytest.raises(InvalidInput, match="finetune.data: belongs to no task.*finetune.loss: a pipeline runs nobody's own code"):
        read_plan(file)


# Preferences -------------------------------------------------------------------------------------------------------


def encoded(base: Path) -> tuple[list[Pair], Interface]:
    interface = Interface(
        prompt_template=PROMPT, completion_template=COMPLETION, bos_token_id=1, stop_token_ids=(2,), max_length_tokens=128
    )
    rows = preference_rows(PREFERRED, chosen_template=COMPLETION, rejected_template=" {other}")
    return encode_pairs(rows, Tokenizer.load(base), interface, rejected_template=" {other}")[0], interface


def setup_of(model: Any, folder: Path, settings: FinetuneSettings) -> Setup:
    from slmops.data import Corpus

    arguments, _ = training_arguments(settings, folder, len(ROWS), 1, True)
    return Setup(AS_SFT, Corpus.empty(), Corpus.empty(), model, arguments, lambda kept: None)


def test_dpo_trains_on_our_ids_against_the_base(base: Path, tmp_path: Path) -> None:
    from slmops.training.objectives.trl_trainers import dpo_trainer

    settings = load(FinetuneSettings, None, objective="dpo", batch_size=8)
    pairs, _ = encoded(base)
    model: Any = methods.attach_adapter(methods.load_base(base, quantized=False, precision="fp32"), settings.method)
    trainer = dpo_trainer(setup_of(model, tmp_path, settings), pairs, pairs, base, settings)
    assert not trainer.args.bf16 and not trainer.args.gradient_checkpointing and trainer.args.max_length is None
    assert list(model.peft_config) == ["default"], "the reference is the adapter turned off, no copy of it"
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = batch["input_ids"].chunk(2)
    kept = [batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() for i in range(len(batch["input_ids"]))]
    assert len(chosen) == len(rejected) == 8
    assert sorted(kept) == sorted(sequence.ids for pair in pairs for sequence in pair.both)
    answers = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert sorted(answers) == sorted([answer for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)])
    loss = float(trainer.compute_loss(trainer.model, batch))
    assert loss == pytest.approx(math.log(2), abs=1e-5), "an adapter that does nothing is the reference itself"


def test_dpo_moves_the_margin_and_its_figures_agree_with_trls(base: Path, preferred: Path, tmp_path: Path) -> None:
    made = finetune(base, preferred, tmp_path / "dpo", objective="dpo", max_steps=12, learning_rate=3e-3, evaluations=1, **PAIRS)
    effects, last = made.manifest.facts["effects"], made.manifest.metrics
    change = effects["margin"]["change"]
    assert change["value"] > 2 and change["low"] > 0
    assert effects["margin"]["after"]["value"] == pytest.approx(effects["margin"]["before"]["value"] + change["value"])
    # DPO's loss of the held-out pairs, from our margins before and after: -log sigmoid(beta (after - before)), nearly so of their mean.
    assert last["validation_loss"]["value"] < math.log(2)
    assert last["validation_loss"]["value"] == pytest.approx(math.log1p(math.exp(-0.1 * change["value"])), abs=0.02)
    again = slmops.evaluate(made.path, preferred, metric="pairwise_accuracy", predictions=tmp_path / "p.jsonl")
    assert again.metrics["margin"].value == pytest.approx(effects["margin"]["after"]["value"], abs=1e-3)
    before = slmops.evaluate(made.path, preferred, metric="pairwise_accuracy", base=True, predictions=tmp_path / "p.jsonl")
    assert before.metrics["margin"].value == pytest.approx(effects["margin"]["before"]["value"], abs=1e-3)
    assert not [path.name for path in made.path.iterdir() if path.is_dir()], "no copy of the reference, no checkpoint"


@pytest.fixture(scope="module")
def reward(base: Path, preferred: Path, tmp_path_factory: pytest.TempPathFactory) -> artifact.Artifact:
    out = tmp_path_factory.mktemp("reward") / "reward"
    return finetune(base, preferred, out, objective="reward", max_steps=40, evaluations=2, **PAIRS)


def test_a_reward_model_is_right_on_what_it_learned_and_scores_the_same_again(
    reward: artifact.Artifact, base: Path, preferred: Path, tmp_path: Path
) -> None:
    assert reward.manifest.metrics["pairwise_accuracy"]["value"] == 1.0
    result = slmops.evaluate(reward.path, preferred, predictions=tmp_path / "p.jsonl")
    assert result.metrics["pairwise_accuracy"].value == 1.0
    assert result.metrics["margin"].value == pytest.approx(reward.manifest.metrics["margin"]["value"], abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["predicted"].strip() for line in lines] == [row["intent"] for row in ROWS]


def test_the_score_is_that_of_the_stop_token_padded_or_not(reward: artifact.Artifact, base: Path, tmp_path: Path) -> None:
    import torch

    from slmops.runtime import reward_model
    from slmops.training.objectives.trl_trainers import reward_trainer

    pairs, interface = encoded(base)
    scored = reward_model.load_reward(reward.path)
    settings = load(FinetuneSettings, None, objective="reward", batch_size=8)
    trainer = reward_trainer(
        setup_of(scored.model, tmp_path, settings), pairs, pairs, base, settings, reward_model.padding_token(interface)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["attention_mask"].min() == 0, "rows of different length, so that something is padded"
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(ids) == sorted(sequence.ids for pair in pairs for sequence in pair.both)
    with torch.no_grad():
        padded = scored.model(**batch).logits[:, 0]
        shortened = scored.model(input_ids=torch.tensor([ids[0][:-1]])).logits[0, 0]
    assert padded.tolist() == pytest.approx(scored.scores(ids), abs=1e-4)
    assert abs(float(shortened) - float(padded[0])) > 1e-3, "without its stop token a text has another score"


def test_what_needs_text_refuses_a_reward_model(reward: artifact.Artifact, preferred: Path, tmp_path: Path) -> None:
    assert set(reward.manifest.facts["roads"]) == {"merge", "pack", "export"}
    out = tmp_path / "out"
    with pytest.raises(Unavailable, match="is a reward model"):
        slmops.merge(reward.path, out=out)
    with pytest.raises(Unavailable, match="is a reward model"):
        slmops.export(reward.path, out=out, precision="fp32")
    with pytest.raises(Unavailable, match="is a reward model"):
        slmops.pack(reward.find("base"), adapter=[f"r={reward.path}"], out=out)
    with pytest.raises(InvalidInput, match="is a reward model"):
        slmops.evaluate(reward.path, preferred, metric="exact_match")
    assert not out.exists()


# A loss of one's own -----------------------------------------------------------------------------------------------

CROSS_ENTROPY = """
class CrossEntropy:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, model, batch):
        assert [row["intent"] for row in batch["rows"]]
        return self.scale * model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
        ).loss
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "own.py"
    file.write_text(text)
    return file


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_cross_entropy_written_as_ones_own_loss_trains_as_sft_does(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = {**TEMPLATES, "batch_size": 8, "max_steps": 3, "learning_rate": 1e-3}
    plain = finetune(base, rows, tmp_path / "plain", **settings)
    own = finetune(base, rows, tmp_path / "own", loss=f"{written(tmp_path, CROSS_ENTROPY)}:CrossEntropy", **settings)
    halves = finetune(
        base,
        rows,
        tmp_path / "scaled",
        loss=f"{tmp_path / 'own.py'}:CrossEntropy",
        loss_args=["scale=3"],
        **settings,
    )
    assert own.manifest.metrics["validation_loss"]["value"] == pytest.approx(plain.manifest.metrics["validation_loss"]["value"], rel=1e-4)
    assert halves.manifest.metrics["validation_loss"]["value"] > 2 * own.manifest.metrics["validation_loss"]["value"]
    for name, weight in tensors(plain.path).items():
        assert np.allclose(weight, tensors(own.path)[name], atol=2e-5), name
    assert own.manifest.facts["loss"] == {"file": "own.py", "class": "CrossEntropy", "args": []}
    assert own.manifest.input("loss") is not None


def test_accumulated_batches_count_by_their_rows(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:6])
    text = (
        "import torch\n\n\nclass Length:\n    def __call__(self, model, batch):\n"
        "        logits = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits\n"
        "        return logits[torch.arange(len(logits)), batch['prompt_tokens'] - 1].square().mean()\n"
    )
    loss = f"{written(tmp_path, text)}:Length"
    whole = finetune(base, rows, tmp_path / "whole", loss=loss, batch_size=6, max_steps=2, learning_rate=1e-3, **TEMPLATES)
    parts = finetune(
        base, rows, tmp_path / "parts", loss=loss, batch_size=4, gradient_accumulation=2, max_steps=2, learning_rate=1e-3, **TEMPLATES
    )
    for name, weight in tensors(whole.path).items():
        assert np.allclose(weight, tensors(parts.path)[name], atol=1e-5), name


def test_the_example_is_the_papers_formula_and_lowers_it(base: Path, tmp_path: Path) -> None:
    import torch

    loss = load_loss(f"{EXAMPLE}:ContrastiveLoss", ["label=intent", "temperature=0.5"])
    assert (loss.loss.label, loss.loss.temperature) == ("intent", 0.5)  # type: ignore[attr-defined]
    formula = __import__("sys").modules[type(loss.loss).__module__].supervised_contrastive
    vectors = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    labels = ["a", "b", "a", "b", "a"]
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).double().numpy()
    terms = []
    for i in range(5):
        total = sum(math.exp(unit[i] @ unit[k] / 0.5) for k in range(5) if k != i)
        alike = [p for p in range(5) if p != i and labels[p] == labels[i]]
        terms.append(-sum(math.log(math.exp(unit[i] @ unit[p] / 0.5) / total) for p in alike) / len(alike))
    assert float(formula(vectors, labels, 0.5)) == pytest.approx(np.mean(terms), abs=1e-5)
    assert float(formula(vectors, list("abcde"), 0.5)) == 0.0
    rows = write_rows(tmp_path / "rows.jsonl")
    words = {"loss": f"{EXAMPLE}:ContrastiveLoss", "loss_args": ["label=intent", "temperature=0.5"], "batch_size": 8, **TEMPLATES}
    made = finetune(base, rows, tmp_path / "out", max_steps=15, **words)
    first, last = [line["loss"] for line in map(json.loads, (made.path / "metrics.jsonl").read_text().splitlines()) if "loss" in line][::14]
    assert last < 0.7 * first


@pytest.mark.parametrize(
    ("text", "given", "arguments", "message"),
    [
        ("x = 1", "own.py", [], "is no FILE.py:CLASS"),
        ("x = 1", "gone.py:Loss", [], "no such file"),
        ("class Los:\n    pass", "own.py:Loss", [], "has no class Loss"),
        ("class Loss:\n    pass", "own.py:Loss", [], "own.py line 1: Loss has no __call__"),
        ("\n\nclass Loss\n", "own.py:Loss", [], "own.py line 3: "),
        ("import math\n\nx = math.sqrt(-1)", "own.py:Loss", [], "own.py line 3: ValueError"),
        (CROSS_ENTROPY, "own.py:CrossEntropy", ["scal=2"], "own.py line 2: CrossEntropy: TypeError: .*'scal'"),
        (CROSS_ENTROPY, "own.py:CrossEntropy", ["scale"], "'scale' is no NAME=VALUE"),
    ],
)
def test_a_loss_that_cannot_be_made_is_told_with_its_line(
    tmp_path: Path, text: str, given: str, arguments: list[str], message: str
) -> None:
    written(tmp_path, text)
    with pytest.raises(InvalidInput, match=message):
        load_loss(str(tmp_path / given) if ":" in given else given, arguments)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return batch['nothing']", "own.py line 3: Loss raised KeyError"),
        ("return 0.5", "own.py line 1: Loss returned a float"),
        ("return batch['input_ids'].float()", "Loss returned a tensor of shape"),
        ("return model(input_ids=batch['input_ids']).logits.sum().detach()", "depends on no trainable weight"),
        ("return float('nan') * model(input_ids=batch['input_ids']).logits.sum()", "diverged"),
    ],
)
def test_a_loss_that_goes_wrong_is_told_with_its_line(base: Path, tmp_path: Path, body: str, message: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    file = written(tmp_path, f"class Loss:\n    def __call__(self, model, batch):\n        {body}\n")
    with pytest.raises(SlmopsError, match=message):
        finetune(base, rows, tmp_path / "out", loss=f"{file}:Loss", **TEMPLATES)


# What does not go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"dpo_beta": 0.5}, InvalidInput, "objective sft has no setting dpo_beta"),
        ({"objective": "pretrain", "task": ["a=b"]}, InvalidInput, "objective pretrain has no setting task"),
        ({"objective": "dpo", "loss": "x.py:X"}, InvalidInput, "objective dpo has no setting loss"),
        ({"loss_args": ["a=1"]}, InvalidInput, "objective sft has no setting loss_args"),
        ({"objective": "dpo", "engine": "olive"}, Unavailable, "engine olive has no objective dpo"),
        ({"objective": "dpo", "replay": "x.txt"}, InvalidInput, "replay cannot be mixed"),
        ({"objective": "reward", "retain": "x.txt"}, InvalidInput, "gives no text"),
        ({"engine": "olive", "replay": "x.txt"}, Unavailable, "engine olive"),
    ],
)
def test_settings_of_another_objective_are_refused_by_name(settings: dict[str, Any], error: type[SlmopsError], text: str) -> None:
    with pytest.raises(error, match=text):
        objectives.chosen(load(FinetuneSettings, None, **settings), "data.jsonl")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"method": "qlora"}, "method qlora is not open to it"),
        ({"completion_template": " {intent}"}, "there are two completions"),
        ({"chosen_template": None, "rejected_template": None}, "without --chosen-template"),
        ({"train_on": "all"}, "a preference is of answers"),
    ],
)
def test_dpo_refuses_what_it_cannot_mean(base: Path, preferred: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        finetune(base, preferred, tmp_path / "out", **({"objective": "dpo", **PAIRS} | settings))


def test_rslora_of_a_reward_model_has_rsloras_own_scale(base: Path, preferred: Path, tmp_path: Path) -> None:
    made = finetune(base, preferred, tmp_path / "out", objective="reward", method="rslora", max_steps=1, validation_share=0.0, **PAIRS)
    details = json.loads((made.path / "adapter_config.json").read_text())
    assert (details["use_rslora"], details["lora_alpha"], details["task_type"]) == (True, 8, "SEQ_CLS")


def test_a_missing_library_is_told_with_its_pip_line(base: Path, preferred: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    with pytest.raises(Unavailable, match="trl") as error:
        finetune(base, preferred, tmp_path / "out", objective="dpo", **PAIRS)
    assert "slmops[preference]" in error.value.hint


def test_data_that_is_missing_is_an_error_of_usage(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["finetune", str(base), "-o", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "objective sft: DATA is missing" in capfd.readouterr().err


def test_templates_of_tasks_given_as_flags_have_their_escapes_decoded(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    words = ["--task", f"a={rows}", "--task-prompt-template", r"a={gone}\nIntent:", "--task-completion-template", "a= {intent}"]
    with pytest.raises(SystemExit) as end:
        main(["finetune", str(base), "-o", str(tmp_path / "out"), "--objective", "multitask", *words])
    assert end.value.code == 2
    assert r"task a: template '{gone}\nIntent:' names the field 'gone'" in capfd.readouterr().err


def test_a_run_with_another_loss_file_is_another_run(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    file = written(tmp_path, CROSS_ENTROPY)
    settings = load(FinetuneSettings, None, loss=f"{file}:CrossEntropy")
    before = objectives.files_of(settings)
    from slmops.training import checkpoints

    first = checkpoints.identity(base, rows, settings, None, before)
    file.write_text(CROSS_ENTROPY + "\n# changed\n")
    assert checkpoints.identity(base, rows, settings, None, before) != first
    with pytest.raises(BadArtifact):
        checkpoints.prepare(tmp_path / "nothing", first, resume=True)
