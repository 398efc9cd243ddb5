"""Labels, captions and splits: where a source says them, and the numbers that they become."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from diffusion_core.config import UserError
from diffusion_core.data.config import SourceConfig
from diffusion_core.data.shards import SPLITS

USUAL_COLUMNS = {
    "label": ("label", "labels", "class"),
    "text": ("text", "caption", "prompt"),
    "split": ("split",),
}
UNKNOWN = -1  # label or split of an item that has none

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "t10k"),
}


def find_column(what: str, config: SourceConfig, key: str, columns: Collection[str]) -> str | None:
    """The column of a table that holds `what` (label, text or split), None if none does.

    Args:
        key: of the table's file; columns: their names.

    Raises:
        UserError: the configuration names a column, and the table does not have it.
    """
    named: str | None = getattr(config, f"{what}_column")
    if named and named not in columns:
        raise UserError(f"source.{what}_column: {named} is not in {key}; its columns are {', '.join(columns)}.")
    return named or next((name for name in USUAL_COLUMNS[what] if name in columns), None)


def split_named(word: str) -> str | None:
    """The split that a folder or a column's value names, or None."""
    return next((split for split, words in _SPLIT_WORDS.items() if word.lower() in words), None)


def split_in(key: str) -> str | None:
    """The split that a file's name, or else one of its folders, contains as a word: `train-00000.parquet`, `test/0`."""
    words = (word for part in reversed(key.split("/")) for word in re.split(r"[^a-z0-9]+", part.lower()))
    return next((split for word in words if (split := split_named(word))), None)


def class_numbers(
    distinct: Sequence[Any], config: SourceConfig, declared: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """The different labels of a source → the class number of each, int32, -1 for "no label"; and the class names.

    Numbers that index declared names (`class_names`, or a Hugging Face ClassLabel) stay as they are; text may be such a
    name, or else such a number. Otherwise the different values, sorted (as numbers if all of them are), become the
    classes 0, 1, 2, ...; so a gap in the numbers leaves no empty class. None, "", negative numbers and NaN say that
    there is no label.

    Raises:
        UserError: a label that is neither text nor a whole number, or outside the declared classes.
    """
    texts = [None if _is_no_label(value) else _checked(value) for value in distinct]
    present = sorted({text for text in texts if text is not None}, key=_in_order)
    names = list(config.class_names or declared or ())
    if not names:
        names, number = present, {text: i for i, text in enumerate(present)}
    elif set(present) <= set(names) and any(value and isinstance(value, str) for value in distinct):
        number = {name: i for i, name in enumerate(names)}
    elif all(re.fullmatch(r"\d+", text) for text in present):
        if present and int(present[-1]) >= len(names):
            raise UserError(f"The label {present[-1]} is outside the {len(names)} class names, 0 to {len(names) - 1}.")
        number = {text: int(text) for text in present}
    else:
        stray = next(text for text in present if text not in names)
        raise UserError(f"The label {stray!r} is not among the class names {', '.join(names[:10])}.")
    return np.array([UNKNOWN if text is None else number[text] for text in texts], np.int32), names


def distinct_values(values: Sequence[Any] | np.ndarray) -> tuple[list[Any], np.ndarray]:
    """The different values and, (N,) int64, which of them each value is."""
    if isinstance(values, np.ndarray):
        unique, inverse = np.unique(values, return_inverse=True)
        return unique.tolist(), inverse
    if (odd := next((value for value in values if isinstance(value, (list, dict))), None)) is not None:
        _checked(odd)
    numbers: dict[Any, int] = {}
    inverse = np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values))
    return list(numbers), inverse


def split_numbers(names: Sequence[str | None]) -> np.ndarray:
    """(N,) int8 index into SPLITS, -1 for None."""
    return np.array([UNKNOWN if name is None else SPLITS.index(name) for name in names], np.int8)


def label_gaps(
    labels: np.ndarray | None, alive: np.ndarray, key: Callable[[int], str]
) -> tuple[np.ndarray | None, np.ndarray, list[tuple[str, str]]]:
    """If some items have labels, those without are rejected: (labels or None, remaining items, rejected).

    Args:
        alive: (M,) int64 item numbers; key: where an item comes from.
    """
    if labels is None or not len(alive) or (labels[alive] == UNKNOWN).all():
        return None, alive, []
    gaps = alive[labels[alive] == UNKNOWN]
    rejected = [(key(int(item)), "no label, and other images have one") for item in gaps]
    return labels, alive[labels[alive] != UNKNOWN], rejected


def _is_no_label(value: Any) -> bool:
    if value is None or value == "":
        return True
    return isinstance(value, (int, float)) and (value < 0 or value != value)


def _checked(value: Any) -> str:
    """A label as text; `UserError` if it is neither text nor a whole number."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole and not isinstance(value, str):
        raise UserError(f"The label {value!r} is not accepted: labels are text or whole numbers.")
    return value if isinstance(value, str) else str(int(value))


def _in_order(value: str) -> tuple[int, int, str]:
    return (0, int(value), value) if re.fullmatch(r"\d+", value) else (1, 0, value)
