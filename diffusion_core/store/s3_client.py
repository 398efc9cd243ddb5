"""Requests to an S3 service: the client of this process, what is repeated, and what an error means.

Every request is repeated for minutes while it fails for a passing reason, here and not inside botocore: a conditional
write whose answer was lost looks, at its second attempt, as if another writer had won, and only the store can tell
the two apart. What outlasts the patience is a `StoreUnavailable`; what is refused for good is a `UserError`.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from diffusion_core.config import UserError
from diffusion_core.store.patience import StoreUnavailable, patience_s
from diffusion_core.store.place import StoreFull

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TOLD_AT_ATTEMPT = 6  # after some seconds

_TRANSIENT_CODES = {
    "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequestsException", "ConditionalRequestConflict", "RequestTimeTooSkewed",
}  # fmt: skip
_ABSENT_CODES = {"404", "NoSuchKey", "NotFound"}
TAKEN_CODES = {"412", "PreconditionFailed"}
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull"}
_SENTENCES = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied for these credentials",
    "403": "access is denied for these credentials",
    "InvalidAccessKeyId": "the access key is unknown (check AWS_ACCESS_KEY_ID)",
    "SignatureDoesNotMatch": "the secret key is wrong (check AWS_SECRET_ACCESS_KEY)",
    "ExpiredToken": "the session token has expired (renew AWS_SESSION_TOKEN)",
    "InvalidToken": "the session token is not valid (check AWS_SESSION_TOKEN)",
    "PermanentRedirect": "the bucket is in another region (set AWS_DEFAULT_REGION)",
    "AuthorizationHeaderMalformed": "the bucket is in another region (set AWS_DEFAULT_REGION)",
    "QuotaExceeded": "the quota of the bucket is used up",
    "XMinioStorageFull": "its disks are full",
}


class Absent(Exception):
    """There is no object of this key."""


class Taken(Exception):
    """The condition of a write was not met: an object of this key exists."""


def request(uri: str, send: Callable[[], T]) -> T:
    """Send a request, again while it fails for a passing reason, and translate the error that remains.

    Raises:
        Absent: there is no object of this key.
        Taken: the condition of a write was not met.
        StoreUnavailable: the service was away for longer than the patience.
        UserError: the service refused the request for good; `StoreFull` if it takes no more.
    """

    def tell(state: RetryCallState) -> None:
        if state.attempt_number == _TOLD_AT_ATTEMPT and state.outcome is not None:
            reason = _reason(state.outcome.exception())
            logger.warning("The store %s is away (%s); waiting for it up to %g s.", uri, reason, patience_s())

    retrying = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_before_delay(patience_s()),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(send)
    except (ClientError, BotoCoreError) as error:
        translate(uri, error)


def translate(uri: str, error: Exception) -> NoReturn:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        raise UserError(
            f"The store {uri} cannot be used: there are no S3 credentials "
            "(set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use an instance role)."
        ) from error
    if isinstance(error, ClientError):
        code = error_code(error)
        if code in _ABSENT_CODES or code == "NoSuchUpload":
            raise Absent from error
        if code in TAKEN_CODES:
            raise Taken from error
        if not _is_transient(error):
            kind = StoreFull if code in _FULL_CODES else UserError
            raise kind(f"The store {uri} cannot be used: {_SENTENCES.get(code) or _reason(error)}.") from error
    if _is_transient(error):
        raise StoreUnavailable(f"The store {uri} cannot be reached: {_reason(error)}.") from error
    raise UserError(f"The store {uri} cannot be reached: {_reason(error)}.") from error


def _reason(error: BaseException | None) -> str:
    """What the service answered, or that it did not, with its endpoint."""
    if isinstance(error, ClientError):
        message = error.response.get("Error", {}).get("Message")
        return f"{endpoint()} answered {error_code(error)}: {message}".rstrip(".")
    text = lower(str(error)).rstrip(".")
    return text if endpoint() in text else f"{text} ({endpoint()})"


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in _TRANSIENT_CODES or status == 429 or (status >= 500 and status not in (501, 507))
    return isinstance(error, (HTTPClientError, ConnectionError, IncompleteReadError, ResponseStreamingError))


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the S3 service of AWS"


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


_building = threading.Lock()


def client() -> Any:
    """This process's client for the present environment: a forked child or changed credentials get their own."""
    with _building:
        return _cached_client(os.getpid(), _environment())


@lru_cache(maxsize=4)
def _cached_client(_pid: int, _variables: tuple[tuple[str, str], ...]) -> Any:
    return new_client(connect_timeout=10, read_timeout=60)


def new_client(connect_timeout: float, read_timeout: float) -> Any:
    import boto3.session
    from botocore.config import Config

    session = boto3.session.Session()
    options = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # not every S3 service understands the newer checksums
        response_checksum_validation="when_required",
    )
    return session.client("s3", region_name=session.region_name or "us-east-1", config=options)
