"""Frozen matrices multiplied in int8: how near a product is, which layers keep their own, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TEMPLATES, make_model, write_rows

import slmops
from slmops.errors import InvalidInput, Unavailable

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from test_training_step import adapted, assert_same, base_of, fast, pairs, plain  # noqa: E402

from slmops.config import MethodSettings  # noqa: E402
from slmops.training import precision  # noqa: E402
from slmops.training.batches import IGNORED  # noqa: E402
from slmops.training.step import prepare_step  # noqa: E402
from slmops.training.step.kernels import Kernels  # noqa: E402
from slmops.training.step.products import BOUND, Int8, Int8Matrix, Plain, Tried  # noqa: E402

has_vnni = pytest.mark.skipif(not precision._multiplies_bytes(), reason="this processor does not multiply bytes (VNNI)")
TYPES = [torch.float32, torch.bfloat16]


def off(found: Any, right: Any) -> float:
    return float((found.float() - right.float()).norm() / right.float().norm())


# A product -----------------------------------------------------------------------------------------------------------


@has_vnni
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_near_whatever_a_tokens_size(dtype: Any, transposed: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(96, 160, dtype=dtype)
    matrix = matrix.t() if transposed else matrix
    x = torch.randn(7, matrix.shape[1], dtype=dtype) * torch.logspace(-12, 12, 7)[:, None].to(dtype)
    found, right = Int8Matrix(matrix).times(x), x.float() @ matrix.float().t()
    assert found.dtype == dtype
    for token in range(len(x)):
        assert off(found[token], right[token]) < 0.025


@has_vnni
@pytest.mark.parametrize("dtype", TYPES)
def test_tokens_of_zeros_stay_zeros_and_what_is_no_number_stays_none(dtype: Any) -> None:
    x = torch.ones(4, 64, dtype=dtype)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    y = Int8Matrix(torch.ones(16, 64, dtype=dtype)).times(x)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert torch.allclose(y[3].float(), torch.full((16,), 64.0), rtol=0.01)


@has_vnni
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_largest_codes_do_not_overflow(sign: float) -> None:
    matrix, x = torch.ones(16, 8192), torch.full((3, 8192), sign)
    assert torch.allclose(Int8Matrix(matrix).times(x), x @ matrix.t(), rtol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_codes_are_the_nearest_and_leave_what_they_are_made_of(dtype: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(33, 257, dtype=dtype) * 3
    before = x.clone()
    codes, scales = Kernels().quantize(x)
    assert torch.equal(x, before)
    assert (codes.min() >= 1, codes.max() <= 255, scales.dtype) == (True, True, dtype)
    again = (codes.float() - 128) * scales.float()
    assert ((again - x.float()).abs() <= scales.float() * 0.501).all()


# A model -------------------------------------------------------------------------------------------------------------


@has_vnni
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma3Text", "Olmo2"])
@pytest.mark.parametrize("dtype", TYPES)
def test_loss_and_gradients_are_near(family: str, dtype: Any) -> None:
    rows = pairs()
    expected = plain(adapted(base_of(family)), rows)
    model = adapted(base_of(family).to(dtype))
    step = prepare_step(model, rows, int8=True)
    assert step.reason is None
    assert all(isinstance(layer.products, Int8) for layer in step.patched.layers)
    ours = fast(model, step, [rows])
    assert ours[0] == pytest.approx(expected[0], rel=0.01)
    assert set(ours[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        assert off(ours[1][name], gradient) < 0.2, name


@has_vnni
def test_the_trial_leaves_nothing_behind() -> None:
    model, rows = adapted(base_of("Llama")), pairs()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    step = prepare_step(model, rows, int8=True)
    assert all(weight.grad is None for weight in model.parameters())
    assert not step.patched.store.gradient.any()
    assert not any(isinstance(layer.products, Tried) for layer in step.patched.layers)
    assert model.training
    for name, weight in model.named_parameters():
        if name in before:
            assert torch.equal(weight, before[name]), name


@has_vnni
def test_a_layer_that_is_off_too_far_keeps_its_own() -> None:
    """One channel, which the layer does not look at, is 300 times the others: it leaves them no codes."""
    model, rows = base_of("Llama"), pairs()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = 300
        model.model.layers[1].mlp.gate_proj.weight[:, 5] = 0
        model.model.layers[1].mlp.up_proj.weight[:, 5] = 0
    model = adapted(model)
    expected = plain(model, rows)
    step = prepare_step(model, rows, int8=True)
    mlp = model.get_base_model().model.layers[1].mlp
    kept = [layer for layer in step.patched.layers if isinstance(layer.products, Plain)]
    assert any(layer.weight.data_ptr() == mlp.gate_proj.base_layer.weight.data_ptr() for layer in kept)
    assert 1 <= len(kept) < len(step.patched.layers)
    ours = fast(model, step, [rows])
    assert ours[0] == pytest.approx(expected[0], rel=0.02)


@has_vnni
def test_what_is_the_same_for_all_tokens_does_not_hide_an_error() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64), torch.randn(96, 64)
    plain, hidden = Tried(weight, None), Tried(weight, None)
    assert plain.error is None
    plain.forward(x)
    x[:, 5] += 300
    hidden.forward(x)
    assert plain.error is not None
    assert hidden.error is not None
    assert plain.error < BOUND < 0.5 < hidden.error


@has_vnni
def test_a_token_that_is_large_itself_does_not_either() -> None:
    """The first token often is, in what a model puts into its residual stream."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64), torch.randn(96, 64)
    x[:, 5], weight[:, 5] = 300, 0
    x[0] = 1e4 * torch.randn(64)
    tried = Tried(weight, None)
    tried.forward(x)
    assert tried.error is not None
    assert tried.error > 0.5


