"""Schedules as configuration: what is accepted, what is said about what is not, and that overrides stay sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_core.config import UserError
from diffusion_core.stages.overrides import by_path, resolve
from diffusion_core.stages.settings import load_config
from flows.schedules.config import IfRunning, What, load_schedule, shipped

DAILY = {"name": "nightly", "preset": "digits", "cron": "0 2 * * *"}


def test_a_file_is_the_start_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "nightly.yaml"
    file.write_text(
        "name: nightly\npreset: digits\ncron: 0 2 * * *\ntime_zone: Europe/Berlin\nif_running: cancel\n"
        "overrides:\n  training: {images: 2000}\n  generation.count: 5\n"
    )
    given = {"interval": "20s", "overrides": {"generation.count": 7}, "what": None}
    schedule = load_schedule(str(file), given)
    assert (schedule.what, schedule.if_running, schedule.cron) == (What.pipeline, IfRunning.cancel, None)
    assert schedule.interval_s == 20
    assert schedule.overrides == {"training.images": 2000, "generation.count": 7}


def test_the_schedules_of_the_package_are_accepted(tmp_path: Path) -> None:
    assert {"digits-nightly", "digits-images", "prune-weekly"} <= set(shipped())
    for name in shipped():
        schedule = load_schedule(name, {})
        assert schedule.name == name
        if schedule.what is not What.prune:
            resolve(schedule.preset, schedule.overrides, str(tmp_path))
    assert load_schedule("digits-images", {}).makes_new_images


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"time_zone": "Europe/Berlinn"}, "time_zone: 'Europe/Berlinn' is not accepted: .*Europe/Berlin"),
        ({"interval": "20s"}, "either cron"),
        ({"cron": None}, "either cron"),
        ({"cron": None, "interval": "soon"}, "interval soon: it is not a time"),
        ({"cron": None, "interval": "0s"}, "interval: '0s' is not accepted"),
        ({"if_running": "wait"}, "if_running: 'wait' is not accepted: .*'skip', 'queue' or 'cancel'"),
        ({"what": "train"}, "what: 'train' is not accepted"),
        ({"name": "Nightly Run"}, "name: 'Nightly Run' is not accepted"),
        ({"model": "models:/digits@champion"}, "model is of generate alone"),
        ({"new_images": True, "overrides": {"generation.first_image_id": 0}}, "exclude each other"),
    ],
)
def test_a_mistake_is_one_sentence_about_its_field(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_schedule(None, DAILY | given)
    assert "\n" not in str(caught.value)


def test_text_and_mapping_are_the_same_overrides() -> None:
    text = "training.images: 2000\ngeneration:\n  sampler: {kind: ddim, steps: 7}\n"
    fields = {"training": {"images": 2000}, "generation.sampler": {"kind": "ddim", "steps": 7}}
    flat = {"training.images": 2000, "generation.sampler.kind": "ddim", "generation.sampler.steps": 7}
    assert by_path(text) == by_path(fields) == flat
    several = "# shorter\n  training.images = 2000\n\ngeneration.sampler: {kind: ddim,\n    steps: 7}\n"
    assert by_path(several) == flat and by_path("") == {}
    for wrong, said in (("training.images: 1\ntraining.images: 2", "given twice"), (["a"], "give fields and values")):
        with pytest.raises(UserError, match=f"^overrides.*{said}"):
            by_path(wrong)


def test_a_later_change_of_the_preset_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusion_core.stages import settings

    store, overrides = str(tmp_path), {"training.images": 2000}
    before = resolve("digits", overrides, store)
    preset = load_config("digits")
    assert before.training == preset.training.model_copy(update={"images": 2000})

    values = settings.preset_values("digits")
    values["training"] |= {"images": 1, "batch_size": 64}
    monkeypatch.setattr(settings, "preset_values", lambda name: values)
    after = resolve("digits", overrides, store)
    assert (after.training.images, after.training.batch_size) == (2000, 64)


def test_a_wrong_override_names_the_nearest_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^overrides training.batchsize: .*did you mean .*training.batch_size"):
        resolve("digits", "training.batchsize: 3", str(tmp_path))
    with pytest.raises(UserError, match=r"^training.batch_size: 0 is not accepted"):
        resolve("digits", "training.batch_size: 0", str(tmp_path))
    with pytest.raises(UserError, match=r"^overrides training.batch_size: give a field and a value"):
        resolve("digits", "training.batch_size", str(tmp_path))
