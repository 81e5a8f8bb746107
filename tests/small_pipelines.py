"Small pipelines of diffusers with random weights, and guards whose push is known in closed form."

import copy
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from torch import Tensor

from cpsample.core.guard import Guard
from cpsample.core.schedule import make_schedule
from cpsample.production.schedulers import path_of

# name → (class, options)
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
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# latent pipelines → what each is called with besides the words
PIPELINES = {
    "StableDiffusionPipeline": {},
    "StableDiffusionImg2ImgPipeline": {"strength": 0.8},
    "StableDiffusionInpaintPipeline": {"strength": 1.0},
}
QUIET = [
    "ignore::cpsample.core.guard.UncalibratedGuardWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
]


def scheduler_of(name, prediction="epsilon", **betas):
    "A scheduler of `SCHEDULERS`, with the noise levels of Stable Diffusion or other betas."
    kind, options = SCHEDULERS[name]
    settings = {"num_train_timesteps": 1000, "prediction_type": prediction}
    return getattr(diffusers, kind)(**settings | SD_BETAS | options | betas)


def seeded(seed, build):
    "build() with weights that are the same every time, not to be trained."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def _conditional_unet(channels, out=4):
    return UNet2DConditionModel(
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
    )


def _vae():
    return AutoencoderKL(
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=5.0,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _vq_model():
    return VQModel(
        block_out_channels=(4, 4),
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=8,
        scaling_factor=3.0,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _tiny_autoencoder():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=2.0,
    )


def new_autoencoder(kind="AutoencoderKL", seed=2):
    "Latents 4×8×8 of pictures 3×16×16, of any of three kinds."
    builds = {"AutoencoderKL": _vae, "VQModel": _vq_model, "AutoencoderTiny": _tiny_autoencoder}
    return seeded(seed, builds[kind])


VAE = new_autoencoder()
PARTS = {
    "vae": VAE,
    "text_encoder": None,
    "tokenizer": None,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def latent_pipeline(kind="StableDiffusionPipeline", scheduler=None, out=1):
    """A pipeline of `PIPELINES`: latents 4×8×8 of pictures 3×16×16 (default scheduler: DDIM).

    Its networks are its own, so a test may change them.
    out: 2 for a network that answers with a variance, too.
    """
    unet = seeded(1, lambda: _conditional_unet(9 if "Inpaint" in kind else 4, 4 * out))
    scheduler = scheduler or scheduler_of("DDIM")
    parts = PARTS | {"vae": copy.deepcopy(VAE)}
    pipe = getattr(diffusers, kind)(unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixel_pipeline(kind="DDIM", prediction="epsilon", *, out=1, channels=1, **options):
    "A DDPMPipeline or DDIMPipeline for pictures of 8×8."

    def build():
        return UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=out * channels,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )

    settings = {"num_train_timesteps": 1000, "prediction_type": prediction}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**settings | options)
    pipe = getattr(diffusers, f"{kind}Pipeline")(seeded(1, build), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def other_latent_pipeline(kind):
    "A KandinskyV22Pipeline or LDMPipeline: their autoencoders are called movq and vqvae."
    parts = {"movq" if "Kandinsky" in kind else "vqvae": new_autoencoder("VQModel")}
    unet = pixel_pipeline(channels=4).unet
    return getattr(diffusers, kind)(unet=unet, scheduler=scheduler_of("DDIM"), **parts)


def _sd3_transformer():
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


def _flux_transformer():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def flow_pipeline(kind="StableDiffusion3Pipeline", scheduler=None):
    "Stable Diffusion 3 or Flux: latents 4×8×8 of pictures 3×16×16, for Flux as 16 tokens of 16."
    is_flux = kind == "FluxPipeline"
    transformer = seeded(1, _flux_transformer if is_flux else _sd3_transformer)
    numbers = ("", "_2") if is_flux else ("", "_2", "_3")
    empty = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in numbers]
    vae = copy.deepcopy(VAE)
    vae.register_to_config(shift_factor=0.1)
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler}
    pipe = getattr(diffusers, kind)(**parts, **dict.fromkeys(empty))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_flow(pipe, n=1, cfg=1.0, steps=4, **more):
    "Latents of a flow pipeline, from the same noise and words every time."
    words = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(1)).expand(2, n, 3, 8)
    given = {
        "prompt_embeds": words[0],
        "pooled_prompt_embeds": words[0, :, 0],
        "guidance_scale": cfg,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "height": 16,
        "width": 16,
    }
    if type(pipe).__name__ != "FluxPipeline":
        given |= {
            "negative_prompt_embeds": words[1],
            "negative_pooled_prompt_embeds": words[1, :, 0],
        }
    return pipe(**given | more).images


def draw_pixels(pipe, n=1, steps=4):
    "Images [n, 8, 8, C] of a pixel pipeline, from the same noise every time."
    generator = torch.Generator().manual_seed(0)
    images = pipe(n, generator, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images)


def draw_latents(pipe, n=1, cfg=1.0, steps=4, **more):
    "Latents of a latent pipeline, from the same noise, words and pictures every time."
    kind = type(pipe).__name__
    words = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(1))
    words = words.expand(2, n, 3, 8)
    given = {
        "prompt_embeds": words[0],
        "negative_prompt_embeds": words[1],
        "guidance_scale": cfg,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if kind != "StableDiffusionPipeline":
        given["image"] = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    if "Inpaint" in kind:
        given["mask_image"] = (torch.arange(16) < 8).float().expand(n, 1, 16, 16)
    return pipe(**given | PIPELINES[kind] | more).images


class LinearGuard(NamedTuple):
    """A guard whose push is known: z = bias + ⟨w, sin x⟩ with a small w.

    For a bias of 5 it is certain everywhere, for 0 nowhere; its push is −σ(z)·w·cos x.
    """

    guard: Guard
    w: Tensor


def guards_schedule(scheduler):
    "The noise levels of a scheduler or, where it has none, those that guards are trained at."
    return path_of(scheduler).schedule or make_schedule()


def linear_guard(scheduler, shape=(4, 8, 8), *, scale=50.0, bias=5.0, t_max=1000):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02

    def classifier(x, t):
        return bias + (x.sin() * w).flatten(1).sum(1, keepdim=True)

    guard = Guard(classifier, guards_schedule(scheduler), alpha=0.05, scale=scale, t_max=t_max)
    return LinearGuard(guard, w)


class Linear(torch.nn.Module):
    "The same classifier as a module, with a shape of its own in `config`."

    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.Parameter(w)
        self.config = {"shape": list(w.shape)}
        self.eval()

    def forward(self, x, t):
        return 5.0 + (x.sin() * self.w).flatten(1).sum(1, keepdim=True)


def same(a, b):
    return torch.equal(a, b)  # a function of its own, so that a failure does not print the tensors


def save_noise(folder, n, size):
    "n pictures of noise, size × 16 pixels (8 × 8 for size 8), as PNG files."
    folder.mkdir()
    generator = np.random.default_rng(n)
    for i in range(n):
        pixels = generator.integers(0, 256, (size, min(size, 16), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
