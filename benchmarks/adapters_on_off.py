"""What does an adapter cost at run time, on and off, beside the same base recipe without any LoRA inputs?

One run: the base is exported and packed by slmops with the same recipe; processes stay alive, one awake at a time, and
their rounds alternate, the order swapped each round. All get the same token ids and the same number of threads.

    python benchmarks/adapters_on_off.py MODEL ADAPTER            # a Hugging Face folder, and a PEFT folder of it
    python benchmarks/adapters_on_off.py MODEL ADAPTER --threads 2 --starts 8 --new-tokens 32

Sides: `base` (the export), `off` (the package without an adapter), `on` (with it), and `inputs empty` (the graph that
takes adapters, with none: what off would be without the base's own graph). A table, and one JSON line for programs;
ratios are medians over rounds, their interval a bootstrap over rounds; below 1: slower than the base.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import slmops
from slmops import artifact, environment
from slmops.benchmark import quiet, rounds, subjects
from slmops.benchmark.rounds import Series
from slmops.benchmark.sides import Model, Side
from slmops.results import Estimate


def main() -> None:
    options = _options()
    with TemporaryDirectory(prefix="slmops-adapters-", dir=options.work) as scratch:
        models = _models(options, Path(scratch))
        measured = [_measure(models, options) for _ in range(options.starts)]
    series = [_joined([one[0][i] for one in measured]) for i in range(len(models))]
    peaks = [max(one[1][i] for one in measured) for i in range(len(models))]
    _show(options, models, series, peaks, max(one[2] for one in measured))


def _measure(models: list[Model], options: argparse.Namespace) -> tuple[list[Series], list[int], float]:
    """Time all sides in fresh processes: where a process's weights happen to lie makes up to a tenth of its speed."""
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(model)) for model in models]
        interface = subjects.read_interface([models[0].folder], min(side.start.max_length_tokens for side in sides))
        prompt, new_tokens, _ = subjects.timed_prompt(
            None, subjects.read_tokenizer(models[0].folder), interface, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens
        )
        rounds.warm_up(sides, prompt, new_tokens)
        used, watch = _processor_seconds(sides), quiet.Watch()
        series = rounds.run_rounds(sides, prompt, new_tokens, options.rounds)
        busy = watch.share_of_others(_processor_seconds(sides) - used)
        return series, [side.ask("usage")["peak_memory_bytes"] for side in sides], busy


def _joined(parts: list[Series]) -> Series:
    whole = Series(parts[0].prompt_tokens)
    for part in parts:
        whole.first_seconds += part.first_seconds
        whole.decode_rates += part.decode_rates
    return whole


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--threads", type=int, default=environment.usable_cores())
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds of a start")
    parser.add_argument("--starts", type=int, default=5, help="how often all sides are started anew")
    parser.add_argument("--work", type=Path, default=None)
    return parser.parse_args()


def _models(options: argparse.Namespace, scratch: Path) -> list[Model]:
    base = slmops.export(options.model, out=scratch / "base", precision=options.precision)
    package = slmops.pack(options.model, adapter=[f"a={options.adapter}"], out=scratch / "package", precision=options.precision)
    empty = scratch / "empty"
    shutil.copytree(package.path, empty)
    (empty / "model.onnx").unlink()  # without the base's own graph, the one that takes adapters runs
    artifact.seal(empty)
    plain = Model("base", base.path, options.threads)
    return [
        plain,
        replace(plain, role="off", folder=package.path),
        replace(plain, role="on", folder=package.path, adapter=("a",)),
        replace(plain, role="inputs empty", folder=empty),
    ]


def _processor_seconds(sides: list[Side]) -> float:
    return sum(side.ask("usage")["processor_seconds"] for side in sides)


def _show(options: argparse.Namespace, models: list[Model], series: list[Series], peaks: list[int], busy: float) -> None:
    print("| side | prefill tok/s | decode tok/s | prefill x base | decode x base | peak memory |\n| --- | --- | --- | --- | --- | --- |")
    document: dict[str, object] = {
        "model": str(options.model.name),
        "threads": options.threads,
        "rounds": options.rounds,
        "busy_share": busy,
    }
    for model, own, peak in zip(models, series, peaks, strict=True):
        spreads, ratio = own.spreads(), rounds.ratios(own, series[0])
        prefill, decode = (spreads[f"{kind}_tokens_per_second"].median for kind in ("prefill", "decode"))
        print(
            f"| {model.role} | {prefill:,.0f} | {decode:,.1f} | {_text(ratio['prefill'])} | {_text(ratio['decode'])} | {peak / 1e6:,.0f} MB |"
        )
        document[model.role] = {key: estimate.document() for key, estimate in ratio.items()} | {"decode_tokens_per_second": decode}
    if busy > quiet.BUSY:
        print(f"\nOther programs took {busy:.0%} of the processor: these figures are worth little.", file=sys.stderr)
    print(json.dumps(document))


def _text(ratio: Estimate) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


if __name__ == "__main__":
    main()
