"""Will Olive do everything that a workflow says? Every key that it would warn about, or drop without a word, is a problem.

Olive 0.13 refuses unknown keys at the top level only: unknown keys of a pass and of the training arguments are a
warning, those of the model and of data components nothing at all, and values are checked when the pass is about to run.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slmops import artifact
from slmops.errors import InvalidInput, SlmopsError, Unavailable
from slmops.olive_backend.package_config import package_config
from slmops.olive_backend.requirements import require_olive
from slmops.olive_backend.workflow_file import read_workflow

# What Olive, pydantic and a user script raise for a workflow that is wrong.
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, AssertionError, SyntaxError, NameError)
_DTYPES = ("bfloat16", "float16", "float32")  # an assertion of Olive's at run time (lora.py:486)
_COMPONENTS = ("load_dataset", "pre_process_data", "post_process_data", "dataloader")


def validate(path: str | Path) -> dict[str, Any]:
    """Read a workflow and check it; relative paths in it count from the working directory, as in `olive run`.

    Raises:
        InvalidInput: no such file, not JSON, or a workflow with problems; all of them are named.
        Unavailable: Olive is not installed, or the workflow would merge an adapter into another base than it learned on.
    """
    workflow = read_workflow(Path(path))
    found = problems(workflow)
    if found:
        raise InvalidInput(f"{path} is not a workflow that Olive would follow: {'; '.join(found)}", "mend what is named")
    _refuse_merge_of_qlora(workflow)
    return workflow


def _refuse_merge_of_qlora(workflow: Mapping[str, Any]) -> None:
    """Refuse `MergeAdapterWeights` behind a QLoRA pass, or on an adapter of `slmops finetune --method qlora`.

    Olive drops the quantization before it merges (merge_adapter_weights.py:44): what the adapter learned to make up for the rounding
    of its base then stays in the model as an error (peft#2321).

    Raises:
        Unavailable: with the commands that merge such an adapter into the base's values in nf4.
    """
    types = [str(run["type"]).lower() for _, run in _runs(workflow["passes"])]
    if "mergeadapterweights" not in types:
        return
    brought = _flat(workflow["input_model"], {"type"}, "config").get("adapter_path")
    found = artifact.find(Path(brought)) if isinstance(brought, str) and Path(brought).is_dir() else None
    learned_on_nf4 = found is not None and found.manifest.facts.get("method") == "qlora"
    if learned_on_nf4 or "qlora" in types[: types.index("mergeadapterweights")]:
        raise Unavailable(
            "MergeAdapterWeights puts the adapter on the base in float, and it learned on it in nf4: the merged model was never trained",
            "slmops merge ADAPTER" if learned_on_nf4 else "slmops finetune MODEL ROWS --method qlora --engine olive, then slmops merge",
        )


def problems(workflow: Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with a workflow, one `where: what` each. User scripts in it are run.

    Raises:
        Unavailable: Olive is not installed.
    """
    require_olive("to check a workflow")
    found = list(_shapes(workflow))
    if found:
        return found
    from olive.workflows.run.config import RunConfig

    given: dict[str, Any] = copy.deepcopy(dict(workflow))
    found = [*_top(given), *_model(given["input_model"])]
    for index, data in enumerate(given.get("data_configs") or []):
        found += _data(f"data_configs[{index}]", data)
    names = [data.get("name") for data in given.get("data_configs") or []]
    searching = _searches(given)
    for where, run in _runs(given["passes"]):
        found += _pass(where, run, names, searching=searching)
    # Olive changes the mapping that it is given.
    found = found or list(_refusal("workflow", lambda: RunConfig.model_validate(copy.deepcopy(given))))
    return found or list(_foretold(given, RunConfig.model_validate(copy.deepcopy(given)).engine.target))


def _shapes(workflow: Any) -> Iterator[str]:
    """Yield what is no mapping or list where one must stand; the other checks rely on it."""
    if not isinstance(workflow, Mapping):
        yield f"workflow: must be a mapping, not a {type(workflow).__name__}"
        return
    for key in ("input_model", "passes"):
        if not isinstance(workflow.get(key), Mapping) or not workflow[key]:
            yield f"{key}: must be a mapping, and not empty"
    if not isinstance(workflow.get("engine") or {}, Mapping):
        yield "engine: must be a mapping"
    data_configs = workflow.get("data_configs") or []
    if not isinstance(data_configs, list):
        yield "data_configs: must be a list"
        return
    passes = workflow.get("passes")
    runs = list(_runs(passes)) if isinstance(passes, Mapping) else []
    for where, section in [*((f"data_configs[{i}]", data) for i, data in enumerate(data_configs)), *runs]:
        if not isinstance(section, Mapping):
            yield f"{where}: must be a mapping, not a {type(section).__name__}"
            continue
        nested = ["config", *(f"{kind}_config" for kind in _COMPONENTS)]
        yield from (f"{where}.{key}: must be a mapping" for key in nested if not isinstance(section.get(key) or {}, Mapping))


def _runs(passes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each pass with its place in the workflow; under one name there may be several, of which a search takes one."""
    for name, entry in passes.items():
        for run in entry if isinstance(entry, list) else [entry]:
            yield f"passes.{name}", run


def _searches(workflow: Mapping[str, Any]) -> bool:
    return bool((workflow.get("engine") or {}).get("search_strategy") or workflow.get("search_strategy"))


def _known_pass(name: Any) -> Any:
    """Return the class of a pass, Olive's or ours. Raises ValueError for one that is neither."""
    from olive.package_config import OlivePackageConfig

    return OlivePackageConfig.model_validate(package_config()).import_pass_module(str(name))


def _top(workflow: dict[str, Any]) -> Iterator[str]:
    from olive.workflows.run.config import RunConfig, RunEngineConfig

    engine = set(RunEngineConfig.model_fields)
    yield from _unknown("workflow", workflow, set(RunConfig.model_fields) | engine)
    yield from _unknown("engine", workflow.get("engine") or {}, engine)


def _model(model: dict[str, Any]) -> Iterator[str]:
    from olive.model.config.registry import get_model_handler, is_valid_model_type

    if not is_valid_model_type(str(model.get("type"))):
        yield f"input_model: unknown type '{model.get('type')}'"
        return
    handler = get_model_handler(model["type"])
    yield from _unknown("input_model", _flat(model, {"type"}, "config"), set(inspect.signature(handler.__init__).parameters) - {"self"})


def _data(where: str, data: dict[str, Any]) -> Iterator[str]:
    from olive.data.config import DataConfig
    from olive.data.registry import Registry

    yield from _unknown(where, data, DataConfig.model_fields)
    refused = list(_refusal(where, lambda: DataConfig(**copy.deepcopy(data))))  # runs the user script: its components are known now
    if refused:
        yield from refused
        return
    resolved = DataConfig(**copy.deepcopy(data))
    for kind in _COMPONENTS:
        key = f"{kind}_config"
        if not data.get(key):
            continue
        parameters = inspect.signature(Registry.get_component(kind, getattr(resolved, key).type)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue  # it takes anything: nobody can tell
        own = list(parameters)[0 if kind == "load_dataset" else 1 :]
        values = _flat(data[key], {"type"}, "params")
        yield from _unknown(f"{where}.{key}", values, own)
        missing = [name for name in own if parameters[name].default is inspect.Parameter.empty and name not in values]
        yield from (f"{where}.{key}: required key '{name}' is missing" for name in missing)


def _foretold(workflow: Mapping[str, Any], target: Any) -> Iterator[str]:
    """Yield what a pass of ours would refuse on the workflow's target (a SystemConfig, or None: this machine)."""
    from olive.engine.config import RunPassConfig
    from olive.systems.accelerator_creator import create_accelerator
    from olive.systems.common import SystemType
    from olive.systems.system_config import SystemConfig

    accelerator = create_accelerator(target or SystemConfig(type=SystemType.Local), is_ep_required=False)
    for where, run in _runs(workflow["passes"]):
        foretell = getattr(_known_pass(run["type"]), "foretell", None)
        given = _flat(run, set(RunPassConfig.model_fields) - {"config"}, "config")
        lists = [[(name, one) for one in value] if isinstance(value, list) else [(name, value)] for name, value in given.items()]
        if foretell is None:
            continue
        for candidate in itertools.product(*lists):
            try:
                foretell(dict(candidate), accelerator)
            except SlmopsError as error:
                yield f"{where}: {error.message}{f' ({error.hint})' if error.hint else ''}"


def _pass(where: str, run: dict[str, Any], names: Collection[Any], *, searching: bool) -> Iterator[str]:
    from olive.engine.config import RunPassConfig
    from olive.hardware.accelerator import AcceleratorSpec

    try:
        chosen = _known_pass(run.get("type"))
    except (ValueError, ImportError) as error:
        yield f"{where}: {_line(error)}"
        return
    accelerator = AcceleratorSpec("cpu")
    known: dict[str, Any] = chosen.default_config(accelerator)
    given = _flat(run, set(RunPassConfig.model_fields) - {"config"}, "config")
    yield from _unknown(where, given, known)
    yield from (f"{where}: required key '{key}' is missing" for key, entry in known.items() if entry.required and key not in given)
    for key, value in given.items():
        if key.endswith("data_config") and isinstance(value, str) and value not in names:
            yield f"{where}.{key}: no data config is named '{value}'"
        elif key.endswith("data_config") and isinstance(value, dict):
            yield from _data(f"{where}.{key}", value)
        elif key in ("torch_dtype", "compute_dtype") and key in known and value not in (None, *_DTYPES):
            yield f"{where}.{key}: '{value}' is none of {', '.join(_DTYPES)}"
    stand_in = {key: {"name": "stand_in"} if key.endswith("data_config") else copy.deepcopy(value) for key, value in given.items()}
    if searching:  # a list is then what is tried
        yield from _refusal(where, lambda: chosen.get_config_params(accelerator, stand_in))
    else:
        config_class = chosen.get_config_class(accelerator, disable_search=True)[0]
        yield from _refusal(where, lambda: config_class(**stand_in))
    if isinstance(given.get("training_args"), dict) and "training_args" in known:
        yield from _training(f"{where}.training_args", given["training_args"], known["training_args"])


def _training(where: str, arguments: dict[str, Any], parameter: Any) -> Iterator[str]:
    import transformers
    from olive.common.config_utils import NestedConfig

    nested: list[Any] = [t for t in getattr(parameter.type_, "__args__", ()) if isinstance(t, type) and issubclass(t, NestedConfig)]
    trainer = {field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init}
    own = set(nested[0].model_fields) - {"extra_args"}
    # Fields of Olive's that transformers has no more, such as warmup_ratio (train_utils.py:90), and fp16 (lora.py:94).
    dropped = {"fp16"} | {key for key in own - trainer if key != "overwrite_output_dir"}
    every = _flat(arguments, (), "extra_args")
    yield from (f"{where}: '{key}' is dropped by Olive: {_instead(key)}" for key in sorted(dropped & set(every)))
    yield from _unknown(where, _flat(arguments, own, "extra_args"), trainer)
    values = {**copy.deepcopy(arguments), "output_dir": arguments.get("output_dir") or "."}
    yield from _refusal(where, lambda: nested[0](**values).create_training_args())


def _instead(key: str) -> str:
    return {"warmup_ratio": "give warmup_steps (below 1 it is a share)", "fp16": "give the pass's torch_dtype"}.get(key, "leave it out")


def _unknown(where: str, keys: Collection[str], allowed: Collection[str]) -> Iterator[str]:
    from difflib import get_close_matches

    for key in sorted(set(keys) - set(allowed)):
        near = get_close_matches(key, list(allowed), n=1)
        yield f"{where}: unknown key '{key}'{f' (did you mean {near[0]}?)' if near else ''}"


def _flat(section: Mapping[str, Any], own: Collection[str], nested: str) -> dict[str, Any]:
    """Return the keys of a section's nested mapping with those that may stand beside it."""
    inside = section.get(nested)
    beside = {key: value for key, value in section.items() if key not in own and key != nested}
    return {**(inside if isinstance(inside, Mapping) else {}), **beside}


def _refusal(where: str, attempt: Callable[[], Any]) -> Iterator[str]:
    try:
        attempt()
    except _REFUSALS as error:
        yield f"{where}: Olive refuses it: {_line(error)}"


def _line(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        # Of a parameter that takes one of several types, the first says what is meant; the others are search markers of Olive's.
        first = {str(entry["loc"][0]) if entry["loc"] else "": entry["msg"] for entry in reversed(error.errors())}
        texts = {place: message.removeprefix("Value error, ") for place, message in reversed(first.items())}
        return "; ".join(f"{place}: {text}" if place else text for place, text in texts.items())
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
