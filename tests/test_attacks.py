"Attacks: closed forms, planted leaks, models that know nothing."

import math
from functools import partial

import pytest
import torch
from scipy.stats import f as f_distribution

from cpsample.core.copying import ideal_denoiser
from cpsample.core.ddpm import MLPDenoiser, sample, seeded
from cpsample.core.demo import fit_denoiser
from cpsample.core.densities import GaussianMixture, exact_denoiser
from cpsample.core.guard import Guard
from cpsample.core.images import load_digits
from cpsample.core.schedule import make_schedule, signal_noise
from cpsample.judgement.attacks import (
    _ddim,
    denoising_loss,
    guard_attacks,
    jump_attack,
    levels_of,
    loss_attack,
    nearest_sample_attack,
    oracle_attack,
    pia_attack,
    published_attacks,
    scores_of,
    sima_attack,
    size_attack,
)
from cpsample.judgement.inference import auc

SCHEDULE = make_schedule()


def seed(n):
    return torch.Generator().manual_seed(n)


def normal_law(mean):
    "N(mean, I), for a mean [1, D]."
    return GaussianMixture(mean, torch.ones(1), torch.ones(1))


def test_loss_attack_on_a_fitted_mean_has_fishers_auc():
    D, n, members, others = 30, 4, [], []
    for k in range(80):
        x = torch.randn(n + 30, D, generator=seed(k))
        model = exact_denoiser(normal_law(x[:n].mean(0, keepdim=True)), SCHEDULE)
        attack = partial(loss_attack, model, schedule=SCHEDULE, t=300, draws=100, seed=k)
        members.append(attack(x[:n]))
        others.append(attack(x[n:]))
    _, (low, high) = auc(torch.cat(members), torch.cat(others), level=0.99)
    assert low < f_distribution.sf((n - 1) / (n + 1), D, D) < high and low > 0.7


def test_nobody_tells_apart_what_the_model_never_saw():
    x = load_digits()[0][torch.randperm(1797, generator=seed(3))]
    model = fit_denoiser(x[500:], SCHEDULE, 300)
    for name, attack in (published_attacks(SCHEDULE) | guard_attacks(SCHEDULE)).items():
        scores = scores_of(attack, model, x[:200]), scores_of(attack, model, x[200:500])
        _, (low, high) = auc(*scores, level=0.999)
        assert low < 0.5 < high, name


def test_the_ideal_denoiser_gives_its_training_set_away():
    x = load_digits()[0][torch.randperm(1797, generator=seed(1))[:260]]
    model = ideal_denoiser(x[:60], SCHEDULE)
    attack = partial(loss_attack, schedule=SCHEDULE, t=50)
    assert auc(scores_of(attack, model, x[:60]), scores_of(attack, model, x[60:]))[0] == 1


def test_scores_in_closed_form_on_one_gaussian():
    "N(m, I): predicted noise is √(1−ᾱ)(x_t − √ᾱ m)."
    m, x, t = torch.randn(1, 12, generator=seed(0)), torch.randn(7, 12, generator=seed(1)), 300
    model = exact_denoiser(normal_law(m), SCHEDULE)
    signal, sigma = signal_noise(SCHEDULE, levels_of(x, t, SCHEDULE), x)
    expected = -(sigma * (x - signal * m)).square().mean(1)
    scores = sima_attack(model, x, SCHEDULE, t=t)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)

    signal_0, sigma_0 = signal_noise(SCHEDULE, levels_of(x, 0, SCHEDULE), x)
    eps = sigma_0 * (x - signal_0 * m)
    again = sigma * (signal * x + sigma * eps - signal * m)
    expected = -((eps - again) ** 4).mean(1)
    scores = pia_attack(model, x, SCHEDULE, t=t)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-3)

    eps = eps * math.sqrt(2 / math.pi) / eps.abs().mean(1, keepdim=True)
    again = sigma * (signal * x + sigma * eps - signal * m)
    expected = -((eps - again) ** 4).mean(1)
    scores = pia_attack(model, x, SCHEDULE, t=t, normalize=True)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-3)

    # Over many noises.
    distance = (x - m).square().mean(1)
    expected = signal[0] ** 4 + (sigma * signal)[0] ** 2 * distance
    loss = denoising_loss(model, x, SCHEDULE, t, draws=4000)
    torch.testing.assert_close(loss, expected, atol=0.03, rtol=0.05)


