"""A graph that takes adapters is the base bit for bit without one, and PEFT with one, whatever the family, the ranks and the layers."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_graph import make_other, nmse
from tiny import make_export, make_model

from slmops.errors import BadArtifact, Unavailable
from slmops.graph import checking
from slmops.graph.linears import HEAD, linears, load_graph
from slmops.graph.lora import ADAPTER, A, B, Slot, add_slots, save_adapted_twins, save_fast_twin, slots
from slmops.graph.rewriting import ADAPTED, DATA, FAST, FULL, MAIN
from slmops.packing.pairs import graph_tensors, read_pairs
from slmops.runtime import operators
from slmops.runtime.adapter_files import Tensors
from slmops.runtime.decoder import Cache, Decoder
from slmops.runtime.hugging_face import load_model, parameter_shapes, read_adapter_config

# Three rows of 24 tokens: in two dimensions they are 72 rows of one matrix.
IDS = np.concatenate([np.ones((3, 1), np.int64), np.random.default_rng(0).integers(3, 300, (3, 23))], axis=1)

FAMILIES = {
    "llama tied": lambda folder: make_model(folder),
    "llama untied": lambda folder: make_model(folder, tie_word_embeddings=False),
    "llama biases": lambda folder: make_other(folder, "Llama", attention_bias=True, mlp_bias=True),
    "qwen2": lambda folder: make_other(folder, "Qwen2"),
    "qwen3": lambda folder: make_other(folder, "Qwen3", head_dim=32, tie_word_embeddings=True),
    "phi3": lambda folder: make_other(folder, "Phi3", original_max_position_embeddings=128),
    "mistral": lambda folder: make_other(folder, "Mistral"),
    "gemma": lambda folder: make_other(folder, "Gemma", head_dim=16),
    "smollm3": lambda folder: make_other(folder, "SmolLM3"),
    "granite": lambda folder: make_other(
        folder, "Granite", attention_multiplier=0.25, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
}
# With a bias behind the fused gate and up, the two take one pair, and the builder fuses norms otherwise.
SLOTS = {"phi3": 8, "llama biases": 8}


@dataclass(frozen=True)
class Family:
    """A tiny model, its export, and the same export once its graphs take adapters."""

    name: str
    model: Path
    export: Path
    adapted: Path
    slots: list[Slot]

    @cached_property
    def decoders(self) -> dict[str, Decoder]:
        """Sessions by the file of their graph."""
        return {name: decoder(self.adapted, name) for name in (MAIN, ADAPTED, FULL)}

    def run(self, tensors: Tensors | None, graph: str = FULL) -> np.ndarray:
        """Return the logits of IDS."""
        return run(self.decoders[graph] if tensors is None else self.decoders[graph].with_adapter(tensors))


def decoder(folder: Path, name: str) -> Decoder:
    return Decoder(folder, json.loads((folder / "genai_config.json").read_text()), name, 1)


def run(found: Decoder, ids: np.ndarray = IDS) -> np.ndarray:
    rows, tokens = ids.shape
    return found.run(ids, np.full(rows, tokens), Cache(found, rows, tokens).arrays)


def make_family(name: str, place: Path) -> Family:
    model, export, adapted = FAMILIES[name](place / "model"), place / "export", place / "adapted"
    make_export(export, model, "fp32")
    shutil.copytree(export, adapted)
    return Family(name, model, export, adapted, save_adapted_twins(adapted, parameter_shapes(model)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family("llama tied", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Family) -> Iterator[Family]:
    made = llama if request.param == llama.name else make_family(request.param, tmp_path_factory.mktemp("family"))
    yield made
    made.__dict__.pop("decoders", None)


def peft_logits(family: Family, folder: Path, **settings: Any) -> np.ndarray:
    """Write a PEFT adapter with random A and B; return the logits that it gives in PyTorch, (rows, tokens, vocabulary)."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(len(settings))
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    network: Any = load_model(family.model).eval()
    with torch.no_grad():
        base = network(torch.tensor(IDS)).logits.numpy()
        adapted: Any = get_peft_model(network, LoraConfig(**settings)).eval()
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        expected = adapted(torch.tensor(IDS)).logits.numpy()
    adapted.save_pretrained(folder)
    assert nmse(expected, base) > 1e-4, "the adapter has an effect"
    return expected


