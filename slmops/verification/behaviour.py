"""Does the package compute what PyTorch computes, and answer as it answers?"""

from __future__ import annotations

from typing import Any

import numpy as np

from slmops import evaluation, results
from slmops.data import Encoded
from slmops.results import Estimate
from slmops.runtime.loading import Loaded
from slmops.runtime.runner import Runner
from slmops.runtime.static_runner import StaticRunner
from slmops.runtime.torch_runner import TorchRunner
from slmops.verification import compiled, weights
from slmops.verification.bars import Bars
from slmops.verification.comparison import Comparison, compare
from slmops.verification.stages import Stage, Verdict, at_least, at_most, concluded, exactly, within
from slmops.verification.subject import Subject, has_answers

# Rows of the tests that need further models: enough for KL to two figures, few enough for a laptop.
_FEW_ROWS = 128
# Answers that the device's own runtime gives, beside those of the batched runner.
_RUNTIME_ROWS = 16


def check_logits(subject: Subject, bars: Bars) -> Stage:
    """Compare the logits at the supervised tokens of the held-out rows."""
    shown = {name: getattr(bars, name) for name in ("kl", "top1", "nmse", "difference") if getattr(bars, name) is not None}
    if bars.overridden:
        shown["overridden"] = list(bars.overridden)
    if not subject.corpus.sequences:
        return Stage("logits", "inconclusive", "no held-out rows are known: give some with --data", {}, shown)
    comparison = compare(subject.reference, subject.candidate, subject.corpus.sequences, label="logits", tie=2 * (bars.difference or 0.0))
    figures = logits_figures(comparison)
    figures["rows_from"] = subject.rows_from
    if isinstance(subject.candidate, StaticRunner):
        figures |= compiled.figures(subject.candidate, subject.corpus.sequences)
    advice = "the package does not compute what PyTorch does"
    if not subject.is_plain_base or bars.nmse is not None:
        return concluded("logits", logits_verdicts(comparison, bars), figures, shown, advice)
    # What quantizing costs the base on a text that is nobody's task is reported, and what it computes is proven against its own weights.
    figures["rows_from"] = "text that the base wrote in PyTorch"
    verdict = twin_verdict(subject, subject.corpus.sequences, figures)
    reported = Verdict(
        verdict.status,
        f"base: {verdict.text} on text of its own, where quantizing costs {comparison.mean_kl.value:.3g}: reported, give rows with --data base=FILE to gate it",
    )
    return concluded("logits", [reported], figures, {"twin_kl": subject.settings.twin_bar}, advice)


def logits_figures(comparison: Comparison) -> dict[str, Any]:
    """Return the figures of a comparison, as the report holds them."""
    return {
        "rows": len(comparison.tokens),
        "tokens": sum(comparison.tokens),
        "kl": comparison.mean_kl,
        "top1": comparison.top1,
        "ties": comparison.ties,
        "nmse": comparison.nmse,
        "largest_difference": comparison.largest,
    }


def logits_verdicts(comparison: Comparison, bars: Bars) -> list[Verdict]:
    """Hold a comparison against the bars of its precision."""
    verdicts = []
    if bars.nmse is not None:
        verdicts.append(exactly("NMSE", comparison.nmse, bars.nmse))
    if bars.difference is not None:
        verdicts.append(exactly("largest difference", comparison.largest, bars.difference))
    if bars.kl is not None:
        verdicts.append(at_most("KL", comparison.mean_kl, bars.kl))
    if bars.top1 is not None:
        verdicts.append(at_least("top-1 agreement", comparison.top1, bars.top1))
    else:
        other = sum(comparison.tokens) - comparison.same_top - comparison.ties
        verdicts.append(exactly("tokens with another top-1, ties left out", other, 0))
    return verdicts


