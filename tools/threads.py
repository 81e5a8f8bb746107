"""How threads should wait, into data/results/threads.json: python tools/threads.py

Milliseconds per training step of two small networks on two cores, alone and while two other
processes keep both cores busy, in processes of their own:
one thread      OMP_NUM_THREADS=1
two, spinning   what OpenMP does when nothing is said: a thread that waits keeps its core
two, sleeping   OMP_WAIT_POLICY=PASSIVE: a thread that waits lets others work
The second and third give the same numbers to the last bit, the first gives others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results" / "threads.json"
CHOICES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two, spinning": {"OMP_NUM_THREADS": "2"},
    "two, sleeping": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS = {"MLP, digits": 30, "U-Net, Fashion-MNIST": 6}
ROUNDS = 2


def step_times() -> dict[str, float]:
    "Mean milliseconds per training step of each network, in this process."
    import torch

    from cpsample.core.ddpm import MLPDenoiser, ddpm_loss, train
    from cpsample.core.images import load_digits, pixels
    from cpsample.core.schedule import make_schedule
    from cpsample.practice.datasets import load_fashion
    from cpsample.practice.runs import CONFIGS
    from cpsample.workshop.registry import build_network

    # The networks of the demo and of the configuration `fashion`, with images of their size.
    fashion = CONFIGS["fashion"]
    unet = build_network(fashion.network, {"shape": fashion.shape} | fashion.options)
    mlp = MLPDenoiser((1, 8, 8))
    digits, clothes = load_digits()[0], pixels(load_fashion(small=True)[0][:512])
    jobs = {"MLP, digits": (mlp, digits, 256), "U-Net, Fashion-MNIST": (unet, clothes, 128)}

    # The first two steps warm up; a step lasts from the end of one to the end of the next.
    means = {}
    for name, (network, images, batch_size) in jobs.items():
        loss = partial(ddpm_loss, schedule=make_schedule())
        generator = torch.Generator().manual_seed(0)
        options = dict(batch_size=batch_size, generator=generator)
        training = train(network, loss, (images,), STEPS[name] + 2, **options)
        ends = []
        for _ in training:
            ends.append(time.perf_counter())
        durations = [after - before for before, after in zip(ends[1:], ends[2:])]
        means[name] = 1000 * statistics.mean(durations)
    return means


@contextmanager
def busy_cores(cores: int) -> Iterator[None]:
    "So many other processes that never rest."
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measured(others: int) -> dict[str, dict[str, float]]:
    "{choice: {network: milliseconds, median of the rounds}}, the choices taking turns."
    # A process per choice and round, so that each reads its own environment.
    rounds = {choice: [] for choice in CHOICES}
    with busy_cores(others):
        for _ in range(ROUNDS):
            for choice, variables in CHOICES.items():
                child = subprocess.run(
                    [sys.executable, __file__, "--child"],
                    env=os.environ | variables,
                    stdout=subprocess.PIPE,
                    check=True,
                )
                rounds[choice].append(json.loads(child.stdout))

    # One slow round does not count.
    medians = {}
    for choice, records in rounds.items():
        names = records[0]
        medians[choice] = {n: round(statistics.median(r[n] for r in records), 2) for n in names}
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help="measure in this process, and print")
    if parser.parse_args().child:
        print(json.dumps(step_times()))
        return

    # Two cores, for all that is started from here.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    from cpsample.workshop.files import provenance, save_json

    times = {"alone": measured(0), "both cores busy": measured(2)}
    origin = {"name": "threads", "command": "python tools/threads.py", **provenance()}
    settings = {"cores": 2, "steps": STEPS, "rounds": ROUNDS}
    save_json(RESULTS, origin | {"settings": settings, "milliseconds_per_step": times})
    print(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
