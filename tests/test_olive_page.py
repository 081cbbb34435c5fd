"""docs/olive.md is true: every command in it is run, and prints and leaves what the page says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROWS, make_adapter, make_export, make_model, write_rows

pytest.importorskip("olive", reason="needs the extra slmops[olive]")

from slmops import artifact, hashes
from slmops.olive_backend.process import child_environment

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "olive.md").read_text()
BLOCKS = re.findall(r"```console\n\$ olive (.+)\n((?:.+\n)+)```", PAGE)
# All in one process: loading Olive takes longer than most of the commands.
RUNNER = """
import json, runpy, sys, traceback
from contextlib import redirect_stdout
from olive.cli.launcher import main
with open("package_config.json", "w") as stream, redirect_stdout(stream):  # as on the page
    runpy.run_module("slmops.olive_backend.package_config", run_name="__main__")
for number, words in enumerate(json.loads(sys.argv[1])):
    code = 0
    try:
        main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:
        traceback.print_exc()
        code = 1
    print(f"\\n=== {number} ended with {code}", flush=True)
    sys.stderr.flush()
"""


def misspelt() -> dict:
    workflow = json.loads((ROOT / "olive_configs" / "lora_cpu.json").read_text())
    settings = workflow["passes"]["adapter"]["config"]
    settings["rnak"] = settings.pop("r")
    settings["training_args"]["max_steps"] = 1
    return workflow


@pytest.mark.slow
def test_every_command_of_the_page_does_what_it_says(tmp_path: Path):
    assert len(BLOCKS) == 7
    model = make_model(tmp_path / "model")
    make_adapter(tmp_path / "adapter", model)
    make_export(tmp_path / "export", model, "int4")
    for name in ("train.jsonl", "rows.jsonl"):
        write_rows(tmp_path / name, ROWS * 4)
    (tmp_path / "olive_configs").symlink_to(ROOT / "olive_configs")
    (tmp_path / "misspelt.json").write_text(json.dumps(misspelt()))
    commands = [shlex.split(command) for command, _ in BLOCKS]
    variables = {**child_environment(tmp_path, cuda=False, threads=1), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(commands)],
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    outputs = re.split(r"\n=== \d+ ended with (\d)\n", done.stdout)
    assert len(outputs) == 2 * len(BLOCKS) + 1, done.stdout[-2000:]
    for (command, expected), output, code in zip(BLOCKS, outputs[::2], outputs[1::2], strict=False):
        for line in expected.splitlines():
            if not line.startswith("exit code"):
                assert line in output, f"{command}: {output[-2000:]}"
                continue
            said, _, left = line.partition(", ")
            assert said == f"exit code {code}", f"{command}: {output[-2000:]}"
            if left:
                assert (tmp_path / left.removeprefix("no ")).exists() != left.startswith("no "), f"{command}: {output[-2000:]}"
    # The last one is plain `olive run` with a pass of ours in it: what it made is what the command makes.
    artifact.check(artifact.load(tmp_path / "int4_out"))
    assert figures(tmp_path / "int4_out") == figures(tmp_path / "export")


def figures(folder: Path) -> dict[str, str]:
    """Hashes of what a package computes with."""
    return {name: hashes.sha256_file(folder / name) for name in ("model.onnx.data", "genai_config.json")}


def test_the_page_names_the_commands_of_olives_tutorials():
    for name in ("finetune", "auto-opt", "generate-adapter", "run"):
        assert any(command.startswith(f"{name} ") for command, _ in BLOCKS)
