"diffusers pipelines, protected: schedulers × predictions × pipelines against closed forms; removal, compilation, precision; latents, the Hub, a network that fails."

import copy
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from PIL import Image
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.calibration import calibrate
from cpsample.core.classifier import log_odds
from cpsample.core.copying import copy_test
from cpsample.core.ddpm import final_sample, sample
from cpsample.core.densities import GaussianMixture, noised
from cpsample.core.guard import Guard, Protected, UncalibratedGuardWarning, fit_guard, protect
from cpsample.core.guard_files import load_guard
from cpsample.core.schedule import abar_at
from cpsample.production import pipelines
from cpsample.production.pipelines import (
    as_denoiser,
    encode,
    image_shape,
    protect_pipeline,
    schedule_of,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore{which}")
    for which in (
        "::cpsample.core.guard.UncalibratedGuardWarning",
        "::DeprecationWarning",
        "::FutureWarning",
    )
]
ROOT = Path(__file__).resolve().parent.parent
SCHEDULERS = {
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "DPM++": ("DPMSolverMultistepScheduler", {}),
    "DPM++ single": ("DPMSolverSinglestepScheduler", {}),
    "SDE-DPM++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
REFUSED = {
    ("PNDM", "sample"),
    ("Euler ancestral", "sample"),
    ("KDPM2", "sample"),
}  # by diffusers itself: test_what_diffusers_refuses
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def scheduler_of(name, prediction="epsilon", **betas):
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind)(
        num_train_timesteps=1000, prediction_type=prediction, **SD_BETAS | options | betas
    )


def seeded(seed, build):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def conditional(channels=4, out=4):
    return seeded(
        1,
        lambda: UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=out,
            layers_per_block=1,
            block_out_channels=(8, 8),
            cross_attention_dim=8,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
    )


VAE = seeded(
    2,
    lambda: AutoencoderKL(
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=5.0,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
)
PARTS = dict(
    vae=VAE,
    text_encoder=None,
    tokenizer=None,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
)
PIPELINES = {
    "StableDiffusionPipeline": {},
    "StableDiffusionImg2ImgPipeline": {"strength": 0.8},
    "StableDiffusionInpaintPipeline": {"strength": 1.0},
}


def pipeline(kind, scheduler):
    unet = conditional(9 if "Inpaint" in kind else 4)
    pipe = getattr(diffusers, kind)(unet=unet, scheduler=scheduler, **PARTS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, n=1, cfg=1.0, steps=4, **more):
    "Latents, or images of an unconditional pipeline, from the same noise every time."
    generator, kind = torch.Generator().manual_seed(0), type(pipe).__name__
    if kind in ("DDPMPipeline", "DDIMPipeline"):
        return torch.from_numpy(
            pipe(n, generator, num_inference_steps=steps, output_type="np").images
        )
    words = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(1)).expand(2, n, 3, 8)
    given = {
        "prompt_embeds": words[0],
        "negative_prompt_embeds": words[1],
        "guidance_scale": cfg,
        "num_inference_steps": steps,
        "generator": generator,
        "output_type": "latent",
    }
    if kind != "StableDiffusionPipeline":
        given["image"] = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    if "Inpaint" in kind:
        given["mask_image"] = (torch.arange(16) < 8).float().expand(n, 1, 16, 16)
    return pipe(**given | PIPELINES[kind] | more).images


def linear_guard(scheduler, shape=(4, 8, 8), scale=50.0, bias=5.0, t_max=1000):
    "z = bias + ⟨w, sin x⟩ with a small w: certain everywhere for a bias of 5, nowhere for 0, and its push is −σ(z)·w·cos x."
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02

    def classifier(x, t):
        return bias + (x.sin() * w).flatten(1).sum(1, keepdim=True)

    return Guard(classifier, schedule_of(scheduler), alpha=0.05, scale=scale, t_max=t_max), w


def same(a, b):
    return torch.equal(a, b)  # a function of its own, so that a failure does not print the tensors


