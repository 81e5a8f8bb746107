"Every other protection against what is known of it: clipping, accounting, masks, balls, gradients."

import math
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from cpsample.core.copying import ideal_denoiser
from cpsample.core.ddpm import MLPDenoiser, generate, seeded
from cpsample.core.densities import GaussianMixture, exact_denoiser, mix, noised, round_mixture
from cpsample.core.guard import Guard
from cpsample.core.protection import protect
from cpsample.core.schedule import Schedule, eps_to_x0, make_schedule, signal_noise, x0_to_eps
from cpsample.judgement.baselines import (
    ambient_denoiser,
    ambient_loss,
    epsilon_spent,
    example_gradients,
    noise_multiplier,
    random_mask,
    safe_denoiser,
    safety_guided_flow,
    similarity_guidance,
    spell,
    train_private,
)
from cpsample.practice.unet import UNet
from cpsample.workshop.neighbours import nearest

SCHEDULE = make_schedule()
CLEAN = Schedule("clean", torch.ones(2) - 1e-7)


def seed(k):
    return torch.Generator().manual_seed(k)


def images(n, k=0):
    return torch.rand(n, 1, 8, 8, generator=seed(k)) * 2 - 1


def network():
    return seeded(0, lambda: MLPDenoiser((1, 8, 8), width=16, depth=1))


def unet(attention):
    return seeded(0, lambda: UNet((1, 8, 8), width=16, unshuffle=1, attention=attention)).to(
        memory_format=torch.channels_last
    )


def awake(model):
    "Networks start with zeros in their last layer: move them, so that every gradient is there."
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=seed(i)))
    return model


# differential privacy


@pytest.mark.filterwarnings("error")  # torch warns where an operation would go row by row
@pytest.mark.parametrize(
    "build", [network, lambda: unet(False), lambda: unet(True)], ids=["MLP", "UNet", "attention"]
)
def test_each_rows_gradient_is_that_row_alone(build):
    model, x = awake(build()), images(4)
    together, losses = example_gradients(model, x, SCHEDULE, draws=3, generator=seed(1))
    other = torch.cat([x[:1], images(3, k=9)])
    changed, _ = example_gradients(model, other, SCHEDULE, draws=3, generator=seed(1))
    for name in together:
        torch.testing.assert_close(changed[name][0], together[name][0], atol=1e-6, rtol=1e-4)
    assert any((changed[name][1] - together[name][1]).abs().max() > 1e-4 for name in together)
    g = seed(1)
    t = torch.randint(SCHEDULE.T, (12,), generator=g)
    noise = torch.randn(12, 1, 8, 8, generator=g)
    signal, sigma = signal_noise(SCHEDULE, t, noise)
    x_t = signal * x.repeat_interleave(3, 0) + sigma * noise
    for i in range(4):
        model.zero_grad()
        rows = slice(3 * i, 3 * i + 3)
        loss = F.mse_loss(model(x_t[rows], t[rows]), noise[rows])
        loss.backward()
        assert abs(loss.item() - losses[i].item()) < 1e-5
        for name, p in model.named_parameters():
            torch.testing.assert_close(together[name][i], p.grad, atol=1e-5, rtol=1e-3)


class Recorder(torch.optim.SGD):
    "Keeps the gradients that arrive at the optimiser."

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.seen = []

    def step(self, closure=None):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


def arriving(monkeypatch, x, sigma, bound, **settings):
    "The gradients [P] that reach the optimiser of `train_private`, step by step."
    recorders = []

    def build(parameters, lr):
        recorders.append(Recorder(list(parameters), lr))
        return recorders[-1]

    monkeypatch.setattr(torch.optim, "Adam", build)
    settings = dict(steps=1, rate=1.0, draws=2, generator=seed(0)) | settings
    list(train_private(awake(network()), x, SCHEDULE, sigma, bound=bound, **settings))
    return [torch.cat([p.flatten() for p in grads]) for grads in recorders[0].seen]


