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
from cpsample.core.ddpm import final_sample, sample
from cpsample.core.densities import GaussianMixture, exact_denoiser, noised
from cpsample.core.guard import push
from cpsample.core.rejection import (
    acceptance_rule,
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
    slopes,
    tilt,
    total_variation,
)
from cpsample.core.schedule import make_schedule, score_to_eps
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
    assert log_acceptance(
        torch.tensor([[z]], dtype=torch.float64), alpha, s
    ).item() == pytest.approx(expected, abs=1e-9)


def test_acceptance_of_several_labels_is_one_unless_all_are_certain():
    z = torch.tensor([[5.0, -3.0], [5.0, 0.1]])
    assert log_acceptance(z, 0.2).tolist() == pytest.approx(
        [-(math.log(1 + math.exp(5)) + math.log(1 + math.exp(3))) / 2 - math.log(0.2), 0.0],
        rel=1e-5,
    )
    assert log_acceptance(torch.tensor([[5.0], [-5.0]]), 0.2, form="member")[1] == 0


@pytest.mark.parametrize("form", ["toward", "member"])
def test_the_gradient_of_the_rule_is_the_guards_push(form):
    x, t = torch.linspace(-2, 2, 101)[:, None].requires_grad_(), torch.full((101,), 40)
    log_A = log_acceptance(CLASSIFIER(x, t), 0.3, 2.5, form)
    (slope,) = torch.autograd.grad(log_A.sum(), x)
    torch.testing.assert_close(
        slope, torch.where(log_A[:, None] < 0, 2.5 * push(CLASSIFIER, x, t, form), 0.0)
    )
    assert 10 < (log_A < 0).sum() < 91


@pytest.mark.parametrize("t", [0, 40, 200, 700])
def test_h_and_Z_agree_with_scipys_quadrature(t):
    "h_t(x) = ∫ A(x0) q(x0) N(x; √ᾱ·x0, 1−ᾱ) dx0 / q_t(x), by an independent integrator."
    tilted, abar = tilt(LINE.law, LOG_A, AXIS), S.abar[t].item()
    f = lambda u: torch.tensor([[u]], dtype=torch.float32)
    joint = lambda u: math.exp(LINE.law.log_prob(f(u)).item() + LOG_A(f(u)).item())
    cuts = sorted({p + k * 0.03 for p in LINE.points[:, 0].tolist() for k in (-3, -1, 0, 1, 3)})
    total = sum(quad(joint, a, b, limit=80)[0] for a, b in zip([-4, *cuts], [*cuts, 4]))
    assert tilted.Z == pytest.approx(total, rel=2e-3)
    for x in (-1.3, 0.2, 0.95):
        kernel = lambda u: (
            joint(u)
            * math.exp(-((x - abar**0.5 * u) ** 2) / (2 * (1 - abar)))
            / math.sqrt(2 * math.pi * (1 - abar))
        )
        near = [
            c
            for c in [*cuts, x / abar**0.5 - 0.05, x / abar**0.5, x / abar**0.5 + 0.05]
            if -4 < c < 4
        ]
        found = sum(
            quad(kernel, a, b, limit=80)[0] for a, b in zip([-4, *sorted(near)], [*sorted(near), 4])
        )
        q_t, qh_t = tilted.blurred(abar, torch.tensor([x], dtype=torch.float64))
        assert q_t.item() == pytest.approx(
            noised(LINE.law, abar).log_prob(f(x)).exp().item(), rel=1e-3
        )
        assert qh_t.item() == pytest.approx(found, rel=5e-3, abs=1e-6)


