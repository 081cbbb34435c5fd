"""What `slmops doctor` finds: figures that are real, providers that were tried, and problems with a way out."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slmops import diagnosis, environment, probe, targets
from slmops.bandwidth import measure_bandwidth


@pytest.fixture(scope="module")
def found() -> diagnosis.Diagnosis:
    return diagnosis.doctor()


def test_versions_are_compared_with_the_tested_set(found: diagnosis.Diagnosis):
    status = {package.name: package for package in found.packages}
    assert set(status) == set(environment.TESTED)
    assert status["click"].installed == environment.version_of("click")
    for package in found.packages:
        same = package.installed is not None and package.installed.split("+")[0] == package.tested
        assert package.status == ("tested" if same else "missing" if package.installed is None else "other")


def test_the_cpu_provider_ran_a_graph_and_azure_did_not(found: diagnosis.Diagnosis):
    works = {provider.name: provider.works and not provider.stands_in for provider in found.providers}
    assert works["CPUExecutionProvider"] is True
    assert works.get("AzureExecutionProvider", False) is False
    for target in targets.TARGETS:
        told = next(
            t for t in found.targets if (t["device"], t["provider"], t["precision"]) == (target.device, target.provider, target.precision)
        )
        assert told["executes_here"] is (
            works.get(target.ort_provider, False) and environment.version_of(target.runtime_package) is not None
        )
        assert told["executes_here"] or target.provider != "cpu"


@pytest.mark.skipif(environment.version_of("onnxruntime-qnn") is None, reason="onnxruntime-qnn is not installed")
def test_a_processor_that_stands_in_for_an_npu_compiles_for_it_and_is_none(found: diagnosis.Diagnosis):
    (provider,) = (provider for provider in found.providers if provider.name == "QNNExecutionProvider")
    assert provider.works
    told = [target for target in found.targets if target["provider"] == "qnn"]
    assert len(told) == 3
    for target in told:
        assert target["builds_here"] is True
        assert target["executes_here"] is not provider.stands_in


def test_a_compiler_that_is_not_there_is_said_where_something_is_trained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(environment, "version_of", lambda name: "1.0")
    compiler, problems = diagnosis._compiler()
    assert compiler is None
    assert "no-such-compiler" in problems[0].problem
    monkeypatch.setattr(environment, "version_of", lambda name: None)
    assert diagnosis._compiler() == (None, [])


def test_machine_figures_are_plausible(found: diagnosis.Diagnosis):
    assert 1e8 < found.memory_available_bytes <= found.machine.memory_bytes
    assert found.disk_free_bytes > 0
    assert found.bandwidth_bytes_per_second and 5e8 < found.bandwidth_bytes_per_second < 2e12
    assert all(found.telemetry.values())
    json.dumps(found.document(), allow_nan=False)


def test_bandwidth_is_repeatable():
    first, second = measure_bandwidth(threads=1, seconds=0.2), measure_bandwidth(threads=1, seconds=0.2)
    assert 1 / 3 < first / second < 3  # neighbours on a shared machine


def test_the_one_node_graph_is_what_it_says():
    import onnx

    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, floats, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.producer_name = ""
    assert model.SerializeToString() == probe.ONE_NODE


def test_a_provider_that_is_not_there_is_an_error_of_the_probe():
    answer = probe.ask("session", "CUDAExecutionProvider")
    if "answer" not in answer:
        assert answer["error"]


def test_other_versions_and_missing_ones_come_with_a_pip_line():
    package = diagnosis.Package
    packages = [package(name, version, version, "tested") for name, version in environment.TESTED.items()]
    assert diagnosis._version_problems(tuple(packages)) == []
    changed = [package(p.name, "1.0", p.tested, "other") if p.name == "onnxruntime" else p for p in packages]
    [problem] = diagnosis._version_problems(tuple(changed))
    assert problem.fix == "pip install onnxruntime==1.31.1"
    absent = [package(p.name, None, p.tested, "missing") if p.name == "onnxruntime-genai" else p for p in packages]
    [problem] = diagnosis._version_problems(tuple(absent))
    assert (problem.severity, problem.fix) == ("error", "pip install 'slmops[runtime]'")


def test_a_device_without_training_libraries_has_no_problem_with_that():
    packages = [
        diagnosis.Package(
            name, None if name in diagnosis._TO_BUILD else version, version, "missing" if name in diagnosis._TO_BUILD else "tested"
        )
        for name, version in environment.TESTED.items()
    ]
    assert diagnosis._version_problems(tuple(packages)) == []


def without(folder: Path, *modules: str) -> str:
    """Make a folder that, on PYTHONPATH, hides modules and the versions of their distributions."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import importlib.metadata as metadata, sys
        HIDDEN = {modules!r}
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in HIDDEN:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Hide())
        read = metadata.version
        def version(name):
            if name.replace("-", "_") in HIDDEN:
                raise metadata.PackageNotFoundError(name)
            return read(name)
        metadata.version = version
        """)
    )
    return str(folder)


@pytest.mark.parametrize(
    ("hidden", "problem"),
    [
        (("torch", "transformers", "peft", "accelerate", "datasets", "onnx", "onnx_ir"), None),
        (("numpy", "onnxruntime", "onnxruntime_genai"), "packages cannot be run here"),
    ],
)
def test_it_works_where_libraries_are_missing(tmp_path: Path, hidden: tuple[str, ...], problem: str | None):
    import os

    variables = {**os.environ, "PYTHONPATH": without(tmp_path / "hide", *hidden)}
    command = [sys.executable, "-c", "from slmops.cli import main; main(['doctor', '--json'])"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [item["problem"] for item in document["problems"] if item["severity"] == "error"] == [] if problem is None else True
    if problem:
        assert any(item["problem"].startswith(problem) and item["fix"] == "pip install 'slmops[runtime]'" for item in document["problems"])
        assert document["bandwidth_bytes_per_second"] is None
    else:
        assert document["torch"] is None
        assert [target["executes_here"] for target in document["targets"] if target["provider"] == "cpu"] == [True] * 3
        assert not any(target["builds_here"] for target in document["targets"])
