"""How do `verify`, `evaluate` and `bench` report what they measured?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.cli.display.figures import NONE, duration, estimate, number, share, size, spread
from slmops.cli.display.layout import Page

# What it means when a stage of verify is not met, and where to look.
_MEANING = {
    "files": "a file is not the one that was written: copy the package again, or make it again",
    "tokenizer": "text becomes other tokens than in training: the package has another tokenizer than its baseline",
    "template": "prompts are put together otherwise than in training",
    "stop_tokens": "answers end at another token than the one that was trained",
    "graph": "the graph is not what the manifest says (bits, block size, layers, architecture)",
    "logits": "the package predicts otherwise than its PyTorch model, beyond what its precision explains",
    "text": "the package answers otherwise than its PyTorch model",
    "retention": "the fine-tune did not survive: the package's weights or answers lack (part of) its effect",
    "adapters": "an adapter in the package is not the one that was trained",
    "self_test": "the answers recorded in the package do not come out here",
    "task": "the package does worse on the task than its PyTorch model",
}


def verification(page: Page, document: Mapping[str, Any]) -> None:
    """Write every stage with its figures against its bars, and explain the first that was not met."""
    stages = document.get("stages") or []
    page.table(("stage", "status", "figures"), [_stage(stage) for stage in stages], status=1)
    page.text()
    failed = document.get("failed_stage")
    if document.get("passed") and not document.get("conclusive", True):
        page.heading("nothing failed, and not everything is proven: see `inconclusive` above", "bold yellow")
    elif document.get("passed") and document.get("baseline", "") is None:
        page.heading("the package is whole, and computes what it computed when it was made", "bold green")
    elif document.get("passed") and document.get("level", "executed") != "executed":
        page.heading("verified as far as this machine can: a float twin of the package behaves as its PyTorch model does", "bold green")
    elif document.get("passed"):
        page.heading("verified: the package behaves as its PyTorch model does, within the bars above", "bold green")
    elif failed:
        page.heading(f"not verified: stage {failed} was not met", "bold red")
        stage = next((stage for stage in stages if stage.get("name") == failed), {})
        for line in (stage.get("explanation"), _MEANING.get(str(failed))):
            if line:
                page.text(str(line))
    else:
        page.heading("not verified", "bold red")
    undecided = [str(stage.get("name")) for stage in stages if stage.get("status") == "inconclusive"]
    if undecided:
        page.text(f"inconclusive: {', '.join(undecided)} (give more rows with --data)", "yellow")
    page.warnings(document)


def evaluation(page: Page, document: Mapping[str, Any]) -> None:
    """Write each metric with its interval and n, and where the answers are."""
    rows = [
        (name, number(value.get("value")), f"{number(value.get('low'))} to {number(value.get('high'))}", number(value.get("n")))
        for name, value in (document.get("metrics") or {}).items()
        if isinstance(value, Mapping)
    ]
    page.table(("metric", "value", "95 % interval", "n"), rows, right=(1, 3))
    page.facts([("answers", str(document.get("predictions") or "")), ("time", duration(document.get("seconds")))])
    page.warnings(document)


def bench(page: Page, document: Mapping[str, Any]) -> None:
    """Write candidate, baseline and ratio side by side."""
    candidate, baseline = document.get("candidate") or {}, document.get("baseline") or {}
    ratios = document.get("ratio") or {}
    rows = [row for row in (_bench_row(*line, candidate, baseline, ratios) for line in _BENCH) if row]
    for name in {**(candidate.get("metrics") or {}), **(baseline.get("metrics") or {})}:
        sides = [estimate(_dict((side.get("metrics") or {}).get(name))) for side in (candidate, baseline)]
        difference = _dict((document.get("difference") or {}).get(name))
        rows.append((name.replace("_", " "), *sides, f"difference {estimate(difference, 3)}" if difference else NONE))
    if not baseline:
        rows = [row[:2] for row in rows]
    page.table(("", "candidate", "baseline", "ratio")[: 4 if baseline else 2], rows, right=(1, 2, 3)[: 3 if baseline else 1])
    page.text()
    if baseline:
        page.text("A ratio above 1: the candidate is better. Medians, 5th to 95th percentile in ( ), 95 % interval in [ ].", "dim")
    page.facts(
        [
            ("candidate", _side(candidate)),
            ("baseline", _side(baseline)),
            ("threads", number(candidate.get("threads"))),
            ("time", duration(document.get("seconds"))),
        ]
    )
    page.warnings(document)


# label, key of a side, how it is written, key of `ratio`
_BENCH = (
    ("load, s", "load_seconds", spread, "load"),
    ("first token, ms", "ttft_ms", spread, "ttft"),
    ("prefill, tokens/s", "prefill_tokens_per_second", spread, "prefill"),
    ("decode, tokens/s", "decode_tokens_per_second", spread, "decode"),
    ("peak memory", "peak_memory_bytes", size, "peak_memory"),
    ("size on disk", "size_bytes", size, "size"),
    ("share of bandwidth", "bandwidth_share", share, ""),
)


def _bench_row(
    label: str, key: str, write: Any, ratio_key: str, candidate: Mapping[str, Any], baseline: Mapping[str, Any], ratios: Mapping[str, Any]
) -> tuple[str, ...] | None:
    cells = write(candidate.get(key)), write(baseline.get(key))
    if cells == (NONE, NONE):
        return None
    return (label, *cells, estimate(_dict(ratios.get(ratio_key)), 3))


def _side(side: Mapping[str, Any]) -> str:
    return str(side.get("model") or side.get("path") or side.get("folder") or "")


def _stage(stage: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return a stage's row: what it says of its figures and bars itself, or these put into words."""
    if stage.get("explanation"):
        return str(stage.get("name", "")), str(stage.get("status", "")), str(stage["explanation"])
    figures, bars = dict(stage.get("figures") or {}), dict(stage.get("bars") or {})
    parts = [f"{_spoken(name)} {number(value, 3)}{_against(bars.pop(name, None))}" for name, value in figures.items() if value is not None]
    parts += [f"bar {_spoken(name)}{_against(bar)}" for name, bar in bars.items()]
    return str(stage.get("name", "")), str(stage.get("status", "")), "\n".join(parts)


def _against(bar: Any) -> str:
    if bar is None:
        return ""
    if isinstance(bar, (list, tuple)) and len(bar) == 2:
        return f" (bar {number(bar[0], 3)} to {number(bar[1], 3)})"
    return f" (bar {number(bar, 3)})"


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _dict(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None if value is None else {"value": value}
