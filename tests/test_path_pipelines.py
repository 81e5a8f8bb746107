"Flow matching and EDM under pipelines: what the hook changes, against formulas of their own."

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from small_pipelines import (
    QUIET,
    VAE,
    draw_flow,
    draw_latents,
    flow_pipeline,
    latent_pipeline,
    linear_guard,
    same,
    scheduler_of,
    seeded,
)

from cpsample.core.classifier import log_odds
from cpsample.core.guard import Guard
from cpsample.core.predicted import undecided
from cpsample.core.schedule import make_schedule
from cpsample.production import pipelines
from cpsample.production.pipelines import encode, fit_pipeline_guard, protect_pipeline
from cpsample.production.schedulers import patches_of, path_of, schedule_of, sigmas_at

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
V = {"prediction_type": "v_prediction"}

# name → (scheduler, options, pipeline)
CASES = {
    "SD3 Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "StableDiffusion3Pipeline"),
    "SD3 Heun": ("FlowMatchHeunDiscreteScheduler", {}, "StableDiffusion3Pipeline"),
    "SD3 UniPC": ("UniPCMultistepScheduler", FLOW, "StableDiffusion3Pipeline"),
    "SD3 DPM++": ("DPMSolverMultistepScheduler", FLOW, "StableDiffusion3Pipeline"),
    "Flux Euler": ("FlowMatchEulerDiscreteScheduler", {}, "FluxPipeline"),
    "SD EDM Euler": ("EDMEulerScheduler", {}, "StableDiffusionPipeline"),
    "SD EDM DPM++": ("EDMDPMSolverMultistepScheduler", V, "StableDiffusionPipeline"),
    "SD continuous": (
        "EulerDiscreteScheduler",
        V | {"timestep_type": "continuous"},
        "StableDiffusionPipeline",
    ),
}
# x̂₀ = p·x + q·answer at σ, of what the network is shown, and a, b: written down once more
S = 0.5
FIRST = (1 - make_schedule().abar[0].item()) ** 0.5  # the least noise that a guard knows at x_t


def flow(sigma):
    return 1.0, -sigma, 1 - sigma, sigma


def edm(sigma):
    size = (sigma**2 + S**2) ** 0.5
    return S**2 / size, sigma * S / size, 1 / size, sigma / size


def minus_edm(sigma):
    p, q, a, b = edm(sigma)
    return p, -q, a, b


def continuous(sigma):
    size = (sigma**2 + 1) ** 0.5
    return 1 / size, -sigma / size, 1 / size, sigma / size


FORMULAS = {"SD EDM Euler": edm, "SD EDM DPM++": minus_edm, "SD continuous": continuous}


def pipeline_of(name):
    kind, options, pipeline = CASES[name]
    scheduler = getattr(diffusers, kind)(**options)
    if pipeline == "StableDiffusionPipeline":
        return latent_pipeline(scheduler=scheduler), draw_latents
    return flow_pipeline(pipeline, scheduler), draw_flow


class Watch:
    "Notes what a network saw and answered, before and after the guard, as images."

    def __init__(self, pipe):
        self.pipe, self.calls = pipe, []
        self.network = getattr(pipe, "unet", None) or pipe.transformer

    def before(self):
        def note(network, args, kwargs, output):
            shown = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
            scheduler, ids = self.pipe.scheduler, kwargs.get("img_ids")
            sigma = float(scheduler.sigmas[scheduler.step_index or 0])
            patches = patches_of(shown, ids)
            self.images = (lambda x: x) if patches is None else patches.images
            call = SimpleNamespace(x=self.images(shown).clone(), sigma=sigma)
            call.plain = self.images(output[0]).clone()
            self.calls.append(call)

        return self.network.register_forward_hook(note, with_kwargs=True)

    def after(self):
        def note(network, args, kwargs, output):
            self.calls[-1].guarded = self.images(output[0]).clone()

        return self.network.register_forward_hook(note, with_kwargs=True)


def picture_guard(bias=2.0, **settings):
    "A guard at x̂₀ whose gate (|z| > 2.9) passes some pictures."
    w = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(3)) * 0.1

    def classifier(x, t):
        return bias + (x.sin() * w).flatten(1).sum(1, keepdim=True)

    given = dict(alpha=0.05, scale=2.0, t_max=1000, at="x0", moves=3, longest=0.5)
    return Guard(classifier, **{"schedule": make_schedule()} | given | settings)


