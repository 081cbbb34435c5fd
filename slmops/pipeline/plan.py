r"""What does a pipeline file say? Its steps in order, each with checked settings and wired to what it starts from.

```yaml
model: ../models/base        # a folder, relative to this file, or a hub id
data: train.jsonl
out: runs                    # one folder a step; default: <name of this file>-runs beside it
steps:
  finetune: {prompt_template: "{text}\nIntent:", completion_template: " {intent}"}
  merge: {}
  export: {precision: int4}
  export8: {verb: export, use: merge, precision: int8}
  verify: {use: export, data: test.jsonl}
  evaluate: {use: export, data: test.jsonl, gate: {exact_match: 0.95}}
  pack: {adapter: {intent: finetune, theirs: ../adapters/theirs}}
  proof: {verb: verify, use: pack, data: {intent: test.jsonl}}
```

`STEP/FILE` is a file that an earlier step will have written (`data: household/data/train.jsonl`). Everything that can be
wrong is found before anything runs, and reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from slmops.config import EvaluateMetric, Settings, fields, load, read_yaml
from slmops.errors import InvalidInput
from slmops.pipeline.gates import Bar, parse_bar
from slmops.pipeline.verbs import DECIDED, VERBS, Verb
from slmops.runtime.engines import engine_of

_KEYS = ("model", "data", "out", "steps")
_NAME = re.compile(r"^[A-Za-z0-9][\w-]*$")
_TAKEN = ("model", "data", "pipeline")  # what `use` may name beside steps, and the state file's name
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?$")
_HINT = "a pipeline has model, data, out and steps; a step is `VERB: {settings}` or `NAME: {verb: VERB, settings}`"


@dataclass(frozen=True)
class Reference:
    """Where an input of a step comes from: an earlier step, or a place outside the pipeline."""

    step: str | None = None
    place: str | None = None
    """A path, or a hub id."""
    file: str = ""
    """Of a step: one file of its folder."""


@dataclass(frozen=True)
class Step:
    """One step, ready to run."""

    name: str
    verb: str
    settings: Settings
    inputs: dict[str, Reference]
    """`source`, `data`, and each setting that names a path or a step."""
    gate: tuple[Bar, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The steps that it reads from."""
        return tuple(reference.step for reference in self.inputs.values() if reference.step is not None)


@dataclass(frozen=True)
class Plan:
    """A pipeline file, checked."""

    file: Path
    out: Path
    steps: tuple[Step, ...]

    def place(self, reference: Reference) -> str:
        """Return the path, or hub id, that a reference stands for."""
        return str(self.out / reference.step / reference.file) if reference.step is not None else str(reference.place)


@dataclass
class _Reading:
    """What has been read so far."""

    root: Path
    model: str | None = None
    data: str | None = None
    makes: dict[str, str | None] = field(default_factory=dict)
    """Earlier steps, in order -> kind of what each makes."""
    problems: list[str] = field(default_factory=list)


def read_plan(file: Path | str) -> Plan:
    """Read and check a pipeline file.

    Raises:
        InvalidInput: no such file, not YAML, or anything wrong in it: every problem in one message.
    """
    file = Path(file)
    content = read_yaml(file)
    reading = _Reading(Path(os.path.normpath(file.parent)))
    reading.problems += [f"{key}: unknown key{nearest(str(key), _KEYS)}" for key in content if key not in _KEYS]
    for name in ("model", "data"):
        if content.get(name) is not None:
            setattr(reading, name, _located(reading, name, content[name]))
    steps = content.get("steps")
    if not isinstance(steps, dict) or not steps:
        reading.problems.append("steps: must be a mapping with at least one step")
        steps = {}
    read = [_step(reading, str(name), given) for name, given in steps.items()]
    out = content.get("out")
    if out is not None and not isinstance(out, str):
        reading.problems.append(f"out: must be the name of a folder, not {out!r}")
    if reading.problems:
        raise InvalidInput(f"{file}: " + "; ".join(reading.problems), _HINT)
    folder = _joined(reading.root, out if isinstance(out, str) else f"{file.stem}-runs")
    return Plan(file, folder, tuple(step for step in read if step is not None))


def choose_steps(plan: Plan, only: Sequence[str] | None) -> tuple[Step, ...]:
    """Return the steps to run: all, or those named and what they need.

    Raises:
        InvalidInput: a name that is no step.
    """
    names = [step.name for step in plan.steps]
    unknown = [f"{name}: no such step{nearest(name, names)}" for name in only or () if name not in names]
    if unknown:
        raise InvalidInput("only: " + "; ".join(unknown), f"{plan.file} has the steps {', '.join(names)}")
    wanted = set(only or names)
    for step in reversed(plan.steps):
        if step.name in wanted:
            wanted.update(step.needs)
    return tuple(step for step in plan.steps if step.name in wanted)


