"""Telling MLflow something without waiting for it: whoever posts a message goes on, and a thread delivers it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from diffusion_core.config import UserError
from diffusion_core.tracking.connection import Unreachable, without_secrets

_log = logging.getLogger(__name__)

_LONGEST_PAUSE_S, _HURRIED_PAUSE_S = 30.0, 1.0
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


@dataclass(frozen=True)
class Figures:
    """Figures of one step, and when they were taken (Unix milliseconds)."""

    images_seen: int
    time_ms: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Message:
    """What is told: its name for people, the call that tells it, and the figures if it holds some."""

    what: str
    send: Callable[[], None]
    figures: Figures | None = None


class Outbox:
    """Messages in their order, each tried until MLflow takes it or refuses it for good; a refusal is a warning.

    A thread works as long as there is something to deliver. It is a daemon: a process that ends does not wait for it.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self._works = self._hurries = False

    def post(self, message: Message) -> None:
        with self._changed:
            self._messages.append(message)
            if not self._works:
                self._works = True
                threading.Thread(target=self._deliver, name="mlflow", daemon=True).start()

    def pending(self) -> list[Message]:
        """What is not delivered yet."""
        with self._changed:
            return list(self._messages)

    def settle(self, seconds: float) -> list[Message]:
        """Wait until everything is delivered, for so long at most; returns what is not."""
        with self._changed:
            self._hurries = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._messages, seconds)
            self._hurries = False
            return list(self._messages)

    def _deliver(self) -> None:
        patient = Retrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential(max=_LONGEST_PAUSE_S),
            sleep=self._pause,
            before_sleep=self._say_once,
            reraise=True,
        )
        while (message := self._first()) is not None:
            try:
                patient(message.send)
            except Exception as error:  # the record must never end what it records
                _log.warning("MLflow refuses %s: %s", message.what, without_secrets(error))
            with self._changed:
                self._messages.popleft()
                self._changed.notify_all()

    def _first(self) -> Message | None:
        with self._changed:
            self._works = bool(self._messages)
            return self._messages[0] if self._messages else None

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait(min(seconds, _HURRIED_PAUSE_S) if self._hurries else seconds)

    def _say_once(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = without_secrets(state.outcome.exception())
            _log.warning("MLflow does not take %s now, it is kept for later: %s", self._messages[0].what, reason)


def _may_pass(error: BaseException) -> bool:
    """False if trying again cannot help."""
    if isinstance(error, UserError):
        return isinstance(error, Unreachable)
    return getattr(error, "error_code", None) not in _REFUSALS