def gradients_of(x):
    "The gradients [N, P] of the images, with the draws of a first step that all of them join."
    generator = seed(0)
    torch.rand(len(x), generator=generator)  # who joins comes first
    model = awake(network())
    gradients, _ = example_gradients(model, x, SCHEDULE, draws=2, generator=generator)
    return torch.cat([part.flatten(1) for part in gradients.values()], 1)


def test_one_image_moves_the_sum_by_at_most_the_bound(monkeypatch):
    "Without noise: the sum of the clipped gradients over the expected size of a batch."
    pytest.importorskip("opacus")
    x, bound = images(6), 0.05
    flat = gradients_of(x)
    clipped = flat * (bound / flat.norm(dim=1, keepdim=True)).clamp(max=1)
    assert (flat.norm(dim=1) > bound).all() and clipped.norm(dim=1).max() <= bound * (1 + 1e-5)
    arrived = arriving(monkeypatch, x, 0.0, bound)[0]
    torch.testing.assert_close(arrived, clipped.sum(0) / 6, atol=1e-7, rtol=1e-3)
    assert (arrived * 6 - clipped[:5].sum(0)).norm() <= bound * (1 + 1e-3)


def test_short_gradients_are_not_clipped(monkeypatch):
    pytest.importorskip("opacus")
    x = images(5)
    arrived = arriving(monkeypatch, x, 0.0, bound=1e6)[0]
    torch.testing.assert_close(arrived, gradients_of(x).mean(0), atol=1e-6, rtol=1e-3)


def test_noise_has_the_size_that_the_accountant_is_told(monkeypatch):
    pytest.importorskip("opacus")
    sigma, bound = 3.0, 0.05
    steps = arriving(monkeypatch, images(8), sigma, bound, rate=0.5, steps=40)
    sums = torch.stack(steps) * 0.5 * 8  # clipped gradients (at most 8 · 0.05) and noise
    assert abs(sums.std() / (sigma * bound) - 1) < 0.05


def test_batches_are_drawn_image_by_image(monkeypatch):
    "Poisson sampling, as accounted for: sizes vary, empty ones included; the divisor stays."
    pytest.importorskip("opacus")
    import cpsample.judgement.baselines as baselines

    sizes = []

    def watched(model, x0, schedule, **settings):
        sizes.append(len(x0))
        return example_gradients(model, x0, schedule, **settings)

    monkeypatch.setattr(baselines, "example_gradients", watched)
    settings = dict(rate=0.2, draws=1, generator=seed(0))
    records = list(train_private(network(), images(10), SCHEDULE, 1.0, 300, **settings))
    assert 0 in sizes and abs(np.mean(sizes) - 2) < 0.3 and abs(np.var(sizes) - 1.6) < 0.5
    assert [record.step for record in records] == list(range(1, 301))
    assert all(math.isfinite(record.loss) for record in records)


@pytest.mark.parametrize("sigma, steps", [(1.5, 1), (8, 30), (30, 900)])
def test_epsilon_of_full_batches_is_the_gaussian_mechanisms(sigma, steps):
    pytest.importorskip("opacus")
    s = sigma / math.sqrt(steps)

    def delta(epsilon):
        a, b = 1 / (2 * s), epsilon * s
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)

    exact = brentq(lambda epsilon: delta(epsilon) - 1e-4, 0, 200)
    assert abs(epsilon_spent(sigma, 1e-4, 1, steps) - exact) < 0.03 * exact + 0.02
    assert epsilon_spent(sigma, 1e-4, 1, steps, accountant="rdp") >= exact


