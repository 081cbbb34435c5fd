"""An adapter trained on a package's weights learns on exactly those, and everything that loads it later uses the same."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from tiny import ROWS, TEMPLATES, make_export, make_model, write_rows

import slmops
from slmops import artifact, progress
from slmops.data import Interface, Tokenizer, encode_rows
from slmops.errors import BadArtifact, InvalidInput, SlmopsError, Unavailable
from slmops.graph import checking
from slmops.graph.linears import hugging_face_weights, linears, load_graph, quantized
from slmops.graph.rewriting import DATA, FULL
from slmops.pipeline.plan import read_plan
from slmops.runtime import hugging_face, loading, quantized_base
from slmops.training import methods

IDS = [1, 40, 41, 300, 7, 9, 2, 11]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model is faster on one thread, and far faster where other processes use the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("quantized") / "base")


@pytest.fixture(scope="module")
def package(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("packages") / "int4", base, "int4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def trained(base: Path, package: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(base, rows, tmp_path_factory.mktemp("trained") / "adapter", package).path


def finetune(base: Path, rows: Path, out: Path, package: Path | None, **overrides: Any) -> artifact.Artifact:
    settings = {**TEMPLATES, "validation": rows, "learning_rate": 3e-3, "batch_size": 4, "max_steps": 6, "lora_rank": 4}
    return slmops.finetune(base, rows, out=out, quantized_base=package, **(settings | overrides))


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def grid(package: Path, base: Path) -> dict[str, np.ndarray]:
    """The package's weights, read from its graph."""
    return hugging_face_weights(load_graph(package / FULL), hugging_face.parameter_shapes(base))


