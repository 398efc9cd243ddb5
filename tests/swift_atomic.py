"""A filter for the proxy of the test service: of conditional writes to one object, one at a time.

Swift looks at `If-None-Match: *` when an upload begins and not when it ends, so that of eight writers at once several
can win (measured: in more than half of the races). S3 decides at the end: one wins. With this filter Swift does too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from eventlet.semaphore import Semaphore

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def filter_factory(_configuration: dict[str, str], **_options: str) -> Callable[[Application], Application]:
    return _one_at_a_time


def _one_at_a_time(application: Application) -> Application:
    turns: defaultdict[str, Semaphore] = defaultdict(Semaphore)

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] not in ("PUT", "POST"):
            return application(environ, start_response)
        with turns[environ["PATH_INFO"]]:
            answer = application(environ, start_response)
            try:
                return list(answer)  # an upload in parts is completed while its answer is being sent
            finally:
                close = getattr(answer, "close", None)
                if close is not None:
                    close()

    return serve
