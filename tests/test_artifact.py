"""A folder is whole or it is none; what was changed is found; what is not ours is left alone."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from slmops import artifact, hashes
from slmops.artifact import MANIFEST, create, load, seal
from slmops.errors import BadArtifact, InvalidInput, RunFailed


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(out: Path, text: str = "content", **options: object) -> artifact.Artifact:
    with create(out, kind="model", command="merge", **options) as draft:  # pyright: ignore[reportArgumentType]
        (draft.folder / "deep").mkdir()
        (draft.folder / "deep" / "file.txt").write_text(text)
        draft.facts["precision"] = "fp32"
        draft.warn("once")
        draft.warn("once")
    return draft.done()


def test_a_complete_folder_says_what_it_holds(tmp_path: Path):
    done = made(tmp_path / "out")
    assert load(tmp_path / "out") == done
    assert done.manifest.warnings == ["once"]
    assert done.manifest.files["deep/file.txt"].bytes == 7
    document = done.document()
    assert {key: document[key] for key in ("command", "ok", "kind", "precision")} == {
        "command": "merge",
        "ok": True,
        "kind": "model",
        "precision": "fp32",
    }
    artifact.check(done)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, InvalidInput, ValueError])
def test_nothing_is_left_when_it_breaks_off(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), create(tmp_path / "out", kind="model", command="merge") as draft:
        (draft.folder / "half").write_text("half")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_training_keeps_its_checkpoints_and_still_looks_incomplete(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), create(tmp_path / "out", kind="adapter", command="finetune", keep="checkpoints/*") as draft:
        (draft.folder / "checkpoints").mkdir()
        (draft.folder / "checkpoints" / "one").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out.partial" / "checkpoints" / "one").is_file()
    with pytest.raises(BadArtifact, match=f"no {MANIFEST}"):
        load(tmp_path / "out.partial")
    with pytest.raises(RunFailed, match="was not completed"):
        draft.done()


def test_an_output_folder_with_something_in_it_is_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    made(tmp_path / "out")  # empty: fine
    with pytest.raises(BadArtifact, match="not empty") as caught:
        made(tmp_path / "out")
    assert "--force" in caught.value.hint
    assert made(tmp_path / "out", "other", force=True).manifest.files["deep/file.txt"].bytes == 5


def test_force_never_deletes_what_slmops_did_not_write(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadArtifact, match="not written by slmops"):
        made(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(BadArtifact, match="is a file"):
        made(tmp_path / "mine" / "thesis.txt", force=True)


def test_a_failed_run_with_force_leaves_the_old_folder(tmp_path: Path):
    made(tmp_path / "out")
    with pytest.raises(ValueError, match="late"), create(tmp_path / "out", kind="model", command="merge", force=True):
        raise ValueError("late")
    artifact.check(load(tmp_path / "out"))


def test_an_edited_manifest_is_a_changed_artefact(tmp_path: Path):
    made(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    content["facts"]["precision"] = "int4"
    path.write_text(json.dumps(content))
    with pytest.raises(BadArtifact, match="was changed after it was written"):
        load(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "spoon"}', "\udcff"])
def test_a_broken_manifest_is_refused_in_one_line(tmp_path: Path, text: str):
    made(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadArtifact, match="is not a manifest") as caught:
        load(tmp_path / "out")
    assert "\n" not in caught.value.message


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path):
    made(tmp_path / "out")
    seal(tmp_path / "out", schema_version=2)
    with pytest.raises(BadArtifact, match="schema 2"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda p: p.unlink(), "missing"),
        (lambda p: p.write_text("longer than before"), "bytes"),
        (lambda p: p.write_text("CONTENT"), "content changed"),
    ],
)
def test_a_changed_file_is_found_also_after_a_check_that_passed(tmp_path: Path, harm: object, told: str):
    made(tmp_path / "out")
    artifact.check(load(tmp_path / "out"))
    harm(tmp_path / "out" / "deep" / "file.txt")  # pyright: ignore[reportCallIssue]
    with pytest.raises(BadArtifact, match=told):
        artifact.check(load(tmp_path / "out"))
    assert artifact.changed_files(load(tmp_path / "out"))[0].startswith("deep/file.txt: ")


def test_seal_writes_the_hashes_anew(tmp_path: Path):
    made(tmp_path / "out")
    (tmp_path / "out" / "deep" / "file.txt").write_text("planted")
    sealed = seal(tmp_path / "out", interface={"prompt_template": "{x}"})
    artifact.check(load(tmp_path / "out"))
    assert sealed.manifest.interface == {"prompt_template": "{x}"}


def test_another_kind_is_refused_by_name(tmp_path: Path):
    made(tmp_path / "out")
    assert load(tmp_path / "out", kinds=("model",)).manifest.kind == "model"
    with pytest.raises(BadArtifact, match="is a model, and an export or a package is needed"):
        load(tmp_path / "out", kinds=("export", "package"))


def test_no_folder_and_no_manifest(tmp_path: Path):
    with pytest.raises(BadArtifact, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(BadArtifact, match="incomplete or was not written"):
        load(tmp_path)
    assert artifact.find(tmp_path) is None


def test_inputs_are_found_again_when_both_folders_move_together(tmp_path: Path):
    base = made(tmp_path / "a" / "base")
    with create(tmp_path / "a" / "child", kind="export", command="export") as draft:
        draft.add_input("model", base.path)
    (tmp_path / "a").rename(tmp_path / "b")
    child = load(tmp_path / "b" / "child")
    assert child.find("model") == tmp_path / "b" / "base"
    assert child.find("dataset") is None
    recorded = child.manifest.input("model")
    assert recorded is not None
    assert recorded.sha256 == hashes.fingerprint(tmp_path / "b" / "base")


def test_a_fingerprint_of_a_model_sees_weights_and_config_and_nothing_else(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = hashes.fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert hashes.fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert hashes.fingerprint(tmp_path) != first


def test_a_model_folder_needs_config_and_safe_weights(tmp_path: Path):
    with pytest.raises(BadArtifact, match="no such model folder"):
        artifact.require_model(tmp_path / "absent")
    with pytest.raises(BadArtifact, match=r"no config\.json"):
        artifact.require_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadArtifact, match="has no weights"):
        artifact.require_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadArtifact, match="only as a pickle"):
        artifact.require_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert artifact.require_model(tmp_path) == tmp_path


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tiny disk")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k none {disk} 2>/dev/null"):
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(RunFailed, match="the disk is full") as caught, create(disk / "out", kind="model", command="merge") as draft:
            (draft.folder / "weights").write_bytes(b"x" * 2**20)
        assert "free some space" in caught.value.hint
        assert list(disk.iterdir()) == []
    finally:
        os.system(f"umount {disk}")


def test_a_file_that_may_not_grow_is_told_and_leaves_nothing(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RunFailed, match="could not write") as caught, create(tmp_path / "out", kind="model", command="merge") as draft:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            (draft.folder / "weights").write_bytes(b"x" * 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written_to_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="could not write"), create(tmp_path / "file" / "out", kind="model", command="merge"):
        pass


def test_files_are_hashed_beside_the_work_and_again_where_it_changed_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda path: (read.append(path.name), real(path))[1])
    with create(tmp_path / "out", kind="export", command="export") as draft:
        for name in ("large", "changed"):
            (draft.folder / name).write_text(name)
        with draft.hashing():
            (draft.folder / "changed").write_text("by the work")
            (draft.folder / "new").write_text("of the work")
    assert sorted(read) == ["changed", "new"]
    found = draft.done()
    assert artifact.changed_files(found) == []
    assert found.manifest.files["large"].sha256 == hashlib.sha256(b"large").hexdigest()


def test_hashes_that_were_not_found_beside_the_work_are_taken_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_PROCESS", "raise SystemExit(1)")
    with create(tmp_path / "out", kind="export", command="export") as draft:
        (draft.folder / "file").write_text("content")
        with draft.hashing():
            pass
    assert artifact.changed_files(draft.done()) == []


def large(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write a file whose hash is worth keeping, changed long enough ago; return what will be read of it."""
    monkeypatch.setattr(hashes, "_LARGE", 8)
    monkeypatch.setattr(hashes, "_SETTLED", -1)
    path.write_text("large enough")
    read: list[str] = []
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda file: (read.append(file.name), real(file))[1])
    return read


