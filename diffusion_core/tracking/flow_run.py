"""Which Prefect flow run asked for some work: tags of what MLflow records of it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from diffusion_core.config import Config

_LISTED = 100  # a tag of MLflow holds so many ids and more


class FlowRun(Config):
    """A Prefect flow run, as others are told of it."""

    id: str
    name: str | None = None
    deployment: str | None = Field(None, description="Flow and deployment, as diffusion-pipeline/digits.")
    url: str | None = Field(None, description="Its page, if its server is known to have one.")

    def tags(self, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """Tags that name this flow run, for something that has the tags `known`.

        Of work that several flow runs continue they name the newest, and `prefect.flow_run_ids` all of them, in order.
        """
        known = known or {}
        earlier = known.get("prefect.flow_run_ids", "").split()
        ids = earlier if self.id in earlier else [*earlier, self.id]
        if len(ids) > _LISTED:
            ids = [ids[0], *ids[1 - _LISTED :]]
        named = {
            "prefect.flow_run_id": self.id,
            "prefect.flow_run_name": self.name,
            "prefect.flow_run_url": self.url,
            "prefect.deployment": self.deployment,
            "prefect.flow_run_ids": " ".join(ids),
        }
        return {key: value or "" for key, value in named.items() if value or key in known}
