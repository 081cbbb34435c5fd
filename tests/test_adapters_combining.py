"""Several adapters become one: exactly their weighted sum where that is claimed, measured where it is not, refused where it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import ROWS, TEMPLATES, make_model, write_rows

import slmops
from slmops import artifact
from slmops.errors import BadArtifact, InvalidInput, Unavailable

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("combining") / "base")


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Any:
    """Write a PEFT adapter of a name, random and with an effect."""

    def written(name: str, seed: int = 0, config: Any = None, on: Path = base, **settings: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        lora = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL), "task_type": "CAUSAL_LM"} | settings
        adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(on, dtype=torch.float32), config or LoraConfig(**lora))
        for parameter, weight in adapted.named_parameters():
            if weight.requires_grad and "magnitude" not in parameter:
                torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return written


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {key: value.astype(np.float64) for key, value in load_file(folder / name).items()}


def deltas(adapter: Path) -> dict[str, np.ndarray]:
    """What a LoRA folder adds to each weight, computed from its files alone."""
    details = json.loads((adapter / "adapter_config.json").read_text())
    pairs, found = tensors(adapter, "adapter_model.safetensors"), {}
    for key, first in pairs.items():
        if "lora_A" not in key:
            continue
        layer = key.removeprefix("base_model.model.").split(".lora_A")[0]
        rank = next((r for name, r in details["rank_pattern"].items() if layer.endswith(name)), details["r"])
        alpha = next((a for name, a in details["alpha_pattern"].items() if layer.endswith(name)), details["lora_alpha"])
        scale = alpha / (rank**0.5 if details["use_rslora"] else rank)
        found[f"{layer}.weight"] = scale * pairs[key.replace("lora_A", "lora_B")] @ first
    return found


def weighted_sum(adapters: list[Path], weights: list[float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(adapter).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def changes(merged: Path, base: Path) -> dict[str, np.ndarray]:
    after, before = tensors(merged), tensors(base)
    return {name: after[name] - before[name] for name in before if not np.array_equal(after[name], before[name])}


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert set(found) == set(expected)
    squared = sum(((found[name] - expected[name]) ** 2).sum() for name in expected)
    return float(np.sqrt(squared / sum((value**2).sum() for value in expected.values())))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"r": 8, "lora_alpha": 4}),
        ({"use_rslora": True}, {"r": 2}),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "down_proj"], "r": 3}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}, {"r": 6, "use_rslora": True}),
        ({"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0]}, {"layers_to_transform": [1]}),
        ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, {"target_modules": ["q_proj"]}),
    ],
    ids=["ranks", "rslora", "targets", "patterns", "layers", "a pattern and a list"],
)
@pytest.mark.parametrize("into", ["base", "adapter"])
def test_cat_is_the_weighted_sum_of_any_adapters(base: Path, make: Any, tmp_path: Path, first: Any, second: Any, into: str) -> None:
    adapters = [make("a", 1, **first), make("b", 2, **second)]
    made = slmops.merge(adapters, out=tmp_path / "out", weights=[0.7, -0.3], into=into)
    expected = weighted_sum(adapters, [0.7, -0.3])
    assert made.manifest.metrics["distance_from_sum"]["value"] < 1e-6
    assert distance(changes(made.path, base) if into == "base" else deltas(made.path), expected) < 1e-5
    if into == "adapter":  # every later verb takes it
        again = slmops.merge(made.path, out=tmp_path / "again")
        assert distance(changes(again.path, base), expected) < 1e-5


def test_without_weights_it_is_the_mean(base: Path, make: Any, tmp_path: Path) -> None:
    adapters = [make("a", 1), make("b", 2), make("c", 3, r=2)]
    made = slmops.merge(*adapters, out=tmp_path / "out")
    assert distance(changes(made.path, base), weighted_sum(adapters, [1 / 3] * 3)) < 1e-5
    assert [part["weight"] for part in made.manifest.facts["adapters"]] == [1 / 3] * 3
    assert [part["rank"] for part in made.manifest.facts["adapters"]] == [4, 4, 2]
    assert made.manifest.facts["rank"] == 10
    shutil.copytree(adapters[0], tmp_path / "copy")
    twice = slmops.merge(adapters[0], tmp_path / "copy", out=tmp_path / "twice", into="adapter")
    assert distance(deltas(twice.path), deltas(adapters[0])) < 1e-5, "an adapter and its copy are that adapter"


def test_a_single_adapter_takes_a_weight_too(base: Path, make: Any, tmp_path: Path) -> None:
    adapter = make("a", 1, use_rslora=True)
    half = slmops.merge(adapter, out=tmp_path / "half", weights=[0.5])
    assert distance(changes(half.path, base), weighted_sum([adapter], [0.5])) < 1e-5
    copy = slmops.merge(adapter, out=tmp_path / "copy", into="adapter")
    assert distance(deltas(copy.path), deltas(adapter)) < 1e-5


def test_linear_is_not_the_sum_and_says_so(base: Path, make: Any, tmp_path: Path) -> None:
    """PEFT adds sqrt(w s) A and sqrt(w s) B before it multiplies: the product has every cross term."""
    adapters, weights = [make("a", 1), make("b", 2)], [0.7, 0.3]
    made = slmops.merge(adapters, out=tmp_path / "out", weights=weights, strategy="linear")
    first, second = (tensors(adapter, "adapter_model.safetensors") for adapter in adapters)
    expected = {}
    for key in (key for key in first if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        a = sum(np.sqrt(2 * w) * side[key] for w, side in zip(weights, (first, second), strict=True))  # alpha / r is 2
        b = sum(np.sqrt(2 * w) * side[other] for w, side in zip(weights, (first, second), strict=True))
        expected[f"{key.removeprefix('base_model.model.').split('.lora_A')[0]}.weight"] = b @ a
    found = changes(made.path, base)
    assert distance(found, expected) < 1e-5
    off = distance(found, weighted_sum(adapters, weights))
    assert off > 0.5
    assert made.manifest.metrics["distance_from_sum"]["value"] == pytest.approx(off, rel=1e-3)
    assert any("cross terms" in line for line in made.manifest.warnings)


def test_svd_is_the_sum_at_full_rank_and_its_best_part_below(base: Path, make: Any, tmp_path: Path) -> None:
    adapters = [make("a", 1, target_modules=["q_proj", "k_proj"]), make("b", 2, target_modules=["q_proj"], r=6)]
    expected = weighted_sum(adapters, [0.5, 0.5])
    full = slmops.merge(adapters, out=tmp_path / "full", strategy="svd", svd_rank=10, into="adapter")
    assert distance(deltas(full.path), expected) < 1e-5
    cut = slmops.merge(adapters, out=tmp_path / "cut", strategy="svd", svd_rank=3)
    lost = sum((np.linalg.svd(value, compute_uv=False)[3:] ** 2).sum() for value in expected.values())
    best = np.sqrt(lost / sum((value**2).sum() for value in expected.values()))
    assert distance(changes(cut.path, base), expected) == pytest.approx(best, rel=1e-3)
    assert cut.manifest.metrics["distance_from_sum"]["value"] == pytest.approx(best, rel=1e-3)
    assert any("cut the rank" in line for line in cut.manifest.warnings)


@pytest.mark.parametrize(
    "strategy", ["ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune"]
)
def test_pruning_strategies_give_an_adapter_that_loads_again(base: Path, make: Any, tmp_path: Path, strategy: str) -> None:
    adapters = [make("a", 1, rank_pattern={"q_proj": 2}), make("b", 2, rank_pattern={"q_proj": 2})]
    made = slmops.merge(adapters, out=tmp_path / "out", strategy=strategy, density=0.6, into="adapter")
    again = slmops.merge(made.path, out=tmp_path / "again")
    assert distance(changes(again.path, base), deltas(made.path)) < 1e-5
    assert made.manifest.facts["density"] == 0.6
    assert made.manifest.metrics["distance_from_sum"]["value"] > 0.05


@pytest.mark.parametrize("strategy", ["magnitude_prune_svd", "dare_linear_svd"])
def test_pruned_deltas_of_density_one_are_the_sum(base: Path, make: Any, tmp_path: Path, strategy: str) -> None:
    adapters = [make("a", 1), make("b", 2)]
    made = slmops.merge(adapters, out=tmp_path / "out", strategy=strategy, density=1.0, svd_rank=8)
    assert distance(changes(made.path, base), weighted_sum(adapters, [0.5, 0.5])) < 1e-5


def test_what_dare_drops_is_seeded(make: Any, tmp_path: Path) -> None:
    adapters = [make("a", 1), make("b", 2)]
    made = {
        name: slmops.merge(adapters, out=tmp_path / name, strategy="dare_linear", seed=seed, into="adapter")
        for name, seed in (("one", 0), ("two", 0), ("three", 1))
    }
    weights = {name: (one.path / "adapter_model.safetensors").read_bytes() for name, one in made.items()}
    assert weights["one"] == weights["two"] != weights["three"]


# Refusals ----------------------------------------------------------------------------------------------------------


def test_adapters_of_different_bases_are_refused_by_name(base: Path, make: Any, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    adapters = [make("a", 1), make("b", 2, on=other)]
    with pytest.raises(BadArtifact, match=rf"a was trained on {base}, and b on {other}") as caught:
        slmops.merge(adapters, out=tmp_path / "out")
    assert caught.value.exit_code == 4
    shutil.copytree(base, tmp_path / "copy")
    slmops.merge([adapters[0], make("c", 3, on=tmp_path / "copy")], out=tmp_path / "out")  # a copy is the same base


@pytest.mark.parametrize(("strategy", "way_out"), [("linear", "svd"), ("ties", "ties_svd"), ("dare_linear", "dare_linear_svd")])
def test_unequal_ranks_are_refused_with_who_has_which(make: Any, tmp_path: Path, strategy: str, way_out: str) -> None:
    adapters = [make("a", 1), make("b", 2, r=8)]
    with pytest.raises(InvalidInput, match=f"{strategy} needs adapters of equal ranks, and these have a 4, b 8") as caught:
        slmops.merge(adapters, out=tmp_path / "out", strategy=strategy)
    assert way_out in caught.value.hint
    assert not list(tmp_path.glob("out*"))
    slmops.merge(adapters, out=tmp_path / "out", strategy=way_out)


def test_ranks_are_compared_layer_by_layer(make: Any, tmp_path: Path) -> None:
    """The largest ranks are equal, and a layer's are not: PEFT would stop in the middle with a shape mismatch."""
    adapters = [make("a", 1, rank_pattern={"q_proj": 2}), make("b", 2)]
    with pytest.raises(InvalidInput, match="a 2 to 4, b 4"):
        slmops.merge(adapters, out=tmp_path / "out", strategy="linear")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weights": [1.0]}, r"weights: 1 of them \(1\) for 2 adapters"),
        ({"weights": "0.5,0.3,0.2"}, r"weights: 3 of them \(0.5, 0.3, 0.2\) for 2 adapters"),
        ({"density": 0.5}, "density: cat prunes nothing"),
        ({"strategy": "svd", "density": 0.5}, "density: svd prunes nothing"),
        ({"strategy": "ties", "svd_rank": 4}, "svd_rank: ties makes no SVD"),
        ({"weights": "half"}, "weights: "),
        ({"strategy": "ties", "density": 0.0}, "density: "),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Any, tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    adapters = [make("a", 1), make("b", 2)]
    with pytest.raises(InvalidInput, match=text) as caught:
        slmops.merge(adapters, out=tmp_path / "out", **settings)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("out*"))