def test_a_large_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = large(tmp_path / "weights", monkeypatch)
    assert hashes.kept_sha256(tmp_path / "weights") == hashes.kept_sha256(tmp_path / "weights") == hashes.fingerprint(tmp_path / "weights")
    assert read == ["weights"]


def rewritten(path: Path) -> None:
    """Other content of the same size and with the old time of modification: only the system knows."""
    status = path.stat()
    path.write_text("LARGE ENOUGH")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced(path: Path) -> None:
    path.unlink()
    path.write_text("LARGE ENOUGH")


def damaged(path: Path) -> None:
    for file in (path.parent / "cache").rglob("*.json"):
        file.write_text("not JSON")


@pytest.mark.parametrize("harm", [rewritten, replaced, damaged])
def test_a_large_file_is_hashed_again_when_it_changed_or_the_memory_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None]
) -> None:
    read = large(tmp_path / "weights", monkeypatch)
    hashes.kept_sha256(tmp_path / "weights")
    harm(tmp_path / "weights")
    assert hashes.kept_sha256(tmp_path / "weights") == hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    assert len(read) == 2


def test_the_hash_of_a_file_that_changed_a_moment_ago_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next change could leave the same times."""
    read = large(tmp_path / "weights", monkeypatch)
    monkeypatch.setattr(hashes, "_SETTLED", 60_000_000_000)
    for _ in range(2):
        hashes.kept_sha256(tmp_path / "weights")
    assert len(read) == 2
