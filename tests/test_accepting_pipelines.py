"What a pipeline returns is judged, and what is refused drawn anew: for those images alone."

import inspect
import logging
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipelines import (
    PIPELINES,
    QUIET,
    draw_latents,
    draw_pixels,
    latent_pipeline,
    linear_guard,
    other_latent_pipeline,
    pixel_pipeline,
    same,
    scheduler_of,
)

import cpsample
from cpsample.core.ddpm import LeftoverWarning
from cpsample.core.guard import fit_guard
from cpsample.core.images import load_digits
from cpsample.core.recognition import calibrate_check, recognise
from cpsample.production.pipelines import (
    _as_seen,
    _call_for,
    encode,
    protect_pipeline,
    schedule_of,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Silent(torch.nn.Module):
    device = torch.device("cpu")

    def forward(self, x, t):
        return torch.zeros_like(x)


class Marked:
    """A pipeline whose images say how they came about, in four bytes.

    They are the prompt's number, the mark of the picture to start from, that of the latents, and
    in which call of the pipeline it was drawn.
    """

    def __init__(self):
        self.scheduler, self.unet, self.calls = scheduler_of("DDIM"), Silent(), []

    def __call__(
        self,
        prompt,
        image=None,
        size=(8, 8),
        *,
        latents=None,
        num_images_per_prompt=1,
        output_type="np",
        return_dict=True,
    ):
        self.unet(torch.zeros(1, 1, 2, 2), 5)
        assert size == (8, 8)
        prompts = [prompt] if isinstance(prompt, int) else prompt
        n = len(prompts) * num_images_per_prompt
        self.calls.append(n)
        marks = np.zeros((n, 4))
        marks[:, 0] = np.repeat(prompts, num_images_per_prompt)
        marks[:, 1] = np.tile([0] * n if image is None else image, n)[:n]
        marks[:, 2] = 0 if latents is None else latents.flatten()
        marks[:, 3] = len(self.calls)
        images = (marks / 255).astype("float32").reshape(n, 2, 2, 1)
        if output_type == "pil":
            images = diffusers.DiffusionPipeline.numpy_to_pil(images)
        elif output_type == "pt":
            images = torch.from_numpy(images).permute(0, 3, 1, 2)
        flags = [False] * n
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)


def marks_of(images):
    "The four bytes of each image, [n, 4], in whatever form it came."
    if isinstance(images, list):
        return np.array([np.asarray(image).reshape(4) for image in images]).reshape(-1, 4)
    return (np.asarray(images).reshape(-1, 4) * 255).round().astype(int)


def judge_by(table):
    "Accepts an image by its first three marks and the call that drew it."
    return lambda x: torch.tensor(
        [table(*mark) for mark in ((x.flatten(1) + 1) * 127.5).round().int().tolist()],
        dtype=torch.bool,
    )


def protected(pipe, judge, **options):
    guard = linear_guard(pipe.scheduler, (1, 2, 2), bias=0.0).guard
    return protect_pipeline(pipe, guard, accept=judge, **options)