def test_noise_and_epsilon_are_inverse_and_ordered():
    pytest.importorskip("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigmas = [noise_multiplier(e, 1e-3, 0.2, 100) for e in (1, 10)]
    for e, sigma in zip((1, 10), sigmas):
        assert e * 0.97 <= epsilon_spent(sigma, 1e-3, 0.2, 100) <= e * 1.001
    assert sigmas[0] > sigmas[1] and noise_multiplier(10, 1e-3, 0.2, 400) > sigmas[1]


def test_privacy_mistakes(monkeypatch):
    for bad in ((0, 1e-3, 0.2, 10), (1, 0, 0.2, 10), (1, 1e-3, 1.5, 10), (1, 1e-3, 0.2, 0)):
        with pytest.raises(ValueError, match="privacy needs"):
            noise_multiplier(*bad)
    pytest.importorskip("opacus")
    for name in [m for m in sys.modules if m.split(".")[0] == "opacus"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ImportError, match=r"cpsample\[baselines\]"):
        noise_multiplier(1, 1e-3, 0.2, 10)


class Layers(torch.nn.Module):
    "A denoiser of images of 8×8 pixels with some layers in its middle."

    def __init__(self, *layers):
        super().__init__()
        flatten, first, last = torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 64)
        self.layers = torch.nn.Sequential(flatten, first, *layers, last)

    def forward(self, x, t):
        return self.layers(x).view_as(x)


class DropsInForward(Layers):
    def forward(self, x, t):
        return F.dropout(super().forward(x, t), 0.5, self.training)


class Chooses(Layers):
    def forward(self, x, t):
        return super().forward(x, t) * (1 if x.sum() > 0 else 2)


def guarded():
    guard = Guard(lambda x, t: x.flatten(1)[:, :1], SCHEDULE, report={"alpha": 0.05})
    return torch.nn.Sequential(protect(Layers(), guard))


NORM = [torch.nn.Unflatten(1, (4, 4)), torch.nn.InstanceNorm1d(4, track_running_stats=True)]


@pytest.mark.parametrize(
    "build, reason",
    [
        (lambda: Layers(torch.nn.Dropout(0.1)), "as dropout does: build it without"),
        (lambda: Layers(torch.nn.AlphaDropout(0.1)), "as dropout does"),
        (DropsInForward, "as dropout does"),
        (lambda: Layers(torch.nn.BatchNorm1d(16)), "privately: BatchNorm cannot support"),
        (lambda: Layers(torch.nn.Dropout(0.1)).eval(), "privately: Model needs to be in training"),
        (lambda: Layers(*NORM, torch.nn.Flatten()), "cannot be differentiated by image"),
        (Chooses, "cannot be differentiated by image"),
        (guarded, "train its .model"),
    ],
)
def test_networks_that_cannot_be_trained_privately_are_refused_in_one_line(build, reason):
    pytest.importorskip("opacus")
    with pytest.raises(ValueError, match=rf"\A[^\n]*{reason}[^\n]*\Z") as refusal:
        next(train_private(build(), images(4), SCHEDULE, 1.0, 5, rate=1.0))
    assert str(refusal.value).count(". ") == 0  # one sentence


def test_a_mistake_of_the_network_itself_is_not_put_down_to_privacy():
    pytest.importorskip("opacus")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        next(train_private(Layers(torch.nn.Linear(3, 16)), images(4), SCHEDULE, 1.0, 5, rate=1.0))
    next(train_private(Layers(torch.nn.Dropout(0.0)), images(4), SCHEDULE, 1.0, 5, rate=1.0))


# ambient diffusion


def test_masks_are_per_pixel_and_the_same_in_all_channels():
    mask = random_mask(torch.zeros(200, 3, 8, 8), 0.3, seed(0))
    assert mask.shape == (200, 1, 8, 8) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean() - 0.7) < 0.02 and (mask.mean(0) - 0.7).abs().max() < 0.15


