"""The S3 half of `diffusion_core.storage`. Nothing else imports this module, but for `storage_s3_check`.

Every request is repeated for minutes while it fails for a passing reason, here and not inside botocore: a conditional
write whose answer was lost looks, at its second attempt, as if another writer had won, and only this module can tell
the two apart. What outlasts the patience is a `StoreUnavailable`; what is refused for good is a `UserError`.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TypeVar

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
from diffusion_core.patience import StoreUnavailable, patience_s
from diffusion_core.storage import Entry, Names, StoreFull
from diffusion_core.traffic import count_requests

if TYPE_CHECKING:
    from pyarrow import NativeFile

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TOLD_AT_ATTEMPT = 6  # after some seconds
PART_BYTES = 64 << 20  # larger files go up in parts; 10,000 parts of this size are 640 GB

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


class _Absent(Exception):
    """There is no object of this key."""


class S3Prefix(NamedTuple):
    """The operations of `Directory` on a prefix of a bucket. `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, uri: str) -> S3Prefix:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return cls(bucket, prefix + "/" if prefix else "")

    def read(self, key: str) -> bytes:
        def fetch() -> bytes:
            body: bytes = _client().get_object(**self._object(key))["Body"].read()
            return body

        return self._present(key, fetch)

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        try:
            return int(self._request(lambda: _client().head_object(**self._object(key)))["ContentLength"])
        except _Absent:
            return None

    def write(self, key: str, data: bytes) -> None:
        self._put(key, io.BytesIO(data), len(data), {})

    def create(self, key: str, data: bytes) -> bool:
        return self._put(key, io.BytesIO(data), len(data), {"IfNoneMatch": "*"})

    def create_file(self, key: str, path: Path) -> bool:
        with open(path, "rb") as file:
            return self._put(key, file, os.fstat(file.fileno()).st_size, {"IfNoneMatch": "*"})

    def list(self, prefix: str) -> Iterator[Entry]:
        for page in self._pages(Prefix=self.prefix + prefix):
            for item in page.get("Contents", []):
                key = item["Key"].removeprefix(self.prefix)
                if key and not key.endswith("/"):  # consoles mark an empty folder with an object named "folder/"
                    yield Entry(key, item["Size"], item["ETag"].strip('"'))

    def children(self) -> Names:
        pages = self._pages(Prefix=self.prefix, Delimiter="/")
        found = {item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])}
        return sorted(prefix.removeprefix(self.prefix).rstrip("/") for prefix in found)

    def open(self, key: str) -> NativeFile:
        import pyarrow

        size = self.size(key)
        if size is None:
            raise FileNotFoundError(self._uri(key))
        return pyarrow.PythonFile(_Object(self, key, size), "r")

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of an object, at least one."""

        def fetch() -> bytes:
            span = f"bytes={start}-{stop - 1}"
            body: bytes = _client().get_object(**self._object(key), Range=span)["Body"].read()
            return body

        return self._present(key, fetch)

    def download(self, key: str, path: Path) -> None:
        def fetch() -> None:
            body = _client().get_object(**self._object(key))["Body"]
            with open(path, "wb") as file:
                for chunk in body.iter_chunks(1 << 20):
                    file.write(chunk)

        self._present(key, fetch)

    def delete(self, key: str) -> None:
        try:
            self._request(lambda: _client().delete_object(**self._object(key)))
        except _Absent:
            return

    def delete_tree(self) -> None:
        # One request an object: the bulk request needs a checksum that not every S3 service understands.
        with ThreadPoolExecutor(8) as pool:
            for page in self._pages(Prefix=self.prefix):
                keys = [item["Key"].removeprefix(self.prefix) for item in page.get("Contents", [])]
                list(pool.map(self.delete, keys))

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _uri(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def _present(self, key: str, fetch: Callable[[], T]) -> T:
        try:
            return self._request(fetch)
        except _Absent:
            raise FileNotFoundError(self._uri(key)) from None

    def _pages(self, **options: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._request(lambda: _client().list_objects_v2(Bucket=self.bucket, **options, **token))  # noqa: B023
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _put(self, key: str, content: BinaryIO, size: int, condition: dict[str, str]) -> bool:
        """Store an object; False if the condition was not met, that is, if there was one already."""
        if condition and size > PART_BYTES and self.size(key) is not None:
            return False  # spares the upload of a large file; the condition below decides all the same
        store = self._put_parts if size > PART_BYTES else self._put_at_once
        return store(key, content, size, condition)

    def _put_at_once(self, key: str, content: BinaryIO, size: int, condition: dict[str, str]) -> bool:
        data = content.read()
        attempts = 0

        def put() -> bool:
            nonlocal attempts
            attempts += 1
            _client().put_object(**self._object(key), Body=data, **condition)
            return True

        try:
            return self._request(put)
        except _Taken:
            return attempts > 1 and self.read(key) == data

    def _put_parts(self, key: str, content: BinaryIO, size: int, condition: dict[str, str]) -> bool:
        mark = uuid.uuid4().hex
        upload = self._request(
            lambda: _client().create_multipart_upload(**self._object(key), Metadata={"upload": mark})
        )["UploadId"]
        attempts = 0

        def complete() -> bool:
            nonlocal attempts
            attempts += 1
            _client().complete_multipart_upload(
                **self._object(key), UploadId=upload, MultipartUpload={"Parts": parts}, **condition
            )
            return True

        try:
            numbers = range(1, -(-size // PART_BYTES) + 1)
            parts = [self._put_part(key, upload, number, content.read(PART_BYTES)) for number in numbers]
            return self._request(complete)
        except BaseException as error:
            if attempts > 1 and isinstance(error, (_Taken, _Absent)) and self._upload_mark(key) == mark:
                return True
            self._abort(key, upload)
            if isinstance(error, _Taken):
                return False
            raise

    def _put_part(self, key: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
        answer = self._request(
            lambda: _client().upload_part(**self._object(key), UploadId=upload, PartNumber=number, Body=data)
        )
        tag = answer["ETag"].strip('"')
        if len(tag) == 32 and "ServerSideEncryption" not in answer and tag != hashlib.md5(data).hexdigest():
            raise OSError(f"Part {number} of {self._uri(key)} arrived damaged at the store.")
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _upload_mark(self, key: str) -> str | None:
        """The mark of the upload that made the object which is there now."""
        try:
            answer = self._request(lambda: _client().head_object(**self._object(key)))
        except _Absent:
            return None
        mark: str | None = answer["Metadata"].get("upload")
        return mark

    def _abort(self, key: str, upload: str) -> None:
        try:
            _client().abort_multipart_upload(**self._object(key), UploadId=upload)
        except (BotoCoreError, ClientError):
            return  # an upload that nobody completes is not an object; the bucket's life-cycle rule removes it

    def _request(self, send: Callable[[], T]) -> T:
        """Send a request, again while it fails for a passing reason, and translate the error that remains."""
        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_before_delay(patience_s()),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(send)
        except (ClientError, BotoCoreError) as error:
            translate(self._uri(), error)

    def _tell(self, state: RetryCallState) -> None:
        if state.attempt_number == _TOLD_AT_ATTEMPT and state.outcome is not None:
            reason = _reason(state.outcome.exception())
            logger.warning("The store %s is away (%s); waiting for it up to %g s.", self._uri(), reason, patience_s())


class _Object(io.RawIOBase):
    """An object of known size that is read piece by piece, each by a request that is repeated like every other."""

    def __init__(self, place: S3Prefix, key: str, size: int) -> None:
        self._place, self._key, self._size, self._at = place, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if self._at >= stop:
            return b""
        data = self._place.read_range(self._key, self._at, stop)
        self._at += len(data)
        return data


class _Taken(Exception):
    """The condition of a write was not met: an object of this key exists."""


def translate(uri: str, error: Exception) -> NoReturn:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        raise UserError(
            f"The store {uri} cannot be used: there are no S3 credentials "
            "(set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use an instance role)."
        ) from error
    if isinstance(error, ClientError):
        code = error_code(error)
        if code in _ABSENT_CODES or code == "NoSuchUpload":
            raise _Absent from error
        if code in TAKEN_CODES:
            raise _Taken from error
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


def _client() -> Any:
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
    return count_requests(session.client("s3", region_name=session.region_name or "us-east-1", config=options))
