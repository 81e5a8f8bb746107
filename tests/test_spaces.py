"The space of a pipeline: encoded with what it decodes with, kept by all that made it, or refused."

from types import SimpleNamespace

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_pipelines import (
    QUIET,
    VAE,
    Linear,
    draw_latents,
    draw_pixels,
    latent_pipeline,
    linear_guard,
    new_autoencoder,
    other_latent_pipeline,
    pixel_pipeline,
    scheduler_of,
)

from cpsample.core.guard import Guard
from cpsample.core.guard_files import load_guard
from cpsample.production import pipelines
from cpsample.production.pipelines import (
    encode,
    fit_pipeline_guard,
    image_shape,
    protect_pipeline,
    schedule_of,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]
KINDS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")


@pytest.fixture
def pipe():
    return latent_pipeline()


def pictures(n, channels=3, side=16):
    generator = torch.Generator().manual_seed(n)
    shape = (n, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def raw_latents(autoencoder, x):
    "What an autoencoder makes of bytes, before any scale."
    encoded = autoencoder.encode(x.float() / 127.5 - 1)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(["vae", "vqvae", "movq", "my_autoencoder"]),
    seed=st.integers(0, 99),
    n=st.integers(1, 4),
    side=st.sampled_from([8, 16, 22]),
    shift=st.sampled_from([None, 0.25]),
)
def test_whatever_decodes_is_what_encodes(kind, name, seed, n, side, shift):
    "Any autoencoder under any name: its latents, scaled as the pipeline scales them."
    autoencoder = new_autoencoder(kind, seed)
    autoencoder.register_to_config(shift_factor=shift)
    x = pictures(n, side=side)
    bundle = SimpleNamespace(**{name: autoencoder, "unet": pixel_pipeline().unet})
    wanted = raw_latents(autoencoder, x)
    if name != "movq":  # Kandinsky's network draws what is decoded as it is
        wanted = (wanted - (shift or 0)) * autoencoder.config.scaling_factor
    torch.testing.assert_close(encode(bundle, x), wanted)


@pytest.mark.parametrize("kind, factor", [("LDMPipeline", 3.0), ("KandinskyV22Pipeline", 1.0)])
def test_pipelines_that_call_their_autoencoder_otherwise(kind, factor, tmp_path):
    "Their guards are trained on latents, at the size of latents."
    pipe, x = other_latent_pipeline(kind), pictures(6)
    autoencoder = pipe.vqvae if "LDM" in kind else pipe.movq
    torch.testing.assert_close(encode(pipe, x), factor * raw_latents(autoencoder, x))
    assert image_shape(pipe) == (3, 16, 16)
    small = {"steps": 1, "options": {"width": 8}, "progress": False, "preset": "paper"}
    guard = fit_pipeline_guard(pipe, x, pictures(40), tmp_path / "guard", **small)
    assert guard.classifier.config["shape"] == [4, 8, 8]


def test_a_mean_and_a_spread_per_channel(pipe):
    "As in some pipelines of Stable Diffusion XL."
    mean, std = torch.arange(4.0), torch.arange(1.0, 5.0)
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    x = pictures(3)
    wanted = (raw_latents(VAE, x) - mean.view(1, 4, 1, 1)) * 5 / std.view(1, 4, 1, 1)
    torch.testing.assert_close(encode(pipe, x), wanted)


class Strange(torch.nn.Module):
    "Encodes into something that no pipeline of this family draws."

    dtype, device, config = torch.float32, torch.device("cpu"), {"in_channels": 3}

    def __init__(self, answer):
        super().__init__()
        self.answer, self.weight = answer, torch.nn.Parameter(torch.ones(1))

    def encode(self, x):
        return self.answer

    def decode(self, z):
        return z


UNFIT = {
    "neither latents": {"vae": Strange(SimpleNamespace(codes=1))},
    r"a guard needs \[N, C, H, W\]": {"vae": Strange(SimpleNamespace(latents=torch.ones(3, 4)))},
    r"several autoencoders \(one, other\)": {"one": VAE, "other": VAE},
    "encodes images of 3: read_data": {"vae": VAE, "given": pictures(3, channels=1)},
    "draws, without an autoencoder, images of 1": {"unet": pixel_pipeline().unet},
}


