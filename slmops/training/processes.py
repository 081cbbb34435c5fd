"""Which of several processes is this, and which rows of a batch are its own?

With `accelerate launch -m slmops finetune ...`, with torchrun, or with `--processes N`, several processes train one adapter. Each
takes its share of the rows of every batch, so that an optimizer step sees the same rows, whatever their number: what is learned
stays the same. The first process writes the artefact and speaks; the others compute.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slmops import artifact, environment
from slmops.artifact import Artifact, Draft
from slmops.errors import InvalidInput, RunFailed


class Batching(Protocol):
    """A batch sampler that shuffles anew each epoch."""

    batch_size: int
    drop_last: bool

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[int]]: ...


@dataclass(frozen=True)
class Team:
    """The processes that train together, seen from one of them."""

    index: int = 0
    """Of this process; 0 leads."""
    size: int = 1
    on_this_machine: int = 1

    @property
    def leads(self) -> bool:
        """Tell whether this process writes and speaks."""
        return self.index == 0

    def threads(self, given: int | None, usual: int) -> int:
        """Return the threads of this process: those given, or its share of the usual number."""
        return given or max(1, usual // self.on_this_machine)

    def drop_apart(self, seed: int) -> None:
        """Let each process draw dropout of its own; the first draws what one process would."""
        if self.index:
            environment.require("torch", "to train").manual_seed((seed << 16) + self.index)

    def wait(self) -> None:
        """Wait until every process of the team has come here."""
        if self.size > 1:
            torch = environment.require("torch", "to train")
            if torch.distributed.is_initialized():
                torch.distributed.barrier()

    def part(self) -> None:
        """End the work together; a process that left alone would be taken for one that failed."""
        if self.size > 1:
            torch = environment.require("torch", "to train")
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


ALONE = Team()


def find_team(asked: int) -> Team:
    """Return the team that this process was launched into.

    Args:
        asked: `--processes`; 1 where nobody asked.

    Raises:
        InvalidInput: a launcher has started another number of processes than `asked`, or set a precision.
    """
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("", "no"):
        raise InvalidInput(
            f"the launcher asks for mixed precision ({mixed}), which slmops decides itself",
            "--mixed_precision no, and --precision of slmops",
        )
    team = Team(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or 1)
    if team.size > 1 and asked not in (1, team.size):
        raise InvalidInput(
            f"processes: {asked} are asked for, and the launcher has started {team.size}", "leave --processes out under accelerate launch"
        )
    return team


@contextmanager
def shared_draft(team: Team, out: Path, **details: Any) -> Iterator[Draft]:
    """Write an artefact as a team: `artifact.create` for the one that leads, a draft that stays unwritten for the others."""
    if team.leads:
        with artifact.create(out, **details) as draft:
            yield draft
    else:
        yield Draft(artifact.partial_folder(out), out, details["kind"], details["command"], details["config"])
    team.wait()


def written(team: Team, draft: Draft) -> Artifact:
    """Return what the team wrote."""
    return draft.done() if team.leads else artifact.load(draft.out)


class SharedBatches:
    """The part of each batch that is this process's: every `size`-th row, so that lengths are alike between processes.

    A batch with fewer rows than processes leaves some without one. They compute on its first row, of which nothing counts
    (`row_of`), as gradients are summed up by all or by none.

    Args:
        batches: of all processes.
        index: of this one.
        size: their number.
        even: shares are of one size, as a mean of means wants them; a batch that cannot be shared out so is computed by each whole.
    """

    def __init__(self, batches: Batching, index: int, size: int, *, even: bool = False) -> None:
        self.batches, self.index, self.size, self.even = batches, index, size, even
        self.batch_size, self.drop_last = max(1, batches.batch_size // size), False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            if self.even and len(batch) % self.size:
                yield batch
            else:
                yield batch[self.index :: self.size] or [-1 - batch[0]]


def share(batches: Batching, accelerator: Any, *, even: bool = False) -> Batching:
    """Return the batches of this process: see `SharedBatches`."""
    count = accelerator.num_processes
    return batches if count == 1 else SharedBatches(batches, accelerator.process_index, count, even=even)


def row_of(rows: list[tuple[list[int], list[int]]], number: int, ignored: int) -> tuple[list[int], list[int]]:
    """Return a row by its number in a batch of `SharedBatches`: below zero, the row -1 - number, of which nothing counts."""
    if number >= 0:
        return rows[number]
    ids, labels = rows[-1 - number]
    return ids, [ignored] * len(labels)


def sharded() -> bool:
    """Tell whether a launcher asks for FSDP or DeepSpeed, with which no process has all weights."""
    return any(os.environ.get(name, "").lower() == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))


def save_sharded(accelerator: Any, model: Any, folder: Path, *, leads: bool) -> None:
    """Gather what was trained from all processes, and write it by one; every process has to call it. Not executed here (no GPUs)."""
    state = accelerator.get_state_dict(model)
    if leads:
        shutil.rmtree(folder, ignore_errors=True)
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)


def prepare_loader(loader: Any, accelerator: Any) -> Any:
    """Return a loader that moves batches to the device; its batches are shared out already."""
    from accelerate.data_loader import prepare_data_loader

    return prepare_data_loader(loader, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True)


def mean_over(team_of: Any, loss: float, tokens: int) -> float:
    """Return the mean loss a token over all processes.

    Args:
        team_of: the run's accelerator.
        loss: mean over this process's rows.
        tokens: of them.
    """
    torch = environment.require("torch", "to train")
    # float64 holds the sum of every process exactly enough; not every GPU's collectives know it, but NCCL's and gloo's do.
    sums = torch.tensor([loss * tokens, tokens], dtype=torch.float64, device=team_of.device)
    total, count = team_of.reduce(sums, reduction="sum").tolist()
    return total / count


def check_together(team: Team, accelerator: Any) -> None:
    """Raise RunFailed when processes that were launched together do not train together: each would write its own adapter."""
    if accelerator.num_processes != team.size:
        raise RunFailed(
            f"{team.size} processes were started, and accelerate sees {accelerator.num_processes}",
            "start them with accelerate launch, torchrun, or --processes",
        )