class Linear(torch.nn.Module):
    """Predicts the pixels of a row of three by those seen: the most general linear guess.

    It has one matrix for each pattern of what is seen.
    """

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(8, 3, 3))

    def forward(self, x, t):
        value, seen = x[:, 0, 0], x[:, 1, 0]
        pattern = (seen @ torch.tensor([1.0, 2.0, 4.0])).long()
        guess = torch.einsum("bij,bj->bi", self.weights[pattern], value)
        return torch.stack([guess, seen], 1)[:, :, None]


def test_ambient_loss_finds_the_conditional_mean_of_a_gaussian():
    "Three correlated pixels, each missing in 40 %: every conditional mean, from what is there."
    cov = torch.tensor([[1.0, 0.7, 0.2], [0.7, 1.0, 0.5], [0.2, 0.5, 1.0]])
    x0 = torch.randn(40_000, 3, generator=seed(0)) @ torch.linalg.cholesky(cov).T
    x0 = x0.view(-1, 1, 1, 3)
    mask = random_mask(x0, 0.4, seed(1))
    model, g = Linear(), seed(2)
    opt = torch.optim.Adam(model.parameters(), 0.05)
    for step in range(400):
        opt.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        opt.zero_grad()
        ambient_loss(model, x0 * mask, mask, CLEAN, further=0.3, generator=g).backward()
        opt.step()

    for pattern in range(1, 7):  # 7: nothing hidden that could be asked for
        seen = torch.tensor([pattern >> i & 1 for i in range(3)]).bool()
        exact = torch.zeros(3, 3)
        exact[:, seen] = cov[:, seen] @ torch.linalg.inv(cov[seen][:, seen])
        learned = model.weights[pattern].detach()
        assert (learned[:, seen] - exact[:, seen]).abs().max() < 0.06, pattern


def test_the_loss_never_looks_at_missing_pixels():
    model, x0 = awake(seeded(0, lambda: MLPDenoiser((2, 8, 8), width=16, depth=1))), images(8)
    mask = random_mask(x0, 0.5, seed(0))
    spoiled = torch.where(mask == 1, x0, torch.full_like(x0, 100.0))
    clean, other = (
        ambient_loss(model, x, mask, SCHEDULE, generator=seed(3)).item() for x in (x0, spoiled)
    )
    assert clean == pytest.approx(other, rel=1e-5)


def test_the_sampler_keeps_its_mask_and_reads_x0():
    asked = []

    class Network(torch.nn.Module):
        def forward(self, x, t):
            asked.append(x.clone())
            return torch.full_like(x, 0.25)

    model = ambient_denoiser(Network(), SCHEDULE, 0.3, seed=5)
    x_t, t = torch.randn(6, 3, 4, 4, generator=seed(0)), torch.tensor([0, 5, 100, 400, 800, 999])
    x0_pred = eps_to_x0(x_t, t, model(x_t, t), SCHEDULE)
    torch.testing.assert_close(x0_pred, torch.full_like(x_t, 0.25), atol=2e-2, rtol=0)

    model(x_t + 1, t)
    seen = asked[0][:, 3:]
    assert torch.equal(seen, asked[1][:, 3:]) and 0.1 < (seen == 0).float().mean() < 0.5
    assert (asked[0][:, :3][(seen == 0).expand(-1, 3, -1, -1)] == 0).all()


# repellency


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 2.0))
def test_x0_never_lies_inside_a_lone_ball(k, radius):
    z = torch.randn(1, 6, generator=seed(k))
    away = torch.tensor([0.0, 1e-5, 0.1, 0.2, 0.5, 1, 2, 3, 5]).view(9, 1)
    x0 = z + torch.randn(9, 6, generator=seed(k + 1)) * away
    t = torch.full((9,), 200)

    def model(x_t, t):
        return x0_to_eps(x_t, t, x0, SCHEDULE)

    x_t = torch.randn(9, 6, generator=seed(k + 2))
    moved = eps_to_x0(x_t, t, spell(model, SCHEDULE, z, radius)(x_t, t), SCHEDULE)
    before, after = (x0 - z).norm(dim=1), (moved - z).norm(dim=1)
    torch.testing.assert_close(after, before.clamp(min=radius), atol=2e-3, rtol=2e-3)
    for i in range(2, 9):  # straight away from the centre
        direction = (x0 - z)[i] / before[i]
        torch.testing.assert_close((moved - z)[i] / after[i], direction, atol=5e-3, rtol=0)


