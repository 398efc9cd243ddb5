"""Identity and execution fields, digests, and the one sentence about a bad value."""

import json
import subprocess
import sys

import pytest
from pydantic import Field, ValidationError

from diffusion_core.config import Config, digest, execution, explain, identity


class Inner(Config):
    width: int = Field(8, ge=1, description="Width.")
    workers: int = execution(2, ge=1, description="Workers.")


class Outer(Config):
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    where: str | None = execution(None)


class Newer(Inner):
    algorithm_version = 2


def test_identity_leaves_execution_fields_out_at_every_depth():
    assert identity(Outer()) == {
        "algorithm_version": 1,
        "inner": {"algorithm_version": 1, "width": 8},
        "sizes": [1, 2],
    }


def test_digest_changes_with_identity_fields_only():
    base = digest(Outer(), "input")
    assert digest(Outer(inner=Inner(workers=64), where="elsewhere"), "input") == base
    assert digest(Outer(inner=Inner(width=9)), "input") != base
    assert digest(Outer(), "another input") != base
    assert digest(Outer(sizes=(2, 1)), "input") != base


def test_digest_changes_with_the_algorithm_version():
    assert digest(Inner()) != digest(Newer())


def test_digest_is_the_same_in_another_process():
    code = "from diffusion_core.config import digest; print(digest({'b': 1, 'a': [2, 'é']}, 0.1))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest({"a": [2, "é"], "b": 1}, 0.1)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError):
        Outer().sizes = (3,)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"inner": {"width": 0}}, "inner.width: 0 is not accepted: input should be greater than or equal to 1."),
        ({"speling": 1}, "speling: there is no such field."),
        ({"inner": {"width": "x"}, "no": 1}, "inner.width: 'x' is not accepted"),
    ],
)
def test_explain_names_field_value_and_what_is_accepted(values, sentence):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json(json.dumps(values))
    assert explain(caught.value).startswith(sentence)
    assert "\n" not in explain(caught.value)
