"""Networks of other packages: sampled by these packages themselves, without and with a guard.

Each package is tested where it is installed (`pip install "cpsample[peers]"`), the rest everywhere.
"""

import copy
import io
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_guards import looking, pictures
from torch import nn

import cpsample
from cpsample.core.calibration import calibrate
from cpsample.core.classifier import log_odds
from cpsample.core.copying import copy_test
from cpsample.core.guard import IdleGuardWarning, UncalibratedGuardWarning, fit_guard
from cpsample.core.images import load_digits, split
from cpsample.core.paths import edm_path, flow_path, protect_path
from cpsample.core.predicted import undecided
from cpsample.core.schedule import make_schedule
from cpsample.production.adapters import (
    AdaptedModel,
    convention_of,
    convention_on,
    is_recognised,
    protect_model,
)

pytestmark = pytest.mark.filterwarnings(
    f"ignore::{UncalibratedGuardWarning.__module__}.UncalibratedGuardWarning"
)

SHAPE = (1, 8, 8)
SIGMAS = torch.cat([torch.logspace(1.9, -2, 25), torch.zeros(1)])


def columns(numbers, x):
    "Numbers, one or one per row, shaped to multiply x."
    return torch.as_tensor(numbers).to(x).reshape(-1, 1, 1, 1)


# The packages. Each draws 16 images in [−1, 1], from fixed noise, with a network that has the
# picture best(x, a, b) in mind when it is shown x = a·x0 + b·ε; with a guard, or without (None).


def guarded(model, guard, convention=None):
    "The line for the user, where there is a guard."
    return model if guard is None else protect_model(model, guard, convention)


class LevelNetwork(nn.Module):
    "What a GaussianDiffusion of denoising-diffusion-pytorch takes for a network, in closed form."

    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, best, objective):
        super().__init__()
        self.best, self.objective = best, objective

    def forward(self, x, t, x_self_cond=None):
        abar = columns(self.abar[t], x)
        a, b = abar.sqrt(), (1 - abar).sqrt()
        x0 = self.best(x, a, b)
        answers = {"pred_x0": x0, "pred_noise": (x - a * x0) / b, "pred_v": (a * x - x0) / b}
        return answers[self.objective]


def gaussian_diffusion(best, guard, objective="pred_v", steps=40, **options):
    package = pytest.importorskip("denoising_diffusion_pytorch")
    network = LevelNetwork(best, objective)
    settings = dict(image_size=8, timesteps=40, sampling_timesteps=steps, objective=objective)
    diffusion = package.GaussianDiffusion(network, **settings | options)
    network.abar = diffusion.alphas_cumprod
    if guard is not None:
        diffusion.model = protect_model(diffusion.model, guard, diffusion)
    return 2 * diffusion.sample(batch_size=16) - 1


class ElucidatedNetwork(nn.Module):
    "EDM's F, in closed form: (c_in·x, ln(σ)/4) → F."

    random_or_learned_sinusoidal_cond, self_condition = True, False

    def __init__(self, best):
        super().__init__()
        self.best, self.weight = best, nn.Parameter(torch.zeros(1))

    def forward(self, x, time, x_self_cond=None):
        sigma = columns((4 * time).exp(), x)
        size = (sigma**2 + 0.25).sqrt()
        x0 = self.best(x, 1 / size, sigma / size)
        return (x0 - 0.25 / size**2 * (x * size)) / (0.5 * sigma / size)


def elucidated(best, guard):
    package = pytest.importorskip("denoising_diffusion_pytorch")
    net = ElucidatedNetwork(best)
    diffusion = package.ElucidatedDiffusion(net, image_size=8, channels=1, num_sample_steps=20)
    if guard is not None:
        diffusion.net = protect_model(diffusion.net, guard, diffusion)
    return 2 * diffusion.sample(batch_size=16) - 1


