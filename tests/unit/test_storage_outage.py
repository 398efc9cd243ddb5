"""An object store that is away: waited for, then told as what it is, and never taken for damage or a user's mistake."""

from __future__ import annotations

import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity.nap

from diffusion_core.config import UserError
from diffusion_core.data.hashing import HashCache
from diffusion_core.data.shards import ImageDataset
from diffusion_core.data.sources.base import SourceFile
from diffusion_core.data.sources.idx import IdxSource
from diffusion_core.data.sources.npz import NpzSource
from diffusion_core.data.sources.parquet import ParquetSource
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.labels import resolve_labels
from diffusion_core.store import Directory, StoreFull, check_reachable
from diffusion_core.store.lease import Held, Lease, claim
from diffusion_core.store.patience import StoreUnavailable, patience, patience_s

STORE = "s3://bucket/store"


class Service(http.server.ThreadingHTTPServer):
    """Serves one object under every key. `away` requests are answered with `fault` first."""

    daemon_threads = True
    content: bytes
    away: int
    fault: str
    requests: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Service

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests += 1
        status, body = 200, self.server.content
        if self.server.away:
            self.server.away -= 1
            number, _, code = self.server.fault.partition(" ")
            status, body = int(number), b""
            if code:
                body = f"<Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
        elif span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            status, body = 206, body[int(first) : int(last) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[Service]:
    server = Service(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def service(server: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    vars(server).update(content=b"content", away=0, fault="503 ", requests=0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    return server


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between two attempts, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=found.append))
    return found


@pytest.mark.parametrize("fault", ["503 ", "503 SlowDown", "500 InternalError", "400 RequestTimeout", "520 "])
def test_a_long_outage_is_waited_for(service: Service, naps: list[float], fault: str, caplog) -> None:
    service.fault, service.away = fault, 25
    assert Directory(STORE).read("a") == b"content"
    assert len(naps) == 25 and 5 < max(naps) <= 10
    (line,) = (record.message for record in caplog.records)
    assert line.startswith(f"The store {STORE}/ is away ({service.endpoint} answered ") and "up to 180 s" in line


def test_minutes_are_the_rule_and_a_block_may_have_less() -> None:
    assert patience_s() == 180
    with patience(3):
        assert patience_s() == 3
    assert patience_s() == 180


def _assert_away(act: Callable[[], object], endpoint: str) -> None:
    with patience(0.05), pytest.raises(StoreUnavailable) as caught:
        act()
    sentence = str(caught.value)
    assert not isinstance(caught.value, UserError | OSError)
    assert sentence.startswith(f"The store {STORE}/ cannot be reached: ") and endpoint in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_an_outage_that_lasts_is_no_mistake_of_the_user(service: Service, tmp_path: Path) -> None:
    place = Directory(STORE)
    service.away = 10_000
    for act in (
        lambda: place.read("a"),
        lambda: place.exists("a"),
        lambda: list(place.list()),
        lambda: place.write("a", b""),
        lambda: place.create("a", b""),
        lambda: place.download("a", tmp_path / "a"),
        lambda: place.open("a"),
        lambda: place.delete("a"),
    ):
        _assert_away(act, service.endpoint)


def test_nobody_listening_is_an_outage(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        _assert_away(lambda: Directory(STORE).read("a"), "http://127.0.0.1:")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("404 NoSuchBucket", "there is no such bucket"),
        ("403 AccessDenied", "access is denied"),
        ("403 SignatureDoesNotMatch", "the secret key is wrong"),
        ("501 NotImplemented", "answered NotImplemented: No"),
    ],
)
def test_an_answer_for_good_is_told_at_once(service: Service, fault: str, sentence: str) -> None:
    service.fault, service.away = fault, 10_000
    with pytest.raises(UserError, match=sentence):
        Directory(STORE).write("a", b"")
    assert service.requests == 1


@pytest.mark.parametrize("fault", ["403 QuotaExceeded", "507 XMinioStorageFull"])
def test_a_store_that_takes_no_more_is_known_as_such(service: Service, fault: str) -> None:
    service.fault, service.away = fault, 10_000
    with pytest.raises(StoreFull, match=r"cannot be used: (the quota of the bucket is used up|its disks are full)\."):
        Directory(STORE).create("a", b"")


def test_before_anything_begins_an_outage_is_told_at_once_and_to_the_user(service: Service) -> None:
    service.away = 10_000
    began = time.monotonic()
    with pytest.raises(UserError, match=f"^The store {STORE} cannot be reached: {service.endpoint} answered 503"):
        check_reachable(STORE)
    assert time.monotonic() - began < 3


def test_a_file_that_is_read_piece_by_piece_survives_an_outage(
    service: Service, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": range(1000)}), sink, row_group_size=100)
    service.content = sink.getvalue()
    with Directory(STORE).open("a") as stream:
        file = pq.ParquetFile(stream)
        service.away = 12
        assert file.read_row_group(3)["n"].to_pylist() == list(range(300, 400)) and len(naps) == 12
        service.away = 10_000
        monkeypatch.setattr("diffusion_core.store.patience.PATIENCE_S", 0.05)  # pyarrow reads in threads of its own
        _assert_away(lambda: file.read_row_group(4), service.endpoint)
        _assert_away(lambda: list(file.iter_batches(10, [5])), service.endpoint)
        service.away = 0
        assert stream.size() == len(service.content) and stream.seek(-4, 2) and stream.read() == b"PAR1"
        assert stream.read(5) == b""


def _source(kind: type, *keys: str) -> Callable[[], object]:
    from diffusion_core.data.config import SourceConfig

    files = [SourceFile(key, 100) for key in keys]
    return lambda: kind(SourceConfig(uri=STORE), Directory(STORE), files).scan(dict.fromkeys(keys, "0" * 64))


@pytest.mark.parametrize(
    "act",
    [
        _source(ParquetSource, "a.parquet"),
        _source(NpzSource, "a.npz"),
        _source(IdxSource, "train-images-idx3-ubyte"),
        lambda: HashCache(Directory(STORE), "source"),
        lambda: ImageDataset(Directory(STORE), {"image_shape": (1, 1, 1)}).read_shard({"file": "a", "rows": 1}),
        lambda: resolve_labels(GenerationConfig(labels=f"{STORE}/labels.txt", count=1), ["a"]),
    ],
    ids=["parquet", "npz", "idx", "hashes", "dataset", "labels"],
)
def test_an_outage_is_not_taken_for_damage(service: Service, act: Callable[[], object]) -> None:
    service.away = 10_000
    with patience(0.05), pytest.raises(StoreUnavailable):
        act()


def test_a_lease_outlives_an_outage(service: Service, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hides neither that work was done nor what ended it, and its holder is not judged by the store's silence."""
    place = Directory(store)
    lease = claim(place, {}, beat_s=60)
    assert isinstance(lease, Lease)
    away = Lease(Directory(STORE), 1, beat_s=0.01)
    service.away = 10_000
    monkeypatch.setattr("diffusion_core.store.lease.END_PATIENCE_S", 0.05)
    with pytest.raises(ZeroDivisionError), away:
        1 / 0  # noqa: B018

    now = [0.0]
    place.create_json("2.json", {"host": "elsewhere"})
    place.write_json("2.beat.json", {"count": 7})
    held = Held(place, 2, {"host": "elsewhere"}, patience_s=60, clock=lambda: now[0])
    read = Directory.read_json

    def slow(self: Directory, key: str) -> object:
        now[0] += 100
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "read_json", slow)
        assert held.outcome() is None
    now[0] += 59
    assert held.outcome() is None
    now[0] += 2
    assert held.outcome() == "lost"
    lease.end()
