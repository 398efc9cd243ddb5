"""The manifests that no test can apply: valid, whole, closed to what they need not reach, and as kubectl renders them.

Each check is also tried on a broken copy, where it must find the one thing that was broken.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from tests import kubernetes_checks as checks
from tests.kustomize import LOADER, render

INFRA = Path(__file__).parent.parent.parent / "infra"
FOLDER = INFRA / "kubernetes"
PINS = dict(line.split("==") for line in (INFRA / "constraints.txt").read_text().splitlines() if "==" in line)
OVERLAYS = ("local", "production")
# Named in infra/README.md with how they are made; KubeRay makes `diffusion` itself.
SECRETS = {
    "postgres-passwords": {"postgres", "prefect", "mlflow"},
    "prefect-auth": {"auth-string"},
    "s3-credentials": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "diffusion": {"auth_token"},
}
PATHS = [
    ("prefect-server", "postgres", 5432),
    ("mlflow", "postgres", 5432),
    ("prefect-worker", "prefect-server", 4200),
    ("work-pool", "prefect-server", 4200),
    ("flow-run", "prefect-server", 4200),
    ("ray", "prefect-server", 4200),
    ("flow-run", "mlflow", 5000),
    ("ray", "mlflow", 5000),
    ("flow-run", "ray", 8265),
    ("ray-submit", "ray", 8265),
    ("ray", "ray", 6379),
    ("ray", "ray", 23456),
    ("prefect-worker", None, 6443),
    *((client, None, 443) for client in ("ray", "mlflow", "flow-run", "prefect-server")),
]
CLOSED = [
    *((client, "postgres", 5432) for client in ("flow-run", "ray", "prefect-worker", "work-pool")),
    ("prefect-worker", "mlflow", 5000),
    ("flow-run", "ray", 10001),
    ("flow-run", "ray", 6379),
    ("work-pool", None, 443),
    ("postgres", None, 443),
    ("mlflow", "ray", 8265),
]
Objects = list[dict[str, Any]]


@cache
def _cluster(overlay: str) -> Objects:
    """An overlay, and a run of its own beside it."""
    return [*render(FOLDER / "overlays" / overlay), *render(FOLDER / "ray-job")]


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> Objects:
    return copy.deepcopy(_cluster(request.param))


def _get(objects: Objects, kind: str, name: str) -> Any:
    (found,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def _pod(objects: Objects, kind: str, name: str) -> Any:
    return _get(objects, kind, name)["spec"]["template"]["spec"]


@pytest.mark.parametrize("folder", ["overlays/local", "overlays/production", "ray-job"])
def test_kubectl_renders_the_same(folder: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed; the tests' own renderer stands for it")
    answer = subprocess.run(["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=True)
    theirs = list(yaml.load_all(answer.stdout, LOADER))
    ours = render(FOLDER / folder)
    for each in (*ours, *theirs):
        assert ours.count(each) == theirs.count(each) == 1, f"{each['kind']} {each['metadata']['name']} differs"


def _references(objects: Objects) -> list[str]:
    return checks.against_references(objects, SECRETS)


def _network(objects: Objects) -> list[str]:
    shut = [path for path in PATHS if not checks.may_talk(objects, *path)]
    return [f"{path} is blocked" for path in shut] + [f"{p} is open" for p in CLOSED if checks.may_talk(objects, *p)]


CHECKS = {
    "schemas": checks.against_schemas,
    "references": _references,
    "selectors": checks.against_selectors,
    "network": _network,
    "security": checks.against_security,
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_object_holds(objects: Objects, check: str) -> None:
    assert CHECKS[check](objects) == []


def _misspell(objects: Objects) -> None:
    container = _pod(objects, "Deployment", "mlflow")["containers"][0]
    container["imagePullPolice"] = "Always"


def _misspell_ray(objects: Objects) -> None:
    _get(objects, "RayCluster", "diffusion")["spec"]["authOption"] = {"mode": "token"}


def _misspell_in_ray_pod(objects: Objects) -> None:
    head = _get(objects, "RayJob", "diffusion-digits")["spec"]["rayClusterSpec"]["headGroupSpec"]
    head["template"]["spec"]["tolerance"] = []


def _unknown_secret(objects: Objects) -> None:
    env = _pod(objects, "Deployment", "prefect-server")["containers"][0]["env"]
    env[-1]["valueFrom"]["secretKeyRef"]["name"] = "prefect-password"


def _unknown_key(objects: Objects) -> None:
    env = _pod(objects, "Deployment", "mlflow")["containers"][0]["env"]
    env[-1]["valueFrom"]["secretKeyRef"]["key"] = "password"


def _no_account(objects: Objects) -> None:
    objects.remove(_get(objects, "ServiceAccount", "flow-run"))


def _lost_service(objects: Objects) -> None:
    _get(objects, "Service", "mlflow")["spec"]["selector"] = {"app": "ml-flow"}


def _wrong_port(objects: Objects) -> None:
    _get(objects, "Service", "mlflow")["spec"]["ports"][0]["targetPort"] = "web"


def _blocked(objects: Objects) -> None:
    policy = _get(objects, "NetworkPolicy", "mlflow")["spec"]["ingress"][0]
    policy["from"][0]["podSelector"]["matchExpressions"][0]["values"].remove("ray")


def _open(objects: Objects) -> None:
    objects.remove(_get(objects, "NetworkPolicy", "default-deny"))
    objects.remove(_get(objects, "NetworkPolicy", "dns"))


def _latest(objects: Objects) -> None:
    _pod(objects, "Deployment", "mlflow")["containers"][0]["image"] = "example.com:5000/mlflow:latest"


def _untagged(objects: Objects) -> None:
    _pod(objects, "StatefulSet", "postgres")["containers"][0]["image"] = "example.com:5000/postgres"


def _root(objects: Objects) -> None:
    _pod(objects, "StatefulSet", "postgres")["securityContext"]["runAsUser"] = 0


def _root_container(objects: Objects) -> None:
    _pod(objects, "Deployment", "mlflow")["containers"][0]["securityContext"]["runAsUser"] = 0


def _secret_as_text(objects: Objects) -> None:
    _pod(objects, "Deployment", "mlflow")["containers"][0]["env"][-1] = {"name": "PGPASSWORD", "value": "secret"}


@pytest.mark.parametrize(
    ("check", "harm", "said"),
    [
        ("schemas", _misspell, "imagePullPolice"),
        ("schemas", _misspell_ray, "authOption"),
        ("schemas", _misspell_in_ray_pod, "tolerance"),
        ("references", _unknown_secret, "Secret prefect-password"),
        ("references", _unknown_key, "Secret postgres-passwords password"),
        ("references", _no_account, "no ServiceAccount flow-run"),
        ("selectors", _lost_service, "Service mlflow: selects no pod"),
        ("selectors", _wrong_port, "Service mlflow: no port web"),
        ("network", _blocked, r"\('ray', 'mlflow', 5000\) is blocked"),
        ("network", _open, r"\('postgres', None, 443\) is open"),
        ("security", _latest, "mlflow:latest"),
        ("security", _untagged, "without a fixed tag"),
        ("security", _root, "StatefulSet postgres: runs as root"),
        ("security", _root_container, "Deployment mlflow: runs as root"),
        ("security", _secret_as_text, "secret as text"),
    ],
)
def test_a_broken_copy_is_found(check: str, harm: Callable[[Objects], None], said: str) -> None:
    objects = copy.deepcopy(_cluster("production"))
    harm(objects)
    problems = CHECKS[check](objects)
    assert problems and re.search(said, "\n".join(problems)), problems


def test_the_prefect_worker_takes_the_template_of_a_flow_runs_job(objects: Objects) -> None:
    """What prefect-kubernetes itself makes of it for a run: a valid Job with our image, and no secret as text."""
    image = _pod(objects, "Deployment", "mlflow")["containers"][0]["image"]
    environment = _get(objects, "ConfigMap", "environment")["data"]
    assert environment["DIFFUSION_IMAGE"] == image
    configuration = KubernetesWorkerJobConfiguration(**checks.flow_run_settings(objects))
    configuration.prepare_for_flow_run(FlowRun(name="a-run", flow_id=uuid4()))
    job = configuration.job_manifest
    pod = job["spec"]["template"]["spec"]
    # Prefect insists on these two where Kubernetes does not know them, and passes them over.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    assert checks.against_schemas([{**job, "metadata": {**job["metadata"], "name": "a-run"}}]) == []
    (container,) = pod["containers"]
    assert container["image"] == image and job["spec"]["template"]["metadata"]["labels"]["app"] == "flow-run"
    names = {each["name"]: each for each in container["env"]}
    assert "valueFrom" in names["RAY_AUTH_TOKEN"] and names["PREFECT__FLOW_RUN_ID"]["value"]


def test_ray_matches_the_pins_asks_for_a_token_and_comes_and_goes(objects: Objects) -> None:
    cluster = _get(objects, "RayCluster", "diffusion")["spec"]
    job = _get(objects, "RayJob", "diffusion-digits")["spec"]
    for spec in (cluster, job["rayClusterSpec"]):
        assert spec["rayVersion"] == PINS["ray"] and spec["authOptions"]["mode"] == "token"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and all(it["minReplicas"] == 0 for it in cluster["workerGroupSpecs"])
    assert job["shutdownAfterJobFinishes"]


def test_production_has_gpus_spot_nodes_and_budgets_and_local_needs_neither() -> None:
    groups = {
        overlay: {
            group["groupName"]: group["template"]["spec"]
            for group in _get(_cluster(overlay), "RayCluster", "diffusion")["spec"]["workerGroupSpecs"]
        }
        for overlay in OVERLAYS
    }
    assert groups["local"].keys() == {"cpu"} and "nvidia.com/gpu" not in str(groups["local"])
    assert groups["production"].keys() == {"gpu", "gpu-spot"}
    for name, pod in groups["production"].items():
        keys = {each["key"] for each in pod["tolerations"]}
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1" and "nvidia.com/gpu" in keys
        assert ("diffusion/capacity" in keys) == ("diffusion/capacity" in pod["nodeSelector"]) == (name == "gpu-spot")
    budgets = {it["metadata"]["name"] for it in _cluster("production") if it["kind"] == "PodDisruptionBudget"}
    assert budgets == {"mlflow", "prefect-worker", "postgres", "ray-head"}


def test_local_reaches_its_own_s3() -> None:
    clients = ("ray", "flow-run", "mlflow", "bucket")
    assert all(checks.may_talk(_cluster("local"), client, "s3", 9000) for client in clients)
    assert not checks.may_talk(_cluster("local"), "prefect-worker", "s3", 9000)


def test_the_readme_says_how_every_secret_is_made() -> None:
    readme = (INFRA / "README.md").read_text()
    for name, keys in SECRETS.items():
        assert all(f"`{name}`" in readme and f"`{key}`" in readme for key in keys), name
