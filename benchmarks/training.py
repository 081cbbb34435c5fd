"""How long does a LoRA fine-tune take, beside TRL's trainer on the same rows, and what did each part of the step buy?

Every run is a process of its own (its peak memory is its own too); sides alternate, and the first round is not counted.

    python benchmarks/training.py MODEL rows.jsonl --prompt-template '{text}\\nIntent:' --completion-template ' {intent}' --rows 2000
    python benchmarks/training.py MODEL rows.jsonl ... --ladder          # our step, built up part by part, int8 last
    python benchmarks/training.py MODEL rows.jsonl ... --olive           # beside `olive finetune` too
    python benchmarks/training.py MODEL rows.jsonl ... --without trl

One epoch, batches of 8, rank 16 on all linear layers, learning rate 1e-3, no validation, the same stop token. TRL's other
settings are its defaults, in fp32. Seconds are of the training loop, and of the whole process. `olive finetune` joins rows
to blocks of 64 tokens: it gets the steps of 8 blocks that hold as many tokens as the epoch's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LADDER = {
    "peft": "PEFT's forward, padded batches of like length, logits of supervised tokens, fp32",
    "patched": "+ layers computed by hand, all pairs in one parameter",
    "joined": "+ rows joined without padding, attention by hand",
    "shared": "+ what all rows of a batch begin with computed once",
    "block": "+ attention layers as one block",
    "bf16": "+ bf16 where the processor multiplies it",
    "slmops": "+ what is between the products compiled, in one pass each (what `slmops finetune` does)",
    "int8": "+ frozen products in int8 (`--precision int8`)",
}


def main() -> None:
    options = _options()
    if options.worker:
        print("RESULT " + json.dumps({"trl": _trl, "olive": _olive}.get(options.worker, _ours)(options)))
        return
    names = [
        *(LADDER if options.ladder else ("slmops", "int8")),
        *(("olive",) if options.olive else ()),
        *(() if options.without else ("trl",)),
    ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name in names if number % 2 else reversed(names):
            result = _run(options, name)
            if number:
                found[name].append(result)
            print(f"round {number} {name}: {result}", file=sys.stderr)
    _show(found, "trl" if "trl" in found else next(iter(found)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--prompt-template", required=True)
    parser.add_argument("--completion-template", required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--olive", action="store_true")
    parser.add_argument("--without", choices=["trl"])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(options: argparse.Namespace, name: str) -> dict[str, float]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *sys.argv, "--worker", name], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(lines[-1][7:]) | {"process_s": round(time.perf_counter() - started, 2)}


def _ours(options: argparse.Namespace) -> dict[str, float]:
    import slmops
    from slmops.training import step
    from slmops.training.step import layouts, patching, preparing

    name = options.worker
    if name not in ("slmops", "int8"):
        os.environ["SLMOPS_COMPILE"] = "no"
    if name == "peft":
        step.prepare_step = lambda model, rows, int8=False: step.Step(step.Padded(model), patching.Patched(), "left as it is")
    if name == "patched":
        preparing._obstacle = lambda model, causal: "left padded"  # pyright: ignore[reportPrivateUsage]
    if name == "joined":
        layouts.shared_beginning = lambda rows: 0
    if name in ("joined", "shared"):
        patching.fuse_attention = lambda patched: None
    with tempfile.TemporaryDirectory() as scratch:
        made = slmops.finetune(
            options.model,
            options.data,
            out=Path(scratch) / "adapter",
            prompt_template=options.prompt_template.replace("\\n", "\n"),
            completion_template=options.completion_template,
            max_rows=options.rows,
            validation_share=0.0,
            learning_rate=1e-3,
            lora_rank=16,
            batch_size=8,
            threads=options.threads,
            precision={"slmops": "auto", "bf16": "auto", "int8": "int8"}.get(name, "fp32"),
        )
        facts: dict[str, Any] = made.manifest.facts
    return {"loop_s": round(facts["loop_seconds"], 2), "peak_mb": round(facts["peak_memory_bytes"] / 1e6)}


def _trl(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from slmops.data import choose_interface
    from slmops.environment import peak_memory_bytes

    torch.set_num_threads(options.threads)
    prompt = options.prompt_template.replace("\\n", "\n")
    with options.data.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line, _ in zip(stream, range(options.rows), strict=False)]
    interface, _ = choose_interface(options.model, rows, prompt_template=prompt, completion_template=options.completion_template)
    stop = json.loads((options.model / "tokenizer.json").read_text(encoding="utf-8"))
    words = {token["id"]: token["content"] for token in stop["added_tokens"]}
    pairs = [{"prompt": prompt.format(**row), "completion": options.completion_template.format(**row)} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            str(options.model),
            args=SFTConfig(
                output_dir=scratch,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                learning_rate=1e-3,
                report_to=[],
                eos_token=words[interface.stop_token_ids[0]],
                save_strategy="no",
                logging_steps=100,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(pairs),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        started = time.perf_counter()
        trainer.train()
        loop = time.perf_counter() - started
    return {"loop_s": round(loop, 2), "peak_mb": round(peak_memory_bytes() / 1e6)}


def _olive(options: argparse.Namespace) -> dict[str, float]:
    import re
    import resource

    from transformers import AutoTokenizer

    prompt = options.prompt_template.replace("\\n", "\n")
    with options.data.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line, _ in zip(stream, range(options.rows), strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [f"{(prompt + options.completion_template).format(**row)}{tokenizer.bos_token}" for row in rows]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    steps = -(-tokens // (8 * 64))
    linears = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    with tempfile.TemporaryDirectory() as scratch:  # a folder of its own: Olive's cache is keyed without the data's content
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        command = [
            "olive",
            "finetune",
            "-m",
            str(options.model.resolve()),
            "--data_name",
            "json",
            "--data_files",
            str(data),
            "--text_field",
            "text",
        ]
        command += ["--method", "lora", "--lora_r", "16", "--lora_alpha", "32", "--target_modules", linears, "--max_steps", str(steps)]
        command += ["--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--max_seq_len", "64", "--train_split", "train"]
        command += ["-o", "out", "--log_level", "1"]
        quiet = {"CI": "1", "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
        place = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        done = subprocess.run(command, cwd=scratch, env=os.environ | quiet | place, capture_output=True, text=True, check=False)
        loop = re.search(r"'train_runtime': '?([\d.]+)", done.stdout + done.stderr)
        if loop is None or not (Path(scratch) / "out/adapter/adapter_model.safetensors").is_file():
            raise SystemExit(f"olive finetune made no adapter: {(done.stdout + done.stderr)[-1500:]}")
    return {"loop_s": float(loop[1]), "peak_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3), "steps": steps}


def _show(found: dict[str, list[dict[str, float]]], against: str) -> None:
    print(f"| side | loop | of {against}'s | process | peak memory |\n| --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        ratios = [other["loop_s"] / own["loop_s"] for own, other in zip(runs, found[against], strict=True)]
        loop, process = (statistics.median(run[key] for run in runs) for key in ("loop_s", "process_s"))
        spread = f"{statistics.median(ratios):.2f} x [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"| {LADDER.get(name, name)} | {loop:.1f} s | {spread} | {process:.1f} s | {max(run['peak_mb'] for run in runs):,.0f} MB |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
