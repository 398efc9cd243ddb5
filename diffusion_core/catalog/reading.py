"""Many small reads of a store at once: the time goes to its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from diffusion_core.store import Directory

_REQUESTS_AT_ONCE = 16

T = TypeVar("T")
R = TypeVar("R")


def parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of every item, in order, several at once."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, items))


def read_record(place: Directory, key: str) -> dict[str, Any] | None:
    """What a JSON file holds; None if there is none."""
    try:
        return dict(place.read_json(key))
    except FileNotFoundError:
        return None
