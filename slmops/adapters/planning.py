"""What would a quantizer leave of the fine-tune? Foretold layer by layer, before anything is quantized.

With W the base's weights, D what the fine-tune adds and Q the quantizer, a package of the merged model differs from a
package of the base by Q(W + D) - Q(W). That should be D. It is kept * D + N: `kept` is 1 where rounding is fair, and 0
where W lies on the grid already and D is smaller than half a step; N is noise, made of the codes that change by a whole
step where D is a small part of one. A share |D| / step of the codes changes, so N is large where D is small: at a tenth
of a step its energy is ten times that of D. The share p of `slmops.graph.survival` does not see it: N is nearly
orthogonal to D, so p is 1 with a tenth of the fine-tune as with ten times of it.

A runtime adapter keeps D as it is on the same quantized base, so N is what merging costs. How loud N is in the logits was
measured: the energy of (log probabilities of the merged package minus those of the base's) minus (the same in PyTorch), over
the energy of the latter, and beyond that figure of a runtime adapter. It is 0.025 times ||N||^2 / ||D||^2 over five decades,
on stories3m with a SNIPS adapter (ranks 1, 4, 16; scales 0.03 to 2; int8, int4, int4 in blocks of 64: correlation of the
logarithms 0.98, slope 1.01, factor 0.01 to 0.06) as on a tiny model with another task (0.013 to 0.030, and less where the
effect saturates): activations lie where D acts, and N is spread over all directions. p predicts none of it (rank correlation
of its error 0.70, from its own noise), and neither does the KL divergence of the package: 1.007 times that of the runtime
adapter's, in the median.

Without data it knows nothing of which channels are loud. Where a model has channels with large weights and small activations,
and the fine-tune changes those very weights, it foretells too little (0.004 where 0.065 was measured, with outliers of 60
times put into one layer); where the fine-tune leaves them alone it is right (0.053 and 0.053). `slmops verify` measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import progress, targets
from slmops.adapters.combining import fold, load_merger, preflight
from slmops.adapters.sources import Source, agreed_interface, read_sources
from slmops.config import MergeSettings
from slmops.errors import InvalidInput, RunFailed
from slmops.graph.linears import Linear
from slmops.graph.quantization import Scheme, quantize
from slmops.graph.recipes import Recipe, recipe_for
from slmops.graph.stored_weights import StoredWeights
from slmops.graph.survival import Share, pooled, share_of

FINE, RAISE, KEEP = "fine to merge", "higher precision for these layers", "keep as a runtime adapter"
# Measured loss over ||N||^2 / ||D||^2, as above.
_LOUDNESS = 0.025
# A tenth of the effect's energy as noise beyond what a runtime adapter has.
BAR = 0.1
# Layers to raise to 8 bits are few, or it is another precision: at most this share of the weights that change.
_FEW = 0.25
_MOST = 0.5
"""Of the loss: so much of it at least must go when the few are raised."""
# A step of 8 bits is a 17th of one of 4 bits over the same range, and the noise of codes that change is as long as a step.
_EIGHT_BIT_GAIN = 16

Change = tuple[str, np.ndarray, np.ndarray]
"""A parameter's name, and its weights before and after the fine-tune, (outputs, inputs) float32."""


@dataclass(frozen=True)
class LayerPlan:
    """What quantizing would leave of the fine-tune in one layer."""

    share: Share
    scheme: Scheme
    weights: int
    kept: float
    """<Q(W + D) - Q(W), D> / <D, D>"""
    noise: float
    """||N||^2"""
    changed: float
    """Share of the codes that are others with the fine-tune than without it."""
    delta_to_step: float
    """Root mean square of D over that of the grid's step."""

    @property
    def loss(self) -> float:
        """What is lost, in units of D's energy: its own part, and the noise as loud as it is in the logits."""
        return (1 - self.kept) ** 2 * self.share.energy + _LOUDNESS * self.noise

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "bits": self.scheme.bits,
            "block_size": self.scheme.block_size,
            "p": self.share.p,
            "p_noise": self.share.noise,
            "kept": self.kept,
            "noise_to_signal": self.noise / self.share.energy,
            "codes_changed": self.changed,
            "delta_to_step": self.delta_to_step,
        }