def tensors_of(folder: Path, found: list[Slot]) -> Tensors:
    return graph_tensors(read_pairs(folder, read_adapter_config(folder)), found, folder)


def _named(family: Family, *parts: str) -> list[str]:
    """Return the modules that have one of these names: Phi3 has q, k and v, and gate and up, as one module each."""
    own = {"q_proj": "qkv_proj", "v_proj": "qkv_proj", "up_proj": "gate_up_proj"} if family.name == "phi3" else {}
    return [own.get(part, part) for part in parts]


def _settings(family: Family, case: str) -> dict[str, Any]:
    q, up, down = _named(family, "q_proj", "up_proj", "down_proj")
    return {
        "all layers": {},
        "ranks and alphas": {"rank_pattern": {q: 2, down: 11}, "alpha_pattern": {q: 3, rf"layers\.1\.mlp\.{up}": 20, "o_proj": 1}},
        "rslora with ranks": {"use_rslora": True, "rank_pattern": {up: 9}, "alpha_pattern": {up: 2}},
        "q and v": {"r": 1, "target_modules": sorted(set(_named(family, "q_proj", "v_proj")))},
        "one layer's up": {"target_modules": [up], "layers_to_transform": [1]},
    }[case]


CASES = ("all layers", "ranks and alphas", "rslora with ranks", "q and v", "one layer's up")


@pytest.mark.slow
def test_without_an_adapter_the_graphs_are_the_base_bit_for_bit(family: Family) -> None:
    np.testing.assert_array_equal(family.run(None), run(decoder(family.export, FULL)))
    np.testing.assert_array_equal(family.run(None, ADAPTED), family.run(None, MAIN))
    assert (family.adapted / MAIN).read_bytes() == (family.export / MAIN).read_bytes()
    assert (family.adapted / DATA).read_bytes() == (family.export / DATA).read_bytes()
    assert checking.adapter_problems(family.adapted) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_with_an_adapter_logits_are_pefts(family: Family, tmp_path: Path, case: str) -> None:
    expected = peft_logits(family, tmp_path, **_settings(family, case))
    tensors = tensors_of(tmp_path, family.slots)
    found = family.run(tensors)
    assert nmse(found, expected) <= 1e-10
    assert nmse(family.run(tensors, ADAPTED)[:, -1], found[:, -1]) <= 1e-11, "the last token's twin"
    assert family.run(tensors, ADAPTED).shape[1] == 1
    # And nothing of it stays: the next run without it is the base.
    np.testing.assert_array_equal(family.run(None), run(decoder(family.export, FULL)))


@pytest.mark.slow
@pytest.mark.skipif(operators.library_name() is None, reason=f"nothing is compiled here: {operators.why_not_compiled()}")
@pytest.mark.parametrize("case", CASES)
def test_our_operator_is_the_graph_of_onnxruntimes_own(family: Family, tmp_path: Path, case: str) -> None:
    peft_logits(family, tmp_path, **_settings(family, case))
    tensors = tensors_of(tmp_path, family.slots)
    layers = save_fast_twin(family.adapted, parameter_shapes(family.model))
    assert checking.adapter_problems(family.adapted) == []
    fast = decoder(family.adapted, FAST)
    np.testing.assert_array_equal(run(fast), family.run(None, MAIN))
    found = run(fast.with_adapter({ADAPTER: operators.packed(tensors, layers)}))
    assert nmse(found, family.run(operators.rounded(tensors), ADAPTED)) <= 1e-10
    assert nmse(found, family.run(tensors, ADAPTED)) <= 1e-5, "half precision"
    (family.adapted / FAST).unlink()


