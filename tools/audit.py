"""The audit put to the test, into data/results/audit.json: python tools/audit.py [planted | large | models] [--work FOLDER]

planted: known shares of copies of 3,000 training images among 5,000 real test images, in the six disguises of `CHANGES`, without and with duplicates in the
         training set; and the false alarms of each test on these 5,000 images.
large:   an audit of 10,000 × 50,000 colour images of 32×32 pixels over one matrix product of that size: time and memory, and how time grows.
models:  the samples of tools/membership.py (drawn again if they are not in FOLDER, default: the cache), audited against their training images.
"""

import json
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from membership import DRAWN, STEPS, digits_arms, fashion_arms, kept

from cpsample.core.ddpm import generate
from cpsample.core.guard import UncalibratedGuardWarning
from cpsample.core.images import pixels
from cpsample.judgement.copy_audit import CHANGES, TESTS, audit, copy_reports, plant
from cpsample.judgement.repeats import duplicate_groups
from cpsample.practice.datasets import load_fashion
from cpsample.practice.encoders import features
from cpsample.workshop.files import CACHE, provenance, save_json
from cpsample.workshop.neighbours import nearest, typical_distance

SHARES, N = (0, 0.01, 0.05, 0.5), 5000


def planted(work):
    training, real = pixels(load_fashion()[0][:3000]), pixels(load_fashion("test")[0][:N])
    generator, rows = torch.Generator().manual_seed(0), {}
    twice = torch.cat(
        [training, training[:1000] + 0.02 * torch.randn(training[:1000].shape, generator=generator)]
    )
    for name, x in (("training", training), ("with duplicates", twice)):
        groups, refs, f_refs = duplicate_groups(x, typical_distance(x) / 3), x, features(x)
        rows[name] = {"images": len(x), "different": len(groups.unique()), "found": {}}
        for change in CHANGES:
            for share in SHARES:
                copies, _ = (
                    plant(training, share * N / len(training), change, generator)
                    if share
                    else (training[:0], None)
                )
                x = torch.cat([copies, real[len(copies) :]])
                found = {
                    test: report.numbers()
                    for test, report in copy_reports(x, refs, groups, features(x), f_refs)[
                        0
                    ].items()
                }
                rows[name]["found"].setdefault(change, {})[str(share)] = found
                print(
                    name, change, share, {test: f["words"] for test, f in found.items()}, flush=True
                )
    return {"n": N, "seed": 0, "false_alarms": rows["training"]["found"]["exact"]["0"], **rows}


def large(work, n=10_000, N=50_000):
    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    def images(k, seed):
        "Smooth random colour images: noise of several sizes, so that a few directions matter more than others, as in photographs."
        g, x = torch.Generator().manual_seed(seed), torch.zeros(k, 3, 32, 32)
        for part in x.split(2000):
            for s in (2, 4, 8, 32):
                part += (
                    torch.nn.functional.interpolate(
                        torch.randn(len(part), 3, s, s, generator=g), (32, 32), mode="bilinear"
                    )
                    / 4
                )
        return x.clamp_(-1, 1)

    x, training = images(n, 1), images(N, 0)
    x[:500] = training[:500]

    def product():
        for part in x.split(500):
            part.flatten(1) @ training.flatten(1).T

    audit(x[:100], training[:1000], space="pca-64")  # libraries are loaded before the clock starts
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found = {
        "images": [n, N],
        "shape": [3, 32, 32],
        "product_seconds": [],
        "audit_seconds": [],
        "audit_mirrored_seconds": [],
        "data_gb": base,
    }
    for _ in range(3):
        found["product_seconds"].append(seconds(product))
        found["audit_seconds"].append(
            seconds(lambda: audit(x, training, space="pca-64", flips=False))
        )
        print(found, flush=True)
    found["audit_mirrored_seconds"].append(seconds(lambda: audit(x, training, space="pca-64")))
    ratios = {
        "audit": sorted(b / a for a, b in zip(found["product_seconds"], found["audit_seconds"])),
        "audit_mirrored": [
            found["audit_mirrored_seconds"][0] / sorted(found["product_seconds"])[1]
        ],
    }
    growth, few = {}, x[:1000]
    for k in (1000, 2000, 5000, 10_000, 20_000, 50_000):
        part = training[:k]
        growth[str(k)] = [
            seconds(lambda: nearest(few, part, 2)),
            seconds(lambda: few.flatten(1) @ part.flatten(1).T),
        ]
    return found | {
        "ratio": ratios["audit"][1],
        "ratios": ratios,
        "nearest_and_product_seconds": growth,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def models(work):
    rows = {}
    for name, seed, arms_of in (("digits", 0, digits_arms), ("fashion", 0, fashion_arms)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UncalibratedGuardWarning)
            members, others, arms, guard, _ = arms_of(seed)
        if name == "digits":
            held_out = others
        else:
            held_out = pixels(load_fashion("test")[0][:2000])
        folder = work / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for arm, model in arms.items():
            make = partial(
                generate,
                model,
                guard.schedule,
                members.shape[1:],
                DRAWN,
                STEPS[name],
                seed=7000,
                chunk=500,
                progress=True,
            )
            x = kept(folder / f"{arm}-samples.safetensors", lambda: {"x": make()})["x"]
            rows.setdefault(name, {})[arm] = audit(x, members, held_out).record
            print(
                name,
                arm,
                {test: rows[name][arm]["tests"][test]["words"] for test in TESTS},
                flush=True,
            )
    return rows


if __name__ == "__main__":
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "membership"
    words = [w for w in words if w != "--work"]
    path, origin = (
        Path(__file__).resolve().parent.parent / "data" / "results" / "audit.json",
        provenance(),
    )
    for part in (planted, large, models):
        if words and part.__name__ not in words:
            continue
        start, result = time.perf_counter(), part(work)
        parts = (
            {k: v for k, v in json.loads(path.read_text()).items() if k != "name"}
            if path.exists()
            else {}
        )  # each says where it comes from
        made = {
            "command": f"python tools/audit.py {part.__name__}",
            **origin,
            "seconds": time.perf_counter() - start,
        }
        save_json(path, {"name": "audit"} | parts | {part.__name__: made | result})
