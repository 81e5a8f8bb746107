"The comparison's command: what is kept, what is done again, what is counted."

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import comparison  # noqa: E402


@pytest.fixture
def small(monkeypatch, tmp_path):
    "The book's cells with two methods, two settings and next to no work."
    book = dict(comparison.chapter())
    book["DIGITS"] = SimpleNamespace(**vars(book["DIGITS"]) | {"drawn": 20})
    book["GRIDS"] = {"digits": {"first": [{"x": 1}, {"x": 2}], "second": [{"x": 3}]}}
    calls = []

    def trial(method, setting, w, attack):
        calls.append((method, setting["x"], w, attack))
        return {
            "setting": setting,
            "n": 20,
            "copies": 5 * (setting["x"] == 1),
            "fd": 10.0 - setting["x"],
        }, torch.full((20, 3), 1.0 if w else -1.0)

    book |= {"trial": trial, "world_of": lambda seed, size, folder: seed}
    monkeypatch.setattr(comparison, "chapter", lambda: book)
    monkeypatch.setattr(comparison, "REPORTED", (0, 1))
    monkeypatch.setattr(comparison, "RESULT", tmp_path / "result.json")
    comparison.world.cache_clear()
    return calls


def test_a_setting_is_chosen_on_one_seed_and_reported_on_others(small, tmp_path):
    found = comparison.compare("digits", tmp_path)
    assert small == [
        ("first", 1, 100, False),
        ("first", 2, 100, False),
        ("second", 3, 100, False),
        ("first", 2, 0, True),
        ("second", 3, 0, True),
        ("first", 2, 1, True),
        ("second", 3, 1, True),
    ]
    assert found["chosen"] == {"first": {"x": 2}, "second": {"x": 3}} and [
        r["seed"] for r in found["reported"]["first"]
    ] == [0, 1]


def test_the_page_gets_samples_of_the_first_reported_seed_and_the_members(small, tmp_path):
    comparison.compare("digits", tmp_path)
    kept = load_file(comparison.RESULT.with_suffix(".safetensors"))
    assert {
        name: (tuple(x.shape), x.unique().tolist())
        for name, x in kept.items()
        if "members" not in name
    } == {f"digits, {m}": ((14, 3), [0]) for m in ("first", "second")}
    members = comparison.chapter()["images_for"](0, comparison.chapter()["DIGITS"]).members
    torch.testing.assert_close(
        kept["digits, members"].float() / 127.5 - 1, members, atol=0.5 / 127.5 + 1e-6, rtol=0
    )


def test_a_run_that_was_stopped_goes_on(small, tmp_path):
    first = comparison.compare("digits", tmp_path)
    small.clear()
    (tmp_path / "digits-1-second-best.json").unlink()
    again = comparison.compare("digits", tmp_path)
    assert small == [("second", 3, 1, True)]
    for part in ("tuning", "reported"):
        for method, rows in first[part].items():
            assert [{k: v for k, v in r.items() if k != "seconds"} for r in rows] == [
                {k: v for k, v in r.items() if k != "seconds"} for r in again[part][method]
            ]


def test_a_trial_with_another_setting_is_not_taken_for_the_one_chosen(small, tmp_path):
    comparison.compare("digits", tmp_path)
    small.clear()
    path = tmp_path / "digits-0-first-best.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"setting": {"x": 1}}))
    assert comparison.compare("digits", tmp_path)["reported"]["first"][0]["setting"] == {
        "x": 2
    } and small == [("first", 2, 0, True)]


def test_one_seed_alone_writes_its_trials_and_no_result(small, tmp_path):
    assert comparison.compare("digits", tmp_path, 1) is None
    assert {w for _, _, w, _ in small} == {100, 1}
    assert json.loads((tmp_path / "digits-1-first-best.json").read_text())["setting"] == {"x": 2}
    assert load_file(tmp_path / "digits-1-first-best.safetensors")["x"].unique().tolist() == [1.0]
    assert not comparison.RESULT.with_suffix(".safetensors").exists()


def test_worlds_are_large_enough_for_what_is_asked_of_them():
    book = comparison.chapter()
    for size in (book["DIGITS"], book["BAGS"]):
        assert 100 <= size.attacked <= size.strangers  # a TPR at 1 % FPR needs a hundred others
        assert all(len(grid) in (1, 6) for grid in book["GRIDS"][size.data].values())
        assert all(
            round(setting.get("share", 1) * size.train_steps) >= 40
            for grid in book["GRIDS"][size.data].values()
            for setting in grid
        )


def test_flops_of_a_network_are_those_counted_by_hand():
    "A multiplication and an addition per weight and row; backward twice as much, less the gradient of the input of the first layer, which nobody asks for."
    network = comparison.chapter()["new_denoiser"](comparison.chapter()["DIGITS"], 0)
    weights = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    first = sum(layer.weight.numel() for layer in (network.inp, network.embed[0]))
    assert comparison.passes(network) == 2 * (3 * weights - first)


def test_training_is_counted_as_rows_times_flops():
    book = comparison.chapter()
    z = book["DIGITS"]
    w = SimpleNamespace(
        start=lambda missing=None: book["new_denoiser"](z, 0, 1 if missing is None else 2),
        guards={"default": SimpleNamespace(classifier=book["new_denoiser"](z, 1))},
    )
    one = comparison.passes(w.start())
    assert comparison.training_flops("unguarded", {}, w, z) == (z.train_steps * z.batch * one, 0)
    assert (
        comparison.training_flops("early stopping", {"share": 0.25}, w, z)[0]
        == z.train_steps * z.batch * one / 4
    )
    assert comparison.training_flops("CPSample", {"strength": 1}, w, z) == (
        z.train_steps * z.batch * one,
        z.guard_steps * z.guard_batch * one,
    )
    private = comparison.passes(book["new_denoiser"](z, 0, small=True))
    assert comparison.training_flops("DP-SGD", {"steps": 7, "lr": 1}, w, z)[0] == pytest.approx(
        7 * 0.25 * 100 * 16 * private
    )
