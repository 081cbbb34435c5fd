"""`evaluate`: right and wrong answers, intervals, perplexity, the same on every engine; what is refused."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import slmops
from slmops import artifact
from slmops.data import Encoded, Interface
from slmops.errors import BadArtifact, InvalidInput
from slmops.evaluation import Answer, answer_rows, perplexity, score, token_losses
from slmops.evaluation.losses import surprise
from slmops.runtime.loading import open_model

QUICK: dict[str, Any] = tiny.TEMPLATES | {"threads": 1}  # two threads of torch on busy cores wait for each other at every layer
WRONG = [{"text": "play some jazz", "intent": "weather"}, {"text": "how warm is it", "intent": "banana"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that knows `tiny.ROWS` by heart, an adapter on it, its fp32 export, and data with two wrong rows of ten."""
    root = tmp_path_factory.mktemp("evaluation")
    model = tiny.make_model(root / "model", learned=tiny.ROWS)
    return {
        "model": model,
        "adapter": tiny.make_adapter(root / "adapter", model, scale=1.0),
        "export": tiny.make_export(root / "export", model, "fp32"),
        "data": tiny.write_rows(root / "rows.jsonl", [*tiny.ROWS, *WRONG]),
    }


def answers(*pairs: tuple[str, str]) -> list[Answer]:
    return [Answer("", expected, predicted, expected.strip() == predicted.strip(), [1], [2]) for expected, predicted in pairs]


@pytest.mark.parametrize("kind", ["model", "export"])
def test_right_and_wrong_answers_are_counted_and_kept(kind: str, folders: dict[str, Path], tmp_path: Path):
    done = slmops.evaluate(folders[kind], folders["data"], **QUICK, predictions=tmp_path / "p.jsonl").document()
    estimate = done["metrics"]["exact_match"]
    assert (estimate["value"], estimate["n"]) == (0.8, 10)
    # Wilson's interval for 8 of 10, as in the literature: 0.490 to 0.943.
    assert (round(estimate["low"], 3), round(estimate["high"], 3)) == (0.49, 0.943)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "play some jazz\nIntent:", "expected": " music", "predicted": " music", "correct": True}
    assert lines[8] == {"prompt": "play some jazz\nIntent:", "expected": " weather", "predicted": " music", "correct": False}
    assert [line["correct"] for line in lines] == [True] * 8 + [False] * 2
    assert done["command"] == "evaluate" and done["ok"] and done["warnings"] == []


def test_torch_and_package_are_asked_the_same_ids_and_answer_the_same(folders: dict[str, Path]):
    rows = [{"text": text, "intent": "music"} for text in ("play jazz", "rain", "the lamp is on and it is cold outside today", "light")]
    found = []
    for kind in ("model", "export"):
        loaded = open_model(folders[kind], threads=1)
        interface = loaded.interface.model_copy(update=tiny.TEMPLATES)
        found.append(answer_rows(type(loaded)(loaded.runner, loaded.tokenizer, interface, None, kind), rows, batch_size=2))
    assert found[0] == found[1]
    assert found[0][0].prompt_ids[0] == 1  # BOS


def test_an_answer_ends_at_eight_tokens_more_than_the_longest_expected(folders: dict[str, Path], tmp_path: Path):
    rows = tiny.write_rows(tmp_path / "r.jsonl", [{"text": "", "intent": "zzzz"}])
    endless = tiny.make_model(tmp_path / "random", seed=3)
    changed = QUICK | {"prompt_template": "{text}:", "completion_template": "{intent}"}
    done = slmops.evaluate(endless, rows, **changed, predictions=tmp_path / "p.jsonl")
    assert any("1 of 1 answers did not end by themselves and were cut at" in warning for warning in done.warnings)
    short = slmops.evaluate(folders["model"], folders["data"], **QUICK, max_new_tokens=1, predictions=tmp_path / "q.jsonl")
    assert short.metrics["exact_match"].value < 0.8


