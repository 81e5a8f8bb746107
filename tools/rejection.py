"""CPSample beside exact rejection on the toys, in numbers: python tools/rejection.py

First the h-transform against exact rejection (Kolmogorov-Smirnov and total variation in 1-D, maximum mean discrepancy in 2-D, five seeds),
with a planted wrong h; then the 2-D table over alpha, scale, labels and training (three seeds). Writes data/results/rejection.json.
"""

import statistics
import warnings
from functools import partial
from pathlib import Path

import torch
from scipy.stats import ks_2samp
from tqdm.auto import tqdm

from cpsample.core.classifier import random_labels
from cpsample.core.copying import proportion_ci
from cpsample.core.ddpm import final_sample, sample
from cpsample.core.densities import exact_denoiser
from cpsample.core.guard import Guard, UncalibratedGuardWarning, protect
from cpsample.core.rejection import (
    acceptance_rule,
    doob,
    exact_rejection,
    fit_toy_classifier,
    ideal_classifier,
    line_toy,
    mmd,
    mmd_test,
    ring_toy,
    tilt,
    total_variation,
)
from cpsample.core.schedule import make_schedule, score_to_eps
from cpsample.workshop.files import provenance, save_json

SEEDS, TABLE_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2)
schedule = make_schedule()


def draw(model, n, dim, steps, seed):
    return final_sample(
        sample(model, schedule, (n, dim), steps, generator=torch.Generator().manual_seed(seed))
    )


def unnoised(model, log_A):
    "The planted mistake: the gradient of log A at x_t itself, as if x_t were clean."

    def guided(x_t, t):
        x = x_t.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(log_A(x).sum(), x)
        return model(x_t, t) + score_to_eps(x_t, t, slope, schedule)

    return guided


def equality(toy, classifier, alpha, scale, n, axis, distance, test, steps=1000):
    "Is the h-transform exact rejection? p-values and distances of both, and of the planted mistake, per seed."
    base, log_A = exact_denoiser(toy.law, schedule), acceptance_rule(classifier, alpha, scale)
    tilted, dim = tilt(toy.law, log_A, axis), toy.points.shape[1]
    right, wrong = doob(base, tilted, schedule), unnoised(base, log_A)
    pairs = [
        tuple(
            exact_rejection(toy.law, log_A, n, seed)[0] for seed in (10_100 + 2 * k, 10_101 + 2 * k)
        )
        for k in range(10)
    ]
    noise, rows = statistics.mean(distance(a, b) for a, b in pairs), []
    for seed in tqdm(SEEDS, desc=f"{dim}-D equality"):
        reference, accepted, tried = exact_rejection(toy.law, log_A, n, 10_000 + seed)
        x, bad = draw(right, n, dim, steps, seed), draw(wrong, n, dim, 200, seed)
        ratio, ratio_wrong = (
            statistics.mean(distance(y, a) for a, _ in pairs[:5]) / noise for y in (x, bad)
        )
        rows.append(
            {
                "seed": seed,
                "p": test(x, reference),
                "ratio": ratio,
                "p_wrong": test(bad, reference),
                "ratio_wrong": ratio_wrong,
                "accepted": accepted,
                "tried": tried,
                "accept_ci": list(proportion_ci(accepted, tried)),
            }
        )
    return {
        "n": n,
        "steps": steps,
        "alpha": alpha,
        "scale": scale,
        "noise": noise,
        "Z": tilted.Z,
        "rows": rows,
    }


