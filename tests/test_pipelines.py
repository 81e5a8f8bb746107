"What a protected pipeline promises: in company, compiled, in half precision, and in refusals."

import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from small_pipelines import (
    PREDICTIONS,
    QUIET,
    Linear,
    draw_latents,
    draw_pixels,
    latent_pipeline,
    linear_guard,
    pixel_pipeline,
    same,
    scheduler_of,
)

from cpsample.core.ddpm import final_sample, sample
from cpsample.core.guard import Corrector, Guard, UncalibratedGuardWarning, protect
from cpsample.production.pipelines import as_denoiser, protect_pipeline, schedule_of

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pixel_pipelines(kind, prediction, n):
    pipe = pixel_pipeline(kind, prediction, clip_sample=False)
    plain = draw_pixels(pipe, n)
    never_certain = linear_guard(pipe.scheduler, (1, 8, 8), bias=0.0).guard
    with protect_pipeline(pipe, never_certain) as never:
        assert same(draw_pixels(pipe, n), plain)
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, (1, 8, 8)).guard) as always:
        assert not torch.allclose(draw_pixels(pipe, n), plain, atol=1e-3)
    assert never.rows_pushed == 0 < always.rows_pushed
    assert always.rows_seen == never.rows_seen == 4 * n
    assert same(draw_pixels(pipe, n), plain)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_own_sampler_and_diffusers_give_the_same_images(prediction):
    pipe = pixel_pipeline("DDIM", prediction, clip_sample=False)
    guard = linear_guard(pipe.scheduler, (1, 8, 8), t_max=600).guard
    model = as_denoiser(pipe.unet, pipe.scheduler)
    pipe.scheduler.set_timesteps(10)
    levels = pipe.scheduler.timesteps.tolist()

    def ours(model):
        generator, schedule = torch.Generator().manual_seed(0), guard.schedule
        steps = sample(model, schedule, (5, 1, 8, 8), steps=levels, eta=0, generator=generator)
        return final_sample(steps)

    def theirs():
        return 2 * draw_pixels(pipe, 5, steps=10).permute(0, 3, 1, 2) - 1

    plain, protected = ours(model), ours(protect(model, guard))
    torch.testing.assert_close(theirs(), plain.clamp(-1, 1), atol=1e-3, rtol=0)
    with protect_pipeline(pipe, guard):
        torch.testing.assert_close(theirs(), protected.clamp(-1, 1), atol=1e-3, rtol=0)
    assert (protected - plain).abs().max() > 0.05


def test_a_network_that_answers_with_variances_as_well_keeps_them():
    pipe = pixel_pipeline("DDPM", out=2, variance_type="learned")
    x, t = torch.randn(3, 1, 8, 8), torch.tensor(300)
    plain = pipe.unet(x, t).sample
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, (1, 8, 8)).guard):
        guarded = pipe.unet(x, t).sample
    assert same(plain[:, 1], guarded[:, 1])
    assert not torch.allclose(plain[:, 0], guarded[:, 0], atol=1e-2)


def test_guards_nest_and_come_off_in_any_order():
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler, scale=5.0).guard
    plain = draw_latents(pipe, 2, 7.5)
    first, second = protect_pipeline(pipe, guard), protect_pipeline(pipe, guard)
    twice = draw_latents(pipe, 2, 7.5)
    first.remove()
    once = draw_latents(pipe, 2, 7.5)
    second.remove()
    assert same(draw_latents(pipe, 2, 7.5), plain)
    assert not torch.allclose(once, twice, atol=1e-2)
    assert not torch.allclose(once, plain, atol=1e-2)

    # Two guards push like one that is twice as strong.
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, scale=10.0).guard):
        torch.testing.assert_close(draw_latents(pipe, 2, 7.5), twice, atol=1e-2, rtol=1e-3)


def add_lora(network):
    "A LoRA adapter that changes something."
    import peft

    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    for i, (name, p) in enumerate(network.named_parameters()):
        if "lora" in name:
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("lora_is_first", [False, True], ids=["after the guard", "before it"])
def test_lora(lora_is_first):
    pipe = latent_pipeline()
    if lora_is_first:
        add_lora(pipe.unet)
    with protect_pipeline(pipe, linear_guard(pipe.scheduler).guard) as protection:
        if not lora_is_first:
            add_lora(pipe.unet)
        guarded = draw_latents(pipe)
    assert protection.rows_pushed > 0

    adapted = draw_latents(pipe)
    pipe.unet.delete_adapters("default")
    assert not torch.allclose(draw_latents(pipe), adapted, atol=1e-2)
    assert not torch.allclose(guarded, adapted, atol=1e-2)


def test_hooks_of_diffusers_work_beside_it():
    from diffusers.hooks import HookRegistry, ModelHook

    class Twice(ModelHook):
        def post_forward(self, module, output):
            return tuple(2 * part for part in output)

    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler).guard
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(300), torch.randn(1, 3, 8)

    def answer():
        return pipe.unet(*inputs, return_dict=False)[0]

    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    registry.register_hook(Twice(), "twice")
    doubled = answer()
    with protect_pipeline(pipe, guard):
        doubled_and_guarded = answer()

    HookRegistry.check_if_exists_or_initialize(pipe.unet).remove_hook("twice")
    torch.testing.assert_close(answer() * 2, doubled)
    with protect_pipeline(pipe, guard):
        torch.testing.assert_close(answer() + doubled / 2, doubled_and_guarded)


