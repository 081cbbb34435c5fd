"""What the planner foretells is what the quantizer does: layer by layer against a package, and against the loss measured in the logits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny import ROWS, TEMPLATES, make_adapter, make_export, make_model, write_rows

import slmops
from slmops.adapters.planning import BAR, FINE, KEEP, RAISE, Plan, plan_changes, plan_model
from slmops.errors import InvalidInput, Unavailable
from slmops.graph.quantization import Scheme, quantize
from slmops.graph.recipes import recipe_for
from slmops.runtime.loading import open_runner
from slmops.verification.stored import stored_of
from slmops.verification.weights import shares

sys.path.insert(0, str(ROOT / "benchmarks"))

from planner_vs_measured import Lab, deltas_of, lab_for, rank_correlation, scaled  # noqa: E402  # pyright: ignore[reportMissingImports]

LAYER = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan_of(*changes: tuple[str, np.ndarray, np.ndarray], precision: str = "int4", **settings: Any) -> Plan:
    return plan_changes(changes, recipe_for(precision), total=len(changes), **settings)


def matrix(seed: int, rows: int = 256, columns: int = 128, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)


def low_rank(seed: int, size: float, rows: int = 256, columns: int = 128) -> np.ndarray:
    """A delta of rank 4 whose entries have a root mean square of `size`."""
    random = np.random.default_rng(seed)
    product = random.standard_normal((rows, 4)) @ random.standard_normal((4, columns))
    return (size * product / np.sqrt((product**2).mean())).astype(np.float32)


# One matrix --------------------------------------------------------------------------------------------------------


def test_the_noise_grows_as_the_change_gets_smaller_than_a_step_and_p_does_not_see_it() -> None:
    base = matrix(0)
    step = float(np.sqrt((quantize(base, Scheme(4, 32)).scales ** 2).mean()))
    plans = {share: plan_of((LAYER, base, base + low_rank(1, share * step))) for share in (0.01, 0.1, 1.0, 10.0)}
    for share, plan in plans.items():
        assert plan.layers[0].delta_to_step == pytest.approx(share, rel=1e-3)
        assert plan.layers[0].share.p == pytest.approx(1, abs=0.01 + 4 * plan.layers[0].share.noise), "rounding is fair: p is 1 all along"
    noises = [plan.noise_to_signal for plan in plans.values()]
    assert noises == sorted(noises, reverse=True)
    # A share |d| / s of the codes changes by s: s |d| - d^2 a weight, which is 1 / 0.1 of d^2 times the form of D's distribution.
    assert noises[1] == pytest.approx(float(np.abs(low_rank(1, 1.0)).mean()) / 0.1, rel=0.3)
    assert [plan.advice for plan in plans.values()] == [KEEP, KEEP, FINE, FINE]
    changed = [plan.layers[0].changed for plan in plans.values()]
    assert changed == sorted(changed) and changed[0] < 0.1 < 0.8 < changed[-1]


def test_a_base_that_lies_on_the_grid_swallows_what_is_smaller_than_half_a_step() -> None:
    """As after QLoRA's own grid, or merged into a dequantized base: nothing rounds the other way now and then."""
    base = quantize(matrix(0), Scheme(4, 32)).dequantize()
    step = float(np.sqrt((quantize(base, Scheme(4, 32)).scales ** 2).mean()))
    lost = plan_of((LAYER, base, base + low_rank(1, 0.05 * step)))
    assert lost.layers[0].kept < 0.5 and lost.predicted_loss > 0.25
    assert lost.advice == KEEP and "slmops pack" in lost.reason
    large = plan_of((LAYER, base, base + low_rank(1, 3 * step)))
    assert large.layers[0].kept == pytest.approx(1, abs=0.02)
    assert large.advice == FINE


def test_figures_are_what_the_quantizer_gives() -> None:
    base, tuned = matrix(0), matrix(0) + low_rank(1, 0.1)
    layer = plan_of((LAYER, base, tuned)).layers[0]
    old, new = quantize(base, layer.scheme), quantize(tuned, layer.scheme)
    delta, moved = (tuned - base).astype(np.float64), (new.dequantize() - old.dequantize()).astype(np.float64)
    assert layer.kept == pytest.approx((moved * delta).sum() / (delta**2).sum(), rel=1e-4)
    assert layer.noise == pytest.approx(((moved - layer.kept * delta) ** 2).sum(), rel=1e-3)
    assert layer.changed == (old.codes != new.codes).mean()
    assert layer.share.energy == pytest.approx((delta**2).sum(), rel=1e-5)
    assert layer.share.p == pytest.approx(((new.dequantize() - base) * delta).sum() / (delta**2).sum(), rel=1e-4)


def test_some_rows_tell_nearly_what_all_do() -> None:
    change = (LAYER, matrix(0, 2048), matrix(0, 2048) + low_rank(1, 0.05, 2048))
    whole, part = plan_of(change), plan_of(change, most_rows=128)
    assert part.noise_to_signal == pytest.approx(whole.noise_to_signal, rel=0.15)
    assert part.layers[0].share.energy == pytest.approx(whole.layers[0].share.energy, rel=0.3)
    assert part.layers[0].weights == whole.layers[0].weights


