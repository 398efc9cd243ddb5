"""The store on a real S3 service, and what happens when the service, the network or the credentials fail."""

from __future__ import annotations

import http.client
import http.server
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_core.config import UserError
from diffusion_core.store import Directory, check_reachable, s3, s3_client
from tests.storage_contract import StorageContract
from tests.swift_server import SwiftServer

MIB = 1 << 20


class TestS3(StorageContract):
    @pytest.fixture
    def place(self, s3_store: str) -> Directory:
        return Directory(s3_store) / "place"


def test_the_whole_bucket_is_a_place(s3_store: str) -> None:
    bucket = Directory(s3_store.removesuffix("/store"))
    (bucket / "a").write("b", b"1")
    bucket.write("c", b"2")
    assert [entry.key for entry in bucket.list()] == ["a/b", "c"]
    assert bucket.children() == ["a"]
    check_reachable(bucket.uri)
    assert [entry.key for entry in bucket.list()] == ["a/b", "c"]


def test_listings_longer_than_a_page(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Directory(s3_store)
    for n in range(25):
        place.write(f"d{n:02}/x", b"1")
    client = s3_client.client()
    real = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **options: real(MaxKeys=4, **options))
    assert [entry.key for entry in place.list()] == [f"d{n:02}/x" for n in range(25)]
    assert place.children() == [f"d{n:02}" for n in range(25)]
    place.delete_tree()
    assert list(place.list()) == []


def test_large_files_go_up_in_parts(s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    place = Directory(s3_store)
    data = bytes(range(256)) * (4096 * 12) + b"the end"  # 12 MiB and a rest: three parts
    (tmp_path / "large").write_bytes(data)
    assert place.create_file("large", tmp_path / "large")
    assert place.read("large") == data
    assert not place.create_file("large", tmp_path / "large")
    assert not place.create("large", data[:-1])
    place.write("large", data[1:])
    assert place.size("large") == len(data) - 1
    place.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data[1:]


def test_of_two_uploads_in_parts_one_wins(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3.S3Place, "size", lambda *_: None)  # both start before either has ended
    place = Directory(s3_store)
    assert place.create("large", b"a" * 6 * MIB)
    assert not place.create("large", b"b" * 6 * MIB)
    assert place.read("large")[:1] == b"a"


def test_parquet_by_random_access(s3_store: str) -> None:
    place = Directory(s3_store)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(range(1000))}), sink, row_group_size=100)
    place.write("part-00000.parquet", sink.getvalue().to_pybytes())
    file = pq.ParquetFile(place.open("part-00000.parquet"))
    assert file.read_row_group(7)["n"].to_pylist() == list(range(700, 800))


def _create(data: bytes, results: multiprocessing.Queue) -> None:
    place: Directory = pickle.loads(data)
    results.put(place.create("claim", str(id(place)).encode()))


def test_processes_race_for_one_claim(s3_store: str) -> None:
    # "fork": a child must not reuse its parent's connections
    context = multiprocessing.get_context("fork")
    place = Directory(s3_store)
    assert not place.exists("claim")
    results: multiprocessing.Queue = context.Queue()
    children = [context.Process(target=_create, args=(pickle.dumps(place), results)) for _ in range(4)]
    for child in children:
        child.start()
    outcomes = [results.get(timeout=30) for _ in children]
    for child in children:
        child.join()
    assert sorted(outcomes) == [False, False, False, True]


