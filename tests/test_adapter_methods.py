"""Whatever kind of adapter PEFT makes: packed or merged and exported it is right, or refused with a way out that works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_graph import make_other
from tiny import ROWS, make_model, write_rows

import slmops

sys.path.insert(0, str(ROOT / "benchmarks"))

from adapter_methods import HEADER, METHODS, make_adapter, rows_of  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.slow

_CARRIED = {"LoRA", "rsLoRA", "rank_pattern", "alpha_pattern", "some layers"}
# No weights can say what these do, or PEFT itself cannot load them again.
_NOWHERE = {"aLoRA", "layer_replication", "PiSSA in 4 steps", "VeRA", "prefix tuning", "prompt tuning"}


@pytest.mark.parametrize("base", ["tied", "with biases"])
def test_each_kind_is_right_or_refused(base: str, tmp_path: Path) -> None:
    if base == "with biases":
        model = make_other(tmp_path / "base", "Qwen2", tie_word_embeddings=True)
        chosen = tuple(method for method in METHODS if "bias" in method.name or method.name in ("LoRA", "DoRA", "PiSSA"))
    else:
        model, chosen = make_model(tmp_path / "base", tie_word_embeddings=base == "tied"), METHODS
    print(f"\n{base}\n{HEADER}")
    rows = []
    for row in rows_of(model, tmp_path / "scratch", chosen):
        print(row.line(), flush=True)
        rows.append(row)
    assert [f"{row.method}: {problem}" for row in rows for problem in row.problems] == []
    assert {row.method for row in rows if row.packed.right} == _CARRIED & {method.name for method in chosen}
    assert {row.method for row in rows if not row.merged.right} == {
        name for name in (_NOWHERE if base == "with biases" else _NOWHERE | {"lora_bias"}) if name in {method.name for method in chosen}
    }


@pytest.mark.parametrize("name", ["LoRA of the head", "modules_to_save head"])
def test_a_head_that_is_its_own_now_is_proven_and_planned_too(name: str, tmp_path: Path) -> None:
    """The base has no file for it: there it is the embedding."""
    base = make_model(tmp_path / "base", learned=ROWS)
    make_adapter(tmp_path / "adapter", base, next(method for method in METHODS if method.name == name))
    slmops.merge(tmp_path / "adapter", out=tmp_path / "merged")
    plan = slmops.merge(tmp_path / "adapter", plan=True, precision="int8")
    # The plan looks at the merge in memory, where a tied pair is still one tensor.
    planned = "model.embed_tokens" if name == "LoRA of the head" else "lm_head"
    assert planned in {layer.share.layer for layer in plan.layers}  # pyright: ignore[reportAttributeAccessIssue]
    package = slmops.export(tmp_path / "merged", out=tmp_path / "package", precision="fp32").path
    verification = slmops.verify(package, data=[str(write_rows(tmp_path / "rows.jsonl"))], threads=1)
    assert verification.failed_stage is None, verification.stages
    retention = next(stage for stage in verification.stages if stage.name == "retention")
    assert retention.figures["layers"]["lm_head"]["p"] == pytest.approx(1, abs=1e-3)