def test_no_sample_lands_in_a_ball_and_the_distant_are_not_touched():
    points = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [0.0, -0.6]])
    mixture = GaussianMixture(points, torch.full((3,), 0.03), torch.ones(3) / 3)
    model, memory = exact_denoiser(mixture, SCHEDULE), ideal_denoiser(points, SCHEDULE)

    def nearest_sample(model):
        samples = generate(model, SCHEDULE, (2,), 200, steps=50)
        return nearest(samples, points)[0].min()

    assert nearest_sample(model) < 0.02
    assert nearest_sample(spell(model, SCHEDULE, points, 0.25)) > 0.25 - 1e-3
    # The memory starts from the very centres.
    assert nearest_sample(spell(memory, SCHEDULE, points, 0.25)) > 0.25 - 1e-3

    x_t, t = torch.randn(50, 2, generator=seed(0)), torch.full((50,), 30)
    eps = model(x_t, t)
    outside = nearest(eps_to_x0(x_t, t, eps, SCHEDULE), points)[0][:, 0] > 0.01
    repelled = spell(model, SCHEDULE, points, 0.01)(x_t, t)
    assert outside.any() and torch.equal(repelled[outside], eps[outside])
    weak = spell(model, SCHEDULE, points, 0.25, strength=0.0)(x_t, t)
    assert torch.equal(weak, eps)


def test_only_so_many_balls_as_there_are():
    z = torch.zeros(2, 3)
    z[1, 0] = 1
    x0, t = torch.tensor([[0.5, 0.1, 0.0]]), torch.tensor([200])

    def model(x_t, t):
        return x0_to_eps(x_t, t, x0, SCHEDULE)

    moved = eps_to_x0(x0, t, spell(model, SCHEDULE, z, 1.0)(x0, t), SCHEDULE)
    d = (x0 - z).norm(dim=1)
    expected = x0 + ((1 / d - 1)[:, None] * (x0 - z)).sum(0)  # both balls push
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=0)


# softer sums


def at_rest(x_t, t):
    "A denoiser that predicts x̂₀ = x_t."
    return x0_to_eps(x_t, t, x_t, SCHEDULE)


def moved_by(method, x, t):
    return eps_to_x0(x, t, method(x, t), SCHEDULE) - x


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.3, 2.0), st.floats(0.1, 5.0))
def test_the_flow_goes_down_its_potential(k, width, strength):
    refs = torch.randn(12, 4, generator=seed(k), dtype=torch.float64)
    x = torch.randn(6, 4, generator=seed(k + 1), dtype=torch.float64).requires_grad_()
    potential = (-(torch.cdist(x, refs) ** 2) / (2 * width**2)).exp().sum()
    (gradient,) = torch.autograd.grad(-potential, x)
    t, x = torch.full((6,), 200), x.detach()
    flow = safety_guided_flow(at_rest, SCHEDULE, refs, width, strength)
    expected = strength * width**2 * gradient
    torch.testing.assert_close(moved_by(flow, x, t), expected, atol=1e-3, rtol=1e-3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.2, 2.0), st.floats(0.1, 5.0))
