"""The fast step computes what the plain one does: loss and gradients, in each family, for rows of any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from slmops.training.batches import IGNORED  # noqa: E402
from slmops.training.step import Padded, prepare_step  # noqa: E402
from slmops.training.step import head as head_module  # noqa: E402
from slmops.training.step.kernels import Kernels  # noqa: E402
from slmops.training.step.kernels.compiled import CompiledKernels  # noqa: E402
from slmops.training.step.layouts import Joined, shared_beginning  # noqa: E402
from slmops.training.step.rows import Rows  # noqa: E402

Pair = tuple[list[int], list[int]]
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 7},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Phi3": {},
    "Gemma": {},
    "Gemma3Text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Olmo2": {},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base_of(family: str, **changes: Any) -> Any:
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3Text" else f"{family}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(SIZES | FAMILIES.get(family, {}) | changes)))
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)  # fresh ones hide mistakes
    return model


def adapted(base: Any, **settings: Any) -> Any:
    targets = settings.pop("target_modules", "all-linear")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12} | settings, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def pairs(lengths: tuple[int, ...] = (9, 14, 12, 12, 17), seed: int = 0) -> list[Pair]:
    """Rows whose last three tokens are counted, and one in the middle of every other."""
    random = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = [1, *random.integers(3, 300, length - 1).tolist()]
        labels = [IGNORED] * (length - 3) + ids[-3:]
        if i % 2:
            labels[3] = ids[3]
        rows.append((ids, labels))
    return rows


def plain(model: Any, rows: list[Pair]) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the model as transformers and PEFT compute them, row by row, from full logits."""
    model.train()
    total: Any = 0.0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].float()
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
    total.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    for weight in model.parameters():
        weight.grad = None
    return float(total.detach()), found


def fast(model: Any, step: Any, batches: list[list[Pair]]) -> tuple[float, dict[str, Any]]:
    """The same by the fast step, gradients accumulated over batches."""
    model.train()
    total = 0.0
    for batch in batches:
        loss = step.layout.summed_loss(model, step.layout.collate(batch))
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model, step)


def gradients(model: Any, step: Any) -> dict[str, Any]:
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None and "slmops_pairs" not in name}
    store = step.patched.store
    if store is not None:
        flat = store.parameter.grad.split([member.numel() for member in store.members])
        found |= {names[id(member)]: part.view(member.shape) for member, part in zip(store.members, flat, strict=True)}
    return found


def assert_same(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]], bound: float = 1e-5) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=bound)
    assert set(ours[1]) == set(theirs[1])
    for name, gradient in theirs[1].items():
        assert float(gradient.abs().max()) > 0, name
        distance = float((ours[1][name] - gradient).norm() / gradient.norm())
        assert distance <= bound, f"{name}: {distance}"


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_model(family: str) -> None:
    model, rows = adapted(base_of(family)), pairs()
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    assert step.reason is None, step.reason
    assert isinstance(step.layout, Joined)
    assert_same(fast(model, step, [rows]), expected)


def test_what_the_common_form_is_made_of() -> None:
    model = adapted(base_of("Llama"))
    step = prepare_step(model, pairs())
    assert step.patched.kinds == {"norms": 7, "linears": 6, "mlps": 3, "attentions": 3}
    assert step.patched.left == []
    # Norms on queries and keys (Qwen 3) and layers without positions (SmolLM 3) keep their own attention layer.
    assert prepare_step(adapted(base_of("Qwen3")), pairs()).patched.kinds.get("attentions") is None
    assert prepare_step(adapted(base_of("SmolLM3")), pairs()).patched.kinds["attentions"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["up_proj"]},
        {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1, 2]},
        {"use_rslora": True, "rank_pattern": {"k_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 5}},
        {"lora_dropout": 1e-9},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_other_shapes_of_an_adapter_too(settings: dict[str, Any]) -> None:
    model, rows = adapted(base_of("Llama", tie_word_embeddings=False), **settings), pairs()
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    assert step.reason is None
    assert bool(step.patched.left) == bool(settings.keys() & {"lora_dropout", "use_dora"}), "PEFT's own forward"
    assert_same(fast(model, step, [rows]), expected)


@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (5, 30), (41,), (9, 14, 12)])
@pytest.mark.parametrize("multiple", [1, 4, 32])
def test_filling_up_changes_nothing(lengths: tuple[int, ...], multiple: int) -> None:
    model, rows = adapted(base_of("Llama")), pairs(lengths)
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    step.layout.multiple = multiple
    batch = step.layout.collate(rows)
    assert batch["input_ids"].shape[1] % multiple == len(batch["targets"]) % multiple == 0
    assert_same(fast(model, step, [rows]), expected)


