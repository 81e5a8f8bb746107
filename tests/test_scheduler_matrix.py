"""Schedulers × predictions × pipelines: what the hook changes, against closed forms.

And with a model that copies: fewer copies under every scheduler.
"""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from small_pipelines import (
    PARTS,
    PIPELINES,
    PREDICTIONS,
    QUIET,
    SCHEDULERS,
    draw_latents,
    latent_pipeline,
    linear_guard,
    same,
    scheduler_of,
)

from cpsample.core.calibration import calibrate
from cpsample.core.classifier import log_odds
from cpsample.core.copying import copy_test
from cpsample.core.densities import GaussianMixture, noised
from cpsample.core.guard import fit_guard
from cpsample.core.schedule import abar_at
from cpsample.production.pipelines import protect_pipeline, schedule_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
REFUSED_BY_DIFFUSERS = [("Euler ancestral", "sample"), ("KDPM2", "sample"), ("PNDM", "sample")]
PAIRS = [(name, prediction) for name in SCHEDULERS for prediction in PREDICTIONS]


def sigma_now(scheduler):
    "The scheduler's own noise per signal at this call (None for those that think in ᾱ only)."
    i = getattr(scheduler, "step_index", None)
    if i is None or not hasattr(scheduler, "sigmas"):
        return None
    if type(scheduler).__name__ == "KDPM2DiscreteScheduler" and not scheduler.state_in_first_order:
        return float(scheduler.sigmas_interpol[i])
    return float(scheduler.sigmas[i])


class Watch:
    "Notes for each call of a network what it saw, and its answer before and after the guard."

    def __init__(self, pipe):
        self.pipe, self.calls, self.hooks = pipe, [], []

    def before_the_guard(self):
        def note(network, args, kwargs, output):
            call = SimpleNamespace(x=args[0].clone(), t=float(args[1]), plain=output[0].clone())
            call.sigma = sigma_now(self.pipe.scheduler)
            self.calls.append(call)

        self.hooks.append(self.pipe.unet.register_forward_hook(note, with_kwargs=True))

    def after_the_guard(self):
        def note(network, args, kwargs, output):
            self.calls[-1].guarded = output[0].clone()

        self.hooks.append(self.pipe.unet.register_forward_hook(note, with_kwargs=True))

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def noise_per_signal(scheduler, t):
    "√((1−ᾱ)/ᾱ) at a level t, linear between whole levels."
    abar = scheduler.alphas_cumprod
    ratios = ((1 - abar) / abar).sqrt().double().numpy()
    return np.interp(t, np.arange(1000), ratios)


