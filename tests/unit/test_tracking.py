"""The record of runs and the registry, on a real MLflow over SQLite."""

import http.server
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffusion_core import tracking
from diffusion_core.bundle import bundle_digest
from diffusion_core.config import UserError
from diffusion_core.tracking import connection, runs
from diffusion_core.tracking.registry import ServingDefaults
from tests.tiny_bundle import tiny_bundle

DEFAULTS = ServingDefaults(sampler={"kind": "ddim", "steps": 4}, guidance_scale=1.0, batch_size=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("store"))


def recorder(store, **options):
    return tracking.RunRecorder(store, "tests", "a run", **options)


def history(store, run_id, key):
    return [(metric.step, metric.value) for metric in connection.client(store).get_metric_history(run_id, key)]


def test_the_record_is_a_sqlite_file_in_a_local_store_and_a_server_elsewhere(monkeypatch, tmp_path):
    assert tracking.tracking_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        tracking.tracking_uri("s3://bucket/prefix")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.tracking_uri("s3://bucket/prefix") == "http://mlflow:5000"


def test_steps_already_recorded_are_skipped_when_a_run_is_continued(store):
    first = recorder(store)
    first.log(100, {"loss": 1.0})
    first.log(200, {"loss": 0.5})
    assert first.settle(30) == []
    again = recorder(store, mlflow_run_id=first.mlflow_run_id)
    assert (again.mlflow_run_id, again.last_step) == (first.mlflow_run_id, 200)
    for step, loss in [(100, 9.0), (200, 9.0), (300, 0.25), (300, 9.0), (250, 9.0)]:
        again.log(step, {"loss": loss})
    assert again.settle(30) == []
    assert history(store, first.mlflow_run_id, "loss") == [(100, 1.0), (200, 0.5), (300, 0.25)]


def test_a_killed_process_leaves_a_run_that_continues_without_duplicates(store, tmp_path):
    code = (
        "import os, sys; from diffusion_core.tracking import RunRecorder;"
        f"r = RunRecorder({store!r}, 'tests', 'killed'); r.log(10, {{'loss': 1}}); r.log(20, {{'loss': 2}});"
        "assert not r.settle(30); print(r.mlflow_run_id, flush=True); os._exit(9)"
    )
    run_id = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    again = recorder(store, mlflow_run_id=run_id)
    for step in (10, 20, 30):
        again.log(step, {"loss": step})
    again.finish()
    assert history(store, run_id, "loss") == [(10, 1), (20, 2), (30, 30)]
    assert connection.client(store).get_run(run_id).info.status == "FINISHED"


def test_parameters_are_flat_kept_from_the_first_start_and_free_of_secrets(store):
    params = {
        "network": {"dropout": 0.1, "sizes": (1, 2)},
        "from": "s3://key:secret@bucket/x?token=hidden&y",
        "long": "x" * 9000,
    }
    params |= {f"many.{n}": n for n in range(150)}
    first = recorder(store, params=params, tags={"server": "https://user:pass@host:5000/a?key=hidden b"})
    again = recorder(store, params={**params, "network": {"dropout": 0.9}}, mlflow_run_id=first.mlflow_run_id)
    run = connection.client(store).get_run(again.mlflow_run_id)
    assert run.data.params["network.dropout"] == "0.1" and run.data.params["network.sizes"] == "(1, 2)"
    assert run.data.params["from"] == "s3://bucket/x" and run.data.params["many.149"] == "149"
    assert run.data.tags["server"] == "https://host:5000/a b"
    everything = json.dumps(run.to_dictionary())
    assert not any(secret in everything for secret in ("secret", "hidden", "pass@"))


def test_pictures_are_kept_with_the_run_below_the_store(store):
    run = recorder(store)
    run.image("preview", b"old")
    run.image("preview.png", b"new")
    assert run.settle(30) == []
    info = connection.client(store).get_run(run.mlflow_run_id).info
    folder = Path(info.artifact_uri.removeprefix("file://"))
    assert folder.is_relative_to(f"{store}/mlartifacts") and (folder / "images/preview.png").read_bytes() == b"new"