def test_tokens_filled_up_to_as_many_as_the_lines_have_are_not_taken_for_them() -> None:
    """8 rows of up to 40 tokens, 310 in all, filled up to 320: exactly the places of 8 lines of 40."""
    rows = Rows([37, 38, 38, 39, 39, 39, 40, 40], multiple=32)
    assert rows.tokens == 320 == len(rows.lengths) * rows.longest
    assert rows.lines is not None and rows.places is not None
    values = torch.arange(320.0)[:, None]
    assert rows.from_lines(rows.to_lines(values))[:310].equal(values[:310])


def beginning_alike(count: int, lengths: tuple[int, ...] = (9, 14, 12, 12, 17)) -> list[Pair]:
    """Rows that begin with the same tokens, none of them counted: a system prompt."""
    prompt = np.random.default_rng(7).integers(3, 300, count).tolist()
    return [([1, *prompt, *ids[1:]], [*[IGNORED] * (count + 1), *labels[1:]]) for ids, labels in pairs(lengths)]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3", "Gemma3Text"])
def test_tokens_that_all_rows_begin_with_are_computed_once(family: str) -> None:
    model, rows = adapted(base_of(family)), beginning_alike(21)
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    batch = step.layout.collate(rows)
    assert batch["rows"].shared == 22
    assert batch["input_ids"].shape[1] == 22 + sum(len(ids) - 1 - 22 for ids, _ in rows)
    assert batch["input_ids"].shape[1] < sum(len(ids) - 1 for ids, _ in rows) / 2
    assert_same(fast(model, step, [rows]), expected)
    model.zero_grad()
    step.layout.multiple = 32
    assert_same(fast(model, step, [rows]), expected)
    with torch.inference_mode():
        assert float(step.layout.summed_loss(model, step.layout.collate(rows))) == pytest.approx(expected[0], rel=1e-5)


def test_long_beginnings_and_activation_checkpoints_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Kernels, CompiledKernels):
        monkeypatch.setattr(kind, "longest_row", 10)
    model, rows = adapted(base_of("Mistral")), beginning_alike(40)
    expected = plain(model, rows)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(fast(model, prepare_step(model, rows), [rows]), expected)


def test_what_is_counted_or_dropped_by_row_is_not_shared() -> None:
    rows = beginning_alike(6)
    assert shared_beginning(rows) == 7
    assert shared_beginning(rows[:1]) == 0
    ids, labels = rows[2]
    counted = [*labels[:4], ids[4], *labels[5:]]
    assert shared_beginning([*rows[:2], (ids, counted)]) == 3, "the token that predicts a counted one is the row's own"
    assert shared_beginning([(ids, labels)] * 3) == len(ids) - 4, "the next token is counted"
    assert shared_beginning([(ids, [IGNORED] * len(ids))] * 3) == len(ids) - 2, "every row keeps a token"
    model = adapted(base_of("Llama"), lora_dropout=0.1)
    assert prepare_step(model, rows).layout.collate(rows)["rows"].shared == 0


def test_long_rows_and_dropout_go_through_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Kernels, CompiledKernels):
        monkeypatch.setattr(kind, "longest_row", 10)
    for family in ("Llama", "Mistral"):
        model, rows = adapted(base_of(family)), pairs()
        expected = plain(model, rows)
        step = prepare_step(model, rows)
        assert_same(fast(model, step, [rows]), expected)


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module.Head, "chunk", property(lambda self: 4))
    for settings in ({}, {"modules_to_save": ["lm_head"]}):
        model, rows = adapted(base_of("Granite", tie_word_embeddings=False), **settings), pairs()
        expected = plain(model, rows)
        step = prepare_step(model, rows)
        assert_same(fast(model, step, [rows]), expected)
        with torch.inference_mode():
            assert float(step.layout.summed_loss(model, step.layout.collate(rows))) == pytest.approx(expected[0], rel=1e-5)


def test_batches_accumulate() -> None:
    model, rows = adapted(base_of("Llama")), pairs()
    expected = plain(model, rows)
    step = prepare_step(model, rows)
    assert_same(fast(model, step, [rows[:2], rows[2:]]), expected)


