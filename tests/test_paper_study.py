"The paper's setting taken apart: arms, refusals, stages that are kept, and seeds that add up."

from dataclasses import replace

import pytest
import torch

from cpsample.core.copying import proportion_ci
from cpsample.core.demo import DEFAULTS, run_demo, split_digits
from cpsample.core.guard import Guard, fit_guard
from cpsample.core.schedule import make_schedule
from cpsample.judgement import paper_study
from cpsample.judgement.inference import loss_test
from cpsample.judgement.paper_study import (
    CLASSIFIERS,
    USES,
    PaperSettings,
    Use,
    certain_shares,
    loss_membership,
    measure_paper,
    set_up,
)
from cpsample.workshop.studies import Workspace

SIZES = dict(images=12, train_steps=60, guard_steps=300, sample_steps=10)
TINY = PaperSettings(seeds=(3,), n=20, draws=1, classifiers=("printed", "book, x0"), **SIZES)
DIGITS = split_digits(DEFAULTS | {"images": 12}, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def record(folder):
    return measure_paper(Workspace(folder, progress=False), TINY)


def test_the_record_has_an_arm_for_each_use_and_the_ways_to_check(record):
    used = [name for name, use in USES.items() if use.classifier in TINY.classifiers]
    expected = ["unguarded", "rejection", *used, "checked", "paper, checked", "accepted"]
    assert list(record["arms"]) == expected and list(record["classifiers"]) == [
        "printed",
        "book, x0",
    ]
    for arm in record["arms"].values():
        if "refused" not in arm:
            assert arm["n"] == 20 and arm["copy_ci"] == list(proportion_ci(arm["copies"], 20))
    assert record["arms"]["away, α=½"]["guard"][0]["alpha"] == 0.5
    assert record["arms"]["toward"]["guard"][0]["form"] == "toward"
    assert record["arms"]["guarded"]["guard"][0]["at"] == "x0"


def test_its_arms_are_those_of_the_demo(record):
    demo = run_demo((3,), samples=20, **SIZES).record["arms"]
    for name in ("unguarded", "rejection", "guarded", "accepted"):
        assert record["arms"][name]["copies_seeds"] == demo[name]["copies_seeds"]
        assert record["arms"][name]["fd_seeds"] == pytest.approx(demo[name]["fd_seeds"])


def test_what_is_kept_is_not_made_again(record, folder, monkeypatch):
    def made_again(*args, **options):
        raise AssertionError("this is kept")

    monkeypatch.setattr(paper_study, "fit_guard", made_again)
    monkeypatch.setattr(paper_study, "draw_arm", made_again)
    again = measure_paper(Workspace(folder, progress=False), TINY)
    assert again["arms"] == record["arms"]
    with pytest.raises(ValueError, match="n 20 there, 21 here"):
        measure_paper(Workspace(folder, progress=False), replace(TINY, n=21))


def quick_guard(**options):
    return fit_guard(DIGITS.members, make_schedule(), preset="paper", steps=2, width=16, **options)


def test_a_refusal_is_a_result_and_its_words_are_kept(record, folder):
    subject = paper_study._subject(3, Workspace(folder, progress=False), TINY)
    arm = paper_study._used_arm(subject, quick_guard(), Use("printed", "toward", alpha=None))
    assert list(arm) == ["refused"] and "are wanted" in arm["refused"]

    # Of several seeds one refusal is enough: the arm would be an average over the others.
    fine = record["arms"]["paper"]
    together = paper_study._pooled_arm([fine, arm], [fine, fine])
    assert together == {"refused": [None, arm["refused"]]}


def test_every_classifier_differs_from_the_printed_one_in_one_thing():
    printed = CLASSIFIERS["printed"]
    for name in ("longer", "labels", "reference", "levels"):
        differing = [a != b for a, b in zip(CLASSIFIERS[name], printed)]
        assert sum(differing) == 1, name
    for name, use in USES.items():
        assert use.classifier in CLASSIFIERS, name
    for alpha in (0.5, 0.25, 0.001):
        for form in ("away", "toward"):
            at_gate = [u for u in USES.values() if (u.alpha, u.form) == (alpha, form)]
            assert any(use.classifier == "printed" for use in at_gate)


def test_a_use_sets_form_gate_and_strength():
    guard = set_up(quick_guard(), Use("printed", "toward", 0.25, 7.0), DIGITS)
    assert (guard.form, guard.alpha, guard.scale, guard.t_max) == ("toward", 0.25, 7.0, 1000)
    measured = set_up(quick_guard(), Use("printed", "toward", 0.49, None), DIGITS)
    assert measured.scale >= 0 and measured.report is None


def test_the_papers_test_is_that_of_the_losses_of_members_and_fresh_strangers():
    members = DIGITS.members

    def knows_members(x_t, t):
        "Denoises members perfectly (at any level), and everybody else not at all."
        schedule = make_schedule()
        abar = schedule.abar[t].view(-1, 1, 1, 1)
        guess = (x_t[:, None] - abar.sqrt()[:, None] * members[None]) / (1 - abar).sqrt()[:, None]
        best = guess.flatten(2).square().mean(2).argmin(1)
        return guess[torch.arange(len(x_t)), best]

    found = loss_membership(knows_members, DIGITS, replace(TINY, draws=2))
    assert found["statistic"] > 5 and found["p"] < 1e-6 and found["auc"] > 0.95
    blind = loss_membership(lambda x, t: 0 * x, DIGITS, TINY)
    assert 0.3 < blind["auc"] < 0.7 and set(blind) == set(found)
    assert loss_test(torch.arange(3.0), torch.arange(3.0)) == (0.0, 0.5)


def test_at_one_half_a_classifier_is_certain_of_everybody():
    guard = Guard(quick_guard().classifier, make_schedule())
    shares = certain_shares(guard, DIGITS, alpha=0.5)
    assert set(shares["coverage"]) == {1.0} == set(shares["false_alarms"])
    tight = certain_shares(guard, DIGITS)
    assert max(tight["coverage"]) < 1
