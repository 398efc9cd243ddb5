"""Who imports whom: no circles, neither of modules nor of rooms."""

from __future__ import annotations

import grimp
import pytest


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import of the project: at the top of a file, inside a function, and for the types alone."""
    return grimp.build_graph("diffusion_core", "flows", cache_dir=None)


def test_no_two_neighbours_import_each_other(graph: grimp.ImportGraph) -> None:
    """In no package is there a circle of its children, each taken with all that is below it."""
    packages = [module for module in graph.modules if graph.find_children(module)]
    assert len(packages) > 8
    assert {package: found for package in packages if (found := graph.nominate_cycle_breakers(package))} == {}


def test_no_module_needs_the_package_that_loads_it(graph: grimp.ImportGraph) -> None:
    circles = [
        (module, package)
        for package in graph.modules
        for module in graph.find_modules_that_directly_import(package)
        if module.startswith(f"{package}.") and graph.find_shortest_chain(package, module)
    ]
    assert circles == []