@pytest.mark.parametrize("n, cfg", [(1, 7.5), (3, 1.0)])
@pytest.mark.parametrize("name", CASES)
def test_at_x_t_the_answer_changes_as_the_formulas_say(name, n, cfg):
    "Never certain: not a bit changes. Certain: Δε of x/√(a² + b²), times the slope. Off: as ever."
    pipe, draw = pipeline_of(name)
    plain = draw(pipe, n, cfg, steps=5)
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, bias=0.0).guard) as never:
        assert same(draw(pipe, n, cfg, steps=5), plain)
    assert never.rows_pushed == 0 < never.rows_seen and never.rows_seen % n == 0

    # One that is certain everywhere, between two hooks that watch.
    guard, w = linear_guard(pipe.scheduler, scale=5.0)
    watch = Watch(pipe)
    hooks = [watch.before()]
    protection = protect_pipeline(pipe, guard)
    hooks.append(watch.after())
    guarded = draw(pipe, n, cfg, steps=5)
    assert not torch.allclose(guarded, plain, atol=1e-4)
    assert protection.rows_seen == n * len(watch.calls) and protection.rows_pushed > 0

    pushed = 0
    for call in watch.calls:
        p, q, a, b = FORMULAS.get(name, flow)(call.sigma)
        size = (a**2 + b**2) ** 0.5
        x_t, noise = call.x[:, :4] / size, max(b / size, FIRST)
        z = 5.0 + (x_t.sin() * w).flatten(1).sum(1)
        is_certain = (z.abs() > log_odds(guard.alpha)) & (a > 0)
        slope = torch.where(is_certain, z.sign() * torch.sigmoid(z.abs()), 0.0)
        eps_change = guard.scale * noise * slope[:, None, None, None] * w * x_t.cos()
        wanted = eps_change * (-b / (a * q) if a > 0 else 0.0)
        tolerance = 2e-4 * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(call.guarded - call.plain, wanted, atol=tolerance, rtol=1e-3)
        pushed += int(is_certain[:n].sum())
    assert protection.rows_pushed == pushed

    protection.remove()
    for hook in hooks:
        hook.remove()
    assert same(draw(pipe, n, cfg, steps=5), plain)


@pytest.mark.parametrize("n, cfg", [(4, 4.0), (6, 1.0)])
@pytest.mark.parametrize("name", CASES)
def test_at_x0_the_picture_of_the_combination_is_the_one_that_is_moved(name, n, cfg):
    pipe, draw = pipeline_of(name)
    guard, watch = picture_guard(bias=3.0), Watch(pipe)
    hooks = [watch.before()]
    protection = protect_pipeline(pipe, guard)
    hooks.append(watch.after())
    draw(pipe, n, cfg, steps=5)
    assert 0 < protection.rows_pushed

    counted = 0
    for call in watch.calls:
        p, q, a, b = FORMULAS.get(name, flow)(call.sigma)
        answers = [call.plain, call.guarded]
        if len(call.plain) == 2 * n:
            answers = [u + cfg * (c - u) for u, c in (answer.chunk(2) for answer in answers)]
        x0, new_x0 = [p * call.x[:n, :4] + q * answer for answer in answers]
        rows, moved = undecided(guard, x0)
        if a < 1e-4 * b:  # pure noise, or as good as that
            assert same(*answers)
            continue
        wanted = x0.index_copy(0, rows, moved)
        torch.testing.assert_close(new_x0, wanted, atol=1e-3, rtol=1e-3)
        counted += len(rows)
    assert abs(protection.rows_pushed - counted) <= 1  # one may lie at the very edge of the gate
    protection.remove()
    for hook in hooks:
        hook.remove()


def test_half_precision_finds_the_time_of_the_scheduler():
    "Flux hands on times over 1,000, rounded; the answer keeps its type."
    pipe = flow_pipeline("FluxPipeline")
    pipe.to(torch.bfloat16)
    words = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = dict(prompt_embeds=words, pooled_prompt_embeds=words[:, 0])
    plain = draw_flow(pipe, 3, **given)
    with protect_pipeline(pipe, picture_guard(bias=3.0)) as protection:
        drawn = draw_flow(pipe, 3, **given)
    assert drawn.dtype == plain.dtype == torch.bfloat16 and drawn.isfinite().all()
    assert protection.rows_pushed > 0 and not same(drawn, plain)


def test_equal_tokens_are_no_repetition():
    "Flux asks once for each caption: two captions from one noise are two images."
    pipe = flow_pipeline("FluxPipeline")
    latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(2, 16, 16)
    words = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    given = dict(prompt_embeds=words, pooled_prompt_embeds=words[:, 0], latents=latents)
    with protect_pipeline(pipe, picture_guard(bias=0.0)) as protection:
        draw_flow(pipe, 2, steps=2, **given)
    assert protection.rows_seen == 4