def test_activation_checkpoints_change_nothing() -> None:
    model, rows = adapted(base_of("Llama")), pairs()
    expected = plain(model, rows)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    step = prepare_step(model, rows)
    assert_same(fast(model, step, [rows]), expected)


def test_bf16_is_near() -> None:
    rows = pairs()
    expected = plain(adapted(base_of("Llama")), rows)
    model = adapted(base_of("Llama").to(torch.bfloat16))
    step = prepare_step(model, rows)
    assert step.reason is None
    assert step.layout.multiple > 1, "oneDNN makes a kernel for each new shape"
    ours = fast(model, step, [rows])
    assert ours[0] == pytest.approx(expected[0], rel=0.01)
    for name, gradient in expected[1].items():
        assert float((ours[1][name] - gradient).norm() / gradient.norm()) < 0.1, name


# What a row sees -----------------------------------------------------------------------------------------------------


def test_a_row_sees_itself_alone_and_an_unsupervised_token_is_never_counted() -> None:
    model, rows = adapted(base_of("Llama")), pairs()
    step = prepare_step(model, rows)
    with torch.no_grad():
        loss = {seed: step.layout.hidden(*taken(step, [pairs(seed=seed)[0], rows[1], pairs(seed=seed)[2]])) for seed in (1, 2)}
        start, end = len(rows[0][0]) - 1, len(rows[0][0]) + len(rows[1][0]) - 3  # the first token of both stands once
        assert float((loss[1][start:end] - loss[2][start:end]).abs().max()) < 1e-5
        assert float((loss[1][:start] - loss[2][:start]).abs().max()) > 0.1
    batch = step.layout.collate(rows)
    counted = sum(label != IGNORED for _, labels in rows for label in labels[1:])
    assert int((batch["targets"] != IGNORED).sum()) == counted


def taken(step: Any, rows: list[Pair]) -> tuple[Any, Any, Any]:
    batch = step.layout.collate(rows)
    return batch["input_ids"], batch["position_ids"], batch["rows"]


# What it cannot do ---------------------------------------------------------------------------------------------------


def test_where_tokens_meet_outside_of_attention_rows_are_padded() -> None:
    sizes = {"block_ff_dim": 96, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3}
    model, rows = adapted(base_of("Lfm2", **sizes)), pairs()
    step = prepare_step(model, rows)
    assert step.reason is not None and "joined rows change what the model computes" in step.reason
    assert isinstance(step.layout, Padded)


def test_capped_attention_and_virtual_tokens_are_padded_too() -> None:
    rows = pairs()
    capped = prepare_step(adapted(base_of("Gemma2", sliding_window=8)), rows)
    assert capped.reason is not None and "attn_logit_softcapping" in capped.reason
    prompt = peft.get_peft_model(base_of("Llama"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    step = prepare_step(prompt, rows)
    assert step.reason == "the method puts tokens before each row"
    loss = step.layout.summed_loss(prompt, step.layout.collate(rows[:1]))
    assert torch.isfinite(loss)


def test_peft_saves_what_was_trained() -> None:
    model, rows = adapted(base_of("Llama")), pairs()
    step = prepare_step(model, rows)
    before = {name: w.clone() for name, w in peft.get_peft_model_state_dict(model).items()}
    assert len(before) == 3 * 7 * 2, "the one parameter is not among PEFT's"
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [p.numel() for p in trained] == [sum(w.numel() for w in before.values())]
    fast(model, step, [rows])
    torch.optim.AdamW(trained, lr=1e-2).step()
    after = peft.get_peft_model_state_dict(model)
    assert all(not after[name].equal(weight) for name, weight in before.items())
    peft.set_peft_model_state_dict(model, before)
    assert all(peft.get_peft_model_state_dict(model)[name].equal(weight) for name, weight in before.items())
    expected, _ = plain(adapted(base_of("Llama")), rows)
    with torch.no_grad():
        assert float(step.layout.summed_loss(model, step.layout.collate(rows))) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_the_librarys_where_probabilities_vanish_too() -> None:
    from slmops.training.step.head import CrossEntropy

    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(7, 50, generator=generator)
    logits[2, 3], logits[4, 0], logits[5, 9] = 300.0, -500.0, 90.0  # far beyond what fp32 probabilities can hold
    targets = torch.tensor([1, 49, 5, IGNORED, 0, 9, 0])
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = CrossEntropy.apply(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [torch.autograd.grad(3 * loss, x)[0] for loss, x in ((found, ours), (expected, theirs))]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5
    assert not gradients[0][3].any()
