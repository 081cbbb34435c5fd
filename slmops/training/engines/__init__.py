"""Who trains? Our own trainer with PEFT, or Olive's pass: the same tokens and labels in, the same PEFT folder out."""

from slmops.training.engines.olive import OLIVE_DIFFERS, train_with_olive
from slmops.training.engines.outcome import Run, total_steps
from slmops.training.engines.own import train_with_peft
from slmops.training.engines.plan import training_arguments

__all__ = ["OLIVE_DIFFERS", "Run", "total_steps", "train_with_olive", "train_with_peft", "training_arguments"]
