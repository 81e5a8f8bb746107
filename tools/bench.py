"""Timings as ratios of interleaved jobs, into data/results/bench.json: python tools/bench.py

On the demo's network (MLP, digits):
sampler_over_network       our sampler (DDIM, eta 0) over nothing but the calls of the network that it makes
sampler_over_network_ddpm  the same with eta 1, which also draws a batch of normal numbers at every step
noise_over_network         the calls plus those draws, without a sampler: what DDPM costs at least
sampler_over_network_ddpm_wide  eta 1 with a network of twice the width, four times the work
guarded_over_unguarded     the sampler with the demo's model and guard, over the same without the guard

On the U-Net of the configuration `fashion`, everything over the network's own time (forward and backward pass; or forward alone):
train_…                    one training step: ours; the loop of diffusers' training example; denoising-diffusion-pytorch's trainer;
                           and our loop with their U-Nets of like size, over those networks' own time
sample_…                   DDIM sampling: ours; diffusers' DDIMPipeline; smalldiffusion's sampler
"""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cpsample.core.calibration import calibrate
from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, sample, seeded, timesteps, train
from cpsample.core.demo import DEFAULTS, fit_denoiser
from cpsample.core.guard import fit_guard, protect
from cpsample.core.images import load_digits, pixels, split
from cpsample.core.schedule import make_schedule
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS
from cpsample.workshop.files import provenance, save_json
from cpsample.workshop.registry import build_network

N, STEPS, PAIRS = 1000, 100, 15
BATCH, ROUNDS, IMAGES, DDIM = 64, 25, 128, 20
schedule = make_schedule()


def seconds(job):
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def steps_of_sampler(model, eta):
    "One job per step of a sampling run, and one for what comes after the last step."
    run = sample(
        model,
        schedule,
        (N, 1, 8, 8),
        STEPS,
        eta=eta,
        clip=1,
        generator=torch.Generator().manual_seed(0),
    )
    return [lambda: next(run, None)] * (STEPS + 1)


def calls_only(model, noise=False):
    "The network calls of a sampling run as jobs, with or without the drawing of the noise that DDPM adds."
    x, generator = torch.randn(N, 1, 8, 8), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def call(t):
        return model(x, torch.full((N,), t)), torch.randn(
            x.shape, generator=generator
        ) if noise else None

    return [partial(call, t) for t in timesteps(schedule.T, STEPS)] + [lambda: None]


def spread(found):
    return {
        "median": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "pairs": len(found),
    }


def ratio(a, b, pairs=PAIRS):
    """Median, minimum and maximum of time(a) / time(b) over pairs of runs, after one warm-up.

    a() and b() give equally long lists of jobs; they are run in turn, job by job, so that a slow moment of the machine hits both.
    """
    found = []
    for _ in range(pairs + 1):
        both = [(seconds(x), seconds(y)) for x, y in zip(a(), b(), strict=True)]
        found.append(sum(x for x, _ in both) / sum(y for _, y in both))
    return spread(found[1:])


def ratios_to_first(jobs, rounds):
    "{name: spread of time(job) / time(first job)} for a dict of jobs, run one after the other in every round, after two warm-ups."
    found = [{name: seconds(job) for name, job in jobs.items()} for _ in range(rounds + 2)][2:]
    first, *others = jobs
    return {name: spread([row[name] / row[first] for row in found]) for name in others}


def unet():
    return seeded(
        0, lambda: build_network("UNet", {"shape": (1, 28, 28)} | CONFIGS["fashion"].options)
    ).to(memory_format=torch.channels_last)


def theirs():
    "U-Nets of diffusers and denoising-diffusion-pytorch, of about the cost of ours, as model(x_t, t) -> eps."
    from denoising_diffusion_pytorch import Unet
    from diffusers import UNet2DModel

    class Ours(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return getattr(y := self.net(F.pad(x, (2, 2, 2, 2)), t), "sample", y)[..., 2:-2, 2:-2]

    a = UNet2DModel(
        32,
        1,
        1,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return {
        "diffusers": Ours(a),
        "denoising_diffusion_pytorch": Ours(
            Unet(16, channels=1, dim_mults=(1, 2, 3), flash_attn=False)
        ),
    }


def alone(network, x0):
    "The network's own part of a training step: forward, loss, backward on fixed noise."
    t, eps = torch.randint(1000, (BATCH,)), torch.randn(BATCH, 1, 28, 28)

    def job():
        network.zero_grad()
        F.mse_loss(network(x0[:BATCH], t), eps).backward()

    return job


def our_step(network, x0):
    steps = train(
        network,
        partial(ddpm_loss, schedule=schedule),
        (x0,),
        10**6,
        batch_size=BATCH,
        clip=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    return lambda: next(steps)


def endless(loader):
    while True:
        yield from loader


def diffusers_step(network, x0):
    "The loop of diffusers' example for unconditional image generation."
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    accelerator, noises = Accelerator(cpu=True), DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x0), BATCH, shuffle=True)
    network, optimizer, loader, rate = accelerator.prepare(
        network,
        optimizer,
        loader,
        get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6),
    )
    stream = endless(loader)

    def job():
        (clean,) = next(stream)
        noise, t = torch.randn(clean.shape), torch.randint(0, 1000, (len(clean),))
        with accelerator.accumulate(network):
            loss = F.mse_loss(network(noises.add_noise(clean, noise, t), t), noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        return loss.item()

    return job


def ddp_step(network, x0):
    "The loop of denoising-diffusion-pytorch's Trainer."
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    class Adapter(nn.Module):
        channels = out_dim = 1
        self_condition = random_or_learned_sinusoidal_cond = False

        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, x, t, condition=None):
            return self.net(x, t)

    accelerator, diffusion = (
        Accelerator(cpu=True),
        GaussianDiffusion(
            Adapter(),
            image_size=28,
            objective="pred_noise",
            beta_schedule="linear",
            auto_normalize=False,
        ),
    )
    ema, optimizer = (
        EMA(diffusion, beta=0.995, update_every=10),
        torch.optim.Adam(diffusion.parameters(), lr=1e-4),
    )
    loader = torch.utils.data.DataLoader(x0, BATCH, shuffle=True)
    diffusion, optimizer, loader = accelerator.prepare(diffusion, optimizer, loader)
    stream = endless(loader)

    def job():
        loss = diffusion(next(stream))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss.item()

    return job