def small_model(best, predicts):
    "A model of smalldiffusion that predicts one of eps, x0, v and flow, in closed form."
    package = pytest.importorskip("smalldiffusion.model")

    class Model(nn.Module, package.ModelMixin):
        input_dims = SHAPE

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma, cond=None):
            a = 1 - sigma if predicts == "flow" else torch.ones_like(sigma)
            x0 = best(x, columns(a, x), columns(sigma, x))
            eps = (x - a * x0) / sigma
            v = (eps - sigma * x0) / (1 + sigma**2).sqrt()
            return {"eps": eps, "x0": x0, "v": v, "flow": eps - x0}[predicts]

    modifiers = {"x0": package.PredX0, "v": package.PredV, "flow": package.PredFlow}
    return modifiers.get(predicts, lambda kind: kind)(Model)()


def small_samples(best, guard, predicts="eps"):
    package = pytest.importorskip("smalldiffusion")
    model = small_model(best, predicts)
    sigmas = torch.linspace(1, 0, 26) if predicts == "flow" else SIGMAS
    *_, x = package.samples(guarded(model, guard), sigmas, batchsize=16)
    return x.detach()


class Preconditioned(nn.Module):
    "What a Denoiser of k-diffusion calls its inner model, in closed form."

    def __init__(self, best):
        super().__init__()
        self.best = best

    def forward(self, x, sigma, **extra):
        sigma = columns(sigma, x)
        size = (sigma**2 + 0.25).sqrt()
        x0 = self.best(x, 1 / size, sigma / size)
        return (x0 - 0.25 / size**2 * (x * size)) / (0.5 * sigma / size)


def k_diffusion(best, guard, sampler="sample_euler"):
    package = pytest.importorskip("k_diffusion")
    model = guarded(package.Denoiser(Preconditioned(best), sigma_data=0.5), guard)
    x = SIGMAS[0] * torch.randn((16, *SHAPE))
    return getattr(package.sampling, sampler)(model, x, SIGMAS, disable=True)


def k_diffusion_levels(best, guard):
    package = pytest.importorskip("k_diffusion")
    abar = make_schedule().abar
    inner = LevelNetwork(best, "pred_noise")
    model = package.external.DiscreteEpsDDPMDenoiser(inner, abar, quantize=True)
    inner.abar = abar
    model = guarded(model, guard)
    sigmas = model.get_sigmas(25)
    x = sigmas[0] * torch.randn((16, *SHAPE))
    return package.sampling.sample_dpmpp_2m(model, x, sigmas, disable=True)


class Backbone(nn.Module):
    "What a SimpleDenoiser of azula calls its backbone, in closed form."

    def __init__(self, best):
        super().__init__()
        self.best, self.weight = best, nn.Parameter(torch.zeros(1))

    def forward(self, x, log_sigma, **others):
        sigma = columns(log_sigma.exp(), x)
        size = (sigma**2 + 1).sqrt()
        return self.best(x, 1 / size, sigma / size)


def azula_denoiser(best, schedule="VPSchedule"):
    denoise, noise = [pytest.importorskip(f"azula.{part}") for part in ("denoise", "noise")]
    return denoise.SimpleDenoiser(Backbone(best), getattr(noise, schedule)())


def azula_sampler(best, guard, sampler="DDIMSampler", schedule="VPSchedule"):
    sample = pytest.importorskip("azula.sample")
    model = guarded(azula_denoiser(best, schedule), guard)
    draw = getattr(sample, sampler)(model, steps=25, silent=True)
    return draw(draw.init((16, *SHAPE)))


class Velocity(nn.Module):
    "A velocity model of flow_matching on the path of a scheduler, in closed form."

    def __init__(self, best, scheduler):
        super().__init__()
        self.best, self.scheduler = best, scheduler

    def forward(self, x, t, **extras):
        now = self.scheduler(t)
        a, b, da, db = [
            columns(part, x) for part in (now.alpha_t, now.sigma_t, now.d_alpha_t, now.d_sigma_t)
        ]
        x0 = self.best(x, a.clamp(min=1e-6), b)
        return da * x0 + db * (x - a * x0) / b


def flow_matching(best, guard, method="euler"):
    package = pytest.importorskip("flow_matching.solver")
    path = pytest.importorskip("flow_matching.path").CondOTProbPath()
    model = guarded(Velocity(best, path.scheduler), guard, path)
    solver = package.ODESolver(velocity_model=model)
    x = torch.randn((16, *SHAPE))
    times = torch.tensor([0.0, 0.999 if method == "midpoint" else 1.0])
    return solver.sample(x, step_size=0.04, method=method, time_grid=times)