def test_few_fragile_layers_are_named_and_would_be_fine_in_8_bits() -> None:
    """One layer's outliers make its steps coarse: the others are fine."""
    rough = matrix(9, scale=1.0)
    rough[:, ::32] *= 300
    changes = [(f"model.layers.{i}.mlp.up_proj.weight", base, base + low_rank(i, 0.2)) for i in range(7) for base in [matrix(i)]]
    changes.append((LAYER, rough, rough + low_rank(9, 1.0)))
    plan = plan_of(*changes)
    assert plan.advice == RAISE
    assert plan.fragile == ("model.layers.0.mlp.down_proj",)
    assert "in 1 of 8 layers: model.layers.0.mlp.down_proj" in plan.reason
    assert plan_of(*changes[:-1]).advice == FINE
    assert plan_of(*changes, precision="int8").advice == FINE
    # All of them fragile: that is no list of layers, it is another way to ship.
    all_rough = [(name, before, before + (after - before) / 100) for name, before, after in changes]
    assert (plan_of(*all_rough).advice, plan_of(*all_rough).fragile) == (KEEP, ())


# Adapters, and a real package --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    return make_model(tmp_path_factory.mktemp("planning") / "base", **shape)


def test_the_plan_of_an_adapter_is_that_of_its_merged_model(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    plan = slmops.merge(adapter, plan=True, base=base)
    assert not (tmp_path / "merged").exists()
    merged = slmops.merge(adapter, out=tmp_path / "merged", base=base)
    from_files = plan_model(merged.path, base, recipe_for("int4"))
    assert from_files is not None
    assert {one.share.layer for one in plan.layers} == {one.share.layer for one in from_files.layers}
    assert len(plan.layers) == 14
    assert plan.noise_to_signal == pytest.approx(from_files.noise_to_signal, rel=1e-3)
    document = plan.document()["plan"]
    assert document["advice"] in (FINE, KEEP, RAISE)
    assert set(document["layers"]) == {one.share.layer for one in plan.layers}
    assert plan_model(base, base, recipe_for("int4")) is None, "nothing differs"


def test_the_plan_of_several_is_that_of_their_sum_and_writes_nothing(base: Path, tmp_path: Path) -> None:
    adapters = [make_adapter(tmp_path / "a", base, 1), make_adapter(tmp_path / "b", base, 2)]
    plan = slmops.merge(adapters, plan=True, base=base, weights="0.5,2", out=tmp_path / "out", precision="int8")
    merged = slmops.merge(adapters, out=tmp_path / "merged", base=base, weights="0.5,2")
    from_files = plan_model(merged.path, base, recipe_for("int8"))
    assert from_files is not None and plan.noise_to_signal == pytest.approx(from_files.noise_to_signal, rel=1e-3)
    assert plan.adapters == ("a", "b")
    assert not (tmp_path / "out").exists() and any("was not written" in line for line in plan.warnings)


def test_without_a_folder_to_write_and_without_plan_merge_says_so(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no folder to write"):
        slmops.merge(make_adapter(tmp_path / "adapter", base), base=base)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"precision": "int4"}, "precision: a merge is written in float32"),
        ({"block_size": 32}, "block_size: a merge is written in float32"),
        ({"plan": True, "data": {"adapter": "rows.jsonl"}}, "data: --plan merges nothing"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(base: Path, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        slmops.merge(make_adapter(tmp_path / "adapter", base), out=tmp_path / "out", base=base, **settings)


def test_a_block_size_that_does_not_divide_and_an_architecture_that_cannot_be_exported_are_refused(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(InvalidInput, match="does not divide"):
        slmops.merge(make_adapter(tmp_path / "a", base), plan=True, base=base, block_size=256)
    torch.manual_seed(0)
    other = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=1, n_head=2)).save_pretrained(other)
    with pytest.raises(Unavailable):
        slmops.merge(make_adapter(tmp_path / "b", other), plan=True, base=other)


@pytest.mark.slow
def test_the_plan_has_the_shares_that_verify_measures_in_the_package(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, scale=0.02)
    merged = slmops.merge(adapter, out=tmp_path / "merged", base=base)
    plan = slmops.merge(adapter, plan=True, base=base)
    package = make_export(tmp_path / "int4", merged.path, "int4")
    found = {share.layer: share for share in shares(stored_of(package), merged.path, base)}
    assert set(found) == {layer.share.layer for layer in plan.layers}
    for layer in plan.layers:
        assert layer.share.p == pytest.approx(found[layer.share.layer].p, abs=1e-4), layer.share.layer
        assert layer.share.noise == pytest.approx(found[layer.share.layer].noise, rel=1e-3)


# Against measured loss ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with adapters of three ranks that learned a task on it, and their deltas."""
    place = tmp_path_factory.mktemp("trained")
    shape = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.05}
    base = make_model(place / "base", **shape)
    rows = write_rows(place / "rows.jsonl", [row | {"text": f"{row['text']} {i}"} for i in range(12) for row in ROWS])
    for rank in (1, 4, 16):
        settings = {"learning_rate": 1e-2, "epochs": 4, "validation": rows}
        slmops.finetune(base, rows, out=place / f"rank{rank}", lora_rank=rank, **settings, **TEMPLATES)
        slmops.merge(place / f"rank{rank}", out=place / f"merged{rank}")
    return place