@dataclass(frozen=True)
class Plan:
    """What quantizing would leave of a fine-tune, and the advice that follows."""

    layers: tuple[LayerPlan, ...]
    recipe: Recipe
    adapters: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def predicted_loss(self) -> float:
        """Energy of what merging does wrong to the fine-tune's effect on the logits, over that of the effect; can be above 1."""
        return self._over_energy(layer.loss for layer in self.layers)

    @property
    def noise_to_signal(self) -> float:
        """||N||^2 / ||D||^2 over all layers."""
        return self._over_energy(layer.noise for layer in self.layers)

    @property
    def fragile(self) -> tuple[str, ...]:
        """The few layers that would have to be in 8 bits for the rest to be fine; empty where that is all or many of them."""
        total = sum(layer.loss for layer in self.layers)
        # Measured on stories3m: raising layers that are no worse than others, just enough for the bar, gains next to nothing.
        limit = min(BAR * self._energy, (1 - _MOST) * total)
        weights, chosen = sum(layer.weights for layer in self.layers), []
        for layer in sorted((layer for layer in self.layers if layer.scheme.bits < 8), key=lambda one: -one.loss / one.weights):
            if total <= limit:
                break
            total -= layer.loss * (1 - 1 / _EIGHT_BIT_GAIN)
            chosen.append(layer)
        few = total <= limit and sum(layer.weights for layer in chosen) <= _FEW * weights
        return tuple(layer.share.layer for layer in chosen) if few else ()

    @property
    def advice(self) -> str:
        """One of `FINE`, `RAISE` and `KEEP`."""
        if self.predicted_loss <= BAR:
            return FINE
        return RAISE if self.fragile else KEEP

    @property
    def reason(self) -> str:
        """Say in a sentence or two why, and what to do."""
        precision = self.recipe.name.removeprefix("cpu-")
        told = (
            f"rounding to {precision} is foretold to turn about {100 * self.predicted_loss:.2g} % of the fine-tune's effect into noise "
            f"that a runtime adapter would not have (bar: {100 * BAR:.0f} %)"
        )
        if self.advice == FINE:
            return told
        if self.advice == RAISE:
            return f"{told}, most of it in {len(self.fragile)} of {len(self.layers)} layers: {', '.join(self.fragile)}; in 8 bits they would be fine (--precision int8 raises all layers, and `slmops pack` keeps it as it is)"
        eight = self.recipe.bits < 8 and self.predicted_loss / _EIGHT_BIT_GAIN <= BAR
        return f"{told}: `slmops pack` keeps it as it is, on the quantized base{'; --precision int8 would do too' if eight else ''}"

    def document(self) -> dict[str, Any]:
        """Return what `slmops merge --plan --json` prints."""
        p, p_noise = pooled([layer.share for layer in self.layers])
        weights = sum(layer.weights for layer in self.layers)
        return {
            "command": "merge",
            "ok": True,
            "warnings": list(self.warnings),
            "adapters": list(self.adapters),
            "plan": {
                "advice": self.advice,
                "reason": self.reason,
                "precision": self.recipe.name.removeprefix("cpu-"),
                "recipe": self.recipe.document(),
                "predicted_loss": self.predicted_loss,
                "bar": BAR,
                "noise_to_signal": self.noise_to_signal,
                "p": p,
                "p_noise": p_noise,
                "kept": self._over_energy(layer.kept * layer.share.energy for layer in self.layers),
                "codes_changed": sum(layer.changed * layer.weights for layer in self.layers) / weights,
                "fragile": list(self.fragile),
                "layers": {layer.share.layer: layer.document() for layer in self.layers},
            },
        }

    @property
    def _energy(self) -> float:
        return sum(layer.share.energy for layer in self.layers)

    def _over_energy(self, parts: Iterable[float]) -> float:
        return sum(parts) / self._energy


def plan_merge(given: Sequence[str | Path], settings: MergeSettings, unwritten: str | Path | None = None) -> Plan:
    """Foretell what quantizing the merge of these adapters would leave of it (`slmops merge --plan`).

    The adapters are merged in memory; one layer at a time is quantized.

    Args:
        given: adapter folders.
        settings: of `merge`; `precision` and `block_size` say how the layers would be quantized.
        unwritten: the output folder that was asked for all the same.

    Raises:
        See `slmops.merge`; Unavailable also for an architecture that cannot be exported.
    """
    sources = read_sources(given, settings.base)
    preflight(sources, settings)
    merger = load_merger(sources, settings)
    architecture = (merger.model.config.architectures or ["none"])[0]
    targets.builder_class(architecture)
    before = _before(sources, merger.model)
    after = {name: value.data for name, value in fold(merger.model).named_parameters() if value.ndim == 2}
    lost = sorted(name for name in after if name not in before)
    if lost:
        raise RunFailed(
            f"{sources[0].base} stores {lost[0]} under another name", "merge it, and let `slmops export` look at the merged model"
        )
    changes = ((name, _array(before[name]), _array(after[name])) for name in after)
    unheeded = [f"--plan writes nothing: {unwritten} was not written"] if unwritten is not None else []
    warnings = (*merger.warnings, *agreed_interface(sources)[1], *unheeded)
    recipe = recipe_for(settings.precision or "int4", settings.block_size)
    plan = plan_changes(changes, recipe, total=len(after), adapters=[source.name for source in sources], warnings=warnings)
    if not plan.layers:
        raise InvalidInput(
            f"plan: {', '.join(plan.adapters)} changes no matrix, and nothing else is quantized: there is nothing to foretell",
            "leave --plan out: merging is exact",
        )
    return plan