def watched(pipe):
    "Notes for each call of the network what it saw, and its output before and after the guard, which must be put on between."
    calls = []

    def first(network, args, kwargs, output):
        calls.append(
            SimpleNamespace(
                x=args[0].clone(),
                t=torch.as_tensor(args[1]),
                plain=output[0].clone(),
                sigma=sigma_now(pipe.scheduler),
            )
        )

    def then(network, args, kwargs, output):
        calls[-1].guarded = output[0].clone()

    before = pipe.unet.register_forward_hook(first, with_kwargs=True)
    return calls, lambda: (before, pipe.unet.register_forward_hook(then, with_kwargs=True))


def sigma_now(scheduler):
    "The scheduler's own noise per signal at this call (None for those that think in ᾱ only)."
    i = getattr(scheduler, "step_index", None)
    if type(scheduler).__name__ == "KDPM2DiscreteScheduler" and i is not None:
        return float(
            (scheduler.sigmas if scheduler.state_in_first_order else scheduler.sigmas_interpol)[i]
        )
    return None if i is None or not hasattr(scheduler, "sigmas") else float(scheduler.sigmas[i])


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize(
    "name, prediction",
    [
        (name, prediction)
        for name in SCHEDULERS
        for prediction in PREDICTIONS
        if (name, prediction) not in REFUSED
    ],
)
def test_matrix(name, prediction, kind):
    "Never certain: not a bit changes. Certain: −s·√(1−ᾱ)·push in ε, and what follows from it in v and x0. Taken off: as before. Five steps: some schedulers stop between levels."
    scheduler = scheduler_of(name, prediction)
    pipe = pipeline(kind, scheduler)
    for n, cfg in ((1, 7.5), (5, 1.0)):
        plain = run(pipe, n, cfg, 5)
        with protect_pipeline(pipe, linear_guard(scheduler, bias=0.0)[0]) as never:
            assert same(run(pipe, n, cfg, 5), plain)
        assert never.rows_pushed == 0 < never.rows_seen and never.rows_seen % n == 0

        guard, w = linear_guard(scheduler)
        calls, finish = watched(pipe)
        protection = protect_pipeline(pipe, guard)
        hooks = finish()
        guarded = run(pipe, n, cfg, 5)
        assert (
            protection.rows_seen == n * len(calls)
            and protection.rows_pushed >= 0.4 * protection.rows_seen
        )
        for call in calls:
            x = call.x[:, :4]
            ratio = np.interp(
                float(call.t),
                np.arange(1000),
                ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double().numpy(),
            )
            abar = torch.tensor(1 / (1 + ratio**2), dtype=torch.float32)
            if call.sigma is not None:
                assert ratio == pytest.approx(
                    call.sigma, rel=2e-3
                )  # the scheduler's own, where its levels lie between ours, or are rounded
            z = 5.0 + (x.sin() * w).flatten(1).sum(1)
            slope = torch.where(
                z.abs() > log_odds(guard.alpha), z.sign() * torch.sigmoid(z.abs()), 0.0
            )
            change = guard.scale * (1 - abar).sqrt() * slope[:, None, None, None] * w * x.cos()
            wanted = {
                "epsilon": change,
                "v_prediction": change / abar.sqrt(),
                "sample": -((1 - abar) / abar).sqrt() * change,
            }[prediction]
            torch.testing.assert_close(
                call.guarded - call.plain,
                wanted,
                atol=1e-4 * max(1.0, wanted.abs().max().item()),
                rtol=0,
            )
        assert not torch.allclose(guarded, plain, atol=1e-4)
        for hook in (protection, *hooks):
            hook.remove()
        assert same(run(pipe, n, cfg, 5), plain) and not pipe.unet._forward_hooks


@pytest.mark.parametrize("name, prediction", sorted(REFUSED))
def test_what_diffusers_refuses(name, prediction):
    "The holes in the matrix are diffusers' own."
    with pytest.raises((ValueError, NotImplementedError), match="prediction_type"):
        run(pipeline("StableDiffusionPipeline", scheduler_of(name, prediction)))