def test_the_blur_in_the_plane_is_the_noised_mixture():
    ring, axis, points = (
        ring_toy(),
        torch.linspace(-3.2, 3.2, 513),
        torch.tensor([-1.3, 0.4, 1.5], dtype=torch.float64),
    )
    tilted = tilt(ring.law, lambda x: torch.zeros(len(x)), axis)
    for t in (5, 300):
        q_t, qh_t = tilted.blurred(S.abar[t].item(), points)
        truth = (
            noised(ring.law, S.abar[t].item())
            .log_prob(torch.cartesian_prod(points, points).float())
            .exp()
            .view(3, 3)
        )
        torch.testing.assert_close(q_t.float(), truth, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(q_t, qh_t)
    assert tilted.Z == pytest.approx(1)


def test_the_ideal_membership_classifier_is_its_own_h_transform():
    "The tower property: E[1 − p_0(x0) | x_t] = 1 − p_t(x_t). Random labels do not have it: min(p, 1 − p) is not a straight line."
    clean = torch.ones(1)

    class Clean:
        abar = clean

    def member(schedule):
        return ideal_classifier(
            LINE.spikes, torch.ones(6, 1), LINE.broad, schedule, tau=0.0, share=LINE.share
        )

    log_A = lambda x: nn.functional.logsigmoid(
        -member(Clean)(x, torch.zeros(len(x), dtype=torch.int64))[:, 0]
    )
    tilted, xs = tilt(LINE.law, log_A, AXIS), torch.linspace(-2.5, 2.5, 51)
    for t in (5, 100, 500):
        q_t, qh_t = tilted.blurred(S.abar[t].item(), xs.double())
        torch.testing.assert_close(
            (qh_t / q_t).float(),
            torch.sigmoid(-member(S)(xs[:, None], torch.full((51,), t))[:, 0]),
            atol=2e-3,
            rtol=0,
        )
    q_t, qh_t = tilt(LINE.law, LOG_A, AXIS).blurred(S.abar[100].item(), xs.double())
    assert (
        (qh_t / q_t).log()
        - log_acceptance(CLASSIFIER(xs[:, None], torch.full((51,), 100)), 0.4, 2.0)
    ).abs().max() > 1


def unnoised(model, log_A):
    def guided(x_t, t):
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_A(x).sum(), x)
        return model(x_t, t) + score_to_eps(x_t, t, slope, S)

    return guided


@pytest.fixture(scope="module")
def line_samples():
    base, log_A, n = exact_denoiser(LINE.law, S), LOG_A, 20_000
    draw = lambda model, steps: final_sample(
        sample(model, S, (n, 1), steps, eta=0.0, generator=torch.Generator().manual_seed(0))
    )
    return (
        draw(doob(base, tilt(LINE.law, log_A, AXIS), S), 500),
        draw(unnoised(base, log_A), 100),
        [exact_rejection(LINE.law, log_A, n, seed)[0] for seed in range(4)],
    )


def test_the_h_transform_is_exact_rejection(line_samples):
    guided, _, draws = line_samples
    noise = statistics.mean(total_variation(a, b) for a, b in itertools.combinations(draws, 2))
    assert (
        ks_2samp(guided[:, 0], draws[0][:, 0]).pvalue > 0.01
        and statistics.mean(total_variation(guided, a) for a in draws) < 1.2 * noise
    )


def test_a_planted_wrong_h_fails_the_comparison(line_samples):
    _, wrong, draws = line_samples
    assert ks_2samp(wrong[:, 0], draws[0][:, 0]).pvalue < 1e-6 and total_variation(
        wrong, draws[0]
    ) > 5 * total_variation(draws[1], draws[0])


def test_the_h_transform_in_the_plane():
    ring, n = ring_toy(), 1000
    eight = ideal_classifier(ring.spikes, random_labels(12, 8, 0), ring.broad, S, share=ring.share)
    log_A, base = acceptance_rule(eight, 0.45, 3.0), exact_denoiser(ring.law, S)
    draw = lambda model: final_sample(
        sample(model, S, (n, 2), 100, generator=torch.Generator().manual_seed(0))
    )
    kept = exact_rejection(ring.law, log_A, n, 1)[0]
    assert (
        mmd_test(draw(doob(base, tilt(ring.law, log_A, torch.linspace(-3.2, 3.2, 385)), S)), kept)[
            1
        ]
        > 0.01
    )
    assert (
        mmd_test(draw(unnoised(base, log_A)), kept)[1] < 0.01
        and mmd_test(draw(base), kept)[1] < 0.01
    )


def test_acceptance_rate_is_Z():
    _, accepted, tried = exact_rejection(LINE.law, LOG_A, 20_000, 5)
    ci = binomtest(accepted, tried).proportion_ci(0.99, method="exact")
    assert ci.low < tilt(LINE.law, LOG_A, AXIS).Z < ci.high