def cell(toy, classifier, alpha, scale, form, n=2000, steps=200):
    "CPSample with one classifier and setting: MMD to exact rejection over sampling noise, and copies left, over the seeds of the table."
    log_A, model = (
        acceptance_rule(classifier, alpha, scale, form),
        protect(
            exact_denoiser(toy.law, schedule),
            Guard(classifier, schedule, alpha, scale, form, schedule.T),
        ),
    )
    references = [exact_rejection(toy.law, log_A, n, 10_020 + seed)[0] for seed in range(6)]
    noise = statistics.mean(mmd(a, b) for a, b in zip(references[::2], references[1::2]))
    drawn = [draw(model, n, 2, steps, seed) for seed in TABLE_SEEDS]
    ratios = [statistics.mean(mmd(x, r) for r in references[:2]) / noise for x in drawn]
    copied, total = sum(int(toy.copied(x).sum()) for x in drawn), n * len(drawn)
    return {
        "alpha": alpha,
        "scale": scale,
        "ratio": statistics.mean(ratios),
        "ratio_seeds": ratios,
        "n": total,
        "copied": copied,
        "copies": copied / total,
        "copies_ci": list(proportion_ci(copied, total)),
        "copies_rejection": toy.copied(torch.cat(references)).float().mean().item(),
    }


def table(toy):
    ideal = partial(
        ideal_classifier, toy.spikes, reference=toy.broad, schedule=schedule, share=toy.share
    )
    one = torch.ones(len(toy.points), 1)
    jobs = [
        (
            "random labels, ideal",
            f"K = {K}",
            ideal(targets=random_labels(len(one), K, 0)),
            a,
            s,
            "toward",
        )
        for K in (1, 2, 4, 8, 16)
        for a in (0.05, 0.2, 0.45)
        for s in (1.0, 3.0)
    ]
    jobs += [
        ("membership, ideal", "membership", ideal(targets=one, tau=0.0), a, s, "member")
        for a in (0.2, 0.45, 0.999)
        for s in (1.0, 3.0)
    ]
    for steps in (100, 1000, 8000):
        labels = random_labels(len(one), 8, 0)
        eight, member = (
            fit_toy_classifier(toy, labels, schedule, steps),
            fit_toy_classifier(toy, one, schedule, steps, tau=0.0),
        )
        jobs += [
            ("random labels, trained", f"K = 8, {steps} steps", eight, a, s, "toward")
            for a in (0.2, 0.45)
            for s in (1.0, 3.0)
        ]
        jobs += [
            ("membership, trained", f"{steps} steps", member, a, s, "member")
            for a in (0.45, 0.999)
            for s in (1.0, 3.0)
        ]
    return [
        {"kind": kind, "classifier": name} | cell(toy, *job)
        for kind, name, *job in tqdm(jobs, desc="table")
    ]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UncalibratedGuardWarning)
    origin, line, ring = provenance(), line_toy(), ring_toy()
    one = ideal_classifier(
        line.spikes,
        torch.tensor([[1.0], [0], [1], [1], [0], [0]]),
        line.broad,
        schedule,
        share=line.share,
    )
    eight = ideal_classifier(
        ring.spikes, random_labels(12, 8, 0), ring.broad, schedule, share=ring.share
    )
    record = {
        "name": "rejection",
        "command": "python tools/rejection.py",
        **origin,
        "seeds": list(TABLE_SEEDS),
        "equality_seeds": list(SEEDS),
        "line": equality(
            line,
            one,
            0.4,
            2.0,
            20_000,
            torch.linspace(-4, 4, 6401),
            total_variation,
            lambda a, b: float(ks_2samp(a[:, 0], b[:, 0]).pvalue),
        ),
        "ring": equality(
            ring,
            eight,
            0.45,
            3.0,
            2000,
            torch.linspace(-3.2, 3.2, 513),
            mmd,
            lambda a, b: mmd_test(a, b, 500)[1],
        ),
        "base_copies": ring.copied(ring.law.sample(100_000, torch.Generator().manual_seed(0)))
        .float()
        .mean()
        .item(),
        "honest_copies": ring.copied(ring.broad.sample(100_000, torch.Generator().manual_seed(0)))
        .float()
        .mean()
        .item(),
        "table": table(ring),
    }
    save_json(
        Path(__file__).resolve().parent.parent / "data" / "results" / "rejection.json", record
    )
