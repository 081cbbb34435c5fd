"""From a package to its figures beside its baseline: what does `slmops bench` do?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slmops import artifact, environment, progress, results
from slmops.bandwidth import measure_bandwidth
from slmops.benchmark import accuracy, quiet, rounds, subjects
from slmops.benchmark.figures import Benchmark, Figures
from slmops.benchmark.rounds import Series
from slmops.benchmark.sides import Model, Side, Start
from slmops.config import BenchSettings, flat, load
from slmops.errors import InvalidInput
from slmops.results import Estimate
from slmops.runtime.loading import default_threads

# Loading is measured in fresh processes: three of a side where that takes no longer than this, else one.
_MOST_STARTS, _START_BUDGET_SECONDS = 3, 15.0


def bench(package: str | Path, *, config: Any = None, **overrides: Any) -> Benchmark:
    """Measure a package against the PyTorch model that it came from.

    Args:
        package: folder of a package or export; a model or an adapter too.
        config: YAML file or mapping of `BenchSettings`.
        overrides: single settings, such as `baseline="none"`.

    Raises:
        InvalidInput: no baseline is known, a metric without data, or a wrong setting.
        BadArtifact: a folder is incomplete or changed, or the baseline is another than the package was exported from.
        Unavailable: an engine is not installed.
        RunFailed: a side's process ended.
    """
    started = time.perf_counter()
    settings = load(BenchSettings, config, **overrides)
    if settings.metric and not settings.data:
        raise InvalidInput(f"metric: {settings.metric} needs rows", "give them with --data")
    if settings.out is not None:
        artifact.refuse_occupied(settings.out, force=settings.force)
    folder = Path(package)
    found = subjects.check(folder)
    adapter = tuple(settings.adapter or ())
    baseline, warnings = subjects.find_baseline(folder, found, settings.baseline, adapter)
    threads = settings.threads or default_threads(baseline or folder)
    models = [Model("candidate", folder, threads, adapter=adapter)]
    if baseline is not None:
        subjects.check(baseline)
        models.append(Model("baseline", baseline, threads, settings.baseline_precision))
    measured = replace(_measure(models, settings, warnings), seconds=time.perf_counter() - started)
    return measured if settings.out is None else _write(measured, models, settings)


def _measure(models: Sequence[Model], settings: BenchSettings, warnings: list[str]) -> Benchmark:
    with ExitStack() as stack:
        sides = _start(models, stack)
        tokenizer = subjects.read_tokenizer(models[0].folder)
        interface = subjects.read_interface(
            [model.folder for model in models], min(side.start.max_length_tokens for side in sides), models[0].adapter
        )
        task = subjects.read_task(settings.data, settings.metric, settings.max_rows, tokenizer, interface) if settings.data else None
        prompt, new_tokens, cut = subjects.timed_prompt(
            task, tokenizer, interface, prompt_tokens=settings.prompt_tokens, new_tokens=settings.new_tokens
        )
        warmup_rounds, stable = rounds.warm_up(sides, prompt, new_tokens)
        before, watch = _processor_seconds(sides), quiet.Watch()
        series = rounds.run_rounds(sides, prompt, new_tokens, settings.rounds)
        others = watch.share_of_others(_processor_seconds(sides) - before)
        peaks = [side.ask("usage")["peak_memory_bytes"] for side in sides]
        bandwidth = measure_bandwidth(threads=models[0].threads)
        exact = accuracy.measure_task(sides, task) if task else accuracy.measure_text(sides, tokenizer, interface)
        starts = [[side.start] for side in sides]
    _start_again(models, starts)
    figures = [_figures(model, starts[i], series[i], peaks[i], bandwidth, exact.metrics[i]) for i, model in enumerate(models)]
    warnings += _noise(stable, warmup_rounds, others)
    return Benchmark(
        candidate=figures[0],
        baseline=figures[1] if len(figures) == 2 else None,
        ratio=_ratios(figures, series) if len(figures) == 2 else {},
        difference=exact.difference,
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        rounds=settings.rounds,
        warmup_rounds=warmup_rounds,
        busy_share=others,
        bandwidth_bytes_per_second=bandwidth,
        machine=asdict(environment.machine()),
        warnings=(*warnings, *cut, *(task.warnings if task else ()), *_cached(figures)),
        seconds=0.0,
    )


def _start(models: Sequence[Model], stack: ExitStack) -> list[Side]:
    sides = []
    with progress.task("load", total=len(models), unit="models") as task:
        for model in models:
            sides.append(stack.enter_context(Side(model)))
            task.advance()
    return sides


def _start_again(models: Sequence[Model], starts: list[list[Start]]) -> None:
    """Start further fresh processes, alternating, while that is cheap."""
    cost = sum(known[0].start_seconds for known in starts)
    again = min(_MOST_STARTS - 1, int(_START_BUDGET_SECONDS / cost))
    with progress.task("load again", total=again * len(models), unit="processes") as task:
        for _ in range(again):
            for model, known in zip(models, starts, strict=True):
                with Side(model) as side:
                    known.append(side.start)
                task.advance()


def _figures(model: Model, starts: Sequence[Start], series: Series, peak: int, bandwidth: float, metrics: dict[str, Estimate]) -> Figures:
    found = artifact.find(model.folder)
    precision = found.manifest.facts.get("precision") if found is not None else None
    if precision is None and starts[0].engine == "torch":
        precision = model.precision
    spreads = series.spreads()
    decoded = spreads["decode_tokens_per_second"].median * starts[0].bytes_per_token
    return Figures(
        model=str(model.folder),
        engine=starts[0].engine,
        precision=str(precision or ""),
        threads=starts[0].threads,
        load_seconds=results.spread([start.load_seconds for start in starts]),
        start_seconds=results.spread([start.start_seconds for start in starts]),
        **spreads,
        peak_memory_bytes=peak,
        size_bytes=subjects.size_bytes(model.folder),
        bytes_per_token=starts[0].bytes_per_token,
        bandwidth_share=decoded / bandwidth,
        metrics=metrics,
    )


def _ratios(figures: Sequence[Figures], series: Sequence[Series]) -> dict[str, Estimate]:
    candidate, baseline = figures
    single = {
        "size": baseline.size_bytes / candidate.size_bytes,
        "peak_memory": baseline.peak_memory_bytes / candidate.peak_memory_bytes,
    }
    starts = {
        "load": results.ratio(baseline.load_seconds.samples, candidate.load_seconds.samples),
        "start": results.ratio(baseline.start_seconds.samples, candidate.start_seconds.samples),
    }
    return rounds.ratios(*series) | {name: Estimate(value, value, value, 1) for name, value in single.items()} | starts


def _processor_seconds(sides: Sequence[Side]) -> float:
    return sum(side.ask("usage")["processor_seconds"] for side in sides)


def _noise(stable: bool, warmup_rounds: int, others: float) -> list[str]:
    found = []
    if others > quiet.BUSY:
        found.append(
            f"other programs took {others:.0%} of the processor during the rounds: the speeds and their ratios are doubtful; "
            "measure on a quiet machine, or with fewer --threads"
        )
    if not stable:
        found.append(f"rounds still differed by more than {rounds.STABLE:.0%} after {warmup_rounds} of warm-up")
    return found


def _cached(figures: Sequence[Figures]) -> list[str]:
    """Say why a share above 1 is no error."""
    return [
        f"{side.model}: decoding reads its weights faster than memory gives them: they lie in the processor's caches"
        for side in figures
        if side.bandwidth_share > 1
    ]


def _write(measured: Benchmark, models: Sequence[Model], settings: BenchSettings) -> Benchmark:
    assert settings.out is not None
    with artifact.create(settings.out, kind="benchmark", command="bench", config=flat(settings), force=settings.force) as draft:
        measured = replace(measured, artifact=settings.out)
        artifact.write_json(draft.folder / "benchmark.json", measured.document())
        (draft.folder / "table.md").write_text(measured.table(), encoding="utf-8")
        for model in models:
            draft.add_input(model.role, model.folder)
        draft.warnings = list(measured.warnings)
        draft.metrics = {f"ratio_{name}": estimate.document() for name, estimate in measured.ratio.items()} | {
            name: estimate.document() for name, estimate in measured.candidate.metrics.items()
        }
    return measured
