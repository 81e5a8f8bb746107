"Levels that there are not are refused; where nothing of image or noise is left, nothing is NaN."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpsample.core.ddpm import final_sample, generate, sample
from cpsample.core.guard import Guard
from cpsample.core.protection import protect
from cpsample.core.schedule import (
    Schedule,
    abar_at,
    add_noise,
    eps_to_score,
    eps_to_v,
    eps_to_x0,
    make_schedule,
    same_levels,
    signal_noise,
    v_to_eps,
    x0_to_eps,
)

LINEAR = make_schedule()
ZERO_SNR = Schedule("zero", torch.cat([LINEAR.abar[:-1], torch.zeros(1)]))


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([3, -1]),
        torch.tensor([1000, 3]),
        torch.tensor([999.5]),
        torch.tensor([-0.5]),
        torch.tensor([math.nan]),
        torch.tensor([math.inf], dtype=torch.float64),
        torch.tensor([3], dtype=torch.uint8),
        torch.tensor([3], dtype=torch.int16),
        torch.tensor([True]),
    ],
    ids=str,
)
def test_a_level_that_there_is_not_is_refused(t):
    x = torch.ones(len(t), 2)
    for ask in (
        lambda: abar_at(LINEAR, t),
        lambda: signal_noise(LINEAR, t, x),
        lambda: add_noise(x, t, LINEAR),
        lambda: eps_to_x0(x, t, x, LINEAR),
    ):
        with pytest.raises(ValueError, match=r"\Anoise levels must [^\n]*\Z"):
            ask()


def test_a_guard_refuses_it_too_also_above_its_t_max():
    guarded = protect(lambda x, t: x, Guard(lambda x, t: 9 + x[:, :1], LINEAR))
    for t in (1000, -1, torch.tensor([True]), torch.tensor([4], dtype=torch.uint8), 1e9):
        with pytest.raises(ValueError, match="noise levels must"):
            guarded(torch.ones(1, 2), t)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_the_first_and_the_last_level_are_levels(dtype):
    t = torch.tensor([0, 999]).to(dtype)
    torch.testing.assert_close(abar_at(LINEAR, t), LINEAR.abar[[0, -1]])
    assert abar_at(LINEAR, t[:0]).shape == (0,)


@pytest.mark.parametrize(
    "abar", [[[0.5]], [], [0.5, math.nan], [1.5, 0.5], [0.5, -0.1], [0.1, 0.5], [math.inf]]
)
def test_what_is_no_schedule_is_refused(abar):
    with pytest.raises(ValueError, match=r"\A[^\n]*ᾱ[^\n]*\Z"):
        Schedule("no", torch.tensor(abar))


def test_schedules_are_compared_by_their_numbers():
    assert same_levels(LINEAR, Schedule("other name", LINEAR.abar.double() * (1 - 1e-4)))
    assert not same_levels(LINEAR, ZERO_SNR) or (LINEAR.abar[-1] < 1e-3)
    assert not same_levels(LINEAR, make_schedule(T=999))
    assert not same_levels(make_schedule("cosine"), LINEAR)


@st.composite
def schedules(draw):
    "Schedules that may begin without noise and end without signal, at several levels."
    inner = draw(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=0, max_size=6))
    ones, zeros = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    values = [1.0] * ones + sorted(inner, reverse=True) + [0.0] * zeros
    return Schedule("any", torch.tensor(values or [0.5]))


@given(schedule=schedules(), at=st.floats(0, 1), dtype=st.sampled_from([torch.float32, "int"]))
@settings(deadline=None, max_examples=150, derandomize=True)
def test_no_conversion_divides_by_zero(schedule, at, dtype):
    level = torch.tensor([at * (schedule.T - 1)] * 3)
    t = level.round().long() if dtype == "int" else level
    generator = torch.Generator().manual_seed(0)
    x, answer = torch.randn((2, 3, 4), generator=generator)

    abar = abar_at(schedule, t)
    assert ((0 <= abar) & (abar <= 1)).all()
    low, high = schedule.abar[level.floor().long()], schedule.abar[level.ceil().long()]
    assert (high - 1e-4 <= abar).all() and (abar <= low + 1e-4).all()
    for convert in (eps_to_x0, x0_to_eps, eps_to_v, v_to_eps, eps_to_score):
        assert convert(x, t, answer, schedule).isfinite().all()
        answer.requires_grad_()
        (slope,) = torch.autograd.grad(convert(x, t, answer, schedule).sum(), answer)
        answer = answer.detach()
        assert slope.isfinite().all()


