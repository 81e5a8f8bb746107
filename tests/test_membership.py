"Attacks and their referee: closed forms, planted leaks, models that know nothing."

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f as f_distribution
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from cpsample.core.copying import ideal_denoiser
from cpsample.core.ddpm import MLPDenoiser, sample, seeded
from cpsample.core.demo import fit_denoiser
from cpsample.core.densities import GaussianMixture, exact_denoiser
from cpsample.core.guard import Guard
from cpsample.core.images import load_digits
from cpsample.core.schedule import make_schedule, signal_noise
from cpsample.judgement.attacks import (
    _ddim,
    attacks,
    denoising_loss,
    guard_attacks,
    jump_attack,
    levels_of,
    loss_attack,
    nearest_sample_attack,
    oracle_attack,
    pia_attack,
    scores_of,
    sima_attack,
    size_attack,
)
from cpsample.judgement.inference import attack_table, auc, infer, loss_test, verdicts

SCHEDULE = make_schedule()


def seed(n):
    return torch.Generator().manual_seed(n)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=30),
    st.lists(st.integers(0, 5), min_size=2, max_size=30),
)
def test_auc_is_scikit_learns_with_ties(a, b):
    value, (low, high) = auc(torch.tensor(a).double(), torch.tensor(b).double(), boots=50)
    assert (
        value == pytest.approx(roc_auc_score([1] * len(a) + [0] * len(b), a + b))
        and 0 <= low <= high <= 1
    )


def test_the_interval_covers_the_known_auc_as_often_as_it_says():
    exact, covered = norm.cdf(math.sqrt(0.5)), 0
    for k in range(100):
        g = seed(k)
        _, (low, high) = auc(
            torch.randn(60, generator=g) + 1, torch.randn(80, generator=g), boots=300, seed=k
        )
        covered += low < exact < high
    assert 88 <= covered <= 100


def test_choosing_among_useless_attacks_gains_nothing():
    "Had the choice been made on the images that are counted, fifty useless attacks would look like a useful one."
    g, values = seed(0), []
    for k in range(20):
        values.append(
            infer(
                {
                    i: (torch.randn(50, generator=g), torch.randn(100, generator=g))
                    for i in range(50)
                },
                boots=10,
                seed=k,
            )["auc"]
        )
    assert abs(sum(values) / 20 - 0.5) < 0.02


def test_threshold_sign_and_choice_on_known_laws():
    g = seed(0)
    a, b = torch.randn(4000, generator=g) + 2, torch.randn(4000, generator=g)
    found = infer(
        {
            "noise": (torch.randn(4000, generator=g), torch.randn(4000, generator=g)),
            "signal": (-a, -b),
        },
        fprs=(0.1, 0.01, 1e-4),
    )
    assert found["chosen"] == [("signal", -1)] * 2
    for f in (0.1, 0.01):
        assert (
            found["tpr_ci"][f][0] - 0.03 < norm.sf(norm.isf(f) - 2) < found["tpr_ci"][f][1] + 0.03
            and abs(found["fpr"][f] - f) < 0.5 * f
        )
    assert found["tpr"][1e-4] is None and found["fpr"][1e-4] is None
    assert found["auc_ci"][0] < norm.cdf(2 / math.sqrt(2)) < found["auc_ci"][1]


def test_the_threshold_comes_from_the_other_half():
    "A threshold of the counted half would accuse exactly the share that was asked for, every time."
    g, rates = seed(0), []
    for k in range(20):
        rates.append(
            infer(
                {"x": (torch.randn(40, generator=g), torch.randn(40, generator=g))},
                fprs=(0.1,),
                boots=10,
                seed=k,
            )["fpr"][0.1]
        )
    assert len(set(rates)) > 4 and 0.05 < sum(rates) / 20 < 0.2


def test_no_more_false_accusations_than_were_allowed():
    "On average over many audiences: k of n + 1, which is the rate asked for where n + 1 is a multiple, and never above it."
    g, rates = seed(1), {n: [] for n in (60, 198)}
    for n, kept in rates.items():
        for k in range(300):
            kept.append(
                infer(
                    {"x": (torch.arange(20.0), torch.rand(n, generator=g))},
                    fprs=(0.05,),
                    boots=2,
                    seed=k,
                )["fpr"][0.05]
            )
    assert 0.02 < sum(rates[60]) / 300 < 0.045  # halves of 30: one of 31 allowed
    assert abs(sum(rates[198]) / 300 - 0.05) < 0.004  # halves of 99: five of 100


def test_loss_attack_on_a_fitted_mean_has_fishers_auc():
    D, n, members, others = 30, 4, [], []
    for k in range(80):
        x = torch.randn(n + 30, D, generator=seed(k))
        model = exact_denoiser(
            GaussianMixture(x[:n].mean(0, keepdim=True), torch.ones(1), torch.ones(1)), SCHEDULE
        )
        for kept, part in ((members, x[:n]), (others, x[n:])):
            kept.append(loss_attack(model, part, SCHEDULE, t=300, draws=100, seed=k))
    value, (low, high) = auc(torch.cat(members), torch.cat(others), level=0.99)
    assert low < f_distribution.sf((n - 1) / (n + 1), D, D) < high and low > 0.7