def unconditional(kind="DDIM", prediction="epsilon", out=1, channels=1, **options):
    unet = seeded(
        1,
        lambda: UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=out * channels,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
    )
    scheduler = getattr(diffusers, f"{kind}Scheduler")(
        num_train_timesteps=1000, prediction_type=prediction, **options
    )
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_unconditional_pipelines(kind, prediction):
    pipe = unconditional(kind, prediction, clip_sample=False)
    for n in (1, 5):
        plain = run(pipe, n)
        with protect_pipeline(pipe, linear_guard(pipe.scheduler, (1, 8, 8), bias=0.0)[0]) as never:
            assert same(run(pipe, n), plain)
        with protect_pipeline(pipe, linear_guard(pipe.scheduler, (1, 8, 8))[0]) as always:
            assert not torch.allclose(run(pipe, n), plain, atol=1e-3)
        assert (
            never.rows_pushed
            == 0
            < always.rows_pushed
            <= always.rows_seen
            == never.rows_seen
            == 4 * n
        )
        assert same(run(pipe, n), plain)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_own_sampler_and_diffusers_give_the_same_images(prediction):
    pipe = unconditional("DDIM", prediction, clip_sample=False)
    guard, _ = linear_guard(pipe.scheduler, (1, 8, 8), t_max=600)
    model = as_denoiser(pipe.unet, pipe.scheduler)
    pipe.scheduler.set_timesteps(10)

    def ours(model):
        return final_sample(
            sample(
                model,
                guard.schedule,
                (5, 1, 8, 8),
                pipe.scheduler.timesteps.tolist(),
                eta=0,
                generator=torch.Generator().manual_seed(0),
            )
        )

    def theirs():
        return 2 * run(pipe, 5, steps=10).permute(0, 3, 1, 2) - 1

    plain, protected = ours(model), ours(protect(model, guard))
    torch.testing.assert_close(theirs(), plain.clamp(-1, 1), atol=1e-3, rtol=0)
    with protect_pipeline(pipe, guard):
        torch.testing.assert_close(theirs(), protected.clamp(-1, 1), atol=1e-3, rtol=0)
    assert (protected - plain).abs().max() > 0.05


def test_a_network_that_answers_with_variances_and_one_that_sees_more_channels():
    pipe = unconditional("DDPM", out=2, variance_type="learned")
    guard, _ = linear_guard(pipe.scheduler, (1, 8, 8))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor(300)
    plain = pipe.unet(x, t).sample
    with protect_pipeline(pipe, guard):
        guarded = pipe.unet(x, t).sample
    assert same(plain[:, 1], guarded[:, 1]) and not torch.allclose(
        plain[:, 0], guarded[:, 0], atol=1e-2
    )


def test_guards_nest_and_come_off_in_any_order():
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    plain, guard = run(pipe, 2, 7.5), linear_guard(pipe.scheduler, scale=5.0)[0]
    first, second = protect_pipeline(pipe, guard), protect_pipeline(pipe, guard)
    twice = run(pipe, 2, 7.5)
    first.remove()
    once = run(pipe, 2, 7.5)
    second.remove()
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, scale=10.0)[0]):
        torch.testing.assert_close(run(pipe, 2, 7.5), twice, atol=1e-2, rtol=1e-3)
    assert (
        same(run(pipe, 2, 7.5), plain)
        and not torch.allclose(once, twice, atol=1e-2)
        and not torch.allclose(once, plain, atol=1e-2)
    )


@pytest.mark.parametrize(
    "early", [False, True], ids=["LoRA after the guard", "LoRA before the guard"]
)
def test_lora(early):
    import peft

    def adapted(pipe):
        pipe.unet.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        )
        for i, (name, p) in enumerate(pipe.unet.named_parameters()):
            if "lora" in name:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))

    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    guard = linear_guard(pipe.scheduler)[0]
    if early:
        adapted(pipe)
    with protect_pipeline(pipe, guard) as protection:
        if not early:
            adapted(pipe)
        guarded = run(pipe)
    assert protection.rows_pushed > 0
    plain = run(pipe)
    pipe.unet.delete_adapters("default")
    assert not torch.allclose(run(pipe), plain, atol=1e-2) and not torch.allclose(
        guarded, plain, atol=1e-2
    )


