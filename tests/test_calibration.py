"Calibration: what is measured was planted, what is chosen is the tightest, too little is refused."

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core.calibration import (
    adopt,
    calibrate,
    calibration_levels,
    certainties,
    certainties_of_both,
    check_demands,
    choose_alpha,
    distinct_images,
    first_silent_level,
    propose_scale,
    refuse_taught,
    refuse_uncovered,
    share_above,
    share_interval,
    show_calibration,
    trained_below,
    warn_of_taught,
)
from cpsample.core.classifier import certainty, coverage, is_certain, log_odds
from cpsample.core.copying import SharedImagesWarning, proportion_ci, share_of_sketch, sketch
from cpsample.core.guard import Guard, fit_guard, push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, split, to_bytes
from cpsample.core.protection import protect
from cpsample.core.schedule import add_noise, make_schedule

# Planted classifiers are certain in steps, so that their pushes are 0.
pytestmark = pytest.mark.filterwarnings("ignore::cpsample.core.guard.IdleGuardWarning")

S = make_schedule()
NEAR = 1e-3 * torch.arange(400.0).reshape(200, 2)  # two hundred different points near the origin


def planted(quiet=300):
    "A guard that is sure of the members, near the origin, and far to the right, below a level."

    def classifier(x, t):
        near_a_member = x.norm(dim=1) < 30
        far_right = x[:, 0] > 30
        return (8.0 * (near_a_member | far_right) * (t < quiet))[:, None] + 0 * x[:, :1]

    return Guard(classifier, S, t_max=400)


def others(n, seed):
    "Points far from the members, one in ten to the right and the rest to the left."
    right = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) < 0.1
    return 100 * torch.where(right, 1.0, -1.0).repeat(1, 2)


def at_level(report, name):
    "A measured share at the level where coverage was asked for."
    return report[name][report["levels"].index(report["level"])]


# the small questions


def test_levels_include_the_one_that_is_asked_for():
    guard = Guard(None, S, t_max=100)
    assert calibration_levels(guard) == ([0, 20, 25, 40, 60, 80], 25)  # a quarter of t_max
    assert calibration_levels(guard, level=33, stride=50) == ([0, 33, 50], 33)
    assert calibration_levels(Guard(None, S, t_max=1000))[1] == 100  # T/10


def test_a_guard_is_measured_up_to_where_it_was_trained_and_not_to_where_it_fell_silent():
    "Else a second calibration could never widen what the first has set."
    guard = Guard(None, S, t_max=100, made={"t_max": 400})
    assert trained_below(guard) == 400
    assert max(calibration_levels(guard)[0]) == 380
    assert trained_below(Guard(None, S, t_max=100)) == 100


def test_shares_are_counted_level_by_level():
    certain = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert share_above(certain, 2.0) == [0.5, 0.25, 0.0]  # above, not at
    assert share_interval(certain, 2.0) == [list(proportion_ci(k, 4)) for k in (2, 1, 0)]


def test_the_first_silent_level_comes_after_the_last_certain_one():
    assert first_silent_level([0, 20, 40, 60], [1.0, 0.0, 0.1, 0.0], stride=20) == 60


def test_too_little_is_refused_and_enough_is_not():
    guard = planted()
    refuse_uncovered(guard, 0.95, wanted=0.95, level=100, alpha=0.1)
    assert guard.refusal is None
    with pytest.raises(ValueError, match=r"certain of 94.0% .*noise level 100 \(alpha=0.1\), 95%"):
        refuse_uncovered(guard, 0.94, wanted=0.95, level=100, alpha=0.1)
    assert guard.refusal.startswith("this guard is certain of 94.0%")


@pytest.mark.parametrize("demands", [(0, 0, 0), (1.1, 0, 0), (1, 1, 0), (1, -0.1, 0), (1, 0, 100)])
def test_demands_that_nothing_can_meet_are_refused(demands):
    guard = replace(planted(), t_max=100, made={"t_max": 100})
    check_demands(guard, 1, 0, 99)
    with pytest.raises(ValueError, match=r"level in \[0, 100\)"):
        check_demands(guard, *demands)


