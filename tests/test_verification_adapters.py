"""Each adapter of a package is proven by itself, and a package proves on a device that it is what it was made to be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny import ROWS, make_adapter, make_model, write_rows

import slmops
from slmops import artifact
from slmops.errors import InvalidInput
from slmops.graph.lora import A, B
from slmops.runtime import adapter_files
from slmops.verification.self_test import FILE

sys.path.insert(0, str(ROOT / "benchmarks"))

from adapter_faults import FAULTS, Fault, found_in, is_found  # noqa: E402  # pyright: ignore[reportMissingImports]

# A second task on the same texts: the base's answers, but each another one.
_ROOMS = {"music": "light", "weather": "music", "light": "weather"}
OTHER = [row | {"room": _ROOMS[row["intent"]]} for row in ROWS]


class Place:
    """A base that knows one task, adapters that learned two others, and packages of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_model(root / "base", learned=ROWS)
        rows = write_rows(root / "rows.jsonl", OTHER)
        settings = {"validation": rows, "epochs": 40, "learning_rate": 1e-2, "batch_size": 8, "lora_rank": 4}
        for name, template in (("room", "{text}\nRoom:"), ("place", "{text} in")):
            slmops.finetune(
                self.base, rows, out=root / name, prompt_template=template, completion_template=" {room}", seed=len(name), **settings
            )
        self.rows, self.package = rows, self.pack("fp32")

    def pack(self, precision: str) -> Path:
        named = [f"{name}={self.root / name}" for name in ("room", "place")]
        return slmops.pack(self.base, out=self.root / precision, precision=precision, adapter=named).path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Place(tmp_path_factory.mktemp("proof"))
    torch.set_num_threads(threads)


@pytest.fixture
def copy(place: Place) -> Iterator[Path]:
    folder = Path(shutil.copytree(place.package, place.root / "copy"))
    yield folder
    shutil.rmtree(folder)


def stage_of(package: Path, name: str, **settings: Any) -> Any:
    verification = slmops.verify(package, threads=1, **settings)
    assert verification.failed_stage in (None, name), [stage for stage in verification.stages if stage.status == "fail"]
    return next(stage for stage in verification.stages if stage.name == name)


# The proof --------------------------------------------------------------------------------------------------------


def test_a_good_package_passes_and_every_figure_is_there(place: Place) -> None:
    verification = slmops.verify(place.package, threads=1)
    assert verification.failed_stage is None, verification.stages
    stage = next(stage for stage in verification.stages if stage.name == "adapters")
    assert set(stage.figures) == {"room", "place", "cross_talk"}
    for name in ("room", "place"):
        figures = stage.figures[name]
        assert set(figures) >= {"origin", "tensors", "template", "stop_tokens", "runtime", "logits", "effect", "text"}
        assert figures["tensors"]["difference"] <= 1e-6 and figures["tensors"]["scale"] == pytest.approx(1, abs=1e-6)
        assert figures["runtime"]["largest_difference"] <= 1e-3
        assert figures["logits"]["nmse"] <= 1e-10
    assert stage.figures["cross_talk"] == {"switches": 55, "changed": [], "states_alike": 0, "base_moved": pytest.approx(0, abs=1e-3)}


def test_one_adapter_alone_is_proven_with_rows_of_its_own(place: Place) -> None:
    stage = stage_of(place.package, "adapters", adapter=["room"], data=[f"room={place.rows}"], metric="exact_match")
    assert set(stage.figures) == {"room", "cross_talk"}
    assert stage.figures["room"]["text"]["rows"] == len(OTHER)
    twice = stage_of(place.package, "adapters", adapter=["room", "room"])
    assert twice.figures["cross_talk"]["states_alike"] == 0, "named twice it is not alike to itself"


def test_rows_without_a_name_are_for_the_only_one_that_is_proven(place: Place) -> None:
    stage = stage_of(place.package, "adapters", adapter=["place"], data=[str(place.rows)])
    assert stage.figures["place"]["text"]["rows"] == len(OTHER)
    with pytest.raises(InvalidInput, match="which adapter are the rows of .*rows.jsonl for") as caught:
        slmops.verify(place.package, data=[str(place.rows)])
    assert "--data room=" in caught.value.hint and caught.value.exit_code == 2


