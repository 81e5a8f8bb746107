"A guard that looks at the predicted picture: what it asks, how far it moves, what it leaves alone."

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_guards import SCHEDULE, looking, pictures, probe
from torch import nn

from cpsample.core.calibration import calibrate
from cpsample.core.classifier import log_odds
from cpsample.core.copying import copy_test
from cpsample.core.ddpm import MLPDenoiser, final_sample, sample, seeded
from cpsample.core.guard import Guard, IdleGuardWarning, UncalibratedGuardWarning
from cpsample.core.images import load_digits
from cpsample.core.predicted import (
    NUDGED,
    changing_moves,
    correct_at_x0,
    move_test,
    room_for_moves,
    shown,
    strength,
    strength_gradient,
    undecided,
    within,
)
from cpsample.core.protection import Corrector, protect
from cpsample.core.schedule import Schedule, eps_to_x0

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{UncalibratedGuardWarning.__module__}.UncalibratedGuardWarning"
)


def linear(x, t):
    "One label whose logit is 3 + 10·x₁."
    return 3 + 10 * x.flatten(1)[:, :1]


def test_one_step_of_length_one_ends_at_the_gate_of_a_linear_classifier():
    guard = looking(linear, scale=1.0, level=0, moves=1)
    rows, moved = undecided(guard, torch.tensor([[0.0, 0.0], [-0.29, 0.0]]))
    assert rows.tolist() == [0]  # of the second it is not certain: z = 0.1
    assert strength(guard, moved).item() == pytest.approx(log_odds(0.3), abs=1e-4)
    assert moved[0, 1] == 0  # along the gradient and nowhere else


@pytest.mark.parametrize("noisings", [0, 1, 3])
def test_the_gradient_is_that_of_what_is_shown(noisings):
    guard = looking(probe().double(), noisings=noisings)
    x0, step = pictures(2).double(), 1e-6
    gradient = strength_gradient(guard, x0)
    for i in range(16):
        direction = torch.zeros(16, dtype=torch.float64)
        direction[i] = step
        ahead = strength(guard, x0 + direction.view(1, 4, 4)).mean(1).double()
        behind = strength(guard, x0 - direction.view(1, 4, 4)).mean(1).double()
        slope = (ahead - behind) / (2 * step)
        torch.testing.assert_close(gradient.flatten(1)[:, i], slope, rtol=1e-5, atol=1e-6)


def test_it_is_shown_the_picture_at_its_level_with_the_same_noise_for_all():
    x0, abar = pictures(3), SCHEDULE.abar[100]
    assert torch.equal(shown(looking(), x0), abar.sqrt() * x0[None])
    views = shown(looking(noisings=2), x0)
    noise = (views - abar.sqrt() * x0) / (1 - abar).sqrt()
    assert views.shape == (2, 3, 1, 4, 4)
    torch.testing.assert_close(noise[:, :1].expand_as(noise), noise, atol=1e-5, rtol=1e-5)
    assert (noise[0] - noise[1]).abs().mean() > 0.5
    assert torch.equal(views, shown(looking(noisings=2), x0))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from([0, 2]))
def test_a_row_decides_for_itself(order, kept, noisings):
    guard, x_t, eps = looking(noisings=noisings), pictures(6), pictures(6, seed=1)
    t = torch.tensor([10, 100, 300, 500, 700, 900])
    whole = eps.clone()
    if (correction := correct_at_x0(guard, x_t, t, eps)) is not None:
        whole = whole.index_add(0, *correction)

    rows = torch.tensor(order[:kept])
    part = eps[rows].clone()
    if (correction := correct_at_x0(guard, x_t[rows], t[rows], eps[rows])) is not None:
        part = part.index_add(0, *correction)
    torch.testing.assert_close(part, whole[rows], rtol=1e-3, atol=1e-3)


def test_the_new_noise_leads_to_the_moved_picture():
    guard, x_t, eps = looking(), pictures(20), pictures(20, seed=1)
    t = torch.full((20,), 300)
    x0 = eps_to_x0(x_t, t, eps, SCHEDULE)
    rows, moved = undecided(guard, x0)
    assert 0 < len(rows) < 20
    correction = correct_at_x0(guard, x_t, t, eps)
    assert torch.equal(correction.rows, rows)
    implied = eps_to_x0(x_t[rows], t[rows], eps[rows] + correction.delta_eps, SCHEDULE)
    torch.testing.assert_close(implied, moved, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.floats(0.01, 0.5), st.floats(0.1, 20), st.integers(1, 5))
def test_no_move_is_longer_than_allowed_nor_leads_out_of_bounds(longest, scale, moves):
    guard = looking(longest=longest, scale=scale, moves=moves, clip=1.0)
    x0 = within(guard, pictures(30))
    rows, moved = undecided(guard, x0)
    lengths = (moved - x0[rows]).flatten(1).square().mean(1).sqrt()
    assert lengths.max() <= longest * 1.001
    assert moved.abs().max() <= 1


