"""Print which planted faults `slmops verify` finds, and where: `python benchmarks/fault_table.py MODEL DATA TEST`.

MODEL is a Hugging Face folder, DATA and TEST are rows. One fine-tune, one package a precision; each fault is planted in
a copy, sealed anew, and verified at default bars. A Markdown table; exit code 1 when a fault went unnoticed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import Outcome, faults, make_road, outcome, planted

HEADER = "| precision | fault | failed stage | exit | what verify says |\n| --- | --- | --- | --- | --- |"


def main() -> int:
    """Plant, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--prompt-template", default="{text}\nIntent:")
    parser.add_argument("--completion-template", default=" {intent}")
    parser.add_argument("--max-rows", type=int, default=None, help="train on the first N rows only")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8", "int4"])
    given = parser.parse_args()
    training = {"prompt_template": given.prompt_template, "completion_template": given.completion_template, "max_rows": given.max_rows}
    print(HEADER)
    missed = 0
    with TemporaryDirectory(prefix="slmops-faults-") as scratch:
        for precision in given.precisions:
            road = make_road(Path(scratch), given.model.resolve(), given.data, precision, learning_rate=1e-3, **training)
            good = outcome(road.package, given.test)
            missed += good.exit_code != 0
            print(line(precision, "none", good), flush=True)
            for fault in faults(precision):
                found = outcome(planted(road, fault), given.test)
                missed += found.exit_code != 5 or found.failed_stage not in fault.stages
                print(line(precision, fault.name, found), flush=True)
    return 1 if missed else 0


def line(precision: str, name: str, found: Outcome) -> str:
    """Return one row of the table."""
    explanation = found.explanation.replace("|", "\\|").replace("\n", "\\n")
    return f"| {precision} | {name} | {found.failed_stage or '-'} | {found.exit_code} | {explanation[:160]} |"


if __name__ == "__main__":
    sys.exit(main())