def test_changed_credentials_take_effect(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Directory(s3_store)
    place.write("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"secret key is wrong \(check AWS_SECRET_ACCESS_KEY\)"):
        place.read("a")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is wrong"),
        ({"AWS_ACCESS_KEY_ID": "nobody:here"}, "access key is unknown|access is denied|secret key is wrong"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "there are no S3 credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached"),
        ({"AWS_ENDPOINT_URL": "http://no-such-host.invalid"}, "cannot be reached"),
        ({"AWS_ENDPOINT_URL": "not a url"}, "cannot be reached"),
    ],
)
def test_check_says_what_is_wrong(
    s3_store: str, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    check_reachable(s3_store)
    for name, value in variables.items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    _expect_within_3_seconds(s3_store, sentence)


def test_check_of_an_absent_bucket(s3_store: str) -> None:
    _expect_within_3_seconds("s3://there-is-no-such-bucket/x", "there is no such bucket")
    with pytest.raises(UserError, match="there is no such bucket"):
        Directory("s3://there-is-no-such-bucket").write("a", b"")


def test_check_of_a_silent_server(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        _expect_within_3_seconds(s3_store, "cannot be reached")


def _expect_within_3_seconds(uri: str, sentence: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=sentence) as caught:
        check_reachable(uri)
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value) and uri in str(caught.value)


class Faults(http.server.ThreadingHTTPServer):
    """Stands between client and service and spoils the next answers to one method.

    "lost" and "cut" spoil the answer after the work was done; a status, as "503" or "412 PreconditionFailed", is
    answered instead of doing the work; "" leaves a request alone.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _FaultyHandler)
        self.upstream = urlsplit(upstream)
        self.plan: list[str] = []
        self.method = "PUT"
        self.ignore_conditions = False


class _FaultyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faults

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.plan.pop(0) if self.server.plan and self.command == self.server.method else ""
        if self.server.ignore_conditions and "If-None-Match" in self.headers:
            fault = "200"  # as if the object had been replaced
        if fault[:1].isdigit():
            status, _, code = fault.partition(" ")
            answer_body = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
            self.send_response(int(status))
            self.send_header("Content-Length", str(len(answer_body)))
            self.end_headers()
            self.wfile.write(answer_body)
            return
        connection = http.client.HTTPConnection(self.server.upstream.hostname, self.server.upstream.port)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def faults(s3_server: SwiftServer, s3_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    proxy = Faults(s3_server.endpoint)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def test_passing_errors_are_retried(faults: Faults, s3_store: str) -> None:
    place = Directory(s3_store)
    faults.plan = ["503", "503", "503"]
    assert place.create("a", b"1")
    assert faults.plan == []
    faults.method, faults.plan = "GET", ["503", "lost", "cut"]
    assert place.read("a") == b"1"
    faults.plan = ["503"]
    assert [entry.key for entry in place.list()] == ["a"]


def test_a_commit_whose_answer_was_lost_is_still_ours(faults: Faults, s3_store: str) -> None:
    place = Directory(s3_store)
    faults.plan = ["lost"]
    assert place.create("claim", b"mine") is True  # its second attempt finds the object that its first one made
    faults.plan = ["lost"]
    assert place.create("claim", b"another's") is False
    assert place.read("claim") == b"mine"


def test_parts_are_retried_one_by_one(faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    faults.plan = ["503", "lost"]
    assert Directory(s3_store).create("large", b"a" * 6 * MIB) is True
    assert Directory(s3_store).read("large") == b"a" * 6 * MIB


@pytest.mark.parametrize("second_answer", ["412 PreconditionFailed", "404 NoSuchUpload"])
def test_an_upload_in_parts_whose_answer_was_lost_is_still_ours(
    faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch, second_answer: str
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    place = Directory(s3_store)
    faults.method, faults.plan = "POST", ["", "lost", second_answer]  # the start goes through, then the end is lost
    assert place.create("large", b"a" * 6 * MIB) is True
    assert faults.plan == [] and place.size("large") == 6 * MIB
    monkeypatch.setattr(s3.S3Place, "size", lambda *_: None)
    faults.plan = ["", "503", "412 PreconditionFailed"]  # its second attempt finds the object of the first upload
    assert place.create("large", b"b" * 6 * MIB) is False


def test_check_of_a_service_that_ignores_conditions(faults: Faults, s3_store: str) -> None:
    check_reachable(s3_store)
    faults.ignore_conditions = True
    with pytest.raises(UserError, match=r"has no conditional writes \(If-None-Match\)"):
        check_reachable(s3_store)
    check_reachable(s3_store, writable=False)
    assert list(Directory(s3_store).list()) == []