def test_adapter_and_its_base(folders: dict[str, Path], tmp_path: Path):
    def predicted(name: str, **settings: Any) -> list[str]:
        slmops.evaluate(folders[name], folders["data"], **QUICK, predictions=tmp_path / "p.jsonl", **settings)
        return [json.loads(line)["predicted"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]

    assert predicted("adapter", base=True) == predicted("model")
    assert predicted("adapter") != predicted("model")


def test_answers_lie_beside_the_model_and_leave_its_hashes_alone(folders: dict[str, Path]):
    done = slmops.evaluate(folders["export"], folders["data"], **QUICK, max_rows=3, metric="accuracy")
    assert done.predictions == folders["export"].parent / "export.evaluations" / "rows-accuracy.jsonl"
    assert done.rows == 3 and len(done.predictions.read_text().splitlines()) == 3
    assert artifact.changed_files(artifact.load(folders["export"])) == []
    with pytest.raises(InvalidInput, match="whose hashes it would break"):
        slmops.evaluate(folders["export"], folders["data"], **QUICK, predictions=folders["export"] / "p.jsonl")
    with pytest.raises(InvalidInput, match="the data itself"):
        slmops.evaluate(folders["export"], folders["data"], **QUICK, predictions=folders["data"])


def test_a_changed_export_is_not_evaluated(folders: dict[str, Path], tmp_path: Path):
    import shutil

    changed = Path(shutil.copytree(folders["export"], tmp_path / "changed"))
    data = changed / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BadArtifact, match=r"model\.onnx\.data: content changed"):
        slmops.evaluate(changed, folders["data"], **QUICK)


def test_accuracy_counts_an_answer_outside_the_labels_as_wrong():
    some = answers(("a", " a"), ("a", "b"), ("b", "b "), ("b", "maybe b"))
    assert score(some, "accuracy").value == score(some, "exact_match").value == 0.5


def test_macro_f1_by_hand_and_its_interval():
    # a: TP 1, expected 2, predicted 1 -> 2/3. b: TP 1, expected 2, predicted 2 -> 1/2; "maybe b" is outside the labels.
    some = answers(("a", " a"), ("a", "b"), ("b", "b "), ("b", "maybe b"))
    estimate = score(some, "f1")
    assert estimate.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1 and estimate.n == 4
    assert score(some, "f1") == estimate  # seeded
    perfect = score(answers(*[("a", "a"), ("b", "b")] * 20), "f1")
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)
    many = score(answers(*[("a", "a"), ("b", "b"), ("b", "a"), ("a", "a")] * 100), "f1")
    assert many.high - many.low < 0.15 and many.low < many.value < many.high
    with pytest.raises(InvalidInput, match="metric bleu"):
        score(some, "bleu")


@pytest.mark.parametrize("kind", ["model", "export"])
def test_perplexity_is_exp_of_pytorchs_own_loss_over_the_completion_and_its_stop_token(kind: str, folders: dict[str, Path], tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.data import Tokenizer, encode_rows

    rows = [*tiny.ROWS, *WRONG]
    done = slmops.evaluate(folders[kind], folders["data"], **QUICK, metric="perplexity", predictions=tmp_path / "p.jsonl")
    interface = Interface(**tiny.TEMPLATES, bos_token_id=1, stop_token_ids=(2,), max_length_tokens=tiny.POSITIONS)
    model = AutoModelForCausalLM.from_pretrained(folders["model"], dtype=torch.float32)
    nats, tokens = 0.0, 0
    for sequence in encode_rows(rows, Tokenizer.load(folders["model"]), interface).sequences:
        assert sequence.labels[-1] == 2
        count = sum(label >= 0 for label in sequence.labels)
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([sequence.ids]), labels=torch.tensor([sequence.labels])).loss
        nats, tokens = nats + float(loss) * count, tokens + count
    estimate = done.metrics["perplexity"]
    assert estimate.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert estimate.low < estimate.value < estimate.high and estimate.n == 10
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert sum(line["tokens"] for line in lines) == tokens and lines[0]["correct"] is None
    assert lines[8]["nats"] > lines[0]["nats"] + 1  # a wrong answer surprises


