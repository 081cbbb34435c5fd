"""One package in memory answers with any adapter or sum of them as PyTorch does, and a request leaves no trace in the next."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_graph import nmse
from tiny import make_adapter, make_model

import slmops
from slmops import artifact
from slmops.errors import BadArtifact, InvalidInput
from slmops.graph.lora import A, B
from slmops.runtime import adapter_files
from slmops.runtime.adapter_files import Tensors
from slmops.runtime.hugging_face import load_model
from slmops.runtime.loading import open_model, parse_selection
from slmops.runtime.package import Package, Selection

IDS = [1, *range(262, 290)]
PROMPT = "is it cold outside"  # of the answers of random weights to it, all have letters
RANKS = (4, 2, 7, 1, 4)
NAMES = tuple(f"a{number}" for number in range(len(RANKS)))


class Place:
    """A base, five adapters of different ranks, and a package of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.base = root, make_model(root / "base", seed=3)
        self.adapters = [make_adapter(root / name, self.base, seed=number, rank=RANKS[number]) for number, name in enumerate(NAMES)]
        named = [f"{name}={folder}" for name, folder in zip(NAMES, self.adapters, strict=True)]
        self.package = slmops.pack(self.base, out=root / "package", precision="fp32", adapter=named).path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(tmp_path_factory.mktemp("package"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def package(place: Place) -> Iterator[Package]:
    opened = Package(place.package, threads=1)
    yield opened
    opened.close()


def logits(package: Package, selection: Selection = None) -> np.ndarray:
    """Return the logits after IDS by the runtime that a device runs."""
    return package.runner(selection).runtime_logits(IDS)


def text(package: Package, selection: Selection = None, prompt: str = PROMPT) -> str:
    return "".join(package.generate(prompt, adapter=selection, max_new_tokens=12))


def tokens(package: Package, selection: Selection = None) -> Iterator[int]:
    """Yield twelve tokens of an answer as they come; a device's own loop."""
    return package.runner(selection).stream(IDS, max_new_tokens=12, stop_token_ids=[2])


# Against PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *NAMES])
def test_logits_and_text_are_pytorchs(place: Place, package: Package, name: str | None) -> None:
    reference: Any = open_model(place.root / name if name else place.base, threads=1)
    full, last = next(package.runner(name).logits([IDS])), logits(package, name)
    assert nmse(full, next(reference.runner.logits([IDS]))) <= 1e-10
    assert nmse(last, full[-1]) <= 1e-10
    assert nmse(package.runner(name).next_logits(IDS), last) <= 1e-12
    ids = [1, *reference.tokenizer.encode(PROMPT)]
    expected = list(reference.runner.stream(ids, max_new_tokens=12, stop_token_ids=[2]))
    assert text(package, name) == "".join(slmops.generate(place.root / name if name else place.base, PROMPT, max_new_tokens=12))
    assert list(package.runner(name).stream(ids, max_new_tokens=12, stop_token_ids=[2])) == expected
    assert next(package.runner(name).generate([ids], max_new_tokens=12, stop_token_ids=[2])) == expected


def test_without_an_adapter_it_is_the_base_exactly(place: Place, package: Package, tmp_path: Path) -> None:
    export = slmops.export(place.base, out=tmp_path / "export", precision="fp32").path
    with_adapters = logits(package, "a0")
    base: Any = open_model(export, threads=1).runner
    np.testing.assert_array_equal(logits(package), base.runtime_logits(IDS))
    np.testing.assert_array_equal(logits(package, {}), base.runtime_logits(IDS))
    np.testing.assert_array_equal(next(package.runner().logits([IDS])), next(base.logits([IDS])))
    assert nmse(with_adapters, logits(package)) > 0.01
    assert text(package) == "".join(slmops.generate(export, PROMPT, max_new_tokens=12))


@pytest.mark.parametrize("weights", [{"a0": 0.7, "a1": 0.3}, {"a2": 1.0, "a3": -0.5, "a0": 0.25}, {"a1": 0.5}, {"a4": 0.0}], ids=str)
def test_a_sum_is_pefts_sum(place: Place, package: Package, weights: dict[str, float]) -> None:
    import torch
    from peft import PeftModel

    names = list(weights)
    adapted: Any = PeftModel.from_pretrained(load_model(place.base), place.root / names[0], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(place.root / name, adapter_name=name)
    # Not add_weighted_adapter, which takes no negative weights: each adapter on, its scale times the weight.
    adapted.base_model.set_adapter(names)
    for module in adapted.modules():
        scaling = getattr(module, "scaling", None)  # an attention's own is a number
        for name in names if isinstance(scaling, dict) else ():
            module.scaling[name] *= weights[name]
    with torch.no_grad():
        expected = adapted.eval()(torch.tensor([IDS])).logits[0].numpy()
    assert nmse(next(package.runner(weights).logits([IDS])), expected) <= 1e-10
    assert nmse(logits(package, weights), expected[-1]) <= 1e-10
    assert nmse(expected, next(package.runner().logits([IDS]))) > 1e-4 or weights == {"a4": 0.0}


def test_as_typed_on_the_command_line(place: Place, package: Package) -> None:
    assert parse_selection(["a0=0.7", "a1"]) == {"a0": 0.7, "a1": 1.0}
    typed = "".join(slmops.generate(place.package, PROMPT, adapter=["a0=0.7", "a1=0.3"], max_new_tokens=12, threads=1))
    assert typed == text(package, {"a0": 0.7, "a1": 0.3})
    for wrong, said in ((["a0=x"], "no number"), (["a0", "a0=2"], "named twice"), (["b"], "has no adapter b"), (["a0=nan"], "is nan")):
        with pytest.raises(InvalidInput, match=said):
            "".join(slmops.generate(place.package, "x", adapter=wrong))
    with pytest.raises(InvalidInput, match="is not a package with adapters"):
        "".join(slmops.generate(place.base, "x", adapter=["a0"]))


def test_weights_that_differ_in_the_last_digits_are_two_sums(package: Package) -> None:
    logits(package, {"a0": 0.30000001})
    loaded = set(package._library._order)
    logits(package, {"a0": 0.3})
    assert len(set(package._library._order) - loaded) == 1


# Switching --------------------------------------------------------------------------------------------------------


def test_the_first_again_is_the_first_bit_for_bit(package: Package) -> None:
    one, two, base = logits(package, "a0"), logits(package, "a1"), logits(package)
    assert not np.array_equal(one, two)
    for selection, expected in (("a0", one), (None, base), ("a1", two), ({"a0": 1}, one), (None, base), ("a0", one)):
        np.testing.assert_array_equal(logits(package, selection), expected)


def test_a_hundred_switches_leave_no_trace(place: Place) -> None:
    opened = Package(place.package, threads=1, most_loaded=3)
    states: list[Selection] = [None, *NAMES, {"a0": 0.5, "a2": 0.5}, {"a1": 2.0}]
    own = [logits(opened, state) for state in states]
    assert all(not np.array_equal(a, b) for i, a in enumerate(own) for b in own[:i])
    order = random.Random(0).choices(range(len(states)), k=100)
    for number in order:
        np.testing.assert_array_equal(logits(opened, states[number]), own[number])
        assert len(opened._library._order) <= 3
    opened.close()


def test_requests_that_overlap_do_not_touch_each_other(place: Place, package: Package) -> None:
    states: list[Selection] = [None, "a0", "a1", {"a0": 0.5, "a1": 0.5}]
    alone = [list(tokens(package, state)) for state in states]
    assert all(len(answer) == 12 for answer in alone) and len({tuple(answer) for answer in alone}) == len(states)
    together = list(zip(*(tokens(package, state) for state in states), strict=True))
    assert [list(answer) for answer in zip(*together, strict=True)] == alone


def test_no_more_are_loaded_than_allowed_and_one_that_went_comes_back(place: Place) -> None:
    opened = Package(place.package, threads=1, most_loaded=2)
    own = {name: logits(opened, name) for name in NAMES}
    assert list(opened._library._order) == ["a3=1.0", "a4=1.0"]
    np.testing.assert_array_equal(logits(opened, "a0"), own["a0"])
    assert list(opened._library._order) == ["a4=1.0", "a0=1.0"]
    logits(opened, "a4")
    opened.load("a1")
    assert list(opened._library._order) == ["a4=1.0", "a1=1.0"], "what was used last stays"
    np.testing.assert_array_equal(logits(opened, "a4"), own["a4"])
    opened.load(None)
    opened.close()


def test_files_of_sums_go_with_them(place: Place) -> None:
    opened = Package(place.package, threads=1, most_loaded=2)
    for weight in np.linspace(0.1, 0.9, 7):
        logits(opened, {"a0": float(weight), "a1": 1 - float(weight)})
    scratch = Path(opened._library._scratch.name)  # pyright: ignore[reportOptionalMemberAccess]
    assert len(list(scratch.iterdir())) == 2
    opened.load("a0")
    opened.load("a1")
    assert list(scratch.iterdir()) == []
    assert all((place.package / f"adapters/{name}.onnx_adapter").is_file() for name in NAMES)
    opened.close()
    assert not scratch.exists()


def test_an_adapter_is_not_taken_from_a_request_that_still_runs(place: Place) -> None:
    opened = Package(place.package, threads=1, most_loaded=1)
    expected = list(tokens(opened, "a0"))
    assert len(expected) == 12
    stream = tokens(opened, "a0")
    started = next(stream)
    for name in ("a1", {"a2": 0.5}, "a3"):
        logits(opened, name)
        assert "a0=1.0" in opened._library._order, "a running request holds it"
    assert [started, *stream] == expected
    del stream
    logits(opened, "a4")
    assert list(opened._library._order) == ["a4=1.0"], "and now it may go"
    assert list(tokens(opened, "a0")) == expected
    opened.close()


# What onnxruntime does not check ----------------------------------------------------------------------------------


@pytest.fixture
def copy(place: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.package, tmp_path / "copy"))


def change(folder: Path, how: Callable[[Tensors], Tensors], name: str = "a0") -> None:
    """Write an adapter's file anew, and seal the package: its hashes are right and its content is wrong."""
    file = folder / f"adapters/{name}.onnx_adapter"
    adapter_files.write_adapter(file, how(adapter_files.read_adapter(file)))
    artifact.seal(folder)


_LAYER = "1.down_proj"
_WRONG: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "transposed": ("is shaped", lambda t: {name: np.ascontiguousarray(value.T) for name, value in t.items()}),
    "one row too many": ("is shaped", lambda t: t | {_LAYER + A: np.zeros((129, 4), np.float32)}),
    "a vector": ("is shaped", lambda t: t | {_LAYER + A: np.zeros(128, np.float32)}),
    "ranks apart": ("A of rank 4 and B of rank 3", lambda t: t | {_LAYER + B: np.ascontiguousarray(t[_LAYER + B][:, :3])}),
    "half precision": ("is float16", lambda t: {name: value.astype(np.float16) for name, value in t.items()}),
    "double": ("is float64", lambda t: t | {_LAYER + A: t[_LAYER + A].astype(np.float64)}),
    "not a number": ("not finite", lambda t: t | {_LAYER + B: np.full_like(t[_LAYER + B], np.nan)}),
    "infinite": ("not finite", lambda t: t | {_LAYER + A: np.full_like(t[_LAYER + A], np.inf)}),
    "half a pair": ("has A without B", lambda t: {name: value for name, value in t.items() if name != _LAYER + B}),
    "the other half": ("has B without A", lambda t: {name: value for name, value in t.items() if name != _LAYER + A}),
    "another name": ("no input of the graph", lambda t: t | {"7.down_proj" + side: t[_LAYER + side] for side in (A, B)}),
    "nothing": ("holds no tensors", lambda t: {}),
}


@pytest.mark.parametrize("case", list(_WRONG))
def test_a_file_that_does_not_fit_is_refused_before_the_runtime_sees_it(copy: Path, case: str) -> None:
    said, how = _WRONG[case]
    change(copy, how)
    opened = Package(copy, threads=1)
    for ask in (logits, text, lambda package, name: next(package.runner(name).logits([IDS])), lambda package, name: package.load(name)):
        with pytest.raises(BadArtifact, match=said) as caught:
            ask(opened, "a0")
        assert "a0" in caught.value.message and caught.value.hint
    with pytest.raises(BadArtifact, match=said):
        logits(opened, {"a1": 0.5, "a0": 0.5})
    assert text(opened, "a1") and text(opened) is not None, "the others still answer"
    opened.close()


def test_an_adapter_of_another_base_is_refused(copy: Path) -> None:
    facts = artifact.load(copy).manifest.facts
    facts["adapters"]["a0"] |= {"base": "0" * 64}
    artifact.seal(copy, facts=facts)
    opened = Package(copy, threads=1)
    with pytest.raises(BadArtifact, match="was made for another base") as caught:
        logits(opened, "a0")
    assert "--remove a0" in caught.value.hint
    opened.close()


def test_a_file_that_was_changed_or_is_gone_is_refused_at_the_door(copy: Path) -> None:
    file = copy / "adapters/a0.onnx_adapter"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadArtifact, match="a0.onnx_adapter: content changed"):
        Package(copy)
    file.unlink()
    with pytest.raises(BadArtifact, match="a0.onnx_adapter: missing"):
        Package(copy)
    artifact.seal(copy)
    with pytest.raises(BadArtifact, match="a0.onnx_adapter is missing"):
        logits(Package(copy, threads=1), "a0")


