"""The comparison of samplers: evaluations are counted, cells are stored one by one, and what is there is not redone."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_core.bundle import bundle_digest, load_bundle
from diffusion_core.catalog import listing, prune
from diffusion_core.config import UserError
from diffusion_core.diffusion import build_sampler, make_process
from diffusion_core.diffusion.config import GuidanceConfig, ProcessConfig, SamplerConfig, SamplerKind
from diffusion_core.evaluation import features
from diffusion_core.evaluation.classifier import classifier_extractor
from diffusion_core.evaluation.config import ClassifierConfig, ComparisonConfig, EvaluationConfig
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.generation.worker import Generator, NonFiniteImages
from diffusion_core.jobs.rows import WorkersDied
from diffusion_core.stages.compare import CompareRequest, run
from diffusion_core.stages.work import compare, compare_cell
from diffusion_core.stages.work.compare_cell import Count, counted
from diffusion_core.store import Directory
from tests.evaluated import pictures_dataset
from tests.tiny_bundle import tiny_bundle

EVALUATION = EvaluationConfig(classifier=ClassifierConfig(width=8, features=16, images=500, batch_size=32))
RUN_OF_TINY_BUNDLES = "0123456789abcdef"
CONTESTANTS = ["ddpm:6", "ddim:3"]


@pytest.fixture(scope="module")
def bundle_uri(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


def rows_an_image(uri: str, sampler: dict[str, Any], guidance: dict[str, Any] | None = None) -> float:
    config = GenerationConfig(sampler=sampler, guidance=guidance or {}, batch_size=4)
    generator = Generator(load_bundle(uri), config)
    with counted(generator.networks, Count()) as count:
        generator.images(np.arange(8), np.arange(8) % 10)
    return count.rows / 8


@pytest.mark.parametrize("kind", list(SamplerKind))
@pytest.mark.parametrize(("scale", "networks"), [(1.0, 1), (1.5, 2), (0.0, 1)])
def test_evaluations_are_counted_for_every_sampler(bundle_uri, kind, scale, networks):
    sampler = SamplerConfig(kind=kind, steps=5)
    foreseen = networks * build_sampler(sampler, make_process(ProcessConfig())).evaluations
    found = rows_an_image(bundle_uri, sampler.model_dump(), {"scale": scale})
    assert found == foreseen
    by_hand = {SamplerKind.HEUN: 2 * 5 - 1, SamplerKind.PREDICTOR_CORRECTOR: 5 + 4}
    assert found == networks * by_hand.get(kind, 5)


def test_guidance_counts_where_it_guides(bundle_uri):
    """Of the steps at log-SNR -1.51, 0 and 1.51 two lie inside."""
    sampler = {"kind": "ddim", "steps": 3}
    log_snr = make_process(ProcessConfig()).schedule.log_snr
    times = build_sampler(SamplerConfig(**sampler), make_process(ProcessConfig())).times
    inside = sum(-2.0 <= float(log_snr(t)) <= 2.0 for t in times)
    assert 0 < inside < 3
    guidance = {"scale": 2.0, "min_log_snr": -2.0, "max_log_snr": 2.0}
    assert rows_an_image(bundle_uri, sampler, guidance) == 3 + inside


def test_another_model_that_guides_counts_too(bundle_uri, tmp_path):
    guide = tiny_bundle(tmp_path / "guide", seed=1)
    assert rows_an_image(bundle_uri, {"kind": "ddim", "steps": 3}, {"scale": 2.0, "guide": guide}) == 6


def test_contestants_of_one_seed_start_from_the_same_noise_and_classes(bundle_uri):
    """And those of another seed from another: this is what makes the seeds pairs."""

    def first_call(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = GenerationConfig(sampler={"kind": kind, "steps": 3}, batch_size=4, seed=seed)
        generator, calls = Generator(load_bundle(bundle_uri), config), []
        network = generator.bundle.network
        handle = network.register_forward_hook(
            lambda module, given, named, out: calls.append((given[0], named["label"])), with_kwargs=True
        )
        generator.images(np.arange(4), np.arange(4))
        handle.remove()
        return calls[0]

    noise, labels = first_call("ddpm", 3)
    other, other_labels = first_call("unipc", 3)
    assert torch.equal(noise, other) and torch.equal(labels, other_labels)
    assert not torch.equal(first_call("ddpm", 4)[0], noise)


@pytest.fixture
def inline(monkeypatch):
    """The cluster's work in this process; the keys of the cells that were made."""
    made: list[str] = []

    def on_cluster(work, rows, resources):
        for place, row in enumerate(rows):
            made.append(row["key"])
            yield place, work(row)

    monkeypatch.setattr(compare, "on_cluster", on_cluster)
    monkeypatch.setattr(compare, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(compare, "tallied", lambda progress, already: contextlib.nullcontext(progress.advance))
    yield made
    compare_cell._tools.cache_clear()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    store = str(tmp_path_factory.mktemp("store"))
    dataset = pictures_dataset(store)
    return store, dataset, tiny_bundle(Path(store, "bundle"), dataset.class_names, dataset.image_shape)


def request_of(place, store: str | None = None, **fields: Any) -> CompareRequest:
    home, dataset, bundle = place
    fields = {"contestants": CONTESTANTS, "seeds": 2, "images": 24, "batch_size": 16, **fields}
    return CompareRequest(
        store=store or home,
        bundle_uri=bundle,
        dataset_uri=dataset.uri,
        evaluation=EVALUATION,
        comparison=ComparisonConfig.model_validate(fields),
    )


def stored(uri: str) -> dict[str, bytes]:
    directory = Directory(uri.partition("/views/")[0])
    return {entry.key: directory.read(entry.key) for entry in directory.list("cells/")}


def test_more_seeds_and_contestants_are_added_to_what_is_there(place, inline, store, capsys):
    first = run(request_of(place, store))
    assert (first.cells, first.made, first.reused) == (4, 4, False)
    assert inline[0].startswith("cells/") and len(set(inline)) == 4
    assert '"done":576,"total":576,"unit":"network evaluations"' in capsys.readouterr().out  # 2 x 32 images x 9
    cells = stored(first.uri)
    found = first.comparison
    assert [each.evaluations for each in found.standings] == [6, 3]
    assert (found.images, found.seeds, found.floor.images) == (24, [0, 1], 24)
    for name in ("table", "picture"):
        parent, _, key = getattr(first, name).rpartition("/")
        assert Directory(parent).read(key)

    again = run(request_of(place, store))
    assert again.reused and again.made == 0 and again.comparison == found and len(inline) == 4

    more = run(request_of(place, store, contestants=[*CONTESTANTS, "heun:2"], seeds=3, reference="ddim:3"))
    assert (more.cells, more.made) == (9, 5)
    assert more.uri.partition("/views/")[0] == first.uri.partition("/views/")[0]
    assert {key: data for key, data in stored(more.uri).items() if key in cells} == cells
    assert listing.comparisons(store)[first.uri.partition("/views/")[0]]["bundle"]["run_id"] == RUN_OF_TINY_BUNDLES
    assert more.comparison.standings[0].distances[:2] == found.standings[0].distances

    named = [{"name": "mine", "sampler": {"kind": "heun", "steps": 2}}, "ddpm:6"]
    renamed = run(request_of(place, store, contestants=named, seeds=3))
    assert renamed.made == 0 and renamed.comparison.standings[0].name == "mine"
    assert renamed.comparison.standings[0].distances == more.comparison.standings[2].distances


def test_prune_takes_the_comparisons_of_a_run_that_goes(place, inline, store):
    home = run(request_of(place, store)).uri.partition("/views/")[0]
    assert [found.uri for found in prune._their_measurements(store, {RUN_OF_TINY_BUNDLES})] == [home]
    assert list(prune._their_measurements(store, {"another"})) == []


def test_another_number_of_images_is_another_comparison(place, inline, store):
    first, other = run(request_of(place, store)), run(request_of(place, store, images=40))
    assert other.made == 4 and other.uri.partition("/views/")[0] != first.uri.partition("/views/")[0]
    floor = run(request_of(place, store, images=9999, seeds=1, contestants=["ddim:1"])).comparison
    assert (floor.images, floor.floor.images) == (300, 100)  # the train split, and all that is held out


def test_a_job_that_broke_goes_on_where_it_was(place, inline, store, monkeypatch):
    whole = run(request_of(place, store))
    cells = stored(whole.uri)
    directory = Directory(whole.uri.partition("/views/")[0])
    (directory / "views").delete_tree()
    lost = sorted(cells)[1]
    directory.delete(lost)
    inline.clear()
    after = run(request_of(place, store))
    assert inline == [lost] and after.made == 1
    assert stored(after.uri) == cells and after.comparison == whole.comparison


def test_a_contestant_that_gives_no_numbers_does_not_stop_the_others(place, inline, store, monkeypatch):
    images = Generator.images

    def fails(self, *given):
        if self.config.sampler.kind == "ddim" and self.config.seed == 1:
            raise NonFiniteImages("the network gave infinite or undefined values for image 7")
        return images(self, *given)

    monkeypatch.setattr(Generator, "images", fails)
    found = run(request_of(place, store, candidate="ddim:3")).comparison
    assert found.failed == {"ddim:3": "the network gave infinite or undefined values for image 7"}
    assert [each.name for each in found.standings] == ["ddpm:6"] and found.verdict is None
    inline.clear()
    assert run(request_of(place, store, candidate="ddim:3", limit=2)).made == 0  # it would fail again


def test_what_does_not_fit_is_refused_by_the_job_too(place, inline):
    with pytest.raises(UserError, match=r"ddim:2000: sampler\.steps: 2000 is more than the 1000 timesteps"):
        run(request_of(place, contestants=["ddim:2000"]))
    changed = EVALUATION.model_copy(update={"neighbours": 100})
    with pytest.raises(UserError, match=r"has 100 test .* at least 101 of each"):
        run(request_of(place).model_copy(update={"evaluation": changed}))
    assert inline == []


def test_guidance_is_part_of_a_cell_and_a_guide_by_its_content(place, inline, store, tmp_path):
    _, dataset, _ = place
    guides = [tiny_bundle(tmp_path / str(seed), dataset.class_names, dataset.image_shape, seed) for seed in (1, 1, 2)]
    for copy, uri in enumerate(guides):
        guided = [{"sampler": {"steps": 2}, "guidance": {"scale": 2.0, "guide": uri}}]
        made = run(request_of(place, store, contestants=guided, seeds=1)).made
        assert made == (0 if copy == 1 else 1)
    first = run(request_of(place, store, contestants=guided, seeds=1))
    replace_guide(place, guides[2], 3)
    other = run(request_of(place, store, contestants=guided, seeds=1))
    assert (first.made, other.made) == (0, 1) and other.uri != first.uri
    assert other.comparison.standings[0].distances != first.comparison.standings[0].distances
    assert run(request_of(place, store, contestants=["ddim:2@2"], seeds=1)).made == 1
    assert GuidanceConfig(scale=2.0) == ComparisonConfig(contestants=["ddim:2@2"]).contestants[0].guidance


def replace_guide(place, uri: str, seed: int) -> None:
    _, dataset, _ = place
    shutil.rmtree(uri)
    tiny_bundle(uri, dataset.class_names, dataset.image_shape, seed)


def test_a_guide_that_is_replaced_meanwhile_is_refused(place, inline, store, tmp_path, monkeypatch):
    _, dataset, _ = place
    guide = tiny_bundle(tmp_path / "guide", dataset.class_names, dataset.image_shape, 1)
    guided = [{"sampler": {"steps": 2}, "guidance": {"scale": 2.0, "guide": guide}}]
    cells = stored(run(request_of(place, store, contestants=guided, seeds=1)).uri)
    assert all(f'"guide":"{bundle_digest(guide)}"' in data.decode().replace(" ", "") for data in cells.values())
    rows = compare._rows

    def replaced(*given):
        found = rows(*given)
        replace_guide(place, guide, 2)
        return found

    monkeypatch.setattr(compare, "_rows", replaced)
    with pytest.raises(UserError, match=r"The guide .*/guide is not the one that the comparison began with\."):
        run(request_of(place, store, contestants=guided, seeds=2))


def test_all_that_defines_the_images_is_in_the_address_and_reaches_the_worker(place, inline, store, monkeypatch):
    asked = request_of(place, store, contestants=["ddim:2"], seeds=2)
    run(asked)
    generation, used = compare._Bench._generation, []
    rounded = {"precision": "bfloat16", "threads": 2}

    def other(*given):
        return GenerationConfig.model_validate({**generation(*given).model_dump(), **rounded})

    def figures(shared, generator, *rest):
        used.append(generator.config)
        return {"evaluations": 2.0, "distance": 1.0, "precision": 1.0, "recall": 1.0}

    monkeypatch.setattr(compare._Bench, "_generation", other)
    monkeypatch.setattr(compare_cell, "_figures", figures)
    again = run(asked)
    assert again.made == 2 and len(stored(again.uri)) == 4
    assert [each.seed for each in used] == [0, 1] and used[0] == other(
        compare._bench(asked), asked.comparison.contestants[0]
    )
    monkeypatch.setattr(GenerationConfig, "algorithm_version", 99)
    assert run(asked).made == 2


def test_a_set_is_made_block_by_block_to_the_same_figures(place, inline, store, monkeypatch):
    whole = stored(run(request_of(place, store)).uri)
    images, sizes = Generator.images, []

    def watched(self, ids, *given):
        sizes.append(len(ids))
        return images(self, ids, *given)

    monkeypatch.setattr(Generator, "images", watched)
    monkeypatch.setattr(compare_cell, "_BLOCK", 20)  # the nearest multiple of 16 is 16
    for key in whole:
        Directory(compare._bench(request_of(place, store)).directory.uri).delete(key)
    compare._bench(request_of(place, store)).view.delete_tree()
    assert stored(run(request_of(place, store)).uri) == whole
    assert sizes == [16, 8] * 4


def test_contestants_whose_workers_die_are_named_and_the_others_stored(place, inline, store, monkeypatch):
    work_on = compare.on_cluster

    def deadly(work, rows, resources):
        places = [place for place, row in enumerate(rows) if row["generation"]["sampler"]["kind"] == "heun"]
        yield from work_on(work, [row for place, row in enumerate(rows) if place not in places], resources)
        raise WorkersDied(places, len(rows), 3)

    monkeypatch.setattr(compare, "on_cluster", deadly)
    with pytest.raises(UserError, match=r"at cells of heun:2, and all other cells are stored: leave these"):
        run(request_of(place, store, contestants=[*CONTESTANTS, "heun:2"]))
    monkeypatch.setattr(compare, "on_cluster", work_on)
    assert run(request_of(place, store)).made == 0


def test_another_classifier_beside_another_extractor_is_another_comparison(place, inline, monkeypatch):
    """The reference is kept by the extractor alone, and yet the accuracy of real images is that of this classifier."""

    class Means:
        kind, digest = "means", "means"

        def features(self, images: np.ndarray) -> np.ndarray:
            return images[:, ::5, ::5, 0].reshape(len(images), -1).astype(np.float32)

    monkeypatch.setattr(features, "make_extractor", lambda *_: Means())
    monkeypatch.setattr(compare, "extractor_identity", lambda *_: "means")
    _, dataset, _ = place
    held_out, uris, accuracies = dataset.read("test", limit=24), set(), []
    for images in (32, 500):
        evaluation = EvaluationConfig(classifier=EVALUATION.classifier.model_copy(update={"images": images}))
        asked = request_of(place, contestants=["ddim:1"], seeds=1).model_copy(update={"evaluation": evaluation})
        found = run(asked)
        seen = classifier_extractor(dataset, evaluation.classifier).classify(held_out.images)
        accuracies.append(found.comparison.floor.accuracy)
        assert accuracies[-1] == (seen == held_out.labels).mean() and found.made == 1
        uris.add(found.uri.partition("/views/")[0])
    assert len(uris) == 2 and accuracies[0] != accuracies[1]
    assert set(found.comparison.configuration["evaluation"]) == {"extractor", "classifier", "neighbours"}
