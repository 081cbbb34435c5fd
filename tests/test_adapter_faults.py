"""A package of two real adapters passes `slmops verify` at default bars, and every planted fault of one is found by name.

Run with `-s` to see the table; `benchmarks/adapter_faults.py` prints the same for any package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

import slmops

sys.path.insert(0, str(ROOT / "benchmarks"))

from adapter_faults import FAULTS, HEADER, Fault, found_in, is_found, line, outcome_of  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.slow

# Threads of both sides: with more, a busy machine's cores wait for each other.
FLAGS = ("--threads", "1", "--max-rows", "350")
SETTINGS = {"learning_rate": 1e-3, "max_rows": 1500, "precision": "fp32"}  # of rows this few, what int4 costs depends on each rounding


@pytest.fixture(scope="module")
def adapters(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes of stories3m, of ranks 16 and 8, asked by templates of their own.

    Both learn well: of one that does not (rank 4 on queries and values alone, these rows), int4 is 0.2 nats from PyTorch, and fails.
    """
    place = tmp_path_factory.mktemp("adapter-faults")
    model, rows = shared / "models/stories3m", shared / "data/snips/train.jsonl"
    intent = {"prompt_template": "{text}\nIntent:", "completion_template": " {intent}", "lora_rank": 16}
    kind = {"prompt_template": "{text}\nKind:", "completion_template": " {intent}", "lora_rank": 8}
    for name, settings in (("intent", intent), ("kind", kind)):
        slmops.finetune(model, rows, out=place / name, **settings, **SETTINGS)
    print(f"\n{HEADER}")
    return place


@pytest.fixture(scope="module", params=["fp32", "int4"])
def package(request: pytest.FixtureRequest, shared: Path, adapters: Path) -> Path:
    named = [f"{name}={adapters / name}" for name in ("intent", "kind")]
    return slmops.pack(shared / "models/stories3m", out=adapters / request.param, precision=request.param, adapter=named).path


def test_the_good_package_passes(package: Path, shared: Path) -> None:
    rows = shared / "data/snips/test.jsonl"
    found = outcome_of(package, *(flag for name in ("intent", "kind") for flag in ("--data", f"{name}={rows}")), *FLAGS)
    print(line(package, "none", found))
    assert (found.exit_code, found.failed_stage) == (0, None), found.explanation
    statuses = {stage["name"]: stage["status"] for stage in found.document["stages"]}
    assert statuses["adapters"] == statuses["self_test"] == "pass", found.document["warnings"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(package: Path, shared: Path, fault: Fault) -> None:
    if package.name == "fp32":
        pytest.skip("found alike in int4; benchmarks/adapter_faults.py runs all of them on any package")
    found = found_in(package, "intent", fault, package.parent / "faulty", shared / "data/snips/test.jsonl", *FLAGS)
    print(line(package, fault.name, found))
    assert is_found(found, fault, "intent"), (found.failed_stage, found.explanation)
