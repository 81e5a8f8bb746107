"What a protected pipeline promises: in company, compiled, in half precision, and in refusals."

import copy
import io
import pickle
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

from cpsample.core.ddpm import final_sample, generate, sample
from cpsample.core.guard import Guard, UncalibratedGuardWarning
from cpsample.core.protection import Corrector, protect
from cpsample.judgement.attacks import scores_of
from cpsample.production.pipelines import (
    UnguardedWarning,
    as_denoiser,
    protect_pipeline,
    schedule_of,
)

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
    guards = [linear_guard(pipe.scheduler, scale=5.0).guard for _ in range(2)]
    plain = draw_latents(pipe, 2, 7.5)
    first, second = [protect_pipeline(pipe, guard) for guard in guards]
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


def test_the_same_guard_does_not_push_twice():
    "Neither on one pipeline nor on two that share the network, as it is or in a wrapper."
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler).guard
    sharing = SimpleNamespace(unet=torch.nn.Sequential(pipe.unet), scheduler=pipe.scheduler)
    plain = draw_latents(pipe)
    with protect_pipeline(pipe, guard):
        for again in (pipe, sharing):
            with pytest.raises(ValueError, match="has this guard already"):
                protect_pipeline(again, guard)
        once = draw_latents(pipe)
    with protect_pipeline(pipe, guard):
        assert same(draw_latents(pipe), once)
    assert same(draw_latents(pipe), plain) and not pipe.unet._forward_hooks


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

    wanted = Corrector(guard).correction(x, t, x).delta_eps
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
def test_where_there_are_no_whole_levels_there_is_no_denoiser_of_this_book(name):
    scheduler = getattr(diffusers, name)(**REFUSED[name])
    with pytest.raises(ValueError, match=f"^{name}.*has no noise levels.*DPM-Solver") as told:
        as_denoiser(latent_pipeline().unet, scheduler)
    assert "\n" not in str(told.value)


def test_a_scheduler_that_is_exchanged_later_is_looked_at():
    pipe = latent_pipeline()
    with protect_pipeline(pipe, linear_guard(pipe.scheduler).guard) as protection:
        pipe.scheduler = scheduler_of("Euler", "v_prediction")
        draw_latents(pipe)
        assert protection.rows_pushed > 0
        pipe.scheduler = scheduler_of("DDIM", beta_end=0.03)
        refusal = "another noise schedule .* than the model's"
        with pytest.raises(ValueError, match=refusal):
            draw_latents(pipe)
    with pytest.raises(ValueError, match="another noise schedule"):
        protect_pipeline(pipe, linear_guard(scheduler_of("Euler")).guard)


def other_levels(scheduler):
    scheduler.alphas_cumprod = torch.linspace(0.999, 0.3, 1000)


def levels_in_place(scheduler):
    scheduler.alphas_cumprod.mul_(0.5)


def flows(scheduler):
    scheduler.register_to_config(prediction_type="flow_prediction")


