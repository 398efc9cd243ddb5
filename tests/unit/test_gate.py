"""Evaluation and gate on models whose images are known: real datasets, image sets, extractors and MLflow, no Ray."""

import io
import json
import multiprocessing
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from diffusion_core import tracking
from diffusion_core.bundle import bundle_digest, load_bundle
from diffusion_core.config import UserError
from diffusion_core.diffusion import GuidanceConfig
from diffusion_core.evaluation.config import (
    ClassifierConfig,
    EvaluationConfig,
    GateConfig,
    InversionConfig,
    LikelihoodConfig,
    LikelihoodMethod,
)
from diffusion_core.evaluation.inversion import inversion_error
from diffusion_core.evaluation.likelihood import held_out_likelihood
from diffusion_core.jobs.request import Resources
from diffusion_core.stages import register
from diffusion_core.stages.evaluate import EvaluateRequest
from diffusion_core.stages.register import RegisterRequest
from diffusion_core.stages.work import gate as work
from diffusion_core.stages.work.evaluate import attach, check_comparable, evaluate, samples_of
from diffusion_core.tracking import approval, connection
from tests.evaluated import model_of_quality, pictures_dataset
from tests.tiny_bundle import tiny_bundle

CONFIG = EvaluationConfig(
    classifier=ClassifierConfig(width=8, features=16, images=3000, batch_size=32), samples=1000, sampler={"steps": 2}
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def dataset(store):
    return pictures_dataset(store)


@pytest.fixture(scope="module")
def run_id(store):
    return tracking.RunRecorder(store, "pictures", "run").mlflow_run_id


@pytest.fixture(scope="module")
def bundles(store, dataset):
    """Bundles of known quality. The noise of the real images is 25."""
    made = {
        "real": (0, 25, 0),
        "good": (1, 30, 0),
        "poor": (2, 45, 0),
        "awful": (3, 100, 0),
        "mislabelled": (4, 25, 0.5),
        "poor too": (5, 45, 0),
    }
    return {name: model_of_quality(store, dataset, CONFIG, *quality) for name, quality in made.items()}


def measured(store, dataset, bundle, config=CONFIG):
    return evaluate(store, bundle, dataset.uri, config, Resources())


def gate(store, dataset, run_id, bundle, model, **changes):
    request = RegisterRequest(
        store=store,
        model=model,
        bundle_uri=bundle,
        dataset_uri=dataset.uri,
        evaluation=CONFIG,
        gate=GateConfig(**{"first_limit": 30, "resamples": 100, **changes}),
        mlflow_run_id=run_id,
    )
    return register.run(request)


def test_figures_rank_models_and_stand_beside_their_floor(store, dataset, bundles):
    reports = {name: measured(store, dataset, uri).report for name, uri in bundles.items()}
    real, floor = reports["real"]["figures"], reports["real"]["floor"]
    assert real["frechet_distance"] < 3 * floor["frechet_distance"]
    distances = [reports[name]["figures"]["frechet_distance"] for name in ("real", "good", "poor", "awful")]
    assert distances == sorted(distances) and distances[3] > 10 * floor["frechet_distance"]
    kernels = [reports[name]["figures"]["kernel_distance"] for name in ("real", "poor", "awful")]
    assert kernels == sorted(kernels)
    assert all(report["floor"] == floor for report in reports.values())
    assert real["precision"] > 0.8 and real["recall"] > 0.8 and reports["awful"]["figures"]["precision"] < 0.5
    assert real["accuracy"] > 0.97 and floor["accuracy"] > 0.97
    assert 0.35 < reports["mislabelled"]["figures"]["accuracy"] < 0.65
    assert reports["mislabelled"]["figures"]["frechet_distance"] < 3 * floor["frechet_distance"]
    assert set(reports["real"]["accuracy_by_class"]) == {"upper", "left"}


def test_the_report_says_what_was_compared_and_never_calls_it_fid(store, dataset, bundles):
    done = measured(store, dataset, bundles["good"])
    report = done.report
    assert report["samples"] == 100 and "held-out images" in report["samples_note"]
    assert report["reference"] == "train split, 300 images" and report["dataset"]["version"] == dataset.version
    assert report["extractor"]["kind"] == "classifier" and "fid" not in report["figures"]
    assert set(report["figures"]) == set(report["floor"]) == {
        "frechet_distance", "kernel_distance", "kernel_distance_error", "precision", "recall", "accuracy"
    }  # fmt: skip
    picture = Image.open(io.BytesIO(done.directory.read("evaluation.png")))
    assert picture.width > 400 and len(done.directory.read("evaluation.png")) < 300_000
    assert done.features().values.shape == (100, 16)
    assert json.loads(done.directory.read("evaluation.json")) == report


def test_the_model_that_guides_is_part_of_an_evaluation(store, dataset, bundles):
    guidance = GuidanceConfig(scale=2, guide=bundles["awful"])
    guided = CONFIG.model_copy(update={"guidance": guidance})
    model_of_quality(store, dataset, guided, 1, 30)
    done = measured(store, dataset, bundles["good"], guided)
    assert done.report["guided_by"] == [f"guide {bundle_digest(bundles['awful'])}"]
    plain = measured(store, dataset, bundles["good"])
    assert done.uri != plain.uri and "guided_by" not in plain.report
    assert done.report["image_set"] != plain.report["image_set"]
    assert measured(store, dataset, bundles["good"], guided).reused


def test_the_floor_is_the_same_figures_of_the_test_split(store, dataset, bundles):
    from diffusion_core.evaluation.distances import GaussianStatistics, frechet_distance, precision_recall
    from diffusion_core.evaluation.features import make_extractor

    extractor = make_extractor(CONFIG, dataset)
    train, test = (extractor.features(dataset.read(split).images) for split in ("train", "test"))
    floor = measured(store, dataset, bundles["good"]).report["floor"]
    expected = frechet_distance(GaussianStatistics.of(train), GaussianStatistics.of(test))
    assert floor["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    precision, recall = precision_recall(train[:100], test, 3)
    assert (floor["precision"], floor["recall"]) == (precision, recall)


def test_generated_images_are_the_second_side_of_precision_and_recall(store, dataset, bundles):
    """Too little noise: every image lies among the real ones, and few real ones lie among them."""
    narrow = model_of_quality(store, dataset, CONFIG, seed=20, noise=8)
    figures = measured(store, dataset, narrow).report["figures"]
    assert figures["precision"] > 0.9 and figures["recall"] < 0.5


@pytest.mark.parametrize("method", ["bound", "exact"])
def test_bits_per_dimension_of_held_out_images_are_a_figure_if_wanted(store, dataset, bundles, method):
    """Each image with its own label and noise, whatever the batches; other figures stay."""
    wanted = LikelihoodConfig(images=30, method=method, steps=3)
    config = CONFIG.model_copy(update={"likelihood": wanted})
    without, done = (measured(store, dataset, bundles["good"], one).report for one in (CONFIG, config))
    found = held_out_likelihood(load_bundle(bundles["good"]), dataset, wanted, 13, CONFIG.seed)
    assert done["figures"].pop("bits_per_dim") == pytest.approx(found.bits_per_dim, rel=1e-5)
    assert done["figures"].pop("bits_per_dim_error") == pytest.approx(found.error, rel=1e-4)
    assert found.importance is None and "importance" not in done
    assert done["figures"] == without["figures"]
    with pytest.raises(UserError, match=r"evaluation\.likelihood\.steps: 2000 is more than the 1000 timesteps"):
        too_many = wanted.model_copy(update={"steps": 2000, "method": LikelihoodMethod.BOUND})
        measured(store, dataset, bundles["good"], CONFIG.model_copy(update={"likelihood": too_many}))


def test_the_difference_of_images_and_their_inversion_is_a_figure_if_wanted(store, dataset, bundles):
    wanted = InversionConfig(images=20, steps=3)
    done = measured(store, dataset, bundles["good"], CONFIG.model_copy(update={"inversion": wanted})).report
    expected = inversion_error(load_bundle(bundles["good"]), dataset, wanted, 7)
    assert done["figures"]["inversion_rms"] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match=r"evaluation\.inversion\.steps: 2000 is more than the 1000 timesteps"):
        too_many = InversionConfig(images=1, steps=2000)
        measured(store, dataset, bundles["good"], CONFIG.model_copy(update={"inversion": too_many}))


def test_a_finished_evaluation_is_found_without_torch_ray_or_mlflow(store, dataset, bundles, tmp_path):
    done = measured(store, dataset, bundles["good"])
    assert measured(store, dataset, bundles["good"]).reused
    request = EvaluateRequest(store=store, bundle_uri=bundles["good"], dataset_uri=dataset.uri, evaluation=CONFIG)
    (tmp_path / "request.json").write_text(request.model_dump_json())
    code = (
        "import sys; from diffusion_core.stages.evaluate import EvaluateRequest, run\n"
        "result = run(EvaluateRequest.model_validate_json(open(sys.argv[1]).read()))\n"
        "assert result.reused and not {'torch', 'ray', 'mlflow'} & set(sys.modules)\n"
        "print(result.uri)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "request.json")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == done.uri


def test_an_evaluation_that_comes_late_changes_nothing_and_reports_what_is_stored(store, dataset, monkeypatch):
    from diffusion_core.evaluation.features import Features, Measurer

    bundle = model_of_quality(store, dataset, CONFIG, seed=21, noise=30)
    measure, first = Measurer.measure, []

    def overtaken(self, batches, total, what):
        found = measure(self, batches, total, what)
        if what != "generated images":
            return found
        monkeypatch.setattr(Measurer, "measure", measure)
        # It lost its turn.
        monkeypatch.setattr("diffusion_core.stages.work.evaluate.one_at_a_time", lambda *_: nullcontext())
        done = measured(store, dataset, bundle)
        first.append((done.report, {entry.key: entry.stamp for entry in done.directory.list()}))
        return Features(found.values + 1, found.seen, found.asked)  # as a machine of another kind may find

    monkeypatch.setattr(Measurer, "measure", overtaken)
    late = measured(store, dataset, bundle)
    assert (late.report, {entry.key: entry.stamp for entry in late.directory.list()}) == first[0]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"neighbours": 4}, {"sampler": {"steps": 3}}, {"guidance": {"scale": 2}}, {"samples": 50}]
)
def test_another_identity_is_another_evaluation(store, dataset, bundles, change):
    other = EvaluationConfig.model_validate({**CONFIG.model_dump(), **change})
    bundle = model_of_quality(store, dataset, other, seed=1, noise=30)
    assert measured(store, dataset, bundle, other).uri != measured(store, dataset, bundles["good"]).uri


