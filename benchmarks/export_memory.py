"""Print what an export costs beside the builder's own: `python benchmarks/export_memory.py [SHAPE ...] --work DIR`.

For models with the shapes of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B and random weights (made in DIR, the last one in
bf16 as it is published): peak resident memory of the process and all that it starts, seconds, and processor seconds, of
`slmops export` and of onnxruntime-genai's builder as its documentation calls it (`python -m onnxruntime_genai.models.builder`),
precision by precision, `--rounds` times in turn; and of `slmops export --precision int4,int8`. The bar of memory is 1.4 times the
float32 weights and 1 GB, that of time the builder's own. A page that two processes share is counted in both. Processor seconds
are what a busy machine leaves as they are. A Markdown table, a row a run; exit code 1 past the bar of memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import psutil
from families import write_tokenizer

from slmops.runtime.hugging_face import parameter_count

HEADER = "| shape | float32 weights | bar | run | peak memory | seconds | processor seconds |\n| --- | --- | --- | --- | --- | --- | --- |"
_EVERY_SECONDS = 0.02
_SMALL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 2048, "tie_word_embeddings": True}
# hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary: of the models' config.json.
SHAPES: dict[str, tuple[str, str, tuple[int, int, int, int, int, int]]] = {
    "135M": ("Llama", "float32", (576, 1536, 30, 9, 3, 49152)),
    "0.5B": ("Qwen2", "float32", (896, 4864, 24, 14, 2, 151936)),
    "1.5B": ("Qwen2", "bfloat16", (1536, 8960, 28, 12, 2, 151936)),
}


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    peak_bytes: int
    seconds: float
    processor_seconds: float


def make_shape(folder: Path, name: str) -> Path:
    """Write a model of random weights, with a tokenizer of bytes."""
    import torch
    import transformers

    if (folder / "model.safetensors").is_file():
        return folder
    family, dtype, (hidden, intermediate, layers, heads, kv_heads, vocabulary) = SHAPES[name]
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": vocabulary}
    config = getattr(transformers, f"{family}Config")(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, **_SMALL)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="50GB")
    torch.set_default_dtype(torch.float32)
    return write_tokenizer(folder)


def cost_of(command: list[str]) -> Cost:
    """Run a command, and look every 20 ms at the memory of it and its children.

    Raises:
        SystemExit: it failed.
    """
    before, started, peak = _processor_seconds(), time.perf_counter(), 0
    # A pipe that nobody reads would stop the builder, which says much; and what slmops knows of the model's hash would save it a second.
    with TemporaryFile("w+") as output, TemporaryDirectory() as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "XDG_CACHE_HOME": cache}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, sum(_resident(watched)))
            time.sleep(_EVERY_SECONDS)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{output.read()[-2000:]}")
    return Cost(peak, time.perf_counter() - started, _processor_seconds() - before)


def _resident(process: psutil.Process) -> Iterator[int]:
    try:
        for one in (process, *process.children(recursive=True)):
            yield one.memory_info().rss
    except psutil.Error:
        return


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", help="all unless given")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and what is made of them")
    parser.add_argument("--precisions", default="int4;int8;fp32;int4,int8", help="runs, with semicolons between")
    parser.add_argument("--no-own", action="store_true", help="leave out the builder's own builds")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    print(HEADER, flush=True)
    good = True
    for shape in options.shapes or SHAPES:
        model = make_shape(options.work / shape, shape)
        weights = 4 * parameter_count(model)
        bar = 1.4 * weights + 1e9
        for precision in options.precisions.split(";") * options.rounds:
            out = options.work / "out"
            runs: list[tuple[str, list[str]]] = [
                (f"slmops {precision}", ["-m", "slmops", "export", str(model), "-o", str(out), "--precision", precision, "--quiet"])
            ]
            if "," not in precision and not options.no_own:
                own = ["-i", str(model), "-o", str(out), "-p", precision, "-e", "cpu", "-c", str(options.work / "cache")]
                runs.append((f"the builder's own {precision}", ["-m", "onnxruntime_genai.models.builder", *own]))
            for name, arguments in runs:
                shutil.rmtree(out, ignore_errors=True)
                cost = cost_of([sys.executable, *arguments])
                good &= not name.startswith("slmops") or cost.peak_bytes <= bar
                figures = [f"{weights / 1e9:.2f} GB", f"{bar / 1e9:.2f} GB", name, f"{cost.peak_bytes / 1e9:.2f} GB"]
                print(f"| {' | '.join([shape, *figures, f'{cost.seconds:.1f}', f'{cost.processor_seconds:.1f}'])} |", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
