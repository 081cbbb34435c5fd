"""What do a switch between adapters and a hundred loaded adapters cost? `python benchmarks/many_adapters.py PACKAGE`.

PACKAGE was made by `slmops pack` and has two adapters or more. Two figures, each in a process of its own:

- a switch: from one request's end to the next request's generator with another adapter on, before its prompt, both loaded;
  beside it the same without a change of adapter, and a first token, to see what of a request the switch is;
- resident memory with N copies of an adapter loaded, against the package with none, and N times the size of its file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from slmops import artifact
from slmops.runtime import Package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--count", type=int, default=100, help="adapters loaded at once")
    parser.add_argument("--switches", type=int, default=200)
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        switch = pool.apply(time_switches, (given.package, given.switches))
    with context.Pool(1) as pool, TemporaryDirectory(prefix="slmops-many-", dir=given.package.resolve().parent) as scratch:
        memory = pool.apply(measure_memory, (given.package, given.count, Path(scratch) / "many"))
    print(
        f"switch {switch['switch_ms']:.3f} ms (95 % below {switch['switch_p95_ms']:.3f}), the same adapter again {switch['same_ms']:.3f} ms"
    )
    print(
        f"{given.count} adapters of {memory['file_bytes'] / 1e6:.2f} MB: {memory['with_bytes'] / 1e6:.1f} MB resident, base {memory['base_bytes'] / 1e6:.1f} MB, "
        f"bound {memory['bound_bytes'] / 1e6:.1f} MB (base + {given.count} files + 15 %)"
    )
    print(json.dumps(switch | memory))


def time_switches(folder: Path, count: int) -> dict[str, float]:
    """Time what a request does before its prompt."""
    package = Package(folder)
    names = package.adapters[:2]
    for name in names:
        package.load(name)
    runners = {name: package.runner(name) for name in names}
    options = {"max_length": package.runner().max_length_tokens, "do_sample": False}

    def prepared(name: str) -> float:
        started = time.perf_counter()
        runner = runners[name]
        generator = runner._generator(options)
        seconds = time.perf_counter() - started
        generator.append_tokens(np.array([1, 2, 3], np.int32))
        generator.generate_next_token()
        return 1e3 * seconds

    for name in names * 5:
        prepared(name)
    switching = [prepared(names[number % 2]) for number in range(count)]
    same = [prepared(names[0]) for _ in range(count)]
    return {
        "switch_ms": statistics.median(switching),
        "switch_p95_ms": float(np.quantile(switching, 0.95)),
        "same_ms": statistics.median(same),
    }


def measure_memory(folder: Path, count: int, copy: Path) -> dict[str, float]:
    """Load copies of the first adapter one by one; each has a file and a name of its own."""
    shutil.copytree(folder, copy)
    manifest = artifact.load(copy).manifest
    name, details = next(iter(manifest.facts["adapters"].items()))
    adapters = {}
    for number in range(count):
        file = f"adapters/{name}-{number}.onnx_adapter"
        shutil.copyfile(copy / details["file"], copy / file)
        adapters[f"{name}-{number}"] = details | {"file": file}
    artifact.seal(copy, facts=manifest.facts | {"adapters": adapters})
    package, process = Package(copy, most_loaded=count), psutil.Process()
    prompt = [1, 2, 3, 4, 5]
    package.runner(f"{name}-0").runtime_logits(prompt)  # the graph that takes adapters is in memory, with the first of them
    file_bytes = (copy / details["file"]).stat().st_size
    base = process.memory_info().rss - file_bytes
    for adapter in package.adapters:
        package.runner(adapter).runtime_logits(prompt)
    loaded = process.memory_info().rss
    return {
        "file_bytes": file_bytes,
        "base_bytes": base,
        "with_bytes": loaded,
        "bound_bytes": (base + count * file_bytes) * 1.15,
        "count": count,
    }


if __name__ == "__main__":
    main()