def test_figures_are_attached_to_the_mlflow_run_once(store, dataset, bundles, run_id):
    done = measured(store, dataset, bundles["good"])
    attach(store, done, run_id)
    attach(store, done, run_id)
    mlflow = connection.client(store)
    metrics = mlflow.get_run(run_id).data.metrics
    assert metrics["evaluation/recall"] == done.report["figures"]["recall"]
    assert metrics["evaluation/floor/recall"] == done.report["floor"]["recall"]
    assert len(mlflow.get_metric_history(run_id, "evaluation/recall")) == 1


def test_a_dataset_without_labels_is_measured_without_accuracy(tmp_path):
    data = pictures_dataset(tmp_path, train=120, test=40, labelled=False)
    bundle = model_of_quality(tmp_path, data, CONFIG, seed=0, noise=25)
    report = measured(str(tmp_path), data, bundle).report
    assert "accuracy" not in report["figures"] and "accuracy" not in report["floor"]
    assert report["accuracy_by_class"] == {} and np.isfinite(list(report["figures"].values())).all()


def test_what_cannot_be_compared_gives_one_sentence(tmp_path, dataset):
    from diffusion_core.bundle import read_bundle_config

    small = pictures_dataset(tmp_path, train=120, test=3)
    with pytest.raises(UserError, match=r"has 3 test and 120 training images; .* at least 4 of each are needed"):
        samples_of(CONFIG, small)
    other = read_bundle_config(tiny_bundle(tmp_path / "a", ("upper", "left"), (8, 8, 1)))
    with pytest.raises(UserError, match=r"makes images of 8x8x1 and the dataset .* has images of 10x10x1"):
        check_comparable(other, dataset)
    other = read_bundle_config(tiny_bundle(tmp_path / "b", ("left", "upper"), (10, 10, 1)))
    with pytest.raises(UserError, match=r"classes .* are not those of the dataset"):
        check_comparable(other, dataset)