@pytest.mark.parametrize("says", UNFIT)
def test_what_cannot_be_encoded_is_refused(says, tmp_path):
    parts = {"unet": latent_pipeline().unet, "scheduler": scheduler_of("DDIM")} | UNFIT[says]
    images = parts.pop("given", pictures(3))
    with pytest.raises(ValueError, match=says) as told:
        encode(SimpleNamespace(**parts), images, tmp_path)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


class Overflowing(type(VAE)):
    "Infinite in half precision, as that of Stable Diffusion XL is."

    def encode(self, x, return_dict=True):
        encoded = super().encode(x)
        if x.dtype == torch.float16:
            encoded.latent_dist.mean = encoded.latent_dist.mean * 1e6
        return encoded


@pytest.fixture
def overflowing(pipe):
    pipe.vae.__class__ = Overflowing
    return pipe


def test_nothing_infinite_is_kept_and_the_autoencoder_is_named(overflowing, tmp_path):
    vae, x = overflowing.vae, pictures(3)
    vae.half().register_to_config(force_upcast=False)
    refusal = (
        "Overflowing gives NaN or infinity for 3 of 3 images in torch.float16: load .* float32"
    )
    with pytest.raises(ValueError, match=refusal):
        encode(overflowing, x, tmp_path)
    assert not list(tmp_path.iterdir())
    vae.float()
    torch.testing.assert_close(
        encode(overflowing, x, tmp_path), 5 * raw_latents(VAE, x), atol=0.02, rtol=0.01
    )


@pytest.mark.parametrize("offloaded", [False, True])
def test_an_autoencoder_that_overflows_is_asked_in_float32(overflowing, offloaded):
    vae, x = overflowing.vae.half(), pictures(3)
    assert vae.config.force_upcast
    if offloaded:
        accelerate.cpu_offload(vae, execution_device=torch.device("cpu"))
    latents = encode(overflowing, x)
    torch.testing.assert_close(latents, 5 * raw_latents(VAE, x), atol=0.02, rtol=0.01)
    assert vae.dtype == torch.float16


def test_an_offloaded_autoencoder_is_the_same(pipe, tmp_path):
    "Its weights are away between calls, and its latents are found again all the same."
    x = pictures(3)
    wanted = encode(pipe, x, tmp_path)
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    assert next(pipe.vae.parameters()).is_meta
    assert encode(pipe, x).equal(wanted)
    assert encode(pipe, x, tmp_path).equal(wanted) and len(list(tmp_path.iterdir())) == 1


def scaled_weight(name):
    def change(vae):
        dict(vae.named_parameters())[name].data.mul_(1.5)

    return change