def dequantized(package: Path, base: Path) -> Any:
    """The model of transformers with the package's weights written over its own, by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = model.state_dict()
    for name, value in grid(package, base).items():
        state[name].copy_(torch.from_numpy(value.copy()))
    return model.eval()


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


# Weights -----------------------------------------------------------------------------------------------------------


def assert_frozen_base(base: Path, package: Path, tied: bool) -> None:
    """Every matrix is the package's to the last bit, every vector the model's own, and nothing of it is trained."""
    from slmops.config import MethodSettings

    expected, before = grid(package, base), hugging_face.load_model(base).state_dict()
    found = quantized_base.find_quantized_base(package, base)
    model: Any = methods.load_base(base, quantized=False, precision="auto", package=found)
    adapted: Any = methods.attach_adapter(model, MethodSettings())
    own = {name.replace(".base_layer", ""): weight for name, weight in adapted.get_base_model().named_parameters() if "lora_" not in name}
    matrices = {name for name, weight in own.items() if weight.dim() == 2}
    assert matrices == set(expected)
    for name, weight in own.items():
        assert not weight.requires_grad, name
        np.testing.assert_array_equal(weight.numpy(), expected[name] if name in matrices else before[name].numpy(), err_msg=name)
    assert max(np.abs(expected[name] - before[name].numpy()).max() for name in matrices) > 1e-3, "the package is not quantized at all"
    head, table = adapted.get_output_embeddings().weight, adapted.get_input_embeddings().weight
    assert (head is table) == tied


def test_the_frozen_base_is_the_package_to_the_last_bit(base: Path, package: Path) -> None:
    assert_frozen_base(base, package, tied=True)


@pytest.mark.slow
def test_an_untied_head_and_embedding_are_each_their_own(tmp_path: Path) -> None:
    base = make_model(tmp_path / "untied", tie_word_embeddings=False)
    package = make_export(tmp_path / "int4", base, "int4")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(grid(package, base))
    assert_frozen_base(base, package, tied=False)


def test_a_matrix_that_is_missing_or_of_another_shape_is_refused(base: Path, package: Path) -> None:
    model, values = hugging_face.load_model(base), grid(package, base)
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(BadArtifact, match=f"{name} is not among them"):
        quantized_base.put_weights(model, {key: value for key, value in values.items() if key != name})
    with pytest.raises(BadArtifact, match=f"{name} is of another shape"):
        quantized_base.put_weights(model, values | {name: values[name].T})


def test_the_hash_is_of_the_weights_and_not_of_the_file_that_holds_them(base: Path, package: Path, tmp_path: Path) -> None:
    import onnx_ir

    found = quantized_base.find_quantized_base(package, base)
    graph = load_graph(package / FULL)
    initializers = list(graph.graph.initializers.values())
    graph.graph.initializers.clear()
    for value in reversed(initializers):
        graph.graph.initializers[value.name] = value
    onnx_ir.save(graph, tmp_path / FULL, external_data=DATA)
    assert (tmp_path / DATA).read_bytes() != (package / DATA).read_bytes()
    values = quantized_base.read_weights(tmp_path, base)
    assert quantized_base.weights_hash(values) == found.sha256
    changed = {name: value.copy() for name, value in values.items()}
    changed["model.layers.0.mlp.up_proj.weight"][3, 5] += 1e-7
    assert quantized_base.weights_hash(changed) != found.sha256


# Runs --------------------------------------------------------------------------------------------------------------


def test_the_manifest_says_which_weights_and_a_seed_gives_one_adapter(
    base: Path, package: Path, rows: Path, trained: Path, tmp_path: Path
) -> None:
    manifest = artifact.load(trained).manifest
    recorded, facts = manifest.input("quantized_base"), manifest.facts["quantized_base"]
    assert recorded is not None
    assert recorded.sha256 == quantized_base.weights_hash(grid(package, base))
    assert artifact.load(trained).find("quantized_base") == package
    assert (facts["kind"], facts["precision"], facts["block_size"]) == ("export", "int4", None)
    assert facts["recipe"] == artifact.load(package).manifest.facts["recipe"]
    again = finetune(base, rows, tmp_path / "again", package)
    assert adapter_bytes(again.path) == adapter_bytes(trained)
    alone = finetune(base, rows, tmp_path / "alone", None)
    assert adapter_bytes(alone.path) != adapter_bytes(trained)
    assert alone.manifest.input("quantized_base") is None
    assert "quantized_base" not in alone.manifest.facts


def test_a_package_is_taken_like_the_export_that_it_was_made_of(
    base: Path, package: Path, rows: Path, trained: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "package"
    shutil.copytree(package, copy)
    artifact.seal(copy, kind="package")
    made = finetune(base, rows, tmp_path / "out", copy)
    assert adapter_bytes(made.path) == adapter_bytes(trained)
    assert made.manifest.facts["quantized_base"]["kind"] == "package"
    assert made.manifest.input("quantized_base").sha256 == artifact.load(trained).manifest.input("quantized_base").sha256  # type: ignore[union-attr]


def test_the_validation_loss_is_that_of_the_adapter_on_the_dequantized_base(base: Path, package: Path, trained: Path) -> None:
    """Written out with transformers and PEFT alone, and then as slmops loads it: the same logits to the last bit."""
    import torch
    from peft import PeftModel

    found = artifact.load(trained)
    by_hand = PeftModel.from_pretrained(dequantized(package, base), trained).eval()
    total, count = 0.0, 0
    for sequence in encode_rows(ROWS, Tokenizer.load(base), Interface.model_validate(found.manifest.interface)).sequences:
        with torch.no_grad():
            scores = by_hand(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        for position in range(1, len(sequence.ids)):
            if sequence.labels[position] != -100:
                total, count = total - float(scores[position - 1, sequence.labels[position]]), count + 1
    assert total / count == pytest.approx(found.manifest.metrics["validation_loss"]["value"], abs=1e-5)
    expected = logits(by_hand)
    np.testing.assert_array_equal(logits(hugging_face.load_adapted(base, trained)), expected)
    float_base = PeftModel.from_pretrained(hugging_face.load_model(base), trained).eval()
    assert np.abs(logits(float_base) - expected).max() > 1e-2, "the test could not tell the two bases apart"


def test_every_runner_of_the_adapter_has_the_same_base(base: Path, package: Path, trained: Path) -> None:
    from peft import PeftModel

    runner = loading.open_runner(trained)
    expected = logits(PeftModel.from_pretrained(dequantized(package, base), trained).eval())
    np.testing.assert_array_equal(next(runner.logits([IDS])), expected)
    alone = loading.open_runner(trained, base_only=True)
    np.testing.assert_array_equal(next(alone.logits([IDS])), logits(dequantized(package, base)))


def test_evaluate_and_its_base_are_measured_on_the_packages_weights(base: Path, trained: Path, rows: Path, tmp_path: Path) -> None:
    """The trained stop token, answers and perplexity come from base + adapter as it was trained."""
    found = artifact.load(trained)
    measured = slmops.evaluate(trained, rows, metric="perplexity", predictions=tmp_path / "p.jsonl")
    assert np.log(measured.metrics["perplexity"].value) == pytest.approx(found.manifest.metrics["validation_loss"]["value"], abs=1e-5)


def test_a_stopped_run_goes_on_and_only_on_the_same_weights(base: Path, package: Path, rows: Path, tmp_path: Path) -> None:
    from test_training import Stopper

    settings: dict[str, Any] = {"max_steps": 12, "lora_dropout": 0.1, "checkpoints": 4}
    whole = finetune(base, rows, tmp_path / "whole", package, **settings)
    with progress.watch(Stopper(7)), pytest.raises(KeyboardInterrupt):
        finetune(base, rows, tmp_path / "out", package, **settings)
    with pytest.raises(InvalidInput, match="quantized_base: None, was"):
        finetune(base, rows, tmp_path / "out", None, resume=True, **settings)
    moved = tmp_path / "moved"
    shutil.copytree(package, moved)  # the same weights at another place are the same run
    resumed = finetune(base, rows, tmp_path / "out", moved, resume=True, **settings)
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    assert resumed.manifest.metrics == whole.manifest.metrics


def test_a_pipeline_names_the_step_that_makes_the_base(base: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "road.yaml"
    steps = {"coarse": {"verb": "export", "use": "model", "block_size": 64}, "finetune": {"quantized_base": "coarse", **TEMPLATES}}
    file.write_text(json.dumps({"model": str(base), "data": str(rows), "steps": steps}))
    plan = read_plan(file)
    assert plan.steps[1].needs == ("coarse",)


# What cannot be ---------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(base: Path, package: Path, rows: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter and the export that it was trained on, both to be spoiled."""
    copy = tmp_path / "int4"
    shutil.copytree(package, copy)
    return finetune(base, rows, tmp_path / "adapter", copy, max_steps=1).path, copy