def check_text(subject: Subject, bars: Bars) -> Stage:
    """Compare greedy answers: of the package with PyTorch's, and of the device's runtime with the package's own graph."""
    if not has_answers(subject):
        return Stage("text", "skipped", "the rows have no prompt and expected answer: there is no text to compare")
    interface = evaluation.bounded(subject.baseline_interface, subject.candidate)
    longest = evaluation.longest_answer_tokens(evaluation.questions_of(subject.rows, subject.tokenizer, interface))
    package = Loaded(subject.candidate, subject.tokenizer, interface, subject.found, "export")
    baseline = Loaded(subject.reference, subject.tokenizer, interface, subject.baseline_found, "model")
    batch = subject.settings.batch_size
    ours = evaluation.answer_rows(baseline, subject.rows, max_new_tokens=longest, batch_size=batch)
    theirs = evaluation.answer_rows(package, subject.rows, max_new_tokens=longest, batch_size=batch)
    wrong = runtime_differences(subject, theirs, longest)
    same = sum(a.predicted == b.predicted for a, b in zip(ours, theirs, strict=True))
    figures: dict[str, Any] = {"rows": len(ours), "same_answer": results.proportion(same, len(ours)), "runtime_differing": wrong}
    verdicts = [exactly(f"answers that {subject.stored.runtime} gives otherwise than the graph", wrong, 0)]
    shown: dict[str, Any] = {"runtime_differing": 0}
    if bars.nmse is not None:
        different = sum(a.predicted != b.predicted and not _tied(subject, a.prompt_ids, bars) for a, b in zip(ours, theirs, strict=True))
        verdicts.append(exactly("answers other than PyTorch's, ties left out", different, 0))
        shown["differing_answers"] = 0
    metric = subject.settings.metric
    if metric is not None and metric != "perplexity":
        verdicts.append(
            _task_verdict(evaluation.score(theirs, metric), evaluation.score(ours, metric), ours, theirs, metric, bars, figures)
        )
        shown["task_points"] = bars.task_points
    else:
        verdicts.append(Verdict("pass", f"{same} of {len(ours)} answers are PyTorch's"))
    return concluded("text", verdicts, figures, shown, "the package does not answer as PyTorch does")