def test_the_safe_denoiser_leaves_the_mean_of_what_is_near_by_a_constant_factor(k, width, beta):
    refs = torch.randn(12, 4, generator=seed(k), dtype=torch.float64)
    x = torch.randn(40, 4, generator=seed(k + 1), dtype=torch.float64)
    kernel = (-(torch.cdist(x, refs) ** 2) / (2 * width**2)).exp()
    unsafe = kernel @ refs / kernel.sum(1, keepdim=True)
    is_near = kernel.sum(1, keepdim=True) > math.exp(-2)

    t = torch.full((40,), 200)
    safe = safe_denoiser(at_rest, SCHEDULE, refs, width, beta)
    expected = torch.where(is_near, beta * (x - unsafe), torch.zeros_like(x))
    torch.testing.assert_close(moved_by(safe, x, t), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(safe(x, t)[~is_near[:, 0]], at_rest(x, t)[~is_near[:, 0]])


def test_with_the_exact_odds_the_safe_denoiser_is_the_denoiser_of_what_is_safe():
    "Theorem 3.2 of its paper, on a plane: the h-transform of an acceptance of 0 and 1."
    points = torch.tensor([[0.6, 0.6], [-0.6, 0.6], [0.0, -0.6]])
    unsafe, safe = round_mixture(points[:1], 0.1), round_mixture(points[1:], 0.1)
    everything = mix(unsafe, safe, 1 / 3)
    x_t = torch.randn(100, 2, generator=seed(0))
    for level in (50, 300, 700):
        t, abar = torch.full((100,), level), SCHEDULE.abar[level].item()

        def expected(mixture):
            return eps_to_x0(x_t, t, exact_denoiser(mixture, SCHEDULE)(x_t, t), SCHEDULE)

        log_odds = noised(unsafe, abar).log_prob(x_t) - noised(safe, abar).log_prob(x_t)
        beta = 0.5 * log_odds.exp()[:, None]
        corrected = expected(everything) + beta * (expected(everything) - expected(unsafe))
        fine = beta[:, 0] < 1e3  # beyond, a difference of nearly equal numbers is multiplied
        torch.testing.assert_close(corrected[fine], expected(safe)[fine], atol=5e-3, rtol=1e-2)
        assert fine.sum() > 50


def test_the_flow_pushes_in_its_window_only_and_leaves_the_distant_alone():
    refs = torch.zeros(1, 3)
    x = torch.tensor([[0.5, 0, 0], [0.5, 0, 0], [9.0, 0, 0]])
    t = torch.tensor([99, 100, 500])
    plain = at_rest(x, t)
    eps = safety_guided_flow(at_rest, SCHEDULE, refs, 1.0, 2.0, above=100)(x, t)
    assert torch.equal(eps[[0, 2]], plain[[0, 2]]) and not torch.equal(eps[1], plain[1])


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda bad: spell(at_rest, SCHEDULE, torch.zeros(1, 3), bad), "radius"),
        (
            lambda bad: similarity_guidance(at_rest, SCHEDULE, torch.zeros(1, 3), bad, 1.0),
            "threshold",
        ),
    ],
)
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_push_that_reaches_nothing_is_refused(wrap, reason, bad):
    with pytest.raises(ValueError, match=f"{reason} must be finite and above 0"):
        wrap(bad)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_push_that_attracts_is_refused(bad):
    z = torch.zeros(1, 3)
    for wrap in (
        lambda: spell(at_rest, SCHEDULE, z, 1.0, strength=bad),
        lambda: similarity_guidance(at_rest, SCHEDULE, z, 1.0, bad),
        lambda: safe_denoiser(at_rest, SCHEDULE, z, 1.0, bad),
        lambda: safety_guided_flow(at_rest, SCHEDULE, z, 1.0, bad),
    ):
        with pytest.raises(ValueError, match="strength of a push must be finite and not below 0"):
            wrap()


def test_a_window_beyond_all_levels_and_no_images_to_look_at_are_refused():
    z = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="above must be a level, 0 to 999, got 2000"):
        safety_guided_flow(at_rest, SCHEDULE, z, 1.0, 1.0, above=2000)
    for k in (0, -1, 2.5):
        with pytest.raises(ValueError, match="k must be"):
            spell(at_rest, SCHEDULE, z, 1.0, k=k)


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("method", [safe_denoiser, safety_guided_flow])
def test_a_kernel_without_width_is_refused(method, width):
    with pytest.raises(ValueError, match="width must be finite and above 0"):
        method(at_rest, SCHEDULE, torch.zeros(1, 3), width, 1.0)


