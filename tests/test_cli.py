"""The command line as a product: exit codes, one-line errors with hints, one document on stdout, help that is true."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from slmops import artifact, config
from slmops.cli import main, reference
from slmops.cli.commands import COMMANDS, GROUPS, root
from slmops.cli.entry import as_slmops_error
from slmops.cli.options import Call, Command, command, settings_options
from slmops.errors import BadArtifact, GateFailed, Unavailable

ROOT = Path(__file__).resolve().parent.parent
Answer = tuple[int, str, str]
Run = Callable[..., Answer]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Type a command; get exit code, stdout and stderr."""

    def typed(*words: str) -> Answer:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return typed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artefact with an input that has a manifest too."""
    with artifact.create(tmp_path / "base", kind="model", command="merge") as draft:
        (draft.folder / "weights").write_bytes(bytes(1000))
    with artifact.create(tmp_path / "int4", kind="export", command="export", config={"precision": "int4"}) as draft:
        (draft.folder / "model.onnx").write_bytes(bytes(2_500_000))
        draft.add_input("model", tmp_path / "base")
        draft.facts = {"precision": "int4", "recipe": {"id": "rtn-32", "options": {"bits": 4}}}
        draft.warn("one layer was kept in float")
    return tmp_path / "int4"


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_its_line(run: Run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.summary}" in flat
    assert [out.index(f"\n{heading}:") for heading in ("Start", "Build", "Prove", "Use")] == sorted(
        out.index(f"\n{heading}:") for heading in ("Start", "Build", "Prove", "Use")
    )


@pytest.mark.parametrize(
    "words",
    [[name] for name in COMMANDS if name not in GROUPS] + [[group, name] for group, names in GROUPS.items() for name in names],
    ids=" ".join,
)
def test_each_command_has_json_config_and_lines_to_copy(run: Run, words: list[str]):
    code, out, _ = run(*words, "--help")
    assert code == 0
    for part in ("--json", "--config FILE.yaml", "--quiet", "--debug", "Examples:", f"  slmops {' '.join(words)}"):
        assert part in out


@pytest.mark.parametrize("words", [["finetune"], ["merge"], ["export"], ["data", "prepare"]], ids=" ".join)
def test_what_writes_a_folder_needs_one(run: Run, words: list[str]):
    code, _, err = run(*words, "A", *(["B"] if words == ["finetune"] else []))
    assert code == 2
    assert "Missing option '-o' / '--out'" in err


def test_the_page_of_commands_is_current():
    assert (ROOT / "docs" / "commands.md").read_text() == reference.reference(), "python -m slmops.cli.reference > docs/commands.md"


def test_the_page_of_targets_is_current():
    page = (ROOT / "docs" / "targets.md").read_text()
    assert page == reference.targets_page(), "python -m slmops.cli.reference targets > docs/targets.md"


def test_version(run: Run):
    from slmops import __version__

    assert run("--version") == (0, f"slmops {__version__}\n", "")


def test_without_a_command_help_is_shown_and_the_exit_code_says_no(run: Run):
    code, _, err = run()
    assert code == 2
    assert "slmops quickstart" in err


# ---- options from settings -----------------------------------------------------------------------------------------


class Sample(config.Settings):
    """One field of each kind."""

    template: str | None = config.setting(None, "a template to decode", escapes=True)
    plain: str | None = config.setting(None, "a text that is taken as it is")
    choice: Literal["a", "b"] = config.setting("a", "one of two letters")
    names: list[str] | None = config.setting(None, "several names, or none")
    count: int = config.setting(3, "a number of things", ge=1, le=9)
    rate: float = config.setting(0.5, "a share of something", ge=0, lt=1)
    place: Path | None = config.setting(None, "a place in the file system")
    force: bool = config.setting(False, "do it all the same")
    careful: bool = config.setting(True, "look before the leap")


def call_of(*words: str) -> Call:
    """Parse words with the options of `Sample`; return what the body gets."""
    seen: list[Call] = []

    def body(call: Call) -> dict[str, Any]:
        """Do nothing."""
        seen.append(call)
        return {}

    command("doctor", Sample)(body).main([*words, "--json"], standalone_mode=False)
    return seen[0]


def test_only_flags_that_were_given_are_passed_on():
    assert call_of().overrides == {}
    assert call_of("--count", "3").overrides == {"count": 3}


def test_each_kind_of_field():
    words = ["--template", r"a\nb", "--plain", r"a\nb", "--choice", "b", "--names", "x", "--names", "y", "--rate", "1e-3", "--place", "p"]
    assert call_of(*words).overrides == {
        "template": "a\nb",
        "plain": r"a\nb",
        "choice": "b",
        "names": ("x", "y"),
        "rate": 1e-3,
        "place": Path("p"),
    }


@pytest.mark.parametrize(("flag", "value"), [("--force", True), ("--no-force", False)])
def test_a_switch_can_overrule_a_file_both_ways(flag: str, value: bool):
    assert call_of(flag).overrides == {"force": value}


@pytest.mark.parametrize(("flag", "value"), [("--careful", True), ("--no-careful", False)])
def test_a_switch_that_is_on_can_be_switched_off(flag: str, value: bool):
    assert call_of(flag).overrides == {"careful": value}


def test_help_tells_defaults_and_bounds():
    text = {option.name: option.help for option in settings_options(Sample) if not option.hidden}
    assert text["count"] == "a number of things [default: 3; 1 to 9]"
    assert text["rate"] == "a share of something [default: 0.5; 0 to below 1]"
    assert text["careful"] == "look before the leap [default: on]"
    assert text["force"] == "do it all the same"
    assert text["names"] == "several names, or none [repeat for several]"


@pytest.mark.parametrize("model", [getattr(config, name) for name in config.__all__ if name.endswith("Settings") and name != "Settings"])
def test_every_setting_of_every_verb_becomes_an_option(model: type[config.Settings]):
    names = [option.name for option in settings_options(model) if not option.hidden]
    assert names == [name for name, _ in config.fields(model)]


def test_a_config_file_is_passed_on(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("count: 4\n")
    assert call_of("--config", str(path)).config == path


def test_a_config_file_for_a_command_without_settings_is_refused(run: Run, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("precision: int4\n")
    code, _, err = run("show", str(tmp_path), "--config", str(tmp_path / "c.yaml"))
    assert code == 2
    assert "precision: unknown setting" in err


def test_merge_takes_several_adapters_and_needs_a_folder_only_where_it_writes(run: Run, tmp_path: Path):
    from tiny import make_adapter, make_model

    base = make_model(tmp_path / "base")
    for seed, name in enumerate(("a", "b")):
        make_adapter(tmp_path / name, base, seed)
    words = ["merge", tmp_path / "a", f"other={tmp_path}/b", "--base", base, "--weights", "0.7,-0.3"]
    code, out, _ = run(*words, "--plan", "--json")
    document = json.loads(out)
    assert (code, document["command"], document["adapters"]) == (0, "merge", ["a", "other"])
    assert document["plan"]["advice"] and len(document["plan"]["layers"]) == 14
    assert run(*words)[0] == 2
    code, out, _ = run(*words, "-o", tmp_path / "both", "--into", "adapter", "--json")
    document = json.loads(out)
    assert (code, document["kind"], document["artifact"]) == (0, "adapter", str(tmp_path / "both"))
    assert [(part["name"], part["weight"]) for part in document["adapters"]] == [("a", 0.7), ("other", -0.3)]
    code, _, err = run(*words, "-o", tmp_path / "more", "--strategy", "tie")
    assert code == 2 and "'tie' is not one of" in err


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exprot"], "no such command: exprot (did you mean export?)"),
        (["data", "inspct", "x"], "no such command: inspct (did you mean inspect?)"),
        (["export", "m", "--precison", "int4"], "'--precision'"),
        (["pack", "m", "-o", "o", "--precision", "int5"], "'int5' is not one of"),
        (["finetune", "m", "d", "-o", "o", "--epochs", "many"], "'many' is not a valid float"),
        (["export"], "Missing argument 'MODEL'"),
        (["show", "a", "b"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_a_hint(run: Run, words: list[str], said: str):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    error, hint = lines(err)
    assert error.startswith("error: ") and said in error
    assert hint.startswith("hint: see `slmops") and hint.endswith("--help`")


@pytest.mark.parametrize("words", [["exprot", "--json"], ["export", "--json"], ["show", "/nowhere", "--json"]], ids=" ".join)
def test_an_error_is_one_document_too(run: Run, words: list[str]):
    code, out, err = run(*words)
    document = json.loads(out)
    assert document["ok"] is False
    assert document["error"]["exit_code"] == code
    assert document["error"]["message"] in err
    assert {"command", "warnings", "seconds"} <= set(document)
    assert document["command"] == (words[0] if words[0] in COMMANDS else "")


def test_a_word_after_two_dashes_is_not_a_flag(run: Run):
    _, out, _ = run("show", "--", "--json")
    assert out == ""


def test_bad_settings_in_a_file(run: Run, tmp_path: Path):
    path = tmp_path / "bad.yaml"
    path.write_text("examples: 99\nmodle: x\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    code, _, err = run("data", "inspect", str(tmp_path / "rows.jsonl"), "--config", str(path))
    assert code == 2
    assert "examples: must be less than or equal to 50" in err and "did you mean model?" in err
    assert len(lines(err)) == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/weights"), 1, "the disk is full: out/weights"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied: out"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (ModuleNotFoundError("No module named 'onnxruntime_genai'", name="onnxruntime_genai"), 3, "onnxruntime-genai is not installed"),
        (ModuleNotFoundError("No module named 'slmops.nothing'", name="slmops.nothing"), 1, "ModuleNotFoundError"),
        (GateFailed("below the bar"), 5, "below the bar"),
        (BadArtifact("incomplete"), 4, "incomplete"),
        (Unavailable("not here"), 3, "not here"),
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_way_to_fail_has_a_code_and_one_line(error: BaseException, code: int, said: str):
    problem = as_slmops_error(error)
    assert problem.exit_code == code
    assert said in problem.message and "\n" not in problem.message
    if isinstance(error, ZeroDivisionError):
        assert problem.hint == "this is a bug in slmops; run again with --debug for the traceback"


def broken(**options: Any) -> Command:
    def body(call: Call) -> Any:
        """Fail."""
        raise ZeroDivisionError("oh")

    return command("doctor", None, **options)(body)


def test_a_bug_has_a_traceback_only_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(root, "get_command", lambda ctx, name: broken())
    code, out, err = run("doctor")
    assert (code, out) == (1, "")
    assert "Traceback" not in err and "run again with --debug" in err
    assert "Traceback" in run("doctor", "--debug")[2]
    assert "Traceback" in run("--debug", "doctor")[2]


@pytest.mark.parametrize("flags", [[], ["--debug"]], ids=["plain", "debug"])
def test_notices_of_libraries_are_shown_with_debug_only(flags: list[str]):
    # In a process of its own: pytest takes warnings and log records for itself.
    code = f"""
