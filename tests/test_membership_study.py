"The study of attacks: small runs, runs that were stopped, and the shape of what is on file."

import json
from functools import cache, partial

import pytest
import torch

from cpsample.core.recognition import familiarity
from cpsample.judgement import membership_study
from cpsample.judgement.membership_study import (
    MembershipSettings,
    attacks_on,
    digits_arms,
    fashion_arms,
    kept_samples,
    kept_scores,
    measure_arm,
    measure_digits,
)
from cpsample.practice.runs import load_model
from cpsample.workshop.files import data_path
from cpsample.workshop.studies import Study, Workspace, run_study

SMALL = MembershipSettings(
    seeds=(0,),
    images=20,
    reference=1500,
    train_steps=200,
    guard_steps=300,
    members=3,
    others=4,
    small=True,
    samples=20,
    digit_steps=5,
    fashion_steps=2,
)
DIGITS = Study("membership", {"digits": partial(measure_digits, settings=SMALL)})


def run_in(folder):
    return run_study(DIGITS, folder, Workspace(folder, progress=False))


def without_origin(part):
    return {key: part[key] for key in ("runs", "samples", "steps")}


@pytest.fixture(scope="module", autouse=True)
def train_once():
    "A model of digits comes out the same each time: here it is trained once."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(membership_study.ARMS, "digits", cache(digits_arms))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The record of a small run that was not stopped."
    return run_in(tmp_path_factory.mktemp("whole"))["digits"]


def test_a_small_run_has_the_shape_of_the_file_on_record(whole):
    on_file = json.loads(data_path("results/membership.json").read_text())["digits"]
    assert list(whole) == list(on_file)
    run, old = whole["runs"][0], on_file["runs"][0]
    assert list(run) == list(old) and list(run["split"]) == list(old["split"])
    assert list(run["arms"]) == list(old["arms"])
    for arm, results in run["arms"].items():
        assert list(results) == list(old["arms"][arm])
        assert list(results["attacks"]) == list(old["arms"][arm]["attacks"])
    assert (run["n_members"], run["n_others"]) == (20, 138)
    assert run["arms"]["unguarded"]["attacks"]["loss, t=100"]["auc"] > 0.9


def test_stopped_and_gone_on_equals_not_interrupted(whole, tmp_path, monkeypatch):
    "Stopped within the second arm; only what nobody has answered is asked again."
    ask, asked = membership_study.scores_of, []

    def impatient(attack, model, x):
        asked.append(attack)
        if len(asked) == 40:  # of the paper's guard, the second arm
            raise KeyboardInterrupt
        return ask(attack, model, x)

    monkeypatch.setattr(membership_study, "scores_of", impatient)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path)
    assert not (tmp_path / "membership.json").exists()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 + 19  # samples of two arms, scores

    assert without_origin(run_in(tmp_path)["digits"]) == without_origin(whole)
    # Whoever holds a guard asks twice more; the pair that was broken off is asked again.
    assert len(asked) == 2 * (12 + 3 * 14) + 2