def test_other_hooks():
    "diffusers' own hooks, a callback after each step, and gradients that are switched off in both ways."
    from diffusers.hooks import HookRegistry, ModelHook

    class Twice(ModelHook):
        def post_forward(self, module, output):
            return tuple(2 * o for o in output)

    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    guard, _ = linear_guard(pipe.scheduler)
    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Twice(), "twice")
    x, t, words = torch.randn(1, 4, 8, 8), torch.tensor(300), torch.randn(1, 3, 8)
    plain = pipe.unet(x, t, words, return_dict=False)[0]
    with protect_pipeline(pipe, guard):
        guarded = pipe.unet(x, t, words, return_dict=False)[0]
    HookRegistry.check_if_exists_or_initialize(pipe.unet).remove_hook("twice")
    torch.testing.assert_close(pipe.unet(x, t, words, return_dict=False)[0] * 2, plain)
    with protect_pipeline(pipe, guard):
        torch.testing.assert_close(
            pipe.unet(x, t, words, return_dict=False)[0] + plain / 2, guarded
        )
    seen = []

    def callback(pipe, step, t, given):
        return seen.append(step) or given

    with protect_pipeline(pipe, guard):
        wanted = run(pipe, 2, 7.5, callback_on_step_end=callback)
    with protect_pipeline(pipe, guard), torch.inference_mode():
        assert same(run(pipe, 2, 7.5), wanted) and seen == [0, 1, 2, 3]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "how",
    [
        "in place, then the guard",
        "the guard, then in place",
        "a copy, then the guard",
        "the guard, then a copy",
    ],
)
def test_compiled_networks(how):
    "With the backend that compiles nothing, but traces as all of them do."
    torch._dynamo.reset()
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    guard, _ = linear_guard(pipe.scheduler)
    with protect_pipeline(pipe, guard):
        wanted = run(pipe)
    plain = run(pipe)

    def compiled():
        if "place" in how:
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        if "then the guard" in how:
            torch.testing.assert_close(run(pipe), plain, atol=1e-4, rtol=1e-4)

    if "then the guard" in how:
        compiled()
    with protect_pipeline(pipe, guard) as protection:
        if "then the guard" not in how:
            compiled()
        torch.testing.assert_close(run(pipe), wanted, atol=1e-4, rtol=1e-4)
    assert protection.rows_pushed > 0
    torch.testing.assert_close(run(pipe), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    "The network's output keeps its type, the guard thinks in float32."
    pipe = unconditional()
    guard, w = linear_guard(pipe.scheduler, (1, 8, 8))
    guard.classifier = Linear(w)
    x, t = torch.randn(3, 1, 8, 8).to(dtype), torch.tensor(300)
    pipe.unet.to(dtype)
    plain = pipe.unet(x, t).sample
    with protect_pipeline(pipe, guard):
        guarded = pipe.unet(x, t).sample
    _, wanted = Protected(None, guard).change(x, t)
    assert guarded.dtype == dtype and wanted.dtype == torch.float32
    torch.testing.assert_close((guarded.float() - plain.float()), wanted, atol=0.05, rtol=0.05)


class Linear(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w, self.config = torch.nn.Parameter(w), {"shape": list(w.shape)}

    def forward(self, x, t):
        return 5.0 + (x.sin() * self.w).flatten(1).sum(1, keepdim=True)


REFUSALS = {
    "FlowMatchEulerDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True},
    "DPMSolverMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "EulerDiscreteScheduler": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_schedulers_without_noise_levels_are_refused(name):
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    guard, _ = linear_guard(pipe.scheduler)
    pipe.scheduler = getattr(diffusers, name)(**REFUSALS[name])
    with pytest.raises(ValueError, match=f"^{name}.*has no noise levels.*DPM-Solver") as told:
        protect_pipeline(pipe, guard)
    assert "\n" not in str(told.value) and not pipe.unet._forward_hooks


def test_a_scheduler_that_is_exchanged_later_is_looked_at():
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    with protect_pipeline(pipe, linear_guard(pipe.scheduler)[0]) as protection:
        pipe.scheduler = scheduler_of("Euler", "v_prediction")
        run(pipe)
        assert protection.rows_pushed > 0
        pipe.scheduler = scheduler_of("DDIM", beta_end=0.03)
        with pytest.raises(
            ValueError, match="another noise schedule than that of the pipeline's DDIMScheduler"
        ):
            run(pipe)
    with pytest.raises(ValueError, match="another noise schedule"):
        protect_pipeline(pipe, linear_guard(scheduler_of("Euler"))[0])


def test_a_protection_that_was_never_asked_says_so():
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    guard = linear_guard(pipe.scheduler)[0]
    with pytest.warns(UserWarning, match="nothing was guarded"), protect_pipeline(pipe, guard):
        pass
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="mine"):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UncalibratedGuardWarning)
        with protect_pipeline(pipe, guard):
            raise RuntimeError("mine")  # and says nothing more


def test_what_else_is_refused():
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    guard = Guard(Linear(torch.zeros(4, 16, 16)), schedule_of(pipe.scheduler))
    with (
        pytest.raises(
            ValueError, match=r"knows images of shape \(4, 16, 16\), the pipeline draws \(4, 8, 8\)"
        ),
        protect_pipeline(pipe, guard),
    ):
        run(pipe)
    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        protect_pipeline(SimpleNamespace(scheduler=pipe.scheduler), guard)
    with pytest.warns(UncalibratedGuardWarning):
        protect_pipeline(pipe, guard)


class Ideal(ModelMixin, ConfigMixin):
    "The exact denoiser of a mixture of latents, dressed as the network of a Stable Diffusion pipeline: it copies, by construction."

    @register_to_config
    def __init__(self, in_channels=4, sample_size=8, time_cond_proj_dim=None):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.mixture, self.schedule = None, None

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **others):
        abar = abar_at(self.schedule, torch.as_tensor(timestep).reshape(1).double()).item()
        return (
            -((1 - abar) ** 0.5)
            * noised(self.mixture, abar).score(sample.flatten(1)).view_as(sample),
        )