@pytest.mark.slow
def test_a_base_that_is_gone_or_other_is_refused_and_the_hint_brings_it_back(
    base: Path, rows: Path, moved: tuple[Path, Path], tmp_path: Path
) -> None:
    from slmops.cli import main

    adapter, package = moved
    expected = logits(hugging_face.load_adapted(base, adapter))
    shutil.rmtree(package)
    with pytest.raises(BadArtifact, match="no longer there") as caught:
        slmops.evaluate(adapter, rows)
    make_export(package, base, "int4", block_size=16)
    with pytest.raises(BadArtifact, match="their hash differs") as other:
        slmops.evaluate(adapter, rows)
    assert other.value.hint == caught.value.hint
    shutil.rmtree(package)
    words = shlex.split(caught.value.hint.split(": ", 1)[1])
    assert words[:2] == ["slmops", "export"]
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--quiet"])
    assert not ended.value.code
    np.testing.assert_array_equal(logits(hugging_face.load_adapted(base, adapter)), expected)


def test_an_adapter_whose_base_is_gone_says_how_to_make_it_again(base: Path, moved: tuple[Path, Path]) -> None:
    adapter, package = moved
    shutil.rmtree(package)
    with pytest.raises(BadArtifact, match="no longer there") as caught:
        loading.open_runner(adapter)
    assert caught.value.exit_code == 4
    assert f"slmops export {base} -o {package} --precision int4" in caught.value.hint


def refused(base: Path, rows: Path, out: Path, package: Path, error: type[SlmopsError], text: str, **settings: Any) -> SlmopsError:
    with pytest.raises(error, match=text) as caught:
        finetune(base, rows, out, package, **settings)
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert not out.exists()
    assert not artifact.partial_folder(out).exists()
    return caught.value


