"""Each stage says pass, fail or cannot tell, by the bounds of its figures; a good package passes, and lineage that is gone is said."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import ROWS, TEMPLATES, make_export, make_model, write_rows

import slmops
from slmops import artifact
from slmops.config import VerifySettings, load
from slmops.errors import BadArtifact
from slmops.results import Estimate, divergence, log_softmax
from slmops.verification.bars import bars_for
from slmops.verification.behaviour import logits_verdicts
from slmops.verification.comparison import Comparison
from slmops.verification.stages import NAMES, Stage, Verdict, at_least, at_most, concluded, exactly, within
from slmops.verification.weights import Share, weight_verdicts

# Verdicts ----------------------------------------------------------------------------------------------------------


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value, low, high, 100)


@pytest.mark.parametrize(
    ("figure", "status"),
    [
        (estimate(0.1, 0.2, 0.3), "pass"),
        (estimate(0.1, 0.4, 0.5), "pass"),  # the bound is on the bar
        (estimate(0.1, 0.2, 0.51), "inconclusive"),  # the value is below, the bound above
        (estimate(0.49, 0.6, 0.7), "inconclusive"),
        (estimate(0.51, 0.6, 0.7), "fail"),
        (estimate(0.6, 0.6, 0.6), "fail"),
        (estimate(math.nan, math.nan, math.nan), "inconclusive"),
    ],
)
def test_a_figure_that_should_be_low_is_held_by_its_bounds(figure: Estimate, status: str) -> None:
    assert at_most("KL", figure, 0.5).status == status


@pytest.mark.parametrize(
    ("figure", "status"),
    [
        (estimate(0.91, 0.95, 0.99), "pass"),
        (estimate(0.9, 0.95, 0.99), "pass"),
        (estimate(0.89, 0.95, 0.99), "inconclusive"),
        (estimate(0.8, 0.85, 0.9), "inconclusive"),
        (estimate(0.8, 0.85, 0.89), "fail"),
    ],
)
def test_a_figure_that_should_be_high_is_held_by_its_bounds(figure: Estimate, status: str) -> None:
    assert at_least("top-1", figure, 0.9).status == status


def test_figures_without_sampling_error() -> None:
    assert [exactly("x", value, 1e-10).status for value in (0, 1e-10, 1.01e-10, math.nan)] == ["pass", "pass", "fail", "fail"]
    assert [within("p", value, 0.95, 1.05).status for value in (0.949, 0.95, 1.0, 1.05, 1.051, math.nan)] == [
        "fail",
        "pass",
        "pass",
        "pass",
        "fail",
        "fail",
    ]


def test_a_stage_fails_before_it_is_open_and_is_open_before_it_passes() -> None:
    good, bad, open_ = Verdict("pass", "good"), Verdict("fail", "bad"), Verdict("inconclusive", "open")
    failed = concluded("logits", [good, open_, bad], {}, {}, "look there")
    assert (failed.status, failed.explanation) == ("fail", "bad: look there")
    unsure = concluded("logits", [good, open_], {}, {}, "look there")
    assert unsure.status == "inconclusive"
    assert "too few rows" in unsure.explanation
    assert concluded("logits", [good, good], {}, {}).explanation == "good; good"


def test_a_stage_as_json() -> None:
    document = Stage("logits", "pass", "fine", {"kl": estimate(0, 1, 2), "rows": 3}, {"kl": 3}).document()
    assert json.loads(json.dumps(document))["figures"] == {"kl": {"value": 1, "low": 0, "high": 2, "n": 100}, "rows": 3}
    assert NAMES == ("files", "tokenizer", "template", "stop_tokens", "graph", "logits", "text", "retention", "adapters", "self_test")


# Comparison --------------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    """KL(p || q) with p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): 1/2 ln 2 - 1/4 ln 2."""
    p, q = np.log([[0.5, 0.25, 0.25]]).astype(np.float32), np.log([[0.25, 0.5, 0.25]]).astype(np.float32)
    assert divergence(p, q)[0] == pytest.approx(0.25 * math.log(2), abs=1e-6)
    # Not symmetric, blind to a constant, zero for equals.
    r = np.log([[0.8, 0.1, 0.1]]).astype(np.float32)
    assert divergence(p, r)[0] == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(2.5), abs=1e-6)
    assert divergence(r, p)[0] == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=1e-6)
    assert divergence(p + 7, q - 3)[0] == pytest.approx(divergence(p, q)[0], abs=1e-6)
    assert divergence(p, p)[0] == 0
    large = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert np.isfinite(log_softmax(large)).all()
    assert divergence(large, np.zeros_like(large))[0] == pytest.approx(math.log(3))


def test_a_comparison_counts_ties_and_weighs_rows_by_tokens() -> None:
    comparison = Comparison(tie=0.01)
    reference = np.array([[1.0, 0.0, -1.0], [0.5, 0.495, 0.0], [0.0, 1.0, 0.5]], np.float32)
    candidate = np.array([[1.0, 0.0, -1.0], [0.495, 0.5, 0.0], [0.0, 0.5, 1.0]], np.float32)
    comparison.add(reference, candidate)  # same; another top-1 at a tie; another top-1
    comparison.add(reference[:1], candidate[:1])
    assert comparison.tokens == [3, 1]
    assert (comparison.same_top, comparison.ties) == (2, 1)
    assert comparison.top1.value == 0.5
    squared = 2 * 0.005**2 + 2 * 0.5**2
    assert comparison.nmse == pytest.approx(squared / ((reference**2).sum() + 2.0), rel=1e-4)
    assert comparison.largest == pytest.approx(0.5)
    by_token = [float(divergence(reference[i : i + 1], candidate[i : i + 1])[0]) for i in range(3)]
    assert comparison.mean_kl.value == pytest.approx(sum(by_token) / 4)
    assert comparison.mean_kl.unit == "nats"


def test_fp32_lets_ties_pass_and_nothing_else() -> None:
    bars = bars_for("fp32", load(VerifySettings, None))
    assert bars.difference is not None
    reference = np.array([[10.0, 10.0 - 4e-5, 0.0]], np.float32)
    tied = Comparison(tie=2 * bars.difference)
    tied.add(reference, reference[:, [1, 0, 2]])
    assert [v.status for v in logits_verdicts(tied, bars)] == ["pass", "pass", "pass"]
    other = Comparison(tie=2 * bars.difference)
    other.add(np.array([[10.0, 9.9, 0.0]], np.float32), np.array([[9.9, 10.0, 0.0]], np.float32))
    assert [v.status for v in logits_verdicts(other, bars)] == ["fail", "fail", "fail"]


# Bars --------------------------------------------------------------------------------------------------------------


def test_bars_are_those_of_the_design_and_an_override_is_recorded() -> None:
    none = load(VerifySettings, None)
    bars = {precision: bars_for(precision, none) for precision in ("fp32", "int8", "int4")}
    assert (bars["fp32"].nmse, bars["fp32"].difference, bars["fp32"].task_points) == (1e-10, 2e-4, 0)
    assert (bars["int8"].kl, bars["int8"].top1, bars["int8"].task_points) == (1e-2, 0.97, 0.5)
    assert (bars["int4"].kl, bars["int4"].top1, bars["int4"].task_points) == (5e-2, 0.92, 1.0)
    assert all(not one.overridden for one in bars.values())
    own = bars_for("int4", load(VerifySettings, None, kl_bar=0.2, task_bar=0.0))
    assert (own.kl, own.top1, own.task_points, own.overridden) == (0.2, 0.92, 0.0, ("kl", "task_points"))


# Retention in the weights ------------------------------------------------------------------------------------------


def share(layer: str, p: float, energy: float = 1.0, noise: float = 0.0) -> Share:
    return Share(layer, p * energy, energy, noise)


def statuses(found: list[Share]) -> list[str]:
    return [verdict.status for verdict in weight_verdicts(found, 0.05)[0]]


def test_retention_is_pooled_and_layer_by_layer() -> None:
    assert statuses([share("a", 0.99), share("b", 1.01)]) == ["pass", "pass"]
    assert statuses([share("a", 0.0), share("b", 0.0)]) == ["fail", "fail"], "the base passed off"
    assert statuses([share("a", 1.5), share("b", 1.5)]) == ["fail", "fail"], "scaled"
    # One small layer lost moves the pool little, and is found by itself.
    assert statuses([share("a", 1.0, energy=99), share("b", 0.0, energy=1)]) == ["pass", "fail"]
    # The bar of a layer is as wide as its rounding noise makes it.
    assert statuses([share("a", 1.0, energy=99), share("b", 0.6, noise=0.05)]) == ["pass", "fail"]
    assert statuses([share("a", 1.0, energy=99), share("b", 0.6, noise=0.07)]) == ["pass", "pass"]
    _, figures, _ = weight_verdicts([share("a", 1.0, 3.0), share("b", 0.5, 1.0)], 0.05)
    assert figures["p"] == pytest.approx(3.5 / 4)
    assert figures["layers"]["b"]["p"] == 0.5


# A package ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, merged, fp32, int4 and rows, side by side."""
    place = tmp_path_factory.mktemp("road")
    base = make_model(place / "base", hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    rows = write_rows(place / "rows.jsonl", [row | {"text": f"{row['text']} {i}"} for i in range(12) for row in ROWS])
    slmops.finetune(base, rows, out=place / "adapter", learning_rate=1e-2, epochs=6, lora_rank=8, **TEMPLATES)
    slmops.merge(place / "adapter", out=place / "merged")
    for precision in ("fp32", "int4"):
        make_export(place / precision, place / "merged", precision)
    return place


def verify(road: Path, name: str, **settings: Any) -> Any:
    return slmops.verify(road / name, data=road / "rows.jsonl", threads=1, **settings)


def stage(result: Any, name: str) -> Stage:
    return next(one for one in result.stages if one.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_good_package_passes_every_stage(road: Path, precision: str, tmp_path: Path) -> None:
    result = verify(road, precision, metric="exact_match", out=tmp_path / "verification")
    found = {one.name: one.status for one in result.stages}
    assert list(found) == list(NAMES)
    assert found == dict.fromkeys(NAMES, "pass") | {"adapters": "skipped"}, [s.explanation for s in result.stages]
    assert result.failed_stage is None
    assert result.document()["passed"] is True
    figures = stage(result, "retention").figures
    assert figures["p"] == pytest.approx(1, abs=0.05)
    assert figures["effect"] == pytest.approx(1, abs=0.05)
    if precision == "fp32":
        assert stage(result, "logits").figures["nmse"] <= 1e-10
        assert figures["p"] == pytest.approx(1, abs=1e-4)
    written = artifact.load(tmp_path / "verification")
    assert written.manifest.kind == "verification"
    assert written.manifest.facts["passed"] is True


@pytest.mark.slow
def test_a_bar_set_by_hand_can_fail_a_good_package_and_is_written_down(road: Path) -> None:
    result = verify(road, "int4", kl_bar=1e-9)
    assert result.failed_stage == "logits"
    assert stage(result, "logits").bars["overridden"] == ["kl"]
    assert any("bars set by hand: kl" in warning for warning in result.warnings)
    assert [one.name for one in result.stages][-1] == "logits", "it stops at the first failed stage"


@pytest.mark.slow
def test_the_effect_is_measured_from_the_fine_tune(road: Path) -> None:
    """KL(with the fine-tune || without), as DESIGN says: the other way round, rare tokens' logits rule the figure."""
    from slmops.data import Interface, Tokenizer, encode_rows
    from slmops.data.rows import read_rows
    from slmops.runtime import open_model
    from slmops.verification.comparison import supervised

    figures = stage(verify(road, "fp32"), "retention").figures
    interface = Interface.model_validate(artifact.load(road / "merged").manifest.interface)
    sequences = encode_rows(read_rows(road / "rows.jsonl"), Tokenizer.load(road / "base"), interface).sequences
    tuned, base = open_model(road / "merged", threads=1).runner, open_model(road / "base", threads=1).runner
    ids = [sequence.ids for sequence in sequences]
    total, count = 0.0, 0
    for sequence, with_it, without in zip(sequences, tuned.logits(ids), base.logits(ids), strict=True):
        positions = supervised(sequence)
        total, count = total + float(divergence(with_it[positions], without[positions]).sum()), count + len(positions)
    assert figures["effect_pytorch_kl"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
def test_without_rows_nothing_is_proven_and_that_is_said(road: Path, tmp_path: Path) -> None:
    copy = _copy(road, tmp_path)
    (copy / "adapter" / "validation.jsonl").write_text("")
    artifact.seal(copy / "adapter")
    artifact.seal(copy / "merged")
    result = slmops.verify(copy / "int4", threads=1)
    assert stage(result, "logits").status == "inconclusive"
    assert stage(result, "text").status == "skipped"
    assert result.document()["conclusive"] is False
    assert any("logits: not proven" in warning for warning in result.warnings)
    # Without --data and with them, the rows of the fine-tune's own validation are taken.
    assert stage(slmops.verify(road / "int4", threads=1), "logits").figures["rows"] >= 16


@pytest.mark.slow
def test_a_lineage_that_is_gone_or_changed_is_never_a_silent_pass(road: Path, tmp_path: Path) -> None:
    copy = _copy(road, tmp_path)
    data = copy / "rows.jsonl"
    (copy / "base").rename(copy / "moved")
    gone = slmops.verify(copy / "int4", data=data, threads=1)
    assert gone.failed_stage is None
    assert stage(gone, "retention").status == "inconclusive"
    assert "--base" in stage(gone, "retention").explanation
    assert any("retention: not proven" in warning for warning in gone.warnings)
    given = slmops.verify(copy / "int4", data=data, threads=1, base=copy / "moved")
    assert stage(given, "retention").status == "pass"
    shutil.copytree(copy / "merged", copy / "base", ignore=shutil.ignore_patterns("slmops.json"))
    with pytest.raises(BadArtifact, match="base is not the model") as caught:
        slmops.verify(copy / "int4", data=data, threads=1)
    assert caught.value.exit_code == 4


@pytest.mark.slow
def test_a_baseline_that_is_another_model_is_refused(road: Path, tmp_path: Path) -> None:
    copy = _copy(road, tmp_path)
    shutil.rmtree(copy / "merged")
    with pytest.raises(BadArtifact, match="no longer at"):
        slmops.verify(copy / "int4", threads=1)
    shutil.copytree(copy / "base", copy / "merged")
    with pytest.raises(BadArtifact, match="its hash differs") as caught:
        slmops.verify(copy / "int4", threads=1)
    assert caught.value.exit_code == 4
    with pytest.raises(BadArtifact, match="not an export"):
        slmops.verify(copy / "base")


@pytest.mark.slow
def test_a_manifest_edited_by_hand_fails_the_first_stage(road: Path, tmp_path: Path) -> None:
    copy = _copy(road, tmp_path)
    manifest = json.loads((copy / "int4" / artifact.MANIFEST).read_text())
    manifest["facts"]["precision"] = "fp32"
    (copy / "int4" / artifact.MANIFEST).write_text(json.dumps(manifest))
    result = slmops.verify(copy / "int4", threads=1)
    assert result.failed_stage == "files"
    assert "changed after it was written" in result.stages[0].explanation


@pytest.mark.slow
def test_a_plain_genai_folder_is_held_against_a_baseline(road: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(road / "int4", plain, ignore=shutil.ignore_patterns("slmops.json"))
    with pytest.raises(BadArtifact, match="does not say which model") as caught:
        slmops.verify(plain, threads=1)
    assert "--baseline" in caught.value.hint
    result = slmops.verify(plain, baseline=road / "merged", data=road / "rows.jsonl", threads=1)
    found = {one.name: one.status for one in result.stages}
    assert result.failed_stage is None, [s.explanation for s in result.stages]
    assert result.precision == "int4"
    assert found["files"] == "skipped"
    assert found["logits"] == found["retention"] == "pass"
    assert "states no templates" in stage(result, "template").explanation
    wrong = slmops.verify(plain, baseline=road / "base", data=road / "rows.jsonl", threads=1)
    assert wrong.failed_stage is not None


def _copy(road: Path, place: Path) -> Path:
    copy = place / "road"
    shutil.copytree(road, copy, ignore=shutil.ignore_patterns("fp32"))
    return copy
