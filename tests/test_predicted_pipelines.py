"Pipelines whose guard looks at the predicted picture: the sampler goes on from the corrected one."

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipelines import (
    PARTS,
    PREDICTIONS,
    QUIET,
    Linear,
    _conditional_unet,
    draw_latents,
    draw_pixels,
    latent_pipeline,
    linear_guard,
    pixel_pipeline,
    same,
    scheduler_of,
    seeded,
)

from cpsample.core.guard import Guard
from cpsample.core.guard_files import load_guard
from cpsample.core.predicted import correct_at_x0, undecided
from cpsample.core.protection import protect
from cpsample.core.schedule import add_noise, eps_to_v, eps_to_x0, v_to_eps, x0_to_eps
from cpsample.production.pipelines import (
    as_denoiser,
    encode,
    fit_pipeline_guard,
    protect_pipeline,
    schedule_of,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

# what a network answers with, from ε and to ε, f(x_t, t, ·, schedule)
CONVERSIONS = {
    "epsilon": (lambda x, t, eps, schedule: eps, lambda x, t, eps, schedule: eps),
    "v_prediction": (eps_to_v, v_to_eps),
    "sample": (eps_to_x0, x0_to_eps),
}


def picture_guard(scheduler, shape=(4, 8, 8), *, bias=3.0, t_max=1000, **settings):
    "A guard at x̂₀ whose gate (|z| > 2.9) passes about half of all pictures."
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02

    def classifier(x, t):
        return bias + (x.sin() * w).flatten(1).sum(1, keepdim=True)

    given = dict(alpha=0.05, scale=2.0, t_max=t_max, at="x0", moves=3, longest=0.5)
    return Guard(classifier, schedule_of(scheduler), **given | settings)


def corrected(guard, x_t, t, answer, prediction):
    "A prediction whose picture the guard is not certain of, and which rows were changed."
    from_eps, to_eps = CONVERSIONS[prediction]
    levels = torch.as_tensor(t).expand(len(x_t))
    eps = to_eps(x_t, levels, answer, guard.schedule)
    correction = correct_at_x0(guard, x_t, levels, eps)
    if correction is None or t >= guard.t_max:
        return answer, torch.zeros(len(x_t), dtype=torch.bool)
    new_eps = eps.index_add(0, *correction)
    changed = torch.zeros(len(x_t), dtype=torch.bool)
    changed[correction.rows] = True
    new_answer = from_eps(x_t, levels, new_eps, guard.schedule)
    return torch.where(changed[:, None, None, None], new_answer, answer), changed


@torch.no_grad()
def by_hand(pipe, guard, n, w, steps=4):
    "`draw_latents` as a loop: the prediction that the scheduler gets is the corrected one."
    words = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(1))
    with_words, without = words.expand(2, n, 3, 8)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    x = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, n_changed = x * scheduler.init_noise_sigma, 0
    strengths = w if isinstance(w, list) else [w] * len(scheduler.timesteps)
    for t, strength in zip(scheduler.timesteps, strengths):
        shown = scheduler.scale_model_input(x, t)
        answer = pipe.unet(shown, t, with_words, return_dict=False)[0]
        if strength > 1:
            plain = pipe.unet(shown, t, without, return_dict=False)[0]
            answer = plain + strength * (answer - plain)
        prediction = scheduler.config.prediction_type
        answer, changed = corrected(guard, shown, t, answer, prediction)
        n_changed += int(changed.sum())
        x = scheduler.step(answer, t, x, return_dict=False)[0]
    return x, n_changed