def test_what_is_no_package_of_this_model_is_refused(base: Path, package: Path, rows: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refused(base, rows, out, tmp_path / "gone", BadArtifact, "no such folder").exit_code == 4
    refused(base, rows, out, base, BadArtifact, "has no slmops.json")
    refused(base, rows, out, trained, BadArtifact, "is an adapter, and an export or a package is needed")
    other = make_model(tmp_path / "other", seed=1)
    error = refused(other, rows, out, package, BadArtifact, "was not made of .*other")
    assert f"slmops export {other}" in error.hint
    damaged = tmp_path / "damaged"
    shutil.copytree(package, damaged)
    content = bytearray((damaged / DATA).read_bytes())
    content[1000] ^= 1
    (damaged / DATA).write_bytes(content)
    refused(base, rows, out, damaged, BadArtifact, f"{DATA}: content changed")


def test_a_second_quantized_base_is_a_contradiction(base: Path, package: Path, rows: Path, tmp_path: Path) -> None:
    error = refused(base, rows, tmp_path / "out", package, InvalidInput, "qlora would put another in its place", method="qlora")
    assert error.exit_code == 2


def test_olive_cannot_train_on_other_weights(base: Path, package: Path, rows: Path, tmp_path: Path) -> None:
    assert refused(base, rows, tmp_path / "out", package, Unavailable, "Olive's pass loads the model", engine="olive").exit_code == 3


def test_a_machine_that_cannot_read_graphs_says_so(
    base: Path, package: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    error = refused(base, rows, tmp_path / "out", package, Unavailable, "onnx-ir is not installed")
    assert "slmops[train]" in error.hint


def test_such_an_adapter_is_not_merged_and_not_exported_as_a_model(trained: Path, tmp_path: Path) -> None:
    for verb, folder in ((slmops.merge, tmp_path / "merged"), (slmops.export, tmp_path / "export")):
        with pytest.raises(Unavailable, match="was trained on the quantized weights of .*int4") as caught:
            verb(trained, out=folder)
        assert caught.value.exit_code == 3
        assert f"--adapter NAME={trained}" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_several_on_one_quantized_base_become_one_adapter_on_it(
    base: Path, package: Path, rows: Path, trained: Path, tmp_path: Path
) -> None:
    other = finetune(base, rows, tmp_path / "other", package, seed=1).path
    with pytest.raises(Unavailable, match="was trained on the quantized weights"):
        slmops.merge(trained, other, out=tmp_path / "model")
    combined = slmops.merge(trained, other, out=tmp_path / "both", into="adapter", weights=[1.0, 0.0])
    assert combined.find("quantized_base") == package
    recorded = artifact.load(trained).manifest.input("quantized_base")
    assert recorded is not None
    assert combined.manifest.input("quantized_base").sha256 == recorded.sha256
    # With all of the weight on the first it is the first, on the package's weights.
    expected = logits(hugging_face.load_adapted(base, trained))
    np.testing.assert_allclose(logits(hugging_face.load_adapted(base, combined.path)), expected, atol=1e-4)
    alone = finetune(base, rows, tmp_path / "float", None).path
    with pytest.raises(BadArtifact, match="learned on a quantized base"):
        slmops.merge(trained, alone, out=tmp_path / "mixed", into="adapter")


@pytest.mark.slow
def test_the_weights_of_a_packed_base_are_those_of_its_export(base: Path, package: Path, rows: Path, trained: Path, tmp_path: Path) -> None:
    """The package's file holds LoRA inputs as well; trained on it or on the export, an adapter is the same."""
    packed = slmops.pack(base, adapter=[f"intent={trained}"], out=tmp_path / "packed", precision="int4").path
    assert quantized_base.find_quantized_base(packed, base).sha256 == quantized_base.find_quantized_base(package, base).sha256
    made = finetune(base, rows, tmp_path / "again", packed)
    assert adapter_bytes(made.path) == adapter_bytes(trained)
    assert artifact.load(packed).manifest.facts["adapters"]["intent"]["quantized_base"] == made.manifest.input("quantized_base").sha256


@pytest.mark.slow
def test_a_float_export_is_allowed_and_said_to_be_pointless(base: Path, rows: Path, tmp_path: Path) -> None:
    package = make_export(tmp_path / "fp32", base, "fp32")
    made = finetune(base, rows, tmp_path / "out", package, max_steps=2, precision="fp32")
    assert any("not quantized" in warning for warning in made.manifest.warnings)
    alone = finetune(base, rows, tmp_path / "alone", None, max_steps=2, precision="fp32")
    assert adapter_bytes(made.path) == adapter_bytes(alone.path)


@pytest.mark.slow
def test_the_benchmark_makes_a_coarse_base_that_is_still_a_package(base: Path, package: Path, rows: Path, tmp_path: Path) -> None:
    """Every other step of one kind of layer is gone, the other layers are untouched, and the device's runtime runs it."""
    words = [str(base), str(rows), str(rows), "--work", str(tmp_path), "--seeds", "0", "--coarse", "down_proj", "--every", "2"]
    words += ["--prompt-template", r"{text}\nIntent:", "--completion-template", " {intent}", "--lora-rank", "4"]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/quantized_base.py", *words], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert list(figures) == ["float base", "float adapter on the coarse base", "trained on the coarse base"]
    assert all(len(row["exact_match"]) == 1 for row in figures.values())
    assert artifact.load(tmp_path / "coarse-0").find("quantized_base") == tmp_path / "coarse"
    found = artifact.load(tmp_path / "coarse")
    artifact.check(found)
    assert checking.problems(found.path, found.manifest.facts["recipe"]["options"]) == []
    before, after = (load_graph(folder / FULL) for folder in (package, tmp_path / "coarse"))
    for old, new in zip(linears(before), linears(after), strict=True):
        ours, theirs = quantized(after, new), quantized(before, old)
        distance = ours.codes.astype(int) - ours.zero_points.astype(int)[..., None]
        if new.name.endswith("down_proj"):
            assert not (distance % 2).any()
            assert (np.abs(ours.codes.astype(int) - theirs.codes) <= 2).all()
            assert (ours.codes != theirs.codes).any()
        else:
            np.testing.assert_array_equal(ours.codes, theirs.codes)
    assert list(loading.open_runner(found.path).stream(IDS, max_new_tokens=3, stop_token_ids=[])) != []
