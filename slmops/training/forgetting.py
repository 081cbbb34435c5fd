"""What did the model unlearn, and what keeps it? `--retain` measures old data before and after, `--replay` mixes it in.

The bar is on the relative rise of perplexity, exp(mean change of nats a token) - 1, or the fall of a task's metric. Its
default, 10 %, is 0.095 nats a token: about what rounding the same model to 4 bits may cost where nobody minds
(`verify` bars int4 at 0.05 nats of KL), and what a user would notice. It warns and does not fail: whether the new task
is worth it is the user's to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slmops import progress
from slmops.artifact import Draft
from slmops.config import FinetuneSettings
from slmops.data import Corpus, Interface, Row, Tokenizer, encode_blocks, encode_rows, load_splits, row_format_of
from slmops.errors import InvalidInput
from slmops.evaluation import answer_rows, bounded, score
from slmops.evaluation.evaluating import held_out_rows
from slmops.runtime.loading import Loaded
from slmops.training.effects import Effect, Measure, Score, perplexity_of
from slmops.training.mixture import Mixture, Source
from slmops.training.objectives.material import Material, joined

RETAINED = "retain"


def retained(settings: FinetuneSettings, base: Path, interface: Interface) -> Measure:
    """Return the measure of `--retain`; the file is read and encoded now, so that a mistake in it costs no training.

    Raises:
        InvalidInput: it cannot be read, or the metric does not fit its rows.
    """
    given = settings.forgetting
    rows, templates = held_out_rows(str(given.retain))
    own = _own_interface(interface, rows, given.retain_prompt_template, given.retain_completion_template, templates)
    try:
        text = row_format_of(rows, own) == "text"
        corpus = encode_rows(rows, Tokenizer.load(base), own)
    except InvalidInput as error:
        raise InvalidInput(f"retain: {given.retain}: {error.message}", error.hint) from None
    if text and given.retain_metric != "perplexity":
        raise InvalidInput(
            f"retain_metric: {given.retain} is plain text, which has no answers to count ({given.retain_metric})",
            "leave --retain-metric out, or give --retain-prompt-template and --retain-completion-template",
        )

    def measure(loaded: Loaded) -> dict[str, Score]:
        if given.retain_metric == "perplexity":
            return {RETAINED: perplexity_of(loaded, corpus.sequences)}
        answers = answer_rows(replace(loaded, interface=bounded(own, loaded.runner)), rows)
        right = [float(answer.correct) for answer in answers]
        return {RETAINED: Score(score(answers, given.retain_metric), right, [1] * len(right), given.retain_metric)}

    return measure


def verdict(effect: Effect, settings: FinetuneSettings) -> tuple[dict[str, Any], str | None]:
    """Return what the manifest says of the old data, and a warning where the bar is passed.

    The loss is relative: the rise of perplexity, or the fall of a metric, over what it was.
    """
    given, before, after = settings.forgetting, effect.before.estimate.value, effect.after.estimate.value
    rises = effect.before.metric == "perplexity"
    lost = effect.change.value if rises else (before - after) / before if before else 0.0
    facts = {
        "data": Path(str(given.retain)).name,
        **effect.document(),
        "lost": lost,
        "bar": given.retain_bar,
        "passed": lost <= given.retain_bar,
    }
    if lost <= given.retain_bar:
        return facts, None
    way = "--replay mixes old data in" if given.replay is None else "a higher --replay-share mixes more old data in"
    return facts, (
        f"forgetting: {effect.before.metric} on {Path(str(given.retain)).name} {'rose' if rises else 'fell'} from {before:.4g} to {after:.4g} "
        f"({lost:.0%}, the bar is {given.retain_bar:.0%}); {way}, a lower --learning-rate or fewer steps forget less"
    )


def record(draft: Draft, effects: Mapping[str, Effect], settings: FinetuneSettings) -> None:
    """Write what was measured before and after into the manifest, with a warning where too much was unlearned."""
    own = dict(effects)
    old = own.pop(RETAINED, None)
    draft.metrics |= {
        (name if name == effect.after.metric else f"{name}_{effect.after.metric}"): effect.after.estimate.document()
        for name, effect in own.items()
    }
    draft.facts |= {"effects": {name: effect.document() for name, effect in own.items()}} if own else {}
    if old is not None:
        facts, warning = verdict(old, settings)
        draft.facts |= {"forgetting": facts}
        if warning is not None:
            draft.warn(warning)


def with_replay(material: Material, settings: FinetuneSettings, base: Path) -> tuple[Material, list[str]]:
    """Mix old data into what a run trains on; each epoch draws anew from it.

    Plain text is packed as in pretrain, into blocks as long as the longest row of the run, so that a block costs no more
    memory than a row. Other rows are encoded by their own format, or the run's templates.

    Returns:
        (the material with old rows, warnings).

    Raises:
        InvalidInput: the file cannot be read, or its rows fit neither.
    """
    given, train = settings.forgetting, material.train
    rows, _, templates = load_splits(str(given.replay))
    tokenizer = Tokenizer.load(base)
    own = _own_interface(material.interface, rows, None, None, templates)
    try:
        if row_format_of(rows, own) == "text":
            longest = max(len(sequence.ids) for sequence in train.sequences)
            old = encode_blocks(rows, tokenizer, own, length_tokens=max(longest, 8))
        else:
            old = encode_rows(rows, tokenizer, own)
    except InvalidInput as error:
        raise InvalidInput(f"replay: {given.replay}: {error.message}", error.hint) from None
    order = _mixed(material, old, given.replay_share, settings)
    count = order.sources[-1].drawn
    new = order.drawn - count
    share_of_tokens = _supervised(old, count) / (_supervised(old, count) + _supervised(train, new))
    progress.say(f"replay: {count} rows of {given.replay} an epoch beside {new} new ones, {share_of_tokens:.0%} of what the loss counts")
    facts = {
        "data": Path(str(given.replay)).name,
        "rows": len(old.sequences),
        "rows_per_epoch": count,
        "share": round(count / order.drawn, 4),
        "share_of_supervised_tokens": round(share_of_tokens, 4),
    }
    corpus = joined([train, old], [len(train.sequences), count])
    corpus = replace(corpus, row_format=train.row_format, rows=train.rows)
    course = replace(material.course, order=order, facts=material.course.facts | {"replay": facts})
    warnings = [f"replay: {warning}" for warning in old.warnings]
    if count > len(old.sequences):
        warnings.append(
            f"replay: {given.replay} has {len(old.sequences)} rows, and each comes {count / len(old.sequences):.1f} times an epoch"
        )
    return replace(material, train=corpus, course=course), warnings


def _mixed(material: Material, old: Corpus, share: float, settings: FinetuneSettings) -> Mixture:
    """Return the order of a run with old rows behind the new ones."""
    new = material.train.sequences
    order = material.course.order
    sources = order.sources if order is not None else (Source("new", len(new), len(new)),)
    count = max(1, math.floor(share / (1 - share) * sum(source.drawn for source in sources) + 0.5))
    lengths = [len(sequence.ids) for sequence in (*new, *old.sequences)]
    return Mixture((*sources, Source("replay", len(old.sequences), count)), lengths, settings.optimizer.batch_size, settings.run.seed)


def _supervised(corpus: Corpus, drawn: int) -> float:
    """Return the tokens that the loss counts in so many drawn sequences."""
    return drawn / len(corpus.sequences) * corpus.tokens_supervised


def _own_interface(interface: Interface, rows: Sequence[Row], prompt: str | None, completion: str | None, templates: Any) -> Interface:
    """Return the interface for old rows: templates given for them, or the dataset's, or none where their columns speak; or the run's."""
    if completion is not None or templates.completion_template is not None:
        chosen = (prompt, completion) if completion is not None else templates
        return interface.model_copy(update={"prompt_template": chosen[0], "completion_template": chosen[1]})
    if prompt is not None:
        raise InvalidInput("--retain-prompt-template is given without --retain-completion-template", "give both")
    plain = interface.model_copy(update={"prompt_template": None, "completion_template": None})
    try:
        row_format_of(rows, interface)
        # Rows that fit the run's templates are rows of its task, unless they are plain text and nothing else.
        return plain if set().union(*rows) <= {"text", "document", "piece", "pieces"} else interface
    except InvalidInput:
        return plain
