"""`bench`: what is measured and compared, what a crash or Ctrl-C leaves, and the arithmetic behind the figures."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import slmops
from slmops import artifact, environment, results
from slmops.benchmark import quiet, rounds, sides, subjects
from slmops.benchmark.worker import bytes_per_token
from slmops.data import Interface, Tokenizer
from slmops.errors import BadArtifact, InvalidInput, RunFailed
from slmops.evaluation import neutral
from slmops.runtime.loading import open_runner

SHORT: dict[str, Any] = {"threads": 1, "rounds": 3, "prompt_tokens": 24, "new_tokens": 8}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that knows `tiny.ROWS`, as an artefact with its templates, and its exports in fp32 and int4."""
    root = tmp_path_factory.mktemp("benchmark")
    plain = tiny.make_model(root / "plain", learned=tiny.ROWS)
    interface = Interface(**tiny.TEMPLATES, bos_token_id=1, stop_token_ids=(2,), max_length_tokens=tiny.POSITIONS)
    with artifact.create(root / "model", kind="model", command="merge") as draft:
        shutil.copytree(plain, draft.folder, dirs_exist_ok=True)
        draft.interface = interface.model_dump(mode="json")
    model = draft.done().path
    return {
        "root": root,
        "model": model,
        "fp32": tiny.make_export(root / "fp32", model, "fp32"),
        "int4": tiny.make_export(root / "int4", model, "int4"),
        "data": tiny.write_rows(root / "rows.jsonl"),
    }


def test_a_package_beside_the_model_it_came_from(folders: dict[str, Path], tmp_path: Path):
    measured = slmops.bench(folders["fp32"], **SHORT, out=tmp_path / "bench")
    document = json.loads(json.dumps(measured.document()))
    for name in ("candidate", "baseline"):
        side = document[name]
        for key in ("load_seconds", "start_seconds", "ttft_ms", "prefill_tokens_per_second", "decode_tokens_per_second"):
            assert 0 < side[key]["p5"] <= side[key]["median"] <= side[key]["p95"]
        assert len(side["decode_tokens_per_second"]["samples"]) == 3
        assert side["threads"] == 1 and side["peak_memory_bytes"] > 20e6 and 0 < side["bandwidth_share"] < 2
    candidate, baseline = document["candidate"], document["baseline"]
    assert (candidate["engine"], baseline["engine"]) == ("genai", "torch")
    assert (candidate["precision"], baseline["precision"]) == ("fp32", "fp32")
    assert baseline["model"] == str(folders["model"])
    assert baseline["size_bytes"] == (folders["model"] / "model.safetensors").stat().st_size
    assert candidate["size_bytes"] == sum(file.stat().st_size for file in folders["fp32"].iterdir() if file.suffix in (".onnx", ".data"))
    # The same model in the same precision: the text of slmops finds no difference.
    assert candidate["metrics"]["kl_nats"]["value"] < 1e-6
    assert candidate["metrics"]["top1_agreement"]["value"] > 0.99
    assert candidate["metrics"]["perplexity"]["value"] == pytest.approx(baseline["metrics"]["perplexity"]["value"], rel=1e-4)
    for key in ("decode", "prefill", "ttft", "size", "peak_memory", "load"):
        ratio = document["ratio"][key]
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert document["ratio"]["peak_memory"]["value"] == pytest.approx(baseline["peak_memory_bytes"] / candidate["peak_memory_bytes"])
    assert document["ratio"]["peak_memory"]["value"] > 1.5  # no torch in the package's process
    written = artifact.load(tmp_path / "bench", kinds=("benchmark",))
    assert artifact.changed_files(written) == []
    assert written.find("baseline") == folders["model"]
    assert json.loads((tmp_path / "bench" / "benchmark.json").read_text())["ratio"] == document["ratio"]
    table = (tmp_path / "bench" / "table.md").read_text()
    assert "| decode, tokens/s |" in table and "| kl nats |" in table
    with pytest.raises(BadArtifact, match="is not empty"):
        slmops.bench(folders["fp32"], **SHORT, out=tmp_path / "bench")


