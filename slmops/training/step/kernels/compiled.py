"""The same pieces in one pass each, in fp32 and bf16 on a processor: `kernels.cpp`, called through ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from slmops.training.step.kernels.plain import Attention, Kernels, Saved
from slmops.training.step.rows import Rows

_VECTOR = 16
"""Numbers that are taken at a time: widths are multiples of it."""
_HALF = {torch.float32: 0, torch.bfloat16: 1}
"""How the library is told a precision."""
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


class CompiledKernels(Kernels):
    """One pass of our own for each piece; for tensors that `fits`.

    Args:
        library: `kernels.cpp`, compiled.
    """

    name = "compiled"
    longest_row = 1024
    holds_scores = False

    def __init__(self, library: ctypes.CDLL) -> None:
        def function(name: str, *arguments: type) -> Any:
            found = getattr(library, f"slmops_{name}")
            found.argtypes, found.restype = arguments, None
            return found

        rows, place = (_Long, _Long, _Int), _Pointer
        self._normalize = function("normalize", _Int, _Int, place, place, place, place, _Float, *rows)
        self._normalize_back = function("normalize_back", _Int, _Int, place, place, place, place, place, *rows)
        self._gate = function("gate", _Int, place, place, *rows)
        self._gate_back = function("gate_back", _Int, place, place, place, *rows)
        self._attend = function("attend", _Int, place, place, ctypes.POINTER(_Shape))
        self._attend_back = function("attend_back", _Int, place, place, place, place, ctypes.POINTER(_Shape))
        self._quantize = function("quantize", _Int, place, place, place, *rows)
        self._scale = function("scale", _Int, place, place, *rows)

    def normalize(self, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, Saved]:
        """See `Kernels`."""
        x, (rows, width) = x.contiguous(), _matrix(x)
        y, inverse = torch.empty_like(x, dtype=weight.dtype), torch.empty(rows)
        places = x.data_ptr(), weight.data_ptr(), y.data_ptr(), inverse.data_ptr()
        self._normalize(_HALF[x.dtype], _HALF[y.dtype], *places, epsilon, rows, width, torch.get_num_threads())
        return y, (x, inverse, weight)

    def normalize_back(self, precision: torch.dtype, saved: Saved, of_y: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        x, inverse, weight = saved
        of_y, of_x = of_y.to(weight.dtype).contiguous(), torch.empty_like(x)
        places = x.data_ptr(), weight.data_ptr(), inverse.data_ptr(), of_y.data_ptr(), of_x.data_ptr()
        self._normalize_back(_HALF[x.dtype], _HALF[of_y.dtype], *places, *_matrix(x), torch.get_num_threads())
        return of_x

    def gate(self, both: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """See `Kernels`."""
        both, (rows, width) = both.contiguous(), _matrix(both)
        inner = both.new_empty(*both.shape[:-1], width // 2)
        self._gate(_HALF[both.dtype], both.data_ptr(), inner.data_ptr(), rows, width // 2, torch.get_num_threads())
        return inner, (both,)

    def gate_back(self, saved: Saved, of_inner: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        (both,), of_inner = saved, of_inner.contiguous()
        of_both, (rows, width) = torch.empty_like(both), _matrix(both)
        places = both.data_ptr(), of_inner.data_ptr(), of_both.data_ptr()
        self._gate_back(_HALF[both.dtype], *places, rows, width // 2, torch.get_num_threads())
        return of_both

    def attend(self, y: torch.Tensor, how: Attention) -> tuple[torch.Tensor, Saved]:
        """See `Kernels`."""
        y = y.contiguous()
        answer = y.new_empty(how.rows.tokens, how.heads[0] * how.width(y))
        self._attend(_HALF[y.dtype], y.data_ptr(), answer.data_ptr(), ctypes.byref(_shape(y, how)))
        return answer, (y,)

    def attend_back(self, how: Attention, saved: Saved, of_answer: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        (y,), of_answer = saved, of_answer.contiguous()
        of_y = torch.empty_like(y)
        # Of keys and values that rows share, for each row: they are summed in the rows' order, whichever is done first.
        shared = torch.empty(len(how.rows.lengths) * how.rows.shared * 2 * how.heads[1] * how.width(y))
        places = y.data_ptr(), of_answer.data_ptr(), of_y.data_ptr(), shared.data_ptr()
        self._attend_back(_HALF[y.dtype], *places, ctypes.byref(_shape(y, how)))
        return of_y

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels`."""
        x, (rows, width) = x.contiguous(), _matrix(x)
        codes, scales = torch.empty(rows, width, dtype=torch.uint8), x.new_empty(rows, 1)
        self._quantize(_HALF[x.dtype], x.data_ptr(), codes.data_ptr(), scales.data_ptr(), rows, width, torch.get_num_threads())
        return codes, scales

    def scale(self, y: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        self._scale(_HALF[y.dtype], y.data_ptr(), scales.data_ptr(), *_matrix(y), torch.get_num_threads())
        return y


def fits(like: torch.Tensor, *widths: int) -> bool:
    """Tell whether the compiled kernels know tensors of these widths, on the device and in the precision of one."""
    return like.device.type == "cpu" and like.dtype in _HALF and not any(width % _VECTOR for width in widths)


def _matrix(x: torch.Tensor) -> tuple[int, int]:
    """Return the rows and columns of x (..., columns)."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _shape(y: torch.Tensor, how: Attention) -> _Shape:
    rows, turns = how.rows, how.turns
    cosines, sines = (turns[0].data_ptr(), turns[1].data_ptr()) if turns is not None else (None, None)
    places = rows.counts.data_ptr(), rows.starts.data_ptr(), cosines, sines
    sizes = len(rows.lengths), rows.shared, rows.real, rows.tokens, *how.heads, how.width(y), how.window or 0
    return _Shape(*places, *sizes, how.scale, torch.get_num_threads())


@torch.no_grad()
def disagreement(kernels: Kernels) -> str | None:
    """Say which piece gives other numbers than PyTorch's operators on random ones; None where all agree."""
    generator, plain = torch.Generator().manual_seed(0), Kernels()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    angles = random(11, 16).repeat(1, 2)
    rows = Rows([7, 11, 3], 16, shared=2)
    how = Attention(rows, (4, 2), 0.3, 5, (angles.cos(), angles.sin()))
    for precision in _HALF:
        x, weight = random(5, 64).to(precision), random(64).to(precision)
        both, y = random(5, 128).to(precision), random(rows.tokens, 8 * 32).to(precision)
        of_inner, of_answer = random(5, 64).to(precision), random(rows.tokens, 4 * 32).to(precision)
        of_answer[rows.real :] = 0
        found = []
        for each in (kernels, plain):
            normalized, gated, attended = each.normalize(x, weight, 1e-5), each.gate(both), each.attend(y, how)
            codes, scales = each.quantize(x)
            back = each.normalize_back(x.dtype, normalized[1], x), each.gate_back(gated[1], of_inner.clone())
            of_y = each.attend_back(how, attended[1], of_answer)
            read = (codes.float() - 128) * scales.float()
            found.append((normalized[0], *back, gated[0], attended[0], of_y, read, each.scale(x.clone(), scales)))
        names = ("norm", "norm back", "gated layer back", "gated layer", "attention", "attention back", "codes", "scales")
        for name, ours, theirs in zip(names, *found, strict=True):
            bound = _TOLERANCE[precision] * float(theirs.abs().max()) if name != "codes" else 1.01 * float(scales.float().max())
            if not float((ours.float() - theirs.float()).abs().max()) <= bound:
                return f"the compiled kernels are off ({name}, {precision}): PyTorch's operators are used; please report it"
    return None
