"The paper's settings: always push, both readings of its update, and what becomes of its claims."

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cpsample.core.calibration import calibrate
from cpsample.core.classifier import MLPClassifier, is_certain, log_odds
from cpsample.core.ddpm import seeded
from cpsample.core.guard import Guard, correct_at_x_t, fit_guard, push
from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import load_digits
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule

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
