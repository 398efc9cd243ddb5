"""What every kind of store must do. The local and the S3 tests run these very same checks."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffusion_core.config import UserError
from diffusion_core.store import Directory, Entry

BYTES = bytes(range(256)) * 40


class StorageContract:
    """Subclassed per kind of store; the fixture `place` gives a fresh, absent directory."""

    def test_write_replaces_and_read_gives_back(self, place: Directory) -> None:
        place.write("a/b.bin", BYTES)
        place.write("a/b.bin", b"second")
        assert place.read("a/b.bin") == b"second"
        assert (place / "a").read("b.bin") == b"second"

    def test_create_never_replaces(self, place: Directory) -> None:
        assert place.create("claim.json", b"first") is True
        assert place.create("claim.json", b"second") is False
        assert place.create("claim.json", b"first") is False
        assert place.read("claim.json") == b"first"

    def test_an_empty_file_is_a_file(self, place: Directory) -> None:
        assert place.create("empty", b"")
        assert not place.create("empty", b"x")
        assert place.read("empty") == b""
        assert place.exists("empty")
        assert place.size("empty") == 0

    def test_of_many_creators_exactly_one_wins(self, place: Directory) -> None:
        contents = [f"writer {n}".encode() * 100 for n in range(8)]
        for race in range(5):
            with ThreadPoolExecutor(8) as pool:
                key = f"race-{race}/claim.json"
                won = list(pool.map(lambda content: place.create(key, content), contents))  # noqa: B023
            assert sum(won) == 1, won
            assert place.read(f"race-{race}/claim.json") == contents[won.index(True)]

    def test_create_file_stores_the_content_of_a_local_file(self, place: Directory, tmp_path: Path) -> None:
        source = tmp_path / "source.bin"
        source.write_bytes(BYTES)
        assert place.create_file("shards/part-00000.parquet", source) is True
        source.write_bytes(b"other")
        assert place.create_file("shards/part-00000.parquet", source) is False
        assert place.read("shards/part-00000.parquet") == BYTES

    def test_json_is_canonical(self, place: Directory) -> None:
        value = {"b": [1, 2.5, None], "a": {"name": "Å"}}
        place.write_json("one.json", value)
        assert place.create_json("two.json", {"a": {"name": "Å"}, "b": [1, 2.5, None]})
        assert not place.create_json("two.json", {})
        assert place.read_json("one.json") == value
        assert place.read("one.json") == place.read("two.json")

    def test_an_absent_file(self, place: Directory, tmp_path: Path) -> None:
        assert not place.exists("absent.json")
        for act in (place.read, place.read_json, place.size, place.open):
            with pytest.raises(FileNotFoundError, match=r"absent\.json"):
                act("absent.json")
        with pytest.raises(FileNotFoundError, match=r"absent\.json"):
            place.download("absent.json", tmp_path / "here")
        assert list(tmp_path.iterdir()) == []
        place.delete("absent.json")
        place.delete_tree()

    def test_an_absent_directory_is_an_empty_one(self, place: Directory) -> None:
        assert list(place.list()) == []
        assert place.children() == []

    def test_listing_is_complete_and_sorted_by_key(self, place: Directory) -> None:
        keys = ["a.txt", "a/b.c", "a/b/c/d", "a-b", "ab", "Z", "ä/ö.png", "with space/+%&=?#.txt", "a0/x"]
        for key in keys:
            place.write(key, key.encode())
        entries = list(place.list())
        assert [entry.key for entry in entries] == sorted(keys)
        assert all(isinstance(entry, Entry) and entry.size == len(entry.key.encode()) for entry in entries)
        assert [place.read(entry.key) for entry in entries] == [key.encode() for key in sorted(keys)]
        assert place.children() == ["a", "a0", "with space", "ä"]
        assert (place / "a").children() == ["b"]

    def test_a_listing_can_be_narrowed_by_any_prefix(self, place: Directory) -> None:
        for key in ("shards/part-00000.json", "shards/part-00001.json", "shards/other.json", "shards-old/part"):
            place.write(key, b"1")
        parts = [entry.key for entry in place.list("shards/part-")]
        assert parts == ["shards/part-00000.json", "shards/part-00001.json"]
        assert len(list(place.list("shards"))) == 4
        assert list(place.list("nothing/")) == []

    def test_the_stamp_changes_with_the_content(self, place: Directory) -> None:
        place.write("a", b"one")
        before = next(place.list()).stamp
        assert next(place.list()).stamp == before
        place.write("a", b"two")
        assert next(place.list()).stamp != before

    def test_open_reads_at_random(self, place: Directory) -> None:
        place.write("data.bin", BYTES)
        with place.open("data.bin") as file:
            assert file.size() == len(BYTES)
            file.seek(1000)
            assert file.read(10) == BYTES[1000:1010]
            file.seek(0)
            assert file.read() == BYTES

    def test_download(self, place: Directory, tmp_path: Path) -> None:
        place.write("data.bin", BYTES)
        place.download("data.bin", tmp_path / "new" / "copy.bin")
        assert (tmp_path / "new" / "copy.bin").read_bytes() == BYTES
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.bin"]

    def test_delete(self, place: Directory) -> None:
        for key in ("keep.json", "sub/a", "sub/b/c", "sub2/x"):
            place.write(key, b"1")
        (place / "sub").delete_tree()
        assert [entry.key for entry in place.list()] == ["keep.json", "sub2/x"]
        place.delete("keep.json")
        assert not place.exists("keep.json")
        assert place.create("keep.json", b"again")

    def test_a_place_travels_as_its_uri_alone(self, place: Directory) -> None:
        place.write("a", b"1")
        data = pickle.dumps(place)
        assert b"secret" not in data
        assert pickle.loads(data) == place
        assert Directory(place.uri) == place
        assert hash(Directory(place.uri)) == hash(place)
        assert pickle.loads(data).read("a") == b"1"

    @pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../b", "a//b", "./a", "."])
    def test_keys_stay_inside(self, place: Directory, key: str) -> None:
        for act in (place.read, place.exists, place.size, place.open, place.delete, place.__truediv__):
            with pytest.raises(UserError, match="not a relative path inside the store"):
                act(key)
        for write in (place.write, place.create):
            with pytest.raises(UserError, match="not a relative path inside the store"):
                write(key, b"")
