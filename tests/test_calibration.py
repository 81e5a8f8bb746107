"Calibration: what is measured is what was planted, what is chosen is the tightest, what is too little is refused."

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core.calibration import calibrate, certainties, propose_scale, show_calibration
from cpsample.core.classifier import certainty, coverage, is_certain, log_odds
from cpsample.core.guard import Guard, fit_guard, protect, push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits, split
from cpsample.core.schedule import add_noise, make_schedule

S = make_schedule()
NEAR = 1e-3 * torch.arange(400.0).reshape(200, 2)  # two hundred different points near the origin


def planted(quiet=300):
    "A stand-in guard: below level `quiet` it is sure of points near the origin, the members, and of points far to the right."

    def classifier(x, t):
        return (8.0 * ((x.norm(dim=1) < 30) | (x[:, 0] > 30)) * (t < quiet))[:, None] + 0 * x[:, :1]

    return Guard(classifier, S, t_max=400)


def others(n, seed):
    "Points far from the members, one in ten to the right and the rest to the left."
    return 100 * torch.where(
        torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) < 0.1, 1.0, -1.0
    ).repeat(1, 2)


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
        assert low <= rate <= high and (low < 0.1 < high if level < 300 else rate == 0)
    at = report["levels"].index(report["level"])
    fresh = (
        (certainties(guard, others(4000, 2), [report["level"]]) > log_odds(guard.alpha))
        .float()
        .mean()
        .item()
    )
    assert report["false_alarm_ci"][at][0] < fresh < report["false_alarm_ci"][at][1]
    assert report["n_held_out"] == 400 and report["n_train"] == 200 and report["coverage"][at] == 1