def test_a_strategy_for_a_single_adapter_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="ties combines several adapters, and one was given"):
        slmops.merge(make("a"), out=tmp_path / "out", strategy="ties")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "b has use_dora"),
        ({"lora_bias": True}, "b has lora_bias"),
        ({"bias": "lora_only"}, "b has bias lora_only"),
        ({"modules_to_save": ["lm_head"]}, "b has modules_to_save"),
        ({"init_lora_weights": "pissa"}, "b has init_lora_weights pissa"),
    ],
)
def test_what_is_more_than_a_product_of_two_matrices_is_refused_in_a_combination(
    make: Any, tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    adapters = [make("a", 1), make("b", 2, **settings)]
    with pytest.raises(Unavailable, match=text) as caught:
        slmops.merge(adapters, out=tmp_path / "out")
    assert caught.value.exit_code == 3
    assert "merge it alone" in caught.value.hint


def test_other_methods_are_refused_in_a_combination(make: Any, tmp_path: Path) -> None:
    from peft import LoHaConfig

    adapters = [make("a", 1), make("b", 2, LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))]
    with pytest.raises(Unavailable, match="b is an adapter of type LOHA, and only LoRA adapters can be combined"):
        slmops.merge(adapters, out=tmp_path / "out")
    slmops.merge(adapters[1], out=tmp_path / "out")  # alone it merges as before


