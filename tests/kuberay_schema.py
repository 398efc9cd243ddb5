"""The kinds of KubeRay, with the fields of its CustomResourceDefinitions ray.io/v1 as of KubeRay 1.5.1.

The published definitions repeat the schema of a pod in 700 kB each; here a pod template points to Kubernetes' own.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}


def kubernetes(name: str) -> Schema:
    return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.{name}"}


def _object(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": fields}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


POD = kubernetes("api.core.v1.PodTemplateSpec")
HEAD_GROUP = _object(
    ("rayStartParams", "template"),
    serviceType=STRING,
    headService=kubernetes("api.core.v1.Service"),
    enableIngress=BOOLEAN,
    resources=STRINGS,
    labels=STRINGS,
    rayStartParams=STRINGS,
    template=POD,
)
WORKER_GROUP = _object(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=STRING,
    suspend=BOOLEAN,
    replicas=INTEGER,
    minReplicas=INTEGER,
    maxReplicas=INTEGER,
    numOfHosts=INTEGER,
    idleTimeoutSeconds=INTEGER,
    resources=STRINGS,
    labels=STRINGS,
    rayStartParams=STRINGS,
    template=POD,
)
AUTOSCALER = _object(
    version=_one_of("v1", "v2"),
    resources=kubernetes("api.core.v1.ResourceRequirements"),
    image=STRING,
    imagePullPolicy=STRING,
    env={"type": "array", "items": kubernetes("api.core.v1.EnvVar")},
    envFrom={"type": "array", "items": kubernetes("api.core.v1.EnvFromSource")},
    volumeMounts={"type": "array", "items": kubernetes("api.core.v1.VolumeMount")},
    securityContext=kubernetes("api.core.v1.SecurityContext"),
    idleTimeoutSeconds=INTEGER,
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
)
CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=STRING,
    suspend=BOOLEAN,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=AUTOSCALER,
    authOptions=_object(mode=_one_of("disabled", "token")),
    headServiceAnnotations=STRINGS,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
)
JOB = _object(
    activeDeadlineSeconds=INTEGER,
    backoffLimit=INTEGER,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
    submitterConfig=_object(backoffLimit=INTEGER),
    metadata=STRINGS,
    clusterSelector=STRINGS,
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=STRING,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    ttlSecondsAfterFinished=INTEGER,
    shutdownAfterJobFinishes=BOOLEAN,
    suspend=BOOLEAN,
)


def _kind(name: str, spec: Schema) -> Schema:
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": name}}
    metadata = kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta")
    return _object(("apiVersion", "kind", "metadata", "spec"), **head, metadata=metadata, spec=spec)


KINDS = {"RayCluster": _kind("RayCluster", CLUSTER), "RayJob": _kind("RayJob", JOB)}