@pytest.mark.slow
def test_every_linear_layer_but_the_head_takes_a_pair(family: Family) -> None:
    shapes = parameter_shapes(family.model)
    graph = load_graph(family.adapted / FULL)
    wanted = {name for name, shape in shapes.items() if len(shape) == 2 and "embed_tokens" not in name and HEAD not in name}
    assert {name for slot in family.slots for name, _ in slot.parts} == wanted
    assert all(sum(rows for _, rows in slot.parts) == slot.outputs for slot in family.slots)
    assert len(family.slots) == SLOTS.get(family.name, 10)
    inputs = {value.name: value for value in graph.graph.inputs}
    symbols = Counter(str(inputs[slot.name + side].shape[1]) for slot in family.slots for side in (A, B))
    assert set(symbols.values()) == {2} and len(symbols) == len(family.slots), "a rank of its own for each pair"
    for slot in family.slots:
        assert (inputs[slot.name + A].shape[0], inputs[slot.name + B].shape[0]) == (slot.inputs, slot.outputs)
        assert graph.graph.initializers[slot.name + A].const_value.shape.numpy() == (slot.inputs, 0)
    names = [slot.name + side for slot in family.slots for side in (A, B)]
    assert len(set(names)) == len(names) and max(map(len, names)) <= 15, "names that onnxruntime does not put on the heap"
    # A package is read back for its slots when an adapter is added to it.
    assert slots(graph, shapes) == family.slots
    assert {linear.name for linear in linears(graph)} == {linear.name for linear in linears(load_graph(family.export / FULL))}


@pytest.mark.slow
def test_activations_have_two_dimensions_and_a_pair_is_two_operators(family: Family) -> None:
    for name in (FULL, ADAPTED):
        operators = pair_operators(load_graph(family.adapted / name))
        assert operators == {"Gemm": 2 * len(family.slots)}, name


def pair_operators(graph: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph.graph if re.fullmatch(r"\d+\.\w+\.\d", node.outputs[0].name or "")))


@pytest.mark.slow
def test_where_flattening_does_not_reach_pairs_work_in_three_dimensions(llama: Family, tmp_path: Path) -> None:
    import onnx_ir as ir

    folder = tmp_path / "cut off"
    shutil.copytree(llama.export, folder)
    graph = load_graph(folder / FULL)
    # Behind an operator that flattening does not know, activations are not known either, until the next attention.
    begins = [node for node in graph.graph if node.op_type == "GroupQueryAttention" or node.name.endswith("embed_tokens/Gather")]
    assert len(begins) == 3
    for number, node in enumerate(begins):
        value, users = node.outputs[0], list(node.outputs[0].uses())
        copied = ir.node("Identity", [value])
        copied.outputs[0].name = f"identity{number}"
        graph.graph.insert_after(node, copied)
        for use in users:
            use.node.replace_input_with(use.idx, copied.outputs[0])
    found = add_slots(graph, parameter_shapes(llama.model))
    ir.save(graph, folder / FULL)
    count = len(found)
    assert pair_operators(load_graph(folder / FULL)) == {"MatMul": count, "FusedMatMul": count, "Add": count}
    expected = peft_logits(llama, tmp_path / "adapter", rank_pattern={"q_proj": 2, "down_proj": 11})
    three = decoder(folder, FULL)
    np.testing.assert_array_equal(run(three), run(decoder(llama.export, FULL)))
    assert nmse(run(three.with_adapter(tensors_of(tmp_path / "adapter", found))), expected) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_base_is_itself_without_an_adapter_and_keeps_the_adapter_in_float(
    llama: Family, tmp_path: Path, precision: str
) -> None:
    """With an adapter the graph is PyTorch on the very weights that it multiplies with, but for activations in 8 bits."""
    from test_graph import _shapes, hugging_face_weights

    folder = make_export(tmp_path / "export", llama.model, precision)
    before = run(decoder(folder, FULL))
    found = save_adapted_twins(folder, parameter_shapes(llama.model))
    np.testing.assert_array_equal(run(decoder(folder, FULL)), before)
    own = hugging_face_weights(load_graph(folder / FULL), _shapes(llama.model))
    peft_logits(llama, tmp_path / "adapter")
    expected = on_weights(llama.model, tmp_path / "adapter", own)
    tensors = tensors_of(tmp_path / "adapter", found)
    assert nmse(run(decoder(folder, FULL).with_adapter(tensors)), expected) <= 2e-3
    assert nmse(before, expected) > 0.02, "the effect is far above that"


