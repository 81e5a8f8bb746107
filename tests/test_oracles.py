"Schedules, noise and sampling agree with diffusers; densities and distances with closed forms."

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_statistics_to_metric

from cpsample.core.ddpm import sample
from cpsample.core.densities import MIXTURES, GaussianMixture, noised
from cpsample.core.digit_encoder import frechet_distance
from cpsample.core.schedule import (
    Schedule,
    add_noise,
    eps_to_score,
    eps_to_v,
    eps_to_x0,
    make_schedule,
    score_to_eps,
    signal_noise,
    v_to_eps,
    x0_to_eps,
)

NAMES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [10, 100, 1000])
def test_schedules_are_those_of_diffusers(name, T):
    theirs = DDPMScheduler(T, beta_schedule=NAMES[name], beta_start=1e-4, beta_end=0.02)
    close(make_schedule(name, T).abar, theirs.alphas_cumprod)


@pytest.mark.parametrize("name", NAMES)
def test_noise_and_velocity_are_those_of_diffusers(name, generator):
    theirs, schedule = DDPMScheduler(1000, beta_schedule=NAMES[name]), make_schedule(name)
    x0 = torch.randn(64, 3, 8, 8, generator=generator)
    t = torch.randint(1000, (64,), generator=generator)
    x_t, noise = add_noise(x0, t, schedule, generator=generator)
    close(x_t, theirs.add_noise(x0, noise, t))
    mild = t < 700  # the velocity from x_t and eps divides by √ᾱ
    close(eps_to_v(x_t, t, noise, schedule)[mild], theirs.get_velocity(x0, noise, t)[mild], 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_conversions_return(name, generator):
    schedule = make_schedule(name)
    x_t, eps = torch.randn(2, 64, 5, generator=generator, dtype=torch.float64)
    t = torch.randint(900, (64,), generator=generator)
    round_trips = [(eps_to_x0, x0_to_eps), (eps_to_v, v_to_eps), (eps_to_score, score_to_eps)]
    for from_eps, to_eps in round_trips:
        close(to_eps(x_t, t, from_eps(x_t, t, eps, schedule), schedule), eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_of_the_lowest_levels_survives_half_precision(dtype):
    schedule, t = make_schedule(), torch.arange(1000)
    signal, sigma = signal_noise(schedule, t, torch.zeros(1000, 1, dtype=dtype))
    assert signal.dtype == sigma.dtype == dtype
    exact = (1 - schedule.abar.double()).sqrt()
    torch.testing.assert_close(sigma[:, 0].double(), exact, atol=0, rtol=5e-3)


def test_a_noised_mixture_has_the_variance_of_noised_samples(generator):
    schedule, n = make_schedule(), 100_000
    one = GaussianMixture(torch.tensor([[2.0]]), torch.tensor([3.0]), torch.tensor([1.0]))
    x0, t = one.sample(n, generator), torch.full((n,), 250)
    x_t, _ = add_noise(x0, t, schedule, generator=generator)
    formula = noised(one, schedule.abar[250].item())
    assert x_t.mean().item() == pytest.approx(formula.means.item(), abs=0.05)
    assert x_t.std().item() == pytest.approx(formula.stds.item(), rel=0.02)


def diffusers_path(scheduler, network, steps, seed, dtype, **options):
    "x_t before each step and the final sample of a diffusers scheduler, from the same noise."
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    x, path = torch.randn(4, 1, 8, 8, generator=generator, dtype=dtype), []
    for t in scheduler.timesteps:
        path.append(x)
        with torch.no_grad():
            eps = network(x, t.expand(4))
        if options.get("eta") == 0 or t == 0:
            noise = torch.zeros_like(x)
        else:
            noise = torch.randn(x.shape, generator=generator, dtype=dtype)
        x = scheduler.step(eps, t, x, variance_noise=noise, **options).prev_sample
    return [*path, x]


def our_path(network, schedule, levels, seed, **options):
    options |= {"steps": levels, "generator": torch.Generator().manual_seed(seed)}
    steps = list(sample(network, schedule, (4, 1, 8, 8), **options))
    return [s.x_t for s in steps] + [steps[-1].x0_pred]


# Long or unclipped paths reach values of hundreds, where float32 rounding alone exceeds 1e-5:
# those are compared in float64, with the scheduler's own ᾱ. Short clipped ones are compared as
# they are used, in float32 with our ᾱ.
STEPS = pytest.mark.parametrize("steps", [20, 50, 250, 1000])


def compare(scheduler, network, steps, eta, clip, theirs_options=None):
    "Both paths, from the same noise, through the same network."
    dtype = torch.float32 if clip and steps <= 50 else torch.float64
    schedule = Schedule("theirs", scheduler.alphas_cumprod)
    if dtype == torch.float32:
        schedule = make_schedule()
    network = network.to(dtype)
    theirs = diffusers_path(scheduler, network, steps, 3, dtype, **theirs_options or {})
    levels = scheduler.timesteps.tolist()
    ours = our_path(network, schedule, levels, 3, eta=eta, clip=clip, dtype=dtype)
    assert len(ours) == len(theirs) == steps + 1
    for x, same_x in zip(ours, theirs):
        close(x, same_x)


@STEPS
@pytest.mark.parametrize("clip", [None, 1])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_paths_are_those_of_diffusers(network, steps, clip, eta):
    theirs = DDIMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=clip is not None,
        timestep_spacing="leading",
    )
    options = {"use_clipped_model_output": True, "eta": eta}
    compare(theirs, network, steps, eta=eta, clip=clip, theirs_options=options)


class GivenNoise(DDPMScheduler):
    "DDPM whose `step` takes the noise as an argument, as DDIM's does."

    def step(self, eps, t, x, variance_noise):
        output = super().step(eps, t, x, generator=torch.Generator().manual_seed(0))
        if t > 0:
            own_noise = torch.randn(
                x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype
            )
            std = self._get_variance(t).sqrt()
            output.prev_sample += std * (variance_noise - own_noise)
        return output


@STEPS
@pytest.mark.parametrize("clip", [None, 1])
def test_eta_one_is_ddpm(network, steps, clip):
    theirs = GivenNoise(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=clip is not None,
        variance_type="fixed_small",
        timestep_spacing="leading",
    )
    compare(theirs, network, steps, eta=1.0, clip=clip)


mixtures = st.integers(0, 10_000).map(
    lambda seed: random_mixture(torch.Generator().manual_seed(seed))
)


def random_mixture(g):
    M = int(torch.randint(1, 6, (1,), generator=g))
    D = int(torch.randint(1, 4, (1,), generator=g))
    return GaussianMixture(
        2 * torch.randn(M, D, generator=g, dtype=torch.float64),
        0.1 + torch.rand(M, generator=g, dtype=torch.float64),
        torch.rand(M, generator=g, dtype=torch.float64).softmax(0),
    )


@given(mixtures, st.floats(0.001, 0.999))
@settings(max_examples=60, deadline=None)
def test_mixture_scores_are_the_gradient_of_the_log_density(mixture, abar):
    q = noised(mixture, abar)
    shape, generator = (20, mixture.means.shape[1]), torch.Generator().manual_seed(1)
    x = 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(q.log_prob(x).sum(), x)
    close(q.score(x.detach()), gradient, 1e-9)


def test_mixture_log_density_is_that_of_torch():
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

    ours = MIXTURES["eight_gaussians"]()
    components = Independent(Normal(ours.means, ours.stds[:, None].expand(-1, 2)), 1)
    theirs = MixtureSameFamily(Categorical(ours.weights), components)
    x = 2 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    close(ours.log_prob(x), theirs.log_prob(x), 1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_is_that_of_torch_fidelity(seed):
    g = torch.Generator().manual_seed(seed)
    sets, statistics = [], []
    for _ in range(2):
        features = torch.randn(500, 16, generator=g) @ torch.randn(16, 16, generator=g)
        features = features + torch.randn(16, generator=g)
        sets.append(features)
        exact = features.double().numpy()
        statistics.append({"mu": exact.mean(0), "sigma": np.cov(exact, rowvar=False)})
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*sets) == pytest.approx(theirs, rel=1e-6)
