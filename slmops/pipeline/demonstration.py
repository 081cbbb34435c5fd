"""What does `slmops quickstart` do? It writes a demo's data, base model and pipeline file into a folder, and runs them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slmops
from slmops import artifact, demo, environment, progress
from slmops.config import QuickstartSettings, load
from slmops.errors import BadArtifact, RunFailed
from slmops.pipeline.outcome import PipelineResult, value_of
from slmops.pipeline.running import run

_MARK = "# Written by `slmops quickstart`"
# The pipeline file, which marks the folder, goes last: a removal that was interrupted can be repeated.
_WRITTEN = ("runs", "base", "data", "NEXT.md", "pipeline.yaml")
# Threads cost more than they bring on matrices of 128: on a busy machine twenty times as much processor time.
_THREADS = 1
_PIPELINE = f"""{_MARK}, which writes it anew each time: to change it, copy it.
# Run it with `slmops run pipeline.yaml`; steps that have not changed are skipped.

model: base                 # a folder, relative to this file, or a hub id
data: data/train.jsonl
out: runs                   # one folder or one .json a step

steps:
  finetune:                 # model + data -> adapter
    prompt_template: "{{text}}\\nIntent:"
    completion_template: " {{intent}}"
    learning_rate: 2e-3
    epochs: 2
    seed: @SEED@
  evaluate_base:            # what the base does on the task without the adapter
    {{verb: evaluate, use: finetune, base: true, data: data/test.jsonl, threads: {_THREADS}}}
  merge: {{}}                 # adapter -> model
  evaluate_finetuned:       # the fine-tune in PyTorch
    {{verb: evaluate, data: data/test.jsonl, threads: {_THREADS}, gate: {{exact_match: 0.95}}}}
  export:                   # model -> package
    {{precision: @PRECISION@}}
  verify:                   # the package against PyTorch, stage by stage
    {{data: data/test.jsonl, metric: exact_match, threads: {_THREADS}}}
  evaluate:                 # the package on the task
    {{data: data/test.jsonl, threads: {_THREADS}, gate: {{exact_match: 0.95}}}}
  bench:                    # speed, memory, size and accuracy against PyTorch
    {{data: data/test.jsonl, metric: exact_match, rounds: 5, threads: {_THREADS}}}
"""
_NEXT = (
    r"slmops finetune HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl -o runs/adapter",
    r"slmops merge runs/adapter -o runs/merged",
    r"slmops export runs/merged -o runs/@PRECISION@ --precision @PRECISION@",
    r"slmops verify runs/@PRECISION@ --data test.jsonl --metric exact_match",
    r"slmops bench runs/@PRECISION@ --data test.jsonl --metric exact_match",
)
_GUIDE = """# What is here

Made by `slmops quickstart`, offline, on this machine.

| | |
| --- | --- |
| `data/stories.txt` | plain text of a small household, from a grammar that slmops brings |
| `data/train.jsonl`, `data/test.jsonl` | commands to a device and what is meant: `text`, `intent`; no row is in both |
| `base/` | a Llama of one million weights, trained from scratch on `stories.txt` in half a minute |
| `pipeline.yaml` | the whole road in one file |
| `runs/finetune`, `runs/merge`, `runs/export` | adapter, merged model, package; `slmops show runs/export` says where it came from |
| `runs/*.json` | what the measures found; `*.predictions.jsonl` has each row's answer |

Try it: `slmops generate runs/export 'please @PROMPT@'`

# The same with your own model and data

`train.jsonl` holds one row a line, as `{"prompt": ..., "completion": ...}`, `{"messages": [...]}` or any columns at all
with `--prompt-template` and `--completion-template`. `slmops data inspect train.jsonl --model MODEL` shows what a run
would train on, token by token.

```
@COMMANDS@
```

Or copy `pipeline.yaml`, set `model`, `data` and the templates, and `slmops run` it.
"""
_PROMPT = "turn off the lights in the attic"


@dataclass(frozen=True)
class QuickstartResult:
    """What the demo showed."""

    result: PipelineResult
    sample: dict[str, str] | None
    """A prompt and the package's answer."""
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
            "exact_match_base": ("evaluate_base", "metrics.exact_match"),
            "exact_match_finetuned": ("evaluate_finetuned", "metrics.exact_match"),
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
            "next": list(self.next),
        }


def quickstart(*, out: str | Path = "slmops-quickstart", config: Any = None, **overrides: Any) -> QuickstartResult:
    """Run the whole road on a demo, offline: data and a base model made here, fine-tuned, exported, proven, measured.

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
    with _few_threads():
        file = _write(out, settings.precision, settings.seed)
        result = run(file)
        sample = _ask(out / "runs" / "export") if result.passed else None
    following = tuple(line.replace("@PRECISION@", settings.precision) for line in _NEXT)
    return QuickstartResult(result, sample, following, time.perf_counter() - started)


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
    """Write the pipeline file first, which marks the folder as the quickstart's, then data, base model and guide."""
    file = out / "pipeline.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(_PIPELINE.replace("@PRECISION@", precision).replace("@SEED@", str(seed)), encoding="utf-8")
        data = demo.write_data(out / "data", seed=seed)
        commands = "\n".join(_NEXT).replace("@PRECISION@", precision)
        (out / "NEXT.md").write_text(_GUIDE.replace("@COMMANDS@", commands).replace("@PROMPT@", _PROMPT), encoding="utf-8")
    except OSError as error:
        raise RunFailed(f"could not write {out}: {error.strerror or error}", "check the path, its permissions and the disk") from error
    base = out / "base"
    if not _is_current(base, data.stories, seed):
        progress.say("a tiny base model is trained from scratch on plain text, so that nothing is downloaded")
        demo.write_base(data.stories, out=base, seed=seed, force=True)
    return file


def _is_current(base: Path, stories: Path, seed: int) -> bool:
    """Whether the base is whole and came from this text and this seed."""
    try:
        found = artifact.load(base)
        artifact.check(found)
    except BadArtifact:
        return False
    text = found.manifest.input("dataset")
    return found.manifest.config == demo.settings_of(seed) and text is not None and text.sha256 == artifact.sha256_file(stories)


def _ask(package: Path) -> dict[str, str]:
    """Ask the package something, through the template that travels with it."""
    return {"prompt": _PROMPT, "text": "".join(slmops.generate(package, _PROMPT, max_new_tokens=8, threads=_THREADS)).strip()}


@contextmanager
def _few_threads() -> Iterator[None]:
    """Let torch use as many threads as the demo's small matrices are worth."""
    torch = environment.require("torch", "to train the demo's models")
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)
