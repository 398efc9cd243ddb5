"""Names that people type."""

from __future__ import annotations

import pytest

from diffusion_core.catalog import find
from diffusion_core.config import UserError
from diffusion_core.tracking.connection import client
from tests.small_store import SmallStore, name_of

OLD, NEW, RUN, OTHER, SET = (name_of(word) for word in ("old", "new", "run", "other", "set"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of the digits, two runs, a set, and the model digits, whose first version is the champion."""
    small = SmallStore(tmp_path_factory.mktemp("store"))
    small.dataset("old")
    small.age(days=1)
    small.dataset("new")
    small.run("run", "old")
    small.run("other", "new", bundle=False)
    small.images("set", "run", "old")
    registry = client(small.uri)
    registry.create_registered_model("digits")
    for word in ("run", "nowhere"):
        tags = {"bundle_digest": small.digest(word), "bundle_uri": f"{small.uri}/runs/{name_of(word)}/bundles/64"}
        registry.create_model_version("digits", source=small.uri, tags=tags)
    registry.set_registered_model_alias("digits", "champion", "1")
    return small.uri


@pytest.mark.parametrize(
    ("typed", "version"),
    [("digits", NEW), (f"digits@{OLD}", OLD), (f"digits@{OLD[:6]}", OLD), (f"digits/{OLD[:9]}", OLD)],
)
def test_a_dataset_is_named_by_itself_for_its_newest_version_or_with_a_version(store, typed, version):
    assert find.dataset(typed, store, "--dataset") == f"{store}/datasets/digits/{version}"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("digits@champion", "models:/digits@champion"),
        ("digits@latest", "models:/digits@latest"),
        ("digits/1", "models:/digits/1"),
        ("models:/digits/1", "models:/digits/1"),
        (RUN, None),
        (RUN[:6], None),
    ],
)
def test_a_model_is_named_by_alias_version_or_run(store, typed, meant):
    bundle = f"{store}/runs/{RUN}/bundles/64"
    assert find.model_reference(typed, store) == (meant or bundle)


def test_the_latest_version_is_the_highest(store):
    from diffusion_core.tracking.models import find_version

    assert find_version("models:/digits@latest", store).version == 2


@pytest.mark.parametrize(
    ("typed", "what", "place"),
    [
        (SET[:7], "image set", f"images/{SET}"),
        ("digits", "dataset version", f"datasets/digits/{NEW}"),
        (f"digits@{OLD[:6]}", "dataset version", f"datasets/digits/{OLD}"),
        (RUN, "bundle", f"runs/{RUN}/bundles/64"),
    ],
)
def test_where_anything_may_be_named_it_is_found(store, typed, what, place):
    assert find.anything(typed, store) == find.Found(what, f"{store}/{place}")
    assert find.anything(f"{store}/{place}", store) == find.Found(what, f"{store}/{place}")


@pytest.mark.parametrize(
    ("look", "typed", "said"),
    [
        ("dataset", "digit", "has no such dataset; the nearest name is digits"),
        ("dataset", "digits@champion", f"no version champion; the versions are: .*{OLD}"),
        ("dataset", f"digits@{OLD[:5]}", "give at least 6 characters"),
        ("run", RUN[:5], f"is the beginning of {RUN}: give at least 6 characters"),
        ("run", RUN[:-1] + "x", f"There is no run {RUN[:-1]}x; the nearest name is {RUN}"),
        ("bundle_uri", "digitz@champion", "no registered model 'digitz'; registered are: digits"),
        ("bundle_uri", "digits@champ", "no alias 'champ'; its aliases are: champion"),
        ("bundle_uri", "digits", "There is no run digits; the nearest name is digits/"),
        ("bundle_uri", OTHER[:6], f"The run {OTHER} has no bundle yet"),
        ("image_set", f"{SET[:8]}x", f"the nearest name is {SET}"),
        ("anything", "digist", "nearest name is digits"),
    ],
)
def test_a_name_that_names_nothing_is_one_sentence_that_says_what_there_is(store, look, typed, said):
    with pytest.raises(UserError, match=said):
        find.dataset(typed, store, "--dataset") if look == "dataset" else getattr(find, look)(typed, store)


def test_a_beginning_of_two_names_neither(tmp_path):
    small = SmallStore(tmp_path)
    for run in ("abcdef0123456789", "abcdef0000000000"):
        small.root.create_json(f"runs/{run}/run.json", {})
    with pytest.raises(UserError, match="abcdef0 is the beginning of abcdef0000000000, abcdef0123456789"):
        find.run("abcdef0", small.uri)
    assert find.run("abcdef01", small.uri).name == "abcdef0123456789"
