"""Is a model trained the fast way, and does that way compute what the model computes? It is tried on the first rows.

Joined rows need a model whose tokens meet in attention only: convolutions or recurrences would run across the seam, and
some families do more in attention than `slmops.training.step.attention` knows. No list of families is kept: the
hidden states of a few rows, joined, are held against those of the same rows one by one in the model as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slmops.training.batches import IGNORED
from slmops.training.step import attention, patching
from slmops.training.step.kernels import PLAIN, kernels_for
from slmops.training.step.layouts import Joined, Layout, Padded, Row
from slmops.training.step.pairs import PairStore
from slmops.training.step.products import BOUND, Int8, Plain, Tried
from slmops.training.step.rows import KEY, Rows

# Largest distance of a token's hidden state, relative to its length: rounding gives 1e-5 (fp32) and 0.03 (bf16), a token
# of another row that is seen 0.3 and more.
_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
_ROWS, _TOKENS = 3, 64
_ROWS_IN_INT8 = 8
# oneDNN, which multiplies in bf16 and in int8, makes a kernel for each new shape of some 25 products, and keeps it: 2.6 ms and 0.8 MB each. So the
# numbers of tokens are rounded up, further where a token costs little. In fp32 MKL makes none.
_MULTIPLE, _MULTIPLE_OF_SMALL, _SMALL_PARAMETERS = 16, 64, 30_000_000


@dataclass(frozen=True)
class Step:
    """How a model is trained."""

    layout: Layout
    patched: patching.Patched = field(default_factory=patching.Patched)
    reason: str | None = None
    """Why rows are padded; None where they are joined."""
    in_int8: tuple[int, int] | None = None
    """Of the frozen matrices (those that are stacked are one), how many are multiplied in int8, and how many could be; None: not asked."""
    kernels: str = PLAIN.name
    """What computes between the products (`slmops.training.step.kernels`)."""

    def document(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        in_int8 = {"in_int8": dict(zip(("matrices", "of"), self.in_int8, strict=True))} if self.in_int8 is not None else {}
        return {"kernels": self.kernels, **in_int8}


def prepare_step(model: nn.Module, rows: Sequence[Row], *, int8: bool = False) -> Step:
    """Make a model's training step fast, in place, as far as it stays the same computation.

    The LoRA pairs that it finds become one parameter of the model, `slmops_pairs`, which is trained in their place.

    Args:
        model: a model of transformers, wrapped by PEFT or not, on its device.
        rows: of the training data: the first of them are the trial.
        int8: products with frozen matrices are in int8, where that is close (`slmops.training.step.products`).
    """
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    trial = [list(ids)[:_TOKENS] for ids, _ in rows[:_ROWS]]
    reason = _obstacle(model, causal)
    was_training = model.training
    model.eval()
    expected = [_hidden(causal, ids) for ids in trial] if reason is None else []
    patched = patching.speed_up(model)
    layout: Layout = Padded(model)
    if patched.store is not None:
        causal.register_parameter("slmops_pairs", patched.store.parameter)
        causal.get_input_embeddings().register_forward_pre_hook(_beginning(patched.store))
    if reason is None:
        reason, layout = _try_joined(causal, patched, trial, expected, layout, int8=int8)
    model.train(was_training)
    in_int8 = _multiply_in_int8(model, causal, patched, layout, rows) if int8 else None
    embedding = causal.get_input_embeddings().weight
    return Step(layout, patched, reason, in_int8, kernels_for(embedding, embedding.shape[-1]).name)


def _multiply_in_int8(model: Any, causal: Any, patched: patching.Patched, layout: Layout, rows: Sequence[Row]) -> tuple[int, int]:
    """Let layers multiply in int8 whose products, there and back, are close to their own on the first rows; count them.

    The head keeps its own: it makes the loss, and few tokens reach it.
    """
    head = causal.get_output_embeddings()
    layers = [layer for layer in patched.layers if head is None or layer.weight.data_ptr() != head.weight.data_ptr()]
    tried = [Tried(layer.weight, layer.bias, layer.widths) for layer in layers]
    for layer, products in zip(layers, tried, strict=True):
        layer.products = products
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        layout.summed_loss(model, layout.collate([_end_of(row) for row in rows[:_ROWS_IN_INT8]])).backward()
    for parameter in trained:
        parameter.grad = None
    for layer, products in zip(layers, tried, strict=True):
        close = products.error is not None and products.error <= BOUND
        layer.products = products.int8 if close else Plain(layer.weight, layer.bias)
    return sum(isinstance(layer.products, Int8) for layer in layers), len(layers)


def _end_of(row: Row) -> Row:
    """Return the tokens up to the last supervised one, so many that a batch of them is small beside those of a run."""
    ids, labels = row
    end = max((place + 1 for place, label in enumerate(labels) if label != IGNORED), default=len(ids))
    return ids[max(0, end - _TOKENS) : end], labels[max(0, end - _TOKENS) : end]


def _beginning(store: PairStore) -> Any:
    return lambda _module, _args: store.begin()


def _obstacle(model: Any, causal: Any) -> str | None:
    """Say why rows of a model cannot be joined; None where nothing that is known stands against it."""
    from transformers import PreTrainedModel

    if not isinstance(causal, PreTrainedModel) or getattr(causal, causal.base_model_prefix, causal) is causal:
        return "the model is of no known form"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "the method puts tokens before each row"
    capped = [name for name in ("attn_logit_softcapping", "attn_logits_soft_cap") if getattr(causal.config, name, None)]
    if capped:
        return f"the model caps its attention ({capped[0]})"
    return None


def _try_joined(
    causal: Any, patched: patching.Patched, trial: list[list[int]], expected: list[torch.Tensor], padded: Layout, *, int8: bool
) -> tuple[str | None, Layout]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(KEY, attention.attend)
    own = causal.config._attn_implementation
    hook = _widen(causal)
    causal.config._attn_implementation = KEY
    by_onednn = causal.device.type == "cpu" and (int8 or causal.get_input_embeddings().weight.dtype != torch.float32)
    layout = Joined(causal, fill_to(sum(p.numel() for p in causal.parameters()), by_onednn=by_onednn), patched.focus)
    try:
        patching.fuse_attention(patched)
        distance = _distance(layout, causal, trial, expected)
        bound = _BOUNDS.get(expected[0].dtype, 0.15)
        if distance <= bound:
            return None, layout
        reason = f"joined rows change what the model computes ({distance:.2g} of a hidden state)"
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"the model does not take joined rows ({str(error).splitlines()[0]})"
    causal.config._attn_implementation = own
    causal.forward = layout.own_forward
    if hook is not None:
        hook.remove()
    return reason, padded


def fill_to(parameters: int, *, by_onednn: bool) -> int:
    """Return what the number of a batch's tokens is rounded up to one of, for a model of so many parameters."""
    if not by_onednn:
        return 1
    return _MULTIPLE_OF_SMALL if parameters < _SMALL_PARAMETERS else _MULTIPLE