def test_an_adapter_that_is_not_there_is_no_failed_proof(place: Place) -> None:
    for settings in ({}, {"self_test": True}):
        with pytest.raises(InvalidInput, match="has no adapter other") as caught:
            slmops.verify(place.package, adapter=["other"], **settings)
        assert "room, place" in caught.value.hint


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_by_name(place: Place, fault: Fault) -> None:
    found = found_in(place.package, "room", fault, place.root / "faulty", None, "--threads", "1")
    assert is_found(found, fault, "room"), (found.exit_code, found.failed_stage, found.explanation)


def test_nothing_is_found_in_a_copy_without_a_fault(place: Place) -> None:
    found = found_in(place.package, "room", None, place.root / "faulty", None, "--threads", "1")
    assert (found.exit_code, found.failed_stage) == (0, None), found.explanation


def test_an_adapter_that_was_changed_or_is_gone_since_is_found(place: Place, copy: Path) -> None:
    from adapter_faults import _point_at  # pyright: ignore[reportMissingImports]

    other = Path(shutil.copytree(place.root / "room", place.root / "moved"))
    _point_at(copy, "room", other)
    (other / "adapter_config.json").write_text((other / "adapter_config.json").read_text() + " ")
    assert "was changed since" in stage_of(copy, "adapters", adapter=["room"]).explanation
    shutil.rmtree(other)
    assert "room: the adapter that was packed is no longer at" in stage_of(copy, "adapters", adapter=["room"]).explanation


def test_an_adapter_of_somebody_elses_without_rows_is_proven_as_far_as_that_goes(place: Place, copy: Path) -> None:
    make_adapter(place.root / "foreign", place.base)
    slmops.pack(copy, adapter=[f"foreign={place.root / 'foreign'}"])
    stage = stage_of(copy, "adapters", adapter=["foreign"])
    assert stage.status == "inconclusive"
    assert "no held-out rows are known" in stage.explanation
    tensors = adapter_files.read_adapter(copy / "adapters/foreign.onnx_adapter")
    half = {name: value * np.float32(0.5) if name.endswith(B) else value for name, value in tensors.items()}
    adapter_files.write_adapter(copy / "adapters/foreign.onnx_adapter", half)
    artifact.seal(copy)
    assert "scaled by 0.5" in stage_of(copy, "adapters", adapter=["foreign"]).explanation, "but its tensors are"


# The self-test ----------------------------------------------------------------------------------------------------


def self_test(package: Path, **settings: Any) -> Any:
    verification = slmops.verify(package, self_test=True, threads=1, **settings)
    assert [stage.name for stage in verification.stages] == ["files", "self_test"]
    assert verification.stages[0].status == "pass"
    return verification.stages[1]


def test_the_self_test_passes_and_says_what_it_ran(place: Place) -> None:
    stage = self_test(place.package)
    assert (stage.status, set(stage.figures)) == ("pass", {"base", "room", "place"})
    assert stage.figures["room"]["cases"] == 4 and stage.figures["room"]["largest_difference"] <= 1e-4
    assert set(self_test(place.package, adapter=["room"]).figures) == {"room"}


def test_the_self_test_asks_rows_of_the_adapters_own(place: Place) -> None:
    from slmops.data import Tokenizer

    content = json.loads((place.package / "adapters/room.self_test.json").read_text())
    tokenizer = Tokenizer.load(place.package)
    prompts = [tokenizer.decode(case["prompt"]) for case in content["cases"]]
    assert all(prompt.endswith("\nRoom:") for prompt in prompts)
    answers = {tokenizer.decode(case["tokens"]).strip() for case in content["cases"]}
    assert answers <= set(_ROOMS) and len(answers) > 1, answers
    for case in content["cases"]:
        assert len(case["logits"]) == 5 and len(case["margins"]) >= len(case["tokens"])


def _zero(folder: Path) -> None:
    file = folder / "adapters/room.onnx_adapter"
    tensors = adapter_files.read_adapter(file)
    adapter_files.write_adapter(file, {name: value * 0 for name, value in tensors.items()})