@pytest.mark.parametrize("w", [1.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["DDIM", "Euler", "DPM++ Karras", "UniPC", "Heun"])
def test_the_sampler_goes_on_as_from_the_corrected_combination(name, prediction, w):
    "Inputs that are scaled (Euler, Heun), fractional levels (Karras), several orders."
    pipe = latent_pipeline(scheduler=scheduler_of(name, prediction))
    guard = picture_guard(pipe.scheduler, t_max=900)
    plain = draw_latents(pipe, 6, w)
    wanted, n_changed = by_hand(pipe, guard, 6, w)
    with protect_pipeline(pipe, guard) as protection:
        drawn = draw_latents(pipe, 6, w)
    torch.testing.assert_close(drawn, wanted, atol=2e-3, rtol=1e-3)
    assert protection.rows_pushed == n_changed > 0
    assert not torch.allclose(drawn, plain, atol=1e-2)


@given(
    w=st.floats(-2, 12),
    level=st.floats(0, 999),
    prediction=st.sampled_from(PREDICTIONS),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_the_picture_of_the_combination_is_the_one_that_is_moved(w, level, prediction, seed):
    "At any level and strength: its x̂₀ is what `undecided` makes of it, all halves change alike."
    scheduler = scheduler_of("Euler", prediction)
    guard = picture_guard(scheduler)
    generator = torch.Generator().manual_seed(seed)
    x_t, *halves = torch.randn(3, 5, 4, 8, 8, generator=generator).double()
    t = torch.tensor(level, dtype=torch.float64)
    pipe = Answering(scheduler, halves)
    with protect_pipeline(pipe, guard):
        new_halves = pipe(x_t, t, guidance_scale=w).chunk(2)
    changes = [new - old for new, old in zip(new_halves, halves)]
    torch.testing.assert_close(*changes)

    # Read as pictures, in the notation of the core.
    levels, pictures = t.expand(5), []
    for plain, words in (halves, new_halves):
        eps = CONVERSIONS[prediction][1](x_t, levels, plain + w * (words - plain), guard.schedule)
        pictures.append(eps_to_x0(x_t, levels, eps, guard.schedule))
    rows, moved = undecided(guard, pictures[0])
    wanted = pictures[0].index_copy(0, rows, moved)
    torch.testing.assert_close(pictures[1], wanted, rtol=1e-5, atol=1e-5)


class Network(torch.nn.Module):
    "Gives the answers that it was made with."

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, x, t, return_dict=False):
        return (torch.cat(self.answers),)


class Answering:
    "A pipeline that says how strong its guidance is by an argument alone."

    def __init__(self, scheduler, answers):
        self.scheduler, self.unet = scheduler, Network(answers)

    def __call__(self, x_t, t, guidance_scale=2.0):
        return self.unet(torch.cat([x_t] * len(self.unet.answers)), t)[0]


@pytest.mark.parametrize("called", [True, False], ids=["running", "a loop of one's own"])
def test_without_a_strength_the_conditional_half_counts(called):
    "A default argument says it, too; outside of a call nobody does."
    scheduler = scheduler_of("DDIM")
    guard = picture_guard(scheduler)
    x_t, *halves = torch.randn(3, 5, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    pipe, t = Answering(scheduler, halves), torch.tensor(300)
    with protect_pipeline(pipe, guard):
        draw = pipe if called else lambda x, t: pipe.unet(torch.cat([x] * 2), t)[0]
        new = draw(x_t, t).chunk(2)[1]
    counted = 2 * halves[1] - halves[0] if called else halves[1]
    wanted, changed = corrected(guard, x_t, t, counted, "epsilon")
    assert 0 < changed.sum() < 5
    torch.testing.assert_close(new - halves[1], wanted - counted, atol=1e-4, rtol=1e-4)


def test_a_strength_that_changes_on_the_way_is_followed():
    pipe = latent_pipeline()
    guard = picture_guard(pipe.scheduler)
    strengths = []

    def weaken(pipe, step, t, given):
        strengths.append(pipe.guidance_scale)
        pipe._guidance_scale = 2.0
        return given

    with protect_pipeline(pipe, guard):
        drawn = draw_latents(pipe, 6, 7.5, callback_on_step_end=weaken)
    assert strengths == [7.5, 2.0, 2.0, 2.0]

    wanted, _ = by_hand(pipe, guard, 6, strengths)
    torch.testing.assert_close(drawn, wanted, atol=2e-3, rtol=1e-3)


def test_equal_rows_without_guidance_are_no_repetition():
    "Two captions from one noise: each has a picture of its own in mind."
    pipe = latent_pipeline()
    guard = picture_guard(pipe.scheduler, bias=4.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    words = 4 * torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(5))
    given = {"negative_prompt_embeds": None, "guidance_scale": 1.0}

    def draw(rows):
        more = {"prompt_embeds": words[rows], "latents": noise.expand(len(rows), 4, 8, 8)}
        return draw_latents(pipe, len(rows), **given | more)

    alone = [draw([0]), draw([1])]
    with protect_pipeline(pipe, guard) as protection:
        guarded = [draw([0]), draw([1])]
        together = draw([0, 1])
    assert protection.rows_seen == 16
    torch.testing.assert_close(together, torch.cat(guarded), atol=1e-4, rtol=1e-4)
    assert any(not same(a, b) for a, b in zip(alone, guarded))


def test_own_sampler_and_diffusers_give_the_same_images_at_the_predicted_picture():
    "A pixel pipeline; pictures are clipped before the guard sees them."
    pipe = pixel_pipeline("DDIM", clip_sample=False)
    guard = picture_guard(pipe.scheduler, (1, 8, 8), clip=1.0)
    x, t = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(400)
    ours = protect(as_denoiser(pipe.unet, pipe.scheduler), guard)(x, t.expand(9))
    with protect_pipeline(pipe, guard) as protection:
        theirs = pipe.unet(x, t).sample
    torch.testing.assert_close(theirs, ours)
    assert 0 < protection.rows_pushed < 9


@pytest.mark.parametrize("quiet", [{"scale": 0.0}, {"bias": 0.0}], ids=["scale 0", "undecided"])
@pytest.mark.parametrize("w", [1.0, 7.5])
@pytest.mark.filterwarnings("ignore::cpsample.core.guard.IdleGuardWarning")
def test_a_guard_that_does_nothing_changes_no_bit(w, quiet):
    pipe = latent_pipeline(scheduler=scheduler_of("UniPC", "v_prediction"))
    plain = draw_latents(pipe, 3, w)
    with protect_pipeline(pipe, picture_guard(pipe.scheduler, **quiet)) as protection:
        assert same(draw_latents(pipe, 3, w), plain)
    assert protection.rows_pushed == 0 < protection.rows_seen


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_looks_in_full(dtype, prediction):
    "The network's output keeps its type; x̂₀ and its move are computed in float32."
    pipe = pixel_pipeline("DDIM", prediction)
    guard = picture_guard(pipe.scheduler, (1, 8, 8))
    w = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(3))
    guard.classifier = Linear(0.02 * w).eval()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    pipe.unet.to(dtype)
    plain = pipe.unet(x, 900).sample
    with protect_pipeline(pipe, guard):
        guarded = pipe.unet(x, 900).sample
    wanted, changed = corrected(guard, x.float(), 900, plain.float(), prediction)
    assert guarded.dtype == dtype and changed.any() and guarded.isfinite().all()
    difference, wanted_difference = guarded.float() - plain.float(), wanted - plain.float()
    step = torch.finfo(dtype).eps
    assert (difference - wanted_difference).abs().max() <= 4 * step * plain.abs().max()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIM", "Euler", "UniPC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_where_only_noise_is_left_there_is_no_picture(name, prediction, dtype):
    "Zero terminal SNR, exact or as diffusers writes it: nobody is asked, nothing changes."
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = scheduler_of(name, prediction, **options)
    pipe = pixel_pipeline(channels=4)
    pipe.scheduler = scheduler
    pipe.unet.to(dtype)
    x = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = [pipe.unet(x, t).sample for t in (999, 300)]
    with protect_pipeline(pipe, picture_guard(scheduler)) as protection:
        assert same(pipe.unet(x, 999).sample, plain[0]) and protection.rows_pushed == 0
        guarded = pipe.unet(x, 300).sample
    assert guarded.isfinite().all() and not same(guarded, plain[1])
    assert 0 < protection.rows_pushed


def test_variances_that_are_learned_stay():
    pipe = pixel_pipeline("DDPM", out=2, variance_type="learned")
    guard = picture_guard(pipe.scheduler, (1, 8, 8))
    x, t = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    plain = pipe.unet(x, t).sample
    with protect_pipeline(pipe, guard):
        guarded = pipe.unet(x, t).sample
    wanted, changed = corrected(guard, x, t, plain[:, :1], "epsilon")
    assert same(plain[:, 1], guarded[:, 1]) and 0 < changed.sum() < 9
    torch.testing.assert_close(guarded[:, :1], wanted)


def test_the_guards_answer_is_about_the_picture_and_not_about_the_noise():
    "The two kinds of guards, with one classifier, change other numbers."
    pipe = pixel_pipeline("DDIM", clip_sample=False)
    plain = draw_pixels(pipe, 3)
    with protect_pipeline(pipe, picture_guard(pipe.scheduler, (1, 8, 8))):
        at_x0 = draw_pixels(pipe, 3)
    with protect_pipeline(pipe, linear_guard(pipe.scheduler, (1, 8, 8), bias=3.0).guard):
        at_x_t = draw_pixels(pipe, 3)
    assert not any(same(a, b) for a, b in ((plain, at_x0), (plain, at_x_t), (at_x0, at_x_t)))


def test_editing_by_words_combines_three_answers():
    "InstructPix2Pix: with words and picture, with the picture, with neither."
    unet = seeded(1, lambda: _conditional_unet(8))
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    pipe = kind(unet=unet, scheduler=scheduler_of("DDIM"), **PARTS)
    guard, answers = picture_guard(pipe.scheduler), []
    words = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(1))
    given = {
        "prompt_embeds": words[0],
        "negative_prompt_embeds": words[1],
        "image": torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        "num_inference_steps": 1,
        "generator": torch.Generator().manual_seed(0),
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
        "output_type": "latent",
    }

    def note(network, args, output):
        answers.append((args[0][:9, :4], args[1], output[0]))

    with unet.register_forward_hook(note), protect_pipeline(pipe, guard) as protection:
        with unet.register_forward_hook(note):
            pipe(**given)
    (x_t, t, plain), (_, _, guarded) = answers
    wanted, changed = corrected(guard, x_t, t, edited(plain), "epsilon")
    assert protection.rows_seen == 9 and 0 < changed.sum() < 9
    torch.testing.assert_close(edited(guarded), wanted, atol=1e-4, rtol=1e-4)