PEERS = {
    "gaussian diffusion, v": gaussian_diffusion,
    "gaussian diffusion, noise": lambda *given: gaussian_diffusion(*given, objective="pred_noise"),
    "gaussian diffusion, x0": lambda *given: gaussian_diffusion(*given, objective="pred_x0"),
    "gaussian diffusion, ddim": lambda *given: gaussian_diffusion(*given, "pred_noise", 20),
    "elucidated": elucidated,
    "smalldiffusion, eps": small_samples,
    "smalldiffusion, x0": lambda *given: small_samples(*given, "x0"),
    "smalldiffusion, v": lambda *given: small_samples(*given, "v"),
    "smalldiffusion, flow": lambda *given: small_samples(*given, "flow"),
    "k-diffusion, Euler": k_diffusion,
    "k-diffusion, Heun": lambda *given: k_diffusion(*given, "sample_heun"),
    "k-diffusion, levels": k_diffusion_levels,
    "azula, DDPM": lambda *given: azula_sampler(*given, "DDPMSampler"),
    "azula, DDIM": azula_sampler,
    "azula, VE": lambda *given: azula_sampler(*given, schedule="VESchedule"),
    "azula, rectified": lambda *given: azula_sampler(*given, schedule="RectifiedSchedule"),
    "flow_matching, Euler": flow_matching,
    "flow_matching, midpoint": lambda *given: flow_matching(*given, "midpoint"),
}


def drawn(name, best, guard=None):
    "16 images in [−1, 1] from a package's own sampler."
    torch.manual_seed(0)
    return PEERS[name](best, guard)


# What the networks have in mind.

WEIGHT = 2 * pictures(1, seed=4, shape=SHAPE).clamp(-2, 2)
PICTURE = 0.2 * pictures(1, seed=3, shape=SHAPE).clamp(-2, 2) + 0.06 * WEIGHT


def always(x, a, b):
    "One picture, whatever is shown."
    return PICTURE.expand_as(x).to(x).clone()


def waves(x, a, b):
    "Something that depends on everything."
    return (0.5 * (3 * x.float() + a - b).sin()).to(x)


def by_heart(members):
    "The best guess of whoever has learned these images by heart: their posterior mean."

    def best(x, a, b):
        flat, a, b = members.flatten(1).to(x), a.flatten(1).clamp(min=1e-6), b.flatten(1)
        distance = torch.cdist(x.flatten(1) / a, flat) * a / b
        return ((-distance.square() / 2).softmax(1) @ flat).view_as(x)

    return best


def linear(weight, shown=None):
    "A classifier with one label, z = ⟨weight, x⟩; it appends what it is shown to a list."

    def classifier(x, t):
        if shown is not None:
            shown.append(x.detach())
        return (weight.to(x) * x).flatten(1).sum(1, keepdim=True)

    return classifier


def certain(shown=None, **changes):
    "A guard in closed form that is certain of PICTURE, and moves it back to its gate in one step."
    options = dict(scale=1.0, moves=1) | changes
    return looking(linear(WEIGHT, shown), **options)


def projected(guard, x0):
    "What such a guard makes of pictures: the nearest on the plane |z| = gate, where |z| is larger."
    weight = guard.schedule.abar[guard.level].sqrt() * WEIGHT
    z = (weight * x0).flatten(1).sum(1).view(-1, 1, 1, 1)
    excess = (z.abs() - log_odds(guard.alpha, below=1)).clamp(min=0)
    return x0 - excess * z.sign() * weight / weight.square().sum()


def never(**changes):
    return looking(lambda x, t: 0 * x.flatten(1)[:, :2], **changes)


@pytest.fixture(scope="module")
def digits():
    "(members, a guard of them)."
    images, _ = load_digits()
    parts = split(images, {"members": 30, "reference": 697, "held_out": None}, seed=100)
    members, reference, held_out = [
        parts.of(images, part) for part in ("members", "reference", "held_out")
    ]
    guard = fit_guard(members, make_schedule(), reference, steps=500, seed=100)
    calibrate(guard, members, held_out[:300])
    return members, guard


# With the real packages.


