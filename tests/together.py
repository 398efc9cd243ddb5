"""Which test files run in one process, where several run beside each other: each alone, but those that share services.

A session's fixture is made in each process that has a test of it, so that files which look at the same pipeline run, or
use the same stack, would each start their own.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

SHARED = {
    "the first run of the pipeline": ("test_pipeline.py", "test_plan.py", "test_verbs.py"),
    "the stack": ("test_browser.py", "test_stack.py"),
}
TOGETHER = {f"tests/integration/{file}": service for service, files in SHARED.items() for file in files}


class Together(LoadScopeScheduling):
    """Hands the tests of a file, or of files that share a service, to one process in their order."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return TOGETHER.get(path, path)