def test_few_members_are_noised_more_often():
    guard = planted()
    for n, of_members in ((200, 800), (40, 400), (3, 402)):
        certain, certain_of_others = certainties_of_both(
            guard, NEAR[:n], others(7, 0), [0, 10], seed=0
        )
        assert certain.shape == (2, of_members)
        assert certain_of_others.shape == (2, 7)


def test_repeats_are_counted_once_and_order_is_kept():
    x = torch.tensor([[2.0], [1.0], [2.0], [3.0]])
    assert distinct_images(x, "points")[:, 0].tolist() == [2, 1, 3]
    with pytest.raises(ValueError, match="points hold NaN"):
        distinct_images(torch.full((2, 1), torch.nan), "points")


def test_a_report_is_adopted_whole_or_not_at_all():
    guard = Guard(None, S, alpha=0.1, scale=1.0, t_max=100)
    with pytest.raises(ValueError, match="scale"):
        adopt(guard, {"alpha": 0.2, "scale": -1.0, "t_max": 50})
    assert (guard.alpha, guard.scale, guard.t_max, guard.report) == (0.1, 1.0, 100, None)

    report = {"alpha": 0.2, "scale": 2.0, "t_max": 50}
    adopt(guard, report)
    assert (guard.alpha, guard.scale, guard.t_max, guard.report) == (0.2, 2.0, 50, report)
    assert guard.calibrated


# what is measured


@pytest.mark.parametrize("quiet, t_max", [(300, 300), (290, 300), (401, 400), (110, 120)])
def test_t_max_is_where_the_guard_falls_silent(quiet, t_max):
    guard = planted(quiet)
    assert calibrate(guard, NEAR, others(50, 0))["t_max"] == guard.t_max == t_max


def test_false_alarms_are_those_planted_and_predict_fresh_ones():
    guard = planted()
    report = calibrate(guard, NEAR, others(400, 3))
    for level, rate, (low, high) in zip(
        report["levels"], report["false_alarms"], report["false_alarm_ci"]
    ):
        assert low <= rate <= high
        assert low < 0.1 < high if level < 300 else rate == 0

    fresh = certainties(guard, others(4000, 2), [report["level"]])
    low, high = at_level(report, "false_alarm_ci")
    assert low < share_above(fresh, log_odds(guard.alpha))[0] < high
    assert (report["n_held_out"], report["n_train"]) == (400, 200)
    assert at_level(report, "coverage") == 1


# the gate


