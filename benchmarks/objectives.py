"""What do the objectives of `slmops finetune` buy, and what do they cost? Three comparisons on one small model.

    python benchmarks/objectives.py pretrain MODEL --text book.md --retain old.txt --replay older.txt --work DIR
    python benchmarks/objectives.py multitask MODEL --train train.jsonl --test test.jsonl --work DIR
    python benchmarks/objectives.py preferences MODEL --train train.jsonl --test test.jsonl --work DIR

pretrain: nine tenths of TEXT in full-length blocks; perplexity on the held-out tenth and on the old text (`--retain`),
before and after, without and with `--replay`. multitask: intents and slots (columns text, intent, slots) in one adapter
and in one adapter each, the same rows a task; exact match on TEST. preferences: the right intent above another one,
chosen by a seed; pairs right and mean margin on TEST, before and after dpo, and of a reward model.

Folders in DIR are used again, so a run that was cut goes on. Prints a table, and one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import slmops
from slmops import artifact

INTENT = {"prompt_template": "{text}\nIntent:", "completion_template": " {intent}"}
SLOTS = {"prompt_template": "{text}\nSlots:", "completion_template": " {slots}"}
PAIRS = {"prompt_template": "{text}\nIntent:", "chosen_template": " {intent}", "rejected_template": " {other}"}


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = {"pretrain": pretrain, "multitask": multitask, "preferences": preferences}[options.part](options)
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    print(json.dumps({"part": options.part, "model": options.model.name, "rows": rows}))


def pretrain(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return perplexities of the domain and of the old text, by what was mixed in."""
    common = {"objective": "pretrain", "validation_share": 0.1, "retain": options.retain, "epochs": options.epochs}
    found = []
    for name, more in (("domain alone", {}), (f"replay {options.share:.0%}", {"replay": options.replay, "replay_share": options.share})):
        made = finetune(options, f"pretrain-{'replay' if more else 'alone'}", options.text, **common, **more)
        facts = made.manifest.facts
        for data, effect in (("domain", facts["effects"]["validation"]), ("old text", facts["forgetting"])):
            change = effect["change"]
            found.append(
                {
                    "training": name,
                    "perplexity on": data,
                    "before": effect["before"]["value"],
                    "after": effect["after"]["value"],
                    "change": f"{change['value']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]",
                    "seconds": made.manifest.facts["loop_seconds"],
                }
            )
    return found


def multitask(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the exact match of each task, by one adapter for both and one for each."""
    rows = _rows(options.train)[: options.rows]
    train = _write(options.work / f"train-{len(rows)}.jsonl", rows)
    settings = {"epochs": options.epochs}
    both = finetune(
        options,
        "multitask",
        None,
        objective="multitask",
        task={"intent": {"data": str(train), **INTENT}, "slots": {"data": str(train), **SLOTS}},
        **settings,
    )
    found = []
    for task, templates in (("intent", INTENT), ("slots", SLOTS)):
        single = finetune(options, f"single-{task}", train, **templates, **settings)
        for name, adapter in (("one adapter each", single), ("one adapter for both", both)):
            result = slmops.evaluate(
                adapter.path, options.test, metric="exact_match", predictions=options.work / f"{name}-{task}.jsonl", **templates
            )
            value = result.metrics["exact_match"]
            steps, seconds = adapter.manifest.facts["steps"], adapter.manifest.facts["loop_seconds"]
            found.append(
                {
                    "task": task,
                    "adapter": name,
                    "exact match": f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]",
                    "n": value.n,
                    "steps": steps,
                    "seconds": seconds,
                }
            )
    return found


def preferences(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return pairs right and margin on held-out pairs: the base, dpo on it, and a reward model."""
    train = _write(options.work / "pairs.jsonl", _preferred(_rows(options.train)[: options.rows], seed=0))
    test = _write(options.work / "pairs-test.jsonl", _preferred(_rows(options.test), seed=1))
    dpo = finetune(options, "dpo", train, objective="dpo", epochs=options.epochs, **PAIRS)
    reward = finetune(options, "reward", train, objective="reward", epochs=options.epochs, **PAIRS)
    found = []
    for name, adapter, base in (("base", dpo, True), ("dpo", dpo, False), ("reward model", reward, False)):
        result = slmops.evaluate(
            adapter.path, test, metric="pairwise_accuracy", base=base, predictions=options.work / f"preferred-{name}.jsonl"
        )
        right, margin = result.metrics["pairwise_accuracy"], result.metrics["margin"]
        found.append(
            {
                "model": name,
                "pairs right": f"{right.value:.3f} [{right.low:.3f}, {right.high:.3f}]",
                "mean margin": f"{margin.value:.2f} [{margin.low:.2f}, {margin.high:.2f}]",
                "n": right.n,
                "steps": 0 if base else adapter.manifest.facts["steps"],
                "seconds": 0.0 if base else adapter.manifest.facts["loop_seconds"],
            }
        )
    return found


def finetune(options: argparse.Namespace, name: str, data: Path | None, **settings: Any) -> artifact.Artifact:
    """Return the fine-tune of that name in the work folder, made now where it is not there yet."""
    out = options.work / name
    if (out / artifact.MANIFEST).is_file():
        return artifact.load(out)
    return slmops.finetune(options.model, data, out=out, threads=options.threads, **settings)


def _preferred(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return rows with another intent beside the right one."""
    chosen = random.Random(seed)
    intents = sorted({row["intent"] for row in rows})
    return [
        {"text": row["text"], "intent": row["intent"], "other": chosen.choice([i for i in intents if i != row["intent"]])} for row in rows
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("pretrain", "multitask", "preferences"))
    parser.add_argument("model", type=Path)
    for name in ("text", "retain", "replay", "train", "test"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3000, help="training rows (of each task)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.1, help="share of --replay in the rows")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    needed = ("text", "retain", "replay") if options.part == "pretrain" else ("train", "test")
    lacking = [f"--{name}" for name in needed if getattr(options, name) is None]
    if lacking:
        parser.error(f"{options.part} needs {', '.join(lacking)}")
    return options


if __name__ == "__main__":
    main()