def test_a_finished_model_is_not_trained_again(whole, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("trained again")

    (tmp_path / "digits-0.json").write_text(json.dumps(whole["runs"][0] | {"seconds": 1.0}))
    monkeypatch.setitem(membership_study.ARMS, "digits", refuse)
    assert without_origin(run_in(tmp_path)["digits"]) == without_origin(whole)


def test_digits_of_three_kinds_never_meet():
    arms = membership_study.ARMS["digits"](0, SMALL)
    assert len(arms.members) == 20 and len(arms.test) == (1797 - 20 - 1500) // 2
    assert not set(arms.split["members"]) & set(arms.split["others"])
    assert arms.name == "digits-0"


def test_each_arm_has_the_guard_that_its_name_says():
    digits, pictures = membership_study.ARMS["digits"](0, SMALL), fashion_arms(0, SMALL)
    for arms in (digits, pictures):
        places = {arm: guard.at for arm, guard in arms.guards.items()}
        assert places == {"paper": "x_t", "guarded_xt": "x_t", "guarded": "x0"}
        for arm, guard in arms.guards.items():
            assert arms.models[arm].guard is guard
    x, t = digits.members[:2], torch.zeros(2, dtype=torch.int64)
    labels = {arm: guard.logits(x, t).shape[1] for arm, guard in digits.guards.items()}
    assert labels == {"paper": 1, "guarded_xt": 8, "guarded": 8}
    calibrated = {arm: guard.calibrated for arm, guard in digits.guards.items()}
    assert calibrated == {"paper": False, "guarded_xt": True, "guarded": True}


def test_only_who_holds_a_guard_asks_it():
    arms = membership_study.ARMS["digits"](0, SMALL)
    plain, behind = attacks_on(arms, "unguarded"), attacks_on(arms, "guarded")
    assert [name for name in behind if name not in plain] == ["oracle", "familiarity"]

    # It is that guard's own answer, whatever model is named.
    guard, x = arms.guards["guarded"], arms.members[:5]
    assert torch.equal(behind["familiarity"](None, x), familiarity(guard, x))
    other = attacks_on(arms, "guarded_xt")["familiarity"](None, x)
    assert not torch.equal(other, familiarity(guard, x))


def test_pictures_come_with_a_control():
    arms = fashion_arms(0, SMALL)
    assert list(arms.models) == ["unguarded", "paper", "guarded_xt", "guarded", "before"]
    assert arms.members.shape == (3, 1, 28, 28) and arms.test.shape == (4, 1, 28, 28)

    base, schedule, _ = load_model(data_path("weights/fashion_base.safetensors"))
    x_t, t = torch.randn(2, 1, 28, 28), torch.tensor([5, 300])
    torch.testing.assert_close(arms.models["before"](x_t, t), base(x_t, t), atol=1e-4, rtol=1e-4)
    assert torch.equal(arms.schedule.abar, schedule.abar)


def test_samples_and_scores_of_pictures(tmp_path, monkeypatch):
    arms, workspace = fashion_arms(0, SMALL), Workspace(tmp_path, progress=False)
    few = {"SimA": membership_study.published_attacks(arms.schedule)["SimA"]}
    monkeypatch.setattr(membership_study, "published_attacks", lambda schedule: few)
    scores = kept_scores(arms, "guarded", workspace, SMALL)
    names = ["SimA", "size", "jump", "oracle", "familiarity", "nearest sample"]
    assert list(scores) == names
    assert all((len(a), len(b)) == (3, 4) for a, b in scores.values())

    monkeypatch.setattr(membership_study, "generate", None)  # kept: it is not drawn again
    assert kept_samples(arms, "guarded", workspace, SMALL).shape == (20, 1, 28, 28)


def test_those_who_choose_need_nothing_but_the_model():
    generator = torch.Generator().manual_seed(0)
    names = [*membership_study.published_attacks(membership_study.make_schedule()), "size", "jump"]
    scores = {
        name: (torch.randn(60, generator=generator), torch.randn(60, generator=generator))
        for name in names
    }
    scores["PIA"] = torch.rand(60) + 1, torch.rand(60)
    scores["nearest sample"] = torch.ones(60), torch.zeros(60)
    assert "holder" not in measure_arm(scores)
    scores["oracle"] = torch.ones(60), torch.zeros(60)
    results = measure_arm(scores)
    assert results["holder"]["auc"] == 1
    assert results["best"]["chosen"] == results["best_aware"]["chosen"] == [("PIA", 1)] * 2

    # Only who looks for the guard finds it by its size.
    scores["PIA"], scores["size"] = scores["SecMI"], scores["PIA"]
    results = measure_arm(scores)
    assert results["best_aware"]["chosen"] == [("size", 1)] * 2 != results["best"]["chosen"]