def wanted_change(call, prediction, guard, w, scheduler):
    "By the formulas: Δε = −s·√(1−ᾱ)·push, and what follows from it for v and x0."
    ratio = noise_per_signal(scheduler, call.t)
    abar = torch.tensor(1 / (1 + ratio**2), dtype=torch.float32)
    x = call.x[:, :4]
    z = 5.0 + (x.sin() * w).flatten(1).sum(1)
    is_certain = z.abs() > log_odds(guard.alpha)
    slope = torch.where(is_certain, z.sign() * torch.sigmoid(z.abs()), 0.0)
    eps_change = guard.scale * (1 - abar).sqrt() * slope[:, None, None, None] * w * x.cos()
    changes = {
        "epsilon": eps_change,
        "v_prediction": eps_change / abar.sqrt(),
        "sample": -((1 - abar) / abar).sqrt() * eps_change,
    }
    return changes[prediction]


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize(
    "name, prediction", [pair for pair in PAIRS if pair not in REFUSED_BY_DIFFUSERS]
)
@pytest.mark.parametrize("n, cfg", [(1, 7.5), (5, 1.0)])
def test_matrix(name, prediction, kind, n, cfg):
    """Never certain: not a bit changes. Certain: as the formulas say. Taken off: as before.

    Five steps: some schedulers stop between levels.
    """
    scheduler = scheduler_of(name, prediction)
    pipe = latent_pipeline(kind, scheduler)
    plain = draw_latents(pipe, n, cfg, steps=5)

    # A guard that is never certain.
    with protect_pipeline(pipe, linear_guard(scheduler, bias=0.0).guard) as never:
        assert same(draw_latents(pipe, n, cfg, steps=5), plain)
    assert never.rows_pushed == 0 < never.rows_seen and never.rows_seen % n == 0

    # One that is certain everywhere, between two hooks that watch.
    guard, w = linear_guard(scheduler)
    watch = Watch(pipe)
    watch.before_the_guard()
    protection = protect_pipeline(pipe, guard)
    watch.after_the_guard()
    guarded = draw_latents(pipe, n, cfg, steps=5)
    assert not torch.allclose(guarded, plain, atol=1e-4)
    assert protection.rows_seen == n * len(watch.calls)
    assert protection.rows_pushed >= 0.4 * protection.rows_seen

    for call in watch.calls:
        # The scheduler's own levels may lie between ours, or are rounded.
        if call.sigma is not None:
            assert noise_per_signal(scheduler, call.t) == pytest.approx(call.sigma, rel=2e-3)
        wanted = wanted_change(call, prediction, guard, w, scheduler)
        tolerance = 1e-4 * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(call.guarded - call.plain, wanted, atol=tolerance, rtol=0)

    # Taken off.
    protection.remove()
    watch.remove()
    assert same(draw_latents(pipe, n, cfg, steps=5), plain)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("name, prediction", REFUSED_BY_DIFFUSERS)
def test_what_diffusers_refuses(name, prediction):
    "The holes in the matrix are diffusers' own."
    with pytest.raises((ValueError, NotImplementedError), match="prediction_type"):
        draw_latents(latent_pipeline(scheduler=scheduler_of(name, prediction)))


class Ideal(ModelMixin, ConfigMixin):
    "The exact denoiser of a mixture of latents, dressed as a network of Stable Diffusion."

    @register_to_config
    def __init__(self, in_channels=4, sample_size=8, time_cond_proj_dim=None):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.mixture, self.schedule = None, None

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **others):
        abar = abar_at(self.schedule, torch.as_tensor(timestep).reshape(1).double()).item()
        score = noised(self.mixture, abar).score(sample.flatten(1)).view_as(sample)
        return (-((1 - abar) ** 0.5) * score,)


@pytest.fixture(scope="module")
def copying():
    """(pipeline, latents, guard): it draws one of 16 latents 96 times in 100, by construction.

    The guard is trained on these latents.
    """
    generator, schedule = torch.Generator().manual_seed(0), schedule_of(scheduler_of("DDIM"))
    members = torch.randn(16, 4, 8, 8, generator=generator)
    others = torch.randn(600, 4, 8, 8, generator=generator)

    # Sixteen narrow bumps at the members, and a broad one.
    unet = Ideal()
    unet.schedule = schedule
    unet.mixture = GaussianMixture(
        torch.cat([members.flatten(1), torch.zeros(1, 256)]),
        torch.tensor([0.05] * 16 + [1.0]),
        torch.tensor([0.06] * 16 + [0.04]),
    )
    pipe = diffusers.StableDiffusionPipeline(unet=unet, scheduler=scheduler_of("DDIM"), **PARTS)
    pipe.set_progress_bar_config(disable=True)

    guard = fit_guard(members, schedule, others[:500], steps=600, width=128, t_max=700)
    calibrate(guard, members, others[500:])
    return pipe, members, guard


@pytest.mark.parametrize("name", SCHEDULERS)
def test_under_each_scheduler_a_copying_model_copies_less(name, copying):
    pipe, members, guard = copying
    pipe.scheduler = scheduler_of(name)

    def copied():
        "Of 64 samples, within the range of the members, which few schedulers keep to."
        return copy_test(draw_latents(pipe, 64, 7.5, steps=25).clamp(-4, 4), members)

    plain = copied()
    with protect_pipeline(pipe, guard):
        guarded = copied()
    assert plain.rate > 0.6 and guarded.rate < plain.rate / 3