def training_ratios():
    x0 = pixels(load_fashion(small=True)[0])
    found = {
        f"train_{k}": v
        for k, v in ratios_to_first(
            {
                "network": alone(unet(), x0),
                "ours": our_step(unet(), x0),
                "diffusers": diffusers_step(unet(), x0),
                "denoising_diffusion_pytorch": ddp_step(unet(), x0),
            },
            ROUNDS,
        ).items()
    }
    for name, network in theirs().items():
        found |= {
            f"train_ours_with_unet_of_{name}": ratios_to_first(
                {"network": alone(network, x0), "ours": our_step(network, x0)}, ROUNDS
            )["ours"]
        }
    return found


def sampling_ratios():
    from diffusers import DDIMPipeline, DDIMScheduler
    from smalldiffusion import ScheduleDDPM, samples

    network, shape = unet().requires_grad_(False).eval(), (IMAGES, 1, 28, 28)
    x = torch.randn(shape)

    class Piped(nn.Module):
        class config:
            sample_size, in_channels, out_channels = 28, 1, 1

        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.net = network

        def forward(self, x, t):
            return type("Output", (), {"sample": self.net(x, t.expand(len(x)))})

    class Sigmas(nn.Module):
        "ε of x/√(1+σ²) at the level t of σ: what a DDPM model is to smalldiffusion."

        def __init__(self):
            super().__init__()
            self.sigmas = (1 / schedule.abar - 1).sqrt()

        def rand_input(self, n):
            return torch.randn(n, 1, 28, 28)

        def predict_eps_cfg(self, x, sigma, cond, scale):
            return network(
                x / (1 + sigma**2).sqrt(),
                torch.full((len(x),), int((self.sigmas - sigma).abs().argmin())),
            )

    @torch.no_grad()
    def calls():
        for t in timesteps(schedule.T, DDIM):
            network(x, torch.full((IMAGES,), t))

    def ours():
        for _ in sample(
            network,
            schedule,
            shape,
            DDIM,
            eta=0,
            clip=1,
            generator=torch.Generator().manual_seed(0),
        ):
            pass

    pipeline = DDIMPipeline(Piped(), DDIMScheduler(1000, timestep_spacing="linspace"))
    pipeline.set_progress_bar_config(disable=True)
    sigmas = ScheduleDDPM(1000).sample_sigmas(DDIM)

    def small():
        for _ in samples(Sigmas(), sigmas, batchsize=IMAGES):
            pass

    found = ratios_to_first(
        {
            "network": calls,
            "ours": ours,
            "diffusers": lambda: pipeline(IMAGES, num_inference_steps=DDIM, output_type="np"),
            "smalldiffusion": small,
        },
        7,
    )
    return {f"sample_{k}": v for k, v in found.items()}


def demo_ratios():
    network, wide = (
        seeded(0, lambda: MLPDenoiser((1, 8, 8), width)).requires_grad_(False)
        for width in (256, 512)
    )
    ratios = {
        "sampler_over_network": ratio(
            lambda: steps_of_sampler(network, 0), lambda: calls_only(network)
        ),
        "sampler_over_network_ddpm": ratio(
            lambda: steps_of_sampler(network, 1), lambda: calls_only(network)
        ),
        "noise_over_network": ratio(
            lambda: calls_only(network, noise=True), lambda: calls_only(network)
        ),
        "sampler_over_network_ddpm_wide": ratio(
            lambda: steps_of_sampler(wide, 1), lambda: calls_only(wide), 7
        ),
    }
    x, _ = load_digits()
    parts = split(x, {"members": 100, "reference": 697, "held_out": None}, 0)
    members, reference, held_out = (parts.of(x, name) for name in parts.indices)
    model, guard = (
        fit_denoiser(members, schedule, DEFAULTS["train_steps"]),
        fit_guard(members, schedule, reference),
    )
    calibrate(guard, members, held_out)
    guarded = protect(model, guard)
    return ratios | {
        "guarded_over_unguarded": ratio(
            lambda: steps_of_sampler(guarded, 1), lambda: steps_of_sampler(model, 1)
        )
    }


if __name__ == "__main__":
    ratios = demo_ratios() | training_ratios() | sampling_ratios()
    settings = {
        "n": N,
        "steps": STEPS,
        "network": "MLPDenoiser((1, 8, 8)), width 256; wide: 512; train_ and sample_: the U-Net of the configuration fashion",
        "train_batch": BATCH,
        "sample_images": IMAGES,
        "sample_steps": DDIM,
    }
    path = Path(__file__).resolve().parent.parent / "data" / "results" / "bench.json"
    save_json(
        path,
        {
            "name": "bench",
            "command": "make bench",
            **provenance(),
            "settings": settings,
            "ratios": ratios,
        },
    )
    for name, r in ratios.items():
        print(f"{name:50} {r['median']:.3f}  [{r['min']:.3f}, {r['max']:.3f}]  {r['pairs']} pairs")
