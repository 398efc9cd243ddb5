"""The watcher of a stack, `python -m flows.stack.watch --store …`: ends dead runs and their jobs every few seconds."""

from __future__ import annotations

import argparse
import logging
import os
import time

from flows.stack import services
from flows.stack.api import connected

EVERY_S = 10.0

logger = logging.getLogger(__name__)


def watch(store: str) -> None:
    """Settle dead runs for as long as the record of the stack names a watcher."""
    from diffusion_core.jobs.orphans import stop_orphans
    from flows.stack.settle import settle

    with connected(os.environ["PREFECT_API_URL"]) as client:
        while any(service.name == "watcher" for service in services.status(store)):
            try:
                if settle(client, services.running(store, "worker")):
                    stop_orphans(store)
            except Exception as error:  # whatever it is, as a server that is away: the next look may succeed
                logger.warning("The runs could not be looked at: %s", error)
            time.sleep(EVERY_S)


def main() -> None:
    """Watch over the runs of a store's stack."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--store", required=True, help="Root of the store.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    watch(options.store)


if __name__ == "__main__":
    main()