def test_the_first_champion_has_to_be_within_the_limit_of_the_floor(store, dataset, bundles, run_id):
    refused = gate(store, dataset, run_id, bundles["awful"], "first")
    assert not refused.promoted and "over the limit" in refused.reason and refused.version == 1
    assert tracking.champion(store, "first") is None
    assert tracking.resolve_model("models:/first@candidate", store).number == 1
    taken = gate(store, dataset, run_id, bundles["good"], "first")
    assert taken.promoted and "within the limit" in taken.reason
    assert tracking.champion(store, "first") == taken.version == 2
    assert tracking.resolve_model("models:/first@candidate", store).number == 2


def test_accuracy_below_the_minimum_keeps_a_model_from_being_champion(store, dataset, bundles, run_id):
    refused = gate(store, dataset, run_id, bundles["mislabelled"], "accuracy", min_accuracy=0.9)
    assert not refused.promoted and "below gate.min_accuracy = 0.9" in refused.reason
    assert gate(store, dataset, run_id, bundles["real"], "accuracy", min_accuracy=0.9).promoted


def test_only_a_candidate_beyond_the_interval_replaces_the_champion(store, dataset, bundles, run_id):
    assert gate(store, dataset, run_id, bundles["poor"], "duel", first_limit=1000).promoted
    worse = gate(store, dataset, run_id, bundles["awful"], "duel")
    assert not worse.promoted and worse.figures["difference_low"] > 0 and worse.figures["champion_version"] == 1
    same = gate(store, dataset, run_id, bundles["poor too"], "duel")  # the same images from other weights
    assert not same.promoted and "not surely better" in same.reason
    assert same.figures["difference_low"] == same.figures["difference_high"] == 0
    better = gate(store, dataset, run_id, bundles["real"], "duel")
    assert better.promoted and better.figures["difference_high"] < 0 and better.version == 4
    assert tracking.champion_history(store, "duel") == [1, 4]
    close = gate(store, dataset, run_id, bundles["good"], "duel")
    assert not close.promoted and close.figures["difference_low"] < close.figures["difference_high"]
    tags = {row["version"]: row["tags"] for row in tracking.list_models(store) if row["name"] == "duel"}
    assert float(tags[4]["frechet_distance"]) == better.figures["candidate"]["frechet_distance"]
    assert tags[4]["gate"] == better.reason and tags[2]["gate.champion_version"] == "1"