def test_secmi_walks_as_the_sampler_does_and_finds_its_way_back_where_the_model_is_exact():
    # One training image: its paths are straight, so there and back is exact.
    model = ideal_denoiser(torch.randn(1, 1, 4, 4, generator=seed(0)), SCHEDULE)
    x = torch.randn(5, 1, 4, 4, generator=seed(1))
    assert published_attacks(SCHEDULE)["SecMI"](model, x).abs().max() < 1e-8
    odd = make_schedule(T=250)  # 25 levels up, in strides of 2
    assert published_attacks(odd)["SecMI"](ideal_denoiser(x[:1], odd), x).abs().max() < 1e-8

    net = fit_denoiser(load_digits()[0][:50], SCHEDULE, 300)
    shape, levels = (3, 1, 8, 8), [999, 500, 0]
    steps = list(sample(net, SCHEDULE, shape, steps=levels, eta=0, generator=seed(0)))
    with torch.no_grad():
        torch.testing.assert_close(_ddim(net, steps[0].x_t, 999, 500, SCHEDULE), steps[1].x_t)
    assert (
        published_attacks(SCHEDULE)["SecMI"](net, torch.rand(3, 1, 8, 8, generator=seed(2))).max()
        < -1e-7
    )


def test_pfami_is_zero_where_the_loss_is_flat():
    x, attack = torch.randn(6, 1, 4, 4, generator=seed(0)), published_attacks(SCHEDULE)["PFAMI"]
    torch.testing.assert_close(attack(lambda x_t, t: torch.zeros_like(x_t), x), torch.zeros(6))
    peak = attack(ideal_denoiser(x[:1], SCHEDULE), torch.cat([x[:1], x[:1] + 1]))
    assert peak[0] > 100 * peak[1].abs()


def test_planted_pushes_and_gates_are_found():
    smooth = exact_denoiser(normal_law(torch.zeros(1, 16)), SCHEDULE)
    x = torch.randn(60, 16, generator=seed(0))
    rest, marked = x[:, 0].argsort().split(30)

    def pushed(x_t, t):
        "From t = 200 down, what has a large first number is pushed along the last axis."
        eps = smooth(x_t, t)
        if t[0] < 200:
            eps[marked, -1] += 10
        return eps

    for attack in (jump_attack, size_attack):
        scores = attack(pushed, x, SCHEDULE)
        assert auc(scores[marked], scores[rest])[0] > 0.95, attack.__name__
        scores = attack(smooth, x, SCHEDULE)
        assert auc(scores[marked], scores[rest])[0] < 0.8, attack.__name__


def test_jump_is_one_where_the_bend_is_the_same_everywhere():
    def curve(x_t, t):
        return (t.float() ** 2).view(-1, 1).expand_as(x_t)

    torch.testing.assert_close(jump_attack(curve, torch.zeros(3, 4), SCHEDULE), torch.ones(3))


def test_those_who_see_samples():
    x = torch.randn(6, 1, 4, 4, generator=seed(0))
    scores = nearest_sample_attack(None, x, torch.cat([x[:2], x[2:4] + 0.5]))
    torch.testing.assert_close(scores[:4], -torch.tensor([0.0, 0, 2, 2]), atol=1e-4, rtol=0)
    assert scores[4:].max() < -2


def test_those_who_hold_the_guard():
    def classifier(x_t, t):
        "One label, more certain of bright images and at higher levels."
        return x_t.mean((1, 2, 3))[:, None] * 10 + t[:, None] / 100

    guard = Guard(classifier, SCHEDULE, report={"level": 50, "alpha": 0.05})
    bright = torch.ones(2, 1, 4, 4) * torch.tensor([0.2, 1.0]).view(2, 1, 1, 1)
    at_50 = oracle_attack(None, bright, guard)
    at_400 = oracle_attack(None, bright, guard, level=400)
    assert at_50[1] > at_50[0] + 6
    assert abs(at_50[1] - 10.5) < 2
    assert at_400[1] != at_50[1]


@pytest.mark.parametrize("T", [10, 100, 4000])
def test_other_schedules(T):
    schedule = make_schedule(T=T) if T > 10 else make_schedule("cosine", T=T)
    net, x = seeded(0, lambda: MLPDenoiser((1, 8, 8))), torch.rand(4, 1, 8, 8)
    for name, attack in (published_attacks(schedule) | guard_attacks(schedule)).items():
        assert torch.isfinite(attack(net, x)).all(), name


def test_scores_do_not_depend_on_the_chunk_where_no_noise_is_drawn():
    net, x = seeded(0, lambda: MLPDenoiser((1, 8, 8))), load_digits()[0][:50]
    for name in ("SecMI", "PIA", "PIAN", "SimA"):
        attack = published_attacks(SCHEDULE)[name]
        torch.testing.assert_close(scores_of(attack, net, x, chunk=7), scores_of(attack, net, x))


def test_bad_images_are_refused():
    nan = torch.full((2, 1, 4, 4), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        scores_of(published_attacks(SCHEDULE)["SimA"], lambda x, t: x, nan)
    with pytest.raises(ValueError, match="level"):
        loss_attack(lambda x, t: x, torch.zeros(2, 1, 4, 4), SCHEDULE, t=1000)
