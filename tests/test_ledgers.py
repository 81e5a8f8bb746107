"A ledger: few files, none large; a change is whole or not at all; what is not its own stays."

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from cpsample.workshop import ledgers
from cpsample.workshop.ledgers import Ledger, MinutesOver, Stopwatch, in_volumes, open_ledger

IDENTITY = {"name": "test", "n": 3}
VOLUME = 1000


def opened(folder, **options):
    return open_ledger(folder, IDENTITY, **{"volume": VOLUME} | options)


def weights(value, layers=9):
    "Weights of 240 bytes a layer, which take several volumes."
    return {f"layer {i}": torch.full((60,), float(value + i)) for i in range(layers)}


def same_entries(ledger, expected):
    assert ledger.entries.keys() == expected.keys()
    for name, tensors in expected.items():
        assert ledger.entries[name].keys() == tensors.keys()
        assert all(torch.equal(ledger.entries[name][key], x) for key, x in tensors.items())


def volumes_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


def test_what_is_kept_is_found_again_in_files_of_bounded_size(tmp_path):
    entries = {"model": weights(0), "guards": weights(5, 2), "rows": {"x": torch.arange(7)}}
    opened(tmp_path).keep({"base": {"loss": 0.5}}, entries)
    again = opened(tmp_path)
    same_entries(again, entries)
    assert again.answers == {"base": {"loss": 0.5}}
    assert all(path.stat().st_size <= VOLUME for path in tmp_path.glob("*.safetensors"))
    shared = [name for name in volumes_in(tmp_path) if name.startswith("small")]
    assert shared == ["small-00001-0.safetensors"] and len(volumes_in(tmp_path)) == 4


def test_a_large_entry_lies_still_while_small_ones_change(tmp_path):
    ledger = opened(tmp_path)
    ledger.keep({}, {"model": weights(0), "rows": {"x": torch.zeros(3)}})
    before = {name: os.stat(tmp_path / name).st_ino for name in volumes_in(tmp_path)}
    ledger.keep({}, {"rows": {"x": torch.ones(4)}})
    after = {name: os.stat(tmp_path / name).st_ino for name in volumes_in(tmp_path)}
    same = before.items() & after.items()
    assert sorted(name.split("-")[0] for name, _ in same) == ["model"] * 3
    assert "small-00002-0.safetensors" in after and len(after) == len(before)
    same_entries(opened(tmp_path), {"model": weights(0), "rows": {"x": torch.ones(4)}})


def test_what_is_taken_away_takes_no_room(tmp_path):
    ledger = opened(tmp_path)
    ledger.keep({"a": {"n": 1}, "b": {"n": 2}}, {"model": weights(0), "rows": weights(1, 1)})
    ledger.keep({"a": None}, {"model": None})
    again = opened(tmp_path)
    assert again.answers == {"b": {"n": 2}}
    same_entries(again, {"rows": weights(1, 1)})
    assert volumes_in(tmp_path) == ["small-00001-0.safetensors"]


def test_a_tensor_that_fits_into_no_file_is_refused_and_nothing_changes(tmp_path):
    ledger = opened(tmp_path)
    ledger.keep({"a": {"n": 1}}, {"rows": weights(1, 1)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="^layer takes 1,200 bytes, and a file holds 950$"):
        ledger.keep({"a": {"n": 2}}, {"model": {"layer": torch.zeros(300)}})
    assert ledger.answers == {"a": {"n": 1}}
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert [*in_volumes({"b": torch.zeros(2), "a": torch.zeros(2)}, 100)[0]] == ["a", "b"]


class Killed(BaseException):
    "In the place of a process that ends."


@pytest.mark.parametrize("name, is_changed", [("save_json", False), ("sweep", True)])
def test_who_is_killed_before_the_record_is_written_has_changed_nothing(
    name, is_changed, tmp_path, monkeypatch
):
    opened(tmp_path).keep({"a": {"n": 1}}, {"model": weights(0)})
    ledger = opened(tmp_path)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger if name == "sweep" else ledgers, name, die)
        ledger.keep({"a": {"n": 2}}, {"model": weights(7)})
    assert len(volumes_in(tmp_path)) == 6  # old ones and new ones

    again = opened(tmp_path)
    assert again.answers == {"a": {"n": 2 if is_changed else 1}}
    same_entries(again, {"model": weights(7 if is_changed else 0)})
    assert len(volumes_in(tmp_path)) == 3


def test_only_volumes_of_this_run_are_swept_out(tmp_path):
    opened(tmp_path).keep({}, {"rows": weights(1, 1)})
    save_file(weights(1, 1), tmp_path / "model-00001-0.safetensors")
    save_file(weights(1, 1), tmp_path / "small-00007-0.safetensors", {"run": "another"})
    (tmp_path / "small-00008-0.safetensors").write_text("his")
    opened(tmp_path)
    assert len(volumes_in(tmp_path)) == 4


def test_another_run_and_damage_are_told_in_one_line(tmp_path):
    opened(tmp_path).keep({}, {"rows": weights(1, 1)})
    with pytest.raises(ValueError, match=r"belongs to another run \(n 3 there, 4 here\)"):
        open_ledger(tmp_path, IDENTITY | {"n": 4})
    volume = tmp_path / "small-00001-0.safetensors"
    volume.write_bytes(volume.read_bytes()[:-1])
    with pytest.raises(ValueError, match="small-00001-0.safetensors is missing or damaged"):
        opened(tmp_path)
    volume.unlink()
    with pytest.raises(ValueError, match="small-00001-0.safetensors is missing or damaged"):
        opened(tmp_path)
    (tmp_path / "record.json").write_text(json.dumps({"name": "mine"}))
    with pytest.raises(ValueError, match="record.json is there and is not the record of a run"):
        opened(tmp_path)


def test_volumes_are_for_their_owner_alone(tmp_path):
    opened(tmp_path).keep({}, {"guards": weights(1, 1)})
    (volume,) = tmp_path.glob("*.safetensors")
    assert volume.stat().st_mode & 0o777 == 0o600


def test_a_call_of_any_length_makes_a_step_and_no_more_than_there_is_time_for(tmp_path):
    made = []

    def step(name):
        made.append(name)
        return {"n": len(made)}, {}

    # The minute is over at the first look: one step a call.
    for calls in range(1, 6):
        seconds = iter(range(0, 10_000, 100))
        ledger = opened(tmp_path, stopwatch=Stopwatch(1.0, clock=lambda: next(seconds)))
        try:
            for i in range(5):
                ledger.step(f"{i}", lambda: step(f"{i}"))
        except MinutesOver as error:
            assert str(error) == "1 minutes are over"
        assert made == list("01234")[:calls]
    assert [opened(tmp_path).answers[f"{i}"]["n"] for i in range(5)] == [1, 2, 3, 4, 5]
    for minutes in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="minutes must be above 0"):
            Stopwatch(minutes)