def edited(answer):
    words, picture, nothing = answer.chunk(3)
    return nothing + 7.5 * (words - picture) + 1.5 * (picture - nothing)


def pictures(n, channels, side):
    return 2 * torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(n)) - 1


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_a_guard_of_predictions_is_trained_for_a_pipeline(kind, tmp_path):
    "Latents have no bound, not even where these lie within [−1, 1]; pictures end at ±1."
    pipe = latent_pipeline() if kind == "latents" else pixel_pipeline(clip_sample=False)
    channels, side = (3, 16) if kind == "latents" else (1, 8)
    if kind == "latents":
        largest = encode(pipe, pictures(40, 3, 16)).abs().max().item()
        pipe.vae.register_to_config(scaling_factor=5 * 0.9 / largest)
    members, others = pictures(6, channels, side), pictures(40, channels, side)
    small = {
        "steps": 350,
        "batch_size": 256,
        "options": {"width": 8},
        "progress": False,
        "preset": "x0",
    }
    fit_pipeline_guard(pipe, members, others, tmp_path / "guard", **small)

    guard = load_guard(tmp_path / "guard")
    assert (guard.at, guard.clip) == ("x0", None if kind == "latents" else 1.0)
    assert guard.calibrated and guard.report["coverage"][guard.level // 20] >= 0.95

    # Where the network has a member in mind, the answer changes, and nowhere else.
    x = torch.cat([encode(pipe, members), encode(pipe, others[:6])])
    level = torch.full((12,), 150)
    x_t, eps = add_noise(x, level, guard.schedule, generator=torch.Generator().manual_seed(0))
    parts = Answering(pipe.scheduler, [eps])
    parts.vae = getattr(pipe, "vae", None)
    with protect_pipeline(parts, guard) as protection:
        changed = (parts(x_t, level) != eps).flatten(1).any(1)
    assert changed[:6].all() and not changed[6:].any() and protection.rows_pushed == 6
