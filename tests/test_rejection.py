"Rejection: the rule, the exact sampler, CPSample, the measures, the certificate."

import itertools
import json
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binomtest, ks_2samp
from torch import nn

from cpsample.core.classifier import random_labels
from cpsample.core.densities import GaussianMixture, exact_denoiser, noised
from cpsample.core.guard import push
from cpsample.core.rejection import (
    acceptance_rule,
    as_if_clean,
    certified_distance,
    certified_distance_p,
    doob,
    exact_rejection,
    ideal_classifier,
    line_toy,
    lipschitz_bound,
    log_acceptance,
    mmd,
    mmd_test,
    ring_toy,
    sample_points,
    sampling_noise,
    slopes,
    tilt,
    total_variation,
)
from cpsample.core.schedule import make_schedule
from cpsample.workshop.files import data_path

S = make_schedule()
LABELS = torch.tensor([[1.0], [0], [1], [1], [0], [0]])
LINE, AXIS = line_toy(), torch.linspace(-4, 4, 3201)
CLASSIFIER = ideal_classifier(LINE.spikes, LABELS, LINE.broad, S, share=LINE.share)
LOG_A = acceptance_rule(CLASSIFIER, 0.4, 2.0)


@given(z=st.floats(-40, 40), alpha=st.floats(0.01, 0.49), s=st.floats(0, 5))
@settings(deadline=None)
def test_acceptance_of_one_label_is_the_formula(z, alpha, s):
    p = torch.sigmoid(torch.tensor(z, dtype=torch.float64)).item()
    q = torch.sigmoid(torch.tensor(-z, dtype=torch.float64)).item()
    expected = s * min(0.0, math.log(min(p, q) / alpha))
    logits = torch.tensor([[z]], dtype=torch.float64)
    assert log_acceptance(logits, alpha, s).item() == pytest.approx(expected, abs=1e-9)


def test_acceptance_of_several_labels_is_one_unless_all_are_certain():
    z = torch.tensor([[5.0, -3.0], [5.0, 0.1]])
    mean = -(math.log(1 + math.exp(5)) + math.log(1 + math.exp(3))) / 2
    expected = [mean - math.log(0.2), 0.0]
    assert log_acceptance(z, 0.2).tolist() == pytest.approx(expected, rel=1e-5)
    assert log_acceptance(torch.tensor([[5.0], [-5.0]]), 0.2, form="member")[1] == 0


@pytest.mark.parametrize("form", ["toward", "member"])
def test_the_gradient_of_the_rule_is_the_guards_push(form):
    x, t = torch.linspace(-2, 2, 101)[:, None].requires_grad_(), torch.full((101,), 40)
    log_A = log_acceptance(CLASSIFIER(x, t), 0.3, 2.5, form=form)
    (slope,) = torch.autograd.grad(log_A.sum(), x)
    pushed = 2.5 * push(CLASSIFIER, x, t, form=form)
    torch.testing.assert_close(slope, torch.where(log_A[:, None] < 0, pushed, 0.0))
    assert 10 < (log_A < 0).sum() < 91


