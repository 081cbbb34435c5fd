"""What does `slmops quickstart` do? It writes a demo's data, base model and pipeline file into a folder, and runs them."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slmops
from slmops import demo
from slmops.config import QuickstartSettings, load
from slmops.demo.recipes import BASE, RECIPES, base_steps, package_steps
from slmops.errors import BadArtifact, RunFailed
from slmops.pipeline.outcome import PipelineResult, value_of
from slmops.pipeline.running import run

_MARK = "# Written by `slmops quickstart`"
# The pipeline file, which marks the folder, goes last: a removal that was interrupted can be repeated.
_WRITTEN = ("runs", "NEXT.md", "pipeline.yaml")
_HEAD = f"""{_MARK}, which writes it anew each time: to change it, copy it.
# Run it with `slmops run pipeline.yaml`; steps that have not changed are skipped.

out: runs                   # one folder or one .json a step

steps:
"""
_PACKAGE = "package"
# What else can become of an adapter.
_ROAD = """\
  merge:                    # or one adapter alone: adapter -> model
    {use: @FIRST@}
  export:                   # model -> export
    {precision: @PRECISION@}
  verify:                   # the export against PyTorch, stage by stage
    {data: @ROWS@, metric: exact_match}
  evaluate:                 # the export on the task
    {data: @ROWS@, gate: {exact_match: @GATE@}}
  bench:                    # speed, memory, size and accuracy against PyTorch
    {data: @ROWS@, metric: exact_match, rounds: 5}
"""
_NEXT = (
    r"slmops finetune HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl -o runs/adapter",
    r"slmops merge runs/adapter -o runs/merged",
    r"slmops export runs/merged -o runs/@PRECISION@ --precision @PRECISION@",
    r"slmops verify runs/@PRECISION@ --data test.jsonl --metric exact_match",
    r"slmops bench runs/@PRECISION@ --data test.jsonl --metric exact_match",
    r"slmops pack HuggingFaceTB/SmolLM2-135M-Instruct --adapter mine=runs/adapter -o runs/package --precision @PRECISION@",
)
_GUIDE = """# What is here

Made by `slmops quickstart`, offline, on this machine.

| | |
| --- | --- |
| `pipeline.yaml` | the whole road in one file |
| `runs/@BASE@/` | a Llama of one million weights, trained from scratch in half a minute on plain text of a small household |
| `runs/@BASE@/data/` | that text, and commands to a device as rows `text`, `intent`, `slots`, `reply`: no text is in two of the three files |
| @ADAPTERS@ | adapters for that base, of different ranks and layers: @PURPOSES@ |
| `runs/package` | the three on one quantized base, switched per request; `slmops show runs/package` says where it came from |
| `runs/merge`, `runs/export` | the first of them alone, merged into the base |
| `runs/*.json` | what the measures found; `*.predictions.jsonl` has each row's answer |

Try it: `slmops generate runs/package 'please @PROMPT@' --adapter slots`, with `--adapter intent` or `replies`, or without; on a device without
PyTorch: `slmops verify runs/package --self-test`.

# The same with your own model and data

`train.jsonl` holds one row a line, as `{"prompt": ..., "completion": ...}`, `{"messages": [...]}` or any columns at all
with `--prompt-template` and `--completion-template`. `slmops data inspect train.jsonl --model MODEL` shows what a run
would train on, token by token.

```
@COMMANDS@
```

Or copy `pipeline.yaml`, name your `model` and `data` at its top in place of the step `@BASE@`, set the templates, and `slmops run` it.
"""
_PROMPT = "turn off the lights in the attic"
_FIRST, *_OTHERS = (recipe.name for recipe in RECIPES)


@dataclass(frozen=True)
class QuickstartResult:
    """What the demo showed."""

    result: PipelineResult
    sample: dict[str, str] | None
    """A prompt and the export's answer."""
    answers: dict[str, str]
    """What the package answers to the same prompt with each adapter."""
    next: tuple[str, ...]
    """Commands that do the same with the user's own model and data."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return self.result.passed

    def figures(self) -> dict[str, Any]:
        """Return the few figures that matter; what was not reached is left out."""
        places = {
            "exact_match_base": (f"{_FIRST}_before", "metrics.exact_match"),
            "exact_match_finetuned": (f"{_FIRST}_after", "metrics.exact_match"),
            **{f"exact_match_{name}": (f"{name}_after", "metrics.exact_match") for name in _OTHERS},
            **{f"exact_match_{recipe.name}_packed": (f"{recipe.name}_packed", "metrics.exact_match") for recipe in RECIPES},
            "package_verified": (f"{_PACKAGE}_proof", "passed"),
            "package_size_bytes": (_PACKAGE, "size_bytes"),
            "exact_match_package": ("evaluate", "metrics.exact_match"),
            "verified": ("verify", "passed"),
            "size_bytes": ("export", "size_bytes"),
            "decode_ratio": ("bench", "ratio.decode"),
            "size_ratio": ("bench", "ratio.size"),
        }
        steps = {label: (self.result.step(name), place) for label, (name, place) in places.items()}
        found = {label: value_of(step.result, place) for label, (step, place) in steps.items() if step is not None}
        return {label: value for label, value in found.items() if value is not None}

    def document(self) -> dict[str, Any]:
        """Return what `slmops quickstart --json` prints: the pipeline's document, and what the demo adds."""
        bench = self.result.step("bench")
        return self.result.document() | {
            "command": "quickstart",
            "seconds": round(self.seconds, 3),
            "figures": self.figures(),
            "bench": bench.result if bench else None,
            "sample": self.sample,
            "answers": self.answers,
            "next": list(self.next),
        }


