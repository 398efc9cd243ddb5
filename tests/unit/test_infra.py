"""The files that nobody can run here are at least whole, consistent with the code, and closed to the outside."""

from __future__ import annotations

import json
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


def test_prefect_yaml_is_what_the_code_makes() -> None:
    from flows import shared

    assert (INFRA / "prefect.yaml").read_text() == shared.text(), "run: python -m flows.shared > infra/prefect.yaml"


def test_prefect_yaml_means_the_deployments_of_the_stack() -> None:
    from diffusion_core.stages.config import PipelineConfig
    from flows.stack import pool

    written = {item["name"]: item for item in _yaml("prefect.yaml")["deployments"]}
    for deployment in pool.deployments("{{ $DIFFUSION_STORE }}"):
        item = written[str(deployment.name)]
        assert item["work_pool"] == {"name": pool.POOL, "work_queue_name": deployment.work_queue_name}
        if "config" in item["parameters"]:
            meant, said = (
                PipelineConfig.model_validate(each["config"]) for each in (item["parameters"], deployment.parameters)
            )
            assert meant.model_copy(update={"store": ""}) == said.model_copy(update={"store": ""})


def test_the_dashboard_shows_metrics_that_jobs_have() -> None:
    """Those that jobs write, all of them, under the names that Ray gives them; in panels of Grafana's schema."""
    from diffusion_core.jobs.cluster.metrics import DESCRIPTIONS, LABELS, Counter, Gauge

    text = (INFRA / "grafana" / "diffusion.json").read_text()
    board = json.loads(text)
    there = {f"ray_{counter}_total" for counter in Counter} | {f"ray_{gauge}" for gauge in Gauge}
    assert {*Counter, *Gauge} == DESCRIPTIONS.keys()
    assert set(re.findall(r"ray_diffusion_\w+", text)) - {"ray_diffusion_"} == there
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert board["schemaVersion"] >= 36 and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["title"] and panel["type"] == "timeseries" and panel["gridPos"].keys() == {"h", "w", "x", "y"}
        for target in [panel, *panel["targets"], *[v for v in variables.values() if v["type"] == "query"]]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert set(re.findall(r"(\w+)=~", target["expr"])) <= set(LABELS)