def test_a_broken_second_adapter_is_refused(make: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapters = [make("a", 1), make("b", 2)]
    path = adapters[1] / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): value for name, value in load_file(path).items()}, path)
    with pytest.raises(BadArtifact, match="tensors have no place in this base"):
        slmops.merge(adapters, out=tmp_path / "out")


def test_names_come_from_the_folders_and_can_be_given(make: Any, tmp_path: Path) -> None:
    make("a", 1)
    make("deep/a", 2)
    with pytest.raises(InvalidInput, match="two adapters have the name x"):
        slmops.merge([f"x={tmp_path}/a", f"x={tmp_path}/deep/a"], out=tmp_path / "out")
    with pytest.raises(InvalidInput, match="two adapters have the name"):
        slmops.merge([tmp_path / "a", tmp_path / "a"], out=tmp_path / "out")
    made = slmops.merge([tmp_path / "a", tmp_path / "deep" / "a"], out=tmp_path / "out")
    assert [part["name"] for part in made.manifest.facts["adapters"]] == [f"{tmp_path.name}/a", "deep/a"]
    made = slmops.merge([f"one={tmp_path}/a", tmp_path / "deep" / "a"], out=tmp_path / "named")
    assert [part["name"] for part in made.manifest.facts["adapters"]] == ["one", "a"]


