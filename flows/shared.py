"""`infra/prefect.yaml`: the pool, its queues, all deployments and automations, for a server that a team shares.

`python -m flows.shared` prints the file. With `--pools` it makes the pool and its queues on the server of
PREFECT_API_URL, which Prefect's own `prefect deploy` does not do; nor does it make automations, which are off until
somebody enables one.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from diffusion_core.stages.config import PipelineConfig
from flows.automations import PREFIX, SHIPPED, WEBHOOK_VARIABLE, Shipped
from flows.runner import prepare_prefect
from flows.stack import pool

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

STORE = "s3://the-store-of-prefect-yaml"
FROM_ENVIRONMENT = "{{ $DIFFUSION_STORE }}"  # what `prefect deploy` puts the variable's value in for
HEADER = """\
# What a shared Prefect server knows of this product: python -m flows.shared > infra/prefect.yaml
#   export PREFECT_API_URL=http://server:4200/api DIFFUSION_STORE=s3://bucket/prefix
#   python -m flows.shared --pools                             # `prefect deploy` makes no pools
#   prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml
#   prefect worker start --pool diffusion --type process       # on each machine that runs flows, with the package
#   diffusion automation enable champion-generates             # the automations are off until they are enabled
"""


def text() -> str:
    """The content of `infra/prefect.yaml`."""
    queues = [{"name": name, "concurrency_limit": limit} for name, limit in pool.LIMITS.items()]
    content = {
        "name": "diffusion",
        "work_pools": [{"name": pool.POOL, "type": "process", "queues": queues}],
        "pull": [],
        "deployments": [_as_values(deployment) for deployment in pool.deployments(STORE)],
        "automations": [_automation(shipped) for shipped in SHIPPED],
    }
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
    return HEADER + body.replace(STORE, f'"{FROM_ENVIRONMENT}"')


def _as_values(deployment: RunnerDeployment) -> dict[str, Any]:
    return {
        "name": deployment.name,
        "entrypoint": deployment.entrypoint,
        "description": deployment.description,
        "tags": list(deployment.tags),
        "parameters": _sparse(deployment.parameters),
        "work_pool": {"name": pool.POOL, "work_queue_name": deployment.work_queue_name},
    }


def _automation(shipped: Shipped) -> dict[str, Any]:
    trigger = shipped.trigger.model_dump(mode="json", exclude_defaults=True)
    trigger = {name: sorted(value) if name in ("expect", "after") else value for name, value in trigger.items()}
    runs = {"deployment": shipped.deployment, "parameters": dict(shipped.parameters)}
    action = {"run": runs} if shipped.deployment else {"call_webhook": f"${WEBHOOK_VARIABLE}"}
    name = PREFIX + shipped.name
    return {"name": name, "enabled": False, "description": shipped.description, "trigger": trigger, **action}


def _sparse(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a configuration has by default: the server would fill it in again."""
    if "config" not in parameters:
        return dict(parameters)
    config = PipelineConfig.model_validate(parameters["config"])
    sparse = config.model_dump(mode="json", exclude_defaults=True)
    return {**parameters, "config": _with_kinds(sparse, config.model_dump(mode="json"))}


def _with_kinds(sparse: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """The field `kind` says which fields its neighbours are, and so stays even where it has its default."""
    kept = {
        name: _with_kinds(value, full[name]) if isinstance(value, dict) else value for name, value in sparse.items()
    }
    return {"kind": full["kind"], **kept} if "kind" in full else kept


def main() -> None:
    """Print infra/prefect.yaml, or make what it describes and `prefect deploy` does not."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pools", action="store_true", help="Make pool and queues on the server of PREFECT_API_URL.")
    options = parser.parse_args()
    prepare_prefect()
    if options.pools:
        asyncio.run(pool.prepare({}))
    else:
        print(text(), end="")


if __name__ == "__main__":
    main()
