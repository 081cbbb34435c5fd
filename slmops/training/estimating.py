"""How much memory and time will a run take? Told before any weight is loaded, and held against the truth afterwards.

The model is built without weights (torch's meta device) with the method's adapter on it: that gives what is held and what
is trained to the byte. What a step holds for its way back follows from the sizes of the layers and of the batches that
the run will have; what it takes, from products of those sizes that are timed here and now. `benchmarks/estimates.py`
holds both against runs: memory within a quarter.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import environment
from slmops.config import FinetuneSettings
from slmops.data import Corpus
from slmops.errors import RunFailed
from slmops.training import methods
from slmops.training.batches import IGNORED, Batches
from slmops.training.precision import BY_HAND, held_in

if TYPE_CHECKING:
    from slmops.training.step.kernels import Kernels

# Adam (arXiv 1412.6980) keeps two moments of each weight in fp32, beside its gradient.
_OPTIMIZER_BYTES = 12
# PEFT's layers of these methods make a matrix of the weight's size at each step; so many copies are held for the way back (measured, peft 0.21).
_MATRICES_HELD = {"dora": 2, "loha": 2, "lokr": 2}
# Methods that put positions before each row, which is padded then.
_BEFORE_ROWS = ("prefix", "prompt", "p-tuning")
# Of a layer's matrices, those that are stacked: queries, keys, values, gate and up (0.66 of a 135M shape, 0.7 of a 1.5B one).
_STACKED_SHARE = 0.66
# oneDNN makes and keeps a kernel for each shape of some 28 products, of 10 where those of the pairs are ours: 0.8 MB and 2.6 ms each (see step.preparing).
_KERNELS, _KERNELS_WITHOUT_PAIRS, _KERNEL_BYTES, _KERNEL_SECONDS = 28, 10, 800_000, 0.0026
# The rest of a process: libraries that are imported on the way, the curve's picture, what the allocator cannot use again.
_REST_BYTES = 60_000_000
# A layer's step in operators besides its large products, each as long as a small product takes: by hand, and as PEFT computes it.
_OPERATORS, _OPERATORS_OF_PEFT = 130, 300
# How often what is held for the way back is gone through by operators that wait for memory.
_PASSES = 4


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    process_bytes: int
    """Resident before the model is loaded, libraries included, and what comes to it."""
    weights_bytes: int
    trained_bytes: int
    """Trained weights with gradients and moments."""
    activations_bytes: int
    """Held by the largest batch for the way back, logits included."""
    kernels_bytes: int
    loading_bytes: int
    """Peak while the weights are read."""
    seconds: float
    """Of the training loop."""
    recomputes: bool = False
    """Activations are not held but computed anew on the way back (activation checkpointing, arXiv 1604.06174)."""

    @property
    def memory_bytes(self) -> int:
        """Peak resident memory; on a GPU, of its memory."""
        training = self.process_bytes + self.weights_bytes + self.trained_bytes + self.activations_bytes + self.kernels_bytes
        return max(self.loading_bytes, training)

    def document(self, peak_memory_bytes: int, loop_seconds: float) -> dict[str, Any]:
        """Return the estimate beside the truth, for a manifest: ratios above 1 mean that the run took less."""
        return {
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 1),
            "memory_ratio": round(self.memory_bytes / peak_memory_bytes, 3),
            "seconds_ratio": round(self.seconds / max(loop_seconds, 1e-9), 3),
            "recomputes_activations": self.recomputes,
        }

    @property
    def affordable(self) -> bool:
        """Whether it fits into the memory that is free now, the estimate's error granted."""
        needed, available = self.needed_and_available()
        return not available or needed <= 1.25 * available

    def needed_and_available(self) -> tuple[int, int]:
        """Return the bytes that it takes beyond what the process has, and those that are free; 0: unknown."""
        torch = environment.require("torch", "to train")
        if torch.cuda.is_available():
            return self.memory_bytes, torch.cuda.mem_get_info()[0]
        return self.memory_bytes - _resident_bytes(), environment.memory_bytes()[1]


@dataclass(frozen=True)
class Sizes:
    """Of a model with its adapter."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    inner: int
    vocabulary: int
    linear: int
    """Weights of the layers' matrices."""
    base: int
    """Parameters of the base."""
    trained: int