# Lineage, interface, regret ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on one base, each learned by heart: `intent` and `echo`, with templates of their own; and text, `plain`."""
    place = tmp_path_factory.mktemp("tasks")
    rows = write_rows(place / "rows.jsonl", ROWS)
    (place / "plain.txt").write_text("\n\n".join(row["text"] for row in ROWS))
    settings = {"learning_rate": 2e-2, "epochs": 30, "batch_size": 8, "validation": rows}
    slmops.finetune(base, rows, out=place / "intent", lora_rank=4, **settings, **TEMPLATES)
    other = {"prompt_template": "{intent}\nText:", "completion_template": " {text}"}
    slmops.finetune(base, rows, out=place / "echo", lora_rank=8, target_modules=["q_proj", "v_proj"], max_steps=4, validation=rows, **other)
    slmops.finetune(base, place / "plain.txt", out=place / "plain", lora_rank=4, max_steps=20, learning_rate=1e-2)
    return place


def test_a_combined_adapter_is_an_adapter_like_any_other(base: Path, trained: Path, tmp_path: Path) -> None:
    made = slmops.merge(trained / "intent", trained / "echo", out=tmp_path / "both", into="adapter", weights="1,0")
    manifest = made.manifest
    assert (manifest.kind, manifest.facts["method"], manifest.facts["strategy"]) == ("adapter", "lora", "cat")
    assert manifest.interface == artifact.load(trained / "intent").manifest.interface, "the first's travels"
    assert any("echo: asked with other templates" in line for line in manifest.warnings)
    assert [item.role for item in manifest.inputs] == ["base", "adapter", "adapter"]
    assert made.find("base") == base
    assert (made.path / "validation.jsonl").read_bytes() == (trained / "intent" / "validation.jsonl").read_bytes()
    artifact.check(made)
    alone = slmops.evaluate(trained / "intent", trained / "rows.jsonl").metrics["exact_match"].value
    assert slmops.evaluate(made.path, trained / "rows.jsonl").metrics["exact_match"].value == alone == 1.0
    merged = slmops.merge(made.path, out=tmp_path / "merged")
    assert slmops.evaluate(merged.path, trained / "rows.jsonl").metrics["exact_match"].value == 1.0