def _widen(causal: Any) -> Any:
    """Let the sums between layers be in fp32, whatever the products are in: the handle of the hook that does it, or None."""
    embedding = causal.get_input_embeddings()
    if embedding.weight.dtype == torch.float32:
        return None
    return embedding.register_forward_hook(lambda _module, _args, output: output.float())


@torch.no_grad()
def _hidden(causal: Any, ids: list[int]) -> torch.Tensor:
    inner = getattr(causal, causal.base_model_prefix)
    return inner(input_ids=torch.tensor([ids], device=causal.device), use_cache=False).last_hidden_state[0]


@torch.no_grad()
def _distance(layout: Joined, causal: Any, trial: list[list[int]], expected: list[torch.Tensor]) -> float:
    """Return the largest distance of a token's hidden state, relative to its length, of rows joined from rows alone."""
    batch = layout.collate([([*ids, 0], [IGNORED] * len(ids) + [0]) for ids in trial])
    rows: Rows = batch["rows"].to(causal.device)
    lines = rows.to_lines(layout.hidden(batch["input_ids"].to(causal.device), batch["position_ids"].to(causal.device), rows))
    found = torch.cat([line[: len(ids)] for line, ids in zip(lines, trial, strict=True)]).float()
    wanted = torch.cat(expected).float()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)).max())
