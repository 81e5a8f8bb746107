"""Who was in the training set: every attack on the models of the demo and of chapter 2.7, into data/results/membership.json.

python tools/membership.py [digits | fashion] [--work FOLDER]

digits: the demo's models of seeds 0, 1, 2, trained again; members against the held-out images that calibration did not use.
fashion: the shipped models of `tools/fashion.py reported`; members against OTHERS images of the training rows 3,000 to 5,999, which the base
saw as often as the members and which neither fine-tuning nor the guard ever saw. The base before fine-tuning is the control: it treats both alike.
Arms: the unguarded model, the guard as it is sampled with in those experiments, the paper's as printed. The scores of every arm are kept in FOLDER
(default: the cache), so that a run that was stopped goes on.
"""

import json
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cpsample.core.calibration import calibrate
from cpsample.core.ddpm import generate
from cpsample.core.demo import DEFAULTS, fit_denoiser
from cpsample.core.guard import UncalibratedGuardWarning, fit_guard, protect
from cpsample.core.guard_files import load_guard
from cpsample.core.images import load_digits, pixels, split
from cpsample.core.schedule import make_schedule
from cpsample.judgement.attacks import attacks, guard_attacks, nearest_sample_attack, scores_of
from cpsample.judgement.inference import auc, infer, loss_test, verdicts
from cpsample.practice.datasets import load_fashion
from cpsample.practice.runs import load_model
from cpsample.workshop.files import CACHE, atomic, data_path, provenance, save_json

OTHERS, DRAWN, STEPS = 2000, 1000, {"digits": 100, "fashion": 50}
PLAIN = (
    "loss, t=50",
    "loss, t=100",
    "loss, t=200",
    "loss, t=300",
    "SecMI",
    "PIA",
    "PIAN",
    "SimA",
    "PFAMI",
)


def digits_arms(seed):
    "(members, others, {arm: model}, guard, split) of the demo's run with this seed."
    schedule, (x, _) = make_schedule(), load_digits()
    parts = split(
        x,
        {"members": DEFAULTS["images"], "reference": DEFAULTS["reference"], "held_out": None},
        seed,
    )
    members, reference, held_out = (parts.of(x, name) for name in parts.indices)
    guard = fit_guard(members, schedule, reference, steps=DEFAULTS["guard_steps"], seed=seed)
    calibrate(guard, members, held_out[::2])
    paper = fit_guard(members, schedule, preset="paper", steps=DEFAULTS["guard_steps"], seed=seed)
    model = fit_denoiser(members, schedule, DEFAULTS["train_steps"], seed=seed)
    where = {
        "pool": "digits",
        "seed": seed,
        "data": parts.data,
        "members": parts.indices["members"],
        "others": parts.indices["held_out"][1::2],
    }
    return (
        members,
        held_out[1::2],
        {"unguarded": model, "guarded": protect(model, guard), "paper": protect(model, paper)},
        guard,
        where,
    )


def fashion_arms(seed):
    "The same of the shipped models."

    def weights(name):
        return data_path(f"weights/fashion_{name}.safetensors")

    def guard_of(name):
        guard = load_guard(str(weights(name)).removesuffix(".safetensors"))
        guard.classifier.to(memory_format=torch.channels_last)
        return guard

    images = load_fashion()[0]
    parts = split(images[:3000], {"members": 100, "others": None}, seed)
    members, others = (
        pixels(parts.of(images[:3000], "members")),
        pixels(images[3000 : 3000 + OTHERS]),
    )
    base, model = (
        load_model(weights(name))[0].to(memory_format=torch.channels_last)
        for name in ("base", "tuned")
    )
    guard, strength = (
        guard_of("guard"),
        json.loads(data_path("results/fashion.json").read_text())["settings"]["strength"],
    )
    guard = replace(guard, scale=strength * guard.scale)
    where = {
        "pool": "fashion, training rows 0 to 5,999",
        "seed": seed,
        "data": parts.data,
        "members": parts.indices["members"],
        "others": f"rows 3,000 to {2999 + OTHERS:,}",
    }
    return (
        members,
        others,
        {
            "unguarded": model,
            "guarded": protect(model, guard),
            "paper": protect(model, guard_of("guard_paper")),
            "before": base,
        },
        guard,
        where,
    )


def kept(path, make):
    "A dict of tensors from `path`, or from make() and then kept there."
    if not path.exists():
        with atomic(path) as tmp:
            save_file(make(), tmp)
    return load_file(path)


def measured(name, arm, model, guard, members, others, folder):
    "What each attack achieves on one arm, and the best of all that need nothing but the model; scores from `folder` or asked now."
    schedule, start = guard.schedule, time.perf_counter()
    samples = kept(
        folder / f"{arm}-samples.safetensors",
        lambda: {
            "x": generate(
                model,
                schedule,
                members.shape[1:],
                DRAWN,
                STEPS[name],
                seed=7000,
                chunk=500,
                progress=True,
            )
        },
    )["x"]
    collection = (
        attacks(schedule)
        | guard_attacks(schedule, guard)
        | {"nearest sample": partial(nearest_sample_attack, samples=samples)}
    )
    scores = {}
    for attack, ask in collection.items():
        path = folder / f"{arm}-{attack.replace(', ', '-').replace(' ', '-')}.safetensors"
        found = kept(
            path,
            lambda: {
                "members": scores_of(ask, model, members),
                "others": scores_of(ask, model, others),
            },
        )
        scores[attack] = found["members"], found["others"]
        print(
            f"{name} {arm:10} {attack:15} {auc(*scores[attack], boots=1)[0]:.3f}   {time.perf_counter() - start:6.0f} s",
            flush=True,
        )
    statistic, p = loss_test(*scores["loss, t=100"])
    best = {
        who: infer({a: scores[a] for a in names})
        for who, names in {"best": PLAIN, "best_aware": (*PLAIN, "size", "jump")}.items()
    }
    found = verdicts(scores)
    return {
        "attacks": {a: found[a] for a in scores},
        "loss_test": {"statistic": statistic, "p": p},
    } | best


def run(name, seeds, work):
    runs = []
    for seed in seeds:
        folder = work / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UncalibratedGuardWarning
            )  # the paper's guard, as printed
            members, others, arms, guard, where = {"digits": digits_arms, "fashion": fashion_arms}[
                name
            ](seed)
        runs.append(
            {
                "seed": seed,
                "split": where,
                "n_members": len(members),
                "n_others": len(others),
                "arms": {
                    arm: measured(name, arm, model, guard, members, others, folder)
                    for arm, model in arms.items()
                },
            }
        )
    return {"runs": runs, "samples": DRAWN, "steps": STEPS[name]}


if __name__ == "__main__":
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "membership"
    path, origin = (
        Path(__file__).resolve().parent.parent / "data" / "results" / "membership.json",
        provenance(),
    )
    for name, seeds in (("digits", (0, 1, 2)), ("fashion", (0,))):
        if words and words[0] in ("digits", "fashion") and name not in words:
            continue
        start, result = time.perf_counter(), run(name, seeds, work)
        parts = (
            {k: v for k, v in json.loads(path.read_text()).items() if k != "name"}
            if path.exists()
            else {}
        )  # each says where it comes from
        save_json(
            path,
            {"name": "membership"}
            | parts
            | {
                name: {
                    "command": f"python tools/membership.py {name}",
                    **origin,
                    "seconds": time.perf_counter() - start,
                }
                | result
            },
        )