def test_surprise_is_the_negative_log_softmax():
    logits = np.array([[0.0, math.log(3.0)], [1000.0, 0.0]], np.float32)
    assert surprise(logits, np.array([1, 0])) == pytest.approx([math.log(4 / 3), 0.0])


class Uniform:
    """A runner whose every token is equally likely, and which sees how many rows of its logits are alive at once."""

    engine, folder, max_length_tokens, threads = "uniform", Path(), 64, 1

    def __init__(self) -> None:
        self.most_alive = 0

    def logits(self, rows: list[list[int]]) -> Iterator[np.ndarray]:
        alive: list[weakref.ref[np.ndarray]] = []
        for row in rows:
            made = np.zeros((len(row), 50), np.float32)
            alive.append(weakref.ref(made))
            self.most_alive = max(self.most_alive, sum(one() is not None for one in alive))
            yield made
            del made


def test_losses_hold_the_logits_of_few_rows_and_come_back_in_order():
    sequences = [Encoded([1] * length, [-100, *[1] * (length - 1)], 0) for length in (9, 3, 7, 2, 5) * 20]
    runner: Any = Uniform()
    losses = token_losses(runner, sequences)
    assert [loss.tokens for loss in losses] == [8, 2, 6, 1, 4] * 20
    assert runner.most_alive <= 2
    estimate = perplexity(losses)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((50, 50, 50), rel=1e-6)


def test_rows_that_were_cut_are_counted(folders: dict[str, Path], tmp_path: Path):
    rows = tiny.write_rows(tmp_path / "long.jsonl", [{"text": "play " * 200, "intent": "music"}, tiny.ROWS[0]])
    done = slmops.evaluate(folders["model"], rows, **QUICK, predictions=tmp_path / "p.jsonl")
    assert any(warning.startswith("1 of 2 rows are longer than 128 tokens and were cut") for warning in done.warnings)


def test_what_has_no_answers_is_refused(folders: dict[str, Path], tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("only text\n")
    with pytest.raises(InvalidInput, match="plain text has no answer"):
        slmops.evaluate(folders["model"], text)
    assert (
        slmops.evaluate(folders["model"], text, metric="perplexity", threads=1, predictions=tmp_path / "p.jsonl")
        .metrics["perplexity"]
        .value
        > 1
    )
    with pytest.raises(InvalidInput, match="banana"):
        slmops.evaluate(folders["model"], folders["data"], prompt_template="{banana}", completion_template="{intent}")
    with pytest.raises(InvalidInput, match=r"no such data file"):
        slmops.evaluate(folders["model"], tmp_path / "nothing.jsonl")
    missing = tmp_path / "missing.jsonl"
    missing.write_text(json.dumps(tiny.ROWS[0]) + "\n" + json.dumps({"text": "x"}) + "\n")
    with pytest.raises(InvalidInput, match="row 2"):
        slmops.evaluate(folders["model"], missing, **QUICK)


def test_of_a_prepared_dataset_the_validation_rows_are_measured(folders: dict[str, Path], tmp_path: Path):
    rows = [{"text": f"{row['text']} {i}", "intent": row["intent"]} for i in range(10) for row in tiny.ROWS]
    prepared = slmops.prepare_data(tiny.write_rows(tmp_path / "all.jsonl", rows), out=tmp_path / "prepared", **tiny.TEMPLATES)
    held_out = (prepared.path / "validation.jsonl").read_text().splitlines()
    done = slmops.evaluate(folders["model"], prepared.path, threads=1, predictions=tmp_path / "p.jsonl")
    assert done.rows == len(held_out) == 16
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == f"{json.loads(held_out[0])['text']}\nIntent:"
