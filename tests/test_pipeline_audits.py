"Audits that draw from a pipeline: as it serves, prompt by prompt, and again by their seeds."

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_pipelines import (
    QUIET,
    flow_pipeline,
    latent_pipeline,
    linear_guard,
    new_autoencoder,
    pixel_pipeline,
    save_noise,
)
from typer.testing import CliRunner

from cpsample.cli import app, print_prompts, read_prompts
from cpsample.core.copying import copy_test
from cpsample.core.images import pixels
from cpsample.judgement.copy_audit import draw_samples
from cpsample.practice.datasets import read_idx
from cpsample.production.pipelines import (
    encode,
    pipeline_samplers,
    protect_pipeline,
    through_autoencoder,
)
from cpsample.workshop.files import data_path

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
COLLAPSED = data_path("collapse/model_index.json").parent
BAG, SHIRT = "a photo of a bag", "a photo of a shirt"


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def bags():
    "What the shipped pipeline was fine-tuned on, at its size."
    images = read_idx(data_path("collapse/members-idx3-ubyte.xz"))[:, None]
    return torch.nn.functional.pad(images, (2, 2, 2, 2))


@pytest.fixture
def folder(tmp_path):
    pixel_pipeline().save_pretrained(tmp_path / "pipe")
    save_noise(tmp_path / "mine", 12, 8)
    return tmp_path


def test_what_is_audited_are_the_bytes_that_users_get():
    pipe = pixel_pipeline(channels=3)
    (generate,) = pipeline_samplers(pipe, num_inference_steps=3).values()
    images = generate(4, 7)
    noise = torch.Generator().manual_seed(7)
    served = pipe(4, noise, num_inference_steps=3).images  # of Pillow
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 8, 8)
    for image, picture in zip(images, served):
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(picture)))
    assert torch.equal(generate(4, 7), images) and not torch.equal(generate(4, 8), images)


def test_pictures_of_one_call_that_come_in_batches_are_all_different():
    pipe = pixel_pipeline()
    sizes, draw = [], pipe.unet.forward

    def noted(x, *words, **options):
        sizes.append(len(x))
        return draw(x, *words, **options)

    pipe.unet.forward = noted
    (generate,) = pipeline_samplers(pipe, batch_size=3, num_inference_steps=1).values()
    images = generate(7, 5)
    assert sizes == [3, 3, 1] and len(images.unique(dim=0)) == 7
    assert torch.equal(generate(7, 5), images)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        pipeline_samplers(pipe, batch_size=0)


def test_a_guarded_pipeline_is_audited_as_it_serves():
    pipe = pixel_pipeline()
    (generate,) = pipeline_samplers(pipe, num_inference_steps=3).values()
    plain = generate(6, 0)
    guard = linear_guard(pipe.scheduler, (1, 8, 8)).guard
    with protect_pipeline(pipe, guard) as protection:
        guarded = generate(6, 0)
        assert protection.rows_seen == 18 and not torch.equal(guarded, plain)
    assert torch.equal(generate(6, 0), plain)


def test_what_the_last_word_withholds_is_asked_for_again_and_counted():
    pipe = pixel_pipeline()
    guard = replace(linear_guard(pipe.scheduler, (1, 8, 8)).guard, scale=0.0)

    samplers = pipeline_samplers(pipe, num_inference_steps=2)
    plain = draw_samples(samplers, 12, batch_size=4)
    brightness = pixels(plain.images).flatten(1).mean(1)
    usual = brightness.median()

    def accept(x):
        return x.flatten(1).mean(1) > usual

    with pytest.warns(UserWarning, match="refused in all 1 tries"):
        with protect_pipeline(pipe, guard, accept=accept, tries=1):
            draws = draw_samples(samplers, 6, batch_size=4)

    # Of each call what is dark is missing, and more calls make up for it.
    assert len(draws.images) == 6 and sum(call.asked for call in draws.calls) > 6
    assert draws.calls[0].drawn == int((brightness[:4] > usual).sum())
    assert torch.equal(
        draws.images[: draws.calls[0].drawn], plain.images[:4][brightness[:4] > usual]
    )


