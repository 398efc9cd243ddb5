"""How a bundle becomes a model version, and whether it becomes the champion.

One gate at a time per model, whoever starts it: the lease is in the store. A gate that died is succeeded by the next.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from diffusion_core.bundle import read_bundle_config
from diffusion_core.config import UserError
from diffusion_core.data.shards import open_dataset
from diffusion_core.evaluation.config import Approval, EvaluationConfig, GateConfig
from diffusion_core.evaluation.identity import distance_name
from diffusion_core.jobs.record import mlflow_run_of
from diffusion_core.stages.register import RegisterRequest
from diffusion_core.stages.work.evaluate import Evaluation, check_comparable, evaluate, samples_of
from diffusion_core.store import Directory, layout
from diffusion_core.store.lease import Lease, acquire
from diffusion_core.store.turns import Waiting
from diffusion_core.tracking.approval import Question

_ATTEMPTS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, why in one sentence, the comparison behind it, and whether that took new evaluations."""

    passed: bool
    reason: str
    figures: dict[str, Any]
    computed: bool = True
    question: Question | None = None
    """What a person has to answer first."""


def register(request: RegisterRequest) -> tuple[int, Verdict, bool]:
    """Register the bundle as a version, alias `candidate`; `champion` if the gate lets it pass.

    A bundle that has a version keeps it, and evaluations that are done are found, so that doing it again is quick. That
    is how a gate with `approval: ask` concludes: it ends with a question, and done again it finds the answer.

    Returns:
        The version, what the gate decided, and whether anything was new.
    """
    dataset = open_dataset(request.dataset_uri)
    samples_of(request.evaluation, dataset)
    check_comparable(read_bundle_config(request.bundle_uri), dataset)
    owner = {"model": request.model, "bundle_uri": request.bundle_uri}
    place = Directory(request.store) / layout.gate(request.model)
    with acquire(place, owner, on_wait=Waiting(f"another job is at the gate of {request.model}")) as lease:
        version, created = _register(request)
        verdict, promoted_now = _gate(request, version, lease)
    logger.info("%s version %d: %s", request.model, version, verdict.reason)
    return version, verdict, created or promoted_now or verdict.computed


def _register(request: RegisterRequest) -> tuple[int, bool]:
    from diffusion_core.tracking import CANDIDATE, ServingDefaults, register_version, set_alias

    evaluation = request.evaluation
    defaults = ServingDefaults(
        sampler=evaluation.sampler.model_dump(mode="json"),
        guidance_scale=1.0 if evaluation.guidance.models else evaluation.guidance.scale,  # it is served without them
        batch_size=evaluation.batch_size,
    )
    mlflow_run_id = request.mlflow_run_id or mlflow_run_of(
        request.store, request.bundle_uri, request.model, request.asked_by
    )
    asked = request.asked_by.tags() if request.asked_by else {}
    version, created = register_version(
        request.store, request.model, request.bundle_uri, mlflow_run_id, defaults, asked
    )
    set_alias(request.store, request.model, CANDIDATE, version)
    return version, created


def _gate(request: RegisterRequest, version: int, lease: Lease) -> tuple[Verdict, bool]:
    """Compare with the present champion until it is still the champion when the comparison ends; promote if better."""
    from diffusion_core.tracking import champion, promote, tag_version

    for _ in range(_ATTEMPTS):
        present = champion(request.store, request.model)
        verdict = _decide(request, version, present)
        if verdict.passed and present != version and request.gate.approval is Approval.ASK:
            verdict = _asked(request, version, present, verdict)
        if champion(request.store, request.model) != present:
            continue  # someone promoted or rolled back by hand meanwhile
        if not lease.still_mine():
            raise UserError(
                f"The gate of {request.model!r} was taken over, as this job was silent for long: try again."
            )
        numbers = {name: value for name, value in verdict.figures.items() if not isinstance(value, dict)}
        tags = {f"gate.{name}": value for name, value in numbers.items()} | {"gate": verdict.reason}
        tag_version(request.store, request.model, version, {**verdict.figures.get("candidate", {}), **tags})
        if promoted_now := verdict.passed and present != version:
            promote(request.model, version, request.store)
        return verdict, promoted_now
    raise UserError(f"The champion of {request.model!r} is being changed by someone else all the time: try again.")