def test_a_clock_that_runs_backwards_is_refused():
    pipe = flow_pipeline()
    guard, call = picture_guard(), pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: call(*args, **kwargs)
    with protect_pipeline(pipe, guard):
        pipe.scheduler.set_timesteps(4)
        x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
        given = dict(encoder_hidden_states=words, pooled_projections=words[:, 0])
        pipe.transformer(hidden_states=x, timestep=pipe.scheduler.timesteps[:1], **given)
        with pytest.raises(ValueError, match="asked at 0, which is no time of its Flow") as told:
            pipe.transformer(hidden_states=x, timestep=torch.zeros(1), **given)
    assert "\n" not in str(told.value)


def test_a_time_that_means_two_levels_is_not_guessed():
    "τ = 1 is pure noise, and t = 1 of 1,000 as good as none: in a loop that has not begun to step."
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[-1] == 1
    with pytest.raises(ValueError, match=r"asked at 1, .* call scheduler.set_begin_index\(0\)"):
        sigmas_at(scheduler, torch.tensor([1.0]))
    assert sigmas_at(scheduler, torch.tensor([500.0])).item() == pytest.approx(0.5)
    scheduler.set_begin_index(0)
    assert sigmas_at(scheduler, torch.tensor([1.0])).item() == 1


@pytest.mark.parametrize("w", [4.0, 1.0])
def test_the_guard_of_a_dit_looks_at_what_its_sampler_is_fed(w, monkeypatch):
    "It shows images with their class first and without it after that, unlike all others."

    def build():
        size = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
        network = diffusers.DiTTransformer2DModel(**size, out_channels=8, num_embeds_ada_norm=1000)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return network.eval()

    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(seeded(1, build), copy.deepcopy(VAE), scheduler)
    pipe.set_progress_bar_config(disable=True)

    # What the guard is asked about, and what the scheduler is given.
    asked, fed, combine, step = [], [], pipelines._combined, scheduler.step

    def combined(answers, says, **options):
        asked.append(combine(answers, says, **options))
        return asked[-1]

    def stepped(answer, t, x, **options):
        fed.append(answer.clone())
        return step(answer, t, x, **options)

    monkeypatch.setattr(pipelines, "_combined", combined)
    scheduler.step = stepped
    guard = picture_guard(bias=0.0, schedule=path_of(scheduler).schedule)
    with protect_pipeline(pipe, guard):
        generator = torch.Generator().manual_seed(0)
        pipe([3], guidance_scale=w, num_inference_steps=3, generator=generator)
    assert len(asked) == len(fed) == 3
    for ours, theirs in zip(asked, fed):
        torch.testing.assert_close(ours, theirs[:1], atol=1e-4, rtol=1e-3)


def test_while_a_scheduler_steps_there_is_one_time():
    "A clock that runs backwards may show another time of the table, and is refused all the same."
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.75, 0.5, 0.25])
    there = torch.tensor([0.25])
    assert sigmas_at(scheduler, there).item() == 0.25  # in a loop that has not begun to step
    scheduler.set_begin_index(0)
    for told in (750.0, 0.75):
        assert sigmas_at(scheduler, torch.tensor([told])).item() == 0.75
    with pytest.raises(ValueError, match=r"asked at 0.25, which is no time .* \(750\)"):
        sigmas_at(scheduler, there)


def test_a_scheduler_may_be_exchanged_for_one_on_another_path():
    "The guard must be of the levels of the DDPM family, and knows any other path."
    pipe = latent_pipeline()
    pipe.scheduler = scheduler_of("DDIM", beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    with protect_pipeline(pipe, picture_guard(bias=3.0)) as protection:
        draw_latents(pipe, 4)
        pushed = protection.rows_pushed
        pipe.scheduler = diffusers.EDMEulerScheduler()
        draw_latents(pipe, 4)
        assert protection.rows_pushed > pushed > 0
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
        with pytest.raises(ValueError, match="invert_sigmas runs backwards"):
            pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 3, 8))


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_few_step_models_of_the_ddpm_family_stay_as_they_are(name):
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000)
    pipe = latent_pipeline(scheduler=scheduler)
    assert path_of(scheduler).schedule.abar.equal(scheduler.alphas_cumprod)
    plain = draw_latents(pipe, 3)
    with protect_pipeline(pipe, linear_guard(scheduler, bias=0.0).guard):
        assert same(draw_latents(pipe, 3), plain)
    with protect_pipeline(pipe, picture_guard(bias=3.0, schedule=schedule_of(scheduler))) as one:
        assert not same(draw_latents(pipe, 3), plain)
    assert one.rows_pushed > 0


