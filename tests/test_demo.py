"The demo: reproducible, recorded in the agreed shape, and quoted truthfully."

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpsample.core import demo
from cpsample.core.copying import CopyReport, reject_copies
from cpsample.core.demo import (
    DEFAULTS,
    pool,
    readme_table,
    run_demo,
    run_seed,
    show_arms,
    table,
)
from cpsample.core.images import load_digits
from cpsample.workshop.files import data_path

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(images=30, reference=60, train_steps=150, guard_steps=500, samples=60, sample_steps=20)
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
    assert list(record["arms"]) == ["unguarded", "rejection", "guarded"]
    for arm in record["arms"].values():
        counts = {"n", "copies", "copy_rate", "copy_ci"}
        assert counts | {"fd", "fd_held_out", "certain", "seconds", "settings"} <= arm.keys()
        low, high = arm["copy_ci"]
        assert arm["copies"] / arm["n"] == arm["copy_rate"] and low <= arm["copy_rate"] <= high
    assert set(record["seconds"]) == {"denoiser", "guard", "sampling", "total"}
    assert record["arms"]["rejection"]["copies"] == 0 and members.shape == (30, 1, 8, 8)
    assert all(x.shape == (60, 1, 8, 8) and x.abs().max() <= 1 for x in images.values())


@pytest.mark.filterwarnings("ignore::cpsample.core.guard.IdleGuardWarning")
def test_scale_zero_gives_the_unguarded_images():
    images = run_demo((3,), scale=0.0, **SMALL).images
    assert torch.equal(images["unguarded"], images["guarded"])


def test_two_samples_are_enough_for_the_picture():
    _, images, members = run_demo((3,), **SMALL | {"samples": 2})
    assert len(show_arms(images, members).axes) == 2 * 3 * 2


def test_a_model_that_copies_everything_loses_no_result(monkeypatch):
    def copier(model, schedule, shape, n, **options):
        model(torch.zeros(n, *shape), torch.zeros(n, dtype=torch.int64))
        return load_digits()[0][:1].repeat(n, 1, 1, 1)

    def all_copied(x, x_train):
        nearest = torch.zeros(len(x), dtype=torch.int64)
        return CopyReport(torch.zeros(len(x)), nearest, 1 / 3)

    def two_rounds(draw, x_train, n):
        return reject_copies(draw, x_train, n, test=all_copied, max_rounds=2)

    monkeypatch.setattr(demo, "generate", copier)
    monkeypatch.setattr(demo, "copy_test", all_copied)
    monkeypatch.setattr(demo, "reject_copies", two_rounds)
    with pytest.warns(UserWarning, match="no arm of exact rejection"):
        record = run_demo((3,), **SMALL).record
    assert list(record["arms"]) == ["unguarded", "guarded"]
    assert record["arms"]["unguarded"]["copy_rate"] == 1 and "guarded" in table(record)


def test_a_seed_by_itself_is_the_demo_of_that_seed(small):
    alone = run_seed(3, DEFAULTS | SMALL)
    assert torch.equal(alone.images["guarded"], small.images["guarded"])
    for name, arm in alone.arms.items():
        assert arm["copies"] == small.record["arms"][name]["copies"]
        assert arm["fd"] == small.record["arms"][name]["fd"]
    assert list(alone.seconds) == ["guard", "denoiser", "sampling"]


def test_counts_add_up_and_distances_are_averaged():
    few = {"n": 10, "copies": 4, "fd": 1.0, "certain": 0.5}
    many = {"n": 30, "copies": 2, "fd": 3.0, "certain": 0.1}
    pooled = pool([few, many], means=("fd", "certain"))
    assert (pooled["n"], pooled["copies"], pooled["copy_rate"]) == (40, 6, 0.15)
    assert (pooled["fd"], pooled["fd_seeds"], pooled["copies_seeds"]) == (2.0, [1.0, 3.0], [4, 2])


def test_table_and_picture_show_every_arm(small):
    record, images, members = small
    for name in record["arms"]:
        assert name in table(record) and name in readme_table(record)
    assert len(show_arms(images, members, columns=5).axes) == 2 * 3 * 5


def test_readme_quotes_the_result_on_file():
    "The README's table is the file's, made with the settings that the package ships."
    record = json.loads(data_path("results/demo.json").read_text())
    assert readme_table(record) in (ROOT / "README.md").read_text()
    assert record["settings"] == DEFAULTS and len(record["seeds"]) >= 3


def test_result_on_file_keeps_what_the_readme_promises():
    arms = json.loads(data_path("results/demo.json").read_text())["arms"]
    assert all(a["n"] >= 3000 for a in arms.values())
    assert arms["unguarded"]["copy_rate"] >= 0.4
    assert arms["guarded"]["copy_rate"] <= arms["unguarded"]["copy_rate"] / 10
    assert arms["guarded"]["fd"] <= 1.3 * arms["rejection"]["fd"]
