"""Every row is seen, the loss is the supervised tokens' alone however rows are batched, and a seed gives one adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import ROWS, TEMPLATES, make_model, make_tokenizer, write_rows

import slmops
from slmops import artifact, progress
from slmops.config import FinetuneSettings, load
from slmops.errors import BadArtifact, InvalidInput, RunFailed, SlmopsError, Unavailable
from slmops.training import methods
from slmops.training.batches import IGNORED, Batches, collate
from slmops.training.curve import write_curve
from slmops.training.engines import training_arguments

Pair = tuple[list[int], list[int]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model is faster on one thread, and far faster where other processes use the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (1003, 8), (37, 5), (2000, 3)])
def test_every_row_comes_once_an_epoch(rows: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 90, rows).tolist()
    batches = Batches(lengths, size, seed=3)
    for epoch in range(3):
        found = list(batches.epoch(epoch))
        assert len(found) == len(batches) == math.ceil(rows / size)
        assert sorted(row for batch in found for row in batch) == list(range(rows))
        assert sum(len(batch) != size for batch in found) <= 1


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 500).tolist()

    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(Batches(lengths, 8, seed).epoch(epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_rows_of_like_length_share_a_batch_and_batches_come_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 2000)
    found = list(Batches(lengths.tolist(), 8, 0).epoch(0))
    padded = sum(len(batch) * max(lengths[batch]) for batch in found) / lengths.sum()
    random = np.random.default_rng(1).permutation(2000).reshape(-1, 8)
    unsorted = sum(8 * max(lengths[batch]) for batch in random) / lengths.sum()
    assert padded < 1.05 < 1.5 < unsorted
    means = [lengths[batch].mean() for batch in found]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2, "length must not drift through the epoch"


def test_rows_are_padded_on_the_left_and_targets_stand_where_they_are_predicted() -> None:
    rows = [([1, 11, 12, 13, 2], [-100, -100, -100, 13, 2]), ([1, 21, 2], [-100, 21, 2])]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 11, 12, 13], [0, 0, 1, 21]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    # The last two positions predict the last two tokens; the rest is not asked for.
    assert batch["logits_to_keep"] == 2
    assert batch["targets"].tolist() == [[13, 2], [21, 2]]


def test_rows_of_one_length_carry_no_mask() -> None:
    batch = collate([([1, 5, 6, 2], [-100, 5, -100, 2]), ([1, 7, 8, 2], [-100, -100, -100, 2])])
    assert set(batch) == {"input_ids", "targets", "logits_to_keep"}
    assert batch["targets"].tolist() == [[5, IGNORED, 2], [IGNORED, IGNORED, 2]]


# Loss --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("training") / "base")


def pairs(count: int = 6, seed: int = 0) -> list[Pair]:
    """Rows of different lengths; the completion is counted, and one turn in the middle, as in a chat."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        ids = [1, *random.integers(3, 300, 6 + 5 * i).tolist()]
        labels = [IGNORED] * (len(ids) - 3) + ids[-3:]
        if i % 2:
            labels[3] = ids[3]
        rows.append((ids, labels))
    return rows


def trainer_for(base: Path, folder: Path, rows: list[Pair], **overrides: Any) -> Any:
    """Return a SupervisedTrainer of base + LoRA whose B is not zero, so that every gradient is alive."""
    import torch

    from slmops.training.step import Padded, Step
    from slmops.training.trainer import SupervisedTrainer

    settings = load(FinetuneSettings, None, **overrides)
    torch.manual_seed(0)
    model: Any = methods.attach_adapter(methods.load_base(base, quantized=False, precision="fp32"), settings.method)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    arguments, _ = training_arguments(settings, folder, len(rows), 1, bool(rows))
    return SupervisedTrainer(model, arguments, rows, rows, 0, Step(Padded(model)), lambda kept: None)


def loss_of(trainer: Any, batch: dict[str, Any]) -> Any:
    return trainer.layout.summed_loss(trainer.model, batch)


def gradients(model: Any) -> dict[str, Any]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs)
    assert ours
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        assert scale > 0
        assert float((gradient - theirs[name]).abs().max()) <= 1e-5 * max(1, scale), name


