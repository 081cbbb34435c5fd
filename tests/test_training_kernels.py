"""What is between the products of a step: the compiled pieces give PyTorch's numbers, and without a compiler PyTorch's operators do."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import TEMPLATES, make_model, write_rows

import slmops
from slmops import compiling, progress
from slmops.errors import InvalidInput

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from test_training_step import adapted, assert_same, base_of, fast, pairs, plain  # noqa: E402

from slmops.training.processes import find_team  # noqa: E402
from slmops.training.step import kernels as module  # noqa: E402
from slmops.training.step import prepare_step  # noqa: E402
from slmops.training.step.kernels import PLAIN, Attention, Kernels, kernels_for, why_not_compiled  # noqa: E402
from slmops.training.step.kernels.compiled import CompiledKernels, disagreement  # noqa: E402
from slmops.training.step.pairs import Adapted, Pair, PairStore, kernels_of  # noqa: E402
from slmops.training.step.rows import Rows  # noqa: E402

compiled = pytest.mark.skipif(why_not_compiled() is not None, reason=f"nothing is compiled here: {why_not_compiled()}")
TYPES = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
ROWS = [{"text": f"play song {i}", "intent": "play"} for i in range(12)]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a process that has looked for nothing yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiling.SWITCH, raising=False)
    module._found.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    module._found.cache_clear()


def ours() -> Kernels:
    found = kernels_for(torch.empty(0), 16)
    assert isinstance(found, CompiledKernels)
    return found


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(found: Any, right: Any, bound: float) -> None:
    assert found.dtype == right.dtype
    assert found.shape == right.shape
    assert float((found.float() - right.float()).abs().max()) <= bound * float(right.float().abs().max())


# The pieces ----------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("lengths", "shared", "heads", "width", "window", "turns"),
    [
        ([1], 0, (1, 1), 16, None, True),
        ([5, 9, 1], 0, (4, 4), 32, None, True),
        ([29, 27, 30, 34], 1, (9, 3), 64, None, True),
        ([70, 31, 61], 20, (6, 2), 16, None, True),
        ([70, 31, 61], 20, (6, 2), 16, 9, True),
        ([33, 64], 0, (4, 1), 96, 32, False),
        ([300, 2], 1, (2, 2), 16, None, False),
    ],
)
def test_attention(
    dtype: Any, lengths: list[int], shared: int, heads: tuple[int, int], width: int, window: int | None, turns: bool
) -> None:
    rows = Rows(lengths, 16, shared)
    angles = random(rows.longest, width // 2).repeat(1, 2)
    how = Attention(rows, heads, width**-0.5, window, (angles.cos(), angles.sin()) if turns else None)
    y = random(rows.tokens, (heads[0] + 2 * heads[1]) * width, seed=1).to(dtype)
    of_answer = random(rows.tokens, heads[0] * width, seed=2).to(dtype)
    of_answer[rows.real :] = 0
    found, right = ours().attend(y, how), PLAIN.attend(y, how)
    near(found[0], right[0], TYPES[dtype])
    near(ours().attend_back(how, found[1], of_answer), PLAIN.attend_back(how, right[1], of_answer), 2 * TYPES[dtype])


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 12, 13, 600])
@pytest.mark.parametrize(
    ("inputs", "pairs"), [(64, [(16, 48)]), (96, [(3, 16), (20, 144), (8, 16)]), (112, [(1, 32), (None, 16), (64, 112)])]
)
def test_pairs(dtype: Any, tokens: int, inputs: int, pairs: list[tuple[int | None, int]]) -> None:
    found = []
    for kernels in (ours(), PLAIN):
        made, at = [], 0
        for number, (rank, outputs) in enumerate(pairs):
            if rank is not None:
                a, b = random(rank, inputs, seed=number), random(outputs, rank, seed=10 + number)
                made.append(Pair(torch.nn.Parameter(a), torch.nn.Parameter(b), 0.5 + number, slice(at, at + outputs)))
            at += outputs
        layer = Adapted(torch.zeros(at, inputs, dtype=dtype), None, tuple(outputs for _, outputs in pairs), made)
        store = PairStore([layer], kernels)
        store.begin()
        x, y, dy, dx = (random(tokens, width, seed=20 + width).to(dtype) for width in (inputs, at, at, inputs))
        h = kernels.add_pairs(layer, x, y)
        kernels.add_pairs_back(layer, x, h, dy, dx)
        kernels.add_pairs_back(layer, x, h, dy, None)
        found.append((y, dx, store.take_gradient()))
        assert not store.gradient.any()
    for one, other in zip(*found, strict=True):
        near(one, other, 5 * TYPES[dtype])


@compiled
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weight", TYPES)
def test_norms_of_any_precision(dtype: Any, weight: Any) -> None:
    x, w, of_y = random(2, 7, 80).to(dtype), random(80, seed=1).to(weight), random(2, 7, 80, seed=2).to(weight)
    (found, saved), (right, kept) = ours().normalize(x, w, 1e-5), PLAIN.normalize(x, w, 1e-5)
    near(found, right, max(TYPES[weight], TYPES[dtype]))
    near(ours().normalize_back(dtype, saved, of_y), PLAIN.normalize_back(dtype, kept, of_y), max(TYPES[weight], TYPES[dtype]))


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_gated_layers_of_numbers_of_any_size(dtype: Any) -> None:
    both = (random(9, 64) * torch.logspace(-3, 2, 9)[:, None]).to(dtype)
    (found, saved), (right, kept) = ours().gate(both), PLAIN.gate(both)
    of_inner = random(9, 32, seed=1).to(dtype)
    back, expected = ours().gate_back(saved, of_inner.clone()), PLAIN.gate_back(kept, of_inner.clone())
    for line in range(9):
        near(found[line], right[line], 2 * TYPES[dtype])
        near(back[line], expected[line], 2 * TYPES[dtype])


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_codes(dtype: Any) -> None:
    x = (random(7, 48) * torch.logspace(-12, 12, 7)[:, None]).to(dtype)
    x[3] = 0
    (codes, scales), (expected, theirs) = ours().quantize(x), PLAIN.quantize(x)
    assert torch.allclose(scales.float(), theirs.float(), rtol=1e-6)
    assert int((codes.int() - expected.int()).abs().max()) <= 1
    near(ours().scale(x.clone(), scales), PLAIN.scale(x.clone(), scales), TYPES[dtype])


@compiled
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_no_number_stays_none(dtype: Any) -> None:
    """A run that diverges has to show it."""
    none = torch.tensor(float("nan"), dtype=dtype)
    x, both = random(4, 32).to(dtype), random(4, 64).to(dtype)
    x[1, 3], both[1, 2], both[2, 40] = none, none, none
    how = Attention(Rows([4]), (2, 2), 0.2)
    y = random(4, 6 * 16).to(dtype)
    y[1, 5] = none  # of a query
    for kernels in (ours(), PLAIN):
        assert kernels.normalize(x, torch.ones(32, dtype=dtype), 1e-5)[0].isnan().any(1).tolist() == [False, True, False, False]
        assert kernels.gate(both)[0].isnan().any(1).tolist() == [False, True, True, False]
        assert kernels.attend(y, how)[0].isnan().any(1).tolist() == [False, True, False, False]
        codes, scales = kernels.quantize(x)
        assert scales.isnan().flatten().tolist() == [False, True, False, False]


@compiled
def test_the_number_of_threads_changes_no_bit() -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            model, rows = adapted(base_of("Llama")), pairs()
            found.append(fast(model, prepare_step(model, rows), [rows])[1])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, other[name], rtol=0, atol=1e-6), name  # products are the library's


# What is taken, and what else ----------------------------------------------------------------------------------------


@compiled
def test_widths_and_precisions_that_it_does_not_know_are_pytorchs() -> None:
    assert isinstance(kernels_for(torch.empty(0), 64, 16), CompiledKernels)
    for like, width in ((torch.empty(0), 40), (torch.empty(0, dtype=torch.float16), 64), (torch.empty(0, device="meta"), 64)):
        assert kernels_for(like, width) is PLAIN
    even, odd = (
        Adapted(torch.zeros(16, width), None, (16,), [Pair(random(2, width), random(16, 2), 1.0, slice(16))]) for width in (32, 24)
    )
    assert kernels_of([even]) is not PLAIN
    assert kernels_of([even, odd]) is PLAIN, "pairs stand in one parameter"
    for precision, suited in ((torch.float32, True), (torch.bfloat16, False)):
        pair = Pair(random(64, 32), random(16, 64), 1.0, slice(16))
        large = Adapted(torch.zeros(16, 32, dtype=precision), None, (16,), [pair])
        assert (kernels_of([large]) is not PLAIN) is suited


@compiled
def test_large_ranks_are_multiplied_by_the_library_and_all_else_is_ours() -> None:
    config = {"target_modules": ["q_proj", "down_proj"], "r": 48}
    model = adapted(base_of("Llama").to(torch.bfloat16), **config)
    rows = pairs()
    expected = plain(adapted(base_of("Llama"), **config), rows)
    step = prepare_step(model, rows)
    assert step.patched.store is not None
    assert (step.patched.store.kernels, step.kernels) == (PLAIN, "compiled")
    assert_same(fast(model, step, [rows]), expected, 0.05)


@compiled
def test_tensors_that_are_not_alike_are_refused_before_anything_is_written() -> None:
    """As autocast would make them: the library knows of one precision, and would write past the end of the other."""
    pair = Pair(torch.nn.Parameter(random(4, 32)), torch.nn.Parameter(random(16, 4)), 1.0, slice(0, 16))
    layer = Adapted(torch.zeros(16, 32), None, (16,), [pair])
    store = PairStore([layer], ours())
    x, y = random(3, 32), torch.zeros(3, 16, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="bfloat16"):
        ours().add_pairs(layer, x, y)
    with pytest.raises(TypeError):
        ours().add_pairs_back(layer, x, random(3, 16), y, x)
    with pytest.raises(TypeError):
        ours().gate_back((random(3, 32),), y)
    with pytest.raises(TypeError):
        ours().normalize(torch.empty(3, 32, device="meta"), torch.ones(32), 1e-5)
    assert not y.any()
    assert not store.gradient.any()


@compiled
def test_heads_that_are_turned_in_part_keep_their_own_attention() -> None:
    model, rows = adapted(base_of("Nemotron", head_dim=32, partial_rotary_factor=0.5)), pairs()
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    assert_same(fast(model, step, [rows]), expected)


def test_a_precision_of_the_launchers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InvalidInput, match="mixed precision"):
        find_team(1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert find_team(1).size == 1


@compiled
def test_there_is_one_pool_of_threads() -> None:
    """Another libgomp beside torch's would have threads of its own, and both pools would wait for the cores of the other."""
    ours()
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert len({line.split()[-1] for line in lines if "libgomp" in line}) == 1


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3Text", "Olmo2"])
@pytest.mark.parametrize("shared", [0, 6])
def test_loss_and_gradients_by_pytorchs_operators(fresh: pytest.MonkeyPatch, family: str, shared: int) -> None:
    fresh.setenv(compiling.SWITCH, "no")
    rows = [([*range(5, 5 + shared), *ids], [-100] * shared + labels) for ids, labels in pairs()]
    model = adapted(base_of(family))
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    assert (step.kernels, step.reason) == ("pytorch", None)
    assert_same(fast(model, step, [rows]), expected)