def test_consistency_models_are_read_as_their_scheduler_reads_them():
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(4)
    way = path_of(scheduler)
    x = 20 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(scheduler.timesteps[:3]):
        shown = scheduler.scale_model_input(x, t)
        sigma = sigmas_at(scheduler, t[None].double())
        assert sigma.item() == pytest.approx(float(scheduler.sigmas[index]))
        a, b = way.path.signal(sigma), way.path.noise(sigma)
        torch.testing.assert_close(shown, (x * a).float())  # x = x0 + σ·ε, a its scale
        answer = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        of_x, of_answer = way.prediction(a, b)
        torch.testing.assert_close(of_x * shown, c_skip * x.double(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_answer, c_out)
        x = scheduler.step(answer, t, x).prev_sample


class Strange(diffusers.schedulers.SchedulerMixin, diffusers.ConfigMixin):
    config_name = "strange.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self):
        pass


REFUSED = {
    "VQDiffusionScheduler": dict(num_vec_classes=9),
    "AmusedScheduler": dict(mask_token_id=8),
    "Strange": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_clean_picture_is_refused(name):
    pipe = latent_pipeline()
    guard = picture_guard()
    kind = Strange if name == "Strange" else getattr(diffusers, name)
    pipe.scheduler = kind(**REFUSED[name])
    with pytest.raises(ValueError, match=f"^{name} cannot be protected.*no clean picture") as told:
        protect_pipeline(pipe, guard)
    assert "\n" not in str(told.value) and not pipe.unet._forward_hooks


class OfLevels(Strange):
    "Levels of its own, of pictures or of tokens: nobody knows."

    def __init__(self):
        super().__init__()
        self.alphas_cumprod = make_schedule().abar


class Unscaled(diffusers.EulerDiscreteScheduler):
    "Shows its network x0 + σ·ε as it is."

    def scale_model_input(self, x, t):
        return x


class Renamed(diffusers.EulerDiscreteScheduler):
    "Another name, and nothing else."


def test_a_scheduler_of_ones_own_must_say_what_it_is():
    one = OfLevels()
    with pytest.raises(ValueError, match="OfLevels does not say what its network answers with"):
        path_of(one)
    one.register_to_config(prediction_type="epsilon")
    assert path_of(one).schedule.abar.equal(one.alphas_cumprod)
    with pytest.raises(ValueError, match="Unscaled has a scale_model_input of its own"):
        path_of(Unscaled())
    assert path_of(Renamed()).schedule is not None


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_what_makes_noise_of_pictures_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} runs backwards"):
        path_of(getattr(diffusers, name)())


def test_a_flow_that_is_read_as_none_is_refused():
    scheduler = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, **V)
    with pytest.raises(ValueError, match="take flow_prediction"):
        path_of(scheduler)


def test_positions_that_make_no_picture_are_refused():
    tokens = torch.zeros(1, 4, 16)
    with pytest.raises(ValueError, match=r"must be \[4, 3\]"):
        patches_of(tokens, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="no rectangle"):
        patches_of(tokens, torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]))


def pictures(n):
    return 2 * torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) - 1


def test_a_guard_is_trained_for_a_flow_pipeline(tmp_path):
    "At the levels of the linear schedule; it knows a member that the flow has in mind."
    pipe = flow_pipeline("FluxPipeline")
    members, others = pictures(6), pictures(40)
    small = {"steps": 350, "options": {"width": 8}, "progress": False, "preset": "x0"}
    guard = fit_pipeline_guard(pipe, members, others, tmp_path / "guard", **small)
    assert guard.schedule.name == "linear" and guard.calibrated

    # v = ε − x0 is what a network answers that has x0 in mind.
    x0 = torch.cat([encode(pipe, members), encode(pipe, others[:6])])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    network = torch.nn.Module()
    network.forward = lambda x, t: (eps - x0,)
    parts = SimpleNamespace(transformer=network, scheduler=scheduler, vae=pipe.vae)
    with protect_pipeline(parts, guard) as protection:
        v = network(0.7 * x0 + 0.3 * eps, torch.tensor(300.0))[0]
    changed = (v != eps - x0).flatten(1).any(1)
    assert changed[:6].all() and not changed[6:].any() and protection.rows_pushed == 6