def test_padding_changes_neither_loss_nor_gradients(base: Path, tmp_path: Path) -> None:
    rows = pairs()
    trainer = trainer_for(base, tmp_path, rows)
    together = loss_of(trainer, collate(rows))
    together.backward()
    ours = gradients(trainer.model)
    alone: Any = sum(loss_of(trainer, collate([row])) for row in rows)
    alone.backward()
    assert float(together) == pytest.approx(float(alone), abs=1e-5 * float(alone))
    assert all("lora_" in name for name in ours), "the base is frozen"
    assert_close(ours, gradients(trainer.model))


def test_the_loss_is_that_of_the_supervised_tokens_in_the_full_logits(base: Path, tmp_path: Path) -> None:
    """Written out: full logits of each row alone, cross entropy of the labels that are not -100, nothing else."""
    import torch

    rows = pairs()
    trainer = trainer_for(base, tmp_path, rows)
    assert trainer.layout.keeps
    with torch.no_grad():
        ours = float(loss_of(trainer, collate(rows)))
        expected, count = 0.0, 0
        for ids, labels in rows:
            logits = trainer.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for position in range(1, len(ids)):
                if labels[position] != IGNORED:
                    expected -= float(logits[position - 1, labels[position]])
                    count += 1
    assert count == 6 * 3 + 3
    assert ours == pytest.approx(expected, rel=1e-6)
    # What is not counted may be anything: a label set to -100 takes just its own share away.
    ids, labels = rows[1]
    with torch.no_grad():
        without = float(loss_of(trainer, collate([(ids, labels[:3] + [IGNORED] + labels[4:])])))
        share = -float(trainer.model(input_ids=torch.tensor([ids])).logits[0, 2].double().log_softmax(-1)[ids[3]])
        assert float(loss_of(trainer, collate([(ids, labels)]))) - without == pytest.approx(share, abs=1e-5)


def test_a_model_without_logits_to_keep_has_the_same_loss(base: Path, tmp_path: Path) -> None:
    rows = pairs()
    trainer = trainer_for(base, tmp_path, rows)
    batch = collate(rows)
    kept = loss_of(trainer, batch)
    kept.backward()
    ours = gradients(trainer.model)
    trainer.layout.keeps = False
    full = loss_of(trainer, batch)
    full.backward()
    assert float(kept) == pytest.approx(float(full), rel=1e-6)
    assert_close(ours, gradients(trainer.model))


