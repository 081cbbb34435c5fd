"""How is speed measured so that two figures can be compared? Alternating rounds, after a warm-up, the order swapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slmops import progress, results
from slmops.benchmark.sides import Side
from slmops.results import Estimate, Spread

STABLE = 0.05
"""Two successive rounds this near each other: a side is warm."""
_MOST_WARMUP_ROUNDS = 5


@dataclass
class Series:
    """The rounds of one side."""

    prompt_tokens: int
    first_seconds: list[float] = field(default_factory=list)
    decode_rates: list[float] = field(default_factory=list)
    """Tokens a second after the first token."""

    def add(self, first_token_seconds: float, token_seconds: Sequence[float]) -> None:
        """Add one round."""
        self.first_seconds.append(first_token_seconds)
        self.decode_rates.append(len(token_seconds) / sum(token_seconds))

    @property
    def prefill_rates(self) -> list[float]:
        """Prompt tokens a second, up to the first new token."""
        return [self.prompt_tokens / seconds for seconds in self.first_seconds]

    @property
    def is_stable(self) -> bool:
        """The last two rounds are near each other."""
        pairs = [values[-2:] for values in (self.first_seconds, self.decode_rates)]
        return all(len(pair) == 2 and abs(pair[1] - pair[0]) <= STABLE * min(pair) for pair in pairs)

    def spreads(self) -> dict[str, Spread]:
        """Return the timed figures of a side."""
        return {
            "ttft_ms": results.spread([1000 * seconds for seconds in self.first_seconds]),
            "prefill_tokens_per_second": results.spread(self.prefill_rates),
            "decode_tokens_per_second": results.spread(self.decode_rates),
        }


def warm_up(sides: Sequence[Side], prompt: Sequence[int], new_tokens: int) -> tuple[int, bool]:
    """Run rounds that do not count until every side is stable, or five.

    Returns:
        (rounds, whether all sides became stable).
    """
    series = [Series(len(prompt)) for _ in sides]
    with progress.task("warm up") as task:
        for number in range(1, _MOST_WARMUP_ROUNDS + 1):
            _round(sides, series, prompt, new_tokens, number)
            task.advance()
            if all(one.is_stable for one in series):
                return number, True
    return _MOST_WARMUP_ROUNDS, False


def run_rounds(sides: Sequence[Side], prompt: Sequence[int], new_tokens: int, rounds: int) -> list[Series]:
    """Time `rounds` rounds of every side, alternating, the order swapped each time; return each side's series."""
    series = [Series(len(prompt)) for _ in sides]
    with progress.task("measure", total=rounds, unit="rounds") as task:
        for number in range(rounds):
            _round(sides, series, prompt, new_tokens, number)
            task.advance(1, **{side.model.role: round(one.decode_rates[-1], 1) for side, one in zip(sides, series, strict=True)})
    return series


def ratios(candidate: Series, baseline: Series) -> dict[str, Estimate]:
    """Return candidate against baseline, above 1 = better, round by round so that the machine's drift cancels."""
    speed_up = results.ratio(baseline.first_seconds, candidate.first_seconds)
    return {
        "decode": results.ratio(candidate.decode_rates, baseline.decode_rates),
        "prefill": speed_up,  # the same prompt on both sides: prefill and TTFT are one measurement
        "ttft": speed_up,
    }


def _round(sides: Sequence[Side], series: Sequence[Series], prompt: Sequence[int], new_tokens: int, number: int) -> None:
    order = list(zip(sides, series, strict=True))
    for side, one in order if number % 2 == 0 else reversed(order):
        timing = side.ask("time", prompt=list(prompt), new_tokens=new_tokens)
        one.add(timing["first_token_seconds"], timing["token_seconds"])