@compiled
def test_a_library_that_is_off_is_not_used(fresh: pytest.MonkeyPatch) -> None:
    own = CompiledKernels.gate_back
    fresh.setattr(CompiledKernels, "gate_back", lambda self, saved, of_inner: own(self, saved, of_inner).mul_(1.02))
    assert kernels_for(torch.empty(0), 16) is PLAIN
    assert "gated layer back" in (why_not_compiled() or "")
    assert disagreement(PLAIN) is None


# Compiling -----------------------------------------------------------------------------------------------------------


@compiled
def test_it_is_compiled_once(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, times = compiling._compile, []
    fresh.setattr(compiling, "_compile", lambda *args: (times.append(args), own(*args)))
    for _ in range(2):
        module._found.cache_clear()
        ours()
    assert len(times) == 1
    (kept,) = (tmp_path / "cache" / "slmops" / "compiled").iterdir()
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


@compiled
def test_a_damaged_library_is_compiled_again(fresh: pytest.MonkeyPatch) -> None:
    kept = compiling._kept(module.SOURCE, [*compiling.compiler(), module.FLAG])
    assert kept is not None
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"cut off")
    ours()
    assert kept.stat().st_size > 10_000


@compiled
@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_home_that_is_closed_is_done_without(fresh: pytest.MonkeyPatch, tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir(mode=mode)
    ours()
    (tmp_path / "cache").chmod(0o700)


@compiled
@pytest.mark.parametrize("place", ["library", "folder"])
def test_a_library_that_others_can_write_is_not_loaded(fresh: pytest.MonkeyPatch, place: str) -> None:
    kept = compiling._kept(module.SOURCE, [*compiling.compiler(), module.FLAG])
    assert kept is not None
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.write_bytes(b"")
    (kept if place == "library" else kept.parent).chmod(0o777)
    loaded: list[str] = []
    own = compiling.ctypes.CDLL
    fresh.setattr(compiling.ctypes, "CDLL", lambda path: (loaded.append(path), own(path))[1])
    ours()
    assert loaded
    assert (str(kept) in loaded) is (place == "library"), "what we have put in its place is ours"


@pytest.mark.parametrize("fault", [PermissionError("closed"), OSError("no space"), UnicodeDecodeError("utf-8", b"x", 0, 1, "odd")])
def test_whatever_the_system_refuses_pytorchs_operators_do_it(fresh: pytest.MonkeyPatch, fault: Exception) -> None:
    def refuse(*_: Any) -> None:
        raise fault

    fresh.setattr(compiling, "compiler", lambda: ["/bin/sh"])
    fresh.setattr(compiling, "_kept", refuse)
    assert kernels_for(torch.empty(0), 16) is PLAIN
    assert str(fault) in (why_not_compiled() or "")


@compiled
def test_a_file_in_the_place_of_the_cache_is_done_without(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    ours()


class Lines:
    """A sink that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, *_: Any) -> Any:
        return self

    def advance(self, *_: Any, **__: Any) -> None: ...

    def finish(self, *_: Any) -> None: ...

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(("compiler", "said"), [("no-such-compiler", "no C++ compiler (no-such-compiler)"), ("fails", "error: no OpenMP")])
def test_without_a_compiler_pytorchs_operators_train_and_the_run_says_so(
    fresh: pytest.MonkeyPatch, tmp_path: Path, compiler: str, said: str
) -> None:
    if compiler == "fails":
        script = tmp_path / "fails"
        script.write_text("#!/bin/sh\necho 'note: a line' >&2; echo 'error: no OpenMP' >&2; exit 1\n")
        script.chmod(0o755)
        compiler = str(script)
    fresh.setenv("CXX", compiler)
    sink = Lines()
    with progress.watch(sink):
        made = slmops.finetune(
            make_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", ROWS), out=tmp_path / "out", max_steps=2, **TEMPLATES
        )
    assert made.manifest.facts["kernels"] == "pytorch"
    assert [said in line for line in sink.lines if "PyTorch's operators" in line] == [True]


@compiled
def test_the_manifest_says_what_computed(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    made = slmops.finetune(make_model(tmp_path / "base"), rows, out=tmp_path / "out", max_steps=2, **TEMPLATES)
    assert made.manifest.facts["kernels"] == "compiled"
