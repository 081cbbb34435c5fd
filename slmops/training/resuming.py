"""How does a Trainer go on as if it had never been stopped? Its checkpoints are whole or not there, and hold all that comes next.

transformers writes a checkpoint into its final folder file by file, so that a kill leaves half of one; pickles its states; forgets
the loss that it has summed up since it last logged; and goes on for one step more from a checkpoint of the last step (5.23,
trainer.py, `_save_checkpoint`, `_inner_training_loop`). So the writing and reading are ours (`slmops.training.saved_state`): into
a folder under another name, which is renamed once all of it is on the disk.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slmops.training import checkpoints, saved_state


class ResumableTrainer(Trainer):
    """A Trainer with checkpoints of slmops's own; sharded runs (FSDP, DeepSpeed) keep transformers' files, renamed when whole.

    Attributes:
        best: folder of the best so far, which each checkpoint takes along.
        best_loss: its validation loss.
    """

    best: Path | None = None
    best_loss: float = math.inf
    _staging: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_LossSoFar(self))

    @property
    def sharded(self) -> bool:
        """Tell whether no process has all weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def begin_with(self, checkpoint: Path | None, best: Path) -> int:
        """Take the best so far from the checkpoint that the run goes on from; return the steps that it has made.

        Args:
            checkpoint: None for a run from its beginning.
            best: folder where the best of the run is kept.
        """
        self.best = best
        if self.args.should_save:
            checkpoints.restore_best(checkpoint, best)
        self.best_loss = math.inf
        if checkpoint is None:
            return 0
        lowest = checkpoints.lowest_validation_loss(checkpoint)
        self.best_loss = lowest if lowest is not None else math.inf
        return checkpoints.step_of(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, unless the run is over: then there is no step to go on to."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return
        folder = Path(str(self.args.output_dir))
        staging = folder / checkpoints.WRITING
        self._begin_writing(staging)
        if self.sharded:
            self._staging = staging
            super()._save_checkpoint(model, trial)
            self._staging = None
            written = staging / f"checkpoint-{self.state.global_step}"
        else:
            self._write(staging)
            written = staging
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.best is not None:
                checkpoints.keep_best(self.best, written / checkpoints.BEST)
            saved_state.flush(written)
            checkpoints.complete(written, folder, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _begin_writing(self, staging: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        if self.args.should_save:
            loss = {"summed_loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}
            extra = {**loss, "rank_patterns": saved_state.rank_patterns(self.model)}
            saved_state.write_weights(self.model, folder)
            saved_state.write_optimizer(self.optimizer, self.lr_scheduler, extra, folder)
            self.state.save_to_json(str(folder / checkpoints.TRAINER_STATE))
        saved_state.write_random(folder, self.args.process_index)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[arg-type]
            return
        folder = Path(resume_from_checkpoint)
        saved_state.read_weights(self.model, folder)
        saved_state.restore_rank_patterns(self.model, saved_state.read_state(folder)["rank_patterns"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            saved_state.read_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.sharded or checkpoint is None:
            super()._load_rng_state(checkpoint)
        else:
            saved_state.read_random(Path(checkpoint), self.args.process_index)


class _LossSoFar(TrainerCallback):
    """Gives a resumed run the loss that was summed up and not yet logged, and the intervals of its own settings."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called once the Trainer has set its own sum to nothing."""
        folder = checkpoints.of_step(Path(str(args.output_dir)), state.global_step)
        state.compute_steps(args, state.max_steps)  # the checkpoint remembers those of the run that wrote it
        if state.global_step == 0 or self.trainer.sharded or not (folder / saved_state.STATE).is_file():
            return
        known = saved_state.read_state(folder)
        self.trainer._tr_loss = torch.tensor(known["summed_loss"], device=args.device)
        self.trainer._globalstep_last_logged = known["last_logged"]
