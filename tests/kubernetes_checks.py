"""What must hold among Kubernetes objects: each check takes those of a whole cluster and says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from prefect.utilities.templating import apply_values
from referencing import Registry, Resource

from tests.kuberay_schema import KINDS, kubernetes

Object = dict[str, Any]
SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.34.0-local-strict"
NO_PROBES = {"Job", "RayCluster", "RayJob"}  # they end, or KubeRay adds probes of its own


@dataclass(frozen=True)
class Pod:
    """A pod that some object makes."""

    owner: str
    kind: str
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]


def pods(objects: list[Object]) -> Iterator[Pod]:
    """The pods of Deployments, StatefulSets and Jobs, of KubeRay's groups, and of the flow runs."""
    for each in objects:
        kind, name = each["kind"], each["metadata"]["name"]
        for role, template in _templates(each):
            by_kuberay = {"ray.io/cluster": name, "ray.io/node-type": role} if kind == "RayCluster" else {}
            labels = template["metadata"]["labels"] | by_kuberay
            yield Pod(f"{kind} {name} {role}".rstrip(), kind, labels, template["spec"])
    run = flow_run_settings(objects)["job_manifest"]["spec"]["template"]
    yield Pod("Job of a flow run", "Job", run["metadata"]["labels"], run["spec"])


def _templates(each: Object) -> Iterator[tuple[str, Object]]:
    spec = each.get("spec", {})
    if each["kind"] in ("Deployment", "StatefulSet", "Job"):
        yield "", spec["template"]
    elif each["kind"] in ("RayCluster", "RayJob"):
        if "submitterPodTemplate" in spec:
            yield "submitter", spec["submitterPodTemplate"]
        cluster = spec.get("rayClusterSpec", spec)
        yield "head", cluster["headGroupSpec"]["template"]
        yield from (("worker", group["template"]) for group in cluster["workerGroupSpecs"])


def flow_run_settings(objects: list[Object]) -> Object:
    """The settings of a flow run's Job, as Prefect fills the base job template where nothing is asked for."""
    data = {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "ConfigMap"}
    text = data["work-pool"]["base-job-template.json"]
    template = json.loads(text.replace("DIFFUSION_IMAGE", data["environment"]["DIFFUSION_IMAGE"]))
    fields = template["variables"]["properties"].items()
    return apply_values(template["job_configuration"], {name: it["default"] for name, it in fields if "default" in it})


@cache
def _validator(kind: str, api_version: str) -> Draft202012Validator:
    group, _, version = api_version.rpartition("/")
    if group == "ray.io":
        schema = KINDS[kind]
    else:
        group = "rbac" if group.startswith("rbac") else group.removesuffix(".k8s.io") or "core"
        schema = kubernetes(f"api.{group}.{version}.{kind}")
    return Draft202012Validator(schema, registry=_definitions())


@cache
def _definitions() -> Registry:
    definitions = Resource.from_contents(json.loads((SCHEMAS / "_definitions.json").read_text()))
    return definitions @ Registry()


def against_schemas(objects: list[Object]) -> list[str]:
    """Unknown, missing and wrongly typed fields."""
    found = []
    for each in objects:
        for error in _validator(each["kind"], each["apiVersion"]).iter_errors(each):
            found.append(f"{_name(each)}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}")
    return found


def against_references(objects: list[Object], secrets: dict[str, set[str]]) -> list[str]:
    """Secrets (with their keys) that nobody documents; ConfigMaps, ServiceAccounts and volumes that do not exist."""
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    there |= {("ServiceAccount", "default")}
    found = []
    for pod in pods(objects):
        wanted = {("ServiceAccount", pod.spec.get("serviceAccountName", "default"))}
        volumes = pod.spec.get("volumes", [])
        wanted |= {("ConfigMap", each["configMap"]["name"]) for each in volumes if "configMap" in each}
        claims = (each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each)
        wanted |= {("PersistentVolumeClaim", claim) for claim in claims}
        keys = {(each["secret"]["secretName"], "") for each in volumes if "secret" in each}
        for container in pod.containers:
            for each in container.get("envFrom", []):
                wanted |= {("ConfigMap", each["configMapRef"]["name"])} if "configMapRef" in each else set()
                keys |= {(each["secretRef"]["name"], "")} if "secretRef" in each else set()
            for each in container.get("env", []):
                if reference := each.get("valueFrom", {}).get("secretKeyRef"):
                    keys |= {(reference["name"], reference["key"])}
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            found += [f"{pod.owner}: no volume {name}" for name in mounted - _volumes(objects, pod)]
        found += [f"{pod.owner}: no {kind} {name}" for kind, name in wanted - there]
        found += [
            f"{pod.owner}: nobody makes the Secret {name} {key}".rstrip()
            for name, key in keys
            if name not in secrets or (key and key not in secrets[name])
        ]
    for each in objects:
        if each["kind"] == "RoleBinding":
            wanted = {(subject["kind"], subject["name"]) for subject in (each["roleRef"], *each["subjects"])}
            found += [f"{_name(each)}: no {kind} {name}" for kind, name in wanted - there]
    return found


def _volumes(objects: list[Object], pod: Pod) -> set[str]:
    names = {each["name"] for each in pod.spec.get("volumes", [])}
    claims = (each["spec"].get("volumeClaimTemplates", []) for each in objects if _name(each) == pod.owner)
    return names | {claim["metadata"]["name"] for templates in claims for claim in templates}