def test_measures_on_known_samples(generator):
    a, b = torch.randn(500, 2, generator=generator), torch.randn(500, 2, generator=generator)
    assert mmd(a, a) == pytest.approx(0, abs=1e-3) and mmd(a, b) == pytest.approx(
        mmd_test(a, b)[0], rel=1e-3
    )
    k = lambda u, v: (
        sum(torch.exp(-(torch.cdist(u, v) ** 2) / (2 * h**2)) for h in (0.05, 0.15, 0.45)).mean()
        / 3
    )
    assert mmd(a, b + 1) == pytest.approx(
        (k(a, a) + k(b + 1, b + 1) - 2 * k(a, b + 1)).sqrt().item(), rel=1e-3
    )
    assert mmd_test(a, b)[1] > 0.05 and mmd_test(a, b + 0.5)[1] < 0.01
    x = torch.tensor([[0.0], [1.0], [9.0]])
    assert (
        total_variation(x, x) == 0
        and total_variation(x, -x - 0.5) == pytest.approx(1)
        and total_variation(x[:2], x) == pytest.approx(1 / 3)
    )


def test_p_values_of_the_permutation_test_are_calibrated():
    "Under equal laws one in five p-values lies below 0.2."
    p = [
        mmd_test(
            *torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(k)), permutations=99
        )[1]
        for k in range(200)
    ]
    ci = binomtest(sum(v <= 0.2 for v in p), len(p)).proportion_ci(0.999)
    assert ci.low < 0.2 < ci.high


def test_copies_lie_within_three_widths():
    assert LINE.copied(torch.tensor([[0.9], [0.98], [1.0], [-1.79]])).tolist() == [
        True,
        True,
        False,
        True,
    ]
    assert LINE.law.weights.sum().item() == pytest.approx(1) and LINE.law.weights[
        :6
    ].sum().item() == pytest.approx(LINE.share)


def test_the_certificate_is_exact_for_a_linear_logit_and_weaker_in_probabilities(generator):
    w, x = torch.tensor([3.0, 4.0]), torch.randn(200, 2, generator=generator)
    z, c = 2 + x @ w, math.log(0.7 / 0.3)
    bound = certified_distance(z, 0.3, 5.0)
    torch.testing.assert_close(bound, ((z.abs() - c) / 5).clamp(min=0))
    edge = x - (w / 5) * (z.sign() * bound)[:, None]  # walk that far downhill: exactly at the gate
    assert torch.allclose((2 + edge @ w)[bound > 0].abs(), torch.tensor(c), atol=1e-4)
    assert (certified_distance_p(z, 0.3, 5.0 / 4) <= bound + 1e-6).all()


def test_lipschitz_bound_holds_and_is_tight_for_one_layer(generator):
    net = nn.Sequential(
        nn.Linear(2, 32),
        nn.SiLU(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.LayerNorm(32),
        nn.Linear(32, 1),
    )
    steep = slopes(lambda x: net(x)[:, 0], 3 * torch.randn(2000, 2, generator=generator))
    assert steep.max() <= lipschitz_bound(net)
    one = nn.Linear(2, 1)
    assert lipschitz_bound([one]) == pytest.approx(
        slopes(lambda x: one(x)[:, 0], torch.zeros(1, 2)).item(), rel=1e-5
    )
    norm, flat, eps = nn.LayerNorm(4), torch.zeros(1, 4), 1e-5
    stretch = (norm(flat + eps * torch.tensor([1.0, -1, 0, 0])) - norm(flat)).norm() / (
        eps * 2**0.5
    )
    assert 0.5 * lipschitz_bound([norm]) < stretch <= lipschitz_bound([norm])


def test_the_record_on_file_keeps_what_the_chapter_says():
    record = json.loads(data_path("results/rejection.json").read_text())
    for name, n in (("line", 20_000), ("ring", 2000)):
        part = record[name]
        assert part["n"] == n and len(part["rows"]) == 5
        for row in part["rows"]:
            assert (
                row["p"] > 0.01
                and row["ratio"] <= 1.2
                and row["p_wrong"] < 0.01
                and row["accept_ci"][0] < part["Z"] < row["accept_ci"][1]
            )
    removed = [r for r in record["table"] if r["copies"] <= 0.05 * record["base_copies"]]
    assert min(r["ratio"] for r in removed) <= 2
    assert {r["classifier"] for r in record["table"] if r["kind"] == "random labels, ideal"} == {
        f"K = {K}" for K in (1, 2, 4, 8, 16)
    }


def test_where_members_and_others_cannot_be_told_apart_the_label_is_three_quarters():
    mixture = GaussianMixture(torch.zeros(1, 1), torch.full((1,), 0.1), torch.ones(1))
    classifier = ideal_classifier(mixture, torch.ones(1, 1), mixture, S)
    assert torch.sigmoid(
        classifier(torch.randn(5, 1), torch.full((5,), 10))
    ).flatten().tolist() == pytest.approx([0.75] * 5, rel=1e-5)