def on_weights(model: Path, adapter: Path, own: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return PyTorch's logits of base + adapter with the base's matrices replaced."""
    import torch
    from peft import PeftModel

    network: Any = load_model(model).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in own:
                parameter.copy_(torch.tensor(own[name]))
        return PeftModel.from_pretrained(network, adapter).eval()(torch.tensor(IDS)).logits.numpy()


# What does not fit ------------------------------------------------------------------------------------------------


def test_what_is_no_input_or_has_another_shape_is_refused(llama: Family, tmp_path: Path) -> None:
    peft_logits(llama, tmp_path)
    good = tensors_of(tmp_path, llama.slots)
    first = next(iter(good)).removesuffix(A)
    wrong = {
        "0.other.A is no input of the graph": {name.replace(first, "0.other"): value for name, value in good.items()},
        "is shaped": {name: value.T for name, value in good.items()},
        "A without B": {name: value for name, value in good.items() if name != first + B},
        "B without A": {name: value for name, value in good.items() if name != first + A},
        "A of rank 3 and B of rank 12": good | {first + A: good[first + A][:, :3]},
        "is float64": good | {first + A: good[first + A].astype(np.float64)},
        "not finite": good | {first + A: np.full_like(good[first + A], np.nan)},
        "holds no tensors": {},
    }
    for text, tensors in wrong.items():
        with pytest.raises(BadArtifact, match=text):
            llama.decoders[FULL].with_adapter(tensors)
    with pytest.raises(BadArtifact, match="is no input of the graph"):
        llama.decoders[MAIN].with_adapter(good)  # the base's own graph takes none


def test_a_pair_for_the_head_or_the_embedding_is_refused_with_the_way_out(llama: Family, tmp_path: Path) -> None:
    for target in ("lm_head", "embed_tokens"):
        folder = tmp_path / target
        peft_logits(llama, folder, target_modules=[target, "q_proj"])
        with pytest.raises(Unavailable, match=target) as caught:
            tensors_of(folder, llama.slots)
        assert "slmops merge" in caught.value.hint


def test_two_layers_of_one_short_name_are_refused(llama: Family) -> None:
    graph = load_graph(llama.export / FULL)
    weight = graph.graph.initializers["model.layers.1.mlp.down_proj.MatMul.weight"]
    weight.name = "model.layers.0.other.down_proj.MatMul.weight"
    shapes = {
        name.replace("layers.1.mlp.down_proj", "layers.0.other.down_proj"): shape for name, shape in parameter_shapes(llama.model).items()
    }
    with pytest.raises(Unavailable, match=r"two layers .* 0\.down_proj"):
        add_slots(graph, shapes)


def test_a_split_that_is_not_known_is_refused(llama: Family) -> None:
    """A fused layer of other parts than gate and up: LFM2's, for one, has names of its own."""
    shapes = {name.replace("gate_proj", "w1").replace("up_proj", "w3"): shape for name, shape in parameter_shapes(llama.model).items()}
    with pytest.raises(Unavailable, match="gate_up_proj in a way that adapters cannot follow"):
        add_slots(load_graph(llama.export / FULL), shapes)
