"""What is learned: which rows, in which order, by which loss? One module an objective, and the table of them.

An objective prepares the material of a run (`Material`), and says in its `Course` what it does otherwise than sft:
the order of rows, the trainer, the model, what is measured before and after.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from slmops.config import FinetuneSettings
from slmops.errors import InvalidInput, Unavailable
from slmops.training.objectives.material import Course, Material, Setup, Task
from slmops.training.objectives.naming import named

__all__ = ["OBJECTIVES", "Course", "Material", "Objective", "Setup", "Task", "chosen", "files_of", "prepare"]


class Objective(NamedTuple):
    """Where an objective is, and what goes together with it."""

    module: str
    prepare: str
    """Function of the module, (task) -> `Material`."""
    settings: tuple[str, ...] = ()
    """Settings of `ObjectiveSettings` that it has; another's is refused by name."""
    engines: tuple[str, ...] = ("peft",)
    replays: bool = False
    """Its rows can be mixed with `--replay`."""
    generates: bool = True
    """What it trains is a language model, which `--retain` can measure."""


_TASKS = ("task", "task_prompt_template", "task_completion_template", "task_weight", "task_validation", "task_temperature")
_ANSWERS = ("chosen_template", "rejected_template")
OBJECTIVES = {
    "sft": Objective("supervised", "prepare", engines=("peft", "olive"), replays=True),
    "own loss": Objective("own_loss", "prepare", settings=("loss", "loss_args")),
    "pretrain": Objective("pretraining", "prepare", engines=("peft", "olive"), replays=True),
    "multitask": Objective("multitask", "prepare", settings=_TASKS, replays=True),
    "dpo": Objective("preference", "prepare_dpo", settings=(*_ANSWERS, "dpo_beta")),
    "reward": Objective("preference", "prepare_reward", settings=_ANSWERS, generates=False),
}


def chosen(settings: FinetuneSettings, data: str | Path | None) -> str:
    """Return the name of the run's objective in `OBJECTIVES`, once everything given is seen to belong to it.

    Raises:
        InvalidInput: a setting of another objective, no DATA, or `--replay` or `--retain` where they mean nothing.
        Unavailable: the engine does not have the objective.
    """
    given, forgetting = settings.objective, settings.forgetting
    name = "own loss" if given.loss is not None and given.objective == "sft" else given.objective
    objective = OBJECTIVES[name]
    foreign = [key for key in type(given).model_fields if key in given.model_fields_set and key not in ("objective", *objective.settings)]
    foreign = [key for key in foreign if getattr(given, key) != type(given).model_fields[key].default]
    if foreign:
        owners = [other for other, entry in OBJECTIVES.items() if foreign[0] in entry.settings]
        way = "give --loss with it, and sft" if owners == ["own loss"] else f"it belongs to --objective {' or '.join(owners)}"
        raise InvalidInput(f"objective {name} has no setting {', '.join(foreign)}", way)
    if data is None and name != "multitask":
        raise InvalidInput(f"objective {name}: DATA is missing", "give a file of rows, a folder, or a dataset id after MODEL")
    if settings.method.engine not in objective.engines:
        raise Unavailable(f"engine olive has no objective {name}", "use --engine peft")
    if forgetting.replay is not None and not objective.replays:
        raise InvalidInput(f"objective {name}: replay cannot be mixed into its rows", "leave --replay out")
    if forgetting.replay is not None and settings.method.engine == "olive":
        raise Unavailable("engine olive draws its rows itself, and cannot mix in --replay", "use --engine peft")
    if forgetting.retain is not None and not objective.generates:
        raise InvalidInput(f"objective {name}: what it trains gives no text, so that nothing is retained", "leave --retain out")
    return name


def prepare(name: str, task: Task) -> Material:
    """Prepare what a run trains on; see `OBJECTIVES`."""
    entry = OBJECTIVES[name]
    return getattr(import_module(f"slmops.training.objectives.{entry.module}"), entry.prepare)(task)


def files_of(settings: FinetuneSettings) -> dict[str, Path]:
    """Return the files and folders that decide a run beside model and DATA, by their role in the manifest.

    Raises:
        InvalidInput: a malformed `NAME=FILE`.
    """
    given, forgetting = settings.objective, settings.forgetting
    places = {f"task.{name}": file for name, file in named("task", given.task).items()}
    places |= {f"task_validation.{name}": file for name, file in named("task_validation", given.task_validation).items()}
    places |= {"loss": given.loss.rpartition(":")[0]} if given.loss is not None else {}
    places |= {name: place for name in ("replay", "retain") if (place := getattr(forgetting, name)) is not None}
    return {role: Path(place) for role, place in places.items() if Path(place).exists()}
