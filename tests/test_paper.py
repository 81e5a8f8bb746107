"The paper's settings: always push, both readings of its update, and what becomes of its claims."

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import norm
from torch import nn

from cpsample.core.calibration import calibrate
from cpsample.core.classifier import MLPClassifier, is_certain, log_odds
from cpsample.core.copying import proportion_ci
from cpsample.core.ddpm import seeded
from cpsample.core.guard import Guard, correct_at_x_t, fit_guard, push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule
from cpsample.judgement.paper_claims import (
    CHANGES,
    CLAIMS,
    PENDING,
    TABLE_3,
    VERDICTS,
    are_apart,
    arm_of,
    attacked_at_gate,
    changes_table,
    claims_table,
    falls_clearly,
    is_as_good,
    judged,
    records_on_file,
    sees_nothing,
)
from cpsample.judgement.paper_study import USES
from cpsample.workshop import choices

SCHEDULE = make_schedule()


def classifier(K=1):
    "A label classifier with random, not tiny, outputs."

    def build():
        net = MLPClassifier((1, 8, 8), K, width=32)
        nn.init.normal_(net.out.weight, std=1.0)
        return net

    return seeded(1, build)


def images(n=12, seed=0):
    return torch.randn((n, 1, 8, 8), generator=torch.Generator().manual_seed(seed))


def test_at_one_half_the_gate_is_zero_and_every_row_is_pushed():
    assert log_odds(0.5) == 0 and log_odds(0.5, below=1) == 0
    assert is_certain(torch.tensor([[1e-6], [-1e-6], [9.0]]), 0.5).all()
    assert not is_certain(torch.tensor([[0.0]]), 0.5).any()  # p = ½: no label to push from

    x, t = images(), torch.randint(0, 1000, (12,), generator=torch.Generator().manual_seed(1))
    guard = Guard(classifier(K=3), SCHEDULE, alpha=0.5, scale=2.0, t_max=1000)
    always = correct_at_x_t(guard, x, t, torch.zeros_like(x))
    assert always.rows.tolist() == list(range(12))

    # The same as a push without any gate: Δε = −s·√(1−ᾱ_t)·∇ log p(other).
    sigma = (1 - SCHEDULE.abar[t]).sqrt().view(-1, 1, 1, 1)
    without_gate = -2.0 * sigma * push(guard.classifier, x, t)
    torch.testing.assert_close(always.delta_eps, without_gate.float())
    tight = correct_at_x_t(replace(guard, alpha=0.3), x, t, torch.zeros_like(x))
    assert tight is None or len(tight.rows) < 12


@pytest.mark.parametrize("alpha", [0.5000001, 0.7, 1.0, 0.0, -0.1, math.nan])
def test_above_one_half_nothing_is_a_gate(alpha):
    with pytest.raises(ValueError, match="between 0 and 0.5 \\(0 excluded\\)"):
        log_odds(alpha)
    with pytest.raises(ValueError, match="between 0 and 0.5"):
        Guard(classifier(), SCHEDULE, alpha=alpha)


def test_membership_keeps_both_ends_open():
    assert log_odds(0.7, below=1) < 0
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1 \\(both excluded\\)"):
            log_odds(alpha, below=1)


def test_always_push_is_fitted_calibrated_saved_and_loaded(tmp_path):
    x = load_digits()[0][:60]
    members, held_out = x[:8], x[8:]
    guard = fit_guard(members, SCHEDULE, preset="paper", alpha=0.5, steps=3, width=16)
    report = calibrate(guard, members, held_out, alpha=0.5, stride=200)
    assert guard.alpha == 0.5 and guard.calibrated
    # It covers everybody, and says of how many others that is true as well: all.
    at_level = report["levels"].index(report["level"])
    assert report["coverage"][at_level] == 1 and report["false_alarms"][at_level] == 1

    save_guard(guard, tmp_path / "always")
    again = load_guard(tmp_path / "always")
    assert again.alpha == 0.5
    zero, t = torch.zeros_like, torch.full((60,), 700)
    torch.testing.assert_close(
        protect(lambda x, t: zero(x), again)(x, t), protect(lambda x, t: zero(x), guard)(x, t)
    )


def test_before_predictions_always_push_is_refused_in_a_sentence():
    says = "which it then never is: take a smaller alpha, or at='x_t'"
    with pytest.raises(ValueError, match=says):
        Guard(classifier(), SCHEDULE, alpha=0.5, at="x0")
    guard = Guard(classifier(), SCHEDULE, alpha=0.3, at="x0")
    before = (guard.alpha, guard.report)
    with pytest.raises(ValueError, match=says):
        calibrate(guard, load_digits()[0][:8], load_digits()[0][8:60], alpha=0.5)
    assert (guard.alpha, guard.report) == before

    # Where one side counts there is an end to the moves: p below one half.
    assert Guard(classifier(), SCHEDULE, alpha=0.5, form="member", at="x0").alpha == 0.5


