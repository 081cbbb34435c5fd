"""Matrices that are quantized while the builder works are those that would have been quantized after it, whatever happens to who does it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import make_export, make_model

from slmops.errors import BadArtifact, InvalidInput
from slmops.graph import ahead
from slmops.graph.linears import Linear
from slmops.graph.quantization import Packed, Scheme, pack, quantize
from slmops.graph.recipes import recipe_for
from slmops.graph.stored_weights import StoredWeights

LAYER = "model.layers.0"
QKV = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv"]
DOWN = f"{LAYER}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("ahead") / "model", num_key_value_heads=2)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PIECE", 64 * 24)  # rows of 64: 24 a piece


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes for a tiny model too, on any machine."""
    monkeypatch.setattr(ahead, "_FEWEST", 1)
    monkeypatch.setattr(ahead.environment, "usable_cores", lambda: 3)


def alone(model: Path, names: list[str], scheme: Scheme) -> Packed:
    stored = StoredWeights(model)
    return pack(quantize(np.concatenate([stored[name] for name in names]), scheme))


def check(found: Packed | None, expected: Packed) -> None:
    assert found is not None
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("names", "scheme"), [(QKV, Scheme(8, 64)), ([DOWN], Scheme(4, 32)), (["model.embed_tokens.weight"], Scheme(4, 32))]
)
def test_processes_find_what_one_call_does(model: Path, names: list[str], scheme: Scheme, always: None):
    with ahead.quantizing(model, recipe_for("int4").rule) as found:
        assert len(found._workers) == 2
        for worker in found._workers:
            assert worker.wait(60) == 0
        check(found.packed(names, scheme), alone(model, names, scheme))


def test_without_processes_the_export_does_it(model: Path):
    with ahead.quantizing(model, recipe_for("int4").rule) as found:
        assert not found._workers
        check(found.packed(QKV, Scheme(8, 64)), alone(model, QKV, Scheme(8, 64)))


def test_what_was_not_foreseen_is_left(model: Path):
    def picky(linear: Linear) -> Scheme:
        if "down_proj" in linear.name:
            raise InvalidInput("no block divides it")
        return Scheme(4, 32)

    with ahead.quantizing(model, picky) as found:
        assert found.packed([DOWN], Scheme(4, 32)) is None
        assert found.packed(QKV, Scheme(8, 64)) is None  # another scheme than foreseen
        assert found.packed([*QKV, DOWN], Scheme(4, 32)) is None
        assert found.packed([], Scheme(4, 32)) is None
        assert found.packed(["model.norm.weight"], Scheme(4, 32)) is None


@pytest.mark.skipif(os.name == "nt", reason="SIGSTOP is POSIX")
def test_a_process_that_dies_takes_nothing_with_it(model: Path, always: None, monkeypatch: pytest.MonkeyPatch):
    """It was killed, for want of memory say, between taking a piece and its end."""
    monkeypatch.setattr(ahead.environment, "usable_cores", lambda: 2)
    with ahead.quantizing(model, recipe_for("int4").rule) as found:
        (worker,) = found._workers
        folder = found._folder
        deadline = time.monotonic() + 60
        while not any(folder.glob("*.claim")) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(worker.pid, signal.SIGSTOP)
        for number in range(len(found._pieces)):  # all are taken, and those that are not there will never be
            (folder / f"{number}.claim").touch()
        worker.kill()
        worker.wait()
        check(found.packed(QKV, Scheme(8, 64)), alone(model, QKV, Scheme(8, 64)))
        check(found.packed([DOWN], Scheme(4, 32)), alone(model, [DOWN], Scheme(4, 32)))


def test_processes_end_with_the_block(model: Path, always: None):
    with pytest.raises(KeyboardInterrupt), ahead.quantizing(model, recipe_for("int4").rule) as found:
        raise KeyboardInterrupt
    assert all(worker.returncode is not None for worker in found._workers)
    assert not found._folder.exists()


@pytest.mark.skipif(os.name == "nt", reason="a parent that is gone shows by its number on POSIX only")
def test_a_process_whose_export_was_killed_ends(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Left alone it would take every piece; it looks whose child it is before each."""
    found = ahead.Ahead(model, tmp_path, recipe_for("int4").rule)
    parents = iter([1234, 1234, 1])
    monkeypatch.setattr(ahead.os, "getppid", lambda: next(parents))
    ahead._work(tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1 < len(found._pieces)


def test_the_process_needs_no_torch(model: Path, tmp_path: Path):
    ahead.Ahead(model, tmp_path, recipe_for("int4").rule)
    code = "import sys, runpy; runpy.run_module('slmops.graph.ahead', run_name='__main__'); sys.exit('torch' in sys.modules or 'onnx_ir' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=False).returncode == 0
    assert any(tmp_path.glob("*.npz"))


@pytest.mark.slow
def test_an_export_is_the_same_with_and_without(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without = make_export(tmp_path / "without", model, "int4")
    monkeypatch.setattr(ahead, "_FEWEST", 1)
    monkeypatch.setattr(ahead.environment, "usable_cores", lambda: 3)
    taken: list[bool] = []
    own = ahead.Ahead.packed

    def packed(self: ahead.Ahead, names: list[str], scheme: Scheme) -> Packed | None:
        found = own(self, names, scheme)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(ahead.Ahead, "packed", packed)
    made = make_export(tmp_path / "with", model, "int4")
    assert taken and all(taken), "every matrix was foreseen"
    for name in ("model.onnx", "model_full.onnx", "model.onnx.data"):
        assert (made / name).read_bytes() == (without / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_stored_weights_are_what_torch_reads(kind: str, tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    weight = torch.randn(7, 5).to(getattr(torch, kind))
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    stored = StoredWeights(tmp_path)
    assert stored.shape("a.weight") == (7, 5)
    np.testing.assert_array_equal(stored["a.weight"], weight.float().numpy())
    np.testing.assert_array_equal(stored.rows("a.weight", 2, 6), weight[2:6].float().numpy())
    assert stored["a.weight"].dtype == stored.rows("a.weight", 0, 1).dtype == np.float32


def test_damaged_weights_are_an_error_with_a_way_out(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(4, 4), "b": torch.ones(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    assert set(StoredWeights(tmp_path)) == {"a", "b"}
    with pytest.raises(BadArtifact, match="holds weights of type I32"):
        StoredWeights(tmp_path)["b"]
    for content, text in (
        (whole[:-1], "ends before its last tensor"),
        (whole[:20], "ends before its last tensor"),
        (b"", "ends before its last tensor"),
        (b"x" * 100, "ends before its last tensor"),
        ((4).to_bytes(8, "little") + b"[12]", "is no safetensors file"),
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(BadArtifact, match=text):
            StoredWeights(tmp_path)
