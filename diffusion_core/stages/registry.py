"""The stages there are, in the order of the pipeline. A new one is a module of this package and a line here.

Light: the command shows these without importing anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_core.stages.base import Stage


@dataclass(frozen=True)
class Entry:
    """A stage by the name of its module, with what it does in one sentence."""

    name: str
    summary: str
    verb_name: str | None = None

    @property
    def verb(self) -> str:
        """What is typed after `diffusion`."""
        return self.verb_name or self.name

    def load(self) -> Stage[Any, Any]:
        """The stage, which its module calls STAGE."""
        stage: Stage[Any, Any] = import_module(f"{__package__}.{self.name}").STAGE
        return stage


_ENTRIES = (
    Entry("shard", "Turn a source of images into a dataset version."),
    Entry("train", "Train a model on a dataset version, or continue its run."),
    Entry("export", "Make a bundle of a finished run with a moving average of another length, without training again."),
    Entry("evaluate", "Measure a model against a dataset version (default: the one that it was trained on)."),
    Entry("compare", "Make a table and a plot of sample quality against network evaluations.", "compare-samplers"),
    Entry("register", "Register a bundle as a model version; it becomes the champion if it passes the gate."),
    Entry("generate", "Generate images with a model (default: the champion), or complete and extend their set."),
    Entry("prune", "Say what the store can do without, and why, or delete it."),
)

STAGES = {entry.name: entry for entry in _ENTRIES}