def test_a_prediction_is_clipped_before_it_is_shown():
    seen = []

    def classifier(x, t):
        seen.append(x.abs().max().item())
        return 0 * x.flatten(1)[:, :1]

    x_t, eps, t = 3 * pictures(4), pictures(4, seed=1), torch.full((4,), 500)
    for clip in (None, 1.0):
        correct_at_x0(looking(classifier, clip=clip), x_t, t, eps)
    assert seen[0] > 1.5 and seen[1] == pytest.approx(SCHEDULE.abar[100].sqrt().item())


def drawn(model, eta):
    noise = torch.Generator().manual_seed(0)
    options = dict(steps=20, eta=eta, clip=1, generator=noise)
    return final_sample(sample(model, SCHEDULE, (8, 1, 4, 4), **options))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_scale_zero_and_never_certain_change_no_bit(eta):
    model = seeded(2, lambda: MLPDenoiser((1, 4, 4), width=16, depth=1))
    nn.init.normal_(model.out.weight, std=0.1)
    plain = drawn(model, eta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleGuardWarning)
        assert torch.equal(drawn(protect(model, looking(scale=0.0)), eta), plain)
    never = looking(lambda x, t: 0 * x.flatten(1)[:, :2])
    assert torch.equal(drawn(protect(model, never), eta), plain)
    assert not torch.equal(drawn(protect(model, looking()), eta), plain)


def test_it_is_asked_below_t_max_and_where_there_is_a_picture():
    asked = []

    def classifier(x, t):
        asked.append(len(x))
        return 9 + x.flatten(1)[:, :1]

    no_signal = Schedule("to noise", torch.cat([SCHEDULE.abar[:-1], torch.zeros(1)]))
    guard = Guard(classifier, no_signal, 0.3, 1.0, t_max=1000, at="x0")
    corrector, x = Corrector(guard), pictures(3)
    assert corrector.correction(x, 999, x) is None and not asked
    assert corrector.correction(x, 998, x) is not None
    corrector = Corrector(replace(guard, t_max=400))
    asked.clear()
    assert corrector.correction(x, torch.tensor([399, 400, 900]), x).rows.tolist() == [0]
    assert asked[0] == 1


def test_half_precision_asks_in_full_and_answers_in_half():
    guard, x_t, eps = looking(), pictures(20), pictures(20, seed=1)
    full = protect(lambda x, t: eps, guard)(x_t, torch.full((20,), 50))
    half = protect(lambda x, t: eps.half(), guard)(x_t.half(), torch.full((20,), 50))
    assert half.dtype == torch.float16
    same = (half.float() - full).flatten(1).abs().amax(1) < 0.05 * full.flatten(1).abs().amax(1)
    assert same.float().mean() > 0.9  # a row at the very edge of the gate may fall on either side


def test_no_gradient_goes_through_the_model():
    model = seeded(2, lambda: MLPDenoiser((1, 4, 4), width=16, depth=1)).eval()
    nn.init.normal_(model.out.weight, std=0.1)
    x = pictures(6).requires_grad_()
    protected = protect(model, looking())
    plain = model(x, torch.full((6,), 100))
    (expected,) = torch.autograd.grad(plain.sum(), x)
    answer = protected(x, torch.full((6,), 100))
    assert not torch.equal(answer, plain)
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_it_works_in_inference_mode():
    model = seeded(2, lambda: MLPDenoiser((1, 4, 4), width=16, depth=1))
    protected, x = protect(model, looking()), pictures(6)
    with torch.inference_mode():
        answer = protected(x, torch.full((6,), 100))
    torch.testing.assert_close(answer, protected(x, torch.full((6,), 100)).detach())


def test_membership_counts_on_one_side_alone():
    guard = looking(linear, form="member", scale=1.0, level=0, moves=1)
    rows, _ = undecided(guard, torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))  # z = 3 and −7
    assert rows.tolist() == [0]


