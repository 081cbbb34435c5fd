"""The table of targets refuses what cannot run, and the architectures are those that the builder's source knows."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from slmops import targets
from slmops.errors import Unavailable


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_cpu_targets_are_executed(precision: str):
    target = targets.find("cpu", None, precision)
    assert (target.road, target.builder_provider, target.builder_precision, target.level) == ("genai", "cpu", "fp32", "executed")
    assert targets.find("cpu", "CPUExecutionProvider", precision) is target
    assert targets.find("cpu", "cpu", precision) is target


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bits_on_a_cpu_are_refused_because_they_fail_at_run_time(precision: str):
    with pytest.raises(Unavailable, match="fails at run time") as caught:
        targets.find("cpu", None, precision)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "use --device cpu --precision int8, int4 or fp32"


def test_a_mistyped_provider_is_guessed():
    with pytest.raises(Unavailable, match="did you mean cpu"):
        targets.find("cpu", "cpuu", "int4")


def test_architectures_are_those_of_the_builder():
    # Found, not imported: importing onnxruntime_genai is not needed to read a file of it.
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        pytest.skip("needs onnxruntime-genai")
    source = (Path(spec.origin).parent / "models" / "builder.py").read_text()
    known = set(re.findall(r'config\.architectures\[0\] == "(\w+)"', source))
    assert len(known) > 30
    assert set(targets.ARCHITECTURES) | set(targets.REFUSED_ARCHITECTURES) == known
    assert not set(targets.ARCHITECTURES) & set(targets.REFUSED_ARCHITECTURES)
    for architecture, name in targets.ARCHITECTURES.items():
        assert f"{name}(config" in source, architecture


def test_pairs_are_those_of_the_builder():
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        pytest.skip("needs onnxruntime-genai")
    source = (Path(spec.origin).parent / "models" / "builder.py").read_text()
    [listed] = re.findall(r"Valid precision \+ execution provider combinations are: ([^\"]+)", source)
    valid = {tuple(reversed(pair.lower().split())) for pair in listed.split(", ")}
    ours = {(target.provider, target.precision) for target in targets.TARGETS if target.road.startswith("genai")}
    # Its FP32 graph for CUDA has a cache that no node makes; FP16 for WebGPU is in no list, and was executed.
    assert ours == valid - {("cuda", "fp32")} | {("webgpu", "fp16")}
    for provider, precision in valid - ours:
        with pytest.raises(Unavailable):
            targets.find("gpu", provider, precision)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_other_architectures_are_refused_by_name(architecture: str):
    with pytest.raises(Unavailable, match=architecture) as caught:
        targets.builder_class(architecture)
    assert "Llama" in caught.value.hint


def test_a_known_architecture_has_a_builder_class():
    assert targets.builder_class("LlamaForCausalLM") == "LlamaModel"
