"""What a fine-tune cost on old data is what `evaluate` would say, the bar warns, and replayed rows are counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import ROWS, TEMPLATES, make_model, write_rows

import slmops
from slmops import artifact
from slmops.config import FinetuneSettings, load
from slmops.data import Interface, Tokenizer, encode_blocks, encode_rows, read_rows
from slmops.errors import InvalidInput
from slmops.results import Estimate
from slmops.training import forgetting
from slmops.training.effects import Effect, Score
from slmops.training.objectives.material import Material

OLD = "\n\n".join(f"{row['text']}, and then {row['text']} once more" for row in ROWS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows `ROWS` by heart, those rows, and an old text."""
    folder = tmp_path_factory.mktemp("forgetting")
    make_model(folder / "base", learned=ROWS)
    write_rows(folder / "rows.jsonl")
    (folder / "old.txt").write_text(OLD)
    (folder / "new.txt").write_text("\n\n".join(f"{row['intent']} of {row['text']}" for row in ROWS * 3))
    return folder


def finetune(place: Path, data: str, out: Path, **overrides: Any) -> artifact.Artifact:
    settings: dict[str, Any] = {"lora_rank": 4, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 6, "threads": 1, "precision": "fp32"}
    return slmops.finetune(place / "base", place / data, out=out, **(settings | overrides))


def perplexity(model: Path, data: Path, folder: Path, **settings: Any) -> float:
    return slmops.evaluate(model, data, metric="perplexity", predictions=folder / "p.jsonl", **settings).metrics["perplexity"].value


@pytest.mark.slow
def test_pretraining_lowers_perplexity_and_says_what_evaluate_says(place: Path, tmp_path: Path) -> None:
    made = finetune(
        place,
        "new.txt",
        tmp_path / "out",
        objective="pretrain",
        validation=place / "new.txt",
        retain=place / "old.txt",
        max_steps=None,
        epochs=24,
    )
    own, old = made.manifest.facts["effects"]["validation"], made.manifest.facts["forgetting"]
    assert own["after"]["value"] < 0.7 * own["before"]["value"]
    for effect, data in ((own, place / "new.txt"), (old, place / "old.txt")):
        for when, settings in (("before", {"base": True}), ("after", {})):
            said = perplexity(made.path, data, tmp_path, **settings)
            assert effect[when]["value"] == pytest.approx(said, rel=1e-5), (data.name, when)
        assert effect["change"]["value"] == pytest.approx(effect["after"]["value"] / effect["before"]["value"] - 1, rel=1e-5)
    assert made.manifest.metrics["validation_perplexity"]["value"] == own["after"]["value"]
    assert made.manifest.facts["blocks"]["count"] > 1
    assert "ended_early" not in made.manifest.facts
    assert {item.role for item in made.manifest.inputs} >= {"base", "dataset", "retain"}


def test_the_task_that_a_model_knew_is_measured_and_its_loss_warned_of(place: Path, tmp_path: Path) -> None:
    wrong = write_rows(tmp_path / "wrong.jsonl", [{**row, "intent": "never mind"} for row in ROWS])
    made = slmops.finetune(
        place / "base",
        wrong,
        out=tmp_path / "out",
        retain=place / "rows.jsonl",
        retain_metric="exact_match",
        lora_rank=4,
        learning_rate=1e-2,
        max_steps=15,
        validation=wrong,
        threads=1,
        **TEMPLATES,
    )
    facts = made.manifest.facts["forgetting"]
    assert (facts["before"]["value"], facts["after"]["value"], facts["lost"], facts["passed"]) == (1.0, 0.0, 1.0, False)
    assert [warning for warning in made.manifest.warnings if warning.startswith("forgetting: exact_match on rows.jsonl fell from 1 to 0")]


def effect(before: list[float], after: list[float], metric: str = "perplexity") -> Effect:
    def score(values: list[float]) -> Score:
        mean = sum(values) / len(values)
        value = math.exp(mean) if metric == "perplexity" else mean
        return Score(Estimate(value, value, value, len(values)), values, [1] * len(values), metric)

    return Effect(score(before), score(after))


