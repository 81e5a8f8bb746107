"""Timings as ratios of interleaved pairs, into data/results/bench.json: python tools/bench.py

sampler_over_network       our sampler (DDIM, eta 0) over nothing but the calls of the demo's network that it makes
sampler_over_network_ddpm  the same with eta 1, which also draws a batch of normal numbers at every step
noise_over_network         the calls plus those draws, without a sampler: what DDPM costs at least
sampler_over_network_ddpm_wide  eta 1 with a network of twice the width, four times the work
guarded_over_unguarded     the sampler with the demo's model and guard, over the same without the guard
"""
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from cpsample.data import load_digits, save_json, split
from cpsample.ddpm import MLPDenoiser, sample, seeded, timesteps
from cpsample.demo import DEFAULTS, fit_denoiser, provenance
from cpsample.protect import calibrate, fit_guard, protect
from cpsample.schedule import make_schedule

N, STEPS, PAIRS = 1000, 100, 15
schedule = make_schedule()


def seconds(job):
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def steps_of_sampler(model, eta):
    "One job per step of a sampling run, and one for what comes after the last step."
    run = sample(model, schedule, (N, 1, 8, 8), STEPS, eta=eta, clip=1, generator=torch.Generator().manual_seed(0))
    return [lambda: next(run, None)] * (STEPS + 1)


def calls_only(model, noise=False):
    "The network calls of a sampling run as jobs, with or without the drawing of the noise that DDPM adds."
    x, generator = torch.randn(N, 1, 8, 8), torch.Generator().manual_seed(0)
    @torch.no_grad()
    def call(t): return model(x, torch.full((N,), t)), torch.randn(x.shape, generator=generator) if noise else None
    return [partial(call, t) for t in timesteps(schedule.T, STEPS)] + [lambda: None]


def ratio(a, b, pairs=PAIRS):
    """Median, minimum and maximum of time(a) / time(b) over pairs of runs, after one warm-up.

    a() and b() give equally long lists of jobs; they are run in turn, job by job, so that a slow moment of the machine hits both.
    """
    found = []
    for _ in range(pairs + 1):
        both = [(seconds(x), seconds(y)) for x, y in zip(a(), b(), strict=True)]
        found.append(sum(x for x, _ in both) / sum(y for _, y in both))
    found = found[1:]
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "pairs": pairs}


if __name__ == "__main__":
    network, wide = (seeded(0, lambda: MLPDenoiser((1, 8, 8), width)).requires_grad_(False) for width in (256, 512))
    ratios = {"sampler_over_network": ratio(lambda: steps_of_sampler(network, 0), lambda: calls_only(network)),
              "sampler_over_network_ddpm": ratio(lambda: steps_of_sampler(network, 1), lambda: calls_only(network)),
              "noise_over_network": ratio(lambda: calls_only(network, noise=True), lambda: calls_only(network)),
              "sampler_over_network_ddpm_wide": ratio(lambda: steps_of_sampler(wide, 1), lambda: calls_only(wide), 7)}
    x, _ = load_digits()
    parts = split(x, {"members": 100, "reference": 697, "held_out": None}, 0)
    members, reference, held_out = (parts.of(x, name) for name in parts.indices)
    model, guard = fit_denoiser(members, schedule, DEFAULTS["train_steps"]), fit_guard(members, schedule, reference)
    calibrate(guard, members, held_out)
    guarded = protect(model, guard)
    ratios["guarded_over_unguarded"] = ratio(lambda: steps_of_sampler(guarded, 1), lambda: steps_of_sampler(model, 1))
    save_json(Path(__file__).resolve().parent.parent / "data" / "results" / "bench.json",
              {"name": "bench", "command": "make bench", **provenance(), "settings": {"n": N, "steps": STEPS, "network": "MLPDenoiser((1, 8, 8)), width 256; wide: 512"},
               "ratios": ratios})
    for name, r in ratios.items(): print(f"{name:34} {r['median']:.3f}  [{r['min']:.3f}, {r['max']:.3f}]  {r['pairs']} pairs")