def _asked(request: RegisterRequest, version: int, present: int | None, verdict: Verdict) -> Verdict:
    """What a person says of a version that passes by its figures; until then a verdict with a question."""
    from diffusion_core.tracking import approval, resolve_model

    now = datetime.now(UTC)
    candidate, champion = (
        "" if number is None else resolve_model(f"models:/{request.model}/{number}", request.store).digest
        for number in (version, present)
    )
    question, answer = approval.ask(
        request.store,
        Question(
            id=approval.question_id(version, candidate, champion),
            model=request.model,
            version=version,
            champion=present,
            reason=verdict.reason,
            figures=verdict.figures,
            asked_at=now,
            deadline=now + timedelta(hours=request.gate.approval_timeout_h),
        ),
    )
    approval.show(request.store, question, answer)
    if answer is None:
        return replace(verdict, passed=False, question=question, reason=f"{verdict.reason} A person is asked.")
    return replace(verdict, passed=answer.accepted, reason=f"{verdict.reason} {answer.sentence}")


def _decide(request: RegisterRequest, version: int, present: int | None) -> Verdict:
    """The gate: first the accuracy, then the floor (a first champion) or the present champion (every other)."""
    from diffusion_core.tracking import was_rolled_back

    gate = request.gate
    candidate = evaluate(request.store, request.bundle_uri, request.dataset_uri, request.evaluation, request.resources)
    figures: dict[str, Any] = {"candidate": candidate.report["figures"], "floor": candidate.report["floor"]}
    computed = not candidate.reused
    if present == version:
        return Verdict(True, f"Version {version} is the champion.", figures, computed)
    if was_rolled_back(request.store, request.model, version):
        return Verdict(False, "It was champion and was rolled back: only promote brings it back.", figures, computed)
    accuracy = candidate.report["figures"].get("accuracy")
    if gate.min_accuracy is not None and accuracy is not None and accuracy < gate.min_accuracy:
        reason = f"Its conditional accuracy {accuracy:.3f} is below gate.min_accuracy = {gate.min_accuracy:g}."
        return Verdict(False, reason, figures, computed)
    if present is None:
        return first_verdict(candidate, request.evaluation, gate, figures)
    return _against_champion(request, candidate, present, figures)


def first_verdict(
    candidate: Evaluation, config: EvaluationConfig, gate: GateConfig, figures: dict[str, Any]
) -> Verdict:
    """A first champion has nobody to beat: its distance has to be within a multiple of the floor."""
    name = distance_name(config)
    distance, floor = candidate.report["figures"][name], candidate.report["floor"][name]
    limit = gate.first_limit * floor
    compared = f"Fréchet distance {distance:.4g}, limit {limit:.4g} ({gate.first_limit:g} times the floor {floor:.4g})"
    found = {**figures, "limit": limit}
    if distance <= limit:
        return Verdict(True, f"It is the first version within the limit: {compared}.", found, not candidate.reused)
    reason = f"It would be the first champion and is over the limit: {compared}."
    return Verdict(False, reason, found, not candidate.reused)


def _against_champion(
    request: RegisterRequest, candidate: Evaluation, present: int, figures: dict[str, Any]
) -> Verdict:
    """The present champion measured again, on the candidate's dataset, extractor, labels and image ids."""
    from diffusion_core.tracking import resolve_model

    figures = {**figures, "champion_version": present}
    try:
        champion = resolve_model(f"models:/{request.model}/{present}", request.store)
        check_comparable(read_bundle_config(champion.bundle_uri), open_dataset(request.dataset_uri))
    except UserError as error:
        reason = f"The champion, version {present}, cannot be compared with it: {error}"
        return Verdict(False, reason, figures, not candidate.reused)
    other = evaluate(request.store, champion.bundle_uri, request.dataset_uri, request.evaluation, request.resources)
    low, high = difference_interval(request, candidate, other)
    figures |= {"champion": other.report["figures"], "difference_low": low, "difference_high": high}
    interval = f"[{low:.4g}, {high:.4g}] at {request.gate.confidence:.0%} confidence"
    compared = f"its Fréchet distance minus that of the champion, version {present}, is in {interval}"
    computed = not (candidate.reused and other.reused)
    if high < 0:
        return Verdict(True, f"It is better than the champion: {compared}.", figures, computed)
    return Verdict(False, f"It is not surely better than the champion: {compared}.", figures, computed)


def difference_interval(request: RegisterRequest, candidate: Evaluation, champion: Evaluation) -> tuple[float, float]:
    """The paired bootstrap interval of the candidate's Fréchet distance minus the champion's. Needs no torch."""
    import numpy as np

    from diffusion_core.evaluation.distances import paired_bootstrap
    from diffusion_core.evaluation.features import load_reference

    report = candidate.report
    dataset = open_dataset(request.dataset_uri)
    reference = load_reference(dataset, report["extractor"]["digest"], report["samples"])
    differences = paired_bootstrap(
        reference.statistics,
        candidate.features().values,
        champion.features().values,
        request.gate.resamples,
        request.gate.seed,
    )
    tail = (1 - request.gate.confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)