def test_a_call_of_which_everything_is_withheld_gives_no_image():
    pipe = pixel_pipeline()
    guard = replace(linear_guard(pipe.scheduler, (1, 8, 8)).guard, scale=0.0)
    (generate,) = pipeline_samplers(pipe, num_inference_steps=2).values()
    refuse_all = {"accept": lambda x: torch.zeros(len(x), dtype=torch.bool), "tries": 1}
    with pytest.warns(UserWarning), protect_pipeline(pipe, guard, **refuse_all):
        assert generate(3, 0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "build, prompts, says",
    [
        (pixel_pipeline, ["a bag"], "a DDIMPipeline draws without prompts: leave them out"),
        (latent_pipeline, [], "a StableDiffusionPipeline draws for prompts: give one"),
        (latent_pipeline, ["a bag"], "this StableDiffusionPipeline has no text encoder"),
        (flow_pipeline, ["a bag"], "this StableDiffusion3Pipeline has no text encoder"),
    ],
)
def test_prompts_that_do_not_fit_a_pipeline_are_refused(build, prompts, says):
    with pytest.raises(ValueError, match=says):
        pipeline_samplers(build(), prompts)


def test_a_pipeline_that_needs_more_than_words_is_refused():
    class Colouring:
        components: dict = {}

        def __call__(self, image):
            raise AssertionError("nobody should ask")

    with pytest.raises(ValueError, match=r"give audit a function generate\(n, seed\) of your own"):
        pipeline_samplers(Colouring())


def test_broken_weights_are_no_black_pictures():
    pipe = pixel_pipeline()
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(torch.nan)
    (generate,) = pipeline_samplers(pipe, num_inference_steps=2).values()
    with pytest.raises(ValueError, match="drew NaN: load it in float32"):
        generate(2, 0)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel", "AutoencoderTiny"])
def test_images_come_back_from_the_autoencoder_as_pictures_do(kind):
    pipe = latent_pipeline()
    pipe.vae = new_autoencoder(kind)
    x = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    given_back = through_autoencoder(pipe, x, chunk=2)
    latents = encode(pipe, x) / pipe.vae.config.scaling_factor
    expected = pipe.vae.decode(latents).sample.clamp(-1, 1)
    assert given_back.dtype == torch.uint8
    torch.testing.assert_close(pixels(given_back), expected, atol=1.1 / 127.5, rtol=0)
    assert torch.equal(through_autoencoder(pixel_pipeline(channels=3), x), x)