def against_selectors(objects: list[Object]) -> list[str]:
    """Services, budgets and policies that select no pod, ports that no container has, labels that miss a selector."""
    found: list[str] = []
    running = list(pods(objects))
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] == "Service":
            chosen = [pod for pod in running if spec["selector"].items() <= pod.labels.items()]
            ports = {name for pod in chosen for name in _ports(pod)}
            found += [f"{_name(each)}: selects no pod"] * (not chosen)
            found += [
                f"{_name(each)}: no port {it['targetPort']}" for it in spec["ports"] if it["targetPort"] not in ports
            ]
        elif each["kind"] in ("Deployment", "StatefulSet") and not matches(
            spec["selector"], spec["template"]["metadata"]["labels"]
        ):
            found.append(f"{_name(each)}: its selector misses its own pods")
        elif each["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            for selector in _selectors(spec):
                if not any(matches(selector, pod.labels) for pod in running):
                    found.append(f"{_name(each)}: selects no pod by {json.dumps(selector)}")
                found += [
                    f"{_name(each)}: no pod has the label {expression['key']}={value}"
                    for expression in selector.get("matchExpressions", [])
                    for value in expression["values"]
                    if value not in {pod.labels.get(expression["key"]) for pod in running}
                ]
    for pod in running:
        for container in pod.containers:
            probes = [container[name] for name in container if name.endswith("Probe")]
            asked = {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe}
            found += [f"{pod.owner}: a probe asks for port {port}" for port in asked - _ports(pod).keys()]
    return found


def _ports(pod: Pod) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for it in pod.containers for port in it.get("ports", [])}


def _selectors(spec: Object) -> Iterator[Object]:
    yield spec.get("podSelector") or spec.get("selector") or {}
    for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
        for peer in (*rule.get("from", []), *rule.get("to", [])):
            if "podSelector" in peer and "namespaceSelector" not in peer:
                yield peer["podSelector"]


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector with equality and `In` takes a pod."""
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(each["operator"] == "In" for each in expressions)
    return wanted.items() <= labels.items() and all(labels.get(it["key"]) in it["values"] for it in expressions)


def may_talk(objects: list[Object], client: str, server: str | None, port: int) -> bool:
    """Whether pods with the label `app: client` reach those of `server` (None: anything outside) at a TCP port."""
    policies = [each["spec"] for each in objects if each["kind"] == "NetworkPolicy"]
    leaves = _allowed(policies, "Egress", client, server, port)
    return leaves and (server is None or _allowed(policies, "Ingress", server, client, port))


def _allowed(policies: list[Object], direction: str, app: str, peer: str | None, port: int) -> bool:
    field, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    chosen = [it for it in policies if direction in it["policyTypes"] and matches(it["podSelector"], {"app": app})]
    rules = [rule for it in chosen for rule in it.get(field, [])]
    return not chosen or any(_takes(rule.get(side), peer) and _opens(rule.get("ports"), port) for rule in rules)


def _takes(peers: list[Object] | None, app: str | None) -> bool:
    if peers is None:
        return True
    inside = [each["podSelector"] for each in peers if "namespaceSelector" not in each and "podSelector" in each]
    return app is not None and any(matches(selector, {"app": app}) for selector in inside)


def _opens(ports: list[Object] | None, port: int) -> bool:
    return ports is None or any((each["protocol"], each["port"]) == ("TCP", port) for each in ports)


def against_security(objects: list[Object]) -> list[str]:
    """Pods that run as root, hold rights, write to their image, take what they like or are not looked after."""
    found = []
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        holds = {
            "runs as root": context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0,
            "has no seccomp profile": context.get("seccompProfile") == {"type": "RuntimeDefault"},
            "takes settings from the names of Services": pod.spec.get("enableServiceLinks") is False,
            "says nothing of a token": "automountServiceAccountToken" in pod.spec,
        }
        for container in pod.containers:
            own, resources = container.get("securityContext", {}), container.get("resources", {})
            holds |= {
                "may gain privileges": own.get("allowPrivilegeEscalation") is False,
                "runs as root again": own.get("runAsUser", 1) > 0 and own.get("runAsNonRoot", True),
                "keeps capabilities": own.get("capabilities") == {"drop": ["ALL"]},
                "writes to its image": own.get("readOnlyRootFilesystem") is True,
                "asks for no memory or CPU": {"cpu", "memory"} <= resources.get("requests", {}).keys(),
                "has no limit of memory": "memory" in resources.get("limits", {}),
                "has no probes": pod.kind in NO_PROBES or {"readinessProbe", "livenessProbe"} <= container.keys(),
                f"has an image without a fixed tag: {container['image']}": _is_fixed(container["image"]),
                "has a secret as text": not [
                    each
                    for each in container.get("env", [])
                    if each["name"].endswith(("PASSWORD", "TOKEN", "AUTH_STRING", "ROOT_USER")) and "value" in each
                ],
            }
        found += [f"{pod.owner}: {problem}" for problem, well in holds.items() if not well]
    for each in objects:
        if each["kind"] == "Secret":
            found.append(f"{_name(each)}: secrets do not stand in manifests")
        for rule in each.get("rules", []):
            if "*" in (*rule["verbs"], *rule["resources"]) or "secrets" in rule["resources"]:
                found.append(f"{_name(each)}: may do too much: {json.dumps(rule)}")
    return found


def _is_fixed(image: str) -> bool:
    _, colon, tag = image.rpartition("/")[2].partition(":")
    return "@sha256:" in image or (bool(colon) and tag not in ("", "latest"))


def _name(each: Object) -> str:
    return f"{each['kind']} {each['metadata']['name']}"