def test_the_regret_table_holds_each_task_before_and_after(trained: Path, tmp_path: Path) -> None:
    data = {"intent": trained / "rows.jsonl", "plain": trained / "plain.txt"}
    gone = slmops.merge(trained / "intent", trained / "plain", out=tmp_path / "gone", data=data, weights="0,1")
    intent, plain = gone.manifest.facts["regret"]
    assert (intent["name"], intent["metric"], intent["before"]["value"]) == ("intent", "exact_match", 1.0)
    assert intent["after"]["value"] == 0.0 and intent["points_lost"] == 100.0, "with weight 0 its task is gone"
    assert any("intent lost 100 points by the merge" in line for line in gone.manifest.warnings)
    assert not any("plain lost" in line for line in gone.manifest.warnings)
    assert (plain["name"], plain["metric"]) == ("plain", "perplexity")
    assert plain["before"]["value"] == pytest.approx(plain["after"]["value"], rel=1e-4), "alone with weight 1 nothing is lost"
    assert abs(plain["points_lost"]) < 0.01
    reference = slmops.evaluate(trained / "plain", trained / "plain.txt", metric="perplexity").metrics["perplexity"].value
    assert plain["before"]["value"] == pytest.approx(reference, rel=1e-4), "the same figure as `evaluate`"
    kept = slmops.merge(trained / "intent", trained / "plain", out=tmp_path / "kept", data=data, weights="1,0", into="adapter")
    assert [row["points_lost"] > 1 for row in kept.manifest.facts["regret"]] == [False, True]
    assert kept.document()["regret"] == kept.manifest.facts["regret"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (["rows.jsonl"], "data: rows.jsonl is not NAME=FILE"),
        (["intnet=rows.jsonl"], "data: intnet is none of the adapters"),
        (["intent=nowhere.jsonl"], "nowhere.jsonl"),
        (["intent=rows.jsonl", "intent=rows.jsonl"], "data: intent is given twice"),
    ],
)
def test_data_that_belongs_to_no_adapter_is_refused_before_anything_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: list[str], text: str
) -> None:
    monkeypatch.chdir(trained)
    with pytest.raises(InvalidInput, match=text):
        slmops.merge("intent", "plain", out=tmp_path / "out", data=data)
    assert not list(tmp_path.glob("out*"))


def test_qlora_adapters_merge_on_nf4_and_a_mixture_says_what_it_loses(base: Path, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from slmops.runtime.hugging_face import load_model

    rows = trained / "rows.jsonl"
    for name in ("one", "two"):
        slmops.finetune(base, rows, out=tmp_path / name, method="qlora", max_steps=2, lora_rank=4, validation=rows, **TEMPLATES)
    made = slmops.merge(tmp_path / "one", tmp_path / "two", out=tmp_path / "both", into="adapter")
    assert made.manifest.facts["method"] == "qlora", "later steps put it on nf4 too"
    assert not any("nf4" in line for line in made.manifest.warnings)
    merged = slmops.merge(tmp_path / "one", tmp_path / "two", out=tmp_path / "merged")
    nf4: Any = load_model(base, nf4=True, device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    ground = nf4.dequantize().state_dict()[name].numpy().astype(np.float64)
    expected = weighted_sum([tmp_path / "one", tmp_path / "two"], [0.5, 0.5])[name]
    np.testing.assert_allclose(tensors(merged.path)[name], ground + expected, atol=1e-6)
    assert np.abs(ground - tensors(base)[name]).max() > 1e-3, "nf4 is not the float base"
    plan = slmops.merge(tmp_path / "one", plan=True)  # of the delta alone, not of the error of nf4 with it
    energy = next(layer.share.energy for layer in plan.layers if layer.share.layer == name.removesuffix(".weight"))
    assert energy == pytest.approx((weighted_sum([tmp_path / "one"], [1])[name] ** 2).sum(), rel=1e-2)
    mixed = slmops.merge(tmp_path / "one", trained / "intent", out=tmp_path / "mixed")
    assert any("one learned with qlora" in line for line in mixed.manifest.warnings)
    expected = weighted_sum([tmp_path / "one", trained / "intent"], [0.5, 0.5])[name]
    np.testing.assert_allclose(tensors(mixed.path)[name], tensors(base)[name] + expected, atol=1e-6)