def test_registering_again_is_found_done_and_a_rollback_is_not_undone(store, dataset, bundles, run_id):
    gate(store, dataset, run_id, bundles["poor"], "again", first_limit=1000)
    first = gate(store, dataset, run_id, bundles["real"], "again")
    again = gate(store, dataset, run_id, bundles["real"], "again")
    assert first.promoted and again.promoted and again.version == first.version == 2
    assert again.reused and not first.reused
    assert tracking.rollback("again", store) == 1
    after = gate(store, dataset, run_id, bundles["real"], "again")
    assert not after.promoted and "rolled back" in after.reason and tracking.champion(store, "again") == 1
    tracking.promote("again", 2, store)
    assert gate(store, dataset, run_id, bundles["real"], "again").promoted


def test_a_champion_that_cannot_be_compared_stays(store, dataset, bundles, run_id, tmp_path):
    other = tiny_bundle(tmp_path / "other", ("upper", "left"), (8, 8, 1))
    defaults = tracking.ServingDefaults(sampler={"steps": 2}, guidance_scale=1, batch_size=4)
    version, _ = tracking.register_version(store, "shapes", other, run_id, defaults)
    tracking.promote("shapes", version, store)
    result = gate(store, dataset, run_id, bundles["real"], "shapes")
    assert not result.promoted and "cannot be compared" in result.reason and "8x8x1" in result.reason
    assert tracking.champion(store, "shapes") == version


