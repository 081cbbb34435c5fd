"""Objectives dpo and reward: how do preferences become a run? Pairs of answers as token ids, trained by TRL's trainers.

dpo moves the odds of the better answer against the worse one's, held to the base by beta (Rafailov et al. 2023, arXiv
2305.18290, equation 7). reward trains a score that is higher for the better answer (Bradley-Terry; Ouyang et al. 2022,
arXiv 2203.02155, equation 1): base and adapter with a head of one output. Both get the ids of `slmops.data.preferences`,
which are those of sft; nothing of TRL's tokenizing, truncating and ending touches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import environment, progress
from slmops.config import FinetuneSettings
from slmops.data import Corpus, Interface, Pair, Row, Tokenizer, encode_pairs, load_splits, overlap, preference_rows, split
from slmops.errors import InvalidInput
from slmops.evaluation.preferring import likelihood_margins, preference_metrics, reward_margins
from slmops.runtime import reward_model
from slmops.runtime.loading import Loaded
from slmops.training import methods
from slmops.training.effects import Score
from slmops.training.objectives.material import Course, Figures, Material, Setup, Task

METHODS = ("lora", "dora", "rslora")
"""What keeps the base beside the adapter (dpo's reference is the adapter turned off), and takes a head with it (reward)."""
# trl 1.16 takes a twentieth of sft's rate for dpo (1e-6 against 2e-5). A tenth keeps stories3m stable on SNIPS and moves the
# held-out margin in 240 steps (benchmarks/objectives.py). A reward model learns from pairs whose difference is one word: at sft's own rate
# one run of three ended at 0.83 of 700 held-out pairs right, at three tenths of it three seeds at 0.95, 0.96 and 0.97.
RATE_AGAINST_SFT = {"dpo": 0.1, "reward": 0.3}


@dataclass(frozen=True)
class _Preferences:
    interface: Interface
    train: list[Pair]
    validation: list[Pair]
    validation_rows: list[Row]


def prepare_dpo(task: Task) -> Material:
    """Read, split and encode preferences for dpo.

    Raises:
        InvalidInput: the rows hold no preferences, or a setting does not fit.
        Unavailable: TRL is not installed.
    """
    found = _read(task)
    settings = task.settings

    def measure(loaded: Loaded) -> dict[str, Score]:
        margins = likelihood_margins(loaded, found.validation)
        metrics = preference_metrics(margins)
        ones = [1] * len(margins)
        return {
            "margin": Score(metrics["margin"], margins, ones, "margin"),
            "pairwise_accuracy": Score(metrics["pairwise_accuracy"], [float(m > 0) for m in margins], ones, "pairwise_accuracy"),
        }

    def trainer(setup: Setup) -> Any:
        from slmops.training.objectives.trl_trainers import dpo_trainer

        return dpo_trainer(setup, found.train, found.validation, task.base, settings)

    course = Course(trainer=trainer, measures=(measure,) if found.validation else (), facts=_facts(settings, found))
    return _material(task, found, course)


def prepare_reward(task: Task) -> Material:
    """Read, split and encode preferences for a reward model.

    Raises:
        InvalidInput: the rows hold no preferences, or a setting does not fit.
        Unavailable: TRL is not installed, or the architecture has no head that scores.
    """
    found = _read(task)
    settings = task.settings
    if task.package is not None:
        raise InvalidInput(
            "objective reward: a reward model is not exported, so it learns on no quantized base", "leave --quantized-base out"
        )

    def model() -> tuple[Any, int]:
        base = reward_model.load_headed_base(task.base, found.interface, precision="bf16" if settings.run.precision == "bf16" else "fp32")
        parameters = sum(p.numel() for p in base.parameters())
        return methods.attach_adapter(base, settings.method), parameters

    def trainer(setup: Setup) -> Any:
        from slmops.training.objectives.trl_trainers import reward_trainer

        return reward_trainer(setup, found.train, found.validation, task.base, settings, reward_model.padding_token(found.interface))

    def close(run: Any, folder: Path) -> Figures:
        if not found.validation:
            return {}, {}
        scored = reward_model.assemble(task.base, folder, found.interface, threads=settings.run.threads)
        metrics = preference_metrics(reward_margins(scored, found.validation))
        return {name: estimate.document() for name, estimate in metrics.items()}, {}

    refused = "refused: a score in place of the vocabulary, no text"
    facts = {**_facts(settings, found), "roads": dict.fromkeys(("merge", "pack", "export"), refused)}
    return _material(task, found, Course(model=model, trainer=trainer, close=close, facts=facts))


def _read(task: Task) -> _Preferences:
    given, objective, name = task.settings.data, task.settings.objective, task.settings.objective.objective
    environment.require("trl", f"for --objective {name}")
    if task.settings.method.method not in METHODS:
        raise InvalidInput(
            f"objective {name}: method {task.settings.method.method} is not open to it", f"use --method {' or '.join(METHODS)}"
        )
    if given.completion_template is not None:
        raise InvalidInput(
            f"objective {name}: there are two completions (completion_template)", "give --chosen-template and --rejected-template"
        )
    if given.prompt_template is not None and objective.chosen_template is None:
        raise InvalidInput(
            f"objective {name}: --prompt-template is given without --chosen-template",
            "give templates for all three: prompt, chosen, rejected",
        )
    if given.train_on == "all":
        raise InvalidInput(f"objective {name}: a preference is of answers, not of prompts (train_on all)", "leave --train-on out")
    templates = {"chosen_template": objective.chosen_template, "rejected_template": objective.rejected_template}
    rows, validation, stored = load_splits(task.data or "", validation=given.validation, rows=given.rows, max_rows=given.max_rows)
    rows = preference_rows(rows, **templates)
    prompt = given.prompt_template or stored.prompt_template
    interface = task.interface(rows, prompt, objective.chosen_template)
    progress.say(f"stop token: {interface.stop_reason}")
    asked = {"prompt_template": interface.prompt_template, "completion_template": interface.completion_template}
    if validation is None:
        rows, validation = split(rows, given.validation_share, task.settings.run.seed, **asked)
    else:
        validation = preference_rows(validation, **templates)
        if shared := overlap(rows, validation, **asked):
            task.draft.warn(f"{shared} validation rows stand in the training data too: the validation loss is too good")
    tokenizer = Tokenizer.load(task.base)
    train, warnings = encode_pairs(rows, tokenizer, interface, rejected_template=objective.rejected_template)
    for warning in warnings:
        task.draft.warn(warning)
    held_out = encode_pairs(validation, tokenizer, interface, rejected_template=objective.rejected_template)[0] if validation else []
    return _Preferences(interface, train, held_out, validation)


def _material(task: Task, found: _Preferences, course: Course) -> Material:
    train, validation = _counted(found.train), _counted(found.validation)
    return Material(task.package, found.interface, train, validation, found.validation_rows, course=course)


def _counted(pairs: Sequence[Pair]) -> Corpus:
    """Return the counts of pairs; what is trained on are the pairs themselves."""
    answers = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    prompts = sum(2 * len(pair.prompt_ids) for pair in pairs)
    return Corpus([], rows=len(pairs), tokens_total=prompts + answers, tokens_supervised=answers)


def _facts(settings: FinetuneSettings, found: _Preferences) -> dict[str, Any]:
    own = {"rejected_template": settings.objective.rejected_template, "pairs": len(found.train)}
    return {"preferences": own | ({"beta": settings.objective.dpo_beta} if settings.objective.objective == "dpo" else {})}
