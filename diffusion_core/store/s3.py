"""The store on an S3 service."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from diffusion_core.store.files import explained, new_file
from diffusion_core.store.place import Entry, Names
from diffusion_core.store.s3_check import check_reachable
from diffusion_core.store.s3_client import Absent, Taken, client, request

if TYPE_CHECKING:
    from pyarrow import NativeFile

T = TypeVar("T")

PART_BYTES = 64 << 20  # larger files go up in parts; 10,000 parts of this size are 640 GB


class S3Place(NamedTuple):
    """The operations of `Place` on a prefix of a bucket. `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, uri: str) -> S3Place:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return cls(bucket, prefix + "/" if prefix else "")

    def read(self, key: str) -> bytes:
        def fetch() -> bytes:
            body: bytes = client().get_object(**self._object(key))["Body"].read()
            return body

        return self._present(key, fetch)

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        try:
            return int(self._request(lambda: client().head_object(**self._object(key)))["ContentLength"])
        except Absent:
            return None

    def write(self, key: str, data: bytes) -> None:
        self._put(key, io.BytesIO(data), len(data), {})

    def create(self, key: str, content: bytes | Path) -> bool:
        condition = {"IfNoneMatch": "*"}
        if isinstance(content, bytes):
            return self._put(key, io.BytesIO(content), len(content), condition)
        with open(content, "rb") as file:
            return self._put(key, file, os.fstat(file.fileno()).st_size, condition)

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
            body: bytes = client().get_object(**self._object(key), Range=span)["Body"].read()
            return body

        return self._present(key, fetch)

    def download(self, key: str, path: Path) -> None:
        with explained(path), new_file(path, b"") as temporary:

            def fetch() -> None:
                body = client().get_object(**self._object(key))["Body"]
                with open(temporary, "wb") as file:
                    for chunk in body.iter_chunks(1 << 20):
                        file.write(chunk)

            self._present(key, fetch)
            os.replace(temporary, path)

    def delete(self, key: str) -> None:
        try:
            self._request(lambda: client().delete_object(**self._object(key)))
        except Absent:
            return

    def delete_tree(self) -> None:
        # One request an object: the bulk request needs a checksum that not every S3 service understands.
        with ThreadPoolExecutor(8) as pool:
            for page in self._pages(Prefix=self.prefix):
                keys = [item["Key"].removeprefix(self.prefix) for item in page.get("Contents", [])]
                list(pool.map(self.delete, keys))

    def check(self, writable: bool) -> None:
        check_reachable(self._uri().rstrip("/"), self.bucket, self.prefix, writable)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _uri(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def _present(self, key: str, fetch: Callable[[], T]) -> T:
        try:
            return self._request(fetch)
        except Absent:
            raise FileNotFoundError(self._uri(key)) from None

    def _pages(self, **options: str) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._request(lambda: client().list_objects_v2(Bucket=self.bucket, **options, **token))  # noqa: B023
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
            client().put_object(**self._object(key), Body=data, **condition)
            return True

        try:
            return self._request(put)
        except Taken:
            return attempts > 1 and self.read(key) == data

    def _put_parts(self, key: str, content: BinaryIO, size: int, condition: dict[str, str]) -> bool:
        mark = uuid.uuid4().hex
        upload = self._request(
            lambda: client().create_multipart_upload(**self._object(key), Metadata={"upload": mark})
        )["UploadId"]
        attempts = 0

        def complete() -> bool:
            nonlocal attempts
            attempts += 1
            client().complete_multipart_upload(
                **self._object(key), UploadId=upload, MultipartUpload={"Parts": parts}, **condition
            )
            return True

        try:
            numbers = range(1, -(-size // PART_BYTES) + 1)
            parts = [self._put_part(key, upload, number, content.read(PART_BYTES)) for number in numbers]
            return self._request(complete)
        except BaseException as error:
            if attempts > 1 and isinstance(error, (Taken, Absent)) and self._upload_mark(key) == mark:
                return True
            self._abort(key, upload)
            if isinstance(error, Taken):
                return False
            raise

    def _put_part(self, key: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
        answer = self._request(
            lambda: client().upload_part(**self._object(key), UploadId=upload, PartNumber=number, Body=data)
        )
        tag = answer["ETag"].strip('"')
        if len(tag) == 32 and "ServerSideEncryption" not in answer and tag != hashlib.md5(data).hexdigest():
            raise OSError(f"Part {number} of {self._uri(key)} arrived damaged at the store.")
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _upload_mark(self, key: str) -> str | None:
        """The mark of the upload that made the object which is there now."""
        try:
            answer = self._request(lambda: client().head_object(**self._object(key)))
        except Absent:
            return None
        mark: str | None = answer["Metadata"].get("upload")
        return mark

    def _abort(self, key: str, upload: str) -> None:
        try:
            client().abort_multipart_upload(**self._object(key), UploadId=upload)
        except (BotoCoreError, ClientError):
            return  # an upload that nobody completes is not an object; the bucket's life-cycle rule removes it

    def _request(self, send: Callable[[], T]) -> T:
        return request(self._uri(), send)


class _Object(io.RawIOBase):
    """An object of known size that is read piece by piece, each by a request that is repeated like every other."""

    def __init__(self, place: S3Place, key: str, size: int) -> None:
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
