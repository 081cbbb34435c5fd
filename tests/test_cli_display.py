"""What people see of each document: the figures, the first failed gate, the next command; and never a crash on a missing key."""

from __future__ import annotations

import io
import math

import pytest

from slmops.cli.commands import COMMANDS, GROUPS
from slmops.cli.display import figures, render
from slmops.cli.streams import plain

NAMES = [
    *(name for name in COMMANDS if name not in (*GROUPS, "generate")),
    *(f"{group} {name}" for group, names in GROUPS.items() for name in names),
]


def shown(command: str, document: dict[str, object]) -> str:
    stream = io.StringIO()
    render(command, document, stream)
    return stream.getvalue()


@pytest.mark.parametrize("command", NAMES)
def test_a_document_without_its_keys_is_shown_all_the_same(command: str):
    text = shown(command, {"command": command, "ok": True, "warnings": ["careful"], "seconds": 1.0})
    assert "warning: careful" in text or command == "doctor"  # its warnings are its problems
    shown(command, {})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figures.number(0.0312345), "0.03123"),
        (figures.number(1234567), "1,234,567"),
        (figures.number(12345.6), "12,346"),
        (figures.number(math.nan), "-"),
        (figures.number(None), "-"),
        (figures.number({"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}), "0.5 [0.4, 0.6]"),
        (figures.spread({"median": 12.34, "p5": 11, "p95": 13.5}), "12.3 (11 to 13.5)"),
        (figures.size(1_700_000_000), "1.7 GB"),
        (figures.size(999), "999 bytes"),
        (figures.duration(185), "3 min 05 s"),
        (figures.duration(0.012), "12 ms"),
        (figures.share(0.421), "42.1 %"),
    ],
)
def test_figures(written: str, expected: str):
    assert written == expected


def test_finetune_tells_losses_the_stop_token_and_what_to_type_next():
    text = shown(
        "finetune",
        {
            "artifact": "runs/my intent",
            "kind": "adapter",
            "metrics": {"train_loss": {"value": 0.031}, "validation_loss": {"value": 0.029}},
            "tokens": {"total": 120000, "supervised": 12000},
            "rows": 1635,
            "loop_seconds": 30.0,
            "peak_memory_bytes": 1.2e9,
            "stop_reason": "</s>, as the tokenizer says",
        },
    )
    for part in ("0.031", "0.029", "120,000, 12,000 supervised", "4,000 tokens/s", "1.2 GB", "</s>, as the tokenizer says"):
        assert part in text
    assert "next  slmops merge 'runs/my intent' -o runs/merged" in text


def test_merge_tells_what_became_of_each_task_and_what_to_type_next():
    regret = [
        {
            "name": "intent",
            "metric": "exact_match",
            "before": {"value": 0.98, "low": 0.97, "high": 0.99, "n": 700},
            "after": {"value": 0.9, "low": 0.88, "high": 0.92, "n": 700},
            "points_lost": 8.0,
            "low": 6.1,
            "high": 9.9,
        },
        {
            "name": "plain",
            "metric": "perplexity",
            "before": {"value": 4.0},
            "after": {"value": 4.4},
            "points_lost": 10.0,
            "low": 8,
            "high": 12,
        },
    ]
    document = {
        "artifact": "runs/both",
        "kind": "model",
        "strategy": "cat",
        "rank": 24,
        "adapters": [{"name": "intent", "weight": 0.7, "rank": 16}, {"name": "plain", "weight": 1.0, "rank": 8}],
        "regret": regret,
        "metrics": {"distance_from_sum": {"value": 1e-7}, "points_lost intent": {"value": 8.0}},
    }
    text = " ".join(shown("merge", document).split())
    for part in (
        "intent x 0.7 (rank 16), plain x 1 (rank 8)",
        "intent exact match 0.98 [0.97, 0.9 [0.88, 8 6.1 to 9.9",
        "10 %",
        "strategy cat",
    ):
        assert part in text
    assert "points lost intent" not in text, "it stands in the table"
    assert "next slmops export runs/both -o runs/int4" in text
    assert "next slmops merge runs/both -o runs/merged" in " ".join(shown("merge", document | {"kind": "adapter"}).split())


def test_a_plan_tells_its_advice_and_the_worst_layers_first():
    layer = {"bits": 4, "block_size": 32, "p": 0.99, "p_noise": 0.01, "codes_changed": 0.25, "delta_to_step": 0.1}
    layers = {f"layers.{i}.mlp": layer | {"noise_to_signal": float(i)} for i in range(10)}
    plan = {"advice": "keep as a runtime adapter", "reason": "because", "predicted_loss": 0.35, "noise_to_signal": 14.0, "layers": layers}
    text = " ".join(shown("merge", {"plan": plan | {"recipe": {"id": "cpu-int4"}}, "warnings": ["careful"]}).split())
    for part in (
        "keep as a runtime adapter because",
        "35 %",
        "cpu-int4",
        "int4/32",
        "25 %",
        "and 2 layers that suffer less",
        "warning: careful",
    ):
        assert part in text
    assert text.index("layers.9.mlp") < text.index("layers.2.mlp")
    assert "layers.1.mlp" not in text


def test_export_tells_target_recipe_and_size():
    recipe = {
        "id": "cpu-int4",
        "options": {"bits": 4, "layers": {"mlp": {"bits": 4, "block_size": 32}, "head": {"bits": 8, "block_size": 32}}},
    }
    document = {"artifact": "runs/int4", "kind": "export", "device": "cpu", "precision": "int4", "recipe": recipe, "size_bytes": 2.1e6}
    text = " ".join(shown("export", {**document, "bytes_per_parameter": 0.701, "level": "executed"}).split())
    for part in (
        "cpu int4",
        "executed",
        "cpu-int4: bits 4, mlp int4/32, head int8/32",
        "2.1 MB, 0.701 bytes a parameter",
        "slmops verify runs/int4",
    ):
        assert part in text


def test_verify_explains_the_first_stage_that_was_not_met():
    stages = [
        {"name": "files", "status": "pass", "figures": {"files": 12}, "bars": {}},
        {"name": "retention", "status": "fail", "figures": {"pooled": 0.0003}, "bars": {"pooled": [0.95, 1.05]}},
    ]
    text = shown("verify", {"passed": False, "failed_stage": "retention", "stages": stages})
    assert "pooled 0.0003 (bar 0.95 to 1.05)" in text
    assert "not verified: stage retention was not met" in text
    assert "the fine-tune did not survive" in text
    assert "verified: the package behaves" in shown("verify", {"passed": True, "failed_stage": None, "stages": stages[:1]})


def test_verify_shows_what_a_stage_says_of_itself():
    stage = {"name": "logits", "status": "fail", "explanation": "KL 0.3 [0.2, 0.4], bar 0.05", "figures": {"kl": 0.3}, "bars": {"kl": 0.05}}
    text = shown("verify", {"passed": False, "failed_stage": "logits", "stages": [stage]})
    assert text.count("KL 0.3 [0.2, 0.4], bar 0.05") == 2  # in the table, and below it as the reason
    assert "beyond what its precision explains" in " ".join(text.split())


def test_evaluate_gives_value_interval_and_n():
    text = shown(
        "evaluate", {"metrics": {"exact_match": {"value": 0.9557, "low": 0.9377, "high": 0.9687, "n": 700}}, "predictions": "p.jsonl"}
    )
    for part in ("exact_match", "0.9557", "0.9377 to 0.9687", "700", "p.jsonl"):
        assert part in text


def side(scale: float) -> dict[str, object]:
    timing = {"median": 100.0 * scale, "p5": 90.0 * scale, "p95": 110.0 * scale}
    names = ("load_seconds", "ttft_ms", "prefill_tokens_per_second", "decode_tokens_per_second")
    return {
        **dict.fromkeys(names, timing),
        "peak_memory_bytes": 1e9 * scale,
        "size_bytes": 1e6 * scale,
        "threads": 2,
        "metrics": {"kl": {"value": 0.01}},
    }


def test_bench_puts_candidate_baseline_and_ratio_side_by_side():
    ratio = {"decode": {"value": 8.1, "low": 7.9, "high": 8.3}}
    text = shown("bench", {"candidate": {**side(8), "bandwidth_share": 0.42}, "baseline": side(1), "ratio": ratio})
    [decode] = [line for line in text.splitlines() if line.startswith("decode")]
    assert [part in decode for part in ("800 (720 to 880)", "100 (90 to 110)", "8.1 [7.9, 8.3]")] == [True] * 3
    assert "42 %" in text
    alone = shown("bench", {"candidate": side(8), "baseline": None})
    assert "ratio" not in alone and "800 (720 to 880)" in alone


@pytest.mark.parametrize("command", NAMES)
def test_nothing_is_coloured_or_wider_than_eighty_columns_when_piped(command: str):
    document = {"candidate": side(8), "baseline": side(1), "stages": [{"name": "logits", "status": "fail", "figures": {"kl": 0.123456789}}]}
    text = shown(command, {**document, "passed": False, "warnings": ["a long warning " * 20]})
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_plain_values_are_json_values():
    assert plain(
        {
            "a": (1, math.nan),
            "b": {
                2.5,
            },
            "c": {1: None},
        }
    ) == {"a": [1, None], "b": [2.5], "c": {"1": None}}
