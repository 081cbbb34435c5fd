"""Whatever kind of adapter PEFT makes: packed or merged and exported it is right, or refused with a way out that works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_graph import make_other
from tiny import make_model

sys.path.insert(0, str(ROOT / "benchmarks"))

from adapter_methods import HEADER, METHODS, rows_of  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.slow

_CARRIED = {"LoRA", "rsLoRA", "rank_pattern", "alpha_pattern", "some layers"}
# No weights can say what these do, or PEFT itself cannot load them again.
_NOWHERE = {"aLoRA", "layer_replication", "PiSSA in 4 steps", "VeRA", "prefix tuning", "prompt tuning"}


@pytest.mark.parametrize("base", ["tied", "untied", "with biases"])
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
