"The demo: reproducible, recorded in the agreed shape, and quoted truthfully."

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpsample.core import demo
from cpsample.core.calibration import UncoveredGuardError
from cpsample.core.copying import CopyReport, neighbourhood_test, reject
from cpsample.core.demo import (
    DEFAULTS,
    measure,
    pool,
    run_demo,
    run_seed,
    show_arms,
    split_digits,
    table,
)
from cpsample.core.images import load_digits
from cpsample.workshop.files import data_path

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    images=12, reference=697, train_steps=150, guard_steps=500, samples=60, sample_steps=20
)
ARMS = ["unguarded", "rejection", "guarded", "checked", "accepted"]
OPTIONS = "--images 30 --train-steps 60 --guard-steps 400 --samples 40 --sample-steps 10".split()


def without_times(record):
    record = copy.deepcopy(record)
    for key in ("seconds", "date", "command"):
        record.pop(key)
    for arm in record["arms"].values():
        arm.pop("seconds")
    return record


def test_two_processes_give_identical_json_apart_from_times(tmp_path):
    records = []
    command = [Path(sys.executable).parent / "cpsample", "demo", "--seed", "7", "--seed", "8"]
    for name in ("a", "b"):
        out = tmp_path / name
        files = ["--out", out, "--json", out / "demo.json"]
        subprocess.run([*command, *OPTIONS, *files], check=True, capture_output=True)
        records.append(json.loads((out / "demo.json").read_text()))
        assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]
    assert without_times(records[0]) == without_times(records[1])
    assert records[0]["seeds"] == [7, 8] and records[0]["arms"]["unguarded"]["n"] == 80


@pytest.fixture(scope="module")
def small():
    return run_demo((3,), **SMALL)


def test_another_seed_gives_other_numbers(small):
    other = run_demo((0,), **SMALL).record
    assert other["arms"]["unguarded"]["fd"] != small.record["arms"]["unguarded"]["fd"]


def test_record_has_the_agreed_shape(small):
    record, images, members = small
    head = ["name", "command", "commit", "hardware", "threads", "date", "seeds"]
    assert list(record) == [*head, "settings", "feature_space", "arms", "seconds"]
    assert list(record["arms"]) == ARMS
    for arm in record["arms"].values():
        counts = {"n", "withheld", "drawn", "copies", "copy_rate", "copy_ci", "near"}
        others = {"fd", "fd_held_out", "certain", "cost", "flops", "seconds", "settings"}
        assert counts | others <= arm.keys()
        low, high = arm["copy_ci"]
        assert arm["copies"] / arm["n"] == arm["copy_rate"] and low <= arm["copy_rate"] <= high
    assert set(record["seconds"]) == {"denoiser", "guard", "sampling", "total"}
    assert record["arms"]["rejection"]["copies"] == 0 and members.shape == (12, 1, 8, 8)
    for name, x in images.items():
        served = 60 - record["arms"][name]["withheld"]
        assert x.shape == (served, 1, 8, 8) and x.abs().max() <= 1


@pytest.mark.filterwarnings("ignore::cpsample.core.guard.IdleGuardWarning")
def test_scale_zero_gives_the_unguarded_images():
    images = run_demo((3,), scale=0.0, **SMALL).images
    assert torch.equal(images["unguarded"], images["guarded"])


def test_two_samples_are_enough_for_the_picture():
    _, images, members = run_demo((3,), **SMALL | {"samples": 2})
    assert len(show_arms(images, members).axes) == 2 * len(images) * 2


def test_a_model_that_copies_everything_loses_no_result(monkeypatch):
    def copier(model, schedule, shape, n, **options):
        return load_digits()[0][:1].repeat(n, 1, 1, 1)

    def all_copied(x, x_train):
        nearest = torch.zeros(len(x), dtype=torch.int64)
        return CopyReport(torch.zeros(len(x)), nearest, 1 / 3)

    def two_rounds(draw, accept, n):
        return reject(draw, accept, n, max_rounds=2)

    monkeypatch.setattr(demo, "generate", copier)
    monkeypatch.setattr(demo, "copy_test", all_copied)
    monkeypatch.setattr(demo, "reject", two_rounds)
    with pytest.warns(UserWarning, match="no arm rejection: only 0 of 66 draws"):
        record = run_demo((3,), **SMALL).record
    assert list(record["arms"]) == [name for name in ARMS if name != "rejection"]
    assert record["arms"]["unguarded"]["copy_rate"] == 1 and "guarded" in table(record)


