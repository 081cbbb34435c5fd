"""Is our int4 export faster than the one that onnxruntime-genai's builder makes by default, and than PyTorch in fp32?

One run: the model is exported twice, by slmops and by the builder with its defaults (`precision=int4`), and loaded in
PyTorch; three processes stay alive, one awake at a time, and their rounds alternate, the order swapped each round. All
three get the same token ids and the same number of threads.

    python benchmarks/decode_vs_builder.py MODEL                  # a Hugging Face folder, such as a 135M Llama
    python benchmarks/decode_vs_builder.py MODEL --threads 1 --rounds 11 --prompt-tokens 256

Prints a table, and one JSON line for programs. Ratios above 1: slmops is faster; their interval is a bootstrap over
rounds. A busy machine is said to be one: figures from it are worth little.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import slmops
from slmops import environment, errors
from slmops.benchmark import quiet, rounds, subjects
from slmops.benchmark.sides import Model, Side
from slmops.graph import building


def main() -> None:
    options = _options()
    with TemporaryDirectory(prefix="slmops-builder-", dir=options.work) as scratch, ExitStack() as stack:
        models = _models(options, Path(scratch))
        sides = [stack.enter_context(Side(model)) for model in models]
        length = options.prompt_tokens + options.new_tokens
        interface = subjects.read_interface([models[0].folder], min(side.start.max_length_tokens for side in sides))
        if length > interface.max_length_tokens:
            raise errors.InvalidInput(f"{length} tokens do not fit the model's {interface.max_length_tokens}", "give fewer --prompt-tokens")
        prompt, new_tokens, _ = subjects.timed_prompt(
            None, subjects.read_tokenizer(models[0].folder), interface, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens
        )
        _, stable = rounds.warm_up(sides, prompt, new_tokens)
        used, watch = _processor_seconds(sides), quiet.Watch()
        series = rounds.run_rounds(sides, prompt, new_tokens, options.rounds)
        busy = watch.share_of_others(_processor_seconds(sides) - used)
        peaks = [side.ask("usage")["peak_memory_bytes"] for side in sides]
        sizes = [subjects.size_bytes(model.folder) for model in models]
    _show(options, models, series, peaks, sizes, busy, stable)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder with config.json and *.safetensors")
    parser.add_argument("--threads", type=int, default=environment.usable_cores(), help="of every side (default: all cores)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, default=None, help="where the exports are made (default: the system's temporary folder)")
    return parser.parse_args()


def _models(options: argparse.Namespace, scratch: Path) -> list[Model]:
    """Export twice, at the same context length."""
    ours = slmops.export(options.model, out=scratch / "slmops", device="cpu", precision="int4")
    builders = scratch / "builder"
    context = int(ours.manifest.facts["max_length_tokens"])
    building.build(options.model, builders, precision="int4", provider="cpu", context_tokens=context)
    return [
        Model("slmops", ours.path, options.threads),
        Model("builder", builders, options.threads),
        Model("torch", options.model, options.threads),
    ]


def _processor_seconds(sides: list[Side]) -> float:
    return sum(side.ask("usage")["processor_seconds"] for side in sides)


def _show(
    options: argparse.Namespace,
    models: list[Model],
    series: list[rounds.Series],
    peaks: list[int],
    sizes: list[int],
    busy: float,
    stable: bool,
) -> None:
    names = {"slmops": "slmops int4", "builder": "builder's int4", "torch": "PyTorch fp32"}
    print(f"{options.model}: {options.prompt_tokens} prompt + {options.new_tokens} new tokens, {options.threads} threads, ", end="")
    print(f"{options.rounds} alternating rounds, {environment.machine().processor}\n")
    print("| | prefill, tokens/s | decode, tokens/s | peak memory, MB | weights, MB |\n| --- | ---: | ---: | ---: | ---: |")
    found = {}
    for model, one, peak, size in zip(models, series, peaks, sizes, strict=True):
        spreads = one.spreads()
        cells = [spreads[name] for name in ("prefill_tokens_per_second", "decode_tokens_per_second")]
        speeds = " | ".join(f"{cell.median:,.1f} ({cell.p5:,.1f} to {cell.p95:,.1f})" for cell in cells)
        print(f"| {names[model.role]} | {speeds} | {peak / 1e6:,.0f} | {size / 1e6:,.1f} |")
        found[model.role] = {name: spread.document() for name, spread in spreads.items()} | {"peak_memory_bytes": peak, "size_bytes": size}
    print()
    ratios = {}
    for model, one in zip(models[1:], series[1:], strict=True):
        ratios[model.role] = {name: rounds.ratios(series[0], one)[name] for name in ("prefill", "decode")}
        text = ", ".join(f"{name} {value.value:.2f} x [{value.low:.2f}, {value.high:.2f}]" for name, value in ratios[model.role].items())
        print(f"slmops against {names[model.role]}: {text}")
    if busy > quiet.BUSY or not stable:
        print(
            f"doubtful: other programs took {busy:.0%} of the processor{'' if stable else ', and not every side became stable in the warm-up'}"
        )
    document = {
        "model": str(options.model),
        "threads": options.threads,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "busy_share": round(busy, 4),
        "sides": found,
        "ratio": {role: {name: value.document() for name, value in values.items()} for role, values in ratios.items()},
    }
    print(json.dumps(document))


if __name__ == "__main__":
    try:
        main()
    except errors.SlmopsError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