def test_the_two_readings_of_the_update_differ_by_the_odds():
    x, t, network = images().double(), torch.full((12,), 60), classifier().double()
    p = torch.sigmoid(network(x, t).abs())  # of the certain label, [B, 1]
    toward, away = (push(network, x, t, form=form) for form in ("toward", "away"))
    odds = ((1 - p) / p).view(-1, 1, 1, 1)
    torch.testing.assert_close(away, odds * toward)

    # Each is the gradient of a log-probability, by its name.
    point = x.clone().requires_grad_()
    logit = network(point, t)
    sign = logit.detach().sign()
    to_other = nn.functional.logsigmoid(-sign * logit).sum()
    to_certain = nn.functional.logsigmoid(sign * logit).sum()
    torch.testing.assert_close(toward, torch.autograd.grad(to_other, point, retain_graph=True)[0])
    torch.testing.assert_close(away, -torch.autograd.grad(to_certain, point)[0])


# the claims


def arm(copies, n=1000, fd=30.0, statistics=(5.0,), ps=(1e-6,), **more):
    "An arm of paper.json with made-up numbers."
    runs = [
        {"statistic": s, "p": p, "auc": 0.6, "turned": 0.6, "turned_ci": [0.5, 0.7]}
        for s, p in zip(statistics, ps)
    ]
    numbers = {"n": n, "copies": copies, "copy_ci": list(proportion_ci(copies, n)), "cost": 1.0}
    distance = {"mean": fd, "ci": [fd - 1, fd + 1]}
    return numbers | {"fd": distance, "membership": runs} | more


@pytest.fixture
def records():
    "What is on file of others, and a study of the paper whose outcome is known."
    on_file = records_on_file()
    uses = {name: use._asdict() for name, use in USES.items()}
    arms = {name: arm(600) for name in ("unguarded", *USES, "accepted")}
    return on_file | {"paper": {"uses": uses, "arms": arms}}


def verdict_of(records, words):
    (claim,) = [claim for claim in CLAIMS if words in claim.words]
    return claim.judge(records)


def test_every_claim_has_a_verdict_a_number_and_a_command(records):
    for claim, verdict in judged(records):
        assert verdict.word in VERDICTS and verdict.evidence and verdict.command
        if verdict.word != VERDICTS[2]:
            assert verdict.command.startswith("cpsample reproduce ")
            assert verdict.command.split()[-1] in choices.studies
    table = claims_table(judged(records))
    assert len(table.splitlines()) == 2 + len(CLAIMS)
    assert all(line.count(" | ") == 5 for line in table.splitlines() if " | " in line)


def test_what_is_not_on_file_is_said_to_be_missing(records):
    del records["paper"]
    words = [verdict.word for _, verdict in judged(records)]
    assert words.count(PENDING) == 2 and set(words) == {*VERDICTS, PENDING}
    assert changes_table(records).count(PENDING) == sum("paper" in c.before for c in CHANGES)


def test_rules_look_at_the_far_ends_of_intervals():
    assert falls_clearly((0, 0.0059), (0.06, 0.07)) and not falls_clearly((0, 0.0061), (0.06, 1))
    assert not falls_clearly((0, 0.0061), (0.06, 0.9))
    assert sees_nothing([0.051, 0.9]) and not sees_nothing([0.9, 0.05])
    assert is_as_good((10, 20), (5, 10)) and not is_as_good((10.1, 20), (5, 10))
    assert are_apart((0, 1), (1.1, 2)) and not are_apart((0, 1), (1, 2))


def test_copies_decide_the_first_claim(records):
    words, arms = "no exact replicas", records["digits"]["arms"]
    arms["unguarded"], arms["paper"] = arm(600), arm(600)
    assert verdict_of(records, words).word == "not reproduced"
    arms["paper"] = arm(1)
    verdict = verdict_of(records, words)
    assert verdict.word == "reproduced" and "1 of 1000" in verdict.evidence
    arms["paper"] = arm(50)  # a fall, but not by enough
    assert verdict_of(records, words).word == "not reproduced"