CHANGES = {
    "levels": (other_levels, "another noise schedule"),
    "in place": (levels_in_place, "another noise schedule"),
    "prediction": (flows, "'flow_prediction'.* has no noise levels"),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_scheduler_that_is_changed_in_place_is_looked_at(how, inference):
    pipe = latent_pipeline()
    with torch.inference_mode(inference):
        pipe.scheduler = scheduler_of("DDIM")
    change, refusal = CHANGES[how]
    with protect_pipeline(pipe, linear_guard(pipe.scheduler).guard) as protection:
        draw_latents(pipe)
        with torch.inference_mode(inference):
            change(pipe.scheduler)
        with pytest.raises(ValueError, match=refusal) as told:
            draw_latents(pipe)
    assert "\n" not in str(told.value) and protection.rows_seen == 4


def test_what_a_network_answers_may_change():
    "As may every setting but the levels: it is read when it is needed."
    pipe = latent_pipeline()
    with protect_pipeline(pipe, linear_guard(pipe.scheduler).guard):
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
        changed = draw_latents(pipe)
    pipe = latent_pipeline(scheduler=scheduler_of("DDIM", "v_prediction"))
    with protect_pipeline(pipe, linear_guard(pipe.scheduler).guard):
        assert same(draw_latents(pipe), changed)


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
    guard = Guard(Linear(torch.ones(4, 16, 16)), schedule_of(pipe.scheduler))
    refusal = r"knows images of shape \(4, 16, 16\), the model draws \(4, 8, 8\)"
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


TO_ZERO = {
    "DDIM": {},
    "DDPM": {},
    "LCM": {},
    "Euler": {},
    "DPM++": {},
    "UniPC": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", TO_ZERO)
def test_where_only_noise_is_left_the_guard_says_nothing(name, prediction, dtype):
    "Zero terminal SNR, exact or as diffusers writes it: no NaN, and the push everywhere else."
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if name == "LCM":
        settings = {"num_train_timesteps": 1000, "prediction_type": prediction}
        scheduler = diffusers.LCMScheduler(**settings | options)
    else:
        scheduler = scheduler_of(name, prediction, **options)
    assert schedule_of(scheduler).abar[-1] < 1e-7

    pipe = pixel_pipeline(channels=4)
    pipe.scheduler = scheduler
    pipe.unet.to(dtype)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = [pipe.unet(x, t).sample for t in (999, 500)]
    with protect_pipeline(pipe, linear_guard(scheduler).guard):
        guarded = [pipe.unet(x, t).sample for t in (999, 500)]
        assert same(guarded[0], plain[0])
        assert guarded[1].isfinite().all() and not torch.allclose(guarded[1], plain[1], atol=1e-3)

        # The whole way, as a pipeline goes it.
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            answer = pipe.unet(scheduler.scale_model_input(x, t).to(dtype), t).sample
            x = scheduler.step(answer, t, x).prev_sample.to(dtype)
        assert x.isfinite().all()


# What would take the guard off, or along, without a word.


TRACES = {
    "traced": lambda network, inputs: torch.jit.trace(
        lambda x, t: network(x, t, return_dict=False)[0], inputs, check_trace=False
    ),
    "exported": lambda network, inputs: torch.export.export(network, inputs, strict=False),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::cpsample.production.pipelines.UnguardedWarning")
@pytest.mark.parametrize("bias", [0.0, 5.0], ids=["undecided", "certain"])
@pytest.mark.parametrize("how", TRACES)
def test_a_protected_network_is_neither_traced_nor_exported(how, bias):
    "Where the guard is certain it would go along, where it is not it would be left out for ever."
    pipe = pixel_pipeline()
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([5])
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, (1, 8, 8), bias=bias).guard):
        with pytest.raises(ValueError, match="cannot be traced or exported: its guard") as told:
            TRACES[how](pipe.unet, inputs)
    assert "\n" not in str(told.value)
    assert TRACES[how](pipe.unet, inputs)


@pytest.fixture
def protected():
    "A pipeline of its own network, and its protection."
    pipe = latent_pipeline()
    yield pipe, (protection := protect_pipeline(pipe, linear_guard(pipe.scheduler).guard))
    protection.remove()


def exchange(pipe, network):
    pipe.unet = network


def exchange_behind_its_back(pipe, network):
    vars(pipe)["unet"] = network
    draw_latents(pipe)


def forget_the_hook(pipe, _):
    pipe.unet._forward_hooks.clear()
    draw_latents(pipe)


EXCHANGES = {
    "by name": exchange,
    "registered": lambda pipe, network: pipe.register_modules(unet=network),
    "none": lambda pipe, _: exchange(pipe, None),
    "a function": lambda pipe, network: exchange(pipe, lambda *args, **kwargs: network(*args)),
    "behind its back": exchange_behind_its_back,
    "hook lost": forget_the_hook,
    "a second one": lambda pipe, network: setattr(pipe, "unet_2", network) or draw_latents(pipe),
}


@pytest.mark.parametrize("how", EXCHANGES)
def test_the_network_of_a_protected_pipeline_cannot_be_exchanged(how, protected):
    pipe, protection = protected
    with pytest.raises(ValueError, match="but not this network|several denoising") as told:
        EXCHANGES[how](pipe, latent_pipeline().unet)
    assert "\n" not in str(told.value)

    # Once it is off, everything is as it was.
    vars(pipe).pop("unet_2", None)
    vars(pipe)["unet"] = protection.network
    protection.remove()
    assert type(pipe) is diffusers.StableDiffusionPipeline and "_protections" not in vars(pipe)
    pipe.unet = latent_pipeline().unet
    draw_latents(pipe)


def test_a_network_may_be_wrapped(protected):
    pipe, protection = protected

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    guarded = draw_latents(pipe)
    pipe.unet = Wrapper(pipe.unet)
    assert same(draw_latents(pipe), guarded) and protection.rows_seen == 8


def test_a_call_that_passes_the_guard_by_is_told_of(protected):
    "The images are there; the warning says that nobody looked at them."
    pipe, protection = protected
    draw_latents(pipe)
    pipe.unet._call_impl = pipe.unet.forward  # as a compiled network that looks for no hooks
    with pytest.warns(UnguardedWarning, match="nothing was guarded") as told:
        draw_latents(pipe)
    assert told[0].filename.endswith("small_pipelines.py")
    del pipe.unet._call_impl
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_latents(pipe)
    assert protection.rows_seen == 8


COPIES = {
    "pickle of the network": lambda pipe: pickle.dumps(pipe.unet),
    "torch.save of the network": lambda pipe: torch.save(pipe.unet, io.BytesIO()),
    "deepcopy of the network": lambda pipe: copy.deepcopy(pipe.unet),
    "pickle of the pipeline": pickle.dumps,
    "torch.save of the pipeline": lambda pipe: torch.save(pipe, io.BytesIO()),
    "deepcopy of the pipeline": copy.deepcopy,
    "copy of the pipeline": copy.copy,
    "a module around it": lambda pipe: copy.deepcopy(torch.nn.Sequential(pipe.unet)),
    "average of weights": lambda pipe: torch.optim.swa_utils.AveragedModel(pipe.unet),
}


@pytest.mark.parametrize("how", COPIES)
def test_what_is_protected_is_neither_pickled_nor_copied(how, protected):
    pipe, protection = protected
    refusal = "neither pickled nor copied, or its guard, a secret, would go along.*save_pretrained"
    with pytest.raises(ValueError, match=refusal) as told:
        COPIES[how](pipe)
    assert "\n" not in str(told.value)
    protection.remove()
    COPIES[how](pipe)


def test_the_network_of_a_bundle_of_parts_is_not_copied_either():
    "A bundle is protected like a pipeline, but cannot be watched."
    pipe = latent_pipeline()
    parts = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler)
    with protect_pipeline(parts, linear_guard(pipe.scheduler).guard) as protection:
        draw_latents(pipe)
        with pytest.raises(ValueError, match="neither pickled nor copied"):
            copy.deepcopy(parts.unet)
        with pytest.raises(ValueError, match="neither pickled nor copied"):
            pickle.dumps(protection)
    assert protection.rows_pushed > 0