@pytest.mark.parametrize("name", PEERS)
def test_a_guard_that_is_never_certain_changes_no_byte(name):
    plain = drawn(name, waves)
    assert torch.equal(drawn(name, waves, never()), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdleGuardWarning)
        assert torch.equal(drawn(name, waves, certain(scale=0.0)), plain)


@pytest.mark.parametrize("name", PEERS)
def test_what_is_drawn_is_the_picture_that_a_guard_in_closed_form_asks_for(name):
    "A network with one picture in mind draws it; guarded it draws that picture's projection."
    shown = []
    guard = certain(shown)
    wanted = projected(guard, PICTURE)
    change = (wanted - PICTURE).square().mean().sqrt()
    assert change > 0.05 and wanted.abs().max() < 1
    for moved, picture in ((None, PICTURE), (guard, wanted)):
        x = drawn(name, always, moved)
        torch.testing.assert_close(x, picture.expand_as(x), atol=0.01, rtol=0)

    # And the guard was asked about that picture at every step, from the first noise to the last.
    asked = torch.cat(shown) / guard.schedule.abar[guard.level].sqrt()
    assert len(asked) >= 2 * 16 * 19
    torch.testing.assert_close(asked, PICTURE.expand_as(asked), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", PEERS)
def test_copying_is_cured(name, digits):
    members, guard = digits
    plain, cured = [
        copy_test(drawn(name, by_heart(members), one), members) for one in (None, guard)
    ]
    assert plain.copies >= 14 and cured.copies <= 1


def convention_and_clock(name):
    "(what is read from a real object, times, the share ᾱ of signal that there is at them)."
    t, sigma = torch.linspace(0.1, 0.9, 5).double(), torch.logspace(-2, 1, 5).double()
    of_sigma, straight = 1 / (1 + sigma**2), (1 - t) ** 2 / ((1 - t) ** 2 + t**2)
    if name == "smalldiffusion":
        return convention_of(small_model(always, "v")), sigma, of_sigma
    if name == "smalldiffusion, flow":
        return convention_of(small_model(always, "flow")), t, straight
    if name == "azula":
        denoiser = azula_denoiser(always)
        a, b = denoiser.schedule(t)
        return convention_of(denoiser), t, a**2 / (a**2 + b**2)
    if name == "flow_matching":
        path = pytest.importorskip("flow_matching.path").CondOTProbPath()
        return convention_of(path), 1 - t, straight
    if name == "k-diffusion":
        package = pytest.importorskip("k_diffusion")
        return convention_of(package.Denoiser(Preconditioned(always))), sigma, of_sigma

    # Of denoising-diffusion-pytorch, a level or a quarter of ln σ.
    package = pytest.importorskip("denoising_diffusion_pytorch")
    if name == "elucidated":
        diffusion = package.ElucidatedDiffusion(ElucidatedNetwork(always), image_size=8)
        return convention_of(diffusion), sigma.log() / 4, of_sigma
    diffusion = package.GaussianDiffusion(LevelNetwork(always, "pred_v"), image_size=8)
    levels = torch.tensor([0, 10, 500, 900])
    return convention_of(diffusion), levels, diffusion.alphas_cumprod[levels].double()


@pytest.mark.parametrize(
    "name",
    ["smalldiffusion", "smalldiffusion, flow", "azula", "flow_matching", "k-diffusion"]
    + ["elucidated", "gaussian diffusion"],
)
def test_it_is_known_how_much_noise_there_is(name):
    "Which decides whether a guard is asked at all, below its t_max."
    convention, time, abar = convention_and_clock(name)
    torch.testing.assert_close(convention.path.abar(time), abar, rtol=1e-5, atol=1e-7)


def test_a_real_unet_with_self_conditioning():
    package = pytest.importorskip("denoising_diffusion_pytorch")
    torch.manual_seed(0)
    unet = package.Unet(dim=8, dim_mults=(1, 2), channels=1, self_condition=True, flash_attn=False)
    settings = dict(image_size=8, timesteps=8, objective="pred_v")
    diffusion = package.GaussianDiffusion(unet, **settings).eval()
    names = list(diffusion.state_dict())

    images = {}
    for name, guard in (("plain", None), ("never", never()), ("certain", looking(linear(WEIGHT)))):
        diffusion.model = unet
        if guard is not None:
            diffusion.model = protect_model(unet, guard, diffusion)
        torch.manual_seed(1)
        images[name] = diffusion.sample(batch_size=4)
        assert list(diffusion.state_dict()) == names
    assert diffusion.model.rows_pushed > 0 and diffusion.model.rows_seen == 32
    assert torch.equal(images["never"], images["plain"])
    assert not torch.equal(images["certain"], images["plain"])


@pytest.mark.parametrize("scheduler", ["CondOT", "Cosine", "VP", "LinearVP", "PolynomialConvex"])
def test_on_every_path_of_flow_matching_the_velocity_leads_to_the_projection(scheduler):
    "By the package's own reading of a velocity."
    paths = pytest.importorskip("flow_matching.path")
    options = {"n": 2} if scheduler == "PolynomialConvex" else {}
    schedule = getattr(paths.scheduler, f"{scheduler}Scheduler")(**options)
    path = paths.AffineProbPath(scheduler=schedule)
    x, t = pictures(5, shape=SHAPE), torch.tensor([0.2, 0.4, 0.6, 0.8, 0.95])
    guard, network = certain(), Velocity(always, schedule)
    for convention in (path, schedule):
        u = protect_model(network, guard, convention)(x=x, t=t)
        picture = path.velocity_to_target(velocity=u, x_t=x, t=columns(t, x))
        wanted = projected(guard, PICTURE).expand_as(x)
        torch.testing.assert_close(picture, wanted, atol=1e-3, rtol=1e-3)

    # At the end there is nothing to ask: the answer has no say in the picture any more, nor at the
    # start, where there is none in x.
    start = 0.0 if schedule(torch.tensor(0.0)).alpha_t < 1e-3 else 1.0
    model = protect_model(lambda x, t: x, guard, path)
    answer = model(x=x[:2], t=torch.tensor([start, 1.0]))
    assert torch.equal(answer, x[:2]) and model.rows_pushed == 0


def test_guidance_of_smalldiffusion_is_asked_about_as_a_whole():
    "One picture per row: the one that guidance makes."
    model = small_model(always, "eps")
    model.cond_embed = SimpleNamespace(null_cond=0)
    x, sigma, cond = pictures(4, shape=SHAPE), torch.tensor(0.5), torch.ones(4, dtype=torch.long)
    guard = certain()
    protected = protect_model(model, guard)
    eps = protected.predict_eps_cfg(x, sigma, cond, 2.0)
    torch.testing.assert_close(x - sigma * eps, projected(guard, PICTURE).expand_as(x))
    assert protected.rows_seen == 4


def test_azula_answers_with_a_posterior_and_what_guides_it_can_be_protected():
    cfg = pytest.importorskip("azula.guidance.cfg")
    denoiser, x, t = azula_denoiser(always), pictures(3, shape=SHAPE), torch.tensor(0.4)
    guard = certain()
    for model in (denoiser, cfg.CFGDenoiser(denoiser)):
        options = {} if model is denoiser else {"positive": {}, "guidance": 2.0}
        posterior = protect_model(model, guard)(x, t, **options)
        assert type(posterior) is type(model(x, t, **options))
        wanted = projected(guard, PICTURE).expand_as(x)
        torch.testing.assert_close(posterior.mean, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(AttributeError, match="loss of SimpleDenoiser would ask the network past"):
        protect_model(denoiser, guard).loss(x, t)


def test_the_sampler_of_guided_gaussian_diffusions_finds_no_way_past_the_guard():
    "Its network guides itself, in a method that returns two answers: refused."
    name = "denoising_diffusion_pytorch.classifier_free_guidance"
    package = pytest.importorskip(name)
    unet = package.Unet(dim=8, dim_mults=(1,), channels=1, num_classes=2)
    diffusion = package.GaussianDiffusion(unet, image_size=8, timesteps=4, objective="pred_v")
    diffusion.model = protect_model(unet, never(), diffusion)
    with pytest.raises(AttributeError, match="forward_with_cond_scale of Unet would ask"):
        diffusion.sample(classes=torch.zeros(2, dtype=torch.long))


def test_a_network_that_also_predicts_variances_is_refused():
    package = pytest.importorskip("denoising_diffusion_pytorch")
    unet = package.Unet(dim=8, dim_mults=(1,), channels=1, out_dim=2)
    diffusion = package.LearnedGaussianDiffusion(unet, image_size=8, timesteps=4)
    diffusion.model = protect_model(unet, never(), diffusion)
    with pytest.raises(ValueError, match=r"got \(2, 2, 8, 8\): no guard can read that"):
        diffusion.sample(batch_size=2)


def test_numbers_of_a_gaussian_diffusion_that_does_not_normalise_must_be_told():
    package = pytest.importorskip("denoising_diffusion_pytorch")
    network = LevelNetwork(lambda x, a, b: (PICTURE.expand_as(x) + 1) / 2, "pred_noise")
    settings = dict(image_size=8, timesteps=40, objective="pred_noise", auto_normalize=False)
    diffusion = package.GaussianDiffusion(network, **settings)
    network.abar, guard = diffusion.alphas_cumprod, certain()
    with pytest.raises(ValueError, match="auto_normalize=False: it is not known which numbers"):
        protect_model(network, guard, diffusion)
    diffusion.model = protect_model(network, guard, diffusion, values=(0, 1))
    x = 2 * diffusion.sample(batch_size=2) - 1
    torch.testing.assert_close(x, projected(guard, PICTURE).expand_as(x), atol=1e-3, rtol=0)


# Without any of them.


class SigmaDenoiser(nn.Module):
    "As those of k-diffusion, with a weight, and a label that it is told by name."

    inner_model, sigma_data = None, 0.5

    def __init__(self, best=waves):
        super().__init__()
        self.best, self.weight = best, nn.Parameter(torch.ones(1))
        self.labels = []

    def forward(self, x, sigma, label=None):
        self.labels.append(label)
        sigma = columns(sigma, x)
        return self.weight * self.best(x, torch.ones_like(sigma), sigma)

    def get_sigmas(self, n):
        return SIGMAS[:n]

    def encode(self, x):
        return x


@pytest.mark.parametrize("values", [(-1, 1), (0, 1), (0, 255)])
@pytest.mark.parametrize("at", ["x0", "x_t"])
def test_other_numbers_are_the_same_pictures(values, at):
    "A network whose black and white are others, against itself between −1 and 1."
    middle, contrast = sum(values) / 2, (values[1] - values[0]) / 2
    guard = looking(at=at, t_max=1000, scale=2.5)
    x, sigma = pictures(40, shape=(1, 4, 4)), torch.logspace(-2, 1, 40)

    def bright(x, sigma):
        plain = waves((x - middle) / contrast, 1.0, columns(sigma, x) / contrast)
        return middle + contrast * plain

    told = convention_on(edm_path(), "x0")
    model = protect_model(bright, guard, told, values=values)
    plain = protect_path(lambda x, sigma: waves(x, 1.0, columns(sigma, x)), guard, edm_path(), "x0")
    answer = (model(middle + contrast * x, contrast * sigma) - middle) / contrast
    torch.testing.assert_close(answer, plain(x, sigma), atol=1e-3, rtol=1e-3)
    assert 0 < model.rows_pushed == plain.rows_pushed < 40


def test_it_is_protect_path_on_a_path_that_is_told():
    x, tau = pictures(40, shape=(1, 4, 4)), torch.linspace(0.02, 0.98, 40)
    one, other = [
        protect(lambda x, tau: (3 * x).sin())
        for protect in (
            lambda f: protect_model(f, looking(), convention_on(flow_path(), "flow")),
            lambda f: protect_path(f, looking(), flow_path(), "flow"),
        )
    ]
    torch.testing.assert_close(one(x, tau), other(x, tau), atol=1e-4, rtol=1e-4)
    assert one.rows_pushed == other.rows_pushed > 0


def test_levels_may_be_mixed_and_each_row_decides_for_itself():
    model = protect_model(SigmaDenoiser(), looking(t_max=400))
    x, sigma = pictures(12, shape=(1, 4, 4)), torch.logspace(-2, 1, 12)
    for shaped in (sigma, sigma.view(-1, 1, 1, 1)):
        together = model(x, shaped)
        alone = torch.cat([model(x[k : k + 1], sigma[k]) for k in range(12)])
        torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)
    assert 0 < model.rows_pushed < model.rows_seen


@pytest.mark.parametrize("call", ["by place", "by name", "under autocast", "in half precision"])
def test_however_it_is_called_the_guard_says_the_same(call):
    network = SigmaDenoiser()
    model, x, sigma = protect_model(network, looking()), pictures(20, shape=(1, 4, 4)), 0.5
    wanted = model(x.half().float() if call == "in half precision" else x, torch.tensor(sigma))
    if call == "by place":
        answer = model(x, torch.tensor(sigma), "a label")
    elif call == "by name":
        answer = model(sigma=torch.tensor(sigma), x=x, label="a label")
    elif call == "under autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer = model(x, torch.tensor(sigma), label="a label")
    else:
        network.half()
        answer = model(x.half(), torch.tensor(sigma).half(), label="a label")
        assert answer.dtype == torch.float16
    assert network.labels[-1] == "a label"
    tolerance = 0.05 if answer.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(answer.float(), wanted, atol=tolerance, rtol=tolerance)


def test_the_guard_looks_in_its_own_precision_under_autocast():
    seen = []

    def classifier(x, t):
        seen.append((x @ x.mT).dtype)
        return 9 + x.flatten(1)[:, :1]

    model = protect_model(SigmaDenoiser(), looking(classifier))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(pictures(2, shape=(1, 4, 4)), 0.5)
    assert seen and set(seen) == {torch.float32}


def test_no_gradient_goes_through_what_is_changed_and_training_is_refused():
    network = SigmaDenoiser().eval()
    model, x = protect_model(network, looking()), pictures(6, shape=(1, 4, 4)).requires_grad_()
    answer = model(x, torch.tensor(0.5))
    (gradient,) = torch.autograd.grad(answer.sum(), x)
    (plain,) = torch.autograd.grad(network(x, torch.tensor(0.5)).sum(), x)
    assert model.rows_pushed > 0
    torch.testing.assert_close(gradient, plain)

    model.train()
    with pytest.raises(ValueError, match="cannot be trained"):
        model(x, torch.tensor(0.5)).sum().backward()
    with torch.inference_mode():
        model.eval()(pictures(6, shape=(1, 4, 4)), torch.tensor(0.5))


def test_it_has_what_the_network_has_but_no_way_past_the_guard():
    network = SigmaDenoiser()
    model = protect_model(network, looking())
    assert model.sigma_data == 0.5 and model.labels is network.labels
    assert torch.equal(model.get_sigmas(3), SIGMAS[:3])
    assert list(model.state_dict()) == ["weight"] and not hasattr(model, "nothing")
    assert not hasattr(model, "encode") and model.model.encode(1) == 1
    with pytest.raises(AttributeError, match=r"encode of SigmaDenoiser would ask .* \.model\.enc"):
        model.encode(1)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing


def test_the_guard_is_neither_copied_nor_saved_along():
    holder = nn.Sequential(protect_model(SigmaDenoiser(), looking()))
    for take in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(ValueError, match="neither pickled nor copied"):
            take(holder)
    assert list(holder.state_dict()) == ["0.weight"]


class SmallModel(nn.Module):
    "As those of smalldiffusion."

    def rand_input(self, n):
        return pictures(n, shape=(1, 4, 4))

    def predict_eps(self, x, sigma, cond=None):
        return (3 * x).sin()

    def predict_eps_cfg(self, x, sigma, cond, cfg_scale):
        return self.predict_eps(x, sigma, cond=cond)

    def forward(self, x, sigma, cond=None):
        raise AssertionError("this answer is another one")


def test_smalldiffusion_is_asked_at_its_own_doors_alone():
    guard, x, sigma = looking(), pictures(30, shape=(1, 4, 4)), torch.tensor(0.5)
    model = protect_model(SmallModel(), guard)
    x0 = x - sigma * (3 * x).sin()
    rows, moved = undecided(guard, x0)
    wanted = (x - x0.index_copy(0, rows, moved)) / sigma
    for eps in (model.predict_eps(x, sigma), model.predict_eps_cfg(x, sigma, None, 0)):
        torch.testing.assert_close(eps, wanted, atol=1e-4, rtol=1e-4)
    assert model.rand_input(2).shape == (2, 1, 4, 4) and len(rows) > 0
    with pytest.raises(ValueError, match="asked through predict_eps or predict_eps_cfg"):
        model(x, sigma)


def wave_loss(self, images):
    "What a GaussianDiffusion does when it is called: a loss."
    return images.sin().mean()


def test_what_is_not_known_is_refused_in_one_line():
    guard, x = looking(), pictures(2, shape=(1, 4, 4))
    knows = dict(objective="pred_v", alphas_cumprod=make_schedule().abar)
    knows |= dict(predict_start_from_noise=None, normalize=lambda x: 2 * x - 1)
    diffusion = SimpleNamespace(**knows)
    trained = type("Trained", (nn.Module,), {"forward": wave_loss})()
    vars(trained).update(knows)
    told = convention_on(edm_path(), "x0")
    refused = {
        "it is not known what wave is shown": lambda: protect_model(lambda x, t: x, guard),
        "unknown prediction 'speed'": lambda: convention_on(edm_path(), "speed"),
        "SimpleNamespace knows how its network": lambda: protect_model(diffusion, guard),
        "is not that network": lambda: protect_model(diffusion, guard, diffusion),
        "Trained knows how its network": lambda: protect_model(trained, guard),
        "has the objective 'pred_score'": lambda: convention_of(
            SimpleNamespace(**knows | {"objective": "pred_score"})
        ),
        "values are those of black and white": lambda: protect_model(
            SigmaDenoiser(), guard, values=(1, 0)
        ),
        "as its first two arguments, or by name": lambda: protect_model(SigmaDenoiser(), guard)(x),
        "got tuple: no guard can read": lambda: protect_model(lambda x, t: (x, t), guard, told)(
            x, 1
        ),
        r"got \(2, 2, 4, 4\): no guard": lambda: protect_model(
            lambda x, t: torch.cat([x, x], 1), guard, told
        )(x, 1.0),
        "torch.int64": lambda: protect_model(lambda x, t: x, guard, told)(x.long(), 1.0),
        "one level or one per row": lambda: protect_model(lambda x, t: x, guard, told)(
            x, torch.ones(3)
        ),
        "knows images of shape": lambda: protect_model(SigmaDenoiser(), guard)(
            pictures(2, shape=(1, 5, 5)), 1.0
        ),
    }
    for message, call in refused.items():
        message = message.replace("wave", "<lambda>")
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_second_guard_may_stand_in_front_of_the_first_but_not_the_same():
    model = protect_model(SigmaDenoiser(), looking())
    with pytest.raises(ValueError, match="has this guard already"):
        protect_model(model, model.guard)
    second = protect_model(model, looking())
    assert second.convention == model.convention
    assert torch.isfinite(second(pictures(3, shape=(1, 4, 4)), 0.5)).all()


def test_the_warning_points_at_the_line_that_asked_for_protection():
    with pytest.warns(UncalibratedGuardWarning) as told:
        protect_model(SigmaDenoiser(), looking())
    assert told[0].filename == __file__


def test_the_front_door_knows_networks_from_elsewhere():
    guard, x = looking(), pictures(9, shape=(1, 4, 4))
    model = cpsample.protect(SigmaDenoiser(), guard)
    assert isinstance(model, AdaptedModel)
    told = cpsample.protect(lambda x, t: x, guard, convention_on(edm_path(), "x0"), values=(0, 1))
    assert isinstance(told, AdaptedModel) and told.convention.values == (0, 1)
    ours = cpsample.protect(lambda x_t, t: x_t, guard)
    assert not isinstance(ours, AdaptedModel) and not is_recognised(lambda x: x)
    assert torch.isfinite(ours(x, 3)).all()


def test_a_guard_at_x_t_is_asked_by_the_clock_of_the_network():
    "Below its t_max, found at the same share of signal."
    guard = looking(lambda x, t: 9 + x.flatten(1).sum(1, keepdim=True), at="x_t", t_max=400)
    abar = guard.schedule.abar[[399, 400]].double()
    sigma = ((1 - abar) / abar).sqrt()
    model = protect_model(SigmaDenoiser(), replace(guard))
    model(pictures(2, shape=(1, 4, 4)), sigma)
    assert model.rows_pushed == 1
