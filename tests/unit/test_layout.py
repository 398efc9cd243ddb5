"""Where things lie in a store: stores of before are read by these very paths, and one module alone spells them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffusion_core
from diffusion_core.store import layout

ROOT = Path(diffusion_core.__file__).parent.parent

PATHS = {
    layout.dataset("digits"): "datasets/digits",
    layout.dataset_version("digits", "0a1b"): "datasets/digits/0a1b",
    layout.run("0a1b"): "runs/0a1b",
    layout.image_set("0a1b"): "images/0a1b",
    layout.evaluation("0a1b"): "evaluations/0a1b",
    layout.comparison("0a1b"): "comparisons/0a1b",
    layout.fetched_bundle("0a1b"): "bundles/0a1b",
    layout.gate("digits"): "gates/digits",
    layout.lease("train", "0a1b"): "leases/train/0a1b",
    layout.outcome("digits", "0a1b"): "outcomes/digits/0a1b.json",
    layout.last_run("digits"): "outcomes/digits/last.json",
    layout.asked("0a1b"): "asked/0a1b.json",
    layout.watched("digits"): "watched/digits.json",
    layout.event("0a1b"): "events/0a1b.json",
    layout.plan("0a1b"): "plans/0a1b.json",
    layout.approvals("digits"): "gates/digits/approvals",
    layout.QUESTION: "question.json",
    layout.ANSWER: "answer.json",
    layout.waiting("0a1b"): "waiting/0a1b.json",
    layout.job("train-20260101-000000-0a1b2c"): "jobs/train-20260101-000000-0a1b2c",
    layout.STACK: "stack",
    layout.MLFLOW_DATABASE: "mlflow.db",
    layout.MLFLOW_ARTIFACTS: "mlartifacts",
    layout.SOURCE_HASHES: "source-hashes.parquet",
    layout.MANIFEST: "manifest.json",
    layout.REJECTED: "rejected.parquet",
    layout.WORK: "work",
    layout.dataset_shard(7): "shards/part-00007.parquet",
    layout.finished_shard(7): "work/part-00007.json",
    layout.spooled_chunk(7): "work/spool-00007.parquet",
    layout.extractor("0a1b"): "extractors/0a1b",
    layout.EXTRACTOR: "extractor.json",
    layout.reference(1, 300): "reference-1-300.safetensors",
    layout.RUN: "run.json",
    layout.ATTEMPTS: "attempts",
    layout.CHECKPOINTS: "checkpoints",
    layout.SNAPSHOTS: "snapshots",
    layout.PROGRESS: "progress.json",
    layout.METRICS: "metrics.jsonl",
    layout.PREVIEWS: "previews/",
    layout.MLFLOW_RUN: "mlflow.json",
    layout.bundle(1280): "bundles/1280",
    layout.averaged_bundle(1280, 0.05): "bundles/1280-0.05",
    layout.FINISHED: "finished/",
    layout.finished(1280): "finished/1280.json",
    layout.recorded(1280): "recorded/1280.json",
    layout.CHECKPOINT: "record.json",
    layout.tensors("ema", "0123456789abcdef"): "ema-01234567.safetensors",
    layout.BUNDLE: "bundle.json",
    layout.WEIGHTS: "model.safetensors",
    layout.EXTRACTOR_WEIGHTS: "model.safetensors",
    layout.CONFIG: "config.json",
    layout.SAMPLES: "samples.png",
    layout.CARD: "README.md",
    layout.SET: "set.json",
    layout.LABELS: "labels.parquet",
    layout.SHEET: "contact-sheet.png",
    layout.FAILED: "failed.parquet",
    layout.IMAGE_SHARDS: "shards/part-",
    layout.image_shard(7): "shards/part-00007",
    layout.EXTENSIONS: "extensions/",
    layout.extension(7): "extensions/00007.json",
    layout.set_plan(0): "plan-0.parquet",
    layout.set_index(99): "index-99.parquet",
    layout.SET_MANIFESTS: "manifest-",
    layout.set_manifest(99): "manifest-99.json",
    layout.SET_CLOSED: "closed-",
    layout.set_closed(99): "closed-99.json",
    layout.set_log("now"): "log/now.json",
    layout.EVALUATION: "evaluation.json",
    layout.EVALUATION_PICTURE: "evaluation.png",
    layout.FEATURES: "features.safetensors",
    layout.attached("0a1b"): "attached/0a1b.json",
    layout.ABOUT: "about.json",
    layout.CELLS: "cells/",
    layout.cell("0a1b", 3): "cells/0a1b/seed-3.json",
    layout.view("0a1b"): "views/0a1b",
    layout.COMPARISON: "comparison.json",
    layout.COMPARISON_TABLE: "comparison.md",
    layout.COMPARISON_PICTURE: "comparison.png",
    layout.REQUEST: "request.json",
    layout.IDS: "ids.json",
    layout.RESULT: "result.json",
    layout.ERROR: "error.json",
    layout.LOG: "log.txt",
    layout.RUNNING: "running.json",
}


def test_the_paths_of_existing_stores_stay() -> None:
    assert [now for now, then in PATHS.items() if now != then] == []


def test_every_path_is_among_them() -> None:
    constants = {value for name, value in vars(layout).items() if name.isupper()}
    folders = {path.partition("/")[0] for path in PATHS.values()}
    assert constants - PATHS.keys() - folders == set()


FOLDERS = {"datasets", "runs", "images", "evaluations", "comparisons", "bundles", "gates", "leases", "jobs", "stack"}
FOLDERS |= {"outcomes", "asked", "watched", "events", "plans"}
FILES = {"mlflow.db", "mlartifacts"} | {path for path in PATHS.values() if path.endswith((".json", ".parquet"))}


def _spelled(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every literal that is a path of the store: `"runs/…"`, `place / "runs"`, `"manifest.json"`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            if node.right.value in FOLDERS:
                yield node.lineno, node.right.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            folder, slash, _ = node.value.lstrip("/").partition("/")
            if node.value in FILES or (slash and folder in FOLDERS):
                yield node.lineno, node.value


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('place / "runs"', ["runs"]),
        ('place / f"runs/{run_id}"', ["runs/"]),
        ('f"{place.uri}/bundles/{digest}"', ["/bundles/"]),
        ('place.read_json("set.json")', ["set.json"]),
        ('unit = "images"', []),
    ],
)
def test_what_counts_as_a_path(code: str, found: list[str]) -> None:
    assert [text for _, text in _spelled(ast.parse(code))] == found


def test_no_other_module_spells_a_path_of_the_store() -> None:
    own = ROOT / "diffusion_core/store/layout.py"
    modules = {path for room in ("diffusion_core", "flows") for path in (ROOT / room).rglob("*.py")} - {own}
    assert len(modules) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for path in sorted(modules)
        for line, text in _spelled(ast.parse(path.read_text()))
    ]
    assert found == []
