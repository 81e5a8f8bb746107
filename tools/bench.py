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

On a GPU, where there is one (else they are left out, and it is said):
gpu_train_…_64, …_256           50 compiled training steps of this project in bfloat16, with average
                                and losses read, over those of a plain loop with compiled network
                                whose indices and noise are drawn on the GPU and that reads nothing;
                                the U-Nets of the configurations fashion and cifar10, batches of 64
                                and 256
gpu_sample_float32_over_fast    256 images in 50 steps of the U-Net of cifar10 as it stands, over
                                the same as `for_sampling` makes it: in bfloat16 and compiled
gpu_sample_float32_over_graphs  the same with CUDA graphs
gpu_sample_fast_over_network    the compiled sampling over the calls of its network
gpu_guarded_never, …_always     the compiled sampling behind a guard that is asked at each step and
                                is never certain, or always, over that without a guard
gpu_guarded_some_tuned          behind a guard that is certain of some rows, with torch tuning its
                                kernels (cudnn.benchmark), over the same without
"""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cpsample.core.calibration import calibrate
from cpsample.core.ddpm import (
    READ_EVERY,
    MLPDenoiser,
    ddpm_loss,
    generate,
    sample,
    seeded,
    timesteps,
    train,
)
from cpsample.core.demo import DEFAULTS, fit_denoiser
from cpsample.core.guard import Guard, fit_guard
from cpsample.core.images import load_digits, pixels, split
from cpsample.core.protection import protect
from cpsample.core.schedule import make_schedule
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import CONFIGS
from cpsample.practice.training import TrainingState, half_precision
from cpsample.practice.unet import UNetClassifier
from cpsample.workshop.files import provenance, save_json
from cpsample.workshop.gpu import for_sampling
from cpsample.workshop.registry import build_network

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results" / "bench.json"
N, STEPS, PAIRS = 1000, 100, 15  # of the demo's network
BATCH, ROUNDS = 64, 25  # of training steps
IMAGES, DDIM_STEPS, SAMPLING_ROUNDS = 128, 20, 7
GPU_STEPS, GPU_ROUNDS = 50, 9
GPU_IMAGES, GPU_SAMPLE_STEPS, GPU_SAMPLE_ROUNDS = 256, 50, 5

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


# Training on a GPU


def wait_for(device: torch.device) -> None:
    "Until a GPU has done all that it was asked to do."
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_gpu_steps(network: nn.Module, call: Callable, x0: Tensor, batch: int) -> Job:
    """50 steps of a plain loop: everything is drawn on the device of x0, and nothing is read.

    network, call: a network, and what is called for it, such as the same network compiled.
    x0 [N, C, H, W]: images, as bytes.
    """
    # What a loop keeps: weights, their averages, Adam, and the noise levels where they are needed.
    device = x0.device
    weights = list(network.parameters())
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)
    abar = schedule.abar.to(device)

    def step():
        # A batch, noised, and how wrong the network is about the noise.
        x = pixels(x0[torch.randint(len(x0), (batch,), device=device)])
        t = torch.randint(schedule.T, (batch,), device=device)
        eps = torch.randn(x.shape, device=device)
        share = abar[t][:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            x_t = share.sqrt() * x + (1 - share).sqrt() * eps
            loss = F.mse_loss(call(x_t, t), eps)

        # Downhill, and the averages after it.
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1e-3)

    def job():
        for _ in range(GPU_STEPS):
            step()
        wait_for(device)

    return job


def our_gpu_steps(network: nn.Module, call: Callable, x0: Tensor, batch: int) -> Job:
    "50 steps of `train`, with what `fit` does after each; arguments of `plain_gpu_steps`."
    loss = half_precision(partial(ddpm_loss, schedule=schedule), x0.device.type)
    state = TrainingState.fresh(network)
    steps = train(call, loss, (x0,), 10**6, batch_size=batch, clip=1.0, **state.position)

    def job():
        for record in islice(steps, GPU_STEPS):
            state.note(record)
            if state.step % READ_EVERY == 0:
                state.read_losses()
        wait_for(x0.device)

    return job


def gpu_training_ratios() -> dict:
    "Our compiled training over a plain compiled one, for small and large networks and batches."
    ratios = {}
    for name in ("fashion", "cifar10"):
        config = CONFIGS[name]
        x0 = torch.randint(256, (10_000, *config.shape), device="cuda", dtype=torch.uint8)
        for batch in (64, 256):
            torch.compiler.reset()  # or it would compile for batches of any size

            # Each loop with a network of its own, from the same first weights.
            jobs = {}
            for loop in (plain_gpu_steps, our_gpu_steps):
                arguments = {"shape": config.shape} | config.options
                network = seeded(0, partial(build_network, config.network, arguments))
                network = network.to("cuda", memory_format=torch.channels_last)
                jobs[loop.__name__] = loop(network, torch.compile(network), x0, batch)
            ratio_of = ratios_to_first(jobs, GPU_ROUNDS)
            ratios[f"gpu_train_{name}_{batch}"] = ratio_of[our_gpu_steps.__name__]
    return ratios


# Sampling on a GPU


def gpu_sampling_jobs(network: nn.Module, device: str) -> dict[str, Job]:
    "256 images each: as fast as can be, as the network stands, with CUDA graphs, its calls alone."
    shape = CONFIGS["cifar10"].shape if device == "cuda" else network.config["shape"]
    fast = for_sampling(network, device, mode="default")
    graphs = for_sampling(network, device, mode="reduce-overhead")

    # Every image from the same noise; the calls from any.
    def draw(model: nn.Module, seed: int = 0) -> Tensor:
        options = {"steps": GPU_SAMPLE_STEPS, "device": device, "seed": seed}
        return generate(model, schedule, shape, GPU_IMAGES, **options)

    @torch.no_grad()
    def calls() -> int:
        levels, x = timesteps(schedule.T, GPU_SAMPLE_STEPS), torch.randn(GPU_IMAGES, *shape)
        x = x.to(device)
        for t in levels:
            fast(x, torch.full((GPU_IMAGES,), t, device=device))
        wait_for(torch.device(device))
        return len(levels)

    jobs = {"fast": fast, "float32": network, "graphs": graphs}
    return {name: partial(draw, model) for name, model in jobs.items()} | {"network": calls}


def guards_for_bench(shape: tuple[int, ...], device: str) -> dict[str, Guard]:
    "Guards of fresh weights: one that is never certain, one always, one of some rows."
    classifier = seeded(0, lambda: UNetClassifier(shape, 1, width=32))
    width = classifier.out.in_features**-0.5
    nn.init.normal_(classifier.out.weight, std=width, generator=torch.Generator().manual_seed(0))
    classifier, guards = classifier.to(device), {}
    for name, alpha in {"never": 1e-6, "always": 0.5, "some": 0.45}.items():
        guards[name] = Guard(classifier, schedule, alpha=alpha, scale=1e-3, t_max=schedule.T)
    return guards


def with_tuned_kernels(job: Job) -> None:
    torch.backends.cudnn.benchmark = True
    try:
        job()
    finally:
        torch.backends.cudnn.benchmark = False


def gpu_sampling_ratios() -> dict:
    "What a GPU gains by bfloat16 and compilation, and what a guard costs it."
    config = CONFIGS["cifar10"]
    arguments = {"shape": config.shape} | config.options
    network = seeded(0, partial(build_network, config.network, arguments)).requires_grad_(False)
    network = network.eval().to("cuda", memory_format=torch.channels_last)
    torch.compiler.reset()
    jobs = gpu_sampling_jobs(network, "cuda")
    fast, graphs = jobs["fast"], jobs["graphs"]

    # The speed-ups have the slow way on top.
    ratios = {}
    for name, job in {"fast": fast, "graphs": graphs}.items():
        pair = {name: job, "float32": jobs["float32"]}
        row = ratios_to_first(pair, GPU_SAMPLE_ROUNDS)["float32"]
        ratios[f"gpu_sample_float32_over_{name}"] = row
    pair = {"network": jobs["network"], "fast": fast}
    ratios["gpu_sample_fast_over_network"] = ratios_to_first(pair, GPU_SAMPLE_ROUNDS)["fast"]

    return ratios | gpu_guard_ratios(fast.func, fast.args[0], config.shape)


def gpu_guard_ratios(draw: Callable, model: nn.Module, shape: tuple[int, ...]) -> dict:
    "What a guard costs draw(model, seed=…), and what kernels tuned for each size of batch cost it."
    jobs = {"plain": partial(draw, model)}
    for name, guard in guards_for_bench(shape, "cuda").items():
        jobs[name] = partial(draw, protect(model, guard))
    rows = ratios_to_first(jobs, GPU_SAMPLE_ROUNDS)
    ratios = {f"gpu_guarded_{name}": rows[name] for name in ("never", "always")}

    # Every round has new numbers of rows that the guard is certain of.
    some, seeds = jobs["some"], itertools.count(1)
    pair = {
        "plain": lambda: some(seed=next(seeds)),
        "tuned": partial(with_tuned_kernels, lambda: some(seed=next(seeds))),
    }
    ratios["gpu_guarded_some_tuned"] = ratios_to_first(pair, GPU_SAMPLE_ROUNDS)["tuned"]
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


def on_hardware(ratios: dict, hardware: str) -> dict:
    "The rows, each with what it was measured on."
    return {name: row | {"hardware": hardware} for name, row in ratios.items()}


def main() -> None:
    ratios = sampler_ratios() | guard_ratios() | training_ratios() | sampling_ratios()
    ratios = on_hardware(ratios, provenance()["hardware"])
    if torch.cuda.is_available():
        of_gpu = gpu_training_ratios() | gpu_sampling_ratios()
        ratios |= on_hardware(of_gpu, torch.cuda.get_device_name())
    else:
        print("there is no GPU here: the rows gpu_… are left out")
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