def test_accuracy_on_rows_is_paired(folders: dict[str, Path]):
    measured = slmops.bench(folders["int4"], **SHORT, data=str(folders["data"]), metric="exact_match")
    alone = slmops.evaluate(folders["int4"], folders["data"], threads=1).metrics["exact_match"]
    assert measured.candidate.metrics["exact_match"] == alone
    assert measured.baseline is not None and measured.baseline.metrics["exact_match"].value == 1
    assert measured.difference["exact_match"].value == pytest.approx(alone.value - 1)
    assert measured.ratio["size"].value > 1


def test_perplexity_on_rows_is_paired(folders: dict[str, Path]):
    measured = slmops.bench(folders["fp32"], **(SHORT | {"rounds": 1}), data=str(folders["data"]), metric="perplexity", max_rows=4)
    assert measured.candidate.metrics["perplexity"].n == 4
    assert abs(measured.difference["perplexity"].value) < 1e-3


def test_alone(folders: dict[str, Path]):
    measured = slmops.bench(folders["int4"], **SHORT, baseline="none")
    assert measured.baseline is None and measured.ratio == {} and measured.document()["baseline"] is None
    assert measured.candidate.metrics["perplexity"].value > 1
    assert "candidate `" in measured.table() and "| decode, tokens/s |" in measured.table()


def test_a_prompt_that_does_not_fit_is_cut_and_said_to_be(folders: dict[str, Path]):
    settings = SHORT | {"prompt_tokens": 500, "new_tokens": 8, "rounds": 1}
    measured = slmops.bench(folders["int4"], **settings, baseline="none")
    assert (measured.prompt_tokens, measured.new_tokens) == (120, 8)
    assert any("500 prompt and 8 new tokens do not fit a length of 128" in warning for warning in measured.warnings)


def test_the_baseline_is_known_unchanged_or_named(folders: dict[str, Path], tmp_path: Path):
    unknown = Path(shutil.copytree(folders["int4"], tmp_path / "unknown"))
    (unknown / artifact.MANIFEST).unlink()
    with pytest.raises(InvalidInput, match="nothing says which PyTorch model") as raised:
        slmops.bench(unknown, **SHORT)
    assert "--baseline none" in raised.value.hint
    moved = Path(shutil.copytree(folders["int4"], tmp_path / "deep" / "moved"))
    with pytest.raises(BadArtifact, match="is no longer at"):
        slmops.bench(moved, **SHORT)
    other = tiny.make_model(folders["root"].parent / f"{folders['root'].name}-other" / "model", seed=5)
    beside = Path(shutil.copytree(folders["int4"], other.parent / "int4"))
    with pytest.raises(BadArtifact, match="it was changed since"):
        slmops.bench(beside, **SHORT)
    with pytest.raises(InvalidInput, match="f1 needs rows"):
        slmops.bench(folders["int4"], **SHORT, metric="f1")
    assert subjects.find_baseline(folders["int4"], artifact.load(folders["int4"]), None) == (folders["model"], [])
    assert subjects.find_baseline(folders["model"], None, None)[1][0].endswith("measured alone (compare it with --baseline MODEL)")


def test_without_torch_a_package_is_measured_alone(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subjects, "find_spec", lambda name: None)
    baseline, warnings = subjects.find_baseline(folders["int4"], artifact.load(folders["int4"]), None)
    assert baseline is None and warnings == ["PyTorch is not installed here: measured alone, without the baseline"]
    with pytest.raises(slmops.errors.Unavailable, match="needs PyTorch"):
        subjects.find_baseline(folders["int4"], None, str(folders["model"]))


def test_a_crash_is_told_with_its_last_line(folders: dict[str, Path]):
    with sides.Side(sides.Model("candidate", folders["int4"], 1)) as side:
        os.kill(side._process.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match=r"the candidate's process .* ended by signal 9"):
            side.ask("usage")
    with (
        sides.Side(sides.Model("baseline", folders["int4"], 1)) as side,
        pytest.raises(RunFailed, match=r"exit code 1: TypeError: .*new_tokens"),
    ):
        side.ask("time", prompt=[1])


