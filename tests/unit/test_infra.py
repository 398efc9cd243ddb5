"""The files that nobody can run here are at least whole, consistent with the code, and closed to the outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parent.parent.parent / "infra"


def _yaml(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def test_compose_publishes_on_loopback_alone_and_holds_no_secret() -> None:
    services = _yaml("compose.yaml")["services"]
    assert {"s3", "prefect", "mlflow", "deployments"} <= services.keys()
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|USER|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), f"{name} must be asked for, without a default"
        assert set(service.get("depends_on", [])) <= services.keys()


def test_every_variable_of_compose_is_in_the_example_and_secrets_are_left_empty() -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (INFRA / "compose.yaml").read_text()))
    lines = (INFRA / "compose.env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert asked and asked <= example.keys()
    assert set(example.values()) == {""}
    assert "/infra/compose.env" in (INFRA.parent / ".gitignore").read_text().splitlines()


def test_the_image_copies_what_is_there() -> None:
    lines = (INFRA / "Containerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    allowed = (INFRA.parent / ".dockerignore").read_text().splitlines()
    for source in copied:
        assert (INFRA.parent / source).exists(), source
        assert f"!{source}" in allowed, source
    assert any(line.startswith("USER ") and line != "USER root" for line in lines)
    assert any("pip install -c infra/constraints.txt '.[kubernetes]'" in line for line in lines)


@pytest.mark.parametrize("name", ["Containerfile", "compose.yaml", "kubernetes/"])
def test_the_readme_says_what_was_never_run(name: str) -> None:
    (row,) = (line for line in (INFRA / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert re.search("never (built|started|applied) yet", row)
