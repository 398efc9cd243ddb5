"""The class of an image is a function of its id, and a class that does not exist is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from diffusion_core.config import UserError
from diffusion_core.generation import GenerationConfig
from diffusion_core.generation.labels import resolve_labels

CLASSES = ("cat", "dog", "7")


def labels_of(labels, ids, class_names=CLASSES, **fields):
    return resolve_labels(GenerationConfig(labels=labels, **fields), class_names).of(np.asarray(ids))


def test_balanced_gives_every_class_equally_often():
    assert labels_of("balanced", range(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert labels_of("balanced", [2**61]).dtype == np.int64


def test_a_model_without_classes_has_no_labels():
    assert labels_of("balanced", range(3), class_names=()) is None
    with pytest.raises(UserError, match="no classes"):
        labels_of(["cat"], range(3), class_names=())


def test_listed_labels_are_names_or_numbers_and_repeat():
    assert labels_of(["dog", 0, "2"], range(5)).tolist() == [1, 0, 2, 1, 0]
    assert labels_of(["7"], [0]).tolist() == [2]  # a name comes before a number


@pytest.mark.parametrize("entry", ["bird", 3, -1, "-1", "3", ""])
def test_an_unknown_class_is_named_with_what_is_accepted(entry):
    with pytest.raises(UserError, match=r"generation\.labels.*accepted are cat, dog, 7.*0 to 2"):
        labels_of([entry], [0])


def write_file(folder, kind, entries):
    path = folder / f"classes{kind}"
    if kind == ".parquet":
        pq.write_table(pa.table({"kind": entries}), path)
    elif kind == ".csv":
        path.write_text("id,kind\n" + "".join(f"{n},{entry}\n" for n, entry in enumerate(entries)))
    elif kind == ".jsonl":
        path.write_text("".join(f'{{"kind": "{entry}"}}\n' for entry in entries))
    else:
        path.write_text("\n".join(entries) + "\n\n")
    return str(path)


@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl", ".parquet"])
def test_label_files_mean_the_same_as_a_list_wherever_they_are(tmp_path, kind):
    config = GenerationConfig(labels=write_file(tmp_path, kind, ["dog", "7", "dog"]), label_column="kind")
    from_file = resolve_labels(config, CLASSES)
    assert from_file.of(np.arange(4)).tolist() == [1, 2, 1, 1]
    assert from_file.identity() == resolve_labels(GenerationConfig(labels=["dog", 2, "dog"]), CLASSES).identity()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.txt", None, "does not exist"),
        ("empty.txt", b"\n \n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read"),
        ("broken.jsonl", b"{", "cannot be read"),
        ("broken.parquet", b"PAR1", "cannot be read"),
        ("other.csv", b"a,b\n1,2\n", "no column 'label'"),
        ("float.jsonl", b'{"label": 1.5}\n', "entry 0 .* is 1.5"),
        ("gap.csv", b"label\ncat\nbird\n", "no class 'bird'"),
    ],
)
def test_a_bad_label_file_gets_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        labels_of(str(tmp_path / name), [0])


@pytest.mark.parametrize("labels", ["balansed", [], "classes.xls", ""])
def test_labels_of_no_known_form_are_refused_by_the_configuration(labels):
    with pytest.raises(ValidationError, match="balanced"):
        GenerationConfig(labels=labels)
