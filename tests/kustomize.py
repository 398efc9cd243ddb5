"""Renders the subset of kustomize that `infra/kubernetes` uses, so that its objects can be looked at without kubectl.

A field of a kustomization that this subset lacks is refused, never passed over. Where kubectl is installed, a test
compares what it renders with what this module renders.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Object = dict[str, Any]
FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "labels",
    "resources",
    "generatorOptions",
    "configMapGenerator",
    "patches",
    "images",
}
# In a strategic merge the entries of these lists are told apart by a key; other lists are replaced whole.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}


def render(folder: Path) -> list[Object]:
    """The objects of one kustomization, those of the ones below it first."""
    asked = yaml.load((folder / "kustomization.yaml").read_text(), LOADER)
    if unknown := asked.keys() - FIELDS:
        raise ValueError(f"{folder}: the renderer of the tests does not know {sorted(unknown)}.")
    objects = [each for name in asked.get("resources", []) for each in _resource(folder / name)]
    for generator in asked.get("configMapGenerator", []):
        _generate(objects, generator, folder, asked["generatorOptions"])
    for patch in asked.get("patches", []):
        _patch(objects, yaml.load_all((folder / patch["path"]).read_text(), LOADER), patch.get("target"))
    for each in objects:
        if "namespace" in asked and each["kind"] not in CLUSTER_WIDE:
            each["metadata"]["namespace"] = asked["namespace"]
        for label in asked.get("labels", []):
            each["metadata"].setdefault("labels", {}).update(label["pairs"])
        for container in _containers(each):
            container["image"] = _image(container["image"], asked.get("images", []))
    return objects


def _resource(path: Path) -> list[Object]:
    if path.is_dir():
        return render(path)
    # Through JSON: what YAML's anchors share becomes a copy each, as kustomize has it.
    return [json.loads(json.dumps(each)) for each in yaml.load_all(path.read_text(), LOADER)]


def _generate(objects: list[Object], generator: Object, folder: Path, options: Object) -> None:
    if options != {"disableNameSuffixHash": True}:
        raise ValueError(f"{folder}: the renderer of the tests gives ConfigMaps no hash.")
    data = {Path(name).name: (folder / name).read_text() for name in generator.get("files", [])}
    lines = [line for name in generator.get("envs", []) for line in (folder / name).read_text().splitlines()]
    data.update(line.split("=", 1) for line in [*lines, *generator.get("literals", [])] if not line.startswith("#"))
    if generator.get("behavior") == "merge":
        _find(objects, "ConfigMap", generator["name"])["data"].update(data)
    else:
        head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}}
        objects.append({**head, "data": data})


def _patch(objects: list[Object], documents: Iterator[Any], target: Object | None) -> None:
    for document in documents:
        if isinstance(document, list):
            assert target is not None, "a JSON 6902 patch needs its target"
            found = _find(objects, target["kind"], target["name"])
            found.update(jsonpatch.apply_patch(found, document))
        else:
            _merge(_find(objects, document["kind"], document["metadata"]["name"]), document)


def _merge(into: Object, patch: Object) -> None:
    """Strategic merge: mappings by field, known lists by their key, anything else replaced."""
    for field, value in patch.items():
        if value is None:
            into.pop(field, None)
        elif isinstance(value, dict) and isinstance(into.get(field), dict):
            _merge(into[field], value)
        elif isinstance(value, list) and field in MERGE_KEYS and field in into:
            key = MERGE_KEYS[field]
            present = {entry[key]: entry for entry in into[field]}
            for entry in value:
                if entry[key] in present:
                    _merge(present[entry[key]], entry)
                else:
                    into[field].append(copy.deepcopy(entry))
        else:
            into[field] = copy.deepcopy(value)


def _find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def _containers(node: Any) -> Iterator[Object]:
    """Every container at any depth: pods stand inside Deployments, Jobs and the groups of a RayCluster."""
    for field, value in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else []):
        if field in ("containers", "initContainers"):
            yield from value
        else:
            yield from _containers(value)


def _image(image: str, renamed: list[Object]) -> str:
    name, colon, tag = image.rpartition(":") if ":" in image.rpartition("/")[2] else (image, "", "")
    for each in renamed:
        if each["name"] == name:
            return f"{each.get('newName', name)}:{each.get('newTag', tag)}"
    return f"{name}{colon}{tag}"
