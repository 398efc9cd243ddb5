"""What a comparison of samplers makes of its cells: means, paired ratios, the verdict, table and plot."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy.stats import ttest_1samp

from diffusion_core.config import UserError, digest
from diffusion_core.diffusion.config import ProcessConfig, SamplerKind
from diffusion_core.evaluation.chart import picture
from diffusion_core.evaluation.comparison import (
    Comparison,
    Floor,
    Mean,
    check_contestants,
    document,
    paired_ratio,
    standing,
    table,
    verdict,
)
from diffusion_core.evaluation.config import ComparisonConfig, Contestant

REFERENCE = [2.0, 2.2, 1.9, 2.1, 2.4]
DISTANCES = {"ddpm:250": REFERENCE, "heun:4": [2.1, 2.1, 2.0, 2.0, 2.5], "ddim:5@1": [4.0, 4.1, 3.8, 4.4, 4.6]}


def cells(name: str, accuracy: bool = True) -> list[dict[str, float]]:
    evaluations = {"ddpm:250": 500.0, "heun:4": 14.0, "ddim:5@1": 5.0}[name]
    cell = {"evaluations": evaluations, "precision": 0.9, "recall": 0.8} | ({"accuracy": 0.99} if accuracy else {})
    return [{**cell, "distance": distance} for distance in DISTANCES[name]]


def config(**changes: Any) -> ComparisonConfig:
    fields = {"contestants": list(DISTANCES), "candidate": "heun:4", "seeds": 5, "guidance": {"scale": 1.5}}
    return ComparisonConfig.model_validate({**fields, **changes})


def comparison(accuracy: bool = True, **changes: Any) -> Comparison:
    asked, failed = config(**changes), {"ddpm:9": "the network gave infinite or undefined values for image 3"}
    of = cells(asked.reference_name, accuracy)
    standings = [standing(asked, each, cells(each.label, accuracy), of) for each in asked.contestants]
    return Comparison(
        bundle_digest="b" * 16,
        images_seen=96_000,
        dataset="digits/d1",
        configuration={},
        distance_name="frechet_distance",
        images=359,
        seeds=[0, 1, 2, 3, 4],
        reference=asked.reference_name,
        standings=standings,
        failed=failed,
        floor=Floor(images=100, distance=1.5, precision=0.89, recall=0.93, accuracy=0.98 if accuracy else None),
        verdict=verdict(asked, standings, failed),
    )


def test_contestants_as_text_and_as_fields_are_the_same():
    short = Contestant.model_validate("unipc:7:linspace@1.25")
    fields = {"sampler": {"kind": "unipc", "steps": 7, "spacing": "linspace"}, "guidance": {"scale": 1.25}}
    assert short == Contestant.model_validate(fields)
    assert short.label == "unipc:7:linspace@1.25"
    named = Contestant.model_validate({**fields, "name": "mine"})
    assert named.label == "mine" and digest(named) == digest(short)
    assert Contestant.model_validate("ddim:25").label == "ddim:25"
    for wrong in ("ddim", "ddim:", "ddim:x", ":5", "ddim:5@", "ddim:5:", "ddim:5 "):
        with pytest.raises(ValidationError, match="KIND:STEPS"):
            Contestant.model_validate(wrong)
    with pytest.raises(ValidationError, match="euclid"):
        Contestant.model_validate("euclid:5")


def test_the_grid_has_every_sampler():
    default = ComparisonConfig()
    assert {each.sampler.kind for each in default.contestants} == set(SamplerKind)
    assert default.reference_name == "ddpm:250" and default.candidate is None
    assert config(first_seed=7).all_seeds == range(7, 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"candidate": "heun:5"}, "the candidate heun:5 is not among the contestants"),
        ({"reference": "ddpm:25"}, "the reference ddpm:25 is not among"),
        ({"contestants": ["ddim:5", "ddim:5"]}, "two contestants are called ddim:5"),
        ({"contestants": []}, "at least 1"),
        ({"reference": "heun:4"}, "samples exactly as the reference heun:4.*: name another reference"),
        ({"candidate": "ddpm:250"}, "samples exactly as the reference ddpm:250.*: name another reference"),
        (
            {"candidate": "heun:4@1.5", "contestants": ["heun:4", "heun:4@1.5"]},
            "samples exactly as the reference heun:4,",
        ),
        ({"seeds": 0}, "greater than or equal to 1"),
    ],
)
def test_who_does_not_take_part_is_told(changes, words):
    with pytest.raises(ValidationError, match=words):
        config(**changes)


def test_series_differ_in_steps_alone():
    """Where anything else differs, the series does, and the default name."""
    inside = {"scale": 1.5, "min_log_snr": -2}
    fields = [
        *[{"sampler": {"kind": "ddim", "steps": steps, "eta": eta}} for eta in (0, 0.5, 1) for steps in (5, 7)],
        {"sampler": {"kind": "heun", "steps": 5, "churn": 40, "spacing": "linspace"}},
        {"sampler": {"kind": "ddim", "steps": 5}, "guidance": inside},
        {"sampler": {"kind": "ddim", "steps": 5}, "guidance": {**inside, "max_log_snr": 3.5, "rescale": 0.7}},
        *[{"sampler": {"steps": 5}, "name": uri, "guidance": {"scale": 2, "guide": uri}} for uri in ("/a", "/b")],
        {"sampler": {"steps": 7}, "name": "/b again", "guidance": {"scale": 2, "guide": "/b"}},
    ]
    asked = config(contestants=fields, candidate=None)
    cell = [{"evaluations": 5.0, "distance": 2.0, "precision": 0.9, "recall": 0.8}]
    found = [standing(asked, each, cell, cell) for each in asked.contestants]
    labels = ["ddim:5", "ddim:7", "ddim:5:eta=0.5", "ddim:7:eta=0.5", "ddim:5:eta=1", "ddim:7:eta=1"]
    labels += ["heun:5:linspace:churn=40", "ddim:5@1.5:min_log_snr=-2"]
    labels += ["ddim:5@1.5:rescale=0.7:min_log_snr=-2:max_log_snr=3.5", "/a", "/b", "/b again"]
    assert [each.name for each in found] == labels
    assert [each.series for each in found] == [
        *["ddim, guidance 1.5"] * 2,
        *["ddim, eta=0.5, guidance 1.5"] * 2,
        *["ddim, eta=1, guidance 1.5"] * 2,
        "heun, linspace, churn=40, guidance 1.5",
        "ddim, guidance 1.5 in part (log-SNR from -2)",
        "ddim, guidance 1.5 in part (log-SNR from -2 to 3.5, rescale=0.7)",
        "ddim, guidance 2 by guide",
        *["ddim, guidance 2 by guide (2)"] * 2,
    ]
    assert found[7].guidance == found[8].guidance == "1.5 in part"


def test_contestants_have_to_suit_the_model():
    check_contestants(config(), ProcessConfig(), ["a", "b"])
    with pytest.raises(UserError, match=r"ddpm:250: sampler\.steps: 250 is more than the 100 timesteps"):
        check_contestants(config(), ProcessConfig(timesteps=100), ["a", "b"])
    with pytest.raises(UserError, match=r"ddpm:250: guidance\.scale: 1.5 is not accepted for a model without classes"):
        check_contestants(config(), ProcessConfig(), [])
    flow = ProcessConfig(schedule="flow", prediction="flow")
    with pytest.raises(UserError, match=r"ddim:5:karras: sampler\.spacing"):
        check_contestants(config(contestants=["ddim:5:karras"], candidate=None), flow, ["a"])


def test_the_bound_of_a_ratio_is_what_the_paired_t_test_says():
    """At the bound, a one-sided test of the paired logarithms has a p-value of exactly 5 %."""
    found = paired_ratio(DISTANCES["heun:4"], REFERENCE)
    logs = np.log(np.array(DISTANCES["heun:4"]) / REFERENCE)
    # By hand: the logarithms' mean is 0.0091191, their standard deviation 0.0519777, the mean's error 0.0232451; with 4
    # degrees of freedom the quantiles of t are 2.13185 and 2.77645.
    assert math.log(found.ratio) == pytest.approx(0.0091191, abs=1e-6)
    assert math.log(found.bound) == pytest.approx(0.0586742, abs=1e-6)
    assert math.log(found.high) == pytest.approx(0.0736579, abs=1e-6)
    assert ttest_1samp(logs, math.log(found.bound), alternative="less").pvalue == pytest.approx(0.05)
    interval = ttest_1samp(logs, 0).confidence_interval(0.95)
    assert np.log([found.low, found.high]) == pytest.approx([interval.low, interval.high])


def test_what_seeds_have_in_common_cancels():
    """Seeds that differ by much, but by the same factor for both, leave no doubt about the ratio."""
    factors = np.array([0.5, 1.0, 2.0, 4.0])
    found = paired_ratio(list(3.0 * factors), list(2.0 * factors))
    assert (found.ratio, found.low, found.bound) == pytest.approx((1.5, 1.5, 1.5))


def test_one_seed_has_no_bound_and_no_distance_no_ratio():
    alone = paired_ratio([3.0], [2.0])
    assert (alone.ratio, alone.low, alone.high, alone.bound) == (pytest.approx(1.5), None, None, None)
    assert paired_ratio([0.0, 1.0], [1.0, 1.0]) is None
    assert Mean.of([3.0]).error is None
    assert Mean.of([1.0, 2.0, 3.0]).error == pytest.approx(1 / math.sqrt(3))


def test_the_verdict_goes_by_the_bound():
    bound = paired_ratio(DISTANCES["heun:4"], REFERENCE).bound
    found = comparison(limit=bound + 1e-9).verdict
    assert found.within and found.bound == bound and "is within the limit" in found.sentence
    found = comparison(limit=bound - 1e-9).verdict
    assert not found.within and "not shown with 5 seeds" in found.sentence
    found = comparison(candidate="ddim:5@1").verdict
    assert not found.within and "that alone is above the limit 1.05" in found.sentence
    assert comparison(candidate=None).verdict is None

    asked = config(contestants=["ddpm:250", "heun:4"])
    standings = [standing(asked, each, cells(each.label)[:1], cells("ddpm:250")[:1]) for each in asked.contestants]
    assert not verdict(asked, standings, {}).within and "use more seeds" in verdict(asked, standings, {}).sentence
    assert verdict(asked, standings[1:], {"ddpm:250": "bad"}) is None


def test_the_table_has_everything():
    lines = table(comparison()).splitlines()
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines[:6])
    }
    assert rows["sampler"] == [
        *("guidance", "evaluations", "Fréchet distance", "ratio to ddpm:250 (95 %)", "precision", "recall", "accuracy")
    ]
    assert rows["ddpm:250"][:4] == ["1.5", "500", "2.120 ± 0.086", "1.000"]
    assert rows["**heun:4**"][:4] == ["1.5", "14", "2.140 ± 0.093", "1.009 (0.946–1.076)"]
    assert rows["ddim:5@1"][0] == "1" and rows["ddim:5@1"][4:] == ["0.900 ± 0.000", "0.800 ± 0.000", "0.990 ± 0.000"]
    assert rows["held-out real images (N = 100)"] == ["–", "–", "1.500", "–", "0.890", "0.930", "0.980"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "ddpm:9 failed: the network gave infinite" in lines[-1]
    text = document(comparison(), "comparison.png")
    assert "359 images for each of 5 seeds (0 to 4)" in text and "![" in text and comparison().verdict.sentence in text
    assert "| –" in table(comparison(accuracy=False)).splitlines()[2]


@pytest.mark.parametrize("accuracy", [True, False])
def test_the_plot_is_a_small_picture(accuracy):
    data = picture(comparison(accuracy))
    assert len(data) < 300_000
    shown = Image.open(io.BytesIO(data))
    assert shown.format == "PNG" and shown.width >= 900
    assert len(set(shown.convert("RGB").get_flattened_data())) > 50
    assert picture(comparison(accuracy)) == data