@pytest.mark.parametrize("method", [safe_denoiser, safety_guided_flow])
def test_without_strength_nothing_changes_and_rows_are_alone(method):
    refs, x, t = images(20), images(8, 1), torch.full((8,), 300)
    plain = at_rest(x, t)
    assert torch.equal(method(at_rest, SCHEDULE, refs, 3.0, 0.0)(x, t), plain)
    pushed = method(at_rest, SCHEDULE, refs, 3.0, 1.0)
    alone = torch.cat([pushed(x[i : i + 1], t[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(pushed(x, t), alone, atol=1e-5, rtol=1e-4)
    assert not torch.equal(pushed(x, t), plain)


# similarity guidance


@torch.no_grad()
def test_the_push_is_the_gradient_of_the_similarity():
    model, refs = awake(network()).double(), images(5).double()
    x_t = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=seed(0))
    t = torch.tensor([20, 150, 500])
    eps = model(x_t, t)
    push = similarity_guidance(model, SCHEDULE, refs, 1e3, 2.0)(x_t, t) - eps
    z = refs[nearest(eps_to_x0(x_t, t, eps, SCHEDULE), refs)[1][:, 0]]

    def similarity(x):
        apart = eps_to_x0(x, t, model(x, t), SCHEDULE) - z
        return -apart.flatten(1).square().mean(1).sqrt()

    for i in (0, 17, 63):
        bump = torch.zeros(64, dtype=torch.float64)
        bump[i] = 1e-5
        bump = bump.view(1, 8, 8)
        slope = (similarity(x_t + bump) - similarity(x_t - bump)) / 2e-5
        expected = 2.0 * (1 - SCHEDULE.abar[t]).sqrt() * slope
        torch.testing.assert_close(push.flatten(1)[:, i], expected, atol=1e-6, rtol=1e-3)


def test_guidance_moves_x0_away_and_only_near_the_training_set():
    points = torch.tensor([[0.6, 0.6], [-0.6, -0.6]])
    mixture = GaussianMixture(points, torch.full((2,), 0.1), torch.ones(2) / 2)
    model = exact_denoiser(mixture, SCHEDULE)
    x_t, t = points[:1] + torch.tensor([[0.05, 0.02], [1.5, -0.9]]), torch.tensor([60, 60])
    eps = model(x_t, t)
    guided = similarity_guidance(model, SCHEDULE, points, 0.12, 1.0)(x_t, t)

    def distance(eps):
        return nearest(eps_to_x0(x_t, t, eps, SCHEDULE), points)[0][:, 0]

    assert distance(guided)[0] > distance(eps)[0] + 1e-3
    assert torch.equal(guided[1], eps[1]) and not guided.requires_grad
    assert torch.equal(similarity_guidance(model, SCHEDULE, points, 0.12, 0.0)(x_t, t), eps)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda refs: spell(lambda x, t: x, SCHEDULE, refs, 1.0),
        lambda refs: similarity_guidance(lambda x, t: x, SCHEDULE, refs, 1.0, 1.0),
        lambda refs: safe_denoiser(lambda x, t: x, SCHEDULE, refs, 1.0, 1.0),
        lambda refs: safety_guided_flow(lambda x, t: x, SCHEDULE, refs, 1.0, 1.0),
    ],
)
def test_training_images_are_checked(wrap):
    with pytest.raises(ValueError, match="training images hold NaN"):
        wrap(torch.full((3, 2), math.nan))
    with pytest.raises(ValueError, match="non-empty batch"):
        wrap(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        wrap(torch.zeros(4, 3))(torch.zeros(2, 2), torch.tensor([5, 5]))
