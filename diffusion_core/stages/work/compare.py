"""How samplers of one model are compared: Fréchet distance, recall and accuracy against network evaluations.

A row of work is a cell: the images of one contestant and one seed, made and measured by one worker and never stored.
What is stored of a cell is its figures, created if absent, so that running the job again makes only what is missing,
and more seeds or contestants add cells to those that are there. Table, picture and report are a view of the cells.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from diffusion_core.bundle import BundleConfig, bundle_digest, check_makes_images, read_bundle_config
from diffusion_core.config import UserError, digest, identity
from diffusion_core.data.shards import ImageDataset, open_dataset
from diffusion_core.evaluation.comparison import (
    Comparison,
    Floor,
    check_contestants,
    document,
    standing,
    verdict,
)
from diffusion_core.evaluation.config import ComparisonConfig, Contestant, EvaluationConfig
from diffusion_core.evaluation.identity import classifier_identity, distance_name, extractor_identity
from diffusion_core.generation.config import GenerationConfig
from diffusion_core.jobs.cluster import ray_session
from diffusion_core.jobs.request import Resources
from diffusion_core.jobs.rows import WorkersDied, on_cluster
from diffusion_core.jobs.tally import tallied
from diffusion_core.progress import Progress
from diffusion_core.stages.compare import CompareRequest
from diffusion_core.stages.work.evaluate import check_comparable
from diffusion_core.stages.work.guide import guide_digests, with_guides_found
from diffusion_core.store import Directory, layout
from diffusion_core.store.turns import one_at_a_time

if TYPE_CHECKING:
    from diffusion_core.evaluation.features import Reference

REPORT, TABLE, PICTURE = layout.COMPARISON, layout.COMPARISON_TABLE, layout.COMPARISON_PICTURE
_ALGORITHM = 1  # raised when the figures are computed differently
_VIEW = 3  # raised when table or picture look different

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Cell:
    """The images of a contestant and a seed: how they are made, seed apart, by which guides, where their figures are.

    guides: digests of the other models that take part, by the names of their fields.
    """

    generation: GenerationConfig
    guides: dict[str, str]
    seed: int
    key: str


@dataclass(frozen=True)
class _Bench:
    """A comparison: a model, a dataset, how images are measured, and the directory of its cells."""

    directory: Directory
    bundle_uri: str
    bundle: BundleConfig
    dataset: ImageDataset
    evaluation: EvaluationConfig
    config: ComparisonConfig
    images: int

    @cached_property
    def cells(self) -> dict[str, list[_Cell]]:
        """Cells by the label of their contestant, seed by seed. Guides are looked at once, and so are the same for all.

        Their address is what defines them: not a name, not its place.
        """
        return {contestant.label: self._cells(contestant) for contestant in self.config.contestants}

    def _cells(self, contestant: Contestant) -> list[_Cell]:
        generation = self._generation(contestant)
        guides = guide_digests(generation.guidance)
        name, seeds = digest(generation, guides), self.config.all_seeds
        return [_Cell(generation, guides, seed, layout.cell(name, seed)) for seed in seeds]

    def _generation(self, contestant: Contestant) -> GenerationConfig:
        """How the images of a contestant are made, whatever the seed."""
        return GenerationConfig(
            sampler=contestant.sampler,
            guidance=self.config.guidance_of(contestant),
            labels="balanced",
            batch_size=self.config.batch_size,
        )

    @property
    def view(self) -> Directory:
        """Where table, picture and report are: those of these cells, called and judged as the configuration says."""
        keys = {label: [cell.key for cell in cells] for label, cells in self.cells.items()}
        return self.directory / layout.view(digest(_VIEW, self.config.model_dump(mode="json"), keys))

    def missing(self) -> list[_Cell]:
        """Cells that are not stored; of those that two contestants have in common, one."""
        stored = {entry.key for entry in self.directory.list(layout.CELLS)}
        wanted = {cell.key: cell for cells in self.cells.values() for cell in cells}
        return [cell for key, cell in wanted.items() if key not in stored]

    def names(self, keys: set[str]) -> list[str]:
        """Labels of the contestants that have one of these cells."""
        return [label for label, cells in self.cells.items() if keys & {cell.key for cell in cells}]


def compare(request: CompareRequest) -> tuple[Directory, int]:
    """Make the cells that are missing, and table, picture and report of all that are asked for.

    The comparison's id, `<store>/comparisons/<id>/`, is a digest of the bundle, the dataset version, the extractor, the
    classifier and of what all cells share. Uses the Ray that is initialised, else starts one for as long as cells are
    made.

    Returns:
        Where REPORT, TABLE and PICTURE are, and how many cells were made now.

    Raises:
        UserError: no bundle or dataset there, images of different shapes, too few real images, a sampler that the
            model's process does not take, or workers that died at every attempt.
    """
    bench = _bench(request)
    view, made = bench.view, 0
    if not view.exists(REPORT):
        from diffusion_core.evaluation.features import Measurer

        with one_at_a_time(request.store, "compare", bench.directory.name):
            reference = Measurer(request.evaluation, bench.dataset).reference(bench.images)  # once, not by each worker
            bench.directory.create_json(layout.ABOUT, _about(bench))
            made = _make(bench, bench.missing(), request.resources)
            _show(_found(bench, reference), view)
    return view, made


def _bench(request: CompareRequest) -> _Bench:
    config, evaluation = request.comparison, request.evaluation
    common = with_guides_found(config.guidance, request.store)
    contestants = tuple(
        each.model_copy(update={"guidance": each.guidance and with_guides_found(each.guidance, request.store)})
        for each in config.contestants
    )
    config = config.model_copy(update={"contestants": contestants, "guidance": common})
    dataset, bundle = open_dataset(request.dataset_uri), read_bundle_config(request.bundle_uri)
    check_makes_images(request.bundle_uri, bundle)
    check_comparable(bundle, dataset)
    check_contestants(config, bundle.process, bundle.class_names)
    least = evaluation.neighbours + 1
    rows = {split: dataset.num_rows(split) for split in ("train", "test")}
    if min(rows.values()) < max(least, 2):
        raise UserError(
            f"The dataset {dataset.uri} has {rows['test']} test and {rows['train']} training images; with "
            f"evaluation.neighbours = {evaluation.neighbours} at least {least} of each are needed."
        )
    images = min(config.images, rows["train"])  # recall compares with as many real ones
    shared = (evaluation.neighbours, images, config.batch_size)
    measured = _measured_by(evaluation, dataset)
    name = digest("comparison", _ALGORITHM, bundle_digest(request.bundle_uri), dataset.version, measured, *shared)
    directory = Directory(request.store) / layout.comparison(name)
    return _Bench(directory, request.bundle_uri, bundle, dataset, evaluation, config, images)


def _measured_by(evaluation: EvaluationConfig, dataset: ImageDataset) -> dict[str, str]:
    """Digests of the networks that look at images: the extractor, and the classifier that tells the accuracy."""
    found = {"extractor": extractor_identity(evaluation, dataset.version)}
    if dataset.class_names:
        found["classifier"] = classifier_identity(evaluation.classifier, dataset.version)
    return found


def _about(bench: _Bench) -> dict[str, Any]:
    """What all cells have in common, for whoever finds them."""
    bundle, dataset = bench.bundle, bench.dataset
    return {
        "schema_version": 1,
        "comparison_id": bench.directory.name,
        "bundle": {
            "uri": bench.bundle_uri,
            "digest": bundle_digest(bench.bundle_uri),
            "run_id": bundle.run_id,
            "images_seen": bundle.images_seen,
        },
        "dataset": {"name": dataset.name, "version": dataset.version, "uri": dataset.uri},
        **_measured_by(bench.evaluation, dataset),
        "neighbours": bench.evaluation.neighbours,
        "images": bench.images,
        "batch_size": bench.config.batch_size,
    }


def _make(bench: _Bench, missing: Sequence[_Cell], resources: Resources) -> int:
    """Make cells on the cluster, the longest first, so that no long one is left for a single worker at the end.

    Raises:
        UserError: contestants whose workers died at every attempt; all other cells are stored.
    """
    if not missing:
        return 0
    from diffusion_core.stages.work.compare_cell import Shared, make_cell

    shared = Shared(
        directory_uri=bench.directory.uri,
        bundle_uri=bench.bundle_uri,
        bundle_digest=bundle_digest(bench.bundle_uri),
        dataset_uri=bench.dataset.uri,
        evaluation=bench.evaluation,
        images=bench.images,
        device="cuda" if resources.gpus_per_worker else "cpu",
    )
    rows = sorted(_rows(bench, missing), key=lambda row: -row["evaluations"])
    total = sum(row["evaluations"] for row in rows)
    with (
        ray_session(),
        Progress("compare", total, "network evaluations") as progress,
        tallied(progress, 0) as tally,
        closing(on_cluster(partial(make_cell, shared, tally), rows, resources)) as answers,
    ):
        try:
            for done, _ in enumerate(answers, start=1):
                logger.info("%d of %d cells made", done, len(rows))
        except WorkersDied as died:
            names = ", ".join(bench.names({rows[place]["key"] for place in died.places}))
            raise UserError(
                f"The worker process died at every attempt (killed, out of memory, or a crash in native code) at cells "
                f"of {names}, and all other cells are stored: leave these contestants out, lower resources.workers so "
                "that each has more memory, or lower comparison.batch_size, for which all cells are made anew."
            ) from died
        progress.update(total)
    return len(rows)


def _rows(bench: _Bench, cells: Sequence[_Cell]) -> list[dict[str, Any]]:
    """Rows of work, with the network evaluations that are foreseen; those that count are counted by the worker."""
    from diffusion_core.diffusion import build_sampler, make_process
    from diffusion_core.stages.work.compare_cell import padded

    process, computed = make_process(bench.bundle.process), padded(bench.images, bench.config.batch_size)
    rows = []
    for cell in cells:
        sampler, guidance = cell.generation.sampler, cell.generation.guidance
        networks = 1 + (guidance.scale not in (0, 1)) + bool(guidance.classifier_scale)
        rows.append(
            {
                "key": cell.key,
                "seed": cell.seed,
                "generation": cell.generation.model_dump(mode="json", exclude={"seed"}),
                "guides": cell.guides,
                "evaluations": networks * build_sampler(sampler, process).evaluations * computed,
            }
        )
    return rows


def _show(found: Comparison, view: Directory) -> None:
    """Write the view: picture and table, and the report last."""
    from diffusion_core.evaluation.chart import picture

    view.create(PICTURE, picture(found))
    view.create(TABLE, document(found, PICTURE).encode())
    view.create_json(REPORT, found.model_dump(mode="json"))


def _found(bench: _Bench, reference: Reference) -> Comparison:
    from diffusion_core.evaluation.report import brief_figures

    held_out = reference.held_out
    config, failed = bench.config, dict[str, str]()
    cells: dict[str, list[dict[str, Any]]] = {}
    for contestant in config.contestants:
        stored = [bench.directory.read_json(cell.key) for cell in bench.cells[contestant.label]]
        if errors := [cell["error"] for cell in stored if "error" in cell]:
            failed[contestant.label] = errors[0]
        else:
            cells[contestant.label] = stored
    of = cells.get(config.reference_name, [])
    standings = [standing(config, each, cells[each.label], of) for each in config.contestants if each.label in cells]
    evaluation = {name: getattr(bench.evaluation, name) for name in ("extractor", "classifier", "neighbours")}
    return Comparison(
        bundle_digest=bundle_digest(bench.bundle_uri),
        images_seen=bench.bundle.images_seen,
        dataset=f"{bench.dataset.name}/{bench.dataset.version}",
        configuration=json.loads(json.dumps(identity({"comparison": config, "evaluation": evaluation}))),
        distance_name=distance_name(bench.evaluation),
        images=bench.images,
        seeds=list(config.all_seeds),
        reference=config.reference_name,
        standings=standings,
        failed=failed,
        floor=Floor(images=len(held_out.values), **brief_figures(reference, held_out, bench.evaluation.neighbours)),
        verdict=verdict(config, standings, failed),
    )
