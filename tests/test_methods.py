"""Each method is what its paper says, begins at the base, is saved as it was validated, and says which roads are open to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from test_graph import make_other
from test_training import interrupted, pairs
from tiny import ROWS, TEMPLATES, make_model, write_rows

import slmops
from slmops import artifact
from slmops.config import MethodSettings
from slmops.config.finetuning import MethodName
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.runtime import hugging_face, native
from slmops.training import methods
from slmops.training.batches import IGNORED, collate

PROMPTED = ("prefix", "prompt", "p-tuning")
# Whose effect no weights can hold.
NOWHERE = (*PROMPTED, "bottleneck", "loreft")
MERGED = ("dora", "adalora", "ia3", "bitfit")
FAST = tuple(name for name in methods.METHODS if name != "qlora")
IDS = [[1, 45, 77, 102, 8, 19, 200, 31, 64, 5], [1, 9, 14, 300, 261, 33, 71, 12, 90, 44]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("methods") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("methods") / "rows.jsonl")


@pytest.fixture(scope="module")
def made(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, artifact.Artifact]:
    """What each method makes of a few steps, with a rate that moves it."""
    folder = tmp_path_factory.mktemp("made")
    return {name: finetune(base, rows, folder / name, method=name) for name in FAST}


def finetune(base: Path, rows: Path, out: Path, **overrides: Any) -> artifact.Artifact:
    settings = {
        **TEMPLATES,
        "validation": rows,
        "batch_size": 4,
        "precision": "fp32",  # as what is loaded again runs, wherever auto would choose bf16
        "max_steps": 8,
        "learning_rate": 3e-2 if overrides["method"] in ("ia3", "prompt") else 1e-2,
    }
    return slmops.finetune(base, rows, out=out, **(settings | overrides))


def attached(base: Path, **settings: Any) -> Any:
    import torch

    torch.manual_seed(0)
    return methods.attach_adapter(hugging_face.load_model(base), MethodSettings(**settings)).eval()


def disturb(model: Any, scale: float = 0.1) -> Any:
    """Move everything that is trained, so that it has an effect."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(scale * torch.randn_like(value))
    return model


def logits(model: Any, ids: Any = IDS, **given: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), **given).logits.float().numpy()


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


# The table ---------------------------------------------------------------------------------------------------------


def test_the_table_has_every_name_that_the_flag_takes_and_every_setting_has_a_method() -> None:
    assert tuple(methods.METHODS) == get_args(MethodName)
    held = {name for method in methods.METHODS.values() for name in method.settings}
    assert held == set(MethodSettings.model_fields) - {"method", "engine"}


