"""Timings as ratios of interleaved jobs, into data/results/bench.json: python tools/bench.py

On the demo's network (MLP, digits):
sampler_over_network            our sampler (DDIM, eta 0) over nothing but the calls of the network
                                that it makes
sampler_over_network_ddpm       the same with eta 1, which also draws normal numbers at every step
noise_over_network              the calls plus those draws, without a sampler: what DDPM costs at
                                least
sampler_over_network_ddpm_wide  eta 1 with a network of twice the width, four times the work
guarded_over_unguarded          the sampler with the demo's model and guard, over that without guard

On the U-Net of the configuration `fashion`, everything over the network's own time (forward and
backward pass; or forward alone):
train_…                         one training step: ours; the loop of diffusers' training example;
                                denoising-diffusion-pytorch's trainer; and our loop with their
                                U-Nets of like size, over those networks' own time
sample_…                        DDIM sampling: ours; diffusers' DDIMPipeline; smalldiffusion's
                                sampler
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cpsample.core.calibration import calibrate
from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, sample, seeded, timesteps, train
from cpsample.core.demo import DEFAULTS, fit_denoiser
from cpsample.core.guard import fit_guard
from cpsample.core.images import load_digits, pixels, split
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS
from cpsample.workshop.files import provenance, save_json
from cpsample.workshop.registry import build_network

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results" / "bench.json"
N, STEPS, PAIRS = 1000, 100, 15  # of the demo's network
BATCH, ROUNDS = 64, 25  # of training steps
IMAGES, DDIM_STEPS, SAMPLING_ROUNDS = 128, 20, 7

Job = Callable[[], object]
schedule = make_schedule()


# Ratios


def seconds(job: Job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> dict:
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": len(ratios),
    }


def ratio(a: Callable[[], list[Job]], b: Callable[[], list[Job]], pairs: int = PAIRS) -> dict:
    """Median, minimum and maximum of time(a) / time(b) over pairs of runs, after one warm-up.

    a() and b() give equally long lists of jobs; they are run in turn, job by job, so that a slow
    moment of the machine hits both.
    """
    ratios = []
    for _ in range(pairs + 1):
        seconds_a = seconds_b = 0.0
        for job_a, job_b in zip(a(), b(), strict=True):
            seconds_a += seconds(job_a)
            seconds_b += seconds(job_b)
        ratios.append(seconds_a / seconds_b)
    return spread(ratios[1:])


def ratios_to_first(jobs: dict[str, Job], rounds: int) -> dict:
    """{name: spread of time(job) / time(first job)}, after two warm-ups.

    The jobs are run one after the other in every round.
    """
    times = [{name: seconds(job) for name, job in jobs.items()} for _ in range(rounds + 2)]
    first, *others = jobs
    return {name: spread([row[name] / row[first] for row in times[2:]]) for name in others}


# The demo's network


def steps_of_sampler(model: nn.Module, eta: float) -> list[Job]:
    "One job per step of a sampling run, and one for what comes after the last step."
    noise = torch.Generator().manual_seed(0)
    steps = sample(model, schedule, (N, 1, 8, 8), steps=STEPS, eta=eta, clip=1, generator=noise)
    return [lambda: next(steps, None)] * (STEPS + 1)


def calls_only(model: nn.Module, noise: bool = False) -> list[Job]:
    "The network calls of a sampling run as jobs, with the noise that DDPM adds or without."
    x, generator = torch.randn(N, 1, 8, 8), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def call(t):
        model(x, torch.full((N,), t))
        if noise:
            torch.randn(x.shape, generator=generator)

    return [partial(call, t) for t in timesteps(schedule.T, STEPS)] + [lambda: None]


def sampler_ratios() -> dict:
    "What our sampler takes beside its network's calls."
    network, wide = (
        seeded(0, lambda width=width: MLPDenoiser((1, 8, 8), width)).requires_grad_(False)
        for width in (256, 512)
    )
    # DDIM draws nothing, DDPM a batch of normal numbers per step: that, too, is measured alone.
    calls, wide_calls = partial(calls_only, network), partial(calls_only, wide)
    return {
        "sampler_over_network": ratio(partial(steps_of_sampler, network, 0), calls),
        "sampler_over_network_ddpm": ratio(partial(steps_of_sampler, network, 1), calls),
        "noise_over_network": ratio(partial(calls_only, network, noise=True), calls),
        "sampler_over_network_ddpm_wide": ratio(
            partial(steps_of_sampler, wide, 1), wide_calls, pairs=7
        ),
    }


def guard_ratios() -> dict:
    "What the demo's guard adds to sampling."
    x, _ = load_digits()
    parts = split(x, {"members": 100, "reference": 697, "held_out": None}, 0)
    members, reference, held_out = (parts.of(x, name) for name in parts.indices)
    model = fit_denoiser(members, schedule, DEFAULTS["train_steps"])
    guard = fit_guard(members, schedule, reference)
    calibrate(guard, members, held_out)

    guarded = partial(steps_of_sampler, protect(model, guard), 1)
    return {"guarded_over_unguarded": ratio(guarded, partial(steps_of_sampler, model, 1))}


# Training steps beside other libraries


def our_unet() -> nn.Module:
    config = {"shape": (1, 28, 28)} | CONFIGS["fashion"].options
    network = seeded(0, lambda: build_network("UNet", config))
    return network.to(memory_format=torch.channels_last)


class Padded(nn.Module):
    "A network for 32×32 pixels as `model(x_t, t) -> eps` for 28×28."

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        answer = self.network(F.pad(x_t, (2, 2, 2, 2)), t)
        answer = getattr(answer, "sample", answer)  # diffusers wraps it
        return answer[..., 2:-2, 2:-2]


def their_unets() -> dict[str, nn.Module]:
    "U-Nets of diffusers and denoising-diffusion-pytorch, of about the cost of ours."
    from denoising_diffusion_pytorch import Unet
    from diffusers import UNet2DModel

    # The sizes that come nearest to our network's FLOPs.
    unet_of_diffusers = UNet2DModel(
        32,
        1,
        1,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    unet_of_ddp = Unet(16, channels=1, dim_mults=(1, 2, 3), flash_attn=False)
    return {
        "diffusers": Padded(unet_of_diffusers),
        "denoising_diffusion_pytorch": Padded(unet_of_ddp),
    }


def network_alone(network: nn.Module, x0: Tensor) -> Job:
    "The network's own part of a training step: forward, loss, backward on fixed noise."
    t, eps = torch.randint(1000, (BATCH,)), torch.randn(BATCH, 1, 28, 28)

    def job():
        network.zero_grad()
        F.mse_loss(network(x0[:BATCH], t), eps).backward()

    return job


def our_step(network: nn.Module, x0: Tensor) -> Job:
    loss = partial(ddpm_loss, schedule=schedule)
    noise = torch.Generator().manual_seed(0)
    steps = train(network, loss, (x0,), 10**6, batch_size=BATCH, clip=1.0, generator=noise)
    return lambda: next(steps)


def endless(loader: DataLoader):
    while True:
        yield from loader


def diffusers_step(network: nn.Module, x0: Tensor) -> Job:
    "The loop of diffusers' example for unconditional image generation."
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler

    # What the example sets up: accelerate, AdamW, a data loader, a cosine schedule.
    accelerator, scheduler = Accelerator(cpu=True), DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    loader = DataLoader(TensorDataset(x0), BATCH, shuffle=True)
    network, optimizer, loader, rate = accelerator.prepare(network, optimizer, loader, rate)
    batches = endless(loader)

    def job():
        (clean,) = next(batches)
        noise, t = torch.randn(clean.shape), torch.randint(0, 1000, (len(clean),))
        with accelerator.accumulate(network):
            prediction = network(scheduler.add_noise(clean, noise, t), t)
            loss = F.mse_loss(prediction, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        return loss.item()

    return job


class ForGaussianDiffusion(nn.Module):
    "A denoiser as denoising-diffusion-pytorch's `GaussianDiffusion` wants its networks."

    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.network(x, t)


def ddp_step(network: nn.Module, x0: Tensor) -> Job:
    "The loop of denoising-diffusion-pytorch's Trainer."
    from accelerate import Accelerator
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA

    # What the Trainer sets up: accelerate, Adam, an average of the weights.
    accelerator = Accelerator(cpu=True)
    diffusion = GaussianDiffusion(
        ForGaussianDiffusion(network),
        image_size=28,
        objective="pred_noise",
        beta_schedule="linear",
        auto_normalize=False,
    )
    ema = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4)
    loader = DataLoader(x0, BATCH, shuffle=True)
    diffusion, optimizer, loader = accelerator.prepare(diffusion, optimizer, loader)
    batches = endless(loader)

    # One turn of its loop, without the parts that write files.
    def job():
        loss = diffusion(next(batches))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss.item()

    return job


def training_ratios() -> dict:
    "Training steps over the network's own time: three loops with our network, ours with theirs."
    x0 = pixels(load_fashion(small=True)[0])
    jobs = {
        "network": network_alone(our_unet(), x0),
        "ours": our_step(our_unet(), x0),
        "diffusers": diffusers_step(our_unet(), x0),
        "denoising_diffusion_pytorch": ddp_step(our_unet(), x0),
    }
    ratios = {f"train_{name}": row for name, row in ratios_to_first(jobs, ROUNDS).items()}

    # Is our loop as light with a network that it was not made for?
    for name, network in their_unets().items():
        jobs = {"network": network_alone(network, x0), "ours": our_step(network, x0)}
        ratios[f"train_ours_with_unet_of_{name}"] = ratios_to_first(jobs, ROUNDS)["ours"]
    return ratios


# Sampling beside other libraries


class ForDDIMPipeline(nn.Module):
    "A denoiser as the `unet` of diffusers' `DDIMPipeline`."

    config = SimpleNamespace(sample_size=28, in_channels=1, out_channels=1)
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.network(x, t.expand(len(x))))


class ForSmallDiffusion(nn.Module):
    "ε of x/√(1+σ²) at the level t of σ: what a DDPM model is to smalldiffusion."

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.sigmas = (1 / schedule.abar - 1).sqrt()

    def rand_input(self, n: int) -> Tensor:
        return torch.randn(n, 1, 28, 28)

    def predict_eps_cfg(self, x: Tensor, sigma: Tensor, cond: object, scale: float) -> Tensor:
        t = int((self.sigmas - sigma).abs().argmin())
        return self.network(x / (1 + sigma**2).sqrt(), torch.full((len(x),), t))


def drained(steps: Callable) -> Job:
    "A job that runs a fresh generator to its end."

    def job():
        for _ in steps():
            pass

    return job


def sampling_ratios() -> dict:
    "DDIM sampling over the network's own calls, by three libraries."
    from diffusers import DDIMPipeline, DDIMScheduler
    from smalldiffusion import ScheduleDDPM, samples

    network, shape = our_unet().requires_grad_(False).eval(), (IMAGES, 1, 28, 28)
    x = torch.randn(shape)

    # The yardstick, and our sampler.
    @torch.no_grad()
    def calls():
        for t in timesteps(schedule.T, DDIM_STEPS):
            network(x, torch.full((IMAGES,), t))

    def ours():
        noise = torch.Generator().manual_seed(0)
        return sample(network, schedule, shape, steps=DDIM_STEPS, eta=0, clip=1, generator=noise)

    # The same network in the dress that each library wants.
    scheduler = DDIMScheduler(1000, timestep_spacing="linspace")
    pipeline = DDIMPipeline(ForDDIMPipeline(network), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    sigmas = ScheduleDDPM(1000).sample_sigmas(DDIM_STEPS)
    small_model = ForSmallDiffusion(network)

    jobs = {
        "network": calls,
        "ours": drained(ours),
        "diffusers": partial(pipeline, IMAGES, num_inference_steps=DDIM_STEPS, output_type="np"),
        "smalldiffusion": drained(partial(samples, small_model, sigmas, batchsize=IMAGES)),
    }
    ratios = ratios_to_first(jobs, SAMPLING_ROUNDS)
    return {f"sample_{name}": row for name, row in ratios.items()}


def main() -> None:
    ratios = sampler_ratios() | guard_ratios() | training_ratios() | sampling_ratios()
    settings = {
        "n": N,
        "steps": STEPS,
        "network": "MLPDenoiser((1, 8, 8)), width 256; wide: 512; train_ and sample_: the U-Net of "
        "the configuration fashion",
        "train_batch": BATCH,
        "sample_images": IMAGES,
        "sample_steps": DDIM_STEPS,
    }
    # The file first, then the same for a person.
    origin = {"name": "bench", "command": "make bench", **provenance()}
    save_json(RESULTS, origin | {"settings": settings, "ratios": ratios})
    for name, row in ratios.items():
        interval = f"[{row['min']:.3f}, {row['max']:.3f}]"
        print(f"{name:50} {row['median']:.3f}  {interval}  {row['pairs']} pairs")


if __name__ == "__main__":
    main()