_FUZZ = """
import random, sys
from pathlib import Path
import numpy as np
from slmops import artifact
from slmops.errors import BadArtifact
from slmops.runtime.package import Package

folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
file, rng = folder / "adapters/a3.onnx_adapter", random.Random(seed)
good = file.read_bytes()
structure = [place for place in range(len(good)) if good[place] <= 64 or place < 400]
words = [b"\\xff" * 4, bytes(4), b"\\xff\\xff\\xff\\x7f", b"\\0\\0\\0\\x80", b"\\1\\0\\0\\0"]
for number in range(count):
    content, kind = bytearray(good), rng.choice(["flip", "flip", "cut", "word", "more"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 3, 20])):
            content[rng.choice(structure)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "word":
        place = rng.choice(structure) & ~3
        content[place : place + 4] = rng.choice(words)
    else:
        place = rng.randrange(len(content))
        content[place:place] = bytes(rng.randrange(1, 9))
    file.write_bytes(content)
    artifact.seal(folder)
    package = Package(folder, threads=1)
    print(number, kind, end=" ", flush=True)
    try:
        package.runner("a3").runtime_logits([1, 280, 290])
        outcome = "ran"
    except BadArtifact as error:
        outcome = "refused"
    package.close()
    print(outcome, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_damaged_file_is_an_error_and_never_a_crash(copy: Path, seed: int) -> None:
    """Damage is aimed at the file's structure: in the numbers it only makes other numbers, which the hash would tell."""
    done = subprocess.run([sys.executable, "-c", _FUZZ, copy, str(seed), "60"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-200:], done.stderr[-2000:])
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert len(outcomes) == 60
    assert {outcome for _, kind, outcome in outcomes if kind == "cut"} == {"refused"}
    assert sum(outcome == "refused" for *_, outcome in outcomes) >= 30