def quickstart(*, out: str | Path = "slmops-quickstart", config: Any = None, **overrides: Any) -> QuickstartResult:
    """Run the whole road on a demo, offline: data and a base model made here, three fine-tunes, packed, proven, measured.

    The fine-tunes are the recipes of the folder `adapters/`.

    Run again in the same folder, it skips what has not changed.

    Args:
        out: the folder for all of it.
        config: YAML file or mapping of `QuickstartSettings`.
        overrides: `precision`, `seed`, `force`.

    Raises:
        BadArtifact: `out` holds something that the quickstart did not write.
        Unavailable: a library of the `train` extra is missing.
    """
    settings = load(QuickstartSettings, config, **overrides)
    started = time.perf_counter()
    out = Path(out)
    _claim(out, force=settings.force)
    with demo.few_threads():
        file = _write(out, settings.precision, settings.seed)
        result = run(file)
        sample = {"prompt": _PROMPT, "text": _ask(out / "runs" / "export")} if result.passed else None
        answers = {recipe.name: _ask(out / "runs" / _PACKAGE, recipe.name) for recipe in RECIPES} if result.passed else {}
    following = tuple(line.replace("@PRECISION@", settings.precision) for line in _NEXT)
    return QuickstartResult(result, sample, answers, following, time.perf_counter() - started)


def _claim(out: Path, *, force: bool) -> None:
    """Refuse a folder that holds anything but an earlier quickstart; with `force`, remove what that wrote."""
    if out.is_file():
        raise BadArtifact(f"{out} is a file, not a folder to write to", "choose another folder with -o")
    if not out.is_dir() or not any(out.iterdir()):
        return
    file = out / "pipeline.yaml"
    if not file.is_file() or not file.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise BadArtifact(f"output folder {out} is not empty and was not written by the quickstart", "choose another with -o")
    for name in _WRITTEN if force else ():
        place = out / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def _write(out: Path, precision: str, seed: int) -> Path:
    """Write the pipeline file first, which marks the folder as the quickstart's, then the guide."""
    file = out / "pipeline.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(_pipeline(precision, seed), encoding="utf-8")
        (out / "NEXT.md").write_text(_guide(precision), encoding="utf-8")
    except OSError as error:
        raise RunFailed(f"could not write {out}: {error.strerror or error}", "check the path, its permissions and the disk") from error
    return file


def _pipeline(precision: str, seed: int) -> str:
    """Return the base's step, those of every recipe, their package, and the road of the first adapter merged and alone."""
    first = RECIPES[0]
    values = {"FIRST": first.name, "PRECISION": precision, "ROWS": f"{BASE}/data/test.jsonl", "GATE": f"{first.gate:g}"}
    return (
        _HEAD
        + base_steps(seed, precision)
        + "".join(recipe.steps(seed, precision) for recipe in RECIPES)
        + package_steps(RECIPES, _PACKAGE, precision)
        + _filled(_ROAD, values)
    )


def _guide(precision: str) -> str:
    values = {
        "BASE": BASE,
        "ADAPTERS": ", ".join(f"`runs/{recipe.name}`" for recipe in RECIPES),
        "PURPOSES": "; ".join(recipe.purpose for recipe in RECIPES),
        "COMMANDS": "\n".join(_NEXT),
        "PROMPT": _PROMPT,
    }
    return _filled(_filled(_GUIDE, values), {"PRECISION": precision})


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _ask(package: Path, adapter: str | None = None) -> str:
    """Ask the package something, through the template that travels with it."""
    named = {} if adapter is None else {"adapter": [adapter]}
    return "".join(slmops.generate(package, _PROMPT, max_new_tokens=64, **named)).strip()