def test_the_validation_loss_is_weighted_by_token(base: Path, tmp_path: Path) -> None:
    import torch

    rows = pairs(9, seed=1)
    trainer = trainer_for(base, tmp_path, rows, batch_size=1)
    with torch.no_grad():
        total = sum(float(loss_of(trainer, collate([row]))) for row in rows)
    tokens = sum(label != IGNORED for _, labels in rows for label in labels[1:])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-6)


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def finetune(base: Path, rows: Path, out: Path, **overrides: Any) -> artifact.Artifact:
    settings: dict[str, Any] = {**TEMPLATES, "validation": rows, "learning_rate": 3e-3, "batch_size": 4, "max_steps": 6, "lora_rank": 4}
    settings |= overrides
    if settings["max_steps"] >= 8 and not settings.keys() & {
        "checkpoint_steps",
        "engine",
    }:  # asked for, for these runs are over in a second
        settings.setdefault("checkpoints", settings.get("evaluations", 4))
    return slmops.finetune(base, rows, out=out, **settings)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_it_says_and_a_seed_gives_one_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    first = finetune(base, rows, tmp_path / "first")
    second = finetune(base, rows, tmp_path / "second")
    other = finetune(base, rows, tmp_path / "other", seed=1)
    assert adapter_bytes(first.path) == adapter_bytes(second.path)
    assert adapter_bytes(first.path) != adapter_bytes(other.path)
    files = {file.name for file in first.path.iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.png", "validation.jsonl", "slmops.json"}
    assert not files & {"checkpoints", "best.safetensors", "README.md"}
    assert (first.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    facts, metrics = first.manifest.facts, first.manifest.metrics
    assert facts["steps"] == 6
    assert facts["rows"] == facts["validation_rows"] == 8
    assert 0 < facts["tokens"]["supervised"] < facts["tokens"]["total"]
    losses = [point["validation_loss"] for point in curve(first.path) if "validation_loss" in point]
    assert metrics["validation_loss"]["value"] == min(losses)
    assert losses[-1] < losses[0]
    assert json.loads((first.path / "adapter_config.json").read_text())["lora_alpha"] == 8, "twice the rank"


@pytest.mark.parametrize(("precision", "loss", "norm", "rate"), [("fp32", 1e-6, 1e-6, None), ("auto", 1e-4, 1e-3, 1e-3)])
def test_accumulated_batches_are_one_large_batch(
    base: Path, rows: Path, tmp_path: Path, precision: str, loss: float, norm: float, rate: float | None
) -> None:
    """Rows have different numbers of supervised tokens, so a mean of batch means would differ.

    In bf16 the rate is low: Adam's first steps make of a gradient that is rounded to the other side of 0 a whole step the other way.
    """
    settings = {"precision": precision, "max_steps": 3} | ({"learning_rate": rate} if rate is not None else {})
    large = finetune(base, rows, tmp_path / "large", batch_size=8, **settings)
    small = finetune(base, rows, tmp_path / "small", batch_size=2, gradient_accumulation=4, **settings)
    ours, theirs = ([p for p in curve(run.path) if "gradient_norm" in p] for run in (small, large))
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=norm)


def test_the_adapter_of_the_lowest_validation_loss_is_kept(tmp_path: Path, rows: Path) -> None:
    """The base knows the rows by heart; training teaches it other answers, so validation only gets worse."""
    import torch

    from slmops.data import Interface, Tokenizer, encode_rows
    from slmops.runtime.hugging_face import load_adapted

    learned = make_model(tmp_path / "base", learned=ROWS)
    wrong = write_rows(tmp_path / "wrong.jsonl", [row | {"intent": "lamp"} for row in ROWS])
    made = finetune(learned, wrong, tmp_path / "out", validation=rows, max_steps=12, learning_rate=2e-2, precision="fp32")
    losses = [point["validation_loss"] for point in curve(made.path) if "validation_loss" in point]
    assert len(losses) == 4
    assert losses[0] == min(losses), losses
    assert losses[-1] > losses[0] + 0.1
    kept = made.manifest.metrics["validation_loss"]["value"]
    assert kept == losses[0]
    interface = Interface.model_validate(made.manifest.interface)
    model, total, count = load_adapted(learned, made.path), 0.0, 0
    for sequence in encode_rows(ROWS, Tokenizer.load(learned), interface).sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        for position in range(1, len(sequence.ids)):
            if sequence.labels[position] != IGNORED:
                total, count = total - float(logits[position - 1, sequence.labels[position]]), count + 1
    assert total / count == pytest.approx(kept, abs=1e-5)


def test_a_run_that_diverges_fails_and_leaves_nothing_that_looks_whole(base: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunFailed, match="diverged: loss is nan at step 1") as caught:
        finetune(broken, rows, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert "learning-rate" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / artifact.MANIFEST).exists()


class Stopper:
    """A sink of progress that presses Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def start(self, label: str, total: int | None, unit: str) -> Stopper:
        return self

    def advance(self, steps: int = 1, **fields: Any) -> None:
        self.steps += "tokens_per_second" in fields
        if self.steps == self.at:
            raise KeyboardInterrupt

    def finish(self, task: Any) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def interrupted(at: int, base: Path, rows: Path, out: Path, **overrides: Any) -> None:
    with progress.watch(Stopper(at)), pytest.raises(KeyboardInterrupt):
        finetune(base, rows, out, **overrides)
    assert not out.exists()


@pytest.mark.parametrize("at", [5, 7, 11])
def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(base: Path, rows: Path, tmp_path: Path, at: int) -> None:
    """Checkpoints lie at steps 3, 6 and 9 of 12, six epochs of two steps, dropout drawn all along."""
    settings: dict[str, Any] = {"max_steps": 12, "lora_dropout": 0.1}
    whole = finetune(base, rows, tmp_path / "whole", **settings)
    interrupted(at, base, rows, tmp_path / "out", **settings)
    resumed = finetune(base, rows, tmp_path / "out", resume=True, **settings)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    assert resumed.manifest.metrics == whole.manifest.metrics
    assert [p["step"] for p in curve(resumed.path)] == [p["step"] for p in curve(whole.path)]
    assert not (tmp_path / "out.partial").exists()


def test_a_resume_goes_on_in_the_middle_of_an_epoch(base: Path, tmp_path: Path) -> None:
    """Eight steps an epoch, a checkpoint after three: the five batches that are left have to be those of that epoch."""
    file = write_rows(tmp_path / "rows.jsonl", ROWS * 2)
    settings: dict[str, Any] = {"batch_size": 2, "max_steps": 12}
    whole = finetune(base, file, tmp_path / "whole", **settings)
    interrupted(5, base, file, tmp_path / "out", **settings)
    resumed = finetune(base, file, tmp_path / "out", resume=True, **settings)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)


def test_a_resume_keeps_an_older_better_adapter(tmp_path: Path, rows: Path) -> None:
    """Validation was best before the stop: what comes after it must not replace the adapter of then."""
    learned = make_model(tmp_path / "base", learned=ROWS)
    wrong = write_rows(tmp_path / "wrong.jsonl", [row | {"intent": "lamp"} for row in ROWS])
    settings: dict[str, Any] = {"validation": rows, "max_steps": 12, "learning_rate": 2e-2}
    whole = finetune(learned, wrong, tmp_path / "whole", **settings)
    interrupted(8, learned, wrong, tmp_path / "out", **settings)
    resumed = finetune(learned, wrong, tmp_path / "out", resume=True, **settings)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    assert resumed.manifest.metrics["validation_loss"] == whole.manifest.metrics["validation_loss"]


def test_a_resume_without_a_checkpoint_is_refused(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="no checkpoint") as caught:
        finetune(base, rows, tmp_path / "out", resume=True)
    assert caught.value.exit_code == 4
    interrupted(1, base, rows, tmp_path / "out", max_steps=12)  # stopped before the first checkpoint at step 3
    with pytest.raises(BadArtifact, match="no checkpoint"):
        finetune(base, rows, tmp_path / "out", resume=True, max_steps=12)
    made = finetune(base, rows, tmp_path / "out", max_steps=2)
    assert made.manifest.facts["steps"] == 2


# What is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "unknown"), [(["q_proj", "no_such"], "no_such"), (["embed_tokens"], "embed_tokens"), (["model.layers.9.q_prj"], "q_prj")]
)
def test_a_target_that_is_no_linear_layer_is_refused(base: Path, rows: Path, tmp_path: Path, targets: list[str], unknown: str) -> None:
    with pytest.raises(InvalidInput, match=unknown) as caught:
        finetune(base, rows, tmp_path / "out", target_modules=targets)
    assert caught.value.exit_code == 2
    assert "q_proj" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_only_the_targets_are_trained(base: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    made = finetune(base, rows, tmp_path / "out", target_modules=["q_proj", "down_proj"], max_steps=2)
    with safe_open(made.path / "adapter_model.safetensors", framework="np") as stored:
        modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in stored.keys()}  # noqa: SIM118
    assert modules == {"q_proj", "down_proj"}


def make_gpt2(folder: Path) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    return make_tokenizer(folder)


def test_gpt2_is_fine_tuned_and_merged_and_its_export_refused_by_name(rows: Path, tmp_path: Path) -> None:
    model = make_gpt2(tmp_path / "gpt2")
    made = finetune(model, rows, tmp_path / "adapter", max_steps=8)
    losses = [point["validation_loss"] for point in curve(made.path) if "validation_loss" in point]
    assert losses[-1] < losses[0]
    merged = slmops.merge(made.path, out=tmp_path / "merged")
    assert merged.manifest.metrics["merge_nmse"]["value"] < 1e-10
    with pytest.raises(Unavailable, match="GPT2LMHeadModel") as caught:
        slmops.export(merged.path, out=tmp_path / "export")
    assert caught.value.exit_code == 3
    assert "Llama" in caught.value.hint
    assert not (tmp_path / "export").exists()


def test_gpt2_layers_can_be_chosen_by_name(rows: Path, tmp_path: Path) -> None:
    """Its linear layers are of transformers' own class, Conv1D."""
    model = make_gpt2(tmp_path / "gpt2")
    made = finetune(model, rows, tmp_path / "adapter", max_steps=1, target_modules=["c_attn"])
    assert json.loads((made.path / "adapter_config.json").read_text())["target_modules"] == ["c_attn"]
    with pytest.raises(InvalidInput, match="q_proj"):
        finetune(model, rows, tmp_path / "other", target_modules=["q_proj"])


def test_what_is_no_causal_language_model_is_refused_before_weights_are_loaded(rows: Path, tmp_path: Path) -> None:
    model = tmp_path / "t5"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}))
    (model / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(Unavailable, match="T5ForConditionalGeneration") as caught:
        finetune(model, rows, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("no weights", BadArtifact, "no weights"),
        ("pickle", BadArtifact, "pickle"),
        ("no config", BadArtifact, "no config.json"),
        ("gone", BadArtifact, "no such model folder"),
        ("broken config", BadArtifact, "config.json"),
        ("garbage", BadArtifact, "cannot be loaded|cannot be read"),
        ("lacks a weight", BadArtifact, "lacks 1 weights, such as model.norm.weight"),
    ],
)
def test_bad_model_folders(base: Path, rows: Path, tmp_path: Path, change: str, error: type[SlmopsError], text: str) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    if change != "gone":
        model.mkdir()
        for file in base.iterdir():
            (model / file.name).write_bytes(file.read_bytes())
    weights = model / "model.safetensors"
    if change in ("no weights", "pickle"):
        weights.unlink()
    if change == "pickle":
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    if change == "no config":
        (model / "config.json").unlink()
    if change == "broken config":
        (model / "config.json").write_text("{not json")
    if change == "garbage":
        weights.write_bytes(b"these are no weights")
    if change == "lacks a weight":
        save_file({name: tensor for name, tensor in load_file(weights).items() if name != "model.norm.weight"}, weights, {"format": "pt"})
    with pytest.raises(error, match=text) as caught:
        finetune(model, rows, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_learning_rates_fall_with_size() -> None:
    rates = [methods.default_learning_rate(size) for size in (3_000_000, 135_000_000, 1_000_000_000)]
    assert rates == [1e-3, 5e-4, 2e-4]


@pytest.mark.parametrize(("rows", "accumulation", "epochs", "steps"), [(100, 1, 1, 13), (100, 4, 1, 4), (100, 1, 0.5, 6), (3, 8, 1, 1)])
def test_optimizer_steps_of_an_epoch(tmp_path: Path, rows: int, accumulation: int, epochs: float, steps: int) -> None:
    settings = load(FinetuneSettings, None, gradient_accumulation=accumulation, epochs=epochs)
    arguments, found = training_arguments(settings, tmp_path, rows, 1, True)
    assert (found, arguments.max_steps) == (steps, steps)
    assert arguments.eval_steps == math.ceil(steps / 4)
    # A run of a few steps is over sooner than its checkpoint would be of use.
    assert (str(arguments.save_strategy.value), arguments.save_steps) == (("steps", 4) if steps == 13 else ("no", steps))


def test_the_curve_is_data_and_a_picture(tmp_path: Path) -> None:
    history: Sequence[dict[str, Any]] = [
        {"step": 1, "loss": 3.0, "epoch": 0.5, "learning_rate": 1e-3, "grad_norm": 2.0},
        {"step": 2, "eval_loss": 2.5, "epoch": 1.0},
        {"step": 2, "train_runtime": 3.0},
    ]
    write_curve(tmp_path, list(history))
    assert curve(tmp_path) == [
        {"step": 1, "epoch": 0.5, "loss": 3.0, "learning_rate": 1e-3, "gradient_norm": 2.0},
        {"step": 2, "epoch": 1.0, "validation_loss": 2.5},
    ]
    assert (tmp_path / "loss.png").stat().st_size > 5000