@given(wanted=st.floats(0.05, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_alpha_is_the_tightest_with_the_wanted_coverage(wanted, seed):
    logits = 1 + 9 * torch.rand(50, generator=torch.Generator().manual_seed(seed))
    guard = Guard(lambda x, t: x[:, :1] * 0 + logits.repeat(len(x) // 50)[:, None], S)
    report = calibrate(guard, NEAR[:50], NEAR[:50], wanted, allowed=0)
    at = report["levels"].index(report["level"])
    assert report["coverage"][at] >= wanted
    assert guard.alpha == 0.4 or report["coverage"][at] - wanted < 1 / 50, (
        "one image fewer would still have been enough"
    )


@given(allowed=st.floats(0, 0.9), n=st.integers(5, 60), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_the_gate_is_opened_as_wide_as_the_held_out_images_allow(allowed, n, seed):
    "Members far above, held-out images anywhere: one more would have been too many, and the gate is never wider than 0.4."
    logits = 9 * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    guard = Guard(
        lambda x, t: (
            torch.where(
                x[:, 0] > 0, 20.0, logits.repeat(len(x) // n) if len(x) % n == 0 else logits[0]
            )[:, None]
            + 0 * x[:, :1]
        ),
        S,
    )
    report = calibrate(guard, torch.full((1, 2), 1e4), torch.full((n, 2), -1e4), allowed=allowed)
    alarms = report["false_alarms"][report["levels"].index(report["level"])]
    assert (
        alarms <= allowed + 1e-9
        and report["coverage"][report["levels"].index(report["level"])] == 1
    )
    assert guard.alpha == pytest.approx(0.4) or alarms + 1 / n > allowed - 1e-9, (
        "one image more would still have been allowed"
    )


def test_coverage_comes_before_false_alarms():
    "Held-out images as certain as the members: the gate stays where coverage wants it, and the report says what that costs."
    guard = Guard(lambda x, t: 0 * x[:, :1] + 3.0, S)
    report = calibrate(guard, NEAR[:50], NEAR[:50], allowed=0.01)
    at = report["levels"].index(report["level"])
    assert report["coverage"][at] == report["false_alarms"][
        at
    ] == 1 and guard.alpha == pytest.approx(torch.sigmoid(torch.tensor(-3.0)).item(), abs=1e-4)


@pytest.mark.parametrize("alpha", [None, 0.01])
def test_a_guard_that_covers_too_little_is_refused_and_left_alone(alpha):
    guard = Guard(
        lambda x, t: 0 * x[:, :1] + torch.where(torch.arange(len(x)) % 4 == 0, 9.0, 0.1)[:, None],
        S,
        alpha=0.3,
        scale=7.0,
        t_max=200,
    )
    with pytest.raises(
        ValueError,
        match=r"certain of 25.0% of its training images at noise level 50 .*train it longer, make the classifier larger, or protect fewer images",
    ):
        calibrate(guard, NEAR, NEAR, alpha=alpha)
    assert (guard.alpha, guard.scale, guard.t_max, guard.report) == (0.3, 7.0, 200, None)


def test_repeats_of_a_member_do_not_hide_that_others_are_not_covered():
    "Certain of one point alone, which is there a hundred times among ten others: that is one of eleven, not nine of ten."
    guard = Guard(lambda x, t: 9.0 * (x[:, :1] > 50) + 0 * x[:, :1], S)
    members = torch.cat([torch.full((100, 2), 1e4), NEAR[:10]])
    with pytest.raises(ValueError, match="certain of 9.1% of its training images"):
        calibrate(guard, members, -1 - NEAR)
    report = calibrate(guard, members, -1 - NEAR, wanted=0.05)
    assert report["n_train"] == 11 and report["coverage"][0] == pytest.approx(1 / 11)


def test_given_alpha_and_scale_are_kept():
    guard = planted()
    report = calibrate(guard, NEAR, others(50, 0), alpha=0.25, scale=3.0)
    assert (guard.alpha, guard.scale, report["alpha"], report["scale"]) == (
        0.25,
        3.0,
        0.25,
        3.0,
    ) and report["proposed_scale"] > 0
    assert (
        calibrate(guard, NEAR, others(50, 0))["scale"]
        == guard.scale
        == guard.report["proposed_scale"]
    )


def test_away_keeps_its_scale():
    guard = Guard(planted().classifier, S, scale=1000.0, form="away")
    assert calibrate(guard, NEAR, others(50, 0))["scale"] == guard.scale == 1000


def test_what_is_certain_to_be_no_member_asks_for_no_push():
    "One-sided: of five points the classifier calls four non-members with certainty; the median scale is 0."
    guard = Guard(lambda x, t: 4 * x[:, :1], S, alpha=0.3, form="member")
    assert propose_scale(guard, torch.tensor([[1.0], [-1], [-1], [-1], [-1]]), 5) == 0


def test_proposed_scale_takes_a_linear_logit_back_to_the_gate():
    w, t = torch.tensor([0.3, -0.4, 1.2]), 80
    guard = Guard(lambda x, t: (20 + x @ w)[:, None], S, alpha=0.05)
    x = torch.randn(31, 3, generator=torch.Generator().manual_seed(0))
    s, rows = propose_scale(guard, x, t, seed=3), torch.full((31,), t)
    x_t, _ = add_noise(x, rows, S, generator=torch.Generator().manual_seed(3))
    moved = x_t + s * (1 - S.abar[t]) * push(guard.classifier, x_t, rows)
    assert (guard.classifier(moved, rows)[:, 0]).median().item() == pytest.approx(
        log_odds(0.05), abs=1e-3
    )


def test_protect_warns_exactly_when_nobody_has_measured_the_guard():
    guard, model = planted(), lambda x, t: x
    with pytest.warns(UserWarning, match="calibrate"):
        protect(model, guard)
    calibrate(guard, NEAR, others(50, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        protect(model, guard)
        protect(model, Guard(guard.classifier, S, scale=0))
    guard.alpha = 0.3
    with pytest.warns(UserWarning, match="alpha=0.3"):
        protect(model, guard)


def test_only_one_side_of_membership_is_certain():
    z = torch.tensor([[5.0], [-5.0], [0.5]])
    assert is_certain(z, 0.1, one_sided=True).tolist() == [True, False, False] and is_certain(
        z, 0.1
    ).tolist() == [True, True, False]
    assert is_certain(z, 0.9, one_sided=True).tolist() == [True, False, True]
    assert certainty(torch.tensor([[3.0, -2.0]])).item() == 2
    guard = Guard(lambda x, t: 4 * x[:, :1], S, alpha=0.3, scale=1.0, form="member", t_max=400)
    out = protect(lambda x, t: torch.zeros_like(x), guard)(
        torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([50, 50])
    )
    assert out[0, 0] > 0 and out[1, 0] == 0
    assert calibrate(guard, 1 + NEAR[:5], -1 - NEAR[:8], alpha=0.3)["false_alarms"][0] == 0


@pytest.fixture(scope="module")
def digits():
    x = load_digits()[0]
    parts = split(x, {"members": 40, "reference": 400, "held_out": None}, 4)
    return [parts.of(x, name) for name in ("members", "reference", "held_out")]


def test_a_trained_guard_calibrates_and_one_stopped_after_one_per_cent_does_not(digits, tmp_path):
    members, reference, held_out = digits
    guard, hasty = (fit_guard(members, S, reference, steps=steps, width=128) for steps in (800, 8))
    report = calibrate(guard, members, held_out[:600])
    at = report["levels"].index(100)
    fresh = coverage(
        guard.classifier, held_out[600:], S, guard.alpha, [100], torch.Generator().manual_seed(9)
    )[0]
    assert report["coverage"][at] >= 0.95 and report["false_alarms"][at] < 0.5
    assert report["false_alarm_ci"][at][0] < fresh < report["false_alarm_ci"][at][1]
    with pytest.raises(ValueError, match="train it longer"):
        calibrate(hasty, members, held_out)
    save_guard(guard, tmp_path / "g")
    again = load_guard(tmp_path / "g")
    assert again.report == report and again.calibrated and len(show_calibration(report).lines) == 4


def test_a_membership_guard_learns_who_is_a_member(digits):
    members, reference, held_out = digits
    guard = fit_guard(members, S, reference, preset="member", steps=400, width=64)
    inside, outside = (
        (certainties(guard, x, [0]) > log_odds(0.4)).float().mean() for x in (members, held_out)
    )
    assert inside > 0.9 and outside < 0.2


def test_a_member_that_is_there_again_and_again_is_known_in_deeper_noise(digits):
    "Forty more of one of forty digits: what can hardly be told at t = 300 can be told where it is likely beforehand."
    members, reference, _ = digits

    def sure(repeats):
        guard = fit_guard(
            torch.cat([members[:1].repeat(repeats, *[1] * (members.dim() - 1)), members]),
            S,
            reference,
            steps=800,
            width=128,
            t_max=1000,
        )
        return (
            (certainties(guard, members[:1], [300], draws=200) > log_odds(0.2))
            .float()
            .mean()
            .item()
        )

    assert sure(0) < 0.1 and sure(40) > 0.5
