"""The class of an image, as a function of its image id."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_core.config import UserError, digest
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.store import Directory


@dataclass(frozen=True)
class Labels:
    """Which class each image id has. `values` None: id modulo `num_classes`; else entry (id modulo length).

    `num_classes` 0 is an unconditional model: there are no labels.
    """

    num_classes: int
    values: np.ndarray | None = None

    def of(self, image_ids: np.ndarray) -> np.ndarray | None:
        """Classes (N,) int64 in [0, num_classes) of image ids (N,) int64; None for an unconditional model."""
        if self.num_classes == 0:
            return None
        ids = np.asarray(image_ids, dtype=np.int64)
        return ids % self.num_classes if self.values is None else self.values[ids % len(self.values)].astype(np.int64)

    def identity(self) -> str:
        """What the labels contribute to the id of the image set: their content, wherever it was read from."""
        if self.num_classes == 0:
            return "none"
        return "balanced" if self.values is None else f"listed-{digest(self.values.tolist())}"


def resolve_labels(config: GenerationConfig, class_names: Sequence[str]) -> Labels:
    """The labels that a configuration asks of a model with these classes.

    Raises:
        UserError: a class that the model does not have, a label file that cannot be read, or listed labels for a model
            without classes.
    """
    if config.labels == "balanced":
        return Labels(len(class_names))
    if not class_names:
        raise UserError("generation.labels: this model has no classes, so 'balanced' (no labels) is all it accepts.")
    listed = _read_file(config.labels, config.label_column) if isinstance(config.labels, str) else config.labels
    numbers = {name: number for number, name in enumerate(class_names)}
    known: dict[Any, int] = {}
    for entry in listed:
        if entry not in known:
            known[entry] = _class_number(entry, numbers)
    return Labels(len(class_names), np.array([known[entry] for entry in listed], dtype=np.int32))


def _class_number(entry: int | str, numbers: dict[str, int]) -> int:
    if isinstance(entry, str) and entry in numbers:
        return numbers[entry]
    text = str(entry)
    if text.isdecimal() and int(text) < len(numbers):
        return int(text)
    names = list(numbers)
    shown = ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    raise UserError(
        f"generation.labels: there is no class {entry!r}; accepted are {shown}, or a number from 0 to {len(names) - 1}."
    )


def _read_file(uri: str, column: str) -> list[int | str]:
    parent, _, name = uri.rpartition("/")
    place = Directory(parent or ("/" if uri.startswith("/") else "."))
    try:
        data = place.read(name)
        entries = list(_entries(name.lower(), data, column))
    except FileNotFoundError as error:
        raise UserError(f"generation.labels: the label file {uri} does not exist.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"generation.labels: the label file {uri} cannot be read: {error}") from error
    except KeyError as error:
        raise UserError(
            f"generation.labels: the label file {uri} has no column {column!r} (generation.label_column) in every row."
        ) from error
    if not entries:
        raise UserError(f"generation.labels: the label file {uri} is empty.")
    for row, entry in enumerate(entries):
        if isinstance(entry, bool) or not isinstance(entry, int | str) or entry == "":
            raise UserError(f"generation.labels: entry {row} of {uri} is {entry!r}, not a class name or number.")
    return entries


def _entries(name: str, data: bytes, column: str) -> Iterable[Any]:
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = pq.ParquetFile(pa.BufferReader(data))
        if column not in file.schema_arrow.names:
            raise KeyError(column)
        return file.read(columns=[column])[column].to_pylist()
    text = data.decode("utf-8-sig")
    if name.endswith(".csv"):
        return [row[column] for row in csv.DictReader(io.StringIO(text))]
    if name.endswith(".jsonl"):
        return [json.loads(line)[column] for line in text.splitlines() if line.strip()]
    return [line.strip() for line in text.splitlines() if line.strip()]
