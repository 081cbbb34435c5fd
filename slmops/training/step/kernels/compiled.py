"""The same pieces in one pass each, in fp32 and bf16 on a processor: `kernels.cpp`, called through ctypes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from slmops.training.step.kernels.plain import PLAIN, Attention, Kernels, Saved
from slmops.training.step.rows import Rows, rounded_up

if TYPE_CHECKING:
    from slmops.training.step.pairs import Adapted

_VECTOR = 16
"""Numbers that are taken at a time: widths are multiples of it."""
_HALF = {torch.float32: 0, torch.bfloat16: 1}
"""How the library is told a precision."""
_LARGEST_RANK = 32
"""135M shape, against PyTorch's operators alone: a step is 1.25 times as fast with rank 16, 1.11 with 32, 1.03 with 64, where oneDNN's products give 1.12."""
_PAIRS = ((4, 2.0, slice(0, 48)), (20, 0.5, slice(48, 96)))
"""That are tried: rank, scale, outputs."""
# Largest error of an answer, relative to its largest number, that the order of sums and the precision make.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}

_Long, _Float, _Int, _Pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_int, ctypes.c_void_p


class _Shape(ctypes.Structure):
    """What `Shape` is there."""

    _fields_ = [
        *((name, _Pointer) for name in ("lengths", "starts", "cosines", "sines")),
        *((name, _Long) for name in ("count", "shared", "real", "tokens", "queries", "keys", "width", "window")),
        ("scale", _Float),
        ("threads", _Int),
    ]


class _Pair(ctypes.Structure):
    """What `Pair` is there."""

    _fields_ = [*((name, _Long) for name in ("a", "b", "rank", "output", "outputs")), ("scale", _Float)]


class _Layer(ctypes.Structure):
    """What `Layer` is there."""

    _fields_ = [("pairs", ctypes.POINTER(_Pair)), *((name, _Long) for name in ("count", "inputs", "outputs", "ranks", "filled"))]


class CompiledKernels(Kernels):
    """One pass of our own for each piece; for tensors that `fits`.

    Args:
        library: `kernels.cpp`, compiled.
    """

    name = "compiled"
    longest_row = 2048
    """There and back, two Zen 4 cores, against the library's kernel: 4 times as fast for rows of 128 tokens, 2.3 for 512, 1.2 to 1.5 for 2,048."""
    holds_scores = False
    wide_pairs = True

    def __init__(self, library: ctypes.CDLL) -> None:
        def function(name: str, *arguments: type) -> Any:
            found = getattr(library, f"slmops_{name}")
            found.argtypes, found.restype = arguments, None
            return found

        rows, place = (_Long, _Long, _Int), _Pointer
        layer = ctypes.POINTER(_Layer)
        self._add_pairs = function("add_pairs", _Int, place, place, place, place, layer, _Long, _Int)
        self._add_pairs_back = function("add_pairs_back", _Int, *[place] * 6, layer, _Long, _Int)
        self._normalize = function("normalize", _Int, _Int, place, place, place, place, _Float, *rows)
        self._normalize_back = function("normalize_back", _Int, _Int, place, place, place, place, place, *rows)
        self._gate = function("gate", _Int, place, place, *rows)
        self._gate_back = function("gate_back", _Int, place, place, place, *rows)
        self._attend = function("attend", _Int, place, place, ctypes.POINTER(_Shape))
        self._attend_back = function("attend_back", _Int, place, place, place, place, ctypes.POINTER(_Shape))
        self._quantize = function("quantize", _Int, place, place, place, *rows)
        self._scale = function("scale", _Int, place, place, *rows)

    def suits(self, rank: int, precision: torch.dtype) -> bool:
        """See `Kernels`; the library has products in bf16, which are twice as fast as ours in fp32 where they are large."""
        return precision != torch.bfloat16 or rank <= _LARGEST_RANK

    def add_pairs(self, layer: Adapted, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        store, (said, filled), x = layer.store, _described(layer), x.contiguous()
        assert store is not None
        h = torch.empty(len(x), filled, dtype=torch.float32, device="cpu")
        places = x.data_ptr(), y.data_ptr(), h.data_ptr(), store.parameter.data_ptr()
        assert _kind(store.parameter) == _HALF[torch.float32]
        self._add_pairs(_kind(x, y), *places, said, len(x), torch.get_num_threads())
        return h

    def add_pairs_back(self, layer: Adapted, x: torch.Tensor, h: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor | None) -> None:
        """See `Kernels`."""
        store, (said, _), x, dy = layer.store, _described(layer), x.contiguous(), dy.contiguous()
        assert store is not None
        to = dx.data_ptr() if dx is not None else None
        places = x.data_ptr(), h.data_ptr(), dy.data_ptr(), to, store.gradient.data_ptr(), store.parameter.data_ptr()
        assert _kind(store.parameter, store.gradient, h) == _HALF[torch.float32]
        self._add_pairs_back(_kind(x, dy, *(() if dx is None else (dx,))), *places, said, len(x), torch.get_num_threads())

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, Saved]:
        """See `Kernels`."""
        x, (rows, width) = x.contiguous(), _matrix(x)
        y, inverse = torch.empty_like(x, dtype=weight.dtype), torch.empty(rows, dtype=torch.float32, device="cpu")
        places = x.data_ptr(), weight.data_ptr(), y.data_ptr(), inverse.data_ptr()
        self._normalize(_kind(x), _kind(y, weight), *places, epsilon, rows, width, torch.get_num_threads())
        return y, (x, inverse, weight)

    def normalize_back(self, precision: torch.dtype, saved: Saved, of_y: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        x, inverse, weight = saved
        of_y, of_x = of_y.to(weight.dtype).contiguous(), torch.empty_like(x)
        places = x.data_ptr(), weight.data_ptr(), inverse.data_ptr(), of_y.data_ptr(), of_x.data_ptr()
        self._normalize_back(_kind(x, of_x), _kind(of_y, weight), *places, *_matrix(x), torch.get_num_threads())
        return of_x

    def gate(self, both: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """See `Kernels`."""
        both, (rows, width) = both.contiguous(), _matrix(both)
        inner = both.new_empty(*both.shape[:-1], width // 2)
        self._gate(_kind(both, inner), both.data_ptr(), inner.data_ptr(), rows, width // 2, torch.get_num_threads())
        return inner, (both,)

    def gate_back(self, saved: Saved, of_inner: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        (both,), of_inner = saved, of_inner.contiguous()
        of_both, (rows, width) = torch.empty_like(both), _matrix(both)
        places = both.data_ptr(), of_inner.data_ptr(), of_both.data_ptr()
        self._gate_back(_kind(both, of_inner, of_both), *places, rows, width // 2, torch.get_num_threads())
        return of_both

    def attend(self, y: torch.Tensor, how: Attention) -> tuple[torch.Tensor, Saved]:
        """See `Kernels`."""
        y = y.contiguous()
        answer = y.new_empty(how.rows.tokens, how.heads[0] * how.width(y))
        self._attend(_kind(y, answer), y.data_ptr(), answer.data_ptr(), ctypes.byref(_shape(y, how)))
        return answer, (y,)

    def attend_back(self, how: Attention, saved: Saved, of_answer: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        (y,), of_answer = saved, of_answer.contiguous()
        of_y = torch.empty_like(y)
        # Of keys and values that rows share, for each row: they are summed in the rows' order, whichever is done first.
        numbers = len(how.rows.lengths) * how.rows.shared * 2 * how.heads[1] * how.width(y)
        shared = torch.empty(numbers, dtype=torch.float32, device="cpu")
        places = y.data_ptr(), of_answer.data_ptr(), of_y.data_ptr(), shared.data_ptr()
        self._attend_back(_kind(y, of_answer, of_y), *places, ctypes.byref(_shape(y, how)))
        return of_y

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels`."""
        x, (rows, width) = x.contiguous(), _matrix(x)
        codes, scales = torch.empty(rows, width, dtype=torch.uint8), x.new_empty(rows, 1)
        self._quantize(_kind(x, scales), x.data_ptr(), codes.data_ptr(), scales.data_ptr(), rows, width, torch.get_num_threads())
        return codes, scales

    def scale(self, y: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        self._scale(_kind(y, scales), y.data_ptr(), scales.data_ptr(), *_matrix(y), torch.get_num_threads())
        return y


def fits(like: torch.Tensor, *widths: int) -> bool:
    """Tell whether the compiled kernels know tensors of these widths, on the device and in the precision of one."""
    return like.device.type == "cpu" and like.dtype in _HALF and not any(width % _VECTOR for width in widths)


def _kind(*tensors: torch.Tensor) -> int:
    """Return how the library is told the precision of tensors.

    Raises:
        TypeError: they are of several, or not where the library writes: it would go past their ends.
    """
    first = tensors[0].dtype
    if first not in _HALF or any(x.dtype != first or x.device.type != "cpu" or not x.is_contiguous() for x in tensors):
        raise TypeError(f"the compiled kernels were given {', '.join(f'{x.dtype} on {x.device}' for x in tensors)}")
    return _HALF[first]


def _matrix(x: torch.Tensor) -> tuple[int, int]:
    """Return the rows and columns of x (..., columns)."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _shape(y: torch.Tensor, how: Attention) -> _Shape:
    rows, turns = how.rows, how.turns
    wanted = (rows.longest, how.width(y))
    assert turns is None or all(x.shape == wanted and _kind(x) == _HALF[torch.float32] for x in turns)
    cosines, sines = (turns[0].data_ptr(), turns[1].data_ptr()) if turns is not None else (None, None)
    places = rows.counts.data_ptr(), rows.starts.data_ptr(), cosines, sines
    sizes = len(rows.lengths), rows.shared, rows.real, rows.tokens, *how.heads, how.width(y), how.window or 0
    return _Shape(*places, *sizes, how.scale, torch.get_num_threads())


def _described(layer: Adapted) -> tuple[Any, int]:
    """Return a layer's pairs as the library wants them, and the numbers of a token's line of h."""
    if layer.described is None:
        sizes = [(pair.a_at, pair.b_at, len(pair.a), pair.outputs.start, pair.outputs.stop - pair.outputs.start) for pair in layer.pairs]
        pairs = (_Pair * len(sizes))(*(_Pair(*size, pair.scale) for size, pair in zip(sizes, layer.pairs, strict=True)))
        ranks, last = sum(len(pair.a) for pair in layer.pairs), len(layer.pairs[-1].a)
        filled = rounded_up(ranks - last + rounded_up(last, _VECTOR), _VECTOR)
        outputs, inputs = layer.weight.shape
        layer.described = ctypes.pointer(_Layer(pairs, len(pairs), inputs, outputs, ranks, filled)), filled
    return layer.described


@torch.no_grad()
def disagreement(kernels: Kernels) -> str | None:
    """Say which piece gives other numbers than PyTorch's operators on random ones; None where all agree."""
    for precision in _HALF:
        ours, theirs = _pieces(kernels, precision), _pieces(PLAIN, precision)
        for name, right in theirs.items():
            if not float((ours[name].float() - right.float()).abs().max()) <= _TOLERANCE[precision] * float(right.abs().max()):
                return f"the compiled kernels are off ({name}, {precision}): PyTorch's operators are used; please report it"
    return None


def _pieces(kernels: Kernels, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what each piece makes of the same random numbers, there and back."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, y, both = (random(25, width).to(precision) for width in (64, 96, 128))
    normalized, of_norm = kernels.normalize(x, random(64).to(precision), 1e-5)
    gated, of_gate = kernels.gate(both)
    angles = random(11, 16).repeat(1, 2)
    how = Attention(Rows([7, 11, 3], 16, shared=2), (4, 2), 0.3, 5, (angles.cos(), angles.sin()))
    attended, of_attention = kernels.attend(random(how.rows.tokens, 8 * 32).to(precision), how)
    of_attended = random(how.rows.tokens, 4 * 32).to(precision)
    of_attended[how.rows.real :] = 0
    codes, scales = kernels.quantize(x)
    found = {
        "norm": normalized,
        "norm back": kernels.normalize_back(precision, of_norm, x),
        "gated layer": gated,
        "gated layer back": kernels.gate_back(of_gate, x.clone()),
        "attention": attended,
        "attention back": kernels.attend_back(how, of_attention, of_attended),
        "codes": codes.float() - 128,
        "scales": kernels.scale(x.clone(), scales),
    }
    from slmops.training.step.pairs import Adapted, Pair, PairStore

    pairs = [Pair(_parameter(random(rank, 64)), _parameter(random(48, rank)), scale, at) for rank, scale, at in _PAIRS]
    layer = Adapted(torch.zeros(96, 64, dtype=precision), None, (48, 48), pairs)
    store = PairStore([layer], kernels)
    store.begin()
    h = kernels.add_pairs(layer, x, y)
    kernels.add_pairs_back(layer, x, h, y, dx := torch.zeros_like(x))
    return found | {"pairs": y, "pairs back": dx, "gradient of pairs": store.gradient}


def _parameter(x: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(x, requires_grad=False)