def test_callbacks_and_switched_off_gradients_change_nothing():
    pipe = latent_pipeline()
    guard, seen = linear_guard(pipe.scheduler).guard, []

    def callback(pipe, step, t, given):
        seen.append(step)
        return given

    with protect_pipeline(pipe, guard):
        wanted = draw_latents(pipe, 2, 7.5, callback_on_step_end=callback)
    assert seen == [0, 1, 2, 3]
    with protect_pipeline(pipe, guard), torch.inference_mode():
        assert same(draw_latents(pipe, 2, 7.5), wanted)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("guard_is_first", [False, True], ids=["then the guard", "the guard first"])
@pytest.mark.parametrize("in_place", [False, True], ids=["a copy", "in place"])
def test_compiled_networks(in_place, guard_is_first):
    "With the backend that compiles nothing, but traces as all of them do."
    torch._dynamo.reset()
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler).guard
    with protect_pipeline(pipe, guard):
        wanted = draw_latents(pipe)
    plain = draw_latents(pipe)
    tolerance = {"atol": 1e-4, "rtol": 1e-4}

    def compile_network():
        if in_place:
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")

    if not guard_is_first:
        compile_network()
        torch.testing.assert_close(draw_latents(pipe), plain, **tolerance)
    with protect_pipeline(pipe, guard) as protection:
        if guard_is_first:
            compile_network()
        torch.testing.assert_close(draw_latents(pipe), wanted, **tolerance)
    assert protection.rows_pushed > 0
    torch.testing.assert_close(draw_latents(pipe), plain, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    "The network's output keeps its type, the guard thinks in float32."
    pipe = pixel_pipeline()
    guard, w = linear_guard(pipe.scheduler, (1, 8, 8))
    guard.classifier = Linear(w).eval()
    x, t = torch.randn(3, 1, 8, 8).to(dtype), torch.tensor(300)
    pipe.unet.to(dtype)
    plain = pipe.unet(x, t).sample
    with protect_pipeline(pipe, guard):
        guarded = pipe.unet(x, t).sample

    wanted = Corrector(guard).correction(x, t).delta_eps
    assert guarded.dtype == dtype and wanted.dtype == torch.float32
    difference = guarded.float() - plain.float()
    torch.testing.assert_close(difference, wanted, atol=0.05, rtol=0.05)


REFUSED = {
    "FlowMatchEulerDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True},
    "DPMSolverMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    "EulerDiscreteScheduler": {"timestep_type": "continuous", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_without_noise_levels_are_refused(name):
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler).guard
    pipe.scheduler = getattr(diffusers, name)(**REFUSED[name])
    with pytest.raises(ValueError, match=f"^{name}.*has no noise levels.*DPM-Solver") as told:
        protect_pipeline(pipe, guard)
    assert "\n" not in str(told.value) and not pipe.unet._forward_hooks


def test_a_scheduler_that_is_exchanged_later_is_looked_at():
    pipe = latent_pipeline()
    with protect_pipeline(pipe, linear_guard(pipe.scheduler).guard) as protection:
        pipe.scheduler = scheduler_of("Euler", "v_prediction")
        draw_latents(pipe)
        assert protection.rows_pushed > 0
        pipe.scheduler = scheduler_of("DDIM", beta_end=0.03)
        refusal = "another noise schedule than that of the pipeline's DDIMScheduler"
        with pytest.raises(ValueError, match=refusal):
            draw_latents(pipe)
    with pytest.raises(ValueError, match="another noise schedule"):
        protect_pipeline(pipe, linear_guard(scheduler_of("Euler")).guard)


def test_a_protection_that_was_never_asked_says_so():
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler).guard
    with pytest.warns(UserWarning, match="nothing was guarded"), protect_pipeline(pipe, guard):
        pass


def test_a_protection_whose_block_fails_says_nothing_more():
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler).guard
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="mine"):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UncalibratedGuardWarning)
        with protect_pipeline(pipe, guard):
            raise RuntimeError("mine")


def test_images_of_another_size_are_refused():
    pipe = latent_pipeline()
    guard = Guard(Linear(torch.zeros(4, 16, 16)), schedule_of(pipe.scheduler))
    refusal = r"knows images of shape \(4, 16, 16\), the pipeline draws \(4, 8, 8\)"
    with pytest.raises(ValueError, match=refusal), protect_pipeline(pipe, guard):
        draw_latents(pipe)


def test_a_pipeline_without_a_denoising_network_is_refused():
    scheduler = scheduler_of("DDIM")
    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        protect_pipeline(SimpleNamespace(scheduler=scheduler), linear_guard(scheduler).guard)


def test_a_guard_that_is_not_calibrated_is_told_of():
    pipe = latent_pipeline()
    with pytest.warns(UncalibratedGuardWarning) as told:
        protect_pipeline(pipe, linear_guard(pipe.scheduler).guard)
    assert told[0].filename == __file__  # it points at the caller
