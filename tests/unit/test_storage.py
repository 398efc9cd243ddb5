"""The store on a local disk, and the URIs of both kinds of store."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from diffusion_core.store import Directory, StoreFull, check_reachable
from tests.storage_contract import StorageContract


class TestLocal(StorageContract):
    @pytest.fixture
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Directory:
        return Directory(tmp_path_factory.mktemp("store") / "new" / "place")


@pytest.mark.parametrize(
    ("given", "uri"),
    [
        ("/data/store/", "/data/store"),
        ("/data//a/../store", "/data/store"),
        ("file:///data/my%20store", "/data/my store"),
        ("file://localhost/data", "/data"),
        (Path("/data/store"), "/data/store"),
        ("relative", os.path.abspath("relative")),
        ("~/store", os.path.expanduser("~/store")),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://my.bucket-1/a/b/", "s3://my.bucket-1/a/b"),
    ],
)
def test_uris_have_one_form(given: str | Path, uri: str) -> None:
    assert Directory(given).uri == uri
    assert Directory(Directory(given).uri).uri == uri


def test_a_place_keeps_its_meaning_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Directory("store")
    monkeypatch.chdir(tmp_path)
    assert Directory("store") != place


def test_names_and_paths() -> None:
    assert (Directory("s3://bucket/a") / "b/c").uri == "s3://bucket/a/b/c"
    assert (Directory("/") / "b").uri == "/b"
    assert Directory("s3://bucket/a/b").name == "b"
    assert Directory("/a/b").name == "b"
    assert Directory("/a/b").local_path == Path("/a/b")
    assert Directory("/a").is_local and not Directory("s3://bucket").is_local
    with pytest.raises(UserError, match="s3://bucket is not a local folder"):
        _ = Directory("s3://bucket").local_path


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("", "is not a place"),
        ("gs://bucket/x", "has the scheme 'gs'; accepted are a local path"),
        ("https://host/x", "has the scheme 'https'"),
        ("file://host/x", "must begin with file:///"),
        ("s3://", "no valid bucket name"),
        ("s3://ab/x", "no valid bucket name"),
        ("s3://Bucket/x", "no valid bucket name"),
        ("s3://bucket/a/../b", "not a relative path"),
        ("s3://bucket/x?endpoint_override=localhost:1", "set AWS_ENDPOINT_URL"),
        ("s3://key:secret@bucket/x", "set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID"),
    ],
)
def test_bad_uris_get_one_sentence(uri: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        Directory(uri)
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)


def test_odd_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "image.png").write_bytes(b"1")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.png").symlink_to(tmp_path / "sub" / "image.png")
    os.mkfifo(tmp_path / "pipe")
    place = Directory(tmp_path)
    assert [entry.key for entry in place.list()] == ["link.png", "sub/image.png"]
    with pytest.raises(FileNotFoundError):  # and not a wait for a writer of the pipe
        place.read("pipe")


@pytest.mark.parametrize("step", ["link", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = Directory(tmp_path / "store")
    place.write("there", b"")
    monkeypatch.setattr(os, step, fail)
    act = place.write if step == "replace" else place.create
    with pytest.raises(StoreFull, match=r"store/new cannot be used: the disk is full") as caught:
        act("new", b"data")
    assert caught.value.__cause__ is not None
    monkeypatch.undo()
    assert os.listdir(tmp_path / "store") == ["there"]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file cannot be used: a part of the path is a file"):
        Directory(tmp_path / "file").create("a/b", b"")
    assert list(Directory(tmp_path / "file").list()) == []
    assert Directory(tmp_path / "file").children() == []


def test_check_reachable(tmp_path: Path) -> None:
    check_reachable(tmp_path)
    check_reachable(tmp_path / "not" / "yet" / "there")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="file is not a folder"):
            check_reachable(tmp_path / place)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be written: permission is denied"):
            check_reachable(tmp_path / "locked")


CREATOR = """
import itertools, sys
from diffusion_core.store import Directory
place = Directory(sys.argv[1])
print("ready", flush=True)
for n in itertools.count():
    place.create(f"part-{n:05}", bytes([n % 256]) * 1_000_000)
    place.write("latest", bytes([n % 256]) * 1_000_000)
"""


def test_a_killed_writer_leaves_only_whole_files(tmp_path: Path) -> None:
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", CREATOR, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.2 + 0.05 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        files = list(Directory(tmp_path).list())
        assert files
        for entry in files:
            data = Directory(tmp_path).read(entry.key)
            assert len(data) == 1_000_000 and len(set(data)) == 1, entry.key
