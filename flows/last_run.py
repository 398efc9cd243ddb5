"""What a pipeline changed: since when its outcome is what it is, and what differs from the last run of its name.

An outcome (dataset version, bundle, figures, model version) is noted in `<store>/outcomes/<name>/<digest>.json` when a
pipeline comes to it for the first time, and what the last run had and came to in `last.json` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic import AwareDatetime, BaseModel, ValidationError

from diffusion_core.config import UserError, digest
from diffusion_core.stages.base import Rows
from diffusion_core.stages.config import PipelineConfig
from diffusion_core.stages.evaluate import amount
from diffusion_core.stages.pipeline import PipelineResult
from diffusion_core.store import Directory, layout
from flows.events import clean

_SCHEMA_VERSION = 1


class LastRun(BaseModel):
    """What stands in `last.json`. Things are named by their ids, so that a store may be moved."""

    schema_version: int = _SCHEMA_VERSION
    ended: AwareDatetime
    dataset: str
    """Name and version."""
    evaluation: str
    model: str
    run: str | None = None
    """Its key in the store: this note is about it."""
    loss: float | None = None
    config: dict[str, Any] | None = None
    """None of a run of before it was noted."""


def news(result: PipelineResult) -> str:
    """One sentence: what was done, or that nothing changed since this very outcome was reached."""
    outcome = {
        "dataset": result.dataset.uri,
        "bundle": result.run.bundle_uri,
        "evaluation": result.evaluation.uri,
        "model": result.version.reference,
    }
    store, key = Directory(result.store), layout.outcome(result.name, digest(outcome))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    if store.create_json(key, {"schema_version": 1, "ended": now, **outcome}):
        done = [name for name, stage in result.stages.items() if not stage.reused]
        return f"Done: {', '.join(done) or 'nothing, all of it was found done'}."
    since = _shown(datetime.fromisoformat(store.read_json(key)["ended"]))
    images = f"{result.images.generated:,} new images" if result.images.generated else "no new images"
    return f"Nothing changed since {since}; {images}."


def changes(result: PipelineResult, config: PipelineConfig) -> dict[str, str]:
    """What differs from the last run of this name, by what it is; empty if nothing does. Notes this run as the last."""
    store, key = Directory(result.store), layout.last_run(result.name)
    before, now = _last(store, result.name), _of(result, config)
    found: Rows = []
    if before is not None:
        found = _data(before, now, store) + _configuration(before, config) + _figures(before, now, result, store)
    store.write_json(key, now.model_dump(mode="json"))
    return {"last run": _shown(before.ended), **dict(found)} if before and found else {}


def _of(result: PipelineResult, config: PipelineConfig) -> LastRun:
    return LastRun(
        ended=datetime.now(UTC),
        dataset=_dataset(result.dataset.uri),
        evaluation=_evaluation(result.evaluation.uri),
        model=result.version.reference,
        run=layout.run(result.run.run_id),
        loss=result.run.loss,
        config=clean(config.model_dump(mode="json")),
    )


def _last(store: Directory, name: str) -> LastRun | None:
    """The last run; of a store of before it was noted, the run that came last to an outcome of its own."""
    key = layout.last_run(name)
    if store.exists(key):
        record = store.read_json(key)
        return LastRun.model_validate(record) if record["schema_version"] <= _SCHEMA_VERSION else None
    outcomes = store / layout.outcomes(name)
    records = [outcomes.read_json(entry.key) for entry in outcomes.list()]
    found = max(records, key=lambda record: str(record["ended"]), default=None)
    return found and LastRun(
        ended=found["ended"],
        dataset=_dataset(found["dataset"]),
        evaluation=_evaluation(found["evaluation"]),
        model=found["model"],
    )


def _dataset(uri: str) -> str:
    return "/".join(uri.split("/")[-2:])


def _evaluation(uri: str) -> str:
    return uri.split("/")[-2]


def _data(before: LastRun, now: LastRun, store: Directory) -> Rows:
    """The versions, and how many images were added and removed as far as that is known."""
    if before.dataset == now.dataset:
        return []
    from diffusion_core.catalog.difference import dataset_difference
    from diffusion_core.data.shards import open_dataset

    said = [f"{before.dataset} → {now.dataset}"]
    try:
        old, new = (open_dataset(store / f"{layout.DATASETS}/{run.dataset}") for run in (before, now))
        said += [
            f"{split} {old.num_rows(split):,} → {new.num_rows(split):,}"
            for split in sorted({*old.splits, *new.splits})
            if old.num_rows(split) != new.num_rows(split)
        ]
        if found := dataset_difference(old, new):
            said.append(f"{found.added:,} images added, {found.removed:,} removed, {found.changed:,} changed")
    except UserError:  # it was pruned meanwhile
        said.append("the old one is gone")
    return [("dataset", "; ".join(said))]


def _configuration(before: LastRun, config: PipelineConfig) -> Rows:
    """`training.images: 96000 → 192000`, a row a field that differs."""
    if before.config is None:
        return []
    try:  # with the defaults of fields that there were not
        old = PipelineConfig.model_validate({**before.config, "store": config.store})
    except ValidationError:
        return [("configuration", "that of the last run is not accepted any more, so it cannot be compared")]
    was, now = (dict(_flattened(clean(each.model_dump(mode="json")))) for each in (old, config))
    paths = [path for path in {**was, **now} if was.get(path) != now.get(path)]
    return [(path, f"{_value(was.get(path))} → {_value(now.get(path))}") for path in paths]


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _value(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)


def _figures(before: LastRun, now: LastRun, result: PipelineResult, store: Directory) -> Rows:
    """Loss, figures with their errors, and the model version, as far as they differ."""
    rows = []
    if before.loss is not None and before.loss != now.loss:
        rows.append(("loss", f"{before.loss:.5f} → {result.run.loss:.5f}"))
    if before.evaluation != now.evaluation:
        try:
            old = store.read_json(f"{layout.evaluation(before.evaluation)}/{layout.EVALUATION}")["figures"]
        except FileNotFoundError:  # it was pruned meanwhile
            old = {}
        new = result.evaluation.figures
        rows += [
            (name, f"{amount(old, name)} → {amount(new, name)}")
            for name in new
            if name in old and old[name] != new[name] and not name.endswith("_error")
        ]
    if before.model != now.model:
        rows.append(("model version", f"{before.model} → {now.model}"))
    return rows


def _shown(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")
