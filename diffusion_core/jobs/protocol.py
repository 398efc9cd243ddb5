"""A job is a program: it reads a typed request, writes `result.json` beside it, and exits 0 or says why not.

The same entry serves every backend: `python -m diffusion_core.stages <stage> <request URI>`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError

from diffusion_core.config import UserError, explain
from diffusion_core.jobs import context, lines
from diffusion_core.jobs.account import open_account
from diffusion_core.jobs.request import Request, Result
from diffusion_core.jobs.running import end_without_waiter
from diffusion_core.store import Directory, StoreFull, layout
from diffusion_core.store.patience import EXIT_STORE_AWAY, StoreUnavailable

RequestT = TypeVar("RequestT", bound=Request)

EXIT_USER_ERROR = 2
RESULT, ERROR = layout.RESULT, layout.ERROR
_SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    128 + signal.SIGTERM: signal.SIGTERM,
    128 + signal.SIGINT: signal.SIGINT,
}  # by what a job leaves with after a signal


def main(stage: str, request_type: type[RequestT], run: Callable[[RequestT], Result], request_uri: str) -> int:
    """Run one job: of the request at this URI, which may be a path.

    Exit status: 0, 2 if the user can mend it, 75 if the store was away for too long, 130 after SIGINT, 143 after
    SIGTERM, each with one sentence; a defect ends in its traceback.
    """
    parent, _, name = request_uri.rpartition("/")
    place = Directory(parent or ".")
    context.begin(stage, place)
    try:
        lines.configure()
    except UserError as error:
        print(f"{stage}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray's own handler, which replaces it
    try:
        end_without_waiter(place)
        return _attempt(stage, place, name, request_type, run)
    except StoreUnavailable as error:
        print(f"{stage}: {error}", file=sys.stderr)
        return EXIT_STORE_AWAY
    except KeyboardInterrupt:
        return _stopped(stage, signal.SIGINT)
    except SystemExit as leaving:
        if leaving.code not in _SIGNALS:
            raise
        return _stopped(stage, _SIGNALS[leaving.code])


def _attempt(
    stage: str, place: Directory, name: str, request_type: type[RequestT], run: Callable[[RequestT], Result]
) -> int:
    keeper = open_account()
    try:
        result = run(_read_request(place, name, request_type))
    except UserError as error:
        print(f"{stage}: {error}", file=sys.stderr)
        with suppress(StoreFull):  # which may be the error itself; who waits for the job finds it in the log
            place.write_json(ERROR, {"error": str(error)})
        return EXIT_USER_ERROR
    result = result.model_copy(update={"job": place.uri, "account": keeper.account()})
    place.write_json(RESULT, result.model_dump(mode="json"))
    return 0


def _stopped(stage: str, number: signal.Signals) -> int:
    print(f"{stage}: stopped by {number.name}; the same request continues the work.", file=sys.stderr)
    return 128 + number


def _read_request(place: Directory, name: str, request_type: type[RequestT]) -> RequestT:
    try:
        return request_type.model_validate_json(place.read(name))
    except FileNotFoundError:
        raise UserError(f"There is no request at {place.uri}/{name}.") from None
    except ValidationError as error:
        raise UserError(explain(error)) from None