class Away:
    """An MLflow that is away while `is_away`, and refuses figures of the steps in `refused`."""

    def __init__(self, monkeypatch):
        from mlflow import MlflowClient

        self.is_away, self.refused = True, ()
        for name in ("get_run", "log_batch", "log_artifact", "set_terminated"):
            real = getattr(MlflowClient, name)
            monkeypatch.setattr(MlflowClient, name, lambda *args, real=real, **kw: self._call(real, *args, **kw))

    def _call(self, real, *args, **options):
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        if self.is_away:
            raise MlflowException("the server https://u:secret@host is away")
        if any(metric.step in self.refused for metric in options.get("metrics", ())):
            raise MlflowException("not these", error_code=INVALID_PARAMETER_VALUE)
        return real(*args, **options)


def tell_two_steps(run):
    run.log(1, {"loss": 1})
    run.log(2, {"loss": 2})
    run.image("preview", b"png")


def test_what_mlflow_does_not_take_now_is_recorded_when_it_is_back(store, monkeypatch, caplog):
    run = recorder(store)
    away = Away(monkeypatch)
    tell_two_steps(run)
    assert run.unrecorded() == [(1, {"loss": 1}), (2, {"loss": 2})]
    assert run.settle(0.1) == ["the figures at 1 images", "the figures at 2 images", "the picture preview.png"]
    assert "kept for later" in caplog.text and "secret" not in caplog.text
    away.is_away = False
    run.finish()
    assert run.unrecorded() == [] and history(store, run.mlflow_run_id, "loss") == [(1, 1), (2, 2)]
    mlflow = connection.client(store)
    assert mlflow.get_run(run.mlflow_run_id).info.status == "FINISHED"
    assert [file.path for file in mlflow.list_artifacts(run.mlflow_run_id, "images")] == ["images/preview.png"]


def test_an_mlflow_that_stays_away_costs_a_warning_that_names_what_is_lost(store, monkeypatch, caplog):
    run = recorder(store)
    Away(monkeypatch)
    monkeypatch.setitem(runs._PATIENCE_S, "FINISHED", 0.2)
    tell_two_steps(run)
    run.finish()
    assert (
        f"will not show of the run {run.mlflow_run_id}: the figures at 1 images, the figures at 2 images, "
        "that it is FINISHED, the picture preview.png."
    ) in caplog.text


def test_a_run_continues_while_mlflow_is_away(store, monkeypatch):
    first = recorder(store)
    first.log(1, {"loss": 1})
    first.finish()
    away = Away(monkeypatch)
    again = recorder(store, mlflow_run_id=first.mlflow_run_id, params={"late": 1})
    again.log(1, {"loss": 9})
    again.log(2, {"loss": 2})
    away.is_away = False
    again.finish()
    assert history(store, first.mlflow_run_id, "loss") == [(1, 1), (2, 2)]
    run = connection.client(store).get_run(first.mlflow_run_id)
    assert run.data.params["late"] == "1" and run.info.status == "FINISHED"


def test_figures_that_mlflow_refuses_do_not_stop_the_rest(store, monkeypatch, caplog):
    run = recorder(store)
    away = Away(monkeypatch)
    away.is_away, away.refused = False, (1,)
    tell_two_steps(run)
    run.finish()
    assert history(store, run.mlflow_run_id, "loss") == [(2, 2)]
    assert "MLflow refuses the figures at 1 images" in caplog.text


def test_evaluation_figures_are_attached_once(store):
    run = recorder(store)
    for _ in range(2):
        tracking.record_figures(store, run.mlflow_run_id, {"evaluation/recall": 0.5}, step=7)
    assert history(store, run.mlflow_run_id, "evaluation/recall") == [(7, 0.5)]


def test_an_unknown_run_and_a_deleted_experiment_give_one_sentence(store):
    with pytest.raises(UserError, match="has no run 'nothing'"):
        recorder(store, mlflow_run_id="nothing")
    mlflow = connection.client(store)
    mlflow.delete_experiment(mlflow.create_experiment("gone"))
    with pytest.raises(UserError, match="'gone' was deleted"):
        tracking.RunRecorder(store, "gone", "x")


def _record_once(store):
    run = tracking.RunRecorder(store, "race", f"{os.getpid()}")
    run.log(1, {"loss": 1})
    assert run.settle(30) == []