def test_an_error_of_a_side_keeps_its_class_and_hint(folders: dict[str, Path], tmp_path: Path):
    broken = Path(shutil.copytree(folders["int4"], tmp_path / "broken"))
    (broken / artifact.MANIFEST).unlink()
    (broken / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(BadArtifact, match="candidate: onnxruntime-genai cannot load") as raised:
        slmops.bench(broken, **SHORT, baseline="none")
    assert raised.value.hint == "export the model again"


def test_ctrl_c_leaves_no_process(folders: dict[str, Path]):
    command = [sys.executable, "-c", "from slmops.cli import main; main()", "bench", str(folders["int4"]), "--rounds", "100000", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    workers: list[int] = []
    deadline = time.monotonic() + 120
    while len(workers) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(output)["ok"] is False
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_worker_ends_with_its_parent(folders: dict[str, Path]):
    code = (
        "import os, sys; from pathlib import Path; from slmops.benchmark import sides\n"
        f"side = sides.Side(sides.Model('candidate', Path({str(folders['int4'])!r}), 1))\n"
        "sys.stdout.write(str(side._process.pid)); sys.stdout.flush(); os._exit(1)"  # it is asleep (SIGSTOP) now
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().split()[2] == "Z":
            break
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_peak_memory_is_of_the_process_itself():
    # getrusage would count the parent's 300 MB: Linux hands the peak on when a process is started.
    ballast = np.ones(300 * 2**20 // 8)
    code = "from slmops import environment; print(environment.peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6 < environment.peak_memory_bytes()
    assert ballast.nbytes > 300e6


def test_rates_and_ratios_by_hand():
    candidate, baseline = rounds.Series(100), rounds.Series(100)
    for seconds in (0.5, 0.5, 0.5):
        candidate.add(seconds, [0.01] * 9)
        baseline.add(2 * seconds, [0.04] * 9)
    assert candidate.prefill_rates == [200.0] * 3
    assert candidate.decode_rates == pytest.approx([100.0] * 3)  # the first token is prefill's
    found = rounds.ratios(candidate, baseline)
    assert (found["decode"].value, found["prefill"].value, found["ttft"].value) == pytest.approx((4, 2, 2))
    assert candidate.spreads()["ttft_ms"].median == 500


def test_stable_is_two_rounds_within_five_percent():
    series = rounds.Series(10)
    series.add(1.0, [0.1])
    assert not series.is_stable
    series.add(1.04, [0.104])
    assert series.is_stable
    series.add(1.04, [0.12])
    assert not series.is_stable


def test_divergence_by_hand():
    reference, candidate = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])), np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert results.divergence(reference, candidate) == pytest.approx([expected, 0])


def test_bytes_read_a_token(folders: dict[str, Path], tmp_path: Path):
    weights = 320 * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64) + 64
    assert bytes_per_token(open_runner(folders["model"], threads=1)) == 4 * weights
    untied = tiny.make_model(tmp_path / "untied", tie_word_embeddings=False)  # a separate table: one row of it is read
    assert bytes_per_token(open_runner(untied, threads=1)) == 4 * weights
    assert bytes_per_token(open_runner(folders["int4"], threads=1)) == (folders["int4"] / "model.onnx.data").stat().st_size


def test_the_neutral_text_becomes_pieces_that_every_model_takes(folders: dict[str, Path]):
    assert len(neutral.neutral_text().split()) >= 600 and len(neutral.neutral_text().split("\n\n")) == 10
    interface = Interface(bos_token_id=1, max_length_tokens=16)
    pieces = neutral.text_pieces(Tokenizer.load(folders["model"]), interface)
    assert all(piece[0] == 1 and 1 < len(piece) <= 16 for piece in pieces)


def test_others_on_the_processor_are_seen():
    watch = quiet.Watch()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    wall = time.monotonic() - watch._wall
    assert watch.share_of_others(0) * wall * environment.usable_cores() > 0.7
    assert watch.share_of_others(1e6) == 0
