"""One base and several adapters become one package; adapters come and go, and the base's files stay what they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_graph import nmse
from tiny import COMPLETION, PROMPT, ROWS, TEMPLATES, make_adapter, make_model, write_rows

import slmops
from slmops import artifact, hashes
from slmops.artifact import Artifact
from slmops.errors import BadArtifact, InvalidInput, SlmopsError, Unavailable
from slmops.graph.lora import A, B
from slmops.packing.assembling import named_adapters
from slmops.runtime import adapter_files
from slmops.runtime.package import Package

BASE_FILES = (
    "model.onnx",
    "model_adapters.onnx",
    "model_full.onnx",
    "model.onnx.data",
    "genai_config.json",
    "tokenizer.json",
    "self_test.json",
)
SHOUT = "say {text}:"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Place:
    """A base, two adapters of `finetune` with templates of their own, one of somebody else's, and a package of the first two."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = make_model(root / "base", learned=ROWS)
        rows = write_rows(root / "rows.jsonl")
        settings = {"validation": rows, "max_steps": 3, "lora_rank": 4, "learning_rate": 1e-2}
        self.intent = slmops.finetune(self.base, rows, out=root / "intent", **settings, **TEMPLATES).path
        templates = {"prompt_template": SHOUT, "completion_template": COMPLETION}
        self.shout = slmops.finetune(
            self.base, rows, out=root / "shout", **(settings | {"lora_rank": 2}), **templates, target_modules=["q_proj", "v_proj"]
        ).path
        self.foreign = make_adapter(root / "foreign", self.base, rank=3)
        self.package = slmops.pack(
            self.base, out=root / "package", precision="fp32", adapter=[f"intent={self.intent}", f"shout={self.shout}"]
        ).path

    def copy(self, name: str) -> Path:
        """Return a copy of the package beside it, so that its lineage is found."""
        return Path(shutil.copytree(self.package, self.root / name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("packing"))


@pytest.fixture
def package(place: Place, request: pytest.FixtureRequest) -> Iterator[Path]:
    copy = place.copy("copy")
    yield copy
    shutil.rmtree(copy)


def files_of(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != artifact.MANIFEST)
    return {str(file.relative_to(folder)): hashes.sha256_file(file) for file in files}


def content(folder: Path) -> Artifact:
    """Return a package once its hashes are checked, no file is unknown and every adapter runs."""
    found = artifact.load(folder)
    assert artifact.changed_files(found) == []
    assert set(files_of(folder)) == set(found.manifest.files)
    opened = Package(folder, threads=1)
    for name in (None, *opened.adapters):
        "".join(opened.generate("play some jazz", adapter=name, max_new_tokens=2, raw=True))
    opened.close()
    return found


# Made -------------------------------------------------------------------------------------------------------------


def test_a_package_says_what_is_in_it(place: Place) -> None:
    found = content(place.package)
    manifest, facts = found.manifest, found.manifest.facts
    assert (manifest.kind, manifest.command) == ("package", "pack")
    assert {item.role for item in manifest.inputs} == {"baseline", "adapter intent", "adapter shout"}
    assert found.find("adapter intent") == place.intent
    assert facts["base"] == hashes.fingerprint(place.base)
    assert len(facts["slots"]) == 10 and facts["slots"]["0.qkv_proj"] == [64, 128]
    intent, shout = facts["adapters"]["intent"], facts["adapters"]["shout"]
    assert (intent["ranks"], shout["ranks"], shout["targets"]) == ([4], [2], ["q_proj", "v_proj"])
    assert (intent["layers"], shout["layers"]) == (10, 2), "q and v are of one fused layer"
    assert shout["parameters"] == 2 * 2 * ((64 + 64) + (64 + 32))
    for name, held in facts["adapters"].items():
        own = artifact.load(place.root / name).manifest
        assert held["interface"] == own.interface, name
        assert held["size_bytes"] == (place.package / held["file"]).stat().st_size
    files = [file for file in place.package.rglob("*") if file.suffix in (".onnx", ".data", ".onnx_adapter")]
    assert facts["size_bytes"] == sum(file.stat().st_size for file in files)
    assert {*BASE_FILES, *(f"adapters/{name}{end}" for name in ("intent", "shout") for end in (".onnx_adapter", ".self_test.json"))} <= set(
        files_of(place.package)
    )
    assert json.loads((place.package / "genai_config.json").read_text())["model"]["decoder"]["filename"] == "model_adapters.onnx"
    assert manifest.warnings == []


def test_a_file_holds_what_peft_adds_and_no_more(place: Place) -> None:
    from safetensors.numpy import load_file

    tensors = adapter_files.read_adapter(place.package / "adapters/shout.onnx_adapter")
    stored = load_file(place.shout / "adapter_model.safetensors")
    config = json.loads((place.shout / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    layer, key = "1.qkv_proj", "base_model.model.model.layers.1.self_attn.%s.lora_%s.weight"
    product = tensors[layer + B] @ tensors[layer + A].T
    for part, rows in (("q_proj", slice(0, 64)), ("v_proj", slice(96, 128))):
        expected = scale * stored[key % (part, "B")] @ stored[key % (part, "A")]
        assert nmse(product[rows], expected) < 1e-12
    assert not product[64:96].any(), "k was not trained"
    assert tensors[layer + A].shape == (64, 4)


def test_an_adapter_is_asked_and_stopped_as_it_was_trained(place: Place) -> None:
    opened = Package(place.package, threads=1)
    assert opened.interface("intent").prompt_template == PROMPT
    assert opened.interface("shout").prompt_template == SHOUT
    assert opened.interface({"shout": 0.5, "intent": 0.5}).prompt_template == SHOUT
    assert opened.interface().prompt_template is None
    with pytest.raises(InvalidInput, match="has no adapter other") as caught:
        opened.interface("other")
    assert "intent, shout" in caught.value.hint
    opened.close()


def test_a_package_may_begin_without_adapters(place: Place, tmp_path: Path) -> None:
    empty = slmops.pack(place.base, out=tmp_path / "empty", precision="int4")
    assert content(empty.path).manifest.facts["adapters"] == {}
    with pytest.raises(InvalidInput, match="has no adapter intent"):
        "".join(slmops.generate(empty.path, "x", adapter=["intent"]))
    slmops.pack(empty.path, adapter=[f"intent={place.intent}"])
    assert list(content(empty.path).manifest.facts["adapters"]) == ["intent"]
    stage = slmops.verify(empty.path, self_test=True).stages[-1]
    assert (stage.name, stage.status, set(stage.figures)) == ("self_test", "pass", {"base", "intent"})


def test_an_adapter_of_somebody_elses_is_taken_with_a_warning(place: Place, package: Path) -> None:
    changed = slmops.pack(package, adapter=[f"foreign={place.foreign}"])
    assert changed.manifest.warnings == ["foreign: nothing says which base it was trained on; only its shapes were checked"]
    assert content(package).manifest.facts["adapters"]["foreign"]["interface"]["prompt_template"] is None
    assert slmops.pack(package, remove=["foreign"]).manifest.warnings == [], "the warning goes with it"


# Changed in place -------------------------------------------------------------------------------------------------


def test_adapters_come_and_go_and_the_base_is_not_touched(place: Place, package: Path) -> None:
    before = files_of(package)
    stamps = {name: (package / name).stat().st_mtime_ns for name in BASE_FILES}
    size = artifact.load(package).manifest.facts["size_bytes"]
    added = slmops.pack(package, adapter=[f"third={place.foreign}"])
    assert list(content(package).manifest.facts["adapters"]) == ["intent", "shout", "third"]
    after = files_of(package)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"adapters/third.onnx_adapter", "adapters/third.self_test.json"}
    assert added.manifest.facts["size_bytes"] == size + added.manifest.facts["adapters"]["third"]["size_bytes"]
    assert added.find("adapter third") == place.foreign
    slmops.pack(package, remove=["third", "intent"])
    found = content(package)
    assert list(found.manifest.facts["adapters"]) == ["shout"]
    assert {item.role for item in found.manifest.inputs} == {"baseline", "adapter shout"}
    assert set(files_of(package)) == {name for name in before if "intent" not in name}
    slmops.pack(package, remove=["shout"], adapter=[f"intent={place.intent}"])
    assert list(content(package).manifest.facts["adapters"]) == ["intent"]
    assert {name: (package / name).stat().st_mtime_ns for name in BASE_FILES} == stamps


def test_an_adapter_is_replaced_only_when_told_to(place: Place, package: Path) -> None:
    with pytest.raises(InvalidInput, match="has an adapter intent already") as caught:
        slmops.pack(package, adapter=[f"intent={place.foreign}"])
    assert "--force" in caught.value.hint
    old = adapter_files.read_adapter(package / "adapters/intent.onnx_adapter")
    for _ in range(2):
        slmops.pack(package, adapter=[f"intent={place.foreign}"], force=True)
        found = content(package)
        assert found.manifest.facts["adapters"]["intent"]["ranks"] == [3]
        assert found.find("adapter intent") == place.foreign
        assert sorted(item.role for item in found.manifest.inputs) == ["adapter intent", "adapter shout", "baseline"]
        assert len(list((package / "adapters").iterdir())) == 4
    new = Package(package, threads=1)
    assert new.runner("intent")._adapter.tensors(packed=False)["0.down_proj" + A].shape == (128, 3)  # pyright: ignore
    assert old["0.down_proj" + A].shape == (128, 4)
    new.close()


def test_a_name_that_a_role_has_too_takes_nothing_with_it(place: Place, package: Path) -> None:
    slmops.pack(package, adapter=[f"baseline={place.foreign}"])
    slmops.pack(package, remove=["baseline"])
    assert content(package).find("baseline") == place.base


@pytest.mark.parametrize(
    ("settings", "text", "kind"),
    [
        ({}, "nothing to do", InvalidInput),
        ({"adapter": ["intent"]}, "'intent' is not NAME=PATH", InvalidInput),
        ({"adapter": ["=x"]}, "is not NAME=PATH", InvalidInput),
        ({"adapter": ["../x=y"]}, "is not NAME=PATH", InvalidInput),
        ({"adapter": ["base=y"]}, "what the package without an adapter is called", InvalidInput),
        ({"adapter": ["x=a", "x=b"]}, "the name x is given twice", InvalidInput),
        ({"remove": ["other"]}, "has no adapter other", InvalidInput),
        ({"adapter": ["x=FOREIGN"], "out": "OUT"}, "is a package, which is changed in place", InvalidInput),
        ({"adapter": ["x=ROOT/nowhere"]}, "nowhere", BadArtifact),
        ({"adapter": ["x=BASE"]}, "has no adapter_config.json", BadArtifact),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    place: Place, package: Path, settings: dict[str, Any], text: str, kind: type[SlmopsError]
) -> None:
    before = files_of(package), (package / artifact.MANIFEST).read_bytes()
    words = {"FOREIGN": place.foreign, "OUT": place.root / "out", "ROOT": place.root, "BASE": place.base}

    def put(value: Any) -> Any:
        for word, path in words.items():
            value = value.replace(word, str(path)) if isinstance(value, str) else [put(one) for one in value]
        return value

    with pytest.raises(kind, match=text) as caught:
        slmops.pack(package, **{key: put(value) for key, value in settings.items()})
    assert caught.value.hint
    assert (files_of(package), (package / artifact.MANIFEST).read_bytes()) == before


def test_names_are_file_names() -> None:
    assert named_adapters(["a.b-c_1=x=y", "B=z"]) == {"a.b-c_1": Path("x=y"), "B": Path("z")}
    assert named_adapters(None) == {}


def test_settings_of_making_and_of_changing_are_told_apart(place: Place, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nothing says where the package goes"):
        slmops.pack(place.base, adapter=[f"x={place.foreign}"])
    with pytest.raises(InvalidInput, match="is not a package"):
        slmops.pack(place.base, out=tmp_path / "out", remove=["x"])
    with pytest.raises(BadArtifact, match="not empty"):
        slmops.pack(place.base, out=place.package)
    with pytest.raises(BadArtifact, match="is an adapter, and a model is needed"):
        slmops.pack(place.intent, out=tmp_path / "out")
    with pytest.raises(BadArtifact):
        slmops.pack(tmp_path / "nowhere", out=tmp_path / "out")


# What does not belong ---------------------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(place: Place, package: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    rows = write_rows(tmp_path / "rows.jsonl")
    adapter = slmops.finetune(other, rows, out=tmp_path / "adapter", max_steps=1, lora_rank=2, **TEMPLATES).path
    before = files_of(package)
    with pytest.raises(BadArtifact, match="was trained on another base") as caught:
        slmops.pack(package, adapter=[f"x={adapter}"])
    assert caught.value.exit_code == 4
    with pytest.raises(BadArtifact, match="was trained on another base"):
        slmops.pack(place.base, out=tmp_path / "out", adapter=[f"x={adapter}"])
    wide = make_adapter(tmp_path / "wide", make_model(tmp_path / "wide base", hidden_size=128))
    with pytest.raises(BadArtifact, match=r"and the base's is \("):
        slmops.pack(package, adapter=[f"x={place.foreign}", f"wide={wide}"])
    assert files_of(package) == before, "what was written before the refusal is gone"
    assert not (tmp_path / "out").exists()


def test_what_was_changed_since_is_refused(place: Place, package: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place.intent, place.root / "changed"))
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + " ")
    with pytest.raises(BadArtifact, match="adapter_config.json: "):
        slmops.pack(package, adapter=[f"x={adapter}"])
    shutil.rmtree(adapter)
    with (package / "model.onnx").open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(BadArtifact, match="model.onnx: "):
        slmops.pack(package, adapter=[f"x={place.foreign}"])


def test_a_package_whose_base_is_gone_still_gives_adapters_up(place: Place, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(place.package, tmp_path / "deep" / "er" / "package"))
    with pytest.raises(BadArtifact, match="the base model of .* is no longer at"):
        slmops.pack(alone, adapter=[f"x={place.foreign}"])
    slmops.pack(alone, remove=["shout"])
    assert list(content(alone).manifest.facts["adapters"]) == ["intent"]


def test_adapters_that_end_otherwise_do_not_share_a_package(place: Place, package: Path, tmp_path: Path) -> None:
    """The runtime has one set of stop tokens, whatever adapter is on."""
    rows = place.root / "rows.jsonl"
    ends = slmops.finetune(place.base, rows, out=place.root / "ends", max_steps=1, lora_rank=2, stop_token="<s>", **TEMPLATES).path
    assert artifact.load(ends).manifest.interface["stop_token_ids"] == [1]  # pyright: ignore[reportOptionalSubscript]
    with pytest.raises(InvalidInput, match="the adapters share no stop token") as caught:
        slmops.pack(place.base, out=tmp_path / "out", adapter=[f"intent={place.intent}", f"ends={ends}"])
    assert caught.value.exit_code == 2 and "--stop-token" in caught.value.hint
    with pytest.raises(InvalidInput, match=r"ends stops at \[1\], and the package's runtime at \[2\]"):
        slmops.pack(package, adapter=[f"ends={ends}"])
    shutil.rmtree(ends)


# A Llama has no biases to merge one into; what a random initialization took out of the base is lost.
_NOWHERE = ("its B has a bias", "a part out of the base that nobody can tell again")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "its B has a bias"),
        ({"bias": "all"}, "biases of the base"),
        ({"modules_to_save": ["lm_head"]}, "whole layers of its own"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        ({"init_lora_weights": "pissa"}, "takes a part out of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "a part out of the base that nobody can tell again"),
        ({"trainable_token_indices": [5]}, "rows of the embedding"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_pairs_cannot_carry_is_refused_with_the_way_out(
    place: Place, package: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(**({"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings))
    get_peft_model(AutoModelForCausalLM.from_pretrained(place.base), config).save_pretrained(tmp_path / "adapter")
    before = files_of(package)
    with pytest.raises(Unavailable, match=reason) as caught:
        slmops.pack(package, adapter=[f"x={tmp_path / 'adapter'}"])
    assert caught.value.exit_code == 3
    assert ("slmops merge" in caught.value.hint) == (reason not in _NOWHERE)
    assert files_of(package) == before


def test_a_setting_of_a_newer_peft_is_not_taken_for_harmless(place: Place, package: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(place.foreign, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_marvel": {"strength": 2}}))
    with pytest.raises(Unavailable, match="use_marvel is .*, which slmops does not know"):
        slmops.pack(package, adapter=[f"x={adapter}"])
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_marvel": None}))
    slmops.pack(package, adapter=[f"x={adapter}"])


# Interrupted ------------------------------------------------------------------------------------------------------

_KILLED = """
import os, sys
from slmops import artifact
from slmops.packing import inclusion
from slmops.runtime import adapter_files
from slmops.verification import self_test
import slmops
place, adapter, package = {place}, sys.argv[1], sys.argv[2]
setattr(place[0], place[1], lambda *a, **k: os._exit(9))
slmops.pack(package, adapter=["intent=" + adapter, "new=" + adapter], remove=["shout"], force=True)
"""
_PLACES = {
    "before the first file": '(adapter_files, "write_adapter")',
    "before the self-test": '(self_test, "record")',
    "before the manifest": '(artifact, "seal")',
    "after the manifest": '(__import__("pathlib").Path, "unlink")',
}


@pytest.mark.slow
@pytest.mark.parametrize("point", list(_PLACES))
def test_a_change_that_is_killed_leaves_a_package_that_works(place: Place, package: Path, point: str) -> None:
    before = (package / artifact.MANIFEST).read_bytes()
    program = _KILLED.format(place=_PLACES[point])
    done = subprocess.run([sys.executable, "-c", program, place.foreign, package], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert ((package / artifact.MANIFEST).read_bytes() == before) == (point != "after the manifest")
    found = artifact.load(package)
    assert artifact.changed_files(found) == []
    opened = Package(package, threads=1)
    for name in opened.adapters:
        "".join(opened.generate("play", adapter=name, max_new_tokens=2))
    opened.close()
    assert slmops.verify(package, self_test=True).failed_stage is None
    # And the next change takes away what was left.
    slmops.pack(package, adapter=[f"intent={place.intent}"], force=True)
    names = set(content(package).manifest.facts["adapters"])
    assert names == ({"intent", "new"} if point == "after the manifest" else {"intent", "shout"})


def test_a_change_that_fails_leaves_nothing_behind(place: Place, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmops.verification import self_test

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = files_of(package), (package / artifact.MANIFEST).read_bytes()
    monkeypatch.setattr(self_test, "record", fails)
    with pytest.raises(KeyboardInterrupt):
        slmops.pack(package, adapter=[f"intent={place.foreign}", f"new={place.foreign}"], force=True)
    assert (files_of(package), (package / artifact.MANIFEST).read_bytes()) == before


def test_an_export_is_packed_as_it_is(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    export = slmops.export(base, out=tmp_path / "export", precision="int4", block_size=16).path
    adapter = make_adapter(tmp_path / "adapter", base)
    package = slmops.pack(export, adapter=[f"a={adapter}"], out=tmp_path / "package").path
    assert (package / "model.onnx.data").read_bytes() == (export / "model.onnx.data").read_bytes()
    facts = artifact.load(package).manifest.facts
    assert facts["recipe"] == artifact.load(export).manifest.facts["recipe"] and list(facts["adapters"]) == ["a"]
    with pytest.raises(InvalidInput, match="precision: .* has int4, and fp32 was asked for"):
        slmops.pack(export, precision="fp32", out=tmp_path / "other")
    with pytest.raises(InvalidInput, match="block_size: .* has 16, and 32 was asked for"):
        slmops.pack(export, block_size=32, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