def test_arrays_of_any_layout_are_written_as_they_are(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(96, 160)).astype(np.float32)
    tensors = {"strided": values[::2, ::3], "transposed": values.T, "reversed": values[::-1], "plain": values}
    adapter_files.write_adapter(tmp_path / "x.onnx_adapter", tensors)
    found = adapter_files.read_adapter(tmp_path / "x.onnx_adapter")
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# On a device ------------------------------------------------------------------------------------------------------

_DEVICE = """
import json, sys
for name in ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "onnx", "onnx_ir", "matplotlib", "pyarrow"):
    sys.modules[name] = None
import slmops
from slmops.runtime.package import Package
from slmops.cli import main

package = Package(sys.argv[1], threads=1)
states = [None, "a0", {"a0": 0.7, "a1": 0.3}]
texts = ["".join(package.generate("is it cold outside", adapter=state, max_new_tokens=12)) for state in states]
logits = [float(package.runner(state).next_logits([1, 280, 290])[7]) for state in states]
package.close()
verification = slmops.verify(sys.argv[1], self_test=True)
evaluated = slmops.evaluate(sys.argv[1], sys.argv[2], adapter=["a0"], prompt_template="{text}", completion_template="{intent}", predictions=sys.argv[3])
print(json.dumps([texts, logits, [stage.status for stage in verification.stages]]))
"""


def test_all_of_it_works_without_torch_and_transformers(place: Place, package: Package, tmp_path: Path) -> None:
    from tiny import write_rows

    rows = write_rows(tmp_path / "rows.jsonl")
    command = [sys.executable, "-c", _DEVICE, str(place.package), str(rows), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts, values, stages = json.loads(done.stdout.splitlines()[-1])
    states: list[Selection] = [None, "a0", {"a0": 0.7, "a1": 0.3}]
    assert texts == [text(package, state) for state in states]
    np.testing.assert_allclose(values, [package.runner(state).next_logits([1, 280, 290])[7] for state in states], rtol=1e-6)
    assert stages == ["pass", "pass"]