def named_inputs(setting: str, inputs: Mapping[str, Reference]) -> dict[str, Reference]:
    """Return the inputs that belong to a setting of `Verb.named`, by the user's names for them."""
    return {role.removeprefix(f"{setting}."): reference for role, reference in inputs.items() if role.startswith(f"{setting}.")}


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean X?)`, or nothing where no known name is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _step(reading: _Reading, name: str, given: Any) -> Step | None:
    """Read one step; what is wrong with it goes to the reading's problems."""
    where, before = f"steps.{name}", len(reading.problems)
    given = {} if given is None else given
    if not isinstance(given, dict):
        reading.problems.append(f"{where}: must be a mapping of settings, not {given!r}")
        given = {}
    if not _NAME.match(name) or name in _TAKEN:
        reading.problems.append(f"{where}: no name for a step (letters, digits, - and _; not {', '.join(_TAKEN)})")
    verb_name = str(given.get("verb", name))
    verb = VERBS.get(verb_name)
    if verb is None:
        own = "" if "verb" in given else "; a name of your own needs `verb: VERB`"
        reading.problems.append(f"{where}: unknown step {verb_name}{nearest(verb_name, list(VERBS))}{own}")
        reading.makes[name] = "anything"  # so that steps after it are not blamed
        return None
    inputs = _wire(reading, where, verb, given)
    gate = _gate(reading, where, verb_name, given.get("gate"))
    settings = _settings(reading, where, verb, given, inputs)
    reading.makes[name] = verb.makes
    return Step(name, verb_name, settings, inputs, gate) if settings is not None and len(reading.problems) == before else None


def _wire(reading: _Reading, where: str, verb: Verb, given: Mapping[str, Any]) -> dict[str, Reference]:
    """Find what a step starts from, and every other input that it names."""
    inputs: dict[str, Reference | None] = {"source": _source(reading, where, verb, given.get("use"))}
    for name in verb.named:
        inputs |= _by_name(reading, where, name, given.get(name), alone=name in verb.paths)
    if verb.rows and given.get("objective") == "multitask":
        if given.get("data") is not None:
            reading.problems.append(f"{where}.data: belongs to no task; name the rows of each under task")
    elif verb.rows:
        inputs["data"] = _rows(reading, where, verb, given.get("data"))
    for name in verb.paths:
        value = given.get(name)
        if value is not None and not (name == "baseline" and value == "none") and not (name in verb.named and isinstance(value, dict)):
            inputs[name] = _named(reading, f"{where}.{name}", value, _kinds(name))
    return {role: reference for role, reference in inputs.items() if reference is not None}


def _source(reading: _Reading, where: str, verb: Verb, use: Any) -> Reference | None:
    """Find the step, or the pipeline's model or data, that a step starts from."""
    if not verb.takes:
        if use is not None:
            reading.problems.append(f"{where}.use: it starts from nothing; leave it out")
        return None
    if use is not None and use == verb.falls_back:
        return _fallback(reading, where, verb)
    if use is not None:
        if not isinstance(use, str) or use not in reading.makes:
            reading.problems.append(f"{where}.use: no earlier step {use}{nearest(str(use), list(reading.makes))}")
        elif reading.makes[use] not in (*verb.takes, "anything"):
            made = reading.makes[use] or "no folder"
            reading.problems.append(f"{where}.use: {use} makes {made}, and {' or '.join(verb.takes)} is needed")
        return Reference(step=str(use))
    fitting = [name for name, made in reading.makes.items() if made in (*verb.takes, "anything")]
    if fitting and verb.nearest:
        return Reference(step=fitting[-1])
    return _fallback(reading, where, verb)


def _fallback(reading: _Reading, where: str, verb: Verb) -> Reference | None:
    """Return the pipeline's own model or data, where that is what a step can start from."""
    name = verb.falls_back
    value = getattr(reading, name) if name else None
    if name is None or (set(verb.takes) <= {"export", "package"} and value is not None and engine_of(Path(value)) is None):
        reading.problems.append(f"{where}: no earlier step makes the {' or '.join(verb.takes)} that it needs")
    elif value is None and not any(problem.startswith(f"{name}:") for problem in reading.problems):
        reading.problems.append(f"{where}: needs a {name}, and the file names none (`{name}: ...`)")
    return _outside(value)


def _rows(reading: _Reading, where: str, verb: Verb, given: Any) -> Reference | None:
    """Find a step's rows: a fine-tune takes the pipeline's data, prepared where a step did; a measure must name its own."""
    if given is not None:
        return _named(reading, f"{where}.data", given, ("dataset",))
    if verb.makes is None:
        reading.problems.append(f"{where}.data: name the rows to measure on; the training rows are not taken for it")
        return None
    prepared = [name for name, made in reading.makes.items() if made == "dataset"]
    return Reference(step=prepared[-1]) if prepared else _fallback(reading, where, VERBS["prepare"])


def _named(reading: _Reading, where: str, value: Any, kinds: tuple[str, ...]) -> Reference | None:
    """Return the earlier step of that name, if it makes one of the kinds, or a file of an earlier step's, or else the path."""
    if isinstance(value, str) and reading.makes.get(value) in (*kinds, "anything"):
        return Reference(step=value)
    step, _, file = value.partition("/") if isinstance(value, str) else ("", "", "")
    if file and reading.makes.get(step) is not None:
        if ".." in file.split("/"):
            reading.problems.append(f"{where}: {value} leaves the folder of step {step}")
        return Reference(step=step, file=file)
    return _outside(_located(reading, where, value))


def _kinds(setting: str) -> tuple[str, ...]:
    """Return the kinds of artefact that a setting can name."""
    if setting in ("data", "task", "task_validation", "retain", "replay"):
        return ("dataset",)
    return ("adapter",) if setting == "adapter" else ("model", "adapter", "export", "package")


def _by_name(reading: _Reading, where: str, setting: str, given: Any, *, alone: bool) -> dict[str, Reference | None]:
    """Find what a mapping NAME -> earlier step or place names; the role of each is `setting.NAME`.

    `alone`: the setting may also be one place without a name, which is found elsewhere.
    """
    if given is None or (alone and not isinstance(given, dict)):
        return {}
    if not isinstance(given, dict) or not all(isinstance(name, str) and _NAME.match(name) for name in given):
        reading.problems.append(f"{where}.{setting}: must map names (letters, digits, - and _) to {setting}, not {given!r}")
        return {}
    found: dict[str, Reference | None] = {}
    for name, value in given.items():
        made = reading.makes.get(value, "") if isinstance(value, str) else ""
        if made not in ("", *_kinds(setting), "anything"):
            reading.problems.append(f"{where}.{setting}.{name}: {value} makes {made or 'no folder'}, and {_kinds(setting)[0]} is needed")
        else:
            found[f"{setting}.{name}"] = _named(reading, f"{where}.{setting}.{name}", value, _kinds(setting))
    return found


def _settings(reading: _Reading, where: str, verb: Verb, given: Mapping[str, Any], inputs: Mapping[str, Reference]) -> Settings | None:
    own = ("verb", "use", "gate", *(("data",) if verb.rows else ()))
    names = [name for name, _ in fields(verb.settings)]
    for key in given:
        if key in DECIDED:
            reading.problems.append(f"{where}.{key}: the pipeline decides it; leave it out")
        elif key == "loss":
            reading.problems.append(f"{where}.{key}: a pipeline runs nobody's own code; run slmops finetune --loss by itself")
        elif key not in (*own, *names):
            reading.problems.append(f"{where}.{key}: unknown setting{nearest(str(key), [*names, *own])}")
    values = {key: value for key, value in given.items() if key in names and key not in DECIDED and not (verb.rows and key == "data")}
    values |= {role: reference.step or reference.place for role, reference in inputs.items() if role in verb.paths}
    for name in verb.named:
        if isinstance(values.get(name), dict):
            values[name] = [f"{key}={reference.step or reference.place}" for key, reference in named_inputs(name, inputs).items()]
    try:
        return load(verb.settings, values)
    except InvalidInput as error:
        reading.problems.append(f"{where}.{error.message.removeprefix('bad settings: ')}")
        return None


def _gate(reading: _Reading, where: str, verb: str, given: Any) -> tuple[Bar, ...]:
    if given is None:
        return ()
    if not isinstance(given, dict):
        reading.problems.append(f"{where}.gate: must be a mapping such as {{exact_match: 0.95}}, not {given!r}")
        return ()
    bars = []
    for name, value in given.items():
        if verb == "evaluate" and "." not in str(name) and name not in get_args(EvaluateMetric):
            reading.problems.append(f"{where}.gate.{name}: unknown metric{nearest(str(name), get_args(EvaluateMetric))}")
        try:
            bars.append(parse_bar(str(name), value))
        except InvalidInput as error:
            reading.problems.append(f"{where}.gate.{name}: {error.message}")
    return tuple(bars)


def _outside(place: str | None) -> Reference | None:
    return Reference(place=place) if place is not None else None


def _located(reading: _Reading, where: str, value: Any) -> str | None:
    """Return a path relative to the pipeline's file, or a hub id as it is; None, and a problem, where it is neither."""
    if not isinstance(value, str):
        reading.problems.append(f"{where}: must be a path or a hub id, not {value!r}")
        return None
    place = _joined(reading.root, value)
    if place.exists():
        return str(place)
    # `models/base` beside an existing folder `models` is a path that was misspelt, not an organization of the hub.
    if _HUB_ID.match(value) and not place.parent.is_dir() and not value.startswith("."):
        return value
    reading.problems.append(f"{where}: no such file or folder: {place}")
    return None


def _joined(root: Path, value: str) -> Path:
    return Path(os.path.normpath(root / Path(value).expanduser()))