@has_vnni
def test_of_stacked_layers_the_worst_counts() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64), torch.randn(96, 64)
    x[:, 5] *= 20
    weight[64:, 5] = 0  # of the last layer, which is small beside the others
    weight[:64] *= 100
    whole, parts = Tried(weight, None), Tried(weight, None, (32, 32, 32))
    whole.forward(x)
    parts.forward(x)
    assert whole.error is not None
    assert parts.error is not None
    assert whole.error < BOUND < parts.error


@has_vnni
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_close(value: float) -> None:
    x, dy = torch.randn(20, 64), torch.randn(20, 96)
    x[:, 3] = value
    tried, back = Tried(torch.randn(96, 64), None), Tried(torch.randn(96, 64), None)
    tried.forward(x)
    dy[2, 3] = value
    back.backward(dy)
    assert tried.error == back.error == float("inf")


@has_vnni
def test_the_head_keeps_its_own() -> None:
    model, rows = adapted(base_of("Llama"), target_modules=["q_proj", "lm_head"]), pairs()
    step = prepare_step(model, rows, int8=True)
    head = model.get_base_model().lm_head.base_layer.weight
    heads = [layer for layer in step.patched.layers if layer.weight.data_ptr() == head.data_ptr()]
    assert [type(layer.products) for layer in heads] == [Plain]
    assert step.in_int8 == (len(step.patched.layers) - 1, len(step.patched.layers) - 1)


@has_vnni
def test_activation_checkpoints_change_nothing() -> None:
    rows, found = pairs(), []
    for recomputes in (False, True):
        model = adapted(base_of("Llama"))
        if recomputes:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        found.append(fast(model, prepare_step(model, rows, int8=True), [rows]))
    assert_same(found[0], found[1])


@has_vnni
def test_of_long_rows_their_supervised_ends_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(ids + [5] * 200, labels + [IGNORED] * 200) for ids, labels in pairs((150, 150))]
    seen: list[int] = []
    own = Tried.forward
    monkeypatch.setattr(Tried, "forward", lambda self, x: seen.append(len(x)) or own(self, x))
    step = prepare_step(adapted(base_of("Llama")), rows, int8=True)
    assert max(seen) <= 2 * 64
    assert step.in_int8 is not None
    assert step.in_int8[0] == step.in_int8[1] > 0


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("int8") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("int8") / "rows.jsonl")


def finetune(base: Path, rows: Path | None, out: Path, **settings: Any) -> slmops.artifact.Artifact:
    given = {**TEMPLATES, "validation_share": 0, "max_steps": 8, "batch_size": 4, "precision": "int8", "learning_rate": 3e-3}
    return slmops.finetune(base, rows, out=out, **(given | settings))


@has_vnni
def test_a_run_learns_what_one_in_fp32_learns_and_the_same_twice(base: Path, rows: Path, tmp_path: Path) -> None:
    ours = [finetune(base, rows, tmp_path / name, validation_share=0.2) for name in ("one", "two")]
    own = finetune(base, rows, tmp_path / "own", validation_share=0.2, precision=precision.held_in("int8"))
    assert ours[0].manifest.facts["in_int8"]["matrices"] > 0
    assert "in_int8" not in own.manifest.facts
    assert adapter_of(ours[0]) == adapter_of(ours[1]) != adapter_of(own)
    for name in ("train_loss", "validation_loss"):
        losses = [made.manifest.metrics[name]["value"] for made in (ours[0], own)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


@has_vnni
def test_several_tasks_too(base: Path, rows: Path, tmp_path: Path) -> None:
    made = finetune(
        base,
        None,
        tmp_path / "out",
        objective="multitask",
        task={"a": {"data": str(rows), **TEMPLATES}, "b": {"data": str(rows), **TEMPLATES}},
        prompt_template=None,
        completion_template=None,
    )
    assert made.manifest.facts["in_int8"]["matrices"] > 0


def adapter_of(made: slmops.artifact.Artifact) -> bytes:
    return (made.path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_dropout": 0.1}, "with lora_dropout PEFT computes the layers"),
        ({"method": "dora"}, "method dora computes its layers by itself"),
        ({"method": "qlora"}, "method qlora computes its layers by itself"),
        ({"method": "full"}, "method full computes its layers by itself"),
        ({"loss": "my_loss.py:Loss"}, "a loss of your own have another step"),
        ({"engine": "olive"}, "Olive's pass has no precision int8"),
    ],
)
def test_what_int8_does_not_go_with_is_said_before_anything_is_loaded(
    base: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        finetune(base, rows, tmp_path / "out", **settings)


def test_it_is_refused_where_matrices_are_shared_out(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidInput, match="no process has whole matrices"):
        finetune(base, rows, tmp_path / "out")


def test_a_base_that_must_stay_as_it_is_is_not_rounded() -> None:
    with pytest.raises(InvalidInput, match="rounds the weights"):
        precision.check_int8(MethodSettings(quantized_base="package"))


def test_where_it_would_not_be_sooner_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    with pytest.raises(Unavailable, match="no instructions for it"):
        precision.check_int8(MethodSettings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Unavailable, match="here a GPU trains"):
        precision.check_int8(MethodSettings())


@pytest.mark.parametrize(("bf16", "held"), [(True, "bf16"), (False, "fp32")])
def test_what_is_not_in_int8_is_in_what_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch, bf16: bool, held: str) -> None:
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda: bf16)
    assert [precision.held_in(name) for name in ("int8", "fp32", "bf16")] == [held, "fp32", "bf16"]