@dataclass(frozen=True)
class Load:
    """Of the batches of an epoch: the largest one, and all of them."""

    tokens: int
    longest: int
    lines: int
    """Tokens of the largest batch with padding: rows times the longest."""
    supervised: int
    mean_tokens: float
    mean_supervised: float
    shapes: int
    """Numbers of tokens that differ once they are rounded up."""


def estimate(
    base: Path,
    train: Corpus,
    validation: int,
    settings: FinetuneSettings,
    precision: str,
    steps: int,
    processes: int = 1,
    *,
    recomputes: bool = False,
) -> Estimate:
    """Estimate a run of our own trainer.

    Args:
        base: Hugging Face folder of the model.
        train: rows to learn.
        validation: rows of validation, measured in each of the run's evaluations.
        settings: of the run.
        precision: of the frozen weights' products, "fp32", "bf16" or "int8".
        steps: optimizer steps of the run.
        processes: that share each batch; the estimate is of one of them.
        recomputes: activations are computed anew on the way back.
    """
    from slmops.training.step.layouts import shared_beginning
    from slmops.training.step.preparing import fill_to

    torch = environment.require("torch", "to train")
    method, by_hand = settings.method.method, settings.method.method in BY_HAND
    sizes, on_gpu = read_sizes(base, settings), torch.cuda.is_available()
    wide = 2 if held_in(precision) == "bf16" else 4
    by_onednn = precision in ("bf16", "int8") and not on_gpu
    load = measure_load(
        [len(sequence.ids) for sequence in train.sequences],
        [sum(label != IGNORED for label in sequence.labels[1:]) for sequence in train.sequences],
        -(-settings.optimizer.batch_size // processes),
        settings.run.seed,
        multiple=fill_to(sizes.base, by_onednn=by_onednn),
        before=settings.method.virtual_tokens if method in _BEFORE_ROWS else 0,
        shared=0 if settings.method.lora_dropout else shared_beginning([(sequence.ids, sequence.labels) for sequence in train.sequences]),
    )
    stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    held = 4 * sizes.base if methods.method_of(settings.method).trains_base else _held_bytes(sizes, method, wide)
    # In the file's own precision its pages are the weights; what is stacked is copied beside them.
    mapped = stored if abs(wide * sizes.base / stored - 1) < 0.02 and not on_gpu else 0
    stacked = round(_STACKED_SHARE * mapped * sizes.linear / sizes.base) if by_hand else 0
    between = _kernels(sizes, precision)
    activations = activation_bytes(sizes, load, wide, between, by_hand=by_hand)
    matrices = _MATRICES_HELD.get(method, 0) * 4 * sizes.linear
    shapes = min(load.shapes, steps) if by_onednn else 0
    ours = by_hand and between.wide_pairs and between.suits(settings.method.lora_rank, _dtype(precision))
    kernels = shapes * (_KERNELS_WITHOUT_PAIRS if ours else _KERNELS)
    process = 0 if on_gpu else _resident_bytes() + _REST_BYTES
    return Estimate(
        process_bytes=process,
        weights_bytes=held
        + (2 * sizes.linear if precision == "int8" else 0)
        + (stored if method == "qlora" and not on_gpu else stacked),  # its embedding keeps the file mapped
        trained_bytes=sizes.trained * (_OPTIMIZER_BYTES + (4 + 2 * wide if by_hand else 0 if method == "full" else 4)),
        activations_bytes=(_checkpoint_bytes(sizes, load, activations) if recomputes else activations)
        + matrices
        + _logits_bytes(sizes, load, wide),
        kernels_bytes=kernels * _KERNEL_BYTES,
        loading_bytes=process + held + (stored if not mapped and not on_gpu else 0),
        seconds=kernels * _KERNEL_SECONDS
        + _seconds(sizes, load, settings, precision, steps, activations + matrices, by_hand=by_hand)
        * (4 / 3 if recomputes else 1)
        * (1 + validation * settings.run.evaluations / (3 * max(1, steps * settings.optimizer.batch_size))),
        recomputes=recomputes,
    )


def affordable(base: Path, train: Corpus, validation: int, settings: FinetuneSettings, *others: Any) -> Estimate:
    """Estimate a run, with activations computed anew on the way back where it fits into memory only so (or as the settings say).

    Raises:
        RunFailed: it does not fit either way.
    """
    asked = settings.run.activation_checkpoints
    found = estimate(base, train, validation, settings, *others, recomputes=asked == "on")
    if asked == "auto" and not found.affordable:
        found = estimate(base, train, validation, settings, *others, recomputes=True)
    if not found.affordable:
        needed, available = found.needed_and_available()
        raise RunFailed(
            f"the run needs about {needed / 1e9:.1f} GB of memory more, and {available / 1e9:.1f} GB are available",
            "a smaller --batch-size (with --gradient-accumulation), a lower --max-length-tokens, --method qlora, or a larger machine",
        )
    return found


def read_sizes(base: Path, settings: FinetuneSettings) -> Sizes:
    """Build a model with its adapter without weights, and count."""
    torch = environment.require("torch", "to train")
    transformers = environment.require("transformers", "to train")
    config = transformers.AutoConfig.from_pretrained(base)
    text = config.get_text_config()
    width, heads = int(text.hidden_size), int(text.num_attention_heads)
    method = settings.method
    if method.method == "qlora":
        method = method.model_copy(update={"method": "lora"})  # the same pairs; what holds the base is counted apart
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        sized = {id(p): p.numel() for p in model.parameters()}
        head = model.get_output_embeddings()
        linear = sum(m.weight.numel() for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not head)
        adapted = methods.attach_adapter(model, method)
    return Sizes(
        width=width,
        layers=int(text.num_hidden_layers),
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_width=int(getattr(text, "head_dim", None) or width // heads),
        inner=int(getattr(text, "intermediate_size", None) or 4 * width),
        vocabulary=int(text.vocab_size),
        linear=linear,
        base=sum(sized.values()),
        trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
    )


def measure_load(
    lengths: Sequence[int], counted: Sequence[int], batch_size: int, seed: int, *, multiple: int = 1, before: int = 0, shared: int = 0
) -> Load:
    """Lay out the first epoch's batches, and return what they hold.

    Args:
        lengths: tokens of each row.
        counted: supervised tokens of each row.
        batch_size: rows in a batch.
        seed: of the order.
        multiple: tokens of a batch are rounded up to one of this.
        before: positions that the method puts before each row; such rows are padded.
        shared: tokens that all rows begin with, which a batch holds once.
    """
    batches = list(Batches(lengths, batch_size, seed).epoch(0))
    if before:
        lengths = [before + length for length in lengths]
    tokens = [-(-(sum(lengths[i] for i in batch) - shared * (len(batch) - 1)) // multiple) * multiple for batch in batches]
    supervised = [-(-sum(counted[i] for i in batch) // multiple) * multiple for batch in batches]
    longest = [max(lengths[i] for i in batch) for batch in batches]
    lines = [len(batch) * most for batch, most in zip(batches, longest, strict=True)]
    if before:
        tokens = lines
    largest = max(range(len(batches)), key=lambda b: (tokens[b] * longest[b], tokens[b]))
    return Load(
        tokens=tokens[largest],
        longest=longest[largest],
        lines=lines[largest],
        supervised=max(supervised),
        mean_tokens=sum(tokens) / len(tokens),
        mean_supervised=sum(supervised) / len(supervised),
        shapes=len(set(tokens)),
    )


def activation_bytes(sizes: Sizes, load: Load, wide: int, kernels: Kernels, *, by_hand: bool) -> int:
    """Return what all layers hold for the way back of the largest batch.

    By hand (`slmops.training.step`): the inputs of each product and both norms' in fp32; queries, keys and values, which PyTorch's
    operators hold in fp32 with padding, their probabilities too. Else as autograd holds transformers' layers with pairs in them.
    """
    heads, keys = sizes.heads * sizes.head_width, sizes.key_heads * sizes.head_width
    attended = load.longest <= kernels.longest_row
    scores = 4 * sizes.heads * load.longest if attended and kernels.holds_scores else 0
    if not by_hand:
        token = wide * (4 * sizes.width + 4 * sizes.inner) + 8 * sizes.width
        line = wide * (4 * heads + 2 * keys) + scores
    elif kernels.holds_scores or not attended:
        token = wide * (2 * sizes.width + heads + (4 if kernels.holds_scores else 3) * sizes.inner) + 8 * sizes.width
        line = 4 * (heads + 2 * keys) + scores if attended else 16 * heads
    else:
        token = wide * (2 * sizes.width + 2 * heads + 2 * keys + 3 * sizes.inner) + 8 * sizes.width
        line = 0
    return sizes.layers * (load.tokens * token + load.lines * line)


def _kernels(sizes: Sizes, precision: str) -> Kernels:
    """Return what will compute between the products."""
    torch = environment.require("torch", "to train")
    from slmops.training.step.kernels import kernels_for

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return kernels_for(torch.empty(0, dtype=_dtype(precision), device=device), sizes.width, sizes.head_width, sizes.inner)


def _dtype(precision: str) -> Any:
    """Return what the products' operands are held in."""
    torch = environment.require("torch", "to train")
    return torch.bfloat16 if held_in(precision) == "bf16" else torch.float32


def _checkpoint_bytes(sizes: Sizes, load: Load, activations: int) -> int:
    """The hidden states before each layer, in fp32, and what one layer holds."""
    return 4 * sizes.layers * load.tokens * sizes.width + activations // sizes.layers


def _logits_bytes(sizes: Sizes, load: Load, wide: int) -> int:
    """Logits of a chunk, their probabilities in fp32, and the gradient."""
    from slmops.training.step.head import CHUNK_LOGITS

    positions = min(load.supervised, max(64, CHUNK_LOGITS // sizes.vocabulary))
    return positions * sizes.vocabulary * (2 * wide + 8)


def _held_bytes(sizes: Sizes, method: str, wide: int) -> int:
    """The base's weights: with qlora, its matrices take 4 bits and what quantizes them (arXiv 2305.14314: 4.127 bits)."""
    return round(sizes.linear * 4.127 / 8) + (sizes.base - sizes.linear) * wide if method == "qlora" else sizes.base * wide


def _resident_bytes() -> int:
    return environment.require("psutil", "to measure memory").Process().memory_info().rss


def _seconds(sizes: Sizes, load: Load, settings: FinetuneSettings, precision: str, steps: int, held: int, *, by_hand: bool) -> float:
    """Time the products of a step, and what lies between them."""
    torch = environment.require("torch", "to train")
    dtype, device = _dtype(precision), "cuda" if torch.cuda.is_available() else "cpu"
    tokens = max(16, round(load.mean_tokens))
    x, weight = (torch.ones(n, sizes.width, dtype=dtype, device=device) for n in (tokens, sizes.inner))
    narrow = torch.ones(16, sizes.width, dtype=dtype, device=device)
    speed = speed_of_head = 2 * x.numel() * sizes.inner / _timed(lambda: x @ weight.t())
    if precision == "int8":
        from slmops.training.step.products import Int8Matrix

        matrix = Int8Matrix(weight)
        speed = 2 * x.numel() * sizes.inner / _timed(lambda: matrix.times(x))
    small = _timed(lambda: x @ narrow.t())
    block = torch.ones(2_000_000, device=device)
    bandwidth = 2 * block.numel() * block.element_size() / _timed(lambda: block * 2.0)
    products = 3 if methods.method_of(settings.method).trains_base else 2
    seconds = 2 * products * (tokens * sizes.linear / speed + load.mean_supervised * sizes.width * sizes.vocabulary / speed_of_head)
    operators = sizes.layers * (_OPERATORS if by_hand else _OPERATORS_OF_PEFT)
    moved = _PASSES * held * load.mean_tokens / load.tokens
    step = settings.optimizer.gradient_accumulation * (seconds + operators * small + moved / bandwidth)
    return steps * (step + sizes.trained * 40 / bandwidth)


def _timed(run: Any) -> float:
    """Return the seconds of a run: the median of some, the first ones left out."""
    torch = environment.require("torch", "to train")
    found = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found[2:])[len(found[2:]) // 2]