@given(
    n_prompts=st.integers(1, 4),
    per_prompt=st.integers(1, 3),
    tries=st.integers(1, 4),
    seed=st.integers(0, 999),
    form=st.sampled_from(["np", "pil", "pt"]),
    leftover=st.sampled_from(["withhold", "return"]),
    return_dict=st.booleans(),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_each_image_is_drawn_until_it_is_accepted(
    n_prompts, per_prompt, tries, seed, form, leftover, return_dict
):
    "With its own prompt, picture and latents; the others keep theirs; as the tally says."
    n = n_prompts * per_prompt
    verdicts = np.random.default_rng(seed).random((n, tries + 1)) < 0.5
    prompts = list(range(10, 10 + n_prompts))
    pipe = Marked()
    judge = judge_by(lambda prompt, start, mark, call: bool(verdicts[mark - 30, call - 1]))
    given = {
        "prompt": prompts if n_prompts > 1 else prompts[0],
        "image": list(range(20, 20 + n_prompts)),
        "latents": torch.arange(30, 30 + n),
        "num_images_per_prompt": per_prompt,
        "output_type": form,
        "return_dict": return_dict,
    }
    with (
        warnings.catch_warnings(record=True) as told,
        protected(pipe, judge, tries=tries, leftover=leftover) as protection,
    ):
        warnings.simplefilter("always", LeftoverWarning)
        result = pipe(**given)

    # What has to come out, image by image.
    rows = []
    for row in range(n):
        call = next((k for k in range(tries) if verdicts[row, k]), None)
        rows.append((10 + row // per_prompt, 20 + row % n_prompts, 30 + row, call))
    accepted = [row[3] is not None for row in rows]
    wanted = [
        (*marks, (tries if call is None else call + 1))
        for (*marks, call), is_in in zip(rows, accepted)
        if is_in or leftover == "return"
    ]
    images, flags = result if isinstance(result, tuple) else (result[0], result[1])
    assert marks_of(images).tolist() == [list(row) for row in wanted]
    assert len(flags) == len(images) == len(wanted) and isinstance(result, tuple) != return_dict

    # And what is counted.
    acceptance = protection.acceptance
    assert acceptance.images_drawn == sum(pipe.calls)
    assert acceptance.images_accepted == sum(accepted)
    assert acceptance.images_left_over == n - sum(accepted)
    warned = [w for w in told if issubclass(w.category, LeftoverWarning)]
    assert len(warned) == (not all(accepted))
    for warning in warned:
        missing = ", ".join(str(row) for row in range(n) if not accepted[row])
        assert f"refused in all {tries} tries" in str(warning.message)
        assert f": {missing};" in str(warning.message) and warning.filename == __file__


def never(x):
    return torch.zeros(len(x), dtype=torch.bool)


def always(x):
    return torch.ones(len(x), dtype=torch.bool)


@pytest.mark.parametrize("form", ["np", "pil", "pt"])
def test_where_nothing_is_accepted_nothing_is_served(form):
    pipe = Marked()
    with protected(pipe, never, tries=3), pytest.warns(LeftoverWarning, match="0, 1; allow"):
        result = pipe([1, 2], output_type=form)
    assert len(result.images) == 0 and result.nsfw_content_detected == []
    assert type(result.images) is type(Marked()([1], output_type=form).images)
    assert pipe.calls == [2, 2, 2]


def test_counts_go_to_the_log_and_not_into_the_result(caplog):
    pipe = Marked()
    judge = judge_by(lambda prompt, start, mark, call: call > 1 or prompt == 1)
    with caplog.at_level(logging.INFO, logger="cpsample"), protected(pipe, judge):
        result = pipe([1, 2, 3])
        pipe([1])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "accepted 3 of 3 images in 5 draws, 0 left over",
        "accepted 1 of 1 images in 1 draws, 0 left over",
    ]
    assert set(result.keys()) == {"images", "nsfw_content_detected"}
    assert type(result) is StableDiffusionPipelineOutput


def test_what_is_accepted_at_once_keeps_its_bits():
    "And without a judge nothing is asked."
    pipe = pixel_pipeline()
    plain = draw_pixels(pipe, 4)
    guard = linear_guard(pipe.scheduler, (1, 8, 8), bias=0.0).guard
    seen = []

    def judge(x):
        seen.append(x)
        return torch.tensor([True, False, True, False][: len(x)]) if len(seen) == 1 else always(x)

    with protect_pipeline(pipe, guard, accept=judge) as protection:
        judged = draw_pixels(pipe, 4)
    assert same(judged[[0, 2]], plain[[0, 2]]) and not same(judged[[1, 3]], plain[[1, 3]])
    assert [len(x) for x in seen] == [4, 2] and protection.acceptance.images_drawn == 6

    # It was shown what was served, to a byte.
    torch.testing.assert_close((seen[0] + 1) / 2, plain.permute(0, 3, 1, 2), atol=0.003, rtol=0)
    with protect_pipeline(pipe, guard, accept=False) as protection:
        assert same(draw_pixels(pipe, 4), plain)
    assert protection.acceptance is None


def bound(pipe, **given):
    call = inspect.signature(type(pipe).__call__).bind(pipe, **given)
    call.apply_defaults()
    return call


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("n_prompts, per_prompt", [(1, 4), (2, 2), (4, 1)])
def test_a_part_of_a_call_gives_that_part_of_its_images(kind, n_prompts, per_prompt):
    "In real pipelines: the same noise for one image gives the same image, whoever else is drawn."
    pipe = latent_pipeline(kind)
    torch.nn.init.zeros_(pipe.vae.quant_conv.weight[4:])  # encodes without noise
    torch.nn.init.constant_(pipe.vae.quant_conv.bias[4:], -30)
    generator = torch.Generator().manual_seed(1)
    n = n_prompts * per_prompt

    def arguments():
        words = torch.randn(2, n_prompts, 3, 8, generator=generator.manual_seed(1))
        given = {"prompt_embeds": 3 * words[0], "negative_prompt_embeds": words[1]}
        given |= {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
        given["generator"] = [torch.Generator().manual_seed(i) for i in range(n)]
        given["num_images_per_prompt"] = per_prompt
        if kind != "StableDiffusionPipeline":
            given["image"] = torch.rand(n_prompts, 3, 16, 16, generator=generator)
        if "Inpaint" in kind:
            given["mask_image"] = (
                torch.rand(n_prompts, 1, 16, 16, generator=generator) > 0.5
            ) * 1.0
        return given | PIPELINES[kind]

    everything = pipe(**arguments()).images
    for rows in ([2], [0, 3], [3, 1, 2]):
        call = _call_for(bound(pipe, **arguments()), rows, n)
        part = type(pipe).__call__(*call.args, **call.kwargs).images
        torch.testing.assert_close(part, everything[rows], atol=1e-4, rtol=1e-4)


def test_arguments_that_belong_to_no_image_stay_however_long_they_are():
    def pretended(
        self, prompt, original_size, timesteps, ip_adapter_image, image, image_embeds, **more
    ):
        pass

    image = torch.zeros(3, 8, 8)  # one of three colours
    given = (["a", "b", "c"], (8, 8, 8), [3, 2, 1], [1, 2, 3], image, torch.arange(6).view(3, 2))
    call = inspect.signature(pretended).bind(None, *given, clip_skip=[1, 2, 3])
    cut = _call_for(call, [2], 3)
    assert cut.arguments["image_embeds"].tolist() == [[4, 5]]
    wanted = ["c"], *given[1:4], image, cut.arguments["image_embeds"]
    assert cut.args == (None, *wanted) and cut.kwargs == {"clip_skip": [1, 2, 3]}


@pytest.mark.parametrize("output_type", ["latent", "np", "pil", "pt"])
def test_the_judge_of_a_latent_pipeline_sees_latents(output_type):
    "Those that were drawn; of decoded pictures, what the autoencoder makes of them again."
    pipe = latent_pipeline()
    guard = linear_guard(pipe.scheduler, bias=0.0).guard
    seen = []

    def judge(x):
        seen.append(x)
        return always(x)

    with protect_pipeline(pipe, guard, accept=judge):
        images = draw_latents(pipe, 2, output_type=output_type)
    if output_type == "latent":
        assert same(seen[0], images)
        return
    if output_type == "pil":
        images = np.stack([np.asarray(image) for image in images]) / 255
    if output_type != "pt":
        images = torch.as_tensor(images).permute(0, 3, 1, 2)
    assert seen[0].shape == (2, 4, 8, 8)
    again = encode(pipe, (255 * images).round().to(torch.uint8))
    torch.testing.assert_close(seen[0], again)


def test_pipelines_of_pixels_are_judged_whatever_they_are_asked_for():
    "They have no latents, and return arrays where somebody asks for some."
    pipe = pixel_pipeline()
    guard = linear_guard(pipe.scheduler, (1, 8, 8), bias=0.0).guard
    with protect_pipeline(pipe, guard, accept=lambda x: x.flatten(1)[:, 0] > -9) as protection:
        images = pipe(batch_size=2, num_inference_steps=2, output_type="latent").images
    assert len(images) == 2 and protection is not None


def test_packed_latents_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="packed latents: leave out") as told:
        _as_seen(latent_pipeline(), torch.zeros(2, 16, 16), "latent")
    assert "\n" not in str(told.value)


def test_a_guard_has_the_last_word():
    "End to end: a pipeline that hands out members; the guard alone knows which."
    digits, _ = load_digits()
    members, others, unseen = digits[:20], digits[100:400], digits[500:900]
    pipe = pixel_pipeline()
    guard = fit_guard(members, schedule_of(pipe.scheduler), others, steps=700, width=128, t_max=150)
    calibrate_check(guard, members, unseen)
    assert recognise(guard, members).all() and recognise(guard, unseen).float().mean() < 0.1
    new = unseen[~recognise(guard, unseen)]
    pipe = Replaying(pipe.scheduler, [[members[:4], new[:4]], [members[4:5], new[4:7]]])
    with protect_pipeline(pipe, guard, accept=True, tries=2), pytest.warns(LeftoverWarning):
        images = pipe().images
    wanted = torch.cat([new[4:7], new[:4]])  # in the places of members 1 to 3
    served = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(served, wanted, atol=0.005, rtol=0)


def test_a_check_that_asks_a_denoiser_first_is_refused_in_words_of_its_own():
    "A pipeline is none; a function that has the denoiser is taken."
    digits, _ = load_digits()
    pipe = pixel_pipeline()
    guard = fit_guard(digits[:20], schedule_of(pipe.scheduler), steps=2, width=16)
    guard.recognition = {"through": 100}
    with pytest.raises(ValueError, match=r"asks a denoiser first.*unrecognised_by\(guard, model"):
        protect_pipeline(pipe, guard, accept=True)


class Replaying:
    "A pipeline that hands out what it was made with, call by call."

    def __init__(self, scheduler, batches):
        self.scheduler, self.unet, self.batches = scheduler, Silent(), list(batches)

    def __call__(self, batch_size=8):
        self.unet(torch.zeros(1, 1, 8, 8), 5)
        x = torch.cat(self.batches.pop(0))
        return ImagePipelineOutput(images=((x + 1) / 2).permute(0, 2, 3, 1).numpy())


def test_a_guard_that_was_not_calibrated_for_it_is_refused():
    pipe = pixel_pipeline()
    guard = linear_guard(pipe.scheduler, (1, 8, 8)).guard
    with pytest.raises(
        ValueError, match=r"calibrate_check\(guard, encode\(pipe, members\)"
    ) as told:
        protect_pipeline(pipe, guard, accept=True)
    assert "\n" not in str(told.value) and not pipe.unet._forward_hooks
    assert "_protections" not in vars(pipe)


def bundle():
    pipe = pixel_pipeline()
    return SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler)


IMPOSSIBLE = {
    "no function": (Marked, {"accept": "yes"}, "accept must be True, or a function"),
    "no tries": (Marked, {"accept": always, "tries": 0}, "tries must be between 1 and"),
    "half a try": (
        Marked,
        {"accept": always, "tries": 2.5},
        "tries must be a whole number, between 1 and",
    ),
    "tries in words": (
        Marked,
        {"accept": always, "tries": "3"},
        "tries must be a whole number, between 1 and",
    ),
    "leftover": (Marked, {"accept": always, "leftover": "keep"}, "one of withhold, return"),
    "parts": (bundle, {"accept": always}, "parts of a pipeline cannot draw anew"),
}


@pytest.mark.parametrize("how", IMPOSSIBLE)
def test_impossible_wishes_are_refused_at_once(how):
    build, options, words = IMPOSSIBLE[how]
    pipe = build()
    guard = linear_guard(pipe.scheduler, (1, 2, 2), bias=0.0).guard
    with pytest.raises(ValueError, match=words) as told:
        protect_pipeline(pipe, guard, **options)
    assert "\n" not in str(told.value) and not pipe.unet._forward_hooks


def test_a_second_judge_is_refused():
    pipe = Marked()
    with protected(pipe, always):
        with pytest.raises(ValueError, match="has an accept= already"):
            protected(pipe, always)
        protected(pipe, None).remove()
        pipe([1])
    protected(pipe, always).remove()


@pytest.mark.parametrize(
    "judge", [lambda x: x[:, 0], lambda x: (x > 0).any(), lambda x: True, lambda x: always(x)[:1]]
)
def test_an_answer_that_is_no_bool_per_image_serves_nothing(judge):
    pipe = Marked()
    with protected(pipe, judge), pytest.raises(ValueError, match=r"a bool per image, \[2\]"):
        pipe([1, 2])


class OfFrames(Marked):
    def __call__(self):
        super().__call__([1])
        return ImagePipelineOutput(images="none")


class Stubborn(Marked):
    def __call__(self, prompt):
        return super().__call__([1, 2])


def test_a_pipeline_that_returns_something_else_is_told_of():
    pipe = OfFrames()
    with protected(pipe, always), pytest.raises(ValueError, match="pipelines that return images"):
        pipe()
    pipe = Stubborn()
    judge = judge_by(lambda prompt, start, mark, call: prompt == 1)
    with protected(pipe, judge), pytest.raises(ValueError, match="1 images anew and drew 2"):
        pipe("whatever")


def test_a_denoiser_cannot_draw_anew():
    guard = linear_guard(scheduler_of("DDIM"), (1, 8, 8)).guard
    with pytest.raises(ValueError, match="a denoiser cannot draw an image anew"):
        cpsample.protect(lambda x, t: x, guard, accept=True)
    pipe = Marked()
    guard = linear_guard(pipe.scheduler, (1, 2, 2), bias=0.0).guard
    with cpsample.protect(pipe, guard, accept=never, tries=2, leftover="return") as protection:
        with pytest.warns(LeftoverWarning, match="are returned all the same"):
            assert len(pipe([1, 2]).images) == 2
    assert protection.acceptance.images_left_over == 2


def test_pictures_of_other_pipelines_are_encoded_as_theirs():
    "Unscaled latents of a movq."
    pipe = other_latent_pipeline("KandinskyV22Pipeline")
    guard = linear_guard(pipe.scheduler, bias=0.0).guard
    protection = protect_pipeline(pipe, guard, accept=never)
    x = torch.rand(2, 3, 16, 16)
    seen = []
    protection.acceptance.judge = lambda x: seen.append(x) or always(x)
    protection.acceptance.refused(x, "pt")
    torch.testing.assert_close(seen[0], encode(pipe, (255 * x).round().to(torch.uint8)))
    protection.remove()