def _swap(folder: Path) -> None:
    one, two = (folder / f"adapters/{name}.onnx_adapter" for name in ("room", "place"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def _other_stop(folder: Path) -> None:
    facts = artifact.load(folder).manifest.facts
    facts["adapters"]["room"]["interface"]["stop_token_ids"] = [280]
    artifact.seal(folder, facts=facts)


def _runtime_stop(folder: Path) -> None:
    """The runtime ends at the first token of an answer, whatever slmops says."""
    config = json.loads((folder / "genai_config.json").read_text())
    content = json.loads((folder / "adapters/room.self_test.json").read_text())
    config["model"]["eos_token_id"] = content["cases"][0]["tokens"][0]
    (folder / "genai_config.json").write_text(json.dumps(config))


def _broken(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        file = folder / "adapters/room.self_test.json"
        content = json.loads(file.read_text())
        changed = change(content)
        file.write_text(changed if isinstance(changed, str) else json.dumps(content))

    return plant


_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "zeroed": (_zero, "room: prompt 1: a logit differs by"),
    "swapped": (_swap, "room: prompt 1: a logit differs by"),
    "another stop token": (_other_stop, r"room: prompt 1: the answer stops at \[280\], and \[2\] were recorded"),
    "another stop token in the runtime": (_runtime_stop, "room: prompt 1: token 2 of the answer is another one"),
    "a file that does not fit": (lambda folder: _without_b(folder), "room: the adapter room does not fit the graph: .* has A without B"),
    "no prompts": (_broken(lambda content: content["cases"].clear()), "room: its self-test has no prompts"),
    "no JSON": (_broken(lambda content: "{"), "room: its self-test cannot be run"),
    "a token that is none": (_broken(lambda content: content["cases"][0]["prompt"].append(99999)), "room: its self-test cannot be run"),
    "a logit that is none": (_broken(lambda content: content["cases"][0]["logits"].update({"99999": 0.0})), "room: its self-test cannot be run"),
    "gone": (lambda folder: (folder / "adapters/room.self_test.json").unlink(), "room: its self-test cannot be run"),
}  # fmt: skip


def _without_b(folder: Path) -> None:
    file = folder / "adapters/room.onnx_adapter"
    adapter_files.write_adapter(file, {name: value for name, value in adapter_files.read_adapter(file).items() if name.endswith(A)})


@pytest.mark.parametrize("case", list(_DAMAGE))
def test_the_self_test_finds(copy: Path, case: str) -> None:
    import re

    plant, said = _DAMAGE[case]
    plant(copy)
    artifact.seal(copy)
    stage = self_test(copy)
    assert stage.status == "fail" and re.search(said, stage.explanation), stage.explanation
    assert "base:" not in stage.explanation
    if case not in ("swapped", "another stop token in the runtime"):
        assert self_test(copy, adapter=["place"]).status == "pass"


def test_a_package_without_a_self_test_says_so(copy: Path) -> None:
    (copy / FILE).unlink()
    artifact.seal(copy)
    assert self_test(copy).status == "skipped"


_DEVICE = """
import sys
for name in ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "onnx", "onnx_ir", "matplotlib", "pyarrow"):
    sys.modules[name] = None
from slmops.cli import main
main(["verify", sys.argv[1], "--self-test", "--json"])
"""


def test_the_self_test_needs_neither_torch_nor_data_nor_lineage(copy: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(copy, tmp_path / "far" / "away")
    done = subprocess.run([sys.executable, "-c", _DEVICE, alone], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    _swap(alone)
    artifact.seal(alone)
    done = subprocess.run([sys.executable, "-c", _DEVICE, alone], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["failed_stage"] == "self_test"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_package_passes_and_a_lost_adapter_is_found(place: Place, precision: str) -> None:
    package = place.pack(precision)
    assert self_test(package).status == "pass"
    stage = stage_of(package, "adapters")
    assert stage.status != "fail", stage.explanation
    for fault in FAULTS[:3]:
        found = found_in(package, "room", fault, place.root / "faulty", None, "--threads", "1")
        assert is_found(found, fault, "room"), (fault.name, found.explanation)
    _zero(package)
    artifact.seal(package)
    assert self_test(package).status == "fail"