def test_a_protected_pipeline_is_saved_without_its_guard(protected, tmp_path):
    pipe, protection = protected
    protection.guard.classifier = Linear(torch.full((4, 8, 8), 0.02))
    pipe.save_pretrained(tmp_path)
    torch.save(pipe.unet.state_dict(), tmp_path / "weights.pt")
    parts = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **parts)
    assert type(again) is diffusers.StableDiffusionPipeline and not again.unet._forward_hooks
    weights = pipe.unet.state_dict()
    assert all(same(weight, weights[name]) for name, weight in again.unet.state_dict().items())
    assert not [path for path in tmp_path.rglob("*guard*")]


def test_training_while_it_is_protected_is_refused(protected):
    pipe, protection = protected
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(300), torch.randn(1, 3, 8)
    pipe.unet.requires_grad_().train()
    with pytest.raises(ValueError, match="cannot be trained, it would learn against") as told:
        pipe.unet(*inputs).sample.square().mean().backward()
    assert "\n" not in str(told.value)

    # Sampling in any mode, and gradients with respect to the image, are no training.
    with torch.no_grad():
        pipe.unet(*inputs)
    pipe.unet.eval()(*inputs)
    protection.remove()
    pipe.unet.train()(*inputs).sample.mean().backward()


def test_a_second_pipeline_with_the_same_parts_is_protected(protected):
    pipe, protection = protected
    parts = pipe.components | {"requires_safety_checker": False}
    other = diffusers.StableDiffusionImg2ImgPipeline(**parts)
    third = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    draw_latents(other)
    assert protection.rows_pushed == protection.rows_seen == 3
    for pipeline in (other, third):
        assert pipeline.unet is pipe.unet and "_protections" not in vars(pipeline)


# Captions go with their images.


class Captioned(torch.nn.Module):
    "Answers with the caption of each image, and notes how many images it was shown at once."

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x, t, encoder_hidden_states, added, return_dict):
        self.sizes.append(len(x))
        marks = encoder_hidden_states.mean((1, 2)) + added["sizes"][0][:, 0]
        return (marks.view(-1, 1, 1, 1).expand_as(x),)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_conditioning_is_cut_with_the_images(chunk, guarded):
    scheduler, network, n = scheduler_of("DDIM"), Captioned(), 7
    captions = torch.arange(n).view(n, 1, 1).expand(n, 2, 3).float()
    more = {"sizes": [100 * torch.arange(n).view(n, 1).float()], "scale": 0.5}
    model = as_denoiser(network, scheduler, encoder_hidden_states=captions, added=more)
    if guarded:
        model = protect(model, linear_guard(scheduler, (1, 4, 4), bias=0.0).guard)

    def marks(model, x):
        return model(x, torch.zeros(len(x)).long())[:, 0, 0, 0]

    x = torch.zeros(n, 1, 4, 4)
    assert scores_of(marks, model, x, chunk=chunk).tolist() == [101 * i for i in range(n)]
    drawn = generate(model, schedule_of(scheduler), (1, 4, 4), n, steps=2, chunk=chunk)
    assert len(drawn) == n and max(network.sizes) == min(chunk, n)
    if guarded:
        assert model.rows_seen == 3 * n
    with pytest.raises(ValueError, match="encoder_hidden_states has 7 rows for 2 images"):
        model(x[:2], torch.zeros(2).long())