def test_a_champion_set_by_hand_during_the_comparison_is_compared_with(store, dataset, bundles, run_id, monkeypatch):
    gate(store, dataset, run_id, bundles["poor"], "hand", first_limit=1000)
    defaults = tracking.ServingDefaults(sampler={"steps": 2}, guidance_scale=1, batch_size=4)
    version, _ = tracking.register_version(store, "hand", bundles["real"], run_id, defaults)
    real, calls = work.difference_interval, []

    def interval(*args):
        calls.append(args)
        if len(calls) == 1:
            tracking.promote("hand", version, store)
        return real(*args)

    monkeypatch.setattr(work, "difference_interval", interval)
    result = gate(store, dataset, run_id, bundles["good"], "hand")
    assert len(calls) == 2 and not result.promoted and result.figures["champion_version"] == version


def _gate_in_a_process(store, dataset, run_id, bundle, results):
    results.put(gate(store, dataset, run_id, bundle, "race", first_limit=1000).model_dump())


def test_gates_of_one_model_run_one_at_a_time(store, dataset, bundles, run_id):
    for name in ("poor", "good", "real"):
        measured(store, dataset, bundles[name])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    started = [
        context.Process(target=_gate_in_a_process, args=(store, dataset, run_id, bundles[name], results))
        for name in ("poor", "real")
    ]
    for process in started:
        process.start()
    found = [results.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    assert sorted(result["version"] for result in found) == [1, 2]
    best = next(
        row for row in tracking.list_models(store) if row["name"] == "race" and row["aliases"].count("champion")
    )
    assert best["tags"]["bundle_uri"] == bundles["real"], "whatever the order, the better one is champion in the end"


def test_a_gate_whose_holder_died_is_succeeded(store, dataset, bundles, run_id):
    code = (
        "import os, sys; from diffusion_core.store.lease import claim; from diffusion_core.store import Directory\n"
        "claim(Directory(sys.argv[1]) / 'gates/dead', {}); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, store])
    assert gate(store, dataset, run_id, bundles["good"], "dead").promoted


def test_a_person_has_the_last_word_about_a_version_that_passes(store, dataset, bundles, run_id):
    poor = gate(store, dataset, run_id, bundles["poor"], "asked", first_limit=1000, approval="ask")
    assert not poor.promoted and poor.question.champion is None and tracking.champion(store, "asked") is None
    again = gate(store, dataset, run_id, bundles["poor"], "asked", first_limit=1000, approval="ask")
    assert again.question == poor.question, "the same command waits for the same answer"
    approval.answer(store, poor.question, True, "Anna", "It will do.")
    accepted = gate(store, dataset, run_id, bundles["poor"], "asked", first_limit=1000, approval="ask")
    assert accepted.promoted and accepted.question is None and "Accepted by Anna" in accepted.reason

    real = gate(store, dataset, run_id, bundles["real"], "asked", approval="ask")
    assert real.question.champion == 1 and real.question.figures["difference_high"] < 0
    approval.answer(store, real.question, False, "Berta", "Noise in the corners.")
    for _ in range(2):
        refused = gate(store, dataset, run_id, bundles["real"], "asked", approval="ask")
        assert not refused.promoted and refused.question is None and "Noise in the corners." in refused.reason
    assert tracking.champion(store, "asked") == 1

    silent = gate(store, dataset, run_id, bundles["good"], "asked", approval="ask", approval_timeout_h=1e-9)
    assert not silent.promoted and "It was not answered in" in silent.reason
    awful = gate(store, dataset, run_id, bundles["awful"], "asked", approval="ask")
    assert awful.question is None, "nobody is asked about a version that its figures refuse"
