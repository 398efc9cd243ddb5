"""The lines that a job prints: plain ones, or a JSON object each with DIFFUSION_LOG_FORMAT=json.

A JSON line has time, level, logger, message, stage, job_id and the ids that are known. Whatever is printed becomes one,
lines of libraries and of Ray's workers included. Who follows a job reads `plain(line)`, and so sees the same in both.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from diffusion_core.config import UserError
from diffusion_core.jobs import context
from diffusion_core.progress import MARK, parse_progress

FORMAT = "DIFFUSION_LOG_FORMAT"
_TEXT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
_PRINTED = ("stdout", "stderr")


def configure() -> None:
    """Have this process print as the environment asks.

    Raises:
        UserError: DIFFUSION_LOG_FORMAT is neither json nor text.
    """
    chosen = os.environ.get(FORMAT, "text")
    if chosen == "text":
        logging.basicConfig(level=logging.INFO, format=_TEXT)
    elif chosen == "json":
        logging.basicConfig(level=logging.INFO, handlers=[_Handler()])
        sys.excepthook = _log_uncaught
        sys.stdout, sys.stderr = _Printed("stdout", "INFO", sys.stdout), _Printed("stderr", "ERROR", sys.stderr)
    else:
        raise UserError(f"{FORMAT}: {chosen!r} is not accepted: json or text.")


def plain(line: str) -> str:
    """A line as it would be without JSON; of a failure, several lines."""
    if not line.startswith('{"time":'):
        return line
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return line
    if "progress" in record:
        return MARK + json.dumps(record["progress"])
    text = "\n".join(filter(None, (record["message"], record.get("exception"))))
    if record["logger"] in _PRINTED:
        return text
    return f"{record['time']} {record['logger']} {record['level']}: {text}"


def _line(time_s: float, level: str, logger: str, message: str, **more: Any) -> str:
    job = context.current()
    time = datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")
    said = {"time": time, "level": level, "logger": logger, "message": message}
    return json.dumps({**said, "stage": job.stage, "job_id": job.job_id, **job.ids, **more}, ensure_ascii=False)


class _Handler(logging.Handler):
    """Writes each record as a JSON line to the standard error that was there at first."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        more = {}
        if record.exc_info and record.exc_info[1]:
            more["exception"] = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
        try:
            line = _line(record.created, record.levelname, record.name, record.getMessage(), **more)
            self._stream.write(line + "\n")
            self._stream.flush()
        except Exception:
            self.handleError(record)


class _Printed(io.TextIOBase):
    """What is printed to a stream, as JSON lines."""

    def __init__(self, name: str, level: str, stream: TextIO) -> None:
        self._name, self._level, self._stream = name, level, stream
        self._rest, self._lock = "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *whole, self._rest = (self._rest + text).split("\n")
            for line in whole:
                self._print(line)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _print(self, line: str) -> None:
        if not line.strip():
            return
        now, event = datetime.now(UTC).timestamp(), parse_progress(line)
        if event is None:
            shown = _line(now, self._level, self._name, line)
        else:
            shown = _line(now, "INFO", "progress", event.sentence(), progress=json.loads(event.line()[len(MARK) :]))
        self._stream.write(shown + "\n")
        self._stream.flush()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("The job broke: %s", error or kind.__name__, exc_info=(kind, error, trace))
