"""A merge is base + adapter, to the last digits, and whatever cannot be merged so is refused: nothing is dropped in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TEMPLATES, make_adapter, make_model, write_rows

import slmops
from slmops import artifact
from slmops.errors import BadArtifact, Unavailable


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
    return make_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of slmops's own, with a manifest."""
    place = tmp_path_factory.mktemp("trained")
    rows = write_rows(place / "rows.jsonl")
    return slmops.finetune(base, rows, out=place / "adapter", validation=rows, max_steps=2, lora_rank=4, **TEMPLATES).path


def peft_adapter(folder: Path, base: Path, config: Any, scale: float = 0.05) -> Path:
    """Write a PEFT adapter with random weights: every B, and whatever else begins at zero, is not."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and not name.endswith("magnitude_vector.default.weight"):
            torch.nn.init.normal_(weight, std=scale)
    adapted.save_pretrained(folder)
    return folder


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings))


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / name)


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(1, 41).reshape(2, 20)).logits.numpy()


def scale_of(details: dict[str, Any], module: str) -> float:
    """Alpha over r, or over its root for rsLoRA, with what a pattern says of this module."""

    def of(name: str, pattern: str) -> float:
        return next((value for key, value in details[pattern].items() if module.endswith(key)), details[name])

    rank = of("r", "rank_pattern")
    return of("lora_alpha", "alpha_pattern") / (rank**0.5 if details["use_rslora"] else rank)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 5.0, "up_proj": 1.0}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]},
    ],
    ids=["plain", "rslora", "ranks by module", "rslora with ranks"],
)
def test_merged_is_base_plus_scaled_product(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = peft_adapter(tmp_path / "adapter", base, lora(**settings))
    merged = slmops.merge(adapter, out=tmp_path / "merged", base=base)
    details = json.loads((adapter / "adapter_config.json").read_text())
    pairs, before, after = tensors(adapter, "adapter_model.safetensors"), tensors(base), tensors(merged.path)
    assert set(before) == set(after)
    changed = set()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        key = f"base_model.model.{module}.lora_%s.weight"
        expected = weight.astype(np.float64)
        if key % "A" in pairs:
            expected = expected + scale_of(details, module) * (pairs[key % "B"].astype(np.float64) @ pairs[key % "A"])
            changed.add(module)
        np.testing.assert_allclose(after[name], expected, atol=1e-6, err_msg=name)
    assert len(changed) == len(pairs) // 2 > 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
    ours = logits(AutoModelForCausalLM.from_pretrained(merged.path, dtype="float32"))
    np.testing.assert_allclose(ours, logits(adapted), atol=1e-4)
    assert np.abs(ours - logits(AutoModelForCausalLM.from_pretrained(base, dtype="float32"))).max() > 0.1, "the adapter has an effect"
    assert merged.manifest.metrics["merge_nmse"]["value"] <= 1e-10


@pytest.mark.parametrize("kind", ["dora", "loha", "ia3"])
def test_other_methods_whose_effect_is_in_the_weights_merge_too(base: Path, tmp_path: Path, kind: str) -> None:
    import peft

    config = {
        "dora": lambda: lora(use_dora=True),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    }[kind]()
    adapter = peft_adapter(tmp_path / "adapter", base, config, scale=0.2)
    merged = slmops.merge(adapter, out=tmp_path / "merged", base=base)
    assert merged.manifest.metrics["merge_nmse"]["value"] <= 1e-8
    before, after = tensors(base), tensors(merged.path)
    assert any(np.abs(before[name] - after[name]).max() > 1e-3 for name in before)


def test_interface_and_stop_token_travel_into_the_merged_model(base: Path, trained: Path, tmp_path: Path) -> None:
    merged = slmops.merge(trained, out=tmp_path / "merged")
    assert merged.manifest.kind == "model"
    assert merged.manifest.interface == artifact.load(trained).manifest.interface
    assert merged.manifest.interface is not None
    generation = json.loads((merged.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == merged.manifest.interface["stop_token_ids"]
    assert merged.find("base") == base
    assert merged.find("adapter") == trained
    assert (merged.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_another_base_is_refused(base: Path, trained: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(BadArtifact, match="is not the base that .* was trained on") as caught:
        slmops.merge(trained, out=tmp_path / "merged", base=other)
    assert caught.value.exit_code == 4
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    assert slmops.merge(trained, out=tmp_path / "merged", base=copy).manifest.input("base") is not None, "a copy is the same base"


def test_a_plain_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    wide = make_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(BadArtifact, match="does not fit") as caught:
        slmops.merge(adapter, out=tmp_path / "merged", base=wide)
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.message


def changed_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (as_pickle, "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (
            changed_tensors(lambda t: {name.replace("layers.1.", "layers.7."): value for name, value in t.items()}),
            "tensors have no place in this base, such as base_model.model.model.layers.7",
        ),
        (changed_tensors(lambda t: {name: value for name, value in t.items() if "layers.1." not in name}), "lacks 14 of its tensors"),
        (changed_tensors(lambda t: {name: value for name, value in t.items() if "lora_B" not in name}), "lacks 14 of its tensors"),
    ],
    ids=["pickle", "broken config", "no config", "no place", "a layer lost", "half the pairs"],
)
def test_broken_adapters_are_refused(base: Path, tmp_path: Path, change: Callable[[Path], None], text: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    change(adapter)
    with pytest.raises(BadArtifact, match=text) as caught:
        slmops.merge(adapter, out=tmp_path / "merged", base=base)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert list(tmp_path.glob("merged*")) == []


def test_a_changed_adapter_is_refused_by_its_hash(trained: Path, tmp_path: Path) -> None:
    copy = trained.parent / "changed"
    shutil.copytree(trained, copy)
    changed_tensors(lambda t: {name: value * 1.5 for name, value in t.items()})(copy)
    with pytest.raises(BadArtifact, match="is not what was written: adapter_model.safetensors: "):
        slmops.merge(copy, out=tmp_path / "merged")


def test_what_is_no_adapter_is_refused_by_its_kind(base: Path, trained: Path, tmp_path: Path) -> None:
    merged = slmops.merge(trained, out=tmp_path / "merged")
    for folder, text in (
        (merged.path, "is a model, and an adapter is needed"),
        (base, "has no adapter_config.json"),
        (tmp_path / "gone", "gone"),
    ):
        with pytest.raises(BadArtifact, match=text) as caught:
            slmops.merge(folder, out=tmp_path / "again")
        assert caught.value.exit_code == 4


def test_prefix_tuning_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig

    adapter = peft_adapter(tmp_path / "adapter", base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(Unavailable, match="learned keys and values stand before each text") as caught:
        slmops.merge(adapter, out=tmp_path / "merged", base=base)
    assert caught.value.exit_code == 3
    assert "lora" in caught.value.hint


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_a_tied_head_and_embedding_changes_that_one_alone(base: Path, tmp_path: Path, target: str) -> None:
    """The two are one tensor in the base: merged in place, the side that the adapter never saw would change too."""
    adapter = peft_adapter(tmp_path / "adapter", base, lora(target_modules=[target, "q_proj"]), scale=0.2)
    merged = slmops.merge(adapter, out=tmp_path / "merged", base=base)
    before, after = tensors(base)["model.embed_tokens.weight"], tensors(merged.path)
    other = "model.embed_tokens.weight" if target == "lm_head" else "lm_head.weight"
    changed = "lm_head.weight" if target == "lm_head" else "model.embed_tokens.weight"
    np.testing.assert_array_equal(after[other], before)
    assert np.abs(after[changed] - before).max() > 0.1
    assert merged.manifest.metrics["merge_nmse"]["value"] <= 1e-8
    assert [line for line in merged.manifest.warnings if "they are two now, 81,920 bytes more" in line]
    # What other programs read of the folder is the same: in memory alone it would be worth nothing.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter)
    np.testing.assert_allclose(logits(AutoModelForCausalLM.from_pretrained(merged.path, dtype="float32")), logits(adapted), atol=1e-4)


def test_a_plain_adapter_leaves_head_and_embedding_tied(base: Path, trained: Path, tmp_path: Path) -> None:
    merged = slmops.merge(trained, out=tmp_path / "merged")
    assert "lm_head.weight" not in tensors(merged.path)
    assert json.loads((merged.path / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "the base layer has no bias"),
        ({"alora_invocation_tokens": [5]}, "off until certain tokens come"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "share one weight in the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
@pytest.mark.filterwarnings("ignore")
def test_what_no_weights_can_say_is_refused(base: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    adapter = peft_adapter(tmp_path / "adapter", base, lora(**settings))
    with pytest.raises(Unavailable, match=said) as caught:
        slmops.merge(adapter, out=tmp_path / "merged", base=base)
    assert caught.value.exit_code == 3 and caught.value.hint
    assert list(tmp_path.glob("merged*")) == []


def test_an_adapter_that_peft_cannot_load_again_is_not_run_either(base: Path, tmp_path: Path) -> None:
    """PiSSA by a randomized SVD: PEFT would take another part out of the base than was taken out in training."""
    adapter = peft_adapter(tmp_path / "adapter", base, lora(init_lora_weights="pissa_niter_4"))
    with pytest.raises(Unavailable, match="nobody can tell again") as caught:
        "".join(slmops.generate(adapter, "play"))
    assert "path_initial_model_for_weight_conversion" in caught.value.hint


def test_an_occupied_output_is_left_alone(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base)
    first = slmops.merge(adapter, out=tmp_path / "merged", base=base)
    with pytest.raises(BadArtifact, match="not empty"):
        slmops.merge(adapter, out=tmp_path / "merged", base=base)
    again = slmops.merge(adapter, out=tmp_path / "merged", base=base, force=True)
    assert (first.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