@pytest.mark.parametrize(
    ("metric", "before", "after", "bar", "warns"),
    [
        ("perplexity", [1.0, 2.0], [1.09, 2.09], 0.1, False),  # exp(0.09) = 1.094
        ("perplexity", [1.0, 2.0], [1.10, 2.10], 0.1, True),  # exp(0.10) = 1.105
        ("perplexity", [1.0, 2.0], [0.5, 1.0], 0.0, False),
        ("exact_match", [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], 0.25, False),
        ("exact_match", [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], 0.25, True),
        ("exact_match", [0.0, 0.0], [0.0, 0.0], 0.1, False),
    ],
)
def test_both_sides_of_the_bar(metric: str, before: list[float], after: list[float], bar: float, warns: bool) -> None:
    settings = load(FinetuneSettings, None, retain="old.txt", retain_bar=bar)
    facts, warning = forgetting.verdict(effect(before, after, metric), settings)
    assert (warning is not None) == warns == (not facts["passed"])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_replayed_rows_are_counted_and_encoded_as_text(place: Path, share: float) -> None:
    tokenizer = Tokenizer.load(place / "base")
    interface = Interface(**TEMPLATES, bos_token_id=1, stop_token_ids=(2,), max_length_tokens=128)
    train = encode_rows(ROWS * 5, tokenizer, interface)
    settings = load(FinetuneSettings, None, replay=place / "old.txt", replay_share=share)
    material, warnings = forgetting.with_replay(Material(None, interface, train, train, []), settings, place / "base")
    order, facts = material.course.order, material.course.facts["replay"]
    assert order is not None
    count = {0.1: 4, 0.5: 40}[share]  # of 40 new rows: 4 in 44 is the nearest to a tenth
    longest = max(len(sequence.ids) for sequence in train.sequences)
    blocks = encode_blocks(
        read_rows(place / "old.txt"),
        tokenizer,
        interface.model_copy(update={"prompt_template": None, "completion_template": None}),
        length_tokens=longest,
    )
    assert [sequence.ids for sequence in material.train.sequences[40:]] == [block.ids for block in blocks.sequences]
    for epoch in range(2):
        rows = [row for batch in order.epoch(epoch) for row in batch]
        assert sum(row >= 40 for row in rows) == count == facts["rows_per_epoch"]
        assert sorted(row for row in rows if row < 40) == list(range(40)), "every new row once"
    assert facts["share"] == round(count / (40 + count), 4)
    assert material.train.rows == train.rows
    assert bool(warnings) == (count > len(blocks.sequences))


@pytest.mark.slow
def test_replay_is_trained_on_and_forgets_less(place: Path, tmp_path: Path) -> None:
    settings = {"retain": place / "old.txt", "validation": place / "rows.jsonl", "max_steps": 30, **TEMPLATES}
    alone = finetune(place, "rows.jsonl", tmp_path / "alone", **settings)
    mixed = finetune(place, "rows.jsonl", tmp_path / "mixed", replay=place / "old.txt", replay_share=0.3, **settings)
    assert mixed.manifest.facts["forgetting"]["after"]["value"] < alone.manifest.facts["forgetting"]["after"]["value"]
    assert mixed.manifest.facts["replay"]["share"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"retain": "gone.txt"}, "no such data file"),
        ({"retain": "old.txt", "retain_metric": "exact_match"}, "plain text, which has no answers"),
        ({"retain": "rows.jsonl", "retain_prompt_template": "{text}"}, "without --retain-completion-template"),
        ({"replay": "gone.txt"}, "no such data file"),
    ],
)
def test_old_data_that_does_not_fit_is_refused_before_training(place: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    given = {key: place / value if key in ("retain", "replay") else value for key, value in settings.items()}
    with pytest.raises(InvalidInput, match=text):
        finetune(place, "rows.jsonl", tmp_path / "out", **given, **TEMPLATES)
    assert not (tmp_path / "out.partial" / "checkpoints").exists()
