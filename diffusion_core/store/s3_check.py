"""Whether an S3 store can be used. A service that is not there, or is silent, is told within three seconds."""

from __future__ import annotations

import threading
import uuid
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from diffusion_core.config import UserError
from diffusion_core.store.patience import StoreUnavailable
from diffusion_core.store.s3_client import TAKEN_CODES, endpoint, error_code, lower, new_client, translate

ANSWER_SECONDS = 2.0  # for each request
CHECK_SECONDS = 10.0  # for all of them: a busy service answers late, but answers


def check_reachable(uri: str, bucket: str, prefix: str, writable: bool) -> None:
    """`UserError` if the store cannot be used. In a thread, because the look-up of a host's name knows no time-out."""
    outcome: list[BaseException | None] = []

    def check() -> None:
        try:
            client = new_client(connect_timeout=ANSWER_SECONDS, read_timeout=ANSWER_SECONDS)
            client.list_objects_v2(Bucket=bucket, MaxKeys=1)
            if writable:
                probe = {"Bucket": bucket, "Key": f"{prefix}.reachable-{uuid.uuid4().hex}"}
                _check_writes(client, uri, probe)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    if not outcome:
        raise UserError(
            f"The store {uri} cannot be reached: {endpoint()} gave no answer in {CHECK_SECONDS:.0f} seconds."
        )
    error = outcome[0]
    if isinstance(error, (ClientError, BotoCoreError)):
        try:
            translate(uri, error)
        except StoreUnavailable as away:  # before anything has begun, an address that is wrong is likelier
            raise UserError(str(away)) from error
    if isinstance(error, ValueError):  # botocore's word for an endpoint that is not a URL
        raise UserError(f"The store {uri} cannot be reached: {lower(str(error))}.") from error
    if error is not None:
        raise error


def _check_writes(client: Any, uri: str, probe: dict[str, str]) -> None:
    """Write an object, and make sure that the service refuses to create it again: all commits rest on that."""
    client.put_object(**probe, Body=b"")
    try:
        client.put_object(**probe, Body=b"", IfNoneMatch="*")
    except ClientError as error:
        if error_code(error) in TAKEN_CODES:
            return
        if error_code(error) != "NotImplemented":
            raise
    finally:
        client.delete_object(**probe)
    raise UserError(f"The store {uri} cannot be used: {endpoint()} has no conditional writes (If-None-Match).")
