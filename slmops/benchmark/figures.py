"""What did a benchmark measure? The figures of each side, their ratios, and the document and table made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.results import Estimate, Spread


@dataclass(frozen=True)
class Figures:
    """What was measured of one side."""

    model: str
    engine: str
    precision: str
    """Of the weights: int4, fp32 ...; empty where nothing says so."""
    threads: int
    load_seconds: Spread
    """Loading the model in a fresh process, the engine's libraries already imported."""
    start_seconds: Spread
    """From the start of a fresh process to a loaded model, imports and all."""
    ttft_ms: Spread
    """From the prompt to the first new token."""
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    """Of the tokens after the first."""
    peak_memory_bytes: int
    """Highest resident memory of the process, from its start to the end of the timed rounds."""
    size_bytes: int
    """Graphs and weights on disk."""
    bytes_per_token: int
    bandwidth_share: float
    """Bytes of weights that decoding reads a second, over the memory bandwidth that this machine reaches."""
    metrics: dict[str, Estimate]

    def document(self) -> dict[str, Any]:
        """Return the JSON form of a side."""
        spreads = ("load_seconds", "start_seconds", "ttft_ms", "prefill_tokens_per_second", "decode_tokens_per_second")
        plain = ("model", "engine", "precision", "threads", "peak_memory_bytes", "size_bytes", "bytes_per_token", "bandwidth_share")
        return {
            **{name: getattr(self, name) for name in plain},
            **{name: getattr(self, name).document() for name in spreads},
            "metrics": {name: estimate.document() for name, estimate in self.metrics.items()},
        }


@dataclass(frozen=True)
class Benchmark:
    """A candidate beside its baseline, or alone."""

    candidate: Figures
    baseline: Figures | None
    ratio: dict[str, Estimate]
    """Above 1: the candidate is better."""
    difference: dict[str, Estimate]
    """Candidate minus baseline, paired over the same rows, of each metric that both have."""
    prompt_tokens: int
    new_tokens: int
    rounds: int
    warmup_rounds: int
    busy_share: float
    """Share of the usable cores that other programs took during the rounds."""
    bandwidth_bytes_per_second: float
    machine: dict[str, Any]
    warnings: tuple[str, ...]
    seconds: float
    artifact: Path | None = field(default=None)

    def document(self) -> dict[str, Any]:
        """Return the `--json` document of `slmops bench`."""
        written = {"artifact": str(self.artifact), "kind": "benchmark"} if self.artifact else {}
        return {
            "command": "bench",
            "ok": True,
            **written,
            "candidate": self.candidate.document(),
            "baseline": self.baseline.document() if self.baseline else None,
            "ratio": {name: estimate.document() for name, estimate in self.ratio.items()},
            "difference": {name: estimate.document() for name, estimate in self.difference.items()},
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "warmup_rounds": self.warmup_rounds,
            "busy_share": round(self.busy_share, 4),
            "bandwidth_bytes_per_second": self.bandwidth_bytes_per_second,
            "machine": self.machine,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> str:
        """Return the figures as a Markdown table, ready to paste."""
        sides = [side for side in (self.candidate, self.baseline) if side]
        lines = [["", "candidate", "baseline", "ratio"][: 4 if self.baseline else 2]]
        lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
        lines += [[label, *(write(side) for side in sides)] + self._ratio(key) for label, key, write in _ROWS]
        for name in dict.fromkeys(name for side in sides for name in side.metrics):
            cells = [_estimate(side.metrics.get(name)) for side in sides]
            change = self.difference.get(name)
            lines.append(
                [name.replace("_", " "), *cells] + ([f"difference {_estimate(change)}" if change else ""] if self.baseline else [])
            )
        models = "; ".join(f"{role} `{side.model}` ({side.engine})" for role, side in zip(("candidate", "baseline"), sides, strict=False))
        above = (
            f"{models}. Prompt of {self.prompt_tokens} tokens, {self.new_tokens} new, {self.candidate.threads} threads, {self.rounds} rounds"
            f"{' alternating' if self.baseline else ''}, {self.machine.get('processor', '')}.\n"
            "Median (5th to 95th percentile); [95 % interval]; a ratio above 1: the candidate is better.\n"
        )
        return above + "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def _ratio(self, key: str) -> list[str]:
        return [_estimate(self.ratio.get(key))] if self.baseline else []


def _spread(value: Spread, scale: float = 1.0) -> str:
    return f"{value.median * scale:,.4g} ({value.p5 * scale:,.4g} to {value.p95 * scale:,.4g})"


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return ""
    if value.low == value.high:
        return f"{value.value:.3g}"
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"


_ROWS: Any = (
    ("load, s", "load", lambda side: _spread(side.load_seconds)),
    ("start to ready, s", "start", lambda side: _spread(side.start_seconds)),
    ("first token, ms", "ttft", lambda side: _spread(side.ttft_ms)),
    ("prefill, tokens/s", "prefill", lambda side: _spread(side.prefill_tokens_per_second)),
    ("decode, tokens/s", "decode", lambda side: _spread(side.decode_tokens_per_second)),
    ("peak memory, MB", "peak_memory", lambda side: f"{side.peak_memory_bytes / 1e6:,.0f}"),
    ("size on disk, MB", "size", lambda side: f"{side.size_bytes / 1e6:,.1f}"),
    ("share of memory bandwidth", "", lambda side: f"{side.bandwidth_share:.0%}"),
)