def test_nobody_tells_apart_what_the_model_never_saw():
    x = load_digits()[0][torch.randperm(1797, generator=seed(3))]
    model = fit_denoiser(x[500:], SCHEDULE, 300)
    for name, attack in (attacks(SCHEDULE) | guard_attacks(SCHEDULE)).items():
        low, high = auc(
            scores_of(attack, model, x[:200]), scores_of(attack, model, x[200:500]), level=0.999
        )[1]
        assert low < 0.5 < high, name


def test_the_ideal_denoiser_gives_its_training_set_away():
    x = load_digits()[0][torch.randperm(1797, generator=seed(1))[:260]]
    model = ideal_denoiser(x[:60], SCHEDULE)
    assert (
        auc(
            scores_of(partial(loss_attack, schedule=SCHEDULE, t=50), model, x[:60]),
            scores_of(partial(loss_attack, schedule=SCHEDULE, t=50), model, x[60:]),
        )[0]
        == 1
    )


def test_scores_in_closed_form_on_one_gaussian():
    "N(m, I): predicted noise is √(1−ᾱ)(x_t − √ᾱ m)."
    m, x, t = torch.randn(1, 12, generator=seed(0)), torch.randn(7, 12, generator=seed(1)), 300
    model = exact_denoiser(GaussianMixture(m, torch.ones(1), torch.ones(1)), SCHEDULE)
    signal, sigma = signal_noise(SCHEDULE, levels_of(x, t, SCHEDULE), x)
    torch.testing.assert_close(
        sima_attack(model, x, SCHEDULE, t),
        -(sigma * (x - signal * m)).square().mean(1),
        atol=1e-5,
        rtol=1e-4,
    )
    s0, n0 = signal_noise(SCHEDULE, levels_of(x, 0, SCHEDULE), x)
    eps = n0 * (x - s0 * m)
    again = sigma * (signal * x + sigma * eps - signal * m)
    torch.testing.assert_close(
        pia_attack(model, x, SCHEDULE, t), -((eps - again) ** 4).mean(1), atol=1e-5, rtol=1e-3
    )
    eps = eps * math.sqrt(2 / math.pi) / eps.abs().mean(1, keepdim=True)
    again = sigma * (signal * x + sigma * eps - signal * m)
    torch.testing.assert_close(
        pia_attack(model, x, SCHEDULE, t, normalize=True),
        -((eps - again) ** 4).mean(1),
        atol=1e-5,
        rtol=1e-3,
    )
    expected = signal[0] ** 4 + (sigma * signal)[0] ** 2 * (x - m).square().mean(
        1
    )  # over many noises
    torch.testing.assert_close(
        denoising_loss(model, x, SCHEDULE, t, draws=4000), expected, atol=0.03, rtol=0.05
    )


def test_secmi_walks_as_the_sampler_does_and_finds_its_way_back_where_the_model_is_exact():
    model = ideal_denoiser(torch.randn(1, 1, 4, 4, generator=seed(0)), SCHEDULE)
    x = torch.randn(5, 1, 4, 4, generator=seed(1))
    assert (
        attacks(SCHEDULE)["SecMI"](model, x).abs().max() < 1e-8
    )  # one training image: its paths are straight, so there and back is exact
    odd = make_schedule(T=250)  # 25 levels up, in strides of 2
    assert attacks(odd)["SecMI"](ideal_denoiser(x[:1], odd), x).abs().max() < 1e-8
    net = fit_denoiser(load_digits()[0][:50], SCHEDULE, 300)
    steps = list(sample(net, SCHEDULE, (3, 1, 8, 8), steps=[999, 500, 0], eta=0, generator=seed(0)))
    with torch.no_grad():
        torch.testing.assert_close(_ddim(net, steps[0].x_t, 999, 500, SCHEDULE), steps[1].x_t)
    assert attacks(SCHEDULE)["SecMI"](net, torch.rand(3, 1, 8, 8, generator=seed(2))).max() < -1e-7


def test_pfami_is_zero_where_the_loss_is_flat():
    x = torch.randn(6, 1, 4, 4, generator=seed(0))
    torch.testing.assert_close(
        attacks(SCHEDULE)["PFAMI"](lambda x_t, t: torch.zeros_like(x_t), x), torch.zeros(6)
    )
    centre = ideal_denoiser(x[:1], SCHEDULE)
    peak = attacks(SCHEDULE)["PFAMI"](centre, torch.cat([x[:1], x[:1] + 1]))
    assert peak[0] > 100 * peak[1].abs()