def test_what_cannot_be_asked_or_moved_is_said():
    def overflowing(x, t):
        return x.flatten(1)[:, :1] * float("nan")

    x, t = pictures(3), torch.full((3,), 50)
    with pytest.raises(ValueError, match="logits of the guard's classifier are NaN"):
        protect(lambda x, t: x, looking(overflowing))(x, t)
    flat = looking(lambda x, t: 9 + 0 * x.flatten(1)[:, :1])
    with pytest.warns(IdleGuardWarning, match="0 at 3 of 3"):
        protect(lambda x, t: x, flat)(x, t)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"at": "x1"}, "looks at one of x_t, x0"),
        ({"level": 150, "made": {"t_max": 150}}, r"level=150 must lie in \[0, 150\)"),
        ({"level": -1}, "level=-1 must lie in"),
        ({"noisings": -1}, "noisings must be at least 0"),
        ({"moves": 0}, "moves must be at least 1"),
        ({"longest": 0.0}, "longest and clip must be positive"),
        ({"longest": float("nan")}, "longest and clip must be positive"),
        ({"clip": 0.0}, "longest and clip must be positive"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        looking(**changes)


def test_it_may_be_asked_above_the_levels_that_it_learned():
    assert looking(made={"t_max": 150}, level=149).t_max == 1000
    with pytest.raises(ValueError, match="learned nothing"):
        replace(looking(made={"t_max": 150}), at="x_t")


def test_a_nudge_is_found_out():
    "A logit that waves quickly loses its certainty on the spot; a smooth one only far away."
    digits = load_digits()[0][:30]

    def wavy(x, t):
        return 4 * torch.cos(40 * x.flatten(1)[:, 27:28])

    def smooth(x, t):
        return 4 + 0 * x.flatten(1)[:, :1] + 0.2 * x.flatten(1)[:, 20:40].sum(1, keepdim=True)

    options = dict(scale=1.0, level=0, moves=5, longest=1e9, t_max=1000)
    nudged = move_test(looking(wavy, **options), digits)
    moved = move_test(looking(smooth, **options), digits)
    assert nudged.moved_by < 0.02 and nudged.still_copies > 0.95
    assert moved.moved_by > 10 * nudged.moved_by and moved.still_copies < 0.3


def test_a_guard_that_knows_no_member_moves_none():
    report = move_test(looking(lambda x, t: 0 * x.flatten(1)[:, :1]), load_digits()[0][:5])
    assert report == (0.0, 1.0, 0.0)


# moves that change pictures


@given(st.integers(0, 1000), st.integers(2, 12))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_there_is_room_to_leave_the_loneliest_image_in_any_direction(seed, n):
    generator = torch.Generator().manual_seed(seed)
    members = torch.randn((n, 1, 3, 3), generator=generator)
    room = room_for_moves(members)
    direction = torch.randn(members.shape, generator=generator)
    direction /= direction.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
    assert copy_test(members + 1.001 * room * direction, members).copies == 0


def wavy(x, t):
    "Certain of every picture, and of none a little further on."
    return 4 * torch.cos(40 * x.flatten(1)[:, 27:28])


def slanted(x, t):
    "Certain of digits, less and less on a long way down."
    return 4 + 0 * x.flatten(1)[:, :1] + 0.2 * x.flatten(1)[:, 20:40].sum(1, keepdim=True)


HARD = dict(level=0, moves=1, longest=1e-3, t_max=1000, made={"t_max": 1000})


def test_nudges_are_refused_by_calibration_and_remembered():
    digits, others = load_digits()[0][:30], load_digits()[0][100:200]
    guard = looking(wavy, scale=1.0, alpha=0.3, **HARD)
    settings_before = (guard.alpha, guard.scale, guard.longest)
    with pytest.raises(ValueError, match="copies all the same, 2% may be: it nudges them") as error:
        calibrate(guard, digits, others, wanted=0.1)
    assert len(str(error.value).splitlines()) == 1
    assert (guard.alpha, guard.scale, guard.longest) == settings_before and guard.report is None

    # Whoever protects with it all the same is told.
    with pytest.warns(UncalibratedGuardWarning, match="nudges"):
        protect(linear, guard)


def test_steps_become_longer_until_they_change_pictures():
    digits = load_digits()[0][:30]
    guard = looking(slanted, scale=0.7, alpha=0.3, **HARD)
    moves = changing_moves(guard, digits)
    assert moves.scale in (1.4, 2.8) and moves.test.still_copies <= NUDGED
    assert moves.longest == room_for_moves(digits) > guard.longest
    with pytest.raises(ValueError, match="nudges"):
        changing_moves(guard, digits, scale=0.7)  # asked for, and not enough


def test_calibration_sets_length_and_room_and_reports_them():
    digits, others = load_digits()[0][:30], load_digits()[0][100:200]
    guard = looking(slanted, scale=0.7, alpha=0.3, **HARD)
    report = calibrate(guard, digits, others, wanted=0.1)
    assert guard.scale == report["scale"] > 0.7 and guard.longest == report["longest"]
    assert report["moves"]["still_copies"] <= NUDGED and report["proposed_scale"] == 1.0
    assert guard.calibrated and not replace(guard, longest=guard.longest / 2).calibrated
    assert calibrate(guard, digits, others, wanted=0.1, scale=0.0)["scale"] == 0.0  # on purpose


def test_of_many_training_images_a_hundred_are_moved():
    asked = []

    def counting(x, t):
        asked.append(len(x))
        return slanted(x, t)

    guard = looking(counting, scale=2.0, alpha=0.3, **HARD)
    move_test(guard, load_digits()[0][:500])
    assert max(asked) == 100
