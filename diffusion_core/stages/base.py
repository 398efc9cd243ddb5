"""What a stage is. What is the same for all of them (job, task, flow, verb, deployment) is made from this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from diffusion_core.jobs.request import Request, Result
from diffusion_core.stages.events import Event
from diffusion_core.stages.options import Options
from diffusion_core.tracking.approval import Question

if TYPE_CHECKING:
    from diffusion_core.jobs.backend import BackendConfig

RequestT = TypeVar("RequestT", bound=Request)
ResultT = TypeVar("ResultT", bound=Result)

Rows = list[tuple[str, str]]  # of a table: what it is, and its value


@dataclass(frozen=True)
class ShortForm:
    """A deployment that asks for little: the few options that make a request of the stage, the rest being settled."""

    name: str
    summary: str
    options: type[Options]


@dataclass(frozen=True)
class Stage(Generic[RequestT, ResultT]):
    """One stage of the pipeline.

    Importing one is cheap: no torch, Ray, MLflow or pyarrow before it checks or runs.
    """

    name: str
    flow: str
    """Name of its Prefect flow and deployment."""
    title: str
    """What its result is called in reports."""
    options: type[Options]
    request: type[RequestT]
    result: type[ResultT]
    check: Callable[[RequestT, BackendConfig], None]
    """Raises `UserError` for what can be known to go wrong before anything starts: in seconds, without Ray or torch."""
    run: Callable[[RequestT], ResultT]
    """Does the work, in the program of a job. Doing it again finds what is done."""
    rows: Callable[[ResultT], Rows]
    text: Callable[[ResultT], str] | None = None
    """Markdown that is shown above the rows."""
    table: Callable[[ResultT], list[dict[str, Any]]] | None = None
    """Rows of plain values that Prefect shows instead of the report."""
    picture: Callable[[ResultT], str] | None = None
    """URI of a PNG for the report."""
    plot: Callable[[ResultT], bytes | None] | None = None
    """A PNG that is drawn for the report, if there is something to draw."""
    mlflow: Callable[[ResultT], str | None] | None = None
    """What MLflow holds of it, as `runs:/<id>` or `models:/<name>/<version>`."""
    events: Callable[[RequestT, ResultT], list[Event]] | None = None
    """What it tells of itself, the same whether it did the work or found it done."""
    question: Callable[[ResultT], Question | None] | None = None
    """What a person has to answer before the stage, done again, can conclude."""
    is_job: bool = True
    """Whether its work is a program of its own. What is none needs neither Ray nor room in the store for a job's files,
    and is done by the process of the flow, or of the command, which then needs no Prefect."""
    short_forms: tuple[ShortForm, ...] = ()
    """Beside the form that has all of its options."""

    @property
    def report(self) -> str:
        """Key of its report among Prefect's artifacts."""
        return self.title.lower().replace(" ", "-")


def seconds(result: Result) -> str:
    """How long a job took, as the last row of its table says it."""
    return f"{result.seconds:.0f}" + (" (found done)" if result.reused else "")