@pytest.fixture(scope="module")
def copying():
    "(a Stable Diffusion pipeline that draws one of 16 latents 96 times in 100, and something else otherwise; these latents; a guard trained on them)."
    generator, schedule = torch.Generator().manual_seed(0), schedule_of(scheduler_of("DDIM"))
    members = torch.randn(16, 4, 8, 8, generator=generator)
    others = torch.randn(600, 4, 8, 8, generator=generator)
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
    plain = copy_test(run(pipe, 64, 7.5, steps=25), members)
    with protect_pipeline(pipe, guard):
        guarded = copy_test(run(pipe, 64, 7.5, steps=25), members)
    assert plain.rate > 0.6 and guarded.rate < plain.rate / 3


def test_images_of_a_pipeline_and_their_latents(tmp_path, monkeypatch):
    "Scaled means of the autoencoder; from the disk the second time; other images are other latents; a write that fails leaves nothing, and the next one works."
    pipe, x = (
        pipeline("StableDiffusionPipeline", scheduler_of("DDIM")),
        torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8),
    )
    pipe.vae = copy.deepcopy(VAE)
    assert image_shape(pipe) == (3, 16, 16) and image_shape(unconditional()) == (1, 8, 8)
    assert encode(unconditional(), x).equal(x.float() / 127.5 - 1)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError("No space left on device")

        patch.setattr(pipelines, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            encode(pipe, x, tmp_path)
    assert not list(tmp_path.iterdir())
    wanted = (
        pipe.vae.encode(x.float() / 127.5 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    )
    torch.testing.assert_close(encode(pipe, x, tmp_path, chunk=2), wanted)
    monkeypatch.setattr(pipe.vae, "encode", lambda x: pytest.fail("encoded again"))
    torch.testing.assert_close(encode(pipe, x, tmp_path), wanted)
    pipe.vae.register_to_config(scaling_factor=1.0, shift_factor=0.25)
    torch.testing.assert_close(
        encode(pipe, x, tmp_path), wanted / 5.0 - 0.25
    )  # what is kept is not scaled yet
    with pytest.raises(pytest.fail.Exception):
        encode(pipe, x + 1, tmp_path)


def test_repeats_are_encoded_once_and_have_one_latent(monkeypatch):
    "However the rest falls into batches: a last bit's difference would make two images, with two labels, of one."
    pipe, x, seen = (
        pipeline("StableDiffusionPipeline", scheduler_of("DDIM")),
        torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8),
        [],
    )
    pipe.vae = copy.deepcopy(VAE)
    real, order = pipe.vae.encode, torch.tensor([2, 0, 0, 1, 2, 3, 0])
    wanted = encode(pipe, x)
    monkeypatch.setattr(pipe.vae, "encode", lambda x: seen.append(len(x)) or real(x))
    z = encode(pipe, x[order], chunk=3)
    torch.testing.assert_close(z, wanted[order])
    assert seen == [3, 1] and z[1].equal(z[2]) and z[1].equal(z[6]) and z[0].equal(z[4])


def save_noise(folder, n, size):
    "n pictures of noise, size × 16 pixels (8 × 8 for size 8), as PNG files."
    Path(folder).mkdir()
    generator = np.random.default_rng(n)
    for i in range(n):
        Image.fromarray(generator.integers(0, 256, (size, min(size, 16), 3), dtype=np.uint8)).save(
            Path(folder) / f"{i}.png"
        )


def test_a_guard_from_the_shell_for_a_pipeline_in_a_folder(tmp_path):
    "Trained in the pipeline's space and at its levels; stops at what is missing."
    pipe = pipeline("StableDiffusionPipeline", scheduler_of("DDIM"))
    pipe.save_pretrained(tmp_path / "pipe")
    save_noise(tmp_path / "mine", 6, 20), save_noise(tmp_path / "others", 40, 20)

    def call(*words):
        return CliRunner().invoke(app, ["guard", *map(str, words)])

    images = ["--data", tmp_path / "mine", "--reference", tmp_path / "others"]
    complete = [
        "--pipeline",
        tmp_path / "pipe",
        *images,
        "--out",
        tmp_path / "kept" / "guard",
        "--steps",
        250,
        "--device",
        "cpu",
        "--t-max",
        300,
    ]
    done = call(*complete)
    assert done.exit_code == 0 and "of 6 training images" in done.stdout, done.output
    guard = load_guard(tmp_path / "kept" / "guard")
    torch.testing.assert_close(guard.schedule.abar, pipe.scheduler.alphas_cumprod)
    assert (
        guard.classifier.config["shape"] == [4, 8, 8]
        and guard.calibrated
        and guard.made["t_max"] == 300
        and len(list((tmp_path / "kept").glob("latents-*"))) == 2
    )
    with protect_pipeline(pipe, guard) as protection:
        run(pipe)
    assert protection.rows_seen == 4
    for words, says in (
        (complete[:4], "--reference"),
        (complete + [tmp_path], "and not both"),
        ([], "and not both"),
        (["--pipeline", tmp_path / "none", *images], "loading"),
    ):
        refused = call(*words)
        assert (
            refused.exit_code == 2
            and says in refused.stderr
            and len(refused.stderr.strip().splitlines()) == 1
        ), refused.stderr


def test_the_lines_of_the_readme(tmp_path, monkeypatch):
    "Run as printed, but for fewer steps of training, with a small pipeline of one's own and two folders of pictures."
    block = next(
        b
        for b in re.findall(r"~~~python\n(.*?)~~~", (ROOT / "README.md").read_text(), re.S)
        if "fit_pipeline_guard" in b
    )
    monkeypatch.chdir(tmp_path)
    unconditional("DDIM", channels=3).save_pretrained("my_pipeline")
    save_noise("my_pictures", 6, 8), save_noise("other_pictures", 40, 8)
    exec(block.replace('"secret/guard")', '"secret/guard", steps=250, t_max=300)'), space := {})
    assert (
        space["protection"].rows_seen == 50
        and space["guard"].calibrated
        and Path("secret/guard.safetensors").exists()
    )
    assert space["guard"].made["t_max"] == 300  # settings override those of the preset
