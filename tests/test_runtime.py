"""Runners: the same answer whatever stands beside a row, bounded memory, one model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from slmops.errors import BadArtifact, InvalidInput
from slmops.runtime import torch_runner
from slmops.runtime.loading import open_model, open_runner

PROMPTS = [[1, 280, 290, 300], [1, 300], [1, *range(262, 300)], [1, 301, 302], [1, 280, 290, 300, 262]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with random weights, which ends no answer by itself, and its exports."""
    root = tmp_path_factory.mktemp("runtime")
    model = tiny.make_model(root / "model", seed=1)
    return {
        "torch": model,
        "fp32": tiny.make_export(root / "fp32", model, "fp32", max_length_tokens=48),
        "int4": tiny.make_export(root / "int4", model, "int4", max_length_tokens=48),
    }


@pytest.mark.parametrize("kind", ["torch", "fp32", "int4"])
def test_a_batch_answers_as_each_row_alone_and_as_the_stream(kind: str, folders: dict[str, Path]):
    runner: Any = open_runner(folders[kind], threads=1)
    together = list(runner.generate(PROMPTS, max_new_tokens=6, stop_token_ids=[2], batch_size=3))
    assert together == [next(runner.generate([ids], max_new_tokens=6, stop_token_ids=[2])) for ids in PROMPTS]
    assert together == [list(runner.stream(ids, max_new_tokens=6, stop_token_ids=[2])) for ids in PROMPTS]
    stop = together[0][2]
    assert next(runner.generate(PROMPTS[:1], max_new_tokens=6, stop_token_ids=[stop])) == together[0][: together[0].index(stop)]


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_logits_of_an_answer_are_those_that_it_was_chosen_by(kind: str, folders: dict[str, Path]):
    runner: Any = open_runner(folders[kind], threads=1)
    for ids in PROMPTS:
        steps = list(runner.greedy_logits(ids, 6))
        assert [int(logits.argmax()) for logits in steps] == list(runner.stream(ids, max_new_tokens=6, stop_token_ids=[]))
        (expected,) = runner.logits([[*ids, *(int(logits.argmax()) for logits in steps[:-1])]])
        assert np.abs(np.stack(steps) - expected[len(ids) - 1 :]).max() < 1e-4


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_a_row_near_the_length_ends_there_and_does_not_shorten_its_neighbours(kind: str, folders: dict[str, Path]):
    runner: Any = open_runner(folders[kind], threads=1)
    answers = list(runner.generate([[1, 300], [1] + [280] * 42], max_new_tokens=12, stop_token_ids=[]))
    assert [len(answer) for answer in answers] == [12, 48 - 43]
    assert answers == [next(runner.generate([ids], max_new_tokens=12, stop_token_ids=[])) for ids in ([1, 300], [1] + [280] * 42)]


def test_fp32_logits_are_pytorchs(folders: dict[str, Path]):
    torch_logits, graph_logits = (list(open_runner(folders[kind], threads=1).logits(PROMPTS)) for kind in ("torch", "fp32"))
    for ours, theirs, ids in zip(graph_logits, torch_logits, PROMPTS, strict=True):
        assert ours.shape == theirs.shape == (len(ids), 320)
        assert np.abs(ours - theirs).max() < 1e-4


def test_torch_logits_are_the_same_in_windows_of_any_size(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    runner: Any = open_runner(folders["torch"], threads=1)
    whole = list(runner.logits(PROMPTS))
    monkeypatch.setattr(torch_runner, "_LOGITS_BYTES", 4 * 320 * 6)  # six tokens: the rows of three and four do not fit together
    windows = list(runner._windows(PROMPTS))
    assert windows == [(0, 2), (2, 3), (3, 4), (4, 5)]
    for ours, theirs in zip(runner.logits(PROMPTS), whole, strict=True):
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("kind", ["torch", "fp32"])
def test_timing_generates_exactly_so_many_tokens(kind: str, folders: dict[str, Path]):
    runner: Any = open_runner(folders[kind], threads=1)
    runner.prepare()
    timing = runner.time(PROMPTS[0], new_tokens=5)
    assert timing.first_token_seconds > 0 and len(timing.token_seconds) == 4


def test_a_stream_loads_the_graph_once(folders: dict[str, Path]):
    runner: Any = open_runner(folders["int4"], threads=1)
    list(runner.stream(PROMPTS[0], max_new_tokens=2, stop_token_ids=[]))
    sessions = runner._sessions
    assert list(sessions._models) == ["model.onnx"] and not sessions._decoders
    runner.close()
    assert not sessions._models


def test_what_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path):
    runner: Any = open_runner(folders["fp32"])
    with pytest.raises(InvalidInput, match="does not fit the package's 48"):
        list(runner.generate([[1] * 48], max_new_tokens=1, stop_token_ids=[]))
    with pytest.raises(InvalidInput, match="129 tokens"):
        list(open_runner(folders["torch"], threads=1).logits([[1] * 129]))
    with pytest.raises(BadArtifact, match="no such folder"):
        open_model(tmp_path / "nothing")
    with pytest.raises(BadArtifact, match="holds no model"):
        open_model(tmp_path)
