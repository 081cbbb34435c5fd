r"""Do runs take the memory and the time that `slmops finetune` foretells? Each setting in a process of its own.

    python benchmarks/estimates.py rows.jsonl --prompt-template '{text}\\nIntent:' --completion-template ' {intent}' \\
        --small MODEL --large MODEL --work DIR

Settings: LoRA on both models in bf16 and fp32, other batch sizes and ranks, other methods, long rows. Prints a table and one
JSON line; exit code 1 where memory is more than a quarter off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BOUND = 0.25
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, small model": ("small", {}),
    "lora in fp32, batch 32, small model": ("small", {"precision": "fp32", "batch_size": 32}),
    "lora": ("large", {}),
    "lora in fp32": ("large", {"precision": "fp32"}),
    "lora of rank 64, batch 16": ("large", {"lora_rank": 64, "batch_size": 16}),
    "lora on q and v, batch 2": ("large", {"target_modules": ["q_proj", "v_proj"], "batch_size": 2}),
    "full": ("large", {"method": "full"}),
    "qlora": ("large", {"method": "qlora"}),
    "dora": ("large", {"method": "dora"}),
    "loha": ("large", {"method": "loha"}),
    "lokr": ("large", {"method": "lokr"}),
    "adalora": ("large", {"method": "adalora"}),
    "bottleneck": ("large", {"method": "bottleneck"}),
    "bitfit": ("large", {"method": "bitfit"}),
    "loreft": ("large", {"method": "loreft"}),
    "prompt": ("large", {"method": "prompt"}),
    "long rows (pretrain)": ("large", {"objective": "pretrain", "max_length_tokens": 256, "batch_size": 4}),
}


def main() -> None:
    options = _options()
    if options.worker:
        print("RESULT " + json.dumps(_run(options, *SETTINGS[options.worker])))
        return
    found = {}
    print("| setting | memory | foretold | ratio | loop | foretold | ratio |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.only or SETTINGS:
        done = subprocess.run([sys.executable, *sys.argv, "--worker", name], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        found[name] = facts = json.loads(lines[-1][7:])
        said = facts["estimate"]
        print(
            f"| {name} | {facts['peak_memory_bytes'] / 1e6:,.0f} MB | {said['memory_bytes'] / 1e6:,.0f} MB | {said['memory_ratio']:.2f} "
            f"| {facts['loop_seconds']:.1f} s | {said['seconds']:.1f} s | {said['seconds_ratio']:.2f} |",
            flush=True,
        )
    print(json.dumps(found))
    sys.exit(any(abs(facts["estimate"]["memory_ratio"] - 1) > BOUND for facts in found.values()))


def _run(options: argparse.Namespace, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    import slmops
    from slmops.config import decode_escapes

    templates = {
        "prompt_template": decode_escapes(options.prompt_template),
        "completion_template": decode_escapes(options.completion_template),
    }
    data = options.text if settings.get("objective") == "pretrain" else options.data
    given = {"max_steps": options.steps, "validation_share": 0.0, **({} if data is options.text else templates), **settings}
    out = options.work / options.worker.replace(" ", "-")
    made = slmops.finetune(options.small if model == "small" else options.large, data, out=out, force=True, **given)
    facts = made.manifest.facts
    return {name: facts[name] for name in ("estimate", "peak_memory_bytes", "loop_seconds")}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="of the setting with long rows")
    parser.add_argument("--prompt-template", required=True)
    parser.add_argument("--completion-template", required=True)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", action="append", choices=SETTINGS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
