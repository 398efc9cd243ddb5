"""How many images the workers of a generation have made, counted by an actor; and who the workers are."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusion_core.progress import Progress

logger = logging.getLogger(__name__)


class _Counter:
    """The actor that counts the images, and knows the actors of the pool."""

    def __init__(self) -> None:
        self._total = 0
        self._members: dict[str, Any] = {}

    def add(self, images: int) -> None:
        self._total += images

    def total(self) -> int:
        return self._total

    def join(self, actor_id: str, member: list[Any]) -> None:
        self._members[actor_id] = member[0]

    def dismiss(self) -> None:
        """End the actors that have joined."""
        import ray

        for member in self._members.values():
            ray.kill(member)
        self._members.clear()


class Tally:
    """Tells the counter, without waiting for it, how many images are done. Lives in the actors and in the job."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    def __call__(self, images: int) -> None:
        self._counter.add.remote(images)

    def join(self) -> None:
        import ray

        context = ray.get_runtime_context()
        self._counter.join.remote(context.get_actor_id(), [context.current_actor])

    def dismiss(self) -> None:
        import ray

        ray.get(self._counter.dismiss.remote())


@contextmanager
def tallied(progress: Progress, already: int) -> Iterator[Tally]:
    """A tally for the workers, and a thread that shows it once a second."""
    import ray

    counter: Any = ray.remote(num_cpus=0)(_Counter).remote()
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(1.0):
            try:
                done: int = ray.get(counter.total.remote(), timeout=10)
                progress.update(min(already + done, progress.total or 0))
            except ray.exceptions.RayError as error:
                logger.warning("progress cannot be shown: %s", error)
                return

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield Tally(counter)
    finally:
        ended.set()
        thread.join(timeout=15)
        ray.kill(counter)