@given(wanted=st.floats(0.05, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_alpha_is_the_tightest_with_the_wanted_coverage(wanted, seed):
    logits = 1 + 9 * torch.rand(50, generator=torch.Generator().manual_seed(seed))
    guard = Guard(lambda x, t: x[:, :1] * 0 + logits.repeat(len(x) // 50)[:, None], S)
    report = calibrate(guard, NEAR[:50], -NEAR[:50], wanted=wanted, allowed=0)
    assert at_level(report, "coverage") >= wanted

    # Certain are the images that are needed, and what lies within 1e-4 of the last of them.
    needed = math.ceil(50 * wanted - 1e-6)
    last_needed = logits.sort(descending=True).values[needed - 1]
    most = (logits > last_needed - 2e-4).float().mean().item()
    assert guard.alpha == 0.4 or at_level(report, "coverage") <= most + 1e-6


@given(allowed=st.floats(0, 0.9), n=st.integers(5, 60), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_the_gate_is_opened_as_wide_as_the_held_out_images_allow(allowed, n, seed):
    "Members far above, held-out images anywhere; the gate is never wider than 0.4."
    logits = 9 * torch.rand(n, generator=torch.Generator().manual_seed(seed))

    def classifier(x, t):
        of_others = logits.repeat(len(x) // n) if len(x) % n == 0 else logits[0]
        return torch.where(x[:, 0] > 0, 20.0, of_others)[:, None] + 0 * x[:, :1]

    guard = Guard(classifier, S)
    member, held_out = torch.full((1, 2), 1e4), torch.full((n, 2), -1e4)
    report = calibrate(guard, member, held_out, allowed=allowed)
    alarms = at_level(report, "false_alarms")
    assert alarms <= allowed + 1e-9
    assert at_level(report, "coverage") == 1
    assert guard.alpha == pytest.approx(0.4) or alarms + 1 / n > allowed - 1e-9, (
        "one image more would still have been allowed"
    )


def test_coverage_comes_before_false_alarms():
    "Held-out images as certain as members: the gate covers, and the report says what that costs."
    guard = Guard(lambda x, t: 0 * x[:, :1] + 3.0, S)
    report = calibrate(guard, NEAR[:50], -NEAR[:50], allowed=0.01)
    assert at_level(report, "coverage") == at_level(report, "false_alarms") == 1
    gate = torch.sigmoid(torch.tensor(-3.0)).item()
    assert guard.alpha == pytest.approx(gate, abs=1e-4)


def test_the_gate_is_the_quantile_of_the_text():
    certain = torch.arange(1.0, 21.0)
    alpha = choose_alpha(certain, torch.tensor([50.0]), wanted=0.95, allowed=0)
    assert int((certain > log_odds(alpha)).sum()) == 19
    alpha = choose_alpha(certain, torch.zeros(5), wanted=0.95, allowed=0)
    assert alpha == 0.4


# what is refused


@pytest.mark.parametrize("alpha", [None, 0.01])
def test_a_guard_that_covers_too_little_is_refused_and_left_alone(alpha):
    def one_in_four(x, t):
        certain = torch.arange(len(x)) % 4 == 0
        return 0 * x[:, :1] + torch.where(certain, 9.0, 0.1)[:, None]

    guard = Guard(one_in_four, S, alpha=0.3, scale=7.0, t_max=200)
    advice = "train it longer, make the classifier larger, or protect fewer images"
    words = "certain of 25.0% of its training images at noise level 50 .*" + advice
    with pytest.raises(ValueError, match=words):
        calibrate(guard, NEAR, -NEAR, alpha=alpha)
    assert (guard.alpha, guard.scale, guard.t_max, guard.report) == (0.3, 7.0, 200, None)


def test_repeats_of_a_member_do_not_hide_that_others_are_not_covered():
    "Certain of one point, there a hundred times among ten others: one of eleven, not nine of ten."
    guard = Guard(lambda x, t: 9.0 * (x[:, :1] > 50) + 0 * x[:, :1], S)
    members = torch.cat([torch.full((100, 2), 1e4), NEAR[:10]])
    with pytest.raises(ValueError, match="certain of 9.1% of its training images"):
        calibrate(guard, members, -1 - NEAR)
    report = calibrate(guard, members, -1 - NEAR, wanted=0.05)
    assert report["n_train"] == 11
    assert report["coverage"][0] == pytest.approx(1 / 11)


# the strength


def test_given_alpha_and_scale_are_kept():
    guard = planted()
    report = calibrate(guard, NEAR, others(50, 0), alpha=0.25, scale=3.0)
    assert (guard.alpha, guard.scale) == (report["alpha"], report["scale"]) == (0.25, 3.0)
    assert report["proposed_scale"] > 0
    report = calibrate(guard, NEAR, others(50, 0))
    assert report["scale"] == guard.scale == guard.report["proposed_scale"]


def test_away_keeps_its_scale():
    guard = Guard(planted().classifier, S, scale=1000.0, form="away")
    assert calibrate(guard, NEAR, others(50, 0))["scale"] == guard.scale == 1000


def test_what_is_certain_to_be_no_member_asks_for_no_push():
    "One-sided: of five points the classifier calls four non-members with certainty."
    guard = Guard(lambda x, t: 4 * x[:, :1], S, alpha=0.3, form="member")
    assert propose_scale(guard, torch.tensor([[1.0], [-1], [-1], [-1], [-1]]), 5) == 0


def test_proposed_scale_takes_a_linear_logit_back_to_the_gate():
    w = torch.tensor([0.3, -0.4, 1.2])
    guard = Guard(lambda x, t: (20 + x @ w)[:, None], S, alpha=0.05)
    x = torch.randn(31, 3, generator=torch.Generator().manual_seed(0))
    s = propose_scale(guard, x, 80, seed=3)

    t = torch.full((31,), 80)
    x_t, _ = add_noise(x, t, S, generator=torch.Generator().manual_seed(3))
    moved = x_t + s * (1 - S.abar[80]) * push(guard.classifier, x_t, t)
    median = guard.logits(moved, t)[:, 0].median().item()
    assert median == pytest.approx(log_odds(0.05), abs=1e-3)


def test_the_strength_can_be_proposed_for_another_gate_than_the_guards():
    guard = Guard(lambda x, t: 20 + 3 * x[:, :1], S, alpha=0.05)
    looser = Guard(guard.classifier, S, alpha=0.3)
    assert propose_scale(guard, NEAR, 80, alpha=0.3) == propose_scale(looser, NEAR, 80)
    assert propose_scale(guard, NEAR, 80) < propose_scale(looser, NEAR, 80)


# what becomes of a measured guard


def test_protect_warns_exactly_when_nobody_has_measured_the_guard():
    guard, model = planted(), lambda x, t: x
    with pytest.warns(UserWarning, match="calibrate"):
        protect(model, guard)
    calibrate(guard, NEAR, others(50, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        protect(model, guard)
    guard.alpha = 0.3
    with pytest.warns(UserWarning, match="alpha=0.3"):
        protect(model, guard)


def test_only_one_side_of_membership_is_certain():
    z = torch.tensor([[5.0], [-5.0], [0.5]])
    assert is_certain(z, 0.1, one_sided=True).tolist() == [True, False, False]
    assert is_certain(z, 0.1).tolist() == [True, True, False]
    assert is_certain(z, 0.9, one_sided=True).tolist() == [True, False, True]
    assert certainty(torch.tensor([[3.0, -2.0]])).item() == 2

    guard = Guard(lambda x, t: 4 * x[:, :1], S, alpha=0.3, scale=1.0, form="member", t_max=400)
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    eps = protect(lambda x, t: torch.zeros_like(x), guard)(x, torch.tensor([50, 50]))
    assert eps[0, 0] > 0
    assert eps[1, 0] == 0
    assert calibrate(guard, 1 + NEAR[:5], -1 - NEAR[:8], alpha=0.3)["false_alarms"][0] == 0


@pytest.fixture(scope="module")
def digits():
    "(members, reference, held-out images), all digits."
    x = load_digits()[0]
    parts = split(x, {"members": 40, "reference": 400, "held_out": None}, 4)
    return [parts.of(x, name) for name in ("members", "reference", "held_out")]


def test_a_trained_guard_calibrates_and_one_stopped_after_one_per_cent_does_not(digits, tmp_path):
    members, reference, held_out = digits
    guard, hasty = (fit_guard(members, S, reference, steps=steps, width=128) for steps in (800, 8))
    report = calibrate(guard, members, held_out[:600])
    assert at_level(report, "coverage") >= 0.95
    assert at_level(report, "false_alarms") < 0.5

    noise = torch.Generator().manual_seed(9)
    fresh = coverage(guard.classifier, held_out[600:], S, guard.alpha, [100], generator=noise)[0]
    low, high = at_level(report, "false_alarm_ci")
    assert low < fresh < high
    with pytest.raises(ValueError, match="train it longer"):
        calibrate(hasty, members, held_out)

    save_guard(guard, tmp_path / "g")
    loaded = load_guard(tmp_path / "g")
    assert loaded.report == report
    assert loaded.calibrated
    assert len(show_calibration(report).lines) == 4


def test_a_membership_guard_learns_who_is_a_member(digits):
    members, reference, held_out = digits
    guard = fit_guard(members, S, reference, preset="member", steps=400, width=64)
    gate = log_odds(0.4)
    assert share_above(certainties(guard, members, [0]), gate)[0] > 0.9
    assert share_above(certainties(guard, held_out, [0]), gate)[0] < 0.2


def test_a_member_that_is_there_again_and_again_is_known_in_deeper_noise(digits):
    "Forty more of one of forty digits: what is likely beforehand can be told at t = 300."
    members, reference, _ = digits

    def certain_share(repeats):
        repeated = torch.cat([members[:1].repeat(repeats, 1, 1, 1), members])
        guard = fit_guard(repeated, S, reference, steps=800, width=128, t_learn=1000)
        certain = certainties(guard, members[:1], [300], draws=200)
        return share_above(certain, log_odds(0.2))[0]

    assert certain_share(repeats=0) < 0.1
    assert certain_share(repeats=40) > 0.5


# strangers


def covering():
    "A guard that is certain of everything."
    return Guard(lambda x, t: 1e-3 * x.flatten(1).sum(1, keepdim=True) + 30.0, S)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x.double(), to_bytes])
def test_held_out_images_that_are_members_are_refused(form):
    digits, _ = load_digits()
    guard = covering()
    mixed = torch.cat([digits[100:130], digits[:5]])
    with pytest.raises(ValueError, match=r"5 of 35 held-out images are training images, too \(f"):
        calibrate(guard, digits[:100], form(mixed))
    with pytest.raises(ValueError, match="100 of 100 held-out"):
        calibrate(guard, form(digits[:100]), digits[:100])
    assert guard.report is None
    with pytest.raises(ValueError, match="7 of 7 held-out images are training images"):
        calibrate(guard, NEAR, NEAR[3:10])


@pytest.mark.filterwarnings("ignore::cpsample.core.guard.IdleGuardWarning")
def test_held_out_images_that_are_nearly_members_are_counted():
    digits, _ = load_digits()
    generator = torch.Generator().manual_seed(0)
    nearly = digits[:4].flip(-1) + 0.01 * torch.randn(4, 1, 8, 8, generator=generator)
    mixed = torch.cat([digits[100:130], nearly])
    with pytest.warns(SharedImagesWarning, match=r"4 of 34 .* \(first in rows 30, 31, 32, 33\)"):
        calibrate(covering(), digits[:100], mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SharedImagesWarning)
        calibrate(covering(), digits[:100], digits[100:1100])
        calibrate(covering(), NEAR, NEAR + 1e-6)  # of points nothing can be said


def test_a_guards_own_reference_images_are_known_again():
    digits = load_digits()[0]
    small = dict(steps=2, width=16, depth=1)
    guard = fit_guard(digits[:20], S, digits[100:400], **small)
    taught, fresh = digits[100:400], digits[500:900]

    # As bytes, in another order, half of them: of the first 128 hashes about half are there.
    for x in (taught, to_bytes(taught).flip(0), torch.cat([fresh, taught[::2]])):
        with pytest.raises(ValueError, match=r"about \d+% of the images that the guard learned"):
            refuse_taught(guard, x, "--others x")
        with pytest.warns(SharedImagesWarning, match=r"\d+% of the guard's reference images"):
            warn_of_taught(guard, x)

    # Strangers, a guard without reference, one of last year's file, and none are let through.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in (guard, fit_guard(digits[:20], S, **small), planted(), None):
            refuse_taught(known, fresh)
        warn_of_taught(guard, fresh)
    assert "reference" not in fit_guard(digits[:20], S, **small).made


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 300), st.integers(0, 300))
def test_a_sketch_knows_its_set_again(n, shared):
    x = torch.arange(600.0).view(600, 1).repeat(1, 2)
    known, shared = sketch(x[:n]), min(shared, n)
    assert len(known) == min(n, 128) and known == sketch(x[:n].flip(0))
    share = share_of_sketch(known, torch.cat([x[:shared], x[300:]]))
    assert share == 1 if shared == n else share < 1 or n > 128
    if n <= 128:
        assert share == pytest.approx(shared / n)