def integral(f, cuts):
    "By scipy, over pieces from −4 to 4."
    edges = [-4, *sorted(cuts), 4]
    return sum(quad(f, a, b, limit=80)[0] for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("t", [0, 40, 200, 700])
def test_h_and_Z_agree_with_scipys_quadrature(t):
    "h_t(x) = ∫ A(x0) q(x0) N(x; √ᾱ·x0, 1−ᾱ) dx0 / q_t(x), by an independent integrator."
    tilted, abar = tilt(LINE.law, LOG_A, AXIS), S.abar[t].item()
    points = LINE.points[:, 0].tolist()
    cuts = {point + k * 0.03 for point in points for k in (-3, -1, 0, 1, 3)}

    def joint(u):
        u = torch.tensor([[u]], dtype=torch.float32)
        return math.exp(LINE.law.log_prob(u).item() + LOG_A(u).item())

    assert tilted.Z == pytest.approx(integral(joint, cuts), rel=2e-3)
    for x in (-1.3, 0.2, 0.95):

        def noised_joint(u, x=x):
            density = math.exp(-((x - abar**0.5 * u) ** 2) / (2 * (1 - abar)))
            return joint(u) * density / math.sqrt(2 * math.pi * (1 - abar))

        peak = x / abar**0.5
        near = [cut for cut in [*cuts, peak - 0.05, peak, peak + 0.05] if -4 < cut < 4]
        q_t, qh_t = tilted.blurred(abar, torch.tensor([x], dtype=torch.float64))
        closed_form = noised(LINE.law, abar).log_prob(torch.tensor([[x]])).exp().item()
        assert q_t.item() == pytest.approx(closed_form, rel=1e-3)
        assert qh_t.item() == pytest.approx(integral(noised_joint, near), rel=5e-3, abs=1e-6)


def test_the_blur_in_the_plane_is_the_noised_mixture():
    ring, axis = ring_toy(), torch.linspace(-3.2, 3.2, 513)
    points = torch.tensor([-1.3, 0.4, 1.5], dtype=torch.float64)
    grid = torch.cartesian_prod(points, points).float()
    tilted = tilt(ring.law, lambda x: torch.zeros(len(x)), axis)
    for t in (5, 300):
        q_t, qh_t = tilted.blurred(S.abar[t].item(), points)
        truth = noised(ring.law, S.abar[t].item()).log_prob(grid).exp().view(3, 3)
        torch.testing.assert_close(q_t.float(), truth, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(q_t, qh_t)
    assert tilted.Z == pytest.approx(1)


def test_the_ideal_membership_classifier_is_its_own_h_transform():
    "E[1 − p_0(x0) | x_t] = 1 − p_t(x_t): the tower property. With random labels the order matters."

    class Clean:
        abar = torch.ones(1)

    def member(schedule):
        ones = torch.ones(6, 1)
        options = dict(tau=0.0, share=LINE.share)
        return ideal_classifier(LINE.spikes, ones, LINE.broad, schedule, **options)

    def log_A(x):
        t = torch.zeros(len(x), dtype=torch.int64)
        return nn.functional.logsigmoid(-member(Clean)(x, t)[:, 0])

    tilted, xs = tilt(LINE.law, log_A, AXIS), torch.linspace(-2.5, 2.5, 51)
    for t in (5, 100, 500):
        q_t, qh_t = tilted.blurred(S.abar[t].item(), xs.double())
        p_t = torch.sigmoid(-member(S)(xs[:, None], torch.full((51,), t))[:, 0])
        torch.testing.assert_close((qh_t / q_t).float(), p_t, atol=2e-3, rtol=0)

    q_t, qh_t = tilt(LINE.law, LOG_A, AXIS).blurred(S.abar[100].item(), xs.double())
    log_A_t = log_acceptance(CLASSIFIER(xs[:, None], torch.full((51,), 100)), 0.4, 2.0)
    assert ((qh_t / q_t).log() - log_A_t).abs().max() > 1


@pytest.fixture(scope="module")
def line_samples():
    "Of the h-transform, of the planted mistake, and four draws of exact rejection."
    base, n = exact_denoiser(LINE.law, S), 20_000
    exact = doob(base, tilt(LINE.law, LOG_A, AXIS), S)
    guided = sample_points(exact, S, (n, 1), steps=500, eta=0.0)
    wrong = sample_points(as_if_clean(base, LOG_A, S), S, (n, 1), steps=100, eta=0.0)
    return guided, wrong, [exact_rejection(LINE.law, LOG_A, n, seed=seed)[0] for seed in range(4)]


def test_the_h_transform_is_exact_rejection(line_samples):
    guided, _, draws = line_samples
    noise = statistics.mean(total_variation(a, b) for a, b in itertools.combinations(draws, 2))
    assert ks_2samp(guided[:, 0], draws[0][:, 0]).pvalue > 0.01
    assert statistics.mean(total_variation(guided, a) for a in draws) < 1.2 * noise


def test_a_planted_wrong_h_fails_the_comparison(line_samples):
    _, wrong, draws = line_samples
    assert ks_2samp(wrong[:, 0], draws[0][:, 0]).pvalue < 1e-6
    assert total_variation(wrong, draws[0]) > 5 * total_variation(draws[1], draws[0])


def test_sampling_noise_is_the_mean_over_pairs():
    draws = [torch.tensor([[float(k)]]) for k in (0, 1, 5, 8)]
    assert sampling_noise(draws, lambda a, b: (b - a).item()) == 2


def test_the_h_transform_in_the_plane():
    ring, n = ring_toy(), 1000
    labels = random_labels(12, 8, seed=0)
    eight = ideal_classifier(ring.spikes, labels, ring.broad, S, share=ring.share)
    log_A, base = acceptance_rule(eight, 0.45, 3.0), exact_denoiser(ring.law, S)
    kept = exact_rejection(ring.law, log_A, n, seed=1)[0]

    def p_value(model):
        return mmd_test(sample_points(model, S, (n, 2), steps=100), kept)[1]

    exact = doob(base, tilt(ring.law, log_A, torch.linspace(-3.2, 3.2, 385)), S)
    assert p_value(exact) > 0.01
    assert p_value(as_if_clean(base, log_A, S)) < 0.01
    assert p_value(base) < 0.01


def test_acceptance_rate_is_Z():
    _, accepted, tried = exact_rejection(LINE.law, LOG_A, 20_000, seed=5)
    ci = binomtest(accepted, tried).proportion_ci(0.99, method="exact")
    assert ci.low < tilt(LINE.law, LOG_A, AXIS).Z < ci.high


def test_measures_on_known_samples(generator):
    a, b = torch.randn(500, 2, generator=generator), torch.randn(500, 2, generator=generator)
    assert mmd(a, a) == pytest.approx(0, abs=1e-3)
    assert mmd(a, b) == pytest.approx(mmd_test(a, b)[0], rel=1e-3)

    def mean_kernel(u, v):
        d2 = torch.cdist(u, v) ** 2
        return sum(torch.exp(-d2 / (2 * h**2)) for h in (0.05, 0.15, 0.45)).mean() / 3

    far = b + 1
    squared = mean_kernel(a, a) + mean_kernel(far, far) - 2 * mean_kernel(a, far)
    assert mmd(a, far) == pytest.approx(squared.sqrt().item(), rel=1e-3)
    assert mmd_test(a, b)[1] > 0.05 and mmd_test(a, b + 0.5)[1] < 0.01

    x = torch.tensor([[0.0], [1.0], [9.0]])
    assert total_variation(x, x) == 0
    assert total_variation(x, -x - 0.5) == pytest.approx(1)
    assert total_variation(x[:2], x) == pytest.approx(1 / 3)


def test_p_values_of_the_permutation_test_are_calibrated():
    "Under equal laws one in five p-values lies below 0.2."
    p = []
    for k in range(200):
        a, b = torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(k))
        p.append(mmd_test(a, b, permutations=99)[1])
    ci = binomtest(sum(v <= 0.2 for v in p), len(p)).proportion_ci(0.999)
    assert ci.low < 0.2 < ci.high


def test_copies_lie_within_three_widths():
    x = torch.tensor([[0.9], [0.98], [1.0], [-1.79]])
    assert LINE.copied(x).tolist() == [True, True, False, True] and LINE.copy_rate(x) == 0.75
    weights = LINE.law.weights
    assert weights.sum().item() == pytest.approx(1)
    assert weights[:6].sum().item() == pytest.approx(LINE.share)


def test_the_certificate_is_exact_for_a_linear_logit_and_weaker_in_probabilities(generator):
    w, x = torch.tensor([3.0, 4.0]), torch.randn(200, 2, generator=generator)
    z, gate = 2 + x @ w, math.log(0.7 / 0.3)
    bound = certified_distance(z, 0.3, 5.0)
    torch.testing.assert_close(bound, ((z.abs() - gate) / 5).clamp(min=0))
    edge = x - (w / 5) * (z.sign() * bound)[:, None]  # walk that far downhill: exactly at the gate
    assert torch.allclose((2 + edge @ w)[bound > 0].abs(), torch.tensor(gate), atol=1e-4)
    assert (certified_distance_p(z, 0.3, 5.0 / 4) <= bound + 1e-6).all()


def test_lipschitz_bound_holds_and_is_tight_for_one_layer(generator):
    hidden = nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.Tanh()
    net = nn.Sequential(*hidden, nn.LayerNorm(32), nn.Linear(32, 1))
    steep = slopes(lambda x: net(x)[:, 0], 3 * torch.randn(2000, 2, generator=generator))
    assert steep.max() <= lipschitz_bound(net)

    one = nn.Linear(2, 1)
    slope = slopes(lambda x: one(x)[:, 0], torch.zeros(1, 2)).item()
    assert lipschitz_bound([one]) == pytest.approx(slope, rel=1e-5)

    norm, flat, eps = nn.LayerNorm(4), torch.zeros(1, 4), 1e-5
    step = eps * torch.tensor([1.0, -1, 0, 0])
    stretch = (norm(flat + step) - norm(flat)).norm() / step.norm()
    assert 0.5 * lipschitz_bound([norm]) < stretch <= lipschitz_bound([norm])


def test_the_record_on_file_keeps_what_the_chapter_says():
    record = json.loads(data_path("results/rejection.json").read_text())
    for name, n in (("line", 20_000), ("ring", 2000)):
        part = record[name]
        assert part["n"] == n and len(part["rows"]) == 5
        for row in part["rows"]:
            low, high = row["accept_ci"]
            assert row["p"] > 0.01 > row["p_wrong"]
            assert row["ratio"] <= 1.2 and low < part["Z"] < high

    removed = [r for r in record["table"] if r["copies"] <= 0.05 * record["base_copies"]]
    assert min(r["ratio"] for r in removed) <= 2
    ideal = {r["classifier"] for r in record["table"] if r["kind"] == "random labels, ideal"}
    assert ideal == {f"K = {K}" for K in (1, 2, 4, 8, 16)}


def test_where_members_and_others_cannot_be_told_apart_the_label_is_three_quarters():
    mixture = GaussianMixture(torch.zeros(1, 1), torch.full((1,), 0.1), torch.ones(1))
    classifier = ideal_classifier(mixture, torch.ones(1, 1), mixture, S)
    p = torch.sigmoid(classifier(torch.randn(5, 1), torch.full((5,), 10)))
    assert p.flatten().tolist() == pytest.approx([0.75] * 5, rel=1e-5)