CHANGES = {
    "first weight": scaled_weight("encoder.conv_in.weight"),
    "bias": lambda vae: dict(vae.named_parameters())[
        "encoder.mid_block.resnets.0.conv1.bias"
    ].data.add_(1.0),
    "last weight": scaled_weight("quant_conv.weight"),
    "scale": lambda vae: vae.register_to_config(scaling_factor=2.0),
    "shift": lambda vae: vae.register_to_config(shift_factor=1.0),
    "precision": lambda vae: vae.bfloat16(),
    "half": lambda vae: vae.half(),
    "half, not upcast": lambda vae: vae.half().register_to_config(force_upcast=False),
    "tiles": lambda vae: vae.enable_tiling() or setattr(vae, "tile_sample_min_size", 8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_latents_are_found_only_for_the_same_autoencoder(change, pipe, tmp_path):
    x = pictures(3)
    before = encode(pipe, x, tmp_path)
    CHANGES[change](pipe.vae)
    after = encode(pipe, x, tmp_path)
    assert after.equal(encode(pipe, x)) and not after.equal(before)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", ["cut", "NaN", "other", "empty", "too few"])
def test_a_broken_file_of_latents_is_written_again(broken, pipe, tmp_path):
    x = pictures(3)
    wanted = encode(pipe, x, tmp_path / "new" / "folder").contiguous()
    (path,) = (tmp_path / "new" / "folder").iterdir()
    content = path.read_bytes()
    tensors = {
        "NaN": {"latents": torch.full_like(wanted, torch.nan)},
        "other": {"others": wanted},
        "too few": {"latents": wanted[:2].contiguous()},
    }
    if broken in tensors:
        save_file(tensors[broken], path)
    else:
        path.write_bytes(content[:-40] if broken == "cut" else b"")
    assert encode(pipe, x, path.parent).equal(wanted)
    assert path.read_bytes() == content


# Guards know the space that they were trained in.


@pytest.fixture
def guard_of():
    "A guard as it would come out of `fit_pipeline_guard` for a pipeline."

    def build(pipe):
        made = {"autoencoder": pipelines._space_of(pipe)}
        classifier, schedule = Linear(torch.full((4, 8, 8), 0.02)), schedule_of(pipe.scheduler)
        return Guard(classifier, schedule, scale=5.0, t_max=1000, made=made)

    return build


def test_the_guard_of_another_autoencoder_is_refused(pipe, guard_of):
    guard = guard_of(pipe)
    pipe.vae = new_autoencoder(seed=7)
    with pytest.raises(ValueError, match="trained in the space of another autoencoder") as told:
        protect_pipeline(pipe, guard)
    assert "\n" not in str(told.value) and not pipe.unet._forward_hooks
    pipe.vae.register_to_config(scaling_factor=1.0)
    with pytest.raises(ValueError, match="another autoencoder"):
        protect_pipeline(pipe, guard)
    pipe.vae = None
    with pytest.raises(ValueError, match="another autoencoder"):
        protect_pipeline(pipe, guard)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_in_another_precision_it_is_the_same_autoencoder(precision, pipe, guard_of):
    guard = guard_of(pipe)
    pipe.vae.to(precision)
    pipe.vae.decoder.conv_in.weight.data.mul_(2)  # latents do not depend on it
    with protect_pipeline(pipe, guard) as protection:
        draw_latents(pipe)
    assert protection.rows_pushed > 0


def test_a_guard_for_pixels_does_not_fit_latents(guard_of):
    "And one that does not say where it was trained, of an older version, is taken."
    pixels = pixel_pipeline(channels=4)
    guard, latents = guard_of(pixels), other_latent_pipeline("LDMPipeline")
    latents.scheduler = pixels.scheduler
    with pytest.raises(ValueError, match="another autoencoder"):
        protect_pipeline(latents, guard)
    del guard.made["autoencoder"]
    protect_pipeline(latents, guard).remove()


def test_what_is_trained_knows_its_space(pipe, tmp_path):
    "It is in the file; and another number of channels is refused at once."
    small = {"steps": 1, "options": {"width": 8}, "progress": False, "preset": "paper"}
    with pytest.warns(UserWarning, match=r"size \(8, 8\), this .* draws \(16, 16\) unless told"):
        members, others = pictures(6, side=8), pictures(40, side=8)
        fit_pipeline_guard(pipe, members, others, tmp_path / "guard", **small)
    made = load_guard(tmp_path / "guard").made
    assert len(made["autoencoder"]) == 16

    inpainting = latent_pipeline("StableDiffusionInpaintPipeline")
    inpainting.vae = new_autoencoder("VQModel")
    with pytest.raises(ValueError, match="another autoencoder"):
        protect_pipeline(inpainting, load_guard(tmp_path / "guard"))


WRONG_IMAGES = {
    "colours": (pictures(40), "members have 3 channels, .* images of 1"),
    "size": (pictures(40, 1, 12), r"members are of size \(12, 12\), this DDIMPipeline draws"),
    "scale": (torch.rand(40, 1, 8, 8), r"2 \* x - 1 converts them"),
    "NaN": (torch.full((40, 1, 8, 8), torch.nan), "members hold NaN"),
    "one image": (pictures(1, 1, 8)[0], r"members must be \[N, C, H, W\]"),
}


@pytest.mark.parametrize("wrong", WRONG_IMAGES)
def test_images_that_the_pipeline_does_not_draw_are_refused_at_once(wrong, tmp_path):
    images, says = WRONG_IMAGES[wrong]
    with pytest.raises(ValueError, match=says) as told:
        fit_pipeline_guard(pixel_pipeline(), images, images, tmp_path / "new" / "guard")
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_a_schedule_without_levels_is_refused_first(tmp_path):
    pipe = pixel_pipeline()
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="has no noise levels"):
        fit_pipeline_guard(pipe, pictures(9), pictures(9), tmp_path / "guard")


@pytest.mark.parametrize("config", [{"sample_size": None}, {}], ids=["None", "not there"])
def test_a_network_that_does_not_say_its_size(config, tmp_path):
    "It is told, what the pipeline is comes first, and a guard can be trained all the same."
    pipe = pixel_pipeline()
    entries = {k: v for k, v in pipe.unet.config.items() if k != "sample_size"}
    pipe.unet._internal_dict = type(pipe.unet.config)(entries | config)
    with pytest.raises(ValueError, match="UNet2DModel of this DDIMPipeline does not say") as told:
        image_shape(pipe)
    assert "\n" not in str(told.value)
    small = {"steps": 1, "options": {"width": 8}, "progress": False, "preset": "paper"}
    fit_pipeline_guard(pipe, pictures(6, 1, 8), pictures(9, 1, 8), tmp_path / "guard", **small)
    with pytest.raises(ValueError, match="neither a unet"):
        image_shape(SimpleNamespace(scheduler=pipe.scheduler))


def test_the_training_is_where_the_pipeline_is(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        pipelines, "fit_run_guard", lambda *_, device, **__: asked.append(device) or guard
    )
    pipe = pixel_pipeline()
    guard = linear_guard(pipe.scheduler, (1, 8, 8)).guard
    guard.classifier = Linear(torch.ones(1, 8, 8))
    accelerate.hooks.add_hook_to_module(
        pipe.unet, accelerate.hooks.CpuOffload(execution_device="meta")
    )
    fit_pipeline_guard(pipe, pictures(6, 1, 8), pictures(9, 1, 8), tmp_path / "guard")
    assert asked == [torch.device("meta")]


# Channels: how many of those shown and answered are the image.

LEARNED = {"variance_type": "learned_range"}
CHANNELS = {
    "3 → 6": (pixel_pipeline("DDPM", channels=3, out=2, **LEARNED), 3, None),
    "6 → 6": (pixel_pipeline("DDPM", channels=6, out=1, **LEARNED), 3, 3),
    "4 → 8": (latent_pipeline(out=2), 4, None),
    "9 → 8": (latent_pipeline("StableDiffusionInpaintPipeline", out=2), 4, 5),
    "9 → 4": (latent_pipeline("StableDiffusionInpaintPipeline"), 4, 5),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_of_the_channels_those_of_the_image_are_corrected(case):
    "Learned variance, extra channels at the input, or both."
    pipe, channels, more = CHANNELS[case]
    x = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = torch.cat([x, torch.ones(3, more, 8, 8)], 1) if more else x
    given = {"timestep": torch.tensor(300)}
    if pipe.unet.config.get("cross_attention_dim"):
        given["encoder_hidden_states"] = torch.ones(3, 3, 8)
    guard = linear_guard(pipe.scheduler, (channels, 8, 8)).guard
    guard.classifier = Linear(linear_guard(pipe.scheduler, (channels, 8, 8)).w)

    plain = pipe.unet(shown, **given).sample
    with protect_pipeline(pipe, guard) as protection:
        guarded = pipe.unet(shown, **given).sample
    assert protection.rows_pushed == 3
    assert guarded[:, channels:].equal(plain[:, channels:])
    assert ((guarded - plain)[:, :channels].abs().amax((1, 2, 3)) > 1e-3).all()

    # One channel more or less is another guard.
    other = Guard(Linear(torch.ones(channels + 1, 8, 8)), schedule_of(pipe.scheduler))
    with pytest.raises(ValueError, match=rf"the model draws \({channels}, 8, 8\)"):
        protect_pipeline(pipe, other)


def test_image_shapes_of_enlarging_pipelines():
    assert image_shape(CHANNELS["6 → 6"][0]) == (3, 8, 8)
    assert image_shape(CHANNELS["9 → 8"][0]) == (3, 16, 16)
    assert draw_pixels(pixel_pipeline()).shape == (1, 8, 8, 1)
