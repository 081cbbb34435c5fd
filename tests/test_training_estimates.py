"""What a run will take is told before it begins, and held against what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TEMPLATES, make_model, write_rows

import slmops
from slmops import environment, progress
from slmops.config import FinetuneSettings, load
from slmops.data import Corpus, Encoded
from slmops.errors import InvalidInput, RunFailed

pytest.importorskip("torch", reason="needs the extra slmops[train]")

from slmops.training import methods  # noqa: E402
from slmops.training.estimating import Load, Sizes, activation_bytes, estimate, measure_load, read_sizes  # noqa: E402
from slmops.training.step.kernels import Kernels  # noqa: E402

SIZES = Sizes(width=576, layers=30, heads=9, key_heads=3, head_width=64, inner=1536, vocabulary=49152, linear=1, base=1, trained=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("estimate") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("estimate") / "rows.jsonl")


def finetune(base: Path, rows: Path, out: Path, **settings: Any) -> slmops.artifact.Artifact:
    given = {**TEMPLATES, "validation_share": 0, "max_steps": 4, "batch_size": 4, "precision": "fp32", "learning_rate": 3e-3}
    return slmops.finetune(base, rows, out=out, **(given | settings))


@pytest.mark.parametrize("method", ["lora", "full", "dora", "adalora", "ia3", "prefix", "prompt", "bottleneck", "loreft"])
def test_what_is_trained_is_counted_without_a_weight(base: Path, method: str) -> None:
    from slmops.runtime.hugging_face import load_model

    settings = load(FinetuneSettings, None, method=method)
    sizes = read_sizes(base, settings)
    model: Any = load_model(base)
    assert sizes.base == sum(p.numel() for p in model.parameters())
    adapted = methods.attach_adapter(model, settings.method)
    assert sizes.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_batches_of_the_run_are_laid_out() -> None:
    lengths, counted = [10, 20, 30, 40], [1, 2, 3, 4]
    plain = measure_load(lengths, counted, batch_size=2, seed=0)
    assert plain == Load(tokens=70, longest=40, lines=80, supervised=7, mean_tokens=50, mean_supervised=5, shapes=2)
    filled = measure_load(lengths, counted, batch_size=2, seed=0, multiple=32)
    assert (filled.tokens, filled.supervised, filled.mean_tokens) == (96, 32, 64)
    alike = measure_load(lengths, counted, batch_size=2, seed=0, shared=8)
    assert (alike.tokens, alike.longest, alike.lines) == (62, 40, 80)
    padded = measure_load(lengths, counted, batch_size=2, seed=0, before=5)
    assert (padded.tokens, padded.longest, padded.lines) == (90, 45, 90)


class Compact(Kernels):
    """What the compiled kernels hold."""

    holds_scores = False


def test_what_a_step_holds_grows_with_the_batch_and_with_the_square_of_a_row() -> None:
    short = Load(tokens=256, longest=32, lines=256, supervised=64, mean_tokens=256, mean_supervised=64, shapes=1)
    long = Load(tokens=256, longest=128, lines=256, supervised=64, mean_tokens=256, mean_supervised=64, shapes=1)
    twice = Load(tokens=512, longest=32, lines=512, supervised=64, mean_tokens=512, mean_supervised=64, shapes=1)
    held = activation_bytes(SIZES, short, 2, Kernels(), by_hand=True)
    assert activation_bytes(SIZES, twice, 2, Kernels(), by_hand=True) == 2 * held
    assert activation_bytes(SIZES, long, 2, Kernels(), by_hand=True) - held == 30 * 256 * 4 * 9 * (128 - 32)
    assert activation_bytes(SIZES, short, 2, Compact(), by_hand=True) == activation_bytes(SIZES, long, 2, Compact(), by_hand=True) < held


def test_a_run_says_before_what_it_takes_and_keeps_both(base: Path, rows: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    with progress.watch(Heard(heard)):
        made = finetune(base, rows, tmp_path / "out")
    said = made.manifest.facts["estimate"]
    assert any(f"about {said['memory_bytes'] / 1e9:.2f} GB of memory" in line for line in heard)
    assert said["memory_ratio"] == pytest.approx(said["memory_bytes"] / made.manifest.facts["peak_memory_bytes"], abs=1e-3)
    assert 0.6 < said["memory_ratio"] < 1.5, "of a process that ran other tests before; benchmarks/estimates.py has the bar"
    assert not said["recomputes_activations"]


def test_more_rows_a_batch_take_more(base: Path, rows: Path) -> None:
    train = Corpus([Encoded([5] * 40, [-100] * 30 + [5] * 10, 30)] * 64)

    def needed(**settings: Any) -> int:
        return estimate(base, train, 0, load(FinetuneSettings, None, **settings), "fp32", 10).activations_bytes

    assert needed(batch_size=32) > 3 * needed(batch_size=8)
    settings = load(FinetuneSettings, None, batch_size=32)
    whole, again = (estimate(base, train, 0, settings, "fp32", 10, recomputes=recomputes) for recomputes in (False, True))
    assert again.activations_bytes < whole.activations_bytes
    assert again.seconds > whole.seconds


def test_a_run_that_cannot_fit_is_refused_before_it_loads(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "memory_bytes", lambda: (8 << 30, 1 << 20))
    with pytest.raises(RunFailed, match="of memory more, and 0.0 GB are available"):
        finetune(base, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_are_computed_twice_where_a_run_fits_only_so(base: Path, rows: Path, tmp_path: Path) -> None:
    plain = finetune(base, rows, tmp_path / "plain")
    again = finetune(base, rows, tmp_path / "again", activation_checkpoints="on")
    assert again.manifest.facts["estimate"]["recomputes_activations"]
    losses = [made.manifest.metrics["train_loss"]["value"] for made in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(InvalidInput, match="has no activation_checkpoints"):
        finetune(base, rows, tmp_path / "olive", engine="olive", activation_checkpoints="on", precision="auto")


class Heard:
    """A sink of progress that keeps what is said."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def start(self, label: str, total: int | None, unit: str) -> Heard:
        return self

    def advance(self, steps: int = 1, **fields: Any) -> None: ...

    def say(self, text: str) -> None:
        self.lines.append(text)

    def finish(self, task: Any) -> None: ...
