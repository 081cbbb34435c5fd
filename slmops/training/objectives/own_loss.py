"""A loss of the user's own (`--loss my_loss.py:ContrastiveLoss`): what is it given, and what must it return?

The file is Python that the user asked to run: it runs with all the user's rights. Its class is made once, with
`--loss-args`, and called with the model and a batch for each training and validation step (`Loss`). Whatever it raises
is told with the file and the line.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from slmops.data import Row
from slmops.errors import InvalidInput, RunFailed
from slmops.training.objectives import supervised
from slmops.training.objectives.material import Course, Material, Setup, Task
from slmops.training.objectives.naming import named

if TYPE_CHECKING:
    from torch import Tensor

_SHAPE = "a class with __call__(self, model, batch) that returns a tensor of one number"


class LossBatch(TypedDict):
    """What a loss is given; rows are padded on the right."""

    input_ids: Tensor
    """(rows, tokens) int64: BOS, prompt, completion and stop token, as in sft."""
    attention_mask: Tensor
    """(rows, tokens) int64: 1 for a token, 0 for padding."""
    labels: Tensor
    """(rows, tokens) int64: the token itself where sft would count it, -100 elsewhere; not shifted."""
    prompt_tokens: Tensor
    """(rows,) int64: so many tokens at the start are the prompt."""
    rows: list[Row]
    """The data rows themselves, with all their columns."""


class Loss(Protocol):
    """What the user's class is."""

    def __call__(self, model: Any, batch: LossBatch) -> Tensor:
        """Return the mean loss of the batch's rows: a tensor of one number with a gradient.

        Args:
            model: the base with its adapter, in train or eval mode.
            batch: see `LossBatch`.
        """
        ...


@dataclass(frozen=True)
class OwnLoss:
    """A loss that was loaded, and where from."""

    file: Path
    name: str
    loss: Loss

    def __call__(self, model: Any, batch: LossBatch) -> Tensor:
        """Call the user's loss and check what it returns.

        Raises:
            RunFailed: it raises, or returns no tensor of one number, or one without a gradient in training.
        """
        import torch

        try:
            value = self.loss(model, batch)
        except Exception as error:  # the user's own code may raise anything: say where
            raise RunFailed(f"{_place(self.file, error)}: {self.name} raised {_told(error)}", "mend that line") from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise RunFailed(f"{_line_of(self.loss, self.file)}: {self.name} returned {shape}", f"--loss names {_SHAPE}")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise RunFailed(
                f"{_line_of(self.loss, self.file)}: {self.name} returned a number that depends on no trainable weight",
                "compute it from what the model returns, without .item(), .detach() or no_grad",
            )
        return value.reshape(())


def load_loss(given: str, arguments: Sequence[str] | None) -> OwnLoss:
    """Run the user's file and make its class.

    Args:
        given: `FILE.py:CLASS`.
        arguments: `NAME=VALUE` of the constructor, values as in YAML.

    Raises:
        InvalidInput: no such file or class, the file does not run, or the constructor does not take the arguments; the
            message names the file, and the line where there is one.
    """
    path, _, name = given.rpartition(":")
    file = Path(path)
    if not path or not name.isidentifier() or file.suffix != ".py":
        raise InvalidInput(f"loss: {given!r} is no FILE.py:CLASS", "write for example my_loss.py:ContrastiveLoss")
    if not file.is_file():
        raise InvalidInput(f"loss: no such file: {file}", "give the path of a Python file")
    module = _run(file)
    kind: Any = getattr(module, name, None)
    if not inspect.isclass(kind):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__]
        raise InvalidInput(f"loss: {file} has no class {name}", f"it has {', '.join(classes)}" if classes else f"write {_SHAPE}")
    if not any("__call__" in vars(one) for one in kind.__mro__):
        raise InvalidInput(f"{_line_of(kind, file)}: {name} has no __call__", f"--loss names {_SHAPE}")
    values = {key: _value(key, text) for key, text in named("loss_args", arguments).items()}
    try:
        inspect.signature(kind).bind(**values)
        made: Any = kind(**values)
    except Exception as error:  # the user's own code may raise anything: say where
        raise InvalidInput(f"{_place(file, error, _line_of(kind, file))}: {name}: {_told(error)}", "see --loss-args") from error
    return OwnLoss(file, name, made)


def prepare(task: Task) -> Material:
    """Prepare the rows as sft does, and a trainer with the user's loss."""
    objective = task.settings.objective
    own = load_loss(str(objective.loss), objective.loss_args)
    material = supervised.prepare(task)

    def trainer(setup: Setup) -> Any:
        from slmops.training.objectives.own_loss_trainer import OwnLossTrainer

        train = [(sequence, material.train_rows[sequence.row]) for sequence in setup.train.sequences]
        held_out = [(sequence, material.validation_rows[sequence.row]) for sequence in setup.validation.sequences]
        return OwnLossTrainer(setup, train, held_out, own, task.settings.run.seed)

    facts = {"loss": {"file": own.file.name, "class": own.name, "args": list(objective.loss_args or ())}}
    return replace(material, course=Course(trainer=trainer, facts=facts))


def _run(file: Path) -> ModuleType:
    """Run a Python file as a module of its own name.

    Raises:
        InvalidInput: it has a syntax error, or raises; with the line.
    """
    spec = importlib.util.spec_from_file_location(f"own_loss_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"loss: {file} cannot be run as Python", "give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InvalidInput(f"{error.filename} line {error.lineno}: {error.msg}", "mend that line") from error
    except Exception as error:  # the user's own code may raise anything: say where
        raise InvalidInput(f"{_place(file, error)}: {_told(error)}", "mend that line") from error
    return module


def _value(name: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InvalidInput(f"loss_args: {name}={text} is no YAML value", "write for example temperature=0.1") from None


def _place(file: Path, error: BaseException, otherwise: str = "") -> str:
    """Return the last line of the user's file that an error passed through, as `FILE line N`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == file.resolve()]
    return f"{file} line {lines[-1]}" if lines else otherwise or str(file)


def _line_of(thing: Any, file: Path) -> str:
    """Return where the user's class begins, as `FILE line N`."""
    try:
        return f"{file} line {inspect.getsourcelines(thing if inspect.isclass(thing) else type(thing))[1]}"
    except (OSError, TypeError):
        return str(file)


def _told(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
