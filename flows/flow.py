"""What all flows have in common: they say which process runs them, and errors are told once.

A user's mistake is one sentence: the message of the state that the run ends in, and one line of its log. Anything else
keeps its traceback, which Prefect alone would print for the task, for its flow and for the engine.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import prefect
from prefect import Flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Failed
from pydantic import ValidationError, validate_call

from diffusion_core.config import UserError, explain
from flows.announced import announce


def diffusion_flow(name: str, **options: Any) -> Callable[[Callable[..., Any]], Flow[..., Any]]:
    """Decorator, like Prefect's: makes a flow of a function. Calling it raises what the function raises."""

    def made(run: Callable[..., Any]) -> Flow[..., Any]:
        validated = _validator(run)

        @wraps(run)
        def flow(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(**validated(*args, **kwargs))
            except UserError as error:
                if _is_news(error):
                    get_run_logger().error("%s", error)
                return Failed(message=str(error), data=error)

        # Its parameters are looked at here: Prefect's own look ends in a message of several lines and a traceback.
        return prefect.flow(name=name, validate_parameters=False, on_running=[announce], **options)(flow)

    return made


def task_failed(error: UserError) -> State[Any]:
    """The state of a task that a user's mistake ended; Prefect logs it with its sentence."""
    _is_news(error)
    return Failed(message=str(error), data=error)


def _validator(run: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """What a function would be called with, by name and of its types; `UserError` about the first that is wrong."""
    signature = inspect.signature(run, eval_str=True)

    def given(**arguments: Any) -> dict[str, Any]:
        return arguments

    given.__signature__ = signature  # type: ignore[attr-defined]
    given.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    checked = validate_call(given)

    def validated(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return checked(**signature.bind(*args, **kwargs).arguments)
        except ValidationError as error:
            raise UserError(explain(error)) from None

    return validated


def _is_news(error: BaseException) -> bool:
    """Whether an error is told of for the first time."""
    told: bool = vars(error).get("_told", False)
    vars(error)["_told"] = True
    return not told


class _OneTraceback(logging.Filter):
    """Lets the first traceback of each error through, and nothing of a user's mistake, whose sentence is told already.

    What else a record of a known error says stays. One that only repeats the error goes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError):
            return False
        if error is None or _is_news(error):
            return True
        record.exc_info = None
        return not any(told in record.getMessage() for told in (repr(error), str(error)) if told)


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_OneTraceback())