def test_a_seed_by_itself_is_the_demo_of_that_seed(small):
    alone = run_seed(3, DEFAULTS | SMALL)
    assert torch.equal(alone.images["guarded"], small.images["guarded"])
    for name, arm in alone.arms.items():
        assert arm["copies"] == small.record["arms"][name]["copies"]
        assert arm["fd"] == small.record["arms"][name]["fd"]
    assert list(alone.seconds) == ["guard", "denoiser", "sampling"]


def test_counts_add_up_and_distances_are_averaged():
    few = {"n": 10, "copies": 4, "fd": 1.0, "certain": 0.5, "withheld": 1, "drawn": 13}
    many = {"n": 30, "copies": 2, "fd": 3.0, "certain": 0.1, "withheld": 0, "drawn": 30}
    pooled = pool([few, many])
    assert (pooled["n"], pooled["copies"], pooled["copy_rate"]) == (40, 6, 0.15)
    assert (pooled["withheld"], pooled["drawn"], pooled["certain"]) == (1, 43, 0.3)
    assert (pooled["fd"], pooled["fd_seeds"], pooled["copies_seeds"]) == (2.0, [1.0, 3.0], [4, 2])


def test_table_and_picture_show_every_arm(small):
    record, images, members = small
    for name in record["arms"]:
        assert name in table(record)
    assert len(show_arms(images, members, columns=5).axes) == 2 * len(ARMS) * 5


def test_a_table_of_a_model_that_does_not_copy_says_that_it_shows_nothing():
    record = json.loads(data_path("results/demo.json").read_text())
    words = "says nothing about the guard"
    assert words not in table(record)
    record["arms"]["unguarded"] |= {"copies": 2, "n": 60, "copy_rate": 2 / 60}
    assert words in table(record) and "2 of 60" in table(record)


def test_the_result_on_file_is_made_with_the_settings_that_the_package_ships():
    record = json.loads(data_path("results/demo.json").read_text())
    assert record["settings"] == DEFAULTS | {"rivals": True} and len(record["seeds"]) >= 3


def test_result_on_file_keeps_what_the_readme_promises():
    arms = json.loads(data_path("results/demo.json").read_text())["arms"]
    assert list(arms) == ["unguarded", "rejection", "paper", "guarded_xt", *ARMS[2:]]
    assert all(a["n"] >= 3000 for a in arms.values())
    assert arms["unguarded"]["copy_rate"] > 0.5
    for name in ("guarded", "accepted"):
        arm, ideal = arms[name], arms["rejection"]
        assert arm["copies"] == 0 and arm["withheld"] <= 0.01 * arm["n"]
        assert arm["near"] <= ideal["near"] / 4 and arm["fd"] <= ideal["fd"]
        assert arm["cost"] <= 2


def test_sentences_of_the_front_page_agree_with_the_records():
    readme = " ".join((ROOT / "README.md").read_text().split())
    seconds = json.loads(data_path("results/demo.json").read_text())["seconds"]
    assert "takes twice as long as training so small a model" in readme
    assert 1.75 < seconds["guard"] / seconds["denoiser"] < 2.25

    # Neighbours by the second test: a third of real digits, three quarters, nearly all.
    assert "Of real digits a third" in readme and "of accepted digits three quarters do" in readme
    arms = json.loads(data_path("results/digits.json").read_text())["arms"]
    share = {name: arm["neighbourhood"] / arm["n"] for name, arm in arms.items()}
    assert 0.7 < share["accepted"] < 0.8 and share["rejection"] > 0.95
    digits = split_digits(DEFAULTS, 0)
    real = neighbourhood_test(digits.held_out, digits.members).rate
    assert 0.28 < real < 0.38


def test_what_is_withheld_counts_as_a_request():
    x, members = load_digits()[0][:60], load_digits()[0][:30]
    numbers = measure(x, members, load_digits()[0][500:], requests=80)
    assert (numbers["n"], numbers["withheld"], numbers["copies"]) == (80, 20, 30)
    assert numbers["copy_rate"] == 30 / 80


def test_the_rivals_are_drawn_with_the_same_model(small):
    settings = DEFAULTS | SMALL | {"rivals": True, "guard_steps": 500}
    arms = run_seed(3, settings).images
    assert list(arms) == ["unguarded", "rejection", "paper", "guarded_xt", *ARMS[2:]]
    for name in ARMS:
        assert torch.equal(arms[name], small.images[name])


def test_a_guard_that_recognises_too_little_leaves_its_arms_out(monkeypatch):
    def too_little(*args, **options):
        raise UncoveredGuardError(0.5, 0.99, "this guard recognises 5 of 10")

    monkeypatch.setattr(demo, "calibrate_check", too_little)
    with pytest.warns(UserWarning, match="has the last word: this guard recognises 5 of 10"):
        arms = run_seed(3, DEFAULTS | SMALL).arms
    assert list(arms) == ARMS[:3]