def test_copies_of_pictures_are_those_of_all_seeds(records):
    seeds = {f"seed-{seed}": {"arms": {}} for seed in range(2)}
    for copies, part in zip((0, 3), seeds.values()):
        part["arms"] = {"unguarded": arm(200), "paper": arm(190), "accepted": arm(copies)}
    records["fashion"] = {"name": "fashion", "choosing": {"arms": {}}} | seeds
    verdict = verdict_of(records, "a fine-tuned model copies")
    assert "380 of 2000" in verdict.evidence and "400 of 2000" in verdict.evidence
    assert verdict.ours.startswith("3 of 2000") and verdict.word == "not reproduced"


def test_a_row_of_table_3_passes_by_any_reading_and_names_it(records):
    words = "α = 0.25"
    assert verdict_of(records, words).word == "not reproduced"
    arms = records["paper"]["arms"]
    arms["toward, α=¼"] = arm(600, statistics=(0.2, -0.3), ps=(0.42, 0.6))
    verdict = verdict_of(records, words)
    assert verdict.word == "reproduced" and verdict.evidence.startswith("passed by toward, α=¼.")
    assert verdict_of(records, "α = 0.5").word == "not reproduced"  # another gate

    # On every seed, and not with a strength that nobody printed.
    arms["toward, α=¼"] = arm(6, statistics=(0.2, 3), ps=(0.42, 0.001))
    assert verdict_of(records, words).word == "not reproduced"
    assert set(attacked_at_gate(records, 0.001)) == {"paper", "toward", "toward, s=1000"}


def test_an_unprotected_model_must_be_seen_through(records):
    words = "unprotected: statistic 138"
    assert verdict_of(records, words).word == "reproduced"
    records["membership"]["digits"]["runs"][1]["arms"]["unguarded"]["loss_test"]["p"] = 0.2
    assert verdict_of(records, words).word == "not reproduced"


def test_nearer_than_rivals_is_nearer_on_every_seed_of_every_situation(records):
    words, comparison = "earlier protections lose more", records["comparison"]
    for data in ("digits", "bags"):
        comparison[data]["reported"] = reported = {}
        for name, fd in (("paper", 30.0), ("accepted", 20.0), ("DP-SGD, public start", 50.0)):
            reported[name] = [{"fd": fd}, {"fd": fd}]
        reported["ambient, p = 0.2"] = [{"fd": 31.0}, {"fd": 40.0}]
    verdict = verdict_of(records, words)
    assert verdict.word == "reproduced" and "bags on 2 of 2 seeds" in verdict.evidence

    # One seed of one situation.
    comparison["bags"]["reported"]["ambient, p = 0.2"][0]["fd"] = 29.9
    verdict = verdict_of(records, words)
    assert verdict.word == "not reproduced" and "bags on 1 of 2 seeds" in verdict.evidence
    assert "bags on 2 of 2 seeds" in verdict.ours


def test_settings_that_change_nothing_are_no_adjustment(records):
    words = "adjusted without training"
    assert verdict_of(records, words).word == "reproduced"
    for row in records["guards"]["reported"]["rows"]:
        row.update({"copies": 300, "n": 3000, "copy_ci": [0.09, 0.11]})
    assert verdict_of(records, words).word == "not reproduced"


def test_quality_is_judged_beside_exact_rejection(records):
    words, arms = "image quality is kept", records["digits"]["arms"]
    arms["rejection"], arms["paper"] = arm(0, fd=30.0), arm(0, fd=31.9)
    assert verdict_of(records, words).word == "reproduced"
    arms["paper"] = arm(0, fd=32.1)
    assert verdict_of(records, words).word == "not reproduced"


def test_refused_and_missing_arms_leave_gaps_and_no_errors(records):
    arms = records["paper"]["arms"]
    arms["toward, calibrated"] = {"refused": [None, "it covers too little"]}
    del arms["labels"], arms["away, α=¼"]
    table = changes_table(records)
    assert len(table.splitlines()) == 2 + len(CHANGES)
    gaps = {"toward, calibrated", "labels", "paper, checked"}
    assert table.count(PENDING) == sum(change.after[-1] in gaps for change in CHANGES) == 3
    assert "away, α=¼" not in attacked_at_gate(records, 0.25)
    assert all(verdict.word in VERDICTS for _, verdict in judged(records))


def test_changes_name_arms_that_the_studies_draw(records):
    drawn = {"unguarded", "rejection", "checked", "paper, checked", "accepted", *USES}
    for change in CHANGES:
        for source in (change.before, change.after):
            assert source[1] in drawn if source[0] == "paper" else arm_of(records, *source)


def test_table_3_is_of_a_one_sided_test():
    for statistic, p in TABLE_3.values():
        assert norm.sf(statistic) == pytest.approx(p, abs=0.006)