def test_in_pure_noise_the_image_is_grey_and_the_noise_is_the_picture():
    x, t = torch.randn(3, 2), torch.full((3,), 999)
    assert eps_to_x0(x, t, x, ZERO_SNR).abs().max() == 0
    assert torch.equal(v_to_eps(x, t, torch.randn(3, 2), ZERO_SNR), x)
    assert torch.equal(x0_to_eps(x, t, torch.randn(3, 2), ZERO_SNR), x)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("zeros", [1, 2, 5])
def test_sampling_starts_from_pure_noise(zeros, eta, clip):
    abar = torch.cat([torch.ones(1), LINEAR.abar[1:-zeros], torch.zeros(zeros)])
    schedule = Schedule("zero", abar)

    def model(x, t):
        return x0_to_eps(x, t, torch.full_like(x, 0.5), schedule)

    steps = [999, 998, 996, 500, 2, 1, 0]
    generator = torch.Generator().manual_seed(0)
    settings = dict(steps=steps, eta=eta, clip=clip, generator=generator)
    seen = list(sample(model, schedule, (1000, 2), **settings))
    assert all(step.x0_pred.isfinite().all() for step in seen)
    assert (seen[0].x0_pred == 0).all()
    assert (seen[1].x_t.std() - 1).abs() < 0.1
    torch.testing.assert_close(seen[-2].x0_pred, torch.full((1000, 2), 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_in_pure_noise_a_guard_says_nothing(eta):
    asked = []

    def certain(x, t):
        asked.extend(t.tolist())
        return 9 + x[:, :1]

    def model(x, t):
        return x0_to_eps(x, t, torch.full_like(x, 0.5), ZERO_SNR)

    guarded = protect(model, Guard(certain, ZERO_SNR, t_max=1000, scale=0.01))
    generator = torch.Generator().manual_seed(0)
    drawn = final_sample(
        sample(guarded, ZERO_SNR, (5, 2), steps=1000, eta=eta, generator=generator)
    )
    assert drawn.isfinite().all()
    assert max(asked) == 998
    assert guarded.rows_pushed == 5 * 999
    x, t = torch.ones(2, 2), torch.tensor([998.5, 999.0])
    assert guarded.corrector.correction(x, t, x) is None


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_no_bit_changes_where_nothing_was_to_be_divided(name):
    "The formulas as they stood, at whole levels and between two."
    schedule = make_schedule(name)
    generator = torch.Generator().manual_seed(3)
    x, eps = torch.randn((2, 64, 3), generator=generator)
    whole = torch.randint(1000, (64,), generator=generator)
    between = 999 * torch.rand(64, generator=generator)
    for t in (whole, between):
        signal, sigma = signal_noise(schedule, t, x)
        assert torch.equal(eps_to_x0(x, t, eps, schedule), (x - sigma * eps) / signal)
        assert torch.equal(x0_to_eps(x, t, eps, schedule), (x - signal * eps) / sigma)
        assert torch.equal(eps_to_score(x, t, eps, schedule), -eps / sigma)
    assert torch.equal(abar_at(schedule, whole), schedule.abar[whole])

    low, noise = between.long(), ((1 - schedule.abar) / schedule.abar).sqrt()
    lerped = torch.lerp(noise[low], noise[(low + 1).clamp(max=999)], between - low)
    assert torch.equal(abar_at(schedule, between), 1 / (1 + lerped**2))


def test_the_same_seed_gives_the_same_images_to_another_number_and_portion():
    "As the docstrings say: to the bit, where no product of matrices is rounded anew."

    def model(x, t):
        return x

    few = generate(model, LINEAR, (2,), 4, steps=3)
    assert torch.equal(few, generate(model, LINEAR, (2,), 5, steps=3)[:4])
    assert torch.equal(few, generate(model, LINEAR, (2,), 4, steps=3, chunk=2))
    assert (torch.pdist(few) > 1e-6).all()
