"""Where everything lies in a store, once. Paths are relative to the root, or to the folder named above them.

Old stores are read by these names too: a change of one is a change of the format.
"""

from __future__ import annotations

# What a store holds, and what of it belongs to one thing.
DATASETS = "datasets"
RUNS = "runs"
IMAGES = "images"
EVALUATIONS = "evaluations"
COMPARISONS = "comparisons"
BUNDLES = "bundles"  # at the root, copies of those that an MLflow server holds; in a run, those that it exported
GATES = "gates"
LEASES = "leases"
OUTCOMES = "outcomes"
ASKED = "asked"
WATCHED = "watched"
EVENTS = "events"
PLANS = "plans"
JOBS = "jobs"
STACK = "stack"
MLFLOW_DATABASE = "mlflow.db"
MLFLOW_ARTIFACTS = "mlartifacts"


def dataset(name: str) -> str:
    """All versions of a dataset, and what is known of its sources."""
    return f"{DATASETS}/{name}"


def dataset_version(name: str, version: str) -> str:
    return f"{DATASETS}/{name}/{version}"


def run(run_id: str) -> str:
    return f"{RUNS}/{run_id}"


def image_set(set_id: str) -> str:
    return f"{IMAGES}/{set_id}"


def evaluation(evaluation_id: str) -> str:
    return f"{EVALUATIONS}/{evaluation_id}"


def comparison(comparison_id: str) -> str:
    return f"{COMPARISONS}/{comparison_id}"


def fetched_bundle(digest: str) -> str:
    return f"{BUNDLES}/{digest}"


def gate(model: str) -> str:
    return f"{GATES}/{model}"


def approvals(model: str) -> str:
    """What a person was asked about versions of a model, a folder for each question."""
    return f"{gate(model)}/approvals"


def event(event_id: str) -> str:
    """Exists if the event was told."""
    return f"{EVENTS}/{event_id}.json"


def plan(digest: str) -> str:
    """What the pipeline of a configuration was expected to take."""
    return f"{PLANS}/{digest}.json"


def lease(stage: str, work: str) -> str:
    return f"{LEASES}/{stage}/{work}"


def outcomes(pipeline: str) -> str:
    return f"{OUTCOMES}/{pipeline}"


def outcome(pipeline: str, digest: str) -> str:
    """When a pipeline came to an outcome for the first time."""
    return f"{OUTCOMES}/{pipeline}/{digest}.json"


def last_run(pipeline: str) -> str:
    """What the last run of a pipeline had and came to."""
    return f"{OUTCOMES}/{pipeline}/last.json"


def asked(who: str) -> str:
    """The model version that an alias named when new images were asked for."""
    return f"{ASKED}/{who}.json"


def watched(dataset: str) -> str:
    """What was seen of the source of a dataset."""
    return f"{WATCHED}/{dataset}.json"


def job(job_id: str) -> str:
    return f"{JOBS}/{job_id}"


# In a dataset.
SOURCE_HASHES = "source-hashes.parquet"

# In a dataset version.
MANIFEST = "manifest.json"  # written last: the version is complete
REJECTED = "rejected.parquet"
WORK = "work"  # what a job has done so far; removed when the manifest is written


def dataset_shard(index: int) -> str:
    return f"shards/part-{index:05d}.parquet"


def finished_shard(index: int) -> str:
    return f"{WORK}/part-{index:05d}.json"


def spooled_chunk(number: int) -> str:
    return f"{WORK}/spool-{number:05d}.parquet"


def extractor(digest: str) -> str:
    """What looks at the dataset's images when models of it are evaluated."""
    return f"extractors/{digest}"


# In the folder of an extractor.
EXTRACTOR = "extractor.json"  # written last: the weights are those of its digest
EXTRACTOR_WEIGHTS = "model.safetensors"


def reference(algorithm: int, samples: int) -> str:
    """Features of the dataset's real images."""
    return f"reference-{algorithm}-{samples}.safetensors"


# In a run.
RUN = "run.json"
ATTEMPTS = "attempts"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
FINISHED = "finished/"  # begins the name of each outcome
PROGRESS = "progress.json"
METRICS = "metrics.jsonl"
PREVIEWS = "previews/"  # begins the name of each picture
MLFLOW_RUN = "mlflow.json"


def bundle(name: int | str) -> str:
    """A bundle that a run exported, named by the images seen."""
    return f"{BUNDLES}/{name}"


def averaged_bundle(images_seen: int, sigma_rel: float) -> str:
    """A bundle whose average was made after training."""
    return bundle(f"{images_seen}-{sigma_rel!r}")


def finished(images_seen: int) -> str:
    return f"{FINISHED}{images_seen}.json"


def recorded(images_seen: int) -> str:
    """Exists if MLflow was told everything of a run that was trained without it."""
    return f"recorded/{images_seen}.json"


# In a checkpoint or snapshot, `<images seen>/`.
CHECKPOINT = "record.json"  # written last


def tensors(name: str, sha256: str) -> str:
    return f"{name}-{sha256[:8]}.safetensors"


# In a bundle.
BUNDLE = "bundle.json"  # written last
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SAMPLES = "samples.png"
CARD = "README.md"

# In an image set.
SET = "set.json"
LABELS = "labels.parquet"
SHEET = "contact-sheet.png"
FAILED = "failed.parquet"
IMAGE_SHARDS = "shards/part-"  # begins the name of each
SET_MANIFESTS = "manifest-"
SET_CLOSED = "closed-"
EXTENSIONS = "extensions/"  # begins the name of each


def extension(number: int) -> str:
    return f"{EXTENSIONS}{number:05d}.json"


def image_shard(number: int) -> str:
    """Without the ending, which depends on the format."""
    return f"{IMAGE_SHARDS}{number:05d}"


def set_plan(first_image_id: int) -> str:
    return f"plan-{first_image_id}.parquet"


def set_index(last_image_id: int) -> str:
    return f"index-{last_image_id}.parquet"


def set_manifest(last_image_id: int) -> str:
    """Written last: every image of the extension is stored."""
    return f"{SET_MANIFESTS}{last_image_id}.json"


def set_closed(last_image_id: int) -> str:
    """Exists if the extension was once finished with fewer failed shards than the threshold allows."""
    return f"{SET_CLOSED}{last_image_id}.json"


def set_log(name: str) -> str:
    return f"log/{name}.json"


# In an evaluation.
EVALUATION = "evaluation.json"  # written last
EVALUATION_PICTURE = "evaluation.png"
FEATURES = "features.safetensors"


def attached(mlflow_run_id: str) -> str:
    """Exists if the figures stand on an MLflow run."""
    return f"attached/{mlflow_run_id}.json"


# In a comparison.
ABOUT = "about.json"
CELLS = "cells/"  # begins the name of each


def cell(contestant: str, seed: int) -> str:
    """What was measured of one contestant, a digest of its identity, with one seed."""
    return f"{CELLS}{contestant}/seed-{seed}.json"


def view(digest: str) -> str:
    return f"views/{digest}"


# In a view of a comparison.
COMPARISON = "comparison.json"  # written last
COMPARISON_TABLE = "comparison.md"
COMPARISON_PICTURE = "comparison.png"

# In the folder of a question to a person.
QUESTION = "question.json"
ANSWER = "answer.json"


def waiting(flow_run_id: str) -> str:
    """Exists if this Prefect flow run waited for the answer."""
    return f"waiting/{flow_run_id}.json"


# In a job.
REQUEST = "request.json"
RESULT = "result.json"
ERROR = "error.json"
LOG = "log.txt"
RUNNING = "running.json"
IDS = "ids.json"  # what the job turned out to be about
