"""Every planted fault fails `slmops verify` at default bars, at a stage that names it, with exit code 5; the good package passes.

Run with `-s` to see the table; `benchmarks/fault_table.py` prints the same for any model and data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from fault_table import HEADER, line  # noqa: E402  # pyright: ignore[reportMissingImports]
from faults import FAULTS, Fault, Road, faults, make_road, outcome, planted  # noqa: E402  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.slow

PRECISIONS = ("fp32", "int8", "int4")
# Threads of both sides: with more, a busy machine's cores wait for each other. Rows: enough for every interval to conclude.
FLAGS = ("--threads", "1", "--max-rows", "350")


@pytest.fixture(scope="module")
def place(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"\n{HEADER}")
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module", params=PRECISIONS)
def road(request: pytest.FixtureRequest, shared: Path, place: Path) -> Road:
    training = {"prompt_template": "{text}\nIntent:", "completion_template": " {intent}", "max_rows": 4000, "learning_rate": 1e-3}
    return make_road(place, shared / "models/stories3m", shared / "data/snips/train.jsonl", request.param, **training)


def test_the_good_package_passes(road: Road, shared: Path) -> None:
    found = outcome(road.package, shared / "data/snips/test.jsonl", *FLAGS)
    print(line(road.precision, "none", found))
    assert (found.exit_code, found.failed_stage) == (0, None), found.explanation
    assert {stage["name"] for stage in found.document["stages"] if stage["status"] == "skipped"} == {"adapters"}
    assert found.document["conclusive"], found.document["warnings"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(road: Road, shared: Path, fault: Fault) -> None:
    if fault not in faults(road.precision):
        pytest.skip("float weights have no blocks")
    found = outcome(planted(road, fault), shared / "data/snips/test.jsonl", *FLAGS)
    print(line(road.precision, fault.name, found))
    assert found.failed_stage in fault.stages, (found.failed_stage, found.document)
    assert found.exit_code == 5
    assert found.explanation