def runtime_differences(subject: Subject, answers: list[Any], longest: int) -> int:
    """Count prompts that the runtime of a device (onnxruntime-genai's Generator, openvino-genai's pipeline) answers otherwise than the graph.

    The graph answers them again one by one: in a batch, other kernels sum in another order, and in 4 bits that decides
    near-ties (3 of 16 long answers of a SNIPS slot filler).
    """
    stops = subject.interface.stop_token_ids
    if isinstance(subject.candidate, StaticRunner):
        return compiled.decode_differences(subject.candidate, answers[:: max(1, len(answers) // _RUNTIME_ROWS)][:_RUNTIME_ROWS])
    prompts = [answer.prompt_ids for answer in answers[:: max(1, len(answers) // _RUNTIME_ROWS)][:_RUNTIME_ROWS]]
    expected = subject.candidate.generate(prompts, max_new_tokens=longest, stop_token_ids=stops, batch_size=1)
    # The stop tokens of the runtime's own config end these streams.
    streams = (list(subject.candidate.stream(ids, max_new_tokens=longest, stop_token_ids=stops)) for ids in prompts)
    return sum(ours != theirs for ours, theirs in zip(expected, streams, strict=True))


def _task_verdict(
    ours: Estimate, baseline: Estimate, expected: list[Any], found: list[Any], metric: str, bars: Bars, figures: dict[str, Any]
) -> Verdict:
    """Hold the loss of the task metric, paired on the rows, against its bar in points of 100."""
    paired = results.paired_difference([float(a.correct) for a in expected], [float(a.correct) for a in found])
    loss = Estimate(100 * (baseline.value - ours.value), 100 * paired.low, 100 * paired.high, paired.n, "points")
    figures |= {metric: ours, f"{metric}_baseline": baseline, "task_loss": loss}
    text = f"{metric} {ours.value:.4f}, PyTorch {baseline.value:.4f}: {loss.value:+.2f} points lost [{loss.low:.2f}, {loss.high:.2f}], bar {bars.task_points:g}"
    if all(a.correct == b.correct for a, b in zip(expected, found, strict=True)):
        return Verdict("pass", text)  # not one row differs: there is nothing to estimate
    status = "pass" if loss.high <= bars.task_points else "fail" if loss.low > bars.task_points else "inconclusive"
    return Verdict(status, text)


def _tied(subject: Subject, prompt: list[int], bars: Bars) -> bool:
    """Tell whether two answers part at a tie: PyTorch's two largest logits, after the prompt or later, are that near."""
    interface = subject.baseline_interface
    answer = next(subject.reference.generate([prompt], max_new_tokens=64, stop_token_ids=interface.stop_token_ids))
    logits = next(subject.reference.logits([[*prompt, *answer]]))[len(prompt) - 1 :]
    top = np.partition(logits, -2, axis=-1)[:, -2:]
    return bool(((top[:, 1] - top[:, 0]) <= 2 * (bars.difference or 0.0)).any())


def check_retention(subject: Subject) -> Stage:
    """Measure whether the fine-tune is in the package: in its weights, in its arithmetic and in its effect."""
    if subject.adapters:
        return Stage("retention", "skipped", "the base of a package is not fine-tuned: its adapters are, and have a stage of their own")
    if subject.lost_base is not None:
        text = f"the model before the fine-tune is no longer at {subject.lost_base}: give it with --base"
        return Stage("retention", "inconclusive", text)
    if subject.base is None:
        return Stage("retention", "skipped", "the model before the fine-tune is not known: give it with --base")
    if subject.baseline_found is not None and subject.baseline_found.manifest.kind == "adapter":
        return Stage("retention", "skipped", "the baseline is an unmerged adapter: merge it to measure retention in the weights")
    found = weights.shares(subject.stored, subject.baseline, subject.base)
    vectors = weights.changed_vectors(subject.baseline, subject.base)
    if not found and not vectors:
        return Stage("retention", "fail", f"{subject.baseline} has the very weights of {subject.base}: there is no fine-tune in it")
    if not found and not subject.rows:
        text = f"the fine-tune changed {len(vectors)} vectors and no matrix, and only their effect can be measured: give rows with --data"
        return Stage("retention", "inconclusive", text)
    settings = subject.settings
    verdicts, figures, bars = weights.weight_verdicts(found, settings.retention_bar) if found else ([], {"vectors": len(vectors)}, {})
    if subject.rows:
        chosen = few(subject.corpus.sequences)
        verdicts += [twin_verdict(subject, chosen, figures), effect_verdict(subject, chosen, figures)]
        bars |= {"twin_kl": settings.twin_bar, "effect": [1 - settings.effect_bar, 1 + settings.effect_bar]}
    return concluded("retention", verdicts, figures, bars, "the fine-tune is not in the package as it was trained")


def twin_verdict(subject: Subject, sequences: list[Encoded], figures: dict[str, Any]) -> Verdict:
    """Compare the package with PyTorch on the package's own dequantized weights: only arithmetic is left to differ."""
    twin = twin_runner(subject)
    figures["twin_kl"] = compare(twin, subject.candidate, sequences, label="twin test").mean_kl
    twin.close()
    return at_most("twin KL", figures["twin_kl"], subject.settings.twin_bar)


def twin_runner(subject: Subject) -> Runner:
    """Return PyTorch with the package's weights, and with the adapter where one is proven."""
    from slmops.runtime import hugging_face
    from slmops.runtime.quantized_base import twin

    if subject.adapter is None:
        return TorchRunner(twin(subject.baseline, subject.stored.weights), subject.baseline, subject.threads)
    assert subject.base is not None
    base = twin(subject.base, subject.stored.weights)
    return TorchRunner(hugging_face.attach(base, subject.baseline, subject.base), subject.baseline, subject.threads)


def effect_verdict(subject: Subject, sequences: list[Encoded], figures: dict[str, Any]) -> Verdict:
    """Compare the fine-tune's effect on the logits, KL(with it || without it), of the package and of PyTorch.

    Not KL(without || with): that is ruled by the logits of tokens that the fine-tune made all but impossible, which
    nothing trains (int4 of stories3m's SNIPS intents: ratio 0.928, and 0.9998 this way round). A packed adapter is held
    against the package's own base, a merged one against PyTorch's: of that the package has no other.
    """
    assert subject.base is not None
    base = TorchRunner(_without(subject), subject.base, subject.threads)
    own = subject.opened.runner(None) if subject.opened is not None else base
    package = compare(subject.candidate, own, sequences, label="effect in the package").mean_kl.value
    torch = compare(subject.reference, base, sequences, label="effect in PyTorch").mean_kl.value
    base.close()
    figures |= {"effect": package / torch, "effect_package_kl": package, "effect_pytorch_kl": torch}
    bar = subject.settings.effect_bar
    return within("effect ratio", package / torch, 1 - bar, 1 + bar)


def _without(subject: Subject) -> Any:
    """Return the PyTorch model without the fine-tune: the base, or what an adapter was trained around."""
    from slmops.runtime import hugging_face

    assert subject.base is not None
    if subject.adapter is not None:
        return hugging_face.load_base_of(subject.base, subject.baseline)
    return hugging_face.load_model(subject.base)


def few(sequences: list[Encoded]) -> list[Encoded]:
    """Return evenly spaced sequences (they are sorted by length)."""
    step = max(1, -(-len(sequences) // _FEW_ROWS))
    return sequences[::step]
