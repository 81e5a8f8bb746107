"What a file says against a declared dataclass: a record, or one line with file and key."

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.workshop.files import write_tensors
from cpsample.workshop.records import as_json, plain, read_json, read_record, read_tensors


@dataclass
class Inner:
    steps: int
    shape: tuple[int, ...] = ()
    lr: float = 0.1
    options: dict = field(default_factory=dict)


@dataclass
class Outer:
    name: str
    inner: Inner
    size: int | None = None
    parts: list[Inner] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


GOOD = {"name": "a", "inner": {"steps": 5, "shape": [1, 2], "options": {"any": [None]}}}


def changed(**values):
    return GOOD | {"inner": GOOD["inner"] | values}


def test_a_good_record_comes_back_with_its_types():
    record = read_record(Outer, json.loads(json.dumps(GOOD)), "f")
    assert record == Outer("a", Inner(5, (1, 2), options={"any": [None]}))
    assert read_record(Outer, changed(lr=1), "f").inner.lr == 1.0


@pytest.mark.parametrize(
    "data, key",
    [
        *[(wrong, "expected `object`") for wrong in (None, [], 3, "text", True)],
        ({}, "`name`"),
        ({"name": "a"}, "`inner`"),
        ({"inner": GOOD["inner"], "name": 3}, "`name`"),
        (changed(steps="5"), "`inner.steps`"),
        (changed(steps=True), "`inner.steps`"),
        (changed(steps=1.5), "`inner.steps`"),
        (changed(steps=None), "`inner.steps`"),
        (changed(shape=3), "`inner.shape`"),
        (changed(shape=[1, "2"]), "inner.shape[1]"),
        (changed(options=[]), "`inner.options`"),
        (changed(lr=10**400), "`inner.lr`"),
        (changed(width=8), "unknown inner.width"),
        (GOOD | {"more": 1}, "unknown more"),
        (GOOD | {"counts": {"a": "b"}}, "`counts[...]`"),
        (GOOD | {"parts": [{}]}, "parts[0]"),
    ],
)
def test_anything_else_is_one_line_with_file_and_key(data, key):
    with pytest.raises(ValueError) as caught:
        read_record(Outer, data, "folder/run.json")
    message = str(caught.value)
    assert message.startswith("folder/run.json ") and key in message and "\n" not in message


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", b"\xff\xfe\x00", "[" * 100_000, '{"a": }'])
def test_a_text_that_is_no_json_names_its_file(text):
    with pytest.raises(ValueError, match="^run.json holds no JSON: ") as caught:
        read_json(text, "run.json")
    assert "\n" not in str(caught.value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
NAMES = st.sampled_from("name inner size parts counts steps shape lr options x".split()) | st.text()
ANYTHING = st.recursive(
    SCALARS, lambda inside: st.lists(inside) | st.dictionaries(NAMES, inside), max_leaves=12
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(ANYTHING, st.sampled_from(["name", "inner", "size", "parts", "counts"]))
def test_whatever_json_holds_becomes_a_record_or_one_line(data, name):
    "Alone, and as one field of a record that is good otherwise."
    for candidate in (data, GOOD | {name: data}):
        try:
            record = read_record(Outer, candidate, "f")
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert read_record(Outer, json.loads(json.dumps(asdict(record))), "f") == record


def test_numbers_of_numpy_and_torch_are_written_as_numbers():
    record = {"seed": np.int64(3), "lr": np.float32(0.5), "scale": torch.tensor(2), "at": Path("a")}
    assert plain(record | {"shape": (1, np.int32(8))}) == {
        "seed": 3,
        "lr": 0.5,
        "scale": 2,
        "at": "a",
        "shape": [1, 8],
    }
    for wrong in (object(), torch.ones(2), {1, 2}, np.ones(1), b"x"):
        with pytest.raises(ValueError, match="^the record cannot be written as JSON: ") as caught:
            as_json({"value": wrong}, "the record")
        assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError):
        read_tensors(path, "model", "a model")

    write_tensors({"w": torch.ones(2)}, path, {"model": '{"a": 1}', "guard": "{"})
    tensors, record = read_tensors(path, "model", "a model")
    assert record == {"a": 1} and torch.equal(tensors["w"], torch.ones(2))
    assert read_tensors(path, "model", "a model", header_only=True) == ({}, {"a": 1})

    whole = path.read_bytes()
    spoiled = [b"", b"junk", whole[:7], whole[:60], whole[:-3], b"\xff" * 100]
    for content, name in [(whole, "run"), (whole, "guard"), *[(part, "model") for part in spoiled]]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="t.safetensors") as caught:
            read_tensors(path, name, "a checkpoint")
        assert "\n" not in str(caught.value)
