"""What a stage tells of itself: that something came to be, changed, or was refused. Plain values, no Prefect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusion_core.config import digest
from diffusion_core.tracking import without_secrets

_LONGEST_SENTENCE = 500


@dataclass(frozen=True)
class Event:
    """Something that happened to a thing.

    Attributes:
        name: `diffusion.<kind of thing>.<what happened>`.
        thing: which one, as `digits`.
        payload: ids, digests, counts and figures.
        once: what this can happen to once only, as a version's id. A stage that finds its work done says the same
            again, and it is told only if it was not told before. Without it, it is news each time.
        repeats: it is news this time, whether it was told before or not, and a stage that says it later is silent.
    """

    name: str
    thing: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    once: str | None = None
    repeats: bool = False

    @property
    def resource(self) -> str:
        """The id of the thing, as `diffusion.dataset.digits`."""
        return f"{self.name.rpartition('.')[0]}.{self.thing}"

    @property
    def id(self) -> str | None:
        """Of the event, if it can happen once only."""
        return None if self.once is None else digest(self.name, self.thing, self.once)


def failed(stage: str, error: BaseException, attempt: int) -> Event:
    """A stage ended with an error, whether it is tried again or not."""
    sentence = without_secrets(error)[:_LONGEST_SENTENCE]
    payload = {"stage": stage, "attempt": attempt, "error": sentence, "kind": type(error).__name__}
    return Event("diffusion.stage.failed", stage, payload)