def lab_of(trained: Path) -> Lab:
    return lab_for(trained / "rank4", trained / "rows.jsonl", max_rows=32)


def deltas(trained: Path, rank: int, scale: float) -> dict[str, np.ndarray]:
    return scaled(deltas_of(trained / f"merged{rank}", trained / "base"), scale)


@pytest.mark.slow
def test_the_prediction_follows_measured_loss_over_ranks_scales_and_precisions(trained: Path) -> None:
    lab = lab_of(trained)
    measured: dict[tuple[int, float, str], float] = {}
    plans: dict[tuple[int, float, str], Plan] = {}
    for case in itertools.product((1, 4, 16), (0.01, 0.05, 0.2, 1.0), ("int4", "int8")):
        rank, scale, precision = case
        change = deltas(trained, rank, scale)
        plans[case] = plan_of(*lab.changes(change), precision=precision)
        measured[case] = lab.loss(change, precision)
    predicted = {case: plan.predicted_loss for case, plan in plans.items()}
    assert rank_correlation(list(predicted.values()), list(measured.values())) > 0.95
    ratios = {case: measured[case] / predicted[case] for case in measured}
    # An effect that saturates (a probability that is 1 already) loses less than foretold: never more than twice.
    assert max(ratios.values()) < 2, ratios
    unsaturated = {case: ratio for case, ratio in ratios.items() if case[1] < 1}
    assert min(unsaturated.values()) > 0.3, ratios
    # The two ends, and no advice on the wrong side of the bar by more than a factor of two.
    assert all(plans[case].advice == KEEP and measured[case] > 2 * BAR for case in measured if case[1:] == (0.01, "int4"))
    assert all(plans[case].advice == FINE and measured[case] < BAR / 10 for case in measured if case[1] == 1.0)
    for case, plan in plans.items():
        assert measured[case] < 2 * BAR if plan.advice == FINE else measured[case] > BAR / 2, (case, plan.advice, measured[case])
    # What the planner is built on is what predicts; the share p is 1 at both ends.
    p = [abs(plan.document()["plan"]["p"] - 1) for plan in plans.values()]
    assert max(p) < 0.2


@pytest.mark.slow
def test_the_layer_that_is_named_is_the_one_that_loses(trained: Path) -> None:
    """Outliers in one layer, put there without a change of what the model computes: in 8 bits it is fine, as foretold."""
    lab, change = lab_of(trained), deltas(trained, 4, 0.1)
    up, down, channels, factor = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight", slice(None, None, 32), 60.0
    change[up][channels] = change[down][:, channels] = 0  # the fine-tune leaves these alone
    fine, unchanged = plan_of(*lab.changes(change)), lab.log_probabilities(lab.base)
    for weights in (lab.base, change):  # down(act(gate) * up): what one is divided by, the other makes up for
        weights[up][channels] /= factor
        weights[down][:, channels] *= factor
    np.testing.assert_allclose(lab.log_probabilities(lab.base), unchanged, atol=1e-3)
    plan = plan_of(*lab.changes(change))
    assert fine.advice == FINE
    assert (plan.advice, plan.fragile) == (RAISE, (down.removesuffix(".weight"),)), plan.reason
    rough = lab.loss(change, "int4")
    assert plan.predicted_loss == pytest.approx(rough, rel=0.5)
    lab.raised = frozenset(plan.fragile)
    raised = lab.loss(change, "int4")
    assert raised < 0.7 * min(rough, BAR), (rough, raised)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "advice"), [(0.01, KEEP), (1.0, FINE)])
def test_the_two_ends_hold_in_real_packages(trained: Path, tmp_path: Path, scale: float, advice: str) -> None:
    lab, adapter = lab_of(trained), trained / "rank4"
    merged = slmops.merge(adapter, out=tmp_path / "merged", weights=[scale])
    assert slmops.merge(adapter, plan=True, weights=[scale]).advice == advice
    before = make_export(tmp_path / "base4", trained / "base", "int4")
    exported = slmops.export(merged.path, out=tmp_path / "int4", precision="int4")
    assert [line.startswith(KEEP) for line in exported.manifest.warnings] == ([True] if advice == KEEP else []), "export says so too"
    ids = [one.ids for one in lab.sequences]
    logits = []
    for folder in (exported.path, before):
        runner = open_runner(folder, threads=1)
        logits.append(lab.at_counted(runner.logits(ids)))
        runner.close()
    change = deltas(trained, 4, scale)
    lost = lab.wrong(change, logits[0] - logits[1]) - lab.runtime_wrong(change, "int4")
    assert lost > 2 * BAR if advice == KEEP else lost < BAR