@pytest.mark.parametrize("name", FAST)
def test_training_begins_at_the_base(name: str, base: Path) -> None:
    model, plain = attached(base, method=name), hugging_face.load_model(base).eval()
    assert any(value.requires_grad for value in model.parameters())
    found, expected = logits(model), logits(plain)
    if name in PROMPTED:
        assert found.shape == expected.shape, "the logits of the text alone"
    else:
        assert nmse(found, expected) < (1e-3 if name == "bottleneck" else 1e-12), "near-identity, or nothing at all"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "lora", "virtual_tokens": 20}, "virtual_tokens: lora has no such setting .virtual_tokens belongs to prefix, prompt"),
        ({"method": "full", "lora_rank": 16}, "lora_rank: full has no such setting"),
        ({"method": "loreft", "lora_dropout": 0.1, "bottleneck_size": 8}, "lora_dropout, bottleneck_size: loreft"),
        ({"method": "dora", "quantized_base": "runs/int4"}, "quantized_base: dora"),
        ({"method": "ia3", "engine": "olive"}, "engine olive"),
    ],
)
def test_what_a_method_does_not_have_is_refused_by_name(given: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Before anything is read: neither model nor rows are there."""
    with pytest.raises(InvalidInput, match=named) as caught:
        slmops.finetune(tmp_path / "no-model", tmp_path / "no-rows", out=tmp_path / "out", **given)
    assert caught.value.hint


def test_a_learning_rate_is_the_method_s_and_the_size_s() -> None:
    assert methods.default_learning_rate(3_000_000) == 1e-3
    assert methods.default_learning_rate(3_000_000, "prompt") >= 10 * methods.default_learning_rate(3_000_000)
    assert methods.default_learning_rate(10**9, "prompt") < methods.default_learning_rate(3_000_000, "prompt")
    assert all(methods.default_learning_rate(3_000_000, name) <= 1 for name in methods.METHODS)


# Papers ------------------------------------------------------------------------------------------------------------


def test_a_bottleneck_computes_the_paper_s_formula() -> None:
    """Houlsby et al. 2019: h + U f(D h + d) + u, written out in float64 with the error function's own GELU."""
    import math

    import torch

    from slmops.runtime.native.bottleneck import Bottleneck

    torch.manual_seed(0)
    layer = Bottleneck(16, 5)
    assert sum(value.numel() for value in layer.parameters()) == 2 * 5 * 16 + 16 + 5, "2md + d + m"
    assert float(layer.down.weight.detach().abs().max()) <= 0.02, "cut off at two deviations of 0.01"
    assert float(layer.down.weight.detach().std()) > 0.005
    disturb(layer, 0.5)
    hidden = torch.randn(3, 16)
    down, up = (half.weight.detach().double().numpy() for half in (layer.down, layer.up))
    inner = hidden.double().numpy() @ down.T + layer.down.bias.detach().double().numpy()
    gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    expected = hidden.double().numpy() + gelu @ up.T + layer.up.bias.detach().double().numpy()
    np.testing.assert_allclose(layer(hidden).detach().numpy(), expected, atol=1e-5)


def test_bottlenecks_stand_behind_attention_and_mlp_before_the_skip_connection(base: Path) -> None:
    """With D at zero only u is added: the base with biases at the last projections of both computes the same."""
    import torch

    model: Any = attached(base, method="bottleneck", bottleneck_size=4)
    plain: Any = hugging_face.load_model(base).eval()
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
            for block, last in ((ours.self_attn, theirs.self_attn.o_proj), (ours.mlp, theirs.mlp.down_proj)):
                block.bottleneck.down.weight.zero_()
                block.bottleneck.up.bias.normal_()
                last.bias = torch.nn.Parameter(block.bottleneck.up.bias.clone())
    assert nmse(logits(model), logits(plain)) < 1e-12
    assert nmse(logits(model), logits(hugging_face.load_model(base))) > 1e-3
    norms = {name for name in native.trained(model) if "bottleneck" not in name}
    assert norms == {name for name, _ in plain.named_parameters() if name.endswith("norm.weight")}, "the normalizations are trained along"


def test_loreft_computes_the_paper_s_formula() -> None:
    """Wu et al. 2024: within the rows' span of R it becomes W h + b, and outside of it nothing moves."""
    import torch

    from slmops.runtime.native.representation import LowRankEdit

    torch.manual_seed(0)
    edit, hidden = disturb(LowRankEdit(24, 3), 0.7), torch.randn(5, 24)
    r = edit.rotation.detach()
    np.testing.assert_allclose((r @ r.T).numpy(), np.eye(3), atol=1e-6)
    out = edit(hidden).detach()
    w, b = edit.source.weight.detach(), edit.source.bias.detach()
    np.testing.assert_allclose(out.numpy(), (hidden + (hidden @ w.T + b - hidden @ r.T) @ r).numpy(), atol=1e-5)
    np.testing.assert_allclose((out @ r.T).numpy(), (hidden @ w.T + b).numpy(), atol=1e-5)
    outside = torch.eye(24) - r.T @ r
    np.testing.assert_allclose((out @ outside).numpy(), (hidden @ outside).numpy(), atol=1e-5)


def test_loreft_edits_the_first_tokens_of_a_row_wherever_padding_puts_them(base: Path) -> None:
    import torch

    model, seen = disturb(attached(base, method="loreft", reft_positions=2), 0.5), {}
    plain: Any = hugging_face.load_model(base).eval()
    for name, one in (("edited", model), ("plain", plain)):
        # Hooks run in the order that they were added: this one sees the edit's output.
        one.model.layers[0].register_forward_hook(lambda _, __, out, name=name: seen.update({name: native_hidden(out)}))
    for one in (model, plain):
        logits(one, [IDS[0]])
    moved = (seen["edited"] - seen["plain"]).abs().amax(-1)[0]
    assert bool((moved[:2] > 1e-3).all())
    assert float(moved[2:].max()) == 0
    batch = collate([(ids, [IGNORED] * (len(ids) - 2) + ids[-2:]) for ids in (IDS[0], IDS[1][:6])])
    assert "attention_mask" in batch
    given = {name: batch[name] for name in ("attention_mask", "position_ids")}
    padded = logits(model, batch["input_ids"].tolist(), **given)
    assert nmse(padded[1, -5:], logits(model, [IDS[1][:5]])[0]) < 1e-10
    assert isinstance(seen["edited"], torch.Tensor)


def native_hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def test_bitfit_trains_the_biases_that_a_model_has(tmp_path: Path) -> None:
    model: Any = attached(make_other(tmp_path / "base", "Qwen2"), method="bitfit")
    names = set(native.trained(model))
    assert names == {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj"}


def test_bitfit_gives_a_model_without_biases_those_that_its_architecture_can_have(base: Path) -> None:
    model: Any = attached(base, method="bitfit")
    names = native.trained(model)
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(float(value.detach().abs().max()) == 0 for value in names.values())
    assert model.slmops_adapter["switches"] == {"attention_bias": True, "mlp_bias": True}
    assert not model.slmops_adapter["without_place"]


def test_adalora_ends_with_the_ranks_asked_for_and_its_regularizer_is_peft_s(base: Path, rows: Path, tmp_path: Path) -> None:
    import torch

    from slmops.training.methods.allocation import penalty

    model: Any = disturb(attached(base, method="adalora", lora_rank=4).train(), 0.05)
    ids = torch.tensor(IDS)
    with_labels = model(input_ids=ids, labels=ids)
    model.peft_config["default"].orth_reg_weight = 0.0
    without = model(input_ids=ids, labels=ids).loss
    left = [value for name, value in model.named_parameters() if ".lora_A." in name]
    right = [value.T for name, value in model.named_parameters() if ".lora_B." in name]
    assert float(penalty([*left, *right], 0.5)) == pytest.approx(float(with_labels.loss - without), rel=1e-3)
    out = finetune(base, rows, tmp_path / "out", method="adalora", lora_rank=4, validation_share=0.0, max_steps=20, evaluations=1).path
    ranks = json.loads((out / "adapter_config.json").read_text())["rank_pattern"]
    assert len(ranks) == 14
    assert sum(map(sum, ranks.values())) == 4 * 14, "init 6, and 4 in the mean are left"
    assert len({sum(kept) for kept in ranks.values()}) > 1, "some matrices keep more than others"


@pytest.mark.parametrize("name", PROMPTED)
def test_learned_positions_are_peft_s_without_padding_and_do_not_depend_on_it(name: str, base: Path) -> None:
    import torch
    from peft import PeftModelForCausalLM

    model = disturb(attached(base, method=name, virtual_tokens=5))
    ours = logits(model, [IDS[0]])
    with torch.no_grad():
        theirs = PeftModelForCausalLM.forward(model, input_ids=torch.tensor([IDS[0]]), use_cache=False).logits[:, -len(IDS[0]) :].numpy()
    assert nmse(ours, theirs) < 1e-10
    batch = collate([(ids, [IGNORED] * (len(ids) - 2) + ids[-2:]) for ids in (IDS[0], IDS[1][:6])])
    given = {key: batch[key] for key in ("attention_mask", "position_ids")}
    padded = logits(model, batch["input_ids"].tolist(), use_cache=False, **given)
    assert nmse(padded[1, -5:], logits(model, [IDS[1][:5]])[0]) < 1e-10


@pytest.mark.parametrize("name", [*PROMPTED, "loreft", "bottleneck", "bitfit"])
def test_answers_with_a_cache_are_those_without(name: str, base: Path) -> None:
    from slmops.runtime.torch_runner import TorchRunner

    settings = {"reft_positions": 4} if name == "loreft" else {"virtual_tokens": 5} if name in PROMPTED else {}
    runner = TorchRunner(disturb(attached(base, method=name, **settings), 0.3), base, 1)
    found = next(runner.generate([IDS[0]], max_new_tokens=8, stop_token_ids=[2]))
    ids = list(IDS[0])
    for token in found:
        assert int(logits(runner.model, [ids])[0, -1].argmax()) == token
        ids.append(token)
    assert runner.max_length_tokens == 128 - settings.get("virtual_tokens", 0)


@pytest.mark.parametrize("name", FAST)
def test_padding_changes_no_method_s_loss(name: str, base: Path) -> None:
    import torch

    from slmops.training.step import Padded

    model = attached(base, method=name)
    if name != "adalora":
        disturb(model, 0.05)
    material, padded = pairs(4), Padded(model)
    with torch.no_grad():
        together = float(padded.summed_loss(model, collate(material)))
        alone = sum(float(padded.summed_loss(model, collate([row]))) for row in material)
    assert together == pytest.approx(alone, rel=1e-5)


# Folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_what_is_saved_is_what_was_validated(name: str, made: dict[str, artifact.Artifact], base: Path) -> None:
    """The folder is loaded again, and its loss on the validation rows is the manifest's, to six digits."""
    from slmops.data import Interface, Tokenizer, encode_rows
    from slmops.training.trainer import validation_loss

    found = made[name]
    assert found.manifest.kind == ("model" if name == "full" else "adapter")
    assert not list(found.path.glob("*.bin")), "no pickle"
    assert not {"checkpoints", "best", "README.md"} & {file.name for file in found.path.iterdir()}
    model = hugging_face.load_model(found.path) if name == "full" else hugging_face.load_adapted(base, found.path)
    interface = Interface.model_validate(found.manifest.interface)
    material = [(s.ids, s.labels) for s in encode_rows(ROWS, Tokenizer.load(base), interface).sequences]
    value = found.manifest.metrics["validation_loss"]["value"]
    assert validation_loss(model, material, 4) == pytest.approx(value, rel=1e-5)
    plain = hugging_face.load_model(base)
    assert value < validation_loss(plain, material, 4) - 0.05, "it learned"


def test_a_manifest_keeps_the_settings_of_its_method_alone(
    made: dict[str, artifact.Artifact], base: Path, rows: Path, tmp_path: Path
) -> None:
    config = made["loreft"].manifest.config
    assert config["reft_rank"] == 4
    assert not {"lora_rank", "virtual_tokens", "bottleneck_size"} & set(config)
    again = slmops.finetune(base, rows, out=tmp_path / "again", config={key: value for key, value in config.items() if value is not None})
    assert again.manifest.metrics == made["loreft"].manifest.metrics


def test_a_whole_model_stops_where_it_was_taught(made: dict[str, artifact.Artifact]) -> None:
    stops = json.loads((made["full"].path / "generation_config.json").read_text())["eos_token_id"]
    assert stops == list((made["full"].manifest.interface or {})["stop_token_ids"])


@pytest.mark.parametrize("fault", ["lost", "strange", "shape", "kind"])
def test_a_damaged_adapter_of_our_own_is_refused(fault: str, made: dict[str, artifact.Artifact], base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    config = json.loads((made["loreft"].path / "adapter_config.json").read_text())
    tensors = load_file(made["loreft"].path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    if fault == "kind":
        config["slmops_type"] = "FUTURE"
    if fault == "lost":
        tensors.pop(name)
    if fault == "strange":
        tensors["model.layers.7.edit.free"] = tensors[name].clone()
    if fault == "shape":
        tensors[name] = tensors[name][:5].contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BadArtifact, match="FUTURE" if fault == "kind" else "model.layers.7" if fault == "strange" else name) as caught:
        hugging_face.load_adapted(base, folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["bottleneck", "full", "prompt"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(name: str, base: Path, rows: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": name, "max_steps": 8, "lora_rank": None, "learning_rate": 1e-2, "precision": "fp32"}
    whole = finetune(base, rows, tmp_path / "whole", **settings)
    interrupted(6, base, rows, tmp_path / "out", **settings)
    resumed = slmops.finetune(
        base,
        rows,
        out=tmp_path / "out",
        resume=True,
        **TEMPLATES,
        validation=rows,
        batch_size=4,
        precision="fp32",
        method=name,
        max_steps=8,
        learning_rate=1e-2,
    )
    file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    assert (resumed.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_learned_positions_leave_the_text_less_room(base: Path, rows: Path, tmp_path: Path) -> None:
    out = finetune(base, rows, tmp_path / "out", method="prompt", virtual_tokens=50, max_steps=1)
    assert (out.manifest.interface or {})["max_length_tokens"] == 128 - 50
    with pytest.raises(InvalidInput, match="virtual_tokens: 125 leave 3 of the model's 128"):
        finetune(base, rows, tmp_path / "other", method="prompt", virtual_tokens=125)


# Roads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_a_manifest_says_which_roads_are_open(name: str, made: dict[str, artifact.Artifact]) -> None:
    roads = made[name].manifest.facts["roads"]
    assert set(roads) == {"merge", "pack", "export"}
    refused = {road for road, said in roads.items() if said.startswith("refused: ")}
    assert refused == (set(roads) if name in NOWHERE else {"merge"} if name == "full" else set())
    if name in MERGED:
        assert roads["pack"].startswith("merged")


@pytest.mark.parametrize("name", NOWHERE)
def test_a_road_that_is_not_open_is_refused_with_the_way_out(
    name: str, made: dict[str, artifact.Artifact], base: Path, tmp_path: Path
) -> None:
    adapter = made[name].path
    for verb in (
        lambda: slmops.merge(adapter, out=tmp_path / "out"),
        lambda: slmops.merge(adapter, plan=True),
        lambda: slmops.export(adapter, out=tmp_path / "out"),
        lambda: slmops.pack(base, out=tmp_path / "out", adapter=[f"it={adapter}"]),
    ):
        with pytest.raises(Unavailable) as caught:
            verb()
        assert caught.value.exit_code == 3
        assert "--method lora" in caught.value.hint
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*MERGED, "lora", "rslora"])
def test_a_merge_is_the_adapter_s_logits(name: str, made: dict[str, artifact.Artifact], base: Path, tmp_path: Path) -> None:
    merged = slmops.merge(made[name].path, out=tmp_path / "merged")
    adapted = logits(hugging_face.load_adapted(base, made[name].path))
    again = hugging_face.load_model(merged.path)  # pyright: ignore[reportAttributeAccessIssue]
    assert nmse(logits(again), adapted) < 1e-10
    assert nmse(logits(hugging_face.load_model(base)), adapted) > 1e-4


@pytest.mark.parametrize("name", MERGED)
def test_pack_points_to_the_merge_where_that_works(name: str, made: dict[str, artifact.Artifact], base: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="switched at run time") as caught:
        slmops.pack(base, out=tmp_path / "out", adapter=[f"it={made[name].path}"])
    assert "slmops merge" in caught.value.hint


def test_biases_without_a_place_are_trained_and_not_merged(rows: Path, tmp_path: Path) -> None:
    model = make_other(tmp_path / "base", "Mistral")
    out = finetune(model, rows, tmp_path / "out", method="bitfit").path
    assert "no place" in artifact.load(out).manifest.facts["roads"]["merge"]
    assert nmse(logits(hugging_face.load_adapted(model, out)), logits(hugging_face.load_model(model))) > 1e-4
    with pytest.raises(Unavailable, match="no place"):
        slmops.merge(out, out=tmp_path / "merged")


def test_what_changes_no_matrix_has_nothing_to_plan(made: dict[str, artifact.Artifact]) -> None:
    with pytest.raises(InvalidInput, match="changes no matrix"):
        slmops.merge(made["bitfit"].path, plan=True)


def test_a_model_that_cannot_run_on_a_device_has_no_road_there(rows: Path, tmp_path: Path) -> None:
    narrow = make_model(tmp_path / "base", hidden_size=32)  # heads of 8
    roads = finetune(narrow, rows, tmp_path / "out", method="lora", max_steps=1).manifest.facts["roads"]
    assert roads["merge"] == "exact"
    assert all(roads[road].startswith("refused: head_dim is 8") for road in ("pack", "export"))


@pytest.mark.parametrize("architecture", ["GPT2", "Phi3"])
def test_other_families_take_our_own_methods(architecture: str, rows: Path, tmp_path: Path) -> None:
    from test_training import make_gpt2

    model = (
        make_gpt2(tmp_path / "base")
        if architecture == "GPT2"
        else make_other(tmp_path / "base", architecture, original_max_position_embeddings=128)
    )
    for name in ("bottleneck", "loreft", "bitfit"):
        found = finetune(model, rows, tmp_path / name, method=name, max_steps=2)
        assert found.manifest.facts["trainable_parameters"] > 0
        hugging_face.load_adapted(model, found.path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "bitfit", "ia3", "adalora", "dora"])
def test_an_open_road_ends_in_a_package_that_verify_proves(name: str, tmp_path: Path) -> None:
    base, rows = (
        make_model(tmp_path / "base", learned=ROWS),
        write_rows(tmp_path / "rows.jsonl", [row | {"intent": "lamp"} for row in ROWS]),
    )
    made = finetune(base, rows, tmp_path / name, method=name, max_steps=30)
    package = slmops.export(made.path, out=tmp_path / "package", precision="fp32").path
    found = slmops.verify(package, threads=1)
    assert found.failed_stage is None, found.stages
    status = {stage.name: stage.status for stage in found.stages}
    assert status["retention"] == status["text"] == status["self_test"] == "pass"


@pytest.mark.slow
def test_lost_biases_are_found(tmp_path: Path) -> None:
    """The package of the base is passed off as that of a BitFit model."""
    base, rows = (
        make_model(tmp_path / "base", learned=ROWS),
        write_rows(tmp_path / "rows.jsonl", [row | {"intent": "lamp"} for row in ROWS]),
    )
    merged = slmops.merge(finetune(base, rows, tmp_path / "bitfit", method="bitfit", max_steps=30).path, out=tmp_path / "merged")
    package = slmops.export(base, out=tmp_path / "package", precision="fp32").path
    found = slmops.verify(package, baseline=str(merged.path), data=[str(rows)], threads=1)  # pyright: ignore[reportAttributeAccessIssue]
    assert found.failed_stage is not None


@pytest.mark.slow
def test_qlora_keeps_its_effect_through_merge(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, rows = (
        make_model(tmp_path / "base", learned=ROWS),
        write_rows(tmp_path / "rows.jsonl", [row | {"intent": "lamp"} for row in ROWS]),
    )
    made = finetune(base, rows, tmp_path / "qlora", method="qlora", max_steps=12)
    assert made.manifest.facts["roads"]["merge"] == "exact, into the base's values in nf4"
    adapted = logits(hugging_face.load_adapted(base, made.path))
    merged = slmops.merge(made.path, out=tmp_path / "merged")
    assert nmse(logits(hugging_face.load_model(merged.path)), adapted) < 1e-10  # pyright: ignore[reportAttributeAccessIssue]


def test_show_prints_the_roads(made: dict[str, artifact.Artifact], capsys: pytest.CaptureFixture[str]) -> None:
    from slmops.cli import main

    with pytest.raises(SystemExit):
        main(["show", str(made["prefix"].path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "to merge refused: learned keys and values" in shown
