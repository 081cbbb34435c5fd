"""How do TRL's trainers train on our ids? Their losses, our batches and encoding, and the best adapter kept (trl 1.16).

TRL would tokenize again, append the tokenizer's EOS, cut at 1,024 tokens, checkpoint activations, use bf16, write model
cards and send telemetry: none of it happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from torch.utils.data import DataLoader
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from slmops.config import FinetuneSettings
from slmops.data import Pair
from slmops.training import processes
from slmops.training.batches import Batches
from slmops.training.objectives.material import Setup
from slmops.training.objectives.preference import RATE_AGAINST_SFT
from slmops.training.resuming import ResumableTrainer
from slmops.training.trainer import EpochBatches


class _OnOurIds:
    """What both trainers do otherwise than TRL's own; stands before TRL's class in the bases."""

    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    accelerator: Any
    args: Any
    model: Any
    order: Batches
    keep: Callable[[Any], None]
    best_loss: float

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Return the dataset as it is: it holds token ids already."""
        return dataset

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the manifest says what was done."""

    def get_train_dataloader(self) -> DataLoader:
        """Return the length-grouped batches of `slmops.training.batches`; with several processes, this one's share of each."""
        batches: Any = processes.share(EpochBatches(self.order), self.accelerator, even=True)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return processes.prepare_loader(loader, self.accelerator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return all validation pairs, in every process: to share them out evenly, accelerate would count some twice."""
        if self.accelerator.num_processes == 1:
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(held_out, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        return processes.prepare_loader(loader, self.accelerator)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the validation loss; keep the adapter if it is the best so far."""
        if self.eval_dataset is None:
            return {}
        metrics = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        if metrics["eval_loss"] < self.best_loss:
            self.best_loss = metrics["eval_loss"]
            self.keep(self.model)
        return metrics


class _Dpo(_OnOurIds, ResumableTrainer, DPOTrainer):
    """DPO whose reference is the base: the adapter turned off."""


class _Reward(_OnOurIds, ResumableTrainer, RewardTrainer):
    """A reward model's trainer."""


def dpo_trainer(setup: Setup, train: Sequence[Pair], validation: Sequence[Pair], base: Path, settings: FinetuneSettings) -> Any:
    """Return the trainer of dpo.

    Args:
        setup: of the run.
        train: pairs to learn.
        validation: held-out pairs; may be empty.
        base: folder of the model, for the tokenizer that TRL asks for.
        settings: of the run.
    """
    arguments = _arguments(DPOConfig, setup.arguments, settings, beta=settings.objective.dpo_beta)
    trainer = _Dpo(
        model=setup.model,
        args=arguments,
        train_dataset=_dataset([_three_parts(pair) for pair in train]),
        eval_dataset=_dataset([_three_parts(pair) for pair in validation]) if validation else None,
        processing_class=_tokenizer(base, None),
    )
    # TRL gave the fresh adapter a copy as the reference. It does nothing yet: the base is that reference, without a copy
    # in memory and in what is saved.
    if "ref" in setup.model.peft_config:
        setup.model.delete_adapter("ref")
    return _with_order(trainer, setup, train, settings)


def reward_trainer(
    setup: Setup, train: Sequence[Pair], validation: Sequence[Pair], base: Path, settings: FinetuneSettings, padding: int
) -> Any:
    """Return the trainer of a reward model; see `dpo_trainer`.

    Args:
        setup: of the run.
        train: pairs to learn.
        validation: held-out pairs; may be empty.
        base: folder of the model.
        settings: of the run.
        padding: id that ends no answer.
    """
    trainer = _Reward(
        model=setup.model,
        args=_arguments(RewardConfig, setup.arguments, settings),
        train_dataset=_dataset([_two_texts(pair) for pair in train]),
        eval_dataset=_dataset([_two_texts(pair) for pair in validation]) if validation else None,
        processing_class=_tokenizer(base, padding),
    )
    return _with_order(trainer, setup, train, settings)


def _with_order(trainer: Any, setup: Setup, train: Sequence[Pair], settings: FinetuneSettings) -> Any:
    lengths = [max(len(sequence.ids) for sequence in pair.both) for pair in train]
    trainer.order = Batches(lengths, setup.arguments.per_device_train_batch_size, settings.run.seed)
    trainer.keep = setup.keep
    return trainer


def _arguments(kind: Any, given: Any, settings: FinetuneSettings, **own: Any) -> Any:
    """Return the Trainer's arguments as TRL's, without what TRL would change of its own accord."""
    fixed = {
        "learning_rate": settings.optimizer.learning_rate or RATE_AGAINST_SFT[settings.objective.objective] * given.learning_rate,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": given.bf16,
        "disable_dropout": not settings.method.lora_dropout,
        "per_device_eval_batch_size": 4 * given.per_device_train_batch_size,
    }
    return kind(**(given.to_dict() | fixed | own))


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    return datasets.Dataset.from_list(rows)


def _three_parts(pair: Pair) -> dict[str, list[int]]:
    return {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}


def _two_texts(pair: Pair) -> dict[str, list[int]]:
    chosen, rejected = pair.both
    return {"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}


def _tokenizer(base: Path, padding: int | None) -> Any:
    """Load the tokenizer that TRL asks for: it only learns from it which token pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    if padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
