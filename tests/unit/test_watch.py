"""What a watched folder makes of its files: only what is new and has stayed as it is is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.settings import load_config
from flows.schedules.watch import Seen, look
from tests.image_files import write_images

STILL_S = 60.0


class Watched:
    """A folder that is looked at once a minute. `taken` plays the flow: what is to be taken is taken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.seen = folder, 1e9, Seen()
        fields = {"name": "pets", "source.uri": str(folder), "store": str(folder / "store"), "dataset.image_size": 8}
        self.config: PipelineConfig = load_config(shortcuts=fields)

    def taken(self) -> bool:
        self.now += STILL_S
        self.seen, said = look(self.config, self.seen, self.now, STILL_S)
        if said is None:
            assert self.seen.listing is not None
            self.seen = self.seen.model_copy(update={"taken": self.seen.listing.digest, "made": self.now})
        return said is None


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    folder = write_images(tmp_path / "in", ["cat/1.png", "dog/1.png"])
    watched = Watched(folder)
    assert [watched.taken() for _ in range(3)] == [False, True, False]
    return watched


def test_new_and_deleted_files_are_taken_after_an_interval_of_rest(watched: Watched) -> None:
    write_images(watched.folder, ["cat/2.png"])
    assert [watched.taken() for _ in range(3)] == [False, True, False]
    (watched.folder / "cat/2.png").unlink()
    assert [watched.taken() for _ in range(3)] == [False, True, False]


def test_a_growing_file_is_waited_for(watched: Watched) -> None:
    with (watched.folder / "cat/3.png").open("ab", buffering=0) as growing:
        for _ in range(3):
            growing.write(b"more")
            assert not watched.taken()
    assert [watched.taken() for _ in range(2)] == [True, False]


def test_two_looks_close_together_are_not_rest(watched: Watched) -> None:
    write_images(watched.folder, ["cat/2.png"])
    assert not watched.taken()
    _, said = look(watched.config, watched.seen, watched.now + 1, STILL_S)
    assert said is not None and "once it stays so" in said


def test_the_store_inside_and_unfinished_files_are_nothing_new(watched: Watched) -> None:
    write_images(watched.folder, ["store/runs/1/samples.png", ".hidden/4.png"])
    for name in ("cat/5.png.part", "cat/5.png.crdownload"):
        (watched.folder / name).write_bytes(b"half")
    assert [watched.taken() for _ in range(2)] == [False, False]


def test_an_empty_folder_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    watched = Watched(tmp_path / "in")
    assert [watched.taken() for _ in range(2)] == [False, False]