@pytest.mark.slow
def test_a_caption_that_has_collapsed_is_named_and_drawn_again(tmp_path):
    np.save(tmp_path / "bags.npy", bags().numpy())
    (tmp_path / "prompts.txt").write_text(f"# two of ten\n{BAG}\n\n  {SHIRT}  \n")
    out = tmp_path / "out"
    words = ("audit", "--pipeline", COLLAPSED, tmp_path / "bags.npy", "--device", "cpu")
    asked = ("--prompts", tmp_path / "prompts.txt", "--steps", 8, "-n", 24, "--seed", 3)
    said = call(*words, *asked, "--out", out)
    assert said.exit_code == 1, said.stderr
    record = json.loads((tmp_path / "out.json").read_text())

    # The one caption copies, the other does not, and together they are all.
    drawn = record["drawn"]
    of_bag, of_shirt = (drawn["by_source"][prompt]["ratio"] for prompt in (BAG, SHIRT))
    assert of_bag["n"] == of_shirt["n"] == 12 and of_bag["copies"] > 6 > of_shirt["copies"] == 0
    assert record["tests"]["ratio"]["copies"] == of_bag["copies"]
    assert f"{of_bag['words']}: {BAG}" in said.stdout
    assert "without a guard" in record["model"] and "autoencoder" in record["sources"]["training"]

    # Whoever has the pipeline and a seed has the pictures.
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(COLLAPSED, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    first = drawn["calls"][0]
    assert (first["source"], first["seed"], first["asked"]) == (BAG, 3, 12)
    again = pipeline_samplers(pipe, BAG, num_inference_steps=8)[BAG](12, 3)
    report = copy_test(pixels(again), pixels(through_autoencoder(pipe, bags())))
    assert report.copies == of_bag["copies"]


def test_the_command_draws_as_many_as_the_claim_needs(folder):
    words = ("audit", "--pipeline", folder / "pipe", folder / "mine", "--device", "cpu")
    some = ("--steps", 1, "--max-copy-rate", 0.2, "--out", folder / "out")
    said = call(*words, *some)
    assert said.exit_code in (0, 3), said.stderr
    record = json.loads((folder / "out.json").read_text())
    assert record["sets"]["generated"]["n"] == 17  # 0.8**17 < 0.025 < 0.8**16
    assert record["drawn"]["calls"] == [{"source": "", "seed": 0, "asked": 17, "drawn": 17}]
    assert "seeds 0 to 0" in (folder / "out.html").read_text()


@pytest.mark.slow
def test_the_command_puts_the_guard_in_front(tmp_path):
    np.save(tmp_path / "bags.npy", bags().numpy())
    words = ("audit", "--pipeline", COLLAPSED, tmp_path / "bags.npy", "--device", "cpu")
    some = ("--prompt", BAG, "--steps", 8, "-n", 12, "--seed", 3, "--out", tmp_path / "out")
    said = call(*words, *some, "--guard", tmp_path / "none")
    assert said.exit_code == 2 and "no guard at" in said.stderr

    # Without it more than six of these twelve are copies, see above.
    said = call(*words, *some, "--guard", COLLAPSED / "guard")
    assert said.exit_code in (0, 1, 3), said.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert "with the guard" in record["model"]
    assert record["tests"]["ratio"]["copies"] < 4


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["--pipeline", "{}/none", "{}/mine"],
            "there is no folder .*none: give a pipeline's folder",
        ),
        (["--pipeline", "{}/mine", "{}/mine"], "holds no pipeline"),
        (["--pipeline", "{}/pipe"], "name the images that the pipeline was trained on"),
        (["--pipeline", "{}/pipe", "{}/mine", "--prompt", "a bag"], "draws without prompts"),
        (["--pipeline", "{}/pipe", "{}/mine", "--prompts", "{}/no.txt"], "no.txt cannot be read"),
        (["--pipeline", "{}/pipe", "{}/mine", "--prompts", "{}/empty.txt"], "holds no prompt"),
        (["--pipeline", "{}/pipe", "{}/mine", "--prompts", "{}/latin.txt"], "no text in UTF-8"),
        (["--pipeline", "{}/pipe", "{}/mine", "--size", "8"], "--size would change nothing"),
        (["--pipeline", "{}/pipe", "{}/mine", "--unguarded"], "--unguarded would change nothing"),
        (["--pipeline", "{}/pipe", "{}/mine", "--max-copy-rate", "0"], "shows a rate of 0"),
        (["{}/mine", "{}/mine", "--prompt", "a bag"], "--prompt would change nothing: only a pipe"),
        (["{}/mine", "{}/mine", "--steps", "3"], "--steps would change nothing: only a pipeline"),
        ([], "give generated and training images, the folder of a run, or --pipeline PATH"),
    ],
)
def test_mistakes_with_pipelines_are_one_line(folder, words, says):
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "latin.txt").write_bytes("Blümchen".encode("latin-1"))
    said = call("audit", "--out", folder / "out", *(word.format(folder) for word in words))
    lines = [line for line in said.stderr.splitlines() if line.startswith("cpsample:")]
    assert said.exit_code == 2 and len(lines) == 1, said.stderr
    assert re.search(says, lines[0]), lines[0]
    assert not list(folder.glob("out*"))


def test_prompts_are_read_line_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# a comment\r\na bag # with a hash\r\n\r\n  ein Blümchen\r\n".encode())
    assert read_prompts(file) == ["a bag # with a hash", "ein Blümchen"]


def test_of_many_prompts_the_worst_are_said(capsys):
    by_source = {f"p{k}": {"ratio": {"copies": k, "words": f"{k} of 20"}} for k in range(14)}
    print_prompts({"drawn": {"by_source": by_source}}, "ratio")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "13 of 20: p13" and len(lines) == 11
    assert lines[-1].strip() == "and 4 more prompts, in the report"
    print_prompts({}, "ratio")
    assert capsys.readouterr().out == ""