def test_processes_that_start_at_once_on_a_new_store_share_one_complete_database(tmp_path):
    context = multiprocessing.get_context("forkserver")  # of one process that has no threads and has loaded MLflow
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=_record_once, args=(str(tmp_path),)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    mlflow = connection.client(str(tmp_path))
    experiment = mlflow.get_experiment_by_name("race")
    assert len(mlflow.search_runs([experiment.experiment_id])) == 3
    assert not list(tmp_path.glob(".tmp-*"))


def test_making_the_database_says_nothing_of_migrations(tmp_path):
    code = (
        "import logging; logging.basicConfig(level=logging.INFO);"
        f"from diffusion_core.tracking.connection import client; client({str(tmp_path)!r}).search_experiments()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "alembic" not in done.stderr and "upgrade" not in done.stderr and "Creating initial" not in done.stderr
    assert (tmp_path / "mlflow.db").exists() and list(tmp_path.iterdir()) == [tmp_path / "mlflow.db"]


@pytest.fixture(scope="module")
def registered(store, tmp_path_factory):
    """A registry of three versions of one model."""
    folder = tmp_path_factory.mktemp("bundles")
    run = recorder(store)
    uris = [tiny_bundle(folder / str(seed), seed=seed) for seed in range(3)]
    versions = [
        tracking.register_version(store, "toys", uri, run.mlflow_run_id, DEFAULTS, {"note": "s3://a:b@c/d"})
        for uri in uris
    ]
    return store, run.mlflow_run_id, uris, versions


def test_a_bundle_has_one_version_however_often_it_is_registered(registered):
    store, run_id, uris, versions = registered
    assert versions == [(1, True), (2, True), (3, True)]
    assert tracking.register_version(store, "toys", uris[1], run_id, DEFAULTS) == (2, False)
    rows = [row for row in tracking.list_models(store) if row["name"] == "toys"]
    assert [row["version"] for row in rows] == [1, 2, 3]
    tags = rows[1]["tags"]
    assert tags["bundle_digest"] == bundle_digest(uris[1]) and tags["note"] == "s3://c/d"
    assert (
        tags["dataset_version"] == "0" * 16
        and tags["run_id"] == "0123456789abcdef"
        and rows[1]["mlflow_run_id"] == run_id
    )


def test_a_registration_that_was_interrupted_reuses_the_model_it_left(registered, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    store, run_id, _, _ = registered
    uri = tiny_bundle(tmp_path / "late", seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tracking.register_version(store, "late", uri, run_id, DEFAULTS)
    assert tracking.register_version(store, "late", uri, run_id, DEFAULTS) == (1, True)
    mlflow = connection.client(store)
    experiment = mlflow.get_run(run_id).info.experiment_id
    models = mlflow.search_logged_models([experiment], filter_string=f"tags.bundle_digest = '{bundle_digest(uri)}'")
    assert len(models) == 1


def test_references_resolve_to_the_bundle_and_to_the_registered_copy_when_it_is_gone(registered, tmp_path):
    store, run_id, uris, _ = registered
    found = tracking.resolve_model("models:/toys/3", store)
    assert (found.bundle_uri, found.version, found.digest) == (uris[2], "toys/3", bundle_digest(uris[2]))
    assert tracking.resolve_model(uris[0], store).version == f"bundle/{bundle_digest(uris[0])}"
    moved = tiny_bundle(tmp_path / "moved", seed=11)
    number, _ = tracking.register_version(store, "moved", moved, run_id, DEFAULTS)
    os.rename(moved, tmp_path / "elsewhere")
    copy = tracking.resolve_model(f"models:/moved/{number}", store)
    assert copy.bundle_uri.startswith(f"{store}/mlartifacts") and bundle_digest(copy.bundle_uri) == copy.digest
    os.rename(copy.bundle_uri, tmp_path / "copy")
    with pytest.raises(UserError, match="is gone"):
        tracking.resolve_model(f"models:/moved/{number}", store)


def test_promote_and_rollback_keep_the_history_of_champions(registered):
    store = registered[0]
    assert tracking.champion(store, "toys") is None and tracking.champion_history(store, "toys") == []
    with pytest.raises(UserError, match="has no champion"):
        tracking.rollback("toys", store)
    for version in (1, 3, 3, 2):
        tracking.promote("toys", version, store)
    assert tracking.champion_history(store, "toys") == [1, 3, 2]
    assert tracking.resolve_model("models:/toys@champion", store).number == 2
    assert tracking.rollback("toys", store) == 3 and tracking.was_rolled_back(store, "toys", 2)
    assert tracking.rollback("toys", store) == 1
    with pytest.raises(UserError, match="first champion"):
        tracking.rollback("toys", store)
    tracking.promote("toys", 2, store)
    assert tracking.champion_history(store, "toys") == [1, 2] and not tracking.was_rolled_back(store, "toys", 2)
    assert tracking.rollback("toys", store) == 1


@pytest.mark.parametrize(("alias", "kept"), [(3, [1, 3]), (1, [1]), (2, [1, 3, 2])])
def test_a_crash_between_alias_and_history_is_mended_in_favour_of_the_alias(registered, alias, kept):
    store = registered[0]
    mlflow = connection.client(store)
    mlflow.set_registered_model_tag("toys", "champion_history", "[1, 3]")
    mlflow.set_registered_model_alias("toys", "champion", str(alias))
    assert tracking.champion_history(store, "toys") == kept


def test_the_champion_alias_is_set_by_nothing_else(registered):
    with pytest.raises(UserError, match="promote and rollback"):
        tracking.set_alias(registered[0], "toys", "champion", 1)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("models:/nothing@champion", "no registered model 'nothing'; registered are: .*toys"),
        ("models:/toys@best", "has no alias 'best'; its aliases are: "),
        ("models:/toys/77", "has no version 77; its versions are: 1, 2, 3"),
        ("models:/toys", "is not a model reference"),
        ("models:/toys@", "is not a model reference"),
        ("models:/it's@champion", "no registered model"),
        ("/nowhere/at/all", "is not a model bundle"),
    ],
)
def test_a_reference_that_names_nothing_is_refused_in_one_sentence_and_soon(registered, reference, said):
    started = time.monotonic()
    with pytest.raises(UserError, match=said):
        tracking.check_alias(reference, registered[0])
    assert time.monotonic() - started < 2


def test_looking_for_a_model_in_a_new_store_creates_nothing_and_loads_nothing(tmp_path):
    code = (
        "import sys; from diffusion_core import tracking; from diffusion_core.config import UserError\n"
        "try: tracking.check_alias('models:/a@b', sys.argv[1])\n"
        "except UserError as error: print(error)\n"
        "assert tracking.list_models(sys.argv[1]) == []\n"
        "assert not {'mlflow', 'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "There is no registered model 'a'; registered are: none." in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_registry_commands_do_not_load_torch(registered):
    code = (
        "import sys; from diffusion_core import tracking; s = sys.argv[1]\n"
        "tracking.promote('toys', 3, s); tracking.rollback('toys', s); tracking.list_models(s)\n"
        "tracking.resolve_model('models:/toys/1', s)\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    tracking.promote("toys", 1, registered[0])
    subprocess.run([sys.executable, "-c", code, registered[0]], check=True)


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b", ".."])
def test_a_bad_model_name_is_refused(registered, name):
    store, run_id, uris, _ = registered
    with pytest.raises(UserError, match="is not accepted as a name"):
        tracking.register_version(store, name, uris[0], run_id, DEFAULTS)


@contextmanager
def server(status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    listening = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield listening.server_address[1]
    finally:
        listening.shutdown()
        listening.server_close()


def test_a_server_that_is_away_or_refuses_is_reported_at_once_and_without_its_password(monkeypatch):
    connection._check_server.cache_clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hidden@127.0.0.1:1/")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:1 .*cannot be reached") as caught:
        tracking.check_alias("models:/a@b", "s3://bucket/x")
    assert "hidden" not in str(caught.value) and time.monotonic() - started < 4
    with server(401) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hidden@127.0.0.1:{port}")
        with pytest.raises(UserError, match="refuses the credentials") as caught:
            tracking.check_alias("models:/a@b", "s3://bucket/x")
        assert "hidden" not in str(caught.value)


def test_secrets_are_cut_out_of_text():
    assert tracking.without_secrets("see https://u:p@h:1/x?key=1 and s3://b/k") == "see https://h:1/x and s3://b/k"
    assert tracking.without_secrets({"a": "http://h/?q"}) == "{'a': 'http://h/'}"
    assert tracking.without_secrets("what? no: a@b.c") == "what? no: a@b.c"