import logging, warnings
from slmops.cli import main
from slmops.cli.commands import root
from slmops.cli.options import command
def body(call):
    "Be a library."
    warnings.warn("old name", FutureWarning)
    logging.getLogger("some.library").warning("no accelerator")
    logging.getLogger("some.library").error("broken")
    return {{}}
noisy = command("doctor", None)(body)
root.get_command = lambda ctx, name: noisy
main(["doctor", *{flags!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "broken" in done.stderr
    for notice in ("old name", "no accelerator"):
        assert (notice in done.stderr) is bool(flags)


def test_stdout_is_one_document_whatever_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # In a process of its own: what C++ libraries write goes to file descriptor 1, past sys.stdout.
    code = """
import os, sys
from slmops.cli import main
from slmops.cli.commands import root
from slmops.cli.options import command
def body(call):
    "Be loud."
    print("from Python"); os.write(1, b"from C\\n"); os.system("echo from a child")
    return {"loss": float("nan"), "big": float("inf"), "path": __import__("pathlib").Path("a"), "figures": __import__("numpy").arange(2)}
loud = command("doctor", None)(body)
root.get_command = lambda ctx, name: loud
main(["doctor", "--json"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    assert document == {
        "loss": None, "big": None, "path": "a", "figures": [0, 1], "command": "doctor", "ok": True, "warnings": [], "seconds": document["seconds"],
    }  # fmt: skip
    for words in ("from Python", "from C", "from a child"):
        assert words in done.stderr


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 5)])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_gate_that_is_not_met_is_exit_code_five(run: Run, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int, flags: list[str]):
    stages = [
        {"name": "files", "status": "pass"},
        {"name": "logits", "status": "pass" if passed else "fail", "figures": {"kl": 0.3}, "bars": {"kl": 0.05}},
    ]

    def body(call: Call) -> Any:
        """Judge."""
        return {"passed": passed, "failed_stage": None if passed else "logits", "stages": stages}

    monkeypatch.setattr(root, "get_command", lambda ctx, name: command("verify", None)(body))
    ended, out, _ = run("verify", *flags)
    assert ended == code
    if flags:
        assert json.loads(out)["ok"] is passed
    else:
        assert "kl 0.3 (bar 0.05)" in out
        assert ("not verified: stage logits" in out) is not passed


# ---- commands on real folders --------------------------------------------------------------------------------------


def test_show_tells_what_a_folder_is_and_where_it_came_from(run: Run, folder: Path):
    code, out, err = run("show", folder)
    assert (code, err) == (0, "")
    out = " ".join(out.split())
    for part in (": export", "2.5 MB", "rtn-32", "int4", "(model, merge,", "one layer was kept in float"):
        assert part in out
    document = json.loads(run("show", folder, "--json")[1])
    assert document["command"] == "show"
    assert document["manifest"]["kind"] == document["kind"] == "export"
    [origin] = document["lineage"]
    assert (origin["role"], origin["state"], origin["kind"]) == ("model", "ok", "model")


def test_show_sees_a_missing_file_and_a_base_that_is_gone(run: Run, folder: Path):
    (folder / "model.onnx").unlink()
    (folder.parent / "base").rename(folder.parent / "elsewhere")
    code, out, _ = run("show", folder)
    assert code == 0
    assert "model.onnx: missing" in out and "not there any more" in out


@pytest.mark.parametrize(("name", "said"), [("absent", "no such folder"), (".", "no slmops.json")])
def test_show_of_what_is_none_of_ours(run: Run, tmp_path: Path, name: str, said: str):
    code, out, err = run("show", tmp_path / name)
    assert (code, out) == (4, "")
    assert said in err and len(lines(err)) == 2


def test_data_inspect_shows_what_is_learned(run: Run, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"light {i} on", "label": "on"}) + "\n" for i in range(20)))
    words = ["data", "inspect", path, "--prompt-template", r"{text}\n->", "--completion-template", " {label}", "--examples", "1"]
    code, out, _ = run(*words)
    assert code == 0
    assert r"light 0 on\n->" in out and "learned   on" in out
    document = json.loads(run(*words, "--json")[1])
    assert document["rows"] == 20
    assert document["interface"]["prompt_template"] == "{text}\n->"


def test_data_prepare_writes_a_dataset(run: Run, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i % 40}", "completion": f"c{i % 40}"}) + "\n" for i in range(50)))
    code, out, _ = run("data", "prepare", path, "-o", tmp_path / "set")
    assert code == 0
    assert "10 of 50 rows repeat" in " ".join(out.split())
    assert "slmops finetune MODEL" in out
    assert run("data", "prepare", path, "-o", tmp_path / "set")[0] == 4
    document = json.loads(run("data", "prepare", path, "-o", tmp_path / "set", "--force", "--json")[1])
    assert document["command"] == "data prepare"
    assert document["kind"] == "dataset"


def test_broken_json_names_its_line(run: Run, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 6 + '{"text": \n')
    code, _, err = run("data", "inspect", path)
    assert code == 2
    assert "7" in err and len(lines(err)) == 2


def test_ctrl_c_ends_with_130_and_one_line(tmp_path: Path):
    code = """
import time
from slmops.cli import main
from slmops.cli.commands import root
from slmops.cli.options import command
def body(call):
    "Wait."
    open("started", "w").close()
    time.sleep(60)
slow = command("doctor", None)(body)
root.get_command = lambda ctx, name: slow
main(["doctor"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, lines(err)) == (130, "", ["interrupted"])


def test_a_closed_pipe_is_no_traceback(folder: Path):
    done = subprocess.run(
        f"{sys.executable} -c \"from slmops.cli import main; main(['show', '{folder}', '--json'])\" | true",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
