"Guards in the space of a pipeline: latents, training, the command line."

import numpy as np
import pytest
import torch
from small_pipelines import (
    QUIET,
    draw_latents,
    latent_pipeline,
    other_latent_pipeline,
    pixel_pipeline,
    save_noise,
)
from typer.testing import CliRunner

from cpsample.cli import app
from cpsample.core.guard_files import load_guard
from cpsample.practice.datasets import read_data
from cpsample.production import pipelines
from cpsample.production.pipelines import (
    encode,
    fit_named_pipeline_guard,
    fit_pipeline_guard,
    image_shape,
    protect_pipeline,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.fixture
def pipe():
    return latent_pipeline()


def pictures(n):
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)


def scaled_means(pipe, x):
    means = pipe.vae.encode(x.float() / 127.5 - 1).latent_dist.mode()
    return means * pipe.vae.config.scaling_factor


def test_shapes_of_pipelines(pipe):
    assert image_shape(pipe) == (3, 16, 16)
    assert image_shape(pixel_pipeline()) == (1, 8, 8)


def test_without_an_autoencoder_images_are_seen_as_they_are():
    x = pictures(5)
    assert encode(pixel_pipeline(channels=3), x).equal(x.float() / 127.5 - 1)


def test_latents_are_scaled_means_and_come_from_the_disk_the_second_time(
    pipe, tmp_path, monkeypatch
):
    x = pictures(5)
    wanted = scaled_means(pipe, x)
    torch.testing.assert_close(encode(pipe, x, tmp_path, chunk=2), wanted)
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600  # latents are pictures

    monkeypatch.setattr(pipe.vae, "encode", lambda x: pytest.fail("encoded again"))
    torch.testing.assert_close(encode(pipe, x, tmp_path), wanted)
    with pytest.raises(pytest.fail.Exception):
        encode(pipe, x + 1, tmp_path)  # other images are other latents


def test_latents_follow_the_scale_of_the_autoencoder(pipe, tmp_path):
    x = pictures(5)
    wanted = encode(pipe, x, tmp_path)
    pipe.vae.register_to_config(scaling_factor=1.0, shift_factor=0.25)
    torch.testing.assert_close(encode(pipe, x, tmp_path), wanted / 5.0 - 0.25)


def test_a_write_that_fails_leaves_nothing(pipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    x = pictures(5)
    with monkeypatch.context() as patch:
        patch.setattr(pipelines, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            encode(pipe, x, tmp_path)
    assert not list(tmp_path.iterdir())
    torch.testing.assert_close(encode(pipe, x, tmp_path), scaled_means(pipe, x))


def test_repeats_are_encoded_once_and_have_one_latent(pipe, monkeypatch):
    "However the rest falls into batches: a last bit's difference would make two images of one."
    x, order = pictures(4), torch.tensor([2, 0, 0, 1, 2, 3, 0])
    wanted = encode(pipe, x)
    real, batches = pipe.vae.encode, []

    def noted(x):
        batches.append(len(x))
        return real(x)

    monkeypatch.setattr(pipe.vae, "encode", noted)
    z = encode(pipe, x[order], chunk=3)
    assert batches == [3, 1]
    torch.testing.assert_close(z, wanted[order])
    assert z[1].equal(z[2]) and z[1].equal(z[6]) and z[0].equal(z[4])


@pytest.mark.parametrize("order", [1, -1])
def test_latents_are_kept_for_pipelines_that_scale_them_alike(order, tmp_path):
    "Two pipelines of one autoencoder: one scales its latents, the other does not."
    x, kinds = pictures(3), ["KandinskyV22Pipeline", "LDMPipeline"][::order]
    pipes = [other_latent_pipeline(kind) for kind in kinds]
    for pipe in pipes:
        assert torch.equal(encode(pipe, x, tmp_path), encode(pipe, x))
    assert not torch.allclose(*[encode(pipe, x, tmp_path) for pipe in pipes])

    # Pipelines that agree find each other's.
    again = latent_pipeline("StableDiffusionImg2ImgPipeline")
    encode(latent_pipeline(), x, tmp_path)
    n_files = len(list(tmp_path.iterdir()))
    encode(again, x, tmp_path)
    assert len(list(tmp_path.iterdir())) == n_files == 3


class TestFromTheShell:
    @pytest.fixture
    def images(self, tmp_path):
        save_noise(tmp_path / "mine", 6, 20)
        save_noise(tmp_path / "others", 40, 20)
        return ["--data", tmp_path / "mine", "--reference", tmp_path / "others"]

    def call(self, *words):
        return CliRunner().invoke(app, ["guard", *map(str, words)])

    @pytest.mark.filterwarnings("ignore:6 of 6 pictures", "ignore:40 of 40 pictures")
    def test_a_guard_for_a_pipeline_in_a_folder(self, tmp_path, images):
        "Trained in the pipeline's space and at its levels."
        pipe = latent_pipeline()
        pipe.save_pretrained(tmp_path / "pipe")
        out = tmp_path / "kept" / "guard"
        settings = ["--steps", 250, "--device", "cpu", "--t-max", 300]
        done = self.call("--pipeline", tmp_path / "pipe", *images, "--out", out, *settings)
        assert done.exit_code == 0 and "of 6 training images" in done.stdout, done.output

        guard = load_guard(out)
        torch.testing.assert_close(guard.schedule.abar, pipe.scheduler.alphas_cumprod)
        assert guard.classifier.config["shape"] == [4, 8, 8]
        assert guard.calibrated and guard.t_max == 300
        assert len(list(out.parent.glob("latents-*"))) == 2
        with protect_pipeline(pipe, guard) as protection:
            draw_latents(pipe)
        assert protection.rows_seen == 4

    @pytest.mark.parametrize("missing", ["images", "pipeline", "one of two", "the other"])
    def test_what_is_missing_is_told_in_one_line(self, tmp_path, images, missing):
        name = ["--pipeline", tmp_path / "none"]
        words, says = {
            "images": ([*name, *images[:2]], "--reference"),
            "pipeline": ([*name, *images], "there is no folder"),
            "one of two": ([*name, *images, tmp_path], "and not both"),
            "the other": ([], "and not both"),
        }[missing]
        refused = self.call(*words)
        assert refused.exit_code == 2 and says in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


def test_arrays_of_another_size_are_refused(tmp_path):
    latent_pipeline().save_pretrained(tmp_path / "pipe")
    for name in ("mine", "others"):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((40, 3, 8, 8), np.uint8))
    arrays = tmp_path / "mine.npz", tmp_path / "others.npz"
    refusal = r"mine.npz holds images of shape \(3, 8, 8\), the pipeline draws \(3, 16, 16\)"
    with pytest.raises(ValueError, match=refusal):
        fit_named_pipeline_guard(str(tmp_path / "pipe"), *arrays, tmp_path / "guard")


def test_settings_override_those_of_the_preset(tmp_path):
    "Here the level below which the guard acts, and it is calibrated with it."
    pipe = pixel_pipeline("DDIM", channels=3)
    for name, n in (("mine", 6), ("others", 40)):
        save_noise(tmp_path / name, n, 8)
    images = [read_data(str(tmp_path / name), 8) for name in ("mine", "others")]
    how = dict(steps=250, t_max=300, progress=False)
    guard = fit_pipeline_guard(pipe, *images, tmp_path / "guard", **how)
    assert guard.t_max == 300 and guard.calibrated
