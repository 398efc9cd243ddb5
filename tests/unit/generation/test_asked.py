"""Who asks for new images keeps the version that an alias named when it first asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from diffusion_core.generation.config import GenerationConfig
from diffusion_core.stages import generate
from diffusion_core.stages.generate import GenerateRequest

CHAMPION = "models:/digits@champion"


def test_an_alias_that_moves_does_not_move_who_asked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = iter(["digits/1", "digits/2"])
    monkeypatch.setattr(generate, "_resolve", lambda model, store: ("", next(versions)))
    request = GenerateRequest(store=str(tmp_path), model=CHAMPION)
    tonight, tomorrow = request.for_new_images("night-1"), request.for_new_images("night-2")
    assert [generate._settled(tonight) for _ in range(2)] == ["models:/digits/1"] * 2
    assert generate._settled(tomorrow) == "models:/digits/2"
    assert generate._settled(tonight) == "models:/digits/1"
    assert generate._settled(request) == CHAMPION


def test_named_ids_and_new_ones_exclude_each_other() -> None:
    named = GenerationConfig(first_image_id=0)
    with pytest.raises(ValidationError, match="first_image_id names some"):
        GenerateRequest(store="s", model=CHAMPION, generation=named, asked="night-1")
    request = GenerateRequest(store="s", model=CHAMPION, generation=named).for_new_images("night-1")
    assert (request.asked, request.generation.first_image_id) == ("night-1", None)
