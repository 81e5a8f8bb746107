"The headline study: every arm, seeds that add up, and stages that are kept."

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from cpsample.core.copying import CopyReport, most_copied, proportion_ci
from cpsample.core.demo import run_demo
from cpsample.practice import digits_study
from cpsample.practice.digits_study import (
    BINS,
    DigitsSettings,
    histogram,
    mean_with_interval,
    measure_digits,
    pooled,
)
from cpsample.workshop.studies import Study, Workspace, run_study

TINY = DigitsSettings(
    seeds=(3, 4), n=40, images=12, train_steps=100, guard_steps=400, sample_steps=10
)
ARMS = ["unguarded", "rejection", "paper", "guarded_xt", "guarded", "checked", "accepted"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def record(folder):
    study = Study("digits", partial(measure_digits, settings=TINY))
    return run_study(study, folder / "out", Workspace(folder, progress=False))


def test_the_record_has_every_arm_and_counts_of_all_seeds(record):
    assert record["seeds"] == [3, 4] and list(record["arms"]) == ARMS
    for arm in record["arms"].values():
        assert arm["n"] == 80 and sum(arm["histogram"]) == 80 - arm["withheld"]
        assert sum(arm["copies_seeds"]) == arm["copies"]
        assert arm["copy_ci"] == list(proportion_ci(arm["copies"], 80))
    assert record["arms"]["rejection"]["copies"] == 0
    assert record["arms"]["unguarded"]["cost"] == 1


def test_it_counts_what_the_demo_counts(record):
    sizes = dict(images=12, train_steps=100, guard_steps=400, sample_steps=10, samples=40)
    demo = run_demo((3,), rivals=True, **sizes).record["arms"]
    for name in ARMS:
        assert record["arms"][name]["copies_seeds"][0] == demo[name]["copies"]
        assert record["arms"][name]["fd_seeds"][0] == pytest.approx(demo[name]["fd"])


def test_a_seed_that_is_kept_is_not_drawn_again(record, folder, monkeypatch):
    def drawn_again(seed, settings):
        raise AssertionError("this is kept")

    monkeypatch.setattr(digits_study, "measure_seed", drawn_again)
    again = measure_digits(Workspace(folder, progress=False), TINY)
    assert again["arms"] == record["arms"]
    with pytest.raises(ValueError, match="n 40 there, 41 here"):
        other = DigitsSettings(**json.loads(json.dumps(TINY.__dict__)) | {"n": 41})
        measure_digits(Workspace(folder, progress=False), other)


def test_the_most_copied_member_is_named_with_a_bound_for_all():
    nearest = torch.tensor([0, 5, 5, 5, 2])
    report = CopyReport(torch.tensor([0.1, 0.2, 0.0, 0.5, 0.3]), nearest, threshold=1 / 3)
    assert report.near.sum() == 0 and replace(report, threshold=0.4).near.tolist()[3]
    worst = most_copied(report, 7, requests=100)
    assert (worst["member"], worst["copies"]) == (5, 2)
    assert worst["below"] == proportion_ci(2, 100, 1 - 0.05 / 7)[1]
    nobody = most_copied(replace(report, threshold=0.0), 7, requests=100)
    assert nobody["copies"] == 0 and 0.05 < nobody["below"] < 0.08


def test_every_ratio_is_in_one_bin():
    ratios = torch.tensor([0.0, 0.024, 0.026, 1.0])
    counts = histogram(ratios)
    assert len(counts) == BINS and counts[0] == 2 and counts[1] == 1 and counts[-1] == 1


def test_pooling_adds_counts_and_keeps_the_worst_member():
    def run(copies, member):
        numbers = dict(n=10, withheld=1, copies=copies, near=2, neighbourhood=3, drawn=12)
        worst = {"member": member, "copies": copies, "below": 0.5}
        thousands = {name: [float(copies)] for name in ("fd", "precision", "recall")}
        return numbers | thousands | {"most_copied": worst, "histogram": [1, 2], "seconds": 1.0}

    both = pooled([run(1, 8), run(4, 9)], [2.0, 3.0])
    assert (both["n"], both["copies"], both["near"], both["withheld"]) == (20, 5, 4, 2)
    assert both["most_copied"]["member"] == 9 and both["histogram"] == [2, 4]
    assert both["cost"] == 2.5 and both["fd"] == mean_with_interval([1.0, 4.0])
