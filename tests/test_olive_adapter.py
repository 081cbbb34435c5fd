"""Olive trains what we ask for: the settings reach it, the rows reach it untouched, and a failure is a failure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmops import progress
from slmops.errors import InvalidInput, RunFailed, Unavailable

pytest.importorskip("olive", reason="needs the extra slmops[olive]")

from slmops.olive_backend import OliveRun, problems, train_adapter
from slmops.olive_backend.linears import choose_targets, linear_layers
from slmops.olive_backend.process import child_environment, judge, last_error
from slmops.olive_backend.user_script import slmops_token_rows, token_row
from slmops.olive_backend.workflow import Recipe, compose, training_arguments

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(
    quantized=False,
    rank=4,
    alpha=8,
    dropout=0.1,
    epochs=2.0,
    max_steps=None,
    batch_size=8,
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.01,
    max_gradient_norm=0.5,
    seed=7,
)
ROWS = [{"text": f"{verb} {thing}", "intent": f"{verb}It"} for verb in ("play", "stop", "find") for thing in ("a", "bb", "some jazz", "it")]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, 64 wide, with a byte-level tokenizer: `</s>` is 1 in both."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("olive") / "model"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f"{row['text']}\nIntent: {row['intent']}" for row in ROWS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(model: Path) -> list[tuple[list[int], list[int]]]:
    """Token rows of three lengths, the completion and `</s>` counted."""
    from slmops.data import Tokenizer

    tokenizer = Tokenizer.load(model)
    found = []
    for row in ROWS:
        prompt, completion = tokenizer.encode(f"{row['text']}\nIntent:"), [*tokenizer.encode(f" {row['intent']}"), 1]
        found.append((prompt + completion, [-100] * len(prompt) + completion))
    return found


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def train(model: Path, rows: list, folder: Path, **changes: Any) -> OliveRun:
    settings: dict[str, Any] = {
        **{name: getattr(RECIPE, name) for name in RECIPE.__dataclass_fields__},
        "dropout": 0.0,
        "schedule": "linear",
        "warmup_steps": 0,
        "learning_rate": 3e-2,
        "batch_size": len(rows),
        "max_steps": 8,
        "target_modules": None,
        "gradient_accumulation": 1,
    }
    return train_adapter(model, rows, folder, **{**settings, **changes})


class Recording:
    """A sink of progress that remembers."""

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[float] = []
        self.total: int | None = None

    def start(self, label: str, total: int | None, unit: str) -> Recording:
        self.total = total
        return self

    def advance(self, steps: int = 1, **fields: float | int | str) -> None:
        self.steps += steps
        self.losses.append(float(fields["loss"]))

    def finish(self, task: progress.Task) -> None:
        pass

    def say(self, line: str) -> None:
        pass


# --- the settings


def test_settings_reach_the_workflow(tmp_path: Path) -> None:
    workflow = compose(tmp_path, tmp_path / "rows.jsonl", 20, tmp_path, RECIPE, ["q_proj"], cuda=False)
    config = workflow["passes"]["adapter"]["config"]
    assert workflow["passes"]["adapter"]["type"] == "LoRA"
    assert (config["r"], config["alpha"], config["lora_dropout"], config["target_modules"]) == (4, 8, 0.1, ["q_proj"])
    assert (config["torch_dtype"], config["device_map"]) == ("float32", None)
    arguments = config["training_args"]
    expected = {
        "max_steps": 6,  # 2 epochs of ceil(20 / 8)
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "seed": 7,
        "data_seed": 7,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "logging_nan_inf_filter": False,
    }
    assert {key: arguments[key] for key in expected} == expected
    assert problems(workflow) == []


def test_qlora_and_gpu_workflows_are_clean(tmp_path: Path) -> None:
    quantized = compose(tmp_path, tmp_path / "rows.jsonl", 20, tmp_path, replace(RECIPE, quantized=True), ["q_proj"], cuda=False)
    run = quantized["passes"]["adapter"]
    assert (run["type"], run["config"]["quant_type"], run["config"]["double_quant"], run["config"]["compute_dtype"]) == (
        "QLoRA",
        "nf4",
        True,
        "float32",
    )
    assert "target_modules" not in run["config"]  # the pass would overwrite it
    on_gpu = compose(tmp_path, tmp_path / "rows.jsonl", 20, tmp_path, RECIPE, ["q_proj"], cuda=True)
    assert (on_gpu["passes"]["adapter"]["config"]["torch_dtype"], on_gpu["passes"]["adapter"]["config"]["device_map"]) == (
        "bfloat16",
        "auto",
    )
    assert on_gpu["passes"]["adapter"]["config"]["training_args"]["use_cpu"] is False
    assert problems(quantized) == []


@pytest.mark.parametrize("variant", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_workflows_of_every_pass_are_clean(tmp_path: Path, variant: str) -> None:
    """No key that Olive would drop, and no dropout for a pass that has none."""
    workflow = compose(tmp_path, tmp_path / "rows.jsonl", 20, tmp_path, replace(RECIPE, variant=variant), ["q_proj"], cuda=False)
    run = workflow["passes"]["adapter"]
    assert run["type"] == variant
    assert ("lora_dropout" in run["config"]) == (variant in ("LoRA", "DoRA"))
    assert problems(workflow) == []


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [(20, {}, 6), (20, {"max_steps": 4}, 4), (20, {"epochs": 0.5}, 2), (1, {"epochs": 0.1}, 1), (16, {"epochs": 1.0}, 2)],
)
def test_steps(rows: int, changes: dict[str, Any], steps: int) -> None:
    assert replace(RECIPE, **changes).steps(rows) == steps


def test_schedules(tmp_path: Path) -> None:
    names = {
        name: training_arguments(replace(RECIPE, schedule=name), 1, tmp_path, cuda=False)["lr_scheduler_type"]
        for name in ("linear", "cosine", "constant")
    }
    assert names == {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    with pytest.raises(InvalidInput, match="schedule 'zigzag' is none of linear, cosine, constant"):
        training_arguments(replace(RECIPE, schedule="zigzag"), 1, tmp_path, cuda=False)


def test_all_linear_layers_but_the_head(model: Path) -> None:
    layers = linear_layers(model)
    assert len(layers) == 2 * len(LINEARS)
    assert choose_targets(layers, None, quantized=False) == list(LINEARS)
    assert choose_targets(layers, ["q_proj", "layers.1.mlp.up_proj"], quantized=False) == ["q_proj", "layers.1.mlp.up_proj"]
    assert choose_targets(layers, list(LINEARS), quantized=True) == list(LINEARS)
    with pytest.raises(InvalidInput, match="no linear layer lm_head, query"):
        choose_targets(layers, ["q_proj", "lm_head", "query"], quantized=False)
    with pytest.raises(InvalidInput, match="adapts every linear layer, and these leave out model.layers.0.self_attn.k_proj"):
        choose_targets(layers, ["q_proj"], quantized=True)


def test_what_olive_cannot_honour_is_refused(model: Path, rows: list, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="gradient_accumulation 2: Olive averages over batches"):
        train(model, rows, tmp_path / "out", gradient_accumulation=2)
    with pytest.raises(InvalidInput, match="no rows"):
        train(model, [], tmp_path / "out", batch_size=1)
    with pytest.raises(InvalidInput, match="QLoRA pass adapts every linear layer"):
        train(model, rows, tmp_path / "out", quantized=True, target_modules=["q_proj"])
    with pytest.raises(InvalidInput, match="PEFT's LoHa has no dropout"):
        train(model, rows, tmp_path / "out", variant="LoHa", dropout=0.1)
    with pytest.raises(InvalidInput, match="no quantized pass DoRA"):
        train(model, rows, tmp_path / "out", variant="DoRA", quantized=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "quantized"), [("olive", False), ("requests", False), ("bitsandbytes", True)])
def test_missing_library(model: Path, rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, quantized: bool) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable, match="is not installed; it is needed for") as caught:
        train(model, rows, tmp_path / "out", quantized=quantized)
    assert (caught.value.exit_code, caught.value.hint) == (3, "pip install 'slmops[olive]'")


def test_environment_of_the_process(tmp_path: Path) -> None:
    before = dict(__import__("os").environ)
    variables = child_environment(tmp_path, cuda=False, threads=1)
    assert variables["OLIVE_DISABLE_TELEMETRY"] == variables["HF_HUB_OFFLINE"] == "1"
    assert variables["HF_DATASETS_CACHE"].startswith(str(tmp_path))
    assert (variables["OMP_NUM_THREADS"], variables["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert child_environment(tmp_path, cuda=True, threads=2)["OMP_NUM_THREADS"] == "2"
    assert dict(__import__("os").environ) == before


# --- the rows


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([], [], "0 tokens and 0 labels"),
        ([1, 2], [2], "2 tokens and 1 labels"),
        ([1, 2], [1, -100], "no token to learn"),
        ([1, 2], [-100, 3], "neither -100 nor its token"),
    ],
)
def test_a_row_that_cannot_be_trained_on(ids: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        token_row(ids, labels, "here")


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input_ids": [5, 6, 1], "labels": [-100, 6, 1]}\n')
    assert slmops_token_rows(str(path), 1) == [{"input_ids": [5, 6, 1], "attention_mask": [1, 1, 1], "labels": [-100, 6, 1]}]
    with pytest.raises(ValueError, match="1 rows, expected 2"):
        slmops_token_rows(str(path), 2)
    path.write_text("")
    with pytest.raises(ValueError, match="0 rows, expected some"):
        slmops_token_rows(str(path))


# --- what Olive left behind


def left_behind(work: Path, log: str = "", **result: Any) -> Path:
    work.mkdir(exist_ok=True)
    (work / "olive.log").write_text(log)
    if result:
        (work / "result.json").write_text(json.dumps({"adapter": "x", "not_finite": [], "peak_memory_bytes": 1, **result}))
    return work


GOOD = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"ended_at": 2, "seconds": 0.5}]


def test_a_whole_run_passes(tmp_path: Path) -> None:
    outcome = judge(left_behind(tmp_path, adapter="somewhere"), 0, GOOD, 2)
    assert (outcome.adapter, outcome.history, outcome.steps, outcome.loop_seconds) == (Path("somewhere"), GOOD[:2], 2, 0.5)


@pytest.mark.parametrize(
    ("code", "history", "result", "message"),
    [
        (0, GOOD, {}, "Olive made no adapter: OSError: no space"),  # Olive's own exit code after most failures
        (1, GOOD, {}, "Olive made no adapter: OSError: no space"),
        (4, GOOD, {"adapter": "x"}, "Olive made no adapter"),
        (-9, [], {}, "stopped by the system, most likely for lack of memory"),
        (3, [], {}, "does not take the workflow that slmops writes"),
        (0, [GOOD[0], {"ended_at": 1, "seconds": 0.1}], {"adapter": "x"}, "Olive stopped at step 1 of 2"),
        (0, [], {"adapter": "x"}, "Olive stopped at step 0 of 2"),
        (0, [{"step": 1, "loss": math.nan}], {"adapter": "x"}, "training diverged: the loss is nan at step 1"),
        (1, [{"step": 1, "loss": math.inf}], {}, "training diverged: the loss is inf at step 1"),
        (0, GOOD, {"adapter": "x", "not_finite": ["a.lora_A"]}, "training diverged: a.lora_A holds values that are no numbers"),
    ],
)
def test_anything_less_fails(tmp_path: Path, code: int, history: list, result: dict[str, Any], message: str) -> None:
    with pytest.raises(RunFailed, match=message) as caught:
        judge(left_behind(tmp_path, "OSError: no space\n[INFO] the end\n", **result), code, history, 2)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "Traceback\n  File\nValueError: first\n[INFO] x\npeft.utils.error.NoMatch_Error: second\nbye",
            "peft.utils.error.NoMatch_Error: second",
        ),
        ("[2026] [ERROR] [engine.py:1] lost\nbye", "[2026] [ERROR] [engine.py:1] lost"),
        ("hello\n\n", "hello"),
        ("", "it wrote nothing"),
    ],
)
def test_last_error(log: str, line: str) -> None:
    assert last_error(log) == line


# --- real runs


@pytest.mark.slow
def test_lora_run(model: Path, rows: list, tmp_path: Path) -> None:
    sink = Recording()
    with progress.watch(sink):
        run = train(model, rows, tmp_path / "first")
    again = train(model, rows, tmp_path / "second")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]  # the work folders are gone
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert run.history == again.history
    assert [entry["step"] for entry in run.history] == list(range(1, 9))
    assert run.history[-1]["loss"] < 0.9 * run.history[0]["loss"]
    assert run.history[0]["learning_rate"] == pytest.approx(3e-2)
    assert run.history[0]["grad_norm"] > 0
    # Every row is in the one batch of a step, and a new adapter changes nothing: the rows and labels arrived untouched.
    assert run.history[0]["loss"] == pytest.approx(loss_of_base(model, rows), abs=1e-5)
    # rank x (in + out) of q, k, v, o, gate, up, down in two layers
    assert run.trainable_parameters == 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    assert (run.steps, sink.total, sink.steps) == (8, 8, 8)
    assert sink.losses == [round(entry["loss"], 4) for entry in run.history]
    assert 0 < run.loop_seconds < 60
    assert run.peak_memory_bytes > 10**8
    details = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert (details["r"], details["lora_alpha"], details["lora_dropout"]) == (4, 8, 0.0)
    assert (details["target_modules"], details["base_model_name_or_path"]) == (sorted(LINEARS), str(model))
    assert loss_of_adapter(model, tmp_path / "first", rows) < run.history[-1]["loss"] + 0.1


@pytest.mark.slow
def test_qlora_run(model: Path, rows: list, tmp_path: Path) -> None:
    run = train(model, rows, tmp_path / "out", quantized=True, max_steps=4)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert run.history[0]["loss"] != pytest.approx(loss_of_base(model, rows), abs=1e-5)  # the base is in 4 bits
    assert run.history[0]["loss"] == pytest.approx(loss_of_base(model, rows), abs=0.2)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == sorted(LINEARS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "kind", "tensors"),
    [
        # magnitudes (outputs) beside rank x (in + out); two pairs in place of one; w1 whole, and w2 too where it is small
        ("DoRA", "LORA", {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}),
        ("LoHa", "LOHA", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        ("LoKr", "LOKR", {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    ],
)
def test_the_other_passes_run(model: Path, rows: list, tmp_path: Path, variant: str, kind: str, tensors: set[str]) -> None:
    """A new adapter changes nothing, it learns, PEFT loads it, and every layer has its tensors."""
    import torch
    from safetensors.torch import load_file

    from slmops.runtime.hugging_face import load_adapted

    run = train(model, rows, tmp_path / "out", variant=variant)
    assert run.history[0]["loss"] == pytest.approx(loss_of_base(model, rows), abs=1e-4)
    assert run.history[-1]["loss"] < 0.9 * run.history[0]["loss"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config.get("use_dora", False)) == (kind, "CAUSAL_LM", variant == "DoRA")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.split("_proj.")[1] for name in state} == tensors
    assert run.trainable_parameters == sum(tensor.numel() for tensor in state.values())
    ids = torch.tensor([rows[0][0]])
    adapted: Any = load_adapted(model, tmp_path / "out")
    with torch.no_grad():
        with_adapter: Any = adapted(ids).logits
        with adapted.disable_adapter():
            without: Any = adapted(ids).logits
    assert float((with_adapter - without).abs().max()) > 0.1


@pytest.mark.slow
def test_broken_weights_are_a_failure(model: Path, rows: list, tmp_path: Path) -> None:
    broken = copy_of(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(RunFailed, match="Olive made no adapter: .*Safetensor"):
        train(broken, rows, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["olive.log"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_a_failure(model: Path, rows: list, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = copy_of(model, tmp_path / "bad")
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="training diverged: the loss is nan at step 1"):
        train(bad, rows, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "out"), [("lora_cpu.json", "adapter_out"), ("qlora_cpu.json", "qlora_adapter_out")])
def test_shipped_workflow_runs(model: Path, tmp_path: Path, name: str, out: str) -> None:
    """As olive_configs/README.md says: a folder with olive_configs, model and rows.jsonl, and one command."""
    (tmp_path / "olive_configs").symlink_to(ROOT / "olive_configs")
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    command = [sys.executable, "-m", "olive", "run", "--config", f"olive_configs/{name}"]
    variables = {**child_environment(tmp_path, cuda=False, threads=1), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-2000:]
    assert f"{len(ROWS) * 4} rows, " in output
    adapter = tmp_path / out / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in adapter.iterdir()}
    assert loss_of_adapter(model, adapter, token_rows(model)) < loss_of_base(model, token_rows(model)) - 0.01


def copy_of(model: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(model, folder))


def token_rows(model: Path) -> list[tuple[list[int], list[int]]]:
    from slmops.data import Tokenizer, choose_interface, encode_rows

    interface, _ = choose_interface(model, ROWS, prompt_template="{text}\nIntent:", completion_template=" {intent}")
    return [(list(s.ids), list(s.labels)) for s in encode_rows(ROWS, Tokenizer.load(model), interface).sequences]


def loss_of_base(model: Path, rows: list) -> float:
    from transformers import AutoModelForCausalLM

    return loss_of(AutoModelForCausalLM.from_pretrained(model), rows)


def loss_of_adapter(model: Path, adapter: Path, rows: list) -> float:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return loss_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter)), rows)


def loss_of(network: Any, rows: list) -> float:
    """Mean cross entropy of the counted tokens, each row computed alone."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, labels in rows:
            logits = network.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            targets = torch.tensor(labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
    return total / count
