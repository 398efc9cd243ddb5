"""A filter for the proxy of the test service: while a certain file exists, the bucket takes no more objects.

Swift's own quotas answer with a code of Swift; this is what S3 services with quotas answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
ANSWER = b"<Error><Code>QuotaExceeded</Code><Message>The quota is used up.</Message></Error>"


def filter_factory(
    _configuration: dict[str, str], marker: str, **_options: str
) -> Callable[[Application], Application]:
    def full(application: Application) -> Application:
        def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] != "PUT" or not os.path.exists(marker):
                return application(environ, start_response)
            start_response("403 Forbidden", [("Content-Length", str(len(ANSWER)))])
            return [ANSWER]

        return serve

    return full
