r"""Which method of `slmops finetune` learns how much, at what price, and which roads are open to what it makes?

All methods learn the same rows in the same number of steps, each with its own defaults and in a process of its own (peak memory
is that process's), and answer the same held-out rows in PyTorch. Every road that the manifest calls open is then walked and
proven with `slmops verify`; every one that it calls refused has to end with exit code 3 (of a whole model, which is not an
adapter: 4).

    python benchmarks/methods.py MODEL TRAIN TEST --work DIR --rows 3000 \
        --prompt-template '{text}\nIntent:' --completion-template ' {intent}'

Folders in DIR are used again, so a long run may be cut into pieces (`--only lora dora`). Prints a Markdown table and one line of
JSON; exit code 1 where a method is not better than the base, or a road is not as its manifest says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmops.runtime.hugging_face import parameter_count
from slmops.training.methods import METHODS

HEADER = (
    "| method | learning rate | trainable | loop s | peak MB | exact match | merge | pack | export |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)
_ROADS = ("merge", "pack", "export")
_REFUSED = 3  # exit code
_ROUNDING = 0.002  # a near-tie of 700 answers


@dataclass
class Row:
    """One line of the table."""

    method: str
    exact_match: float
    rate: float | None = None
    share: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    roads: dict[str, str] = field(default_factory=dict)
    """Of each road: what came of walking it."""
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return it in Markdown."""
        figures = [
            f"{self.rate:g}" if self.rate else "",
            f"{100 * self.share:.3g} %" if self.share else "",
            f"{self.seconds:.1f}" if self.seconds else "",
            f"{self.peak_bytes / 1e6:.0f}" if self.peak_bytes else "",
            f"{self.exact_match:.4f}",
        ]
        return "| " + " | ".join([self.method, *figures, *(self.roads.get(name, "") for name in _ROADS)]) + " |"


def main() -> int:
    """Train, evaluate, walk the roads, print."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [Row("none (the base)", _exact_match(options, options.model, options.work / "base"))]
    print(f"{HEADER}\n{rows[0].line()}", flush=True)
    for name in options.only or METHODS:
        rows.append(_row(options, name, rows[0].exact_match))
        print(rows[-1].line(), flush=True)
        for problem in rows[-1].problems:
            print(f"{name}: {problem}", file=sys.stderr)
    print(json.dumps([asdict(row) for row in rows]))
    return 1 if any(row.problems for row in rows) else 0


def _row(options: argparse.Namespace, name: str, base: float) -> Row:
    out = options.work / name
    if not (out / "slmops.json").is_file():
        rate = ["--learning-rate", str(options.learning_rate)] if options.learning_rate else []
        limit = ["--max-rows", str(options.rows), "--epochs", str(options.epochs), "--seed", str(options.seed)]
        _slmops("finetune", options.model, options.train, "-o", out, "--method", name, *limit, *rate, *_templates(options))
    manifest = json.loads((out / "slmops.json").read_text())
    facts = manifest["facts"]
    total = parameter_count(options.model)
    rates = [
        point["learning_rate"] for point in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "learning_rate" in point
    ]
    row = Row(
        name,
        _exact_match(options, out, out),
        max(rates),
        facts["trainable_parameters"] / total,
        facts["loop_seconds"],
        facts["peak_memory_bytes"],
    )
    if row.exact_match < base + options.least_gain:
        row.problems.append(f"exact match {row.exact_match:.4f}, and the base has {base:.4f}")
    for road in _ROADS if options.roads else ():
        row.roads[road] = _walk(options, out, road, facts["roads"][road], row)
    return row


def _walk(options: argparse.Namespace, out: Path, road: str, said: str, row: Row) -> str:
    """Take an artefact down a road; say what came of it in a cell, and note where that is not what its manifest says."""
    merged = out.with_name(f"{out.name}.merged")
    adapter = json.loads((out / "slmops.json").read_text())["kind"] == "adapter"
    packed = ("pack", options.model, "--adapter", f"it={out}") if adapter else ("pack", out)
    words = {"merge": ("merge", out), "pack": packed, "export": ("export", out)}[road]
    if said.startswith("refused") or (road == "pack" and said.startswith("merged")):
        document = _slmops(*words, "-o", out.with_name(f"{out.name}.refused"), expected=None)
        code = document["error"]["exit_code"] if not document["ok"] else 0
        if code != (_REFUSED if adapter else 4):
            row.problems.append(f"{road}: the manifest says {said!r}, and the exit code is {code}")
        return "in a package of its own" if road == "pack" and said.startswith("merged") else f"refused (exit {code})"
    if road == "merge":
        _make(merged, words)
        found = _exact_match(options, merged, merged)
        if abs(found - row.exact_match) > _ROUNDING:
            row.problems.append(f"merged: exact match {found:.4f}, and {row.exact_match:.4f} before")
        return f"exact, {found:.4f}"
    return _proven(options, out, road, words, row)


def _proven(options: argparse.Namespace, out: Path, road: str, words: tuple[object, ...], row: Row) -> str:
    """Make a package in one precision after the other until `verify` proves one; a fine-tune that int4 costs too much may need int8."""
    cells = []
    for precision in options.precision:
        package = out.with_name(f"{out.name}.{road}.{precision}")
        _make(package, (*words, "--precision", precision))
        data = f"it={options.test}" if "--adapter" in words else str(options.test)
        document = _slmops("verify", package, "--data", data, "--max-rows", options.verify_rows, "--metric", "exact_match", expected=None)
        if document.get("passed"):
            return "; ".join([*cells, f"{precision}: verify passes"])
        failed = next((stage for stage in document.get("stages", ()) if stage["name"] == document["failed_stage"]), {})
        cells.append(f"{precision}: {document.get('failed_stage')} not met ({str(failed.get('explanation', '')).partition(': ')[0]})")
    row.problems.append(f"{road}: {'; '.join(cells)}")
    return "; ".join(cells)


def _make(target: Path, words: tuple[object, ...]) -> None:
    if not (target / "slmops.json").is_file():
        _slmops(*words, "-o", target, "--force")


def _exact_match(options: argparse.Namespace, subject: Path, place: Path) -> float:
    kept = place.with_name(f"{place.name}.exact_match.json")
    if not kept.is_file():
        document = _slmops(
            "evaluate", subject, options.test, "--metric", "exact_match", *(_templates(options) if subject == options.model else ())
        )
        kept.write_text(json.dumps(document["metrics"]))
    return json.loads(kept.read_text())["exact_match"]["value"]


def _slmops(*words: object, expected: int | None = 0) -> dict[str, Any]:
    """Run the command line in a process of its own; return the document that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "slmops", *map(str, words), "--json", "--quiet"], capture_output=True, text=True, check=False
    )
    if expected is not None and done.returncode != expected:
        sys.exit(f"slmops {' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout)


def _templates(options: argparse.Namespace) -> list[str]:
    pairs = (("--prompt-template", options.prompt_template), ("--completion-template", options.completion_template))
    return [word for flag, value in pairs if value for word in (flag, value)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=None)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=None, help="of all methods (default: each method's own)")
    parser.add_argument("--precision", nargs="+", default=["int4", "int8"], help="of the packages, tried in this order until one is proven")
    parser.add_argument("--verify-rows", type=int, default=200)
    parser.add_argument("--least-gain", type=float, default=0.3, help="exact match above the base that each method has to reach")
    parser.add_argument("--no-roads", dest="roads", action="store_false")
    parser.add_argument("--prompt-template", default=None)
    parser.add_argument("--completion-template", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