def plan_model(tuned: Path, base: Path, recipe: Recipe, *, most_rows: int | None = None) -> Plan | None:
    """Foretell what quantizing would leave of a fine-tune that is merged already, from the weights' files alone.

    Args:
        tuned: the merged model's folder.
        base: the folder of the model before the fine-tune.
        recipe: how layers would be quantized.
        most_rows: look at no more rows of a matrix than so many, evenly spaced; each row is quantized by itself.

    Returns:
        The plan; None where nothing differs.
    """
    after, before = StoredWeights(tuned), StoredWeights(base)
    names = [name for name in after if name in before]
    changes = ((name, before[name], after[name]) for name in names)
    plan = plan_changes(changes, recipe, total=len(names), most_rows=most_rows)
    return plan if plan.layers else None


def plan_changes(
    changes: Iterable[Change],
    recipe: Recipe,
    *,
    total: int,
    most_rows: int | None = None,
    adapters: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> Plan:
    """Plan every matrix that changed, one at a time; see `plan_model`."""
    layers = []
    with progress.task("plan", total=total, unit="layers") as task:
        for name, before, after in changes:
            if before.ndim == 2 and before.shape == after.shape:
                step = max(1, -(-len(before) // most_rows)) if most_rows else 1
                layer = _plan_layer(name, before[::step], after[::step], before.shape, recipe)
                layers += [layer] if layer is not None else []
            task.advance()
    return Plan(tuple(layers), recipe, tuple(adapters), tuple(warnings))


def _plan_layer(name: str, before: np.ndarray, after: np.ndarray, shape: tuple[int, ...], recipe: Recipe) -> LayerPlan | None:
    """Quantize some rows of a matrix with and without the fine-tune; figures are for the whole matrix, of that `shape`."""
    delta = after - before
    if not delta.any():
        return None
    stem = name.removesuffix(".weight")
    # Fused or not, a row is quantized by itself, by the scheme of its layer's kind and width: as the export does it.
    scheme = recipe.scheme(Linear(stem.replace(".self_attn.", ".attn."), shape[1], shape[0], None, None, ()))
    old, new = quantize(before, scheme), quantize(after, scheme)
    stored = new.dequantize()
    share = share_of(stem, stored, before, after, np.abs(new.scales))
    if share is None:
        return None
    whole = shape[0] / len(before)
    share = Share(share.layer, whole * share.product, whole * share.energy, share.noise / math.sqrt(whole))
    difference = stored - old.dequantize()
    kept = float(np.vdot(difference, delta)) / float(np.vdot(delta, delta))
    noise = difference - np.float32(kept) * delta
    return LayerPlan(
        share,
        scheme,
        weights=shape[0] * shape[1],
        kept=kept,
        noise=whole * float(np.vdot(noise, noise)),
        changed=float((old.codes != new.codes).mean()),
        delta_to_step=math.sqrt(float((delta.astype(np.float64) ** 2).mean() / (old.scales.astype(np.float64) ** 2).mean())),
    )


def _before(sources: Sequence[Source], adapted: Any) -> Mapping[str, Any]:
    """Return the weights under the adapters by the base's names: read one at a time, or copied where they are not the files'."""
    if all(source.ground == "float" for source in sources) or len({source.ground for source in sources}) > 1:
        return StoredWeights(sources[0].base)
    prefix = "base_model.model."
    found = {name.removeprefix(prefix).replace(".base_layer.", "."): value for name, value in adapted.named_parameters()}
    return {name: value.detach().clone() for name, value in found.items() if value.ndim == 2}


def _array(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.detach().float().numpy()
