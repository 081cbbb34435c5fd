"""Hold what `slmops merge --plan` foretells against measured loss: `python benchmarks/planner_vs_measured.py ADAPTER DATA`.

ADAPTER is a folder that `slmops finetune` wrote, DATA its rows. The adapter's deltas are cut to several ranks, scaled, and
merged; base, merged model and base + runtime adapter run on the quantizer's weights in PyTorch. Loss is the energy of
(log probabilities of the merged package minus those of the base's) minus (the same in float), over the energy of the
latter, at the supervised tokens, beyond the same figure of the runtime adapter. One line a case, and one of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import slmops
from slmops import artifact
from slmops.adapters.planning import plan_changes
from slmops.data import Encoded, Interface, Tokenizer, encode_rows
from slmops.data.rows import read_rows
from slmops.graph.linears import Linear
from slmops.graph.quantization import quantize
from slmops.graph.recipes import recipe_for
from slmops.graph.stored_weights import StoredWeights
from slmops.results import log_softmax
from slmops.runtime.hugging_face import load_model

Weights = dict[str, np.ndarray]
"""Matrices by parameter, (outputs, inputs) float32; of a fine-tune, those that it changed."""


class Lab:
    """A base and rows on which the effect of any change of its weights is measured, in PyTorch."""

    def __init__(self, base: Path, sequences: Sequence[Encoded], block_size: int | None = None) -> None:
        self.place, self.sequences, self.block_size = base, sequences, block_size
        self.model, self.raised = load_model(base).eval(), frozenset[str]()
        self.own = {name: value for name, value in self.model.named_parameters() if value.ndim == 2}
        self.base: Weights = {name: value.detach().numpy().copy() for name, value in self.own.items()}

    def changes(self, deltas: Weights) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each changed matrix before and after, as the planner takes them."""
        return ((name, self.base[name], self.base[name] + value) for name, value in deltas.items())

    def loss(self, deltas: Weights, precision: str) -> float:
        """What merging loses beyond what a runtime adapter does."""
        return self.merged_wrong(deltas, precision) - self.runtime_wrong(deltas, precision)

    def runtime_wrong(self, deltas: Weights, precision: str) -> float:
        """What a runtime adapter on the quantized base does wrong to the effect, over the effect."""
        before = self.quantized(self.base, precision)
        return self.wrong(deltas, self.log_probabilities(_sum(before, deltas)) - self.log_probabilities(before))

    def merged_wrong(self, deltas: Weights, precision: str) -> float:
        """What the merged model, quantized, does wrong to it."""
        before, after = (self.quantized(values, precision) for values in (self.base, _sum(self.base, deltas)))
        return self.wrong(deltas, self.log_probabilities(after) - self.log_probabilities(before))

    def wrong(self, deltas: Weights, effect: np.ndarray) -> float:
        """Energy of the difference between an effect on the log probabilities and that of `deltas` in float, over the latter's."""
        wanted = self.log_probabilities(_sum(self.base, deltas)) - self.log_probabilities(self.base)
        return float(((effect - wanted) ** 2).sum() / (wanted**2).sum())

    def log_probabilities(self, values: Weights) -> np.ndarray:
        """Run the model with these matrices."""
        import torch

        with torch.no_grad():
            for name, value in values.items():
                self.own[name].copy_(torch.from_numpy(value))
            return self.at_counted(self.model(torch.tensor([one.ids])).logits[0].numpy() for one in self.sequences)

    def at_counted(self, logits: Iterable[np.ndarray]) -> np.ndarray:
        """Log probabilities at the positions that predict a supervised token, (tokens, vocabulary)."""
        counted = [np.flatnonzero(np.asarray(one.labels[1:]) != -100) for one in self.sequences]
        return np.concatenate([log_softmax(row[positions]) for row, positions in zip(logits, counted, strict=True)])

    def quantized(self, values: Weights, precision: str) -> Weights:
        """What a package of that precision multiplies with; the layers in `raised` are in 8 bits."""
        usual, eight, result = recipe_for(precision, self.block_size), recipe_for("int8"), {}
        for name, value in values.items():
            stem = name.removesuffix(".weight")
            recipe = eight if stem in self.raised else usual
            result[name] = quantize(value, recipe.scheme(Linear(stem, value.shape[1], value.shape[0], None, None, ()))).dequantize()
        return result


def deltas_of(merged: Path, base: Path) -> Weights:
    """What a merged fine-tune changed."""
    after, before = StoredWeights(merged), StoredWeights(base)
    found = {name: after[name] - before[name] for name in after}
    return {name: value for name, value in found.items() if value.ndim == 2 and value.any()}


def cut(deltas: Weights, rank: int) -> Weights:
    """The best approximation of each delta of that rank."""
    result = {}
    for name, value in deltas.items():
        left, sizes, right = np.linalg.svd(value, full_matrices=False)
        result[name] = ((left[:, :rank] * sizes[:rank]) @ right[:rank]).astype(np.float32)
    return result


def scaled(deltas: Weights, scale: float) -> Weights:
    """The deltas times a number."""
    return {name: np.float32(scale) * value for name, value in deltas.items()}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's."""
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (first, second)))[0, 1])


def lab_for(adapter: Path, data: Path, max_rows: int, block_size: int | None = None) -> Lab:
    """Set an adapter's base and rows up, asked as the adapter was trained."""
    found = artifact.load(adapter)
    base = found.find("base")
    if base is None:
        raise SystemExit(f"the base of {adapter} is gone")
    rows = read_rows(data)
    corpus = encode_rows(rows[:: max(1, len(rows) // max_rows)], Tokenizer.load(base), Interface.model_validate(found.manifest.interface))
    return Lab(base, sorted(corpus.sequences, key=lambda one: len(one.ids)), block_size)


def main() -> None:
    """Measure, foretell, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8"])
    parser.add_argument("--block-size", type=int, default=None)
    parser.add_argument("--max-rows", type=int, default=60)
    given = parser.parse_args()
    lab = lab_for(given.adapter, given.data, given.max_rows, given.block_size)
    with TemporaryDirectory(prefix="slmops-planner-") as scratch:
        whole = deltas_of(slmops.merge(given.adapter, out=Path(scratch) / "merged").path, lab.place)
    ranks = {rank: cut(whole, rank) for rank in given.ranks}
    predicted, measured = [], []
    print("| rank | scale | precision | measured | foretold | noise/signal | advice |\n| --- | --- | --- | --- | --- | --- | --- |")
    for rank, scale, precision in itertools.product(given.ranks, given.scales, given.precisions):
        deltas = scaled(ranks[rank], scale)
        plan = plan_changes(lab.changes(deltas), recipe_for(precision, given.block_size), total=len(deltas))
        predicted.append(plan.predicted_loss)
        measured.append(lab.loss(deltas, precision))
        figures = f"{measured[-1]:.3g} | {predicted[-1]:.3g} | {plan.noise_to_signal:.3g}"
        print(f"| {rank} | {scale:g} | {precision} | {figures} | {plan.advice} |", flush=True)
    ratios = [found / told for found, told in zip(measured, predicted, strict=True) if found > 0]
    middle = math.exp(float(np.mean(np.log(ratios))))
    figures = {"cases": len(measured), "rank_correlation": rank_correlation(predicted, measured), "measured_over_foretold": middle}
    print(json.dumps({**figures, "lowest": min(ratios), "highest": max(ratios)}))


def _sum(values: Weights, deltas: Weights) -> Weights:
    return {name: value + deltas[name] if name in deltas else value for name, value in values.items()}


if __name__ == "__main__":
    main()
