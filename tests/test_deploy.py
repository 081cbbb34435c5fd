"""What lies in `deploy/` really puts a package on a device: a venv with the runtime alone, its self-test, and the host's answers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import ROWS, make_adapter, make_model

import slmops
from slmops import artifact
from slmops.runtime import adapter_files

DEVICE = ROOT / "deploy" / "device"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("deploy")
    base = make_model(place / "base", learned=ROWS)
    adapters = [f"{name}={make_adapter(place / name, base, seed)}" for seed, name in enumerate(("one", "two"))]
    return slmops.pack(base, adapter=adapters, out=place / "package").path


def install(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DEVICE / "install.sh"), *map(str, arguments), "--no-service"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_package_is_installed_tested_served_and_rolled_back(package: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    done = install(package, "--prefix", prefix)
    assert done.returncode == 0, done.stderr
    assert "self_test" in done.stdout
    names = subprocess.run(
        [prefix / "venv/bin/python", "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    assert not {item["name"] for item in json.loads(names.stdout)} & {"torch", "transformers", "peft", "onnx", "onnx-ir"}
    _ask_the_host(prefix)

    damaged = tmp_path / "damaged"
    shutil.copytree(package, damaged)
    file = next((damaged / "adapters").glob("one*.onnx_adapter"))
    adapter_files.write_adapter(file, {name: 0 * value for name, value in adapter_files.read_adapter(file).items()})
    artifact.seal(damaged)
    before = (prefix / "package" / artifact.MANIFEST).read_bytes()
    done = install(damaged, "--prefix", prefix)
    assert done.returncode == 5 and "one: prompt" in done.stdout, (done.returncode, done.stdout, done.stderr)
    assert (prefix / "package" / artifact.MANIFEST).read_bytes() == before  # the old one goes on

    shutil.rmtree(prefix / "package.new")
    assert install(package, "--prefix", prefix).returncode == 0
    (prefix / "package" / "new").touch()
    assert install("--rollback", "--prefix", prefix).returncode == 0
    assert not (prefix / "package" / "new").exists() and (prefix / "package" / artifact.MANIFEST).is_file()
    assert install("--rollback", "--prefix", prefix).returncode == 4


def _ask_the_host(prefix: Path) -> None:
    """Run the unit's own lines, under the prefix, and ask over the socket."""
    unit = (DEVICE / "slmops-package.service").read_text().replace("/opt/slmops", str(prefix)).replace("/run/slmops", str(prefix))
    start_before, start = (re.search(rf"^{key}=(.+)$", unit, re.MULTILINE) for key in ("ExecStartPre", "ExecStart"))
    assert start_before is not None and start is not None
    subprocess.run(shlex.split(start_before[1]), check=True, capture_output=True)
    process = subprocess.Popen(shlex.split(start[1]))
    try:
        path = prefix / "package.sock"
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            stream = client.makefile("rw", encoding="utf-8")

            def ask(request: object) -> dict[str, object]:
                stream.write((request if isinstance(request, str) else json.dumps(request)) + "\n")
                stream.flush()
                return json.loads(stream.readline())

            plain = ask({"prompt": "play some jazz", "max_new_tokens": 4})
            assert isinstance(plain["text"], str) and plain["adapter"] is None
            answers = {name: ask({"prompt": "play some jazz", "adapter": name, "max_new_tokens": 8})["text"] for name in ("one", "two")}
            assert ask({"prompt": "play some jazz", "adapter": "one", "max_new_tokens": 8})["text"] == answers["one"]
            assert ask({"prompt": "play some jazz", "max_new_tokens": 4})["text"] == plain["text"]
            assert "no adapter three" in str(ask({"prompt": "x", "adapter": "three"})["error"])
            assert "not a request" in str(ask("{")["error"])
            assert "not a request" in str(ask({"text": "x"})["error"])
    finally:
        process.kill()
        process.wait()


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    assert install(tmp_path, "--prefix", tmp_path / "opt").returncode == 4
    assert install("--colour", "--prefix", tmp_path / "opt").returncode == 2
    assert not (tmp_path / "opt").exists()


def test_the_container_names_what_is_there() -> None:
    text = (DEVICE / "Containerfile").read_text()
    for place in re.findall(r"/src/([\w./-]+)", text):
        assert (ROOT / place).exists(), place
    assert "slmops verify /package --self-test" in text and "host.py /package --socket" in text