def test_planted_pushes_and_gates_are_found():
    smooth = exact_denoiser(
        GaussianMixture(torch.zeros(1, 16), torch.ones(1), torch.ones(1)), SCHEDULE
    )
    x = torch.randn(60, 16, generator=seed(0))
    marked = x[:, 0].argsort()[30:]

    def pushed(
        x_t, t
    ):  # from t = 200 down, everything with a large first number is pushed along the last axis
        eps = smooth(x_t, t)
        if t[0] < 200:
            eps[marked, -1] += 10
        return eps

    rest = x[:, 0].argsort()[:30]
    for attack in (jump_attack, size_attack):
        s = attack(pushed, x, SCHEDULE)
        assert auc(s[marked], s[rest])[0] > 0.95, attack.__name__
        s = attack(smooth, x, SCHEDULE)
        assert auc(s[marked], s[rest])[0] < 0.8, attack.__name__


def test_jump_is_one_where_the_bend_is_the_same_everywhere():
    curve = lambda x_t, t: (t.float() ** 2).view(-1, 1).expand_as(x_t)
    torch.testing.assert_close(jump_attack(curve, torch.zeros(3, 4), SCHEDULE), torch.ones(3))


def test_those_who_see_samples_or_hold_the_guard():
    x = torch.randn(6, 1, 4, 4, generator=seed(0))
    s = nearest_sample_attack(None, x, torch.cat([x[:2], x[2:4] + 0.5]))
    torch.testing.assert_close(s[:4], -torch.tensor([0.0, 0, 2, 2]), atol=1e-4, rtol=0)
    assert s[4:].max() < -2
    classifier = lambda x_t, t: (
        x_t.mean((1, 2, 3))[:, None] * 10 + t[:, None] / 100
    )  # one label, more certain at higher levels
    guard = Guard(classifier, SCHEDULE, report={"level": 50, "alpha": 0.05})
    bright = torch.ones(2, 1, 4, 4) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    at_50, at_400 = (
        oracle_attack(None, bright, guard),
        oracle_attack(None, bright, guard, level=400),
    )
    assert at_50[1] > at_50[0] + 10 and abs(at_50[0] - 10.5) < 2 and at_400[0] != at_50[0]


def test_the_best_attacker_does_not_hold_the_guard():
    g = seed(0)
    pairs = {
        "weak": (torch.randn(100, generator=g) + 0.5, torch.randn(100, generator=g)),
        "oracle": (torch.ones(100), torch.zeros(100)),
    }
    found = verdicts(pairs)
    assert (
        found["oracle"]["auc"] == 1
        and found["best of all"]["turned"]["chosen"] == [("weak", 1)] * 2
        and "0.9" not in attack_table(found).splitlines()[-1][:22]
    )
    assert [line.split()[0] for line in attack_table(found).splitlines()[1:]] == [
        "weak",
        "oracle",
        "best",
    ]


def test_loss_test_is_one_sided():
    a, b = torch.randn(400, generator=seed(0)), torch.randn(400, generator=seed(1))
    assert (
        loss_test(a + 1, b)[0] > 10
        and loss_test(a + 1, b)[1] < 1e-6
        and loss_test(a - 1, b)[1] > 0.999
    )


@pytest.mark.parametrize("T", [10, 100, 4000])
def test_other_schedules(T):
    schedule = make_schedule(T=T) if T > 10 else make_schedule("cosine", T=T)
    net, x = seeded(0, lambda: MLPDenoiser((1, 8, 8))), torch.rand(4, 1, 8, 8)
    for name, attack in (attacks(schedule) | guard_attacks(schedule)).items():
        assert torch.isfinite(attack(net, x)).all(), name


def test_scores_do_not_depend_on_the_chunk_where_no_noise_is_drawn():
    net, x = seeded(0, lambda: MLPDenoiser((1, 8, 8))), load_digits()[0][:50]
    for name in ("SecMI", "PIA", "PIAN", "SimA"):
        torch.testing.assert_close(
            scores_of(attacks(SCHEDULE)[name], net, x, 7),
            scores_of(attacks(SCHEDULE)[name], net, x),
        )


@pytest.mark.parametrize(
    "a, b, words",
    [
        (torch.tensor([1.0]), torch.zeros(5), "members"),
        (torch.zeros(5), torch.tensor([]), "others"),
        (torch.tensor([1.0, float("nan")]), torch.zeros(5), "NaN"),
        (torch.zeros(3, 2), torch.zeros(5), "two numbers"),
    ],
)
def test_bad_scores_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        auc(a, b)
    with pytest.raises(ValueError, match=words):
        infer({"x": (a, b)})


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        scores_of(attacks(SCHEDULE)["SimA"], lambda x, t: x, torch.full((2, 1, 4, 4), float("nan")))
    with pytest.raises(ValueError, match="level"):
        loss_attack(lambda x, t: x, torch.zeros(2, 1, 4, 4), SCHEDULE, t=1000)
