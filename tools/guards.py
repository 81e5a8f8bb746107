"""Which guard? Every way of training one, every gate and scale, on digits: python tools/guards.py

Seeds 100 and 101 choose, seeds 0, 1 and 2 report. For each seed one denoiser is trained, then one guard per recipe, all for equally
many steps; every (alpha, scale) is drawn from the same noise. Writes data/results/guards.json after each seed.
"""

import itertools
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from cpsample.core.calibration import calibrate
from cpsample.core.copying import copy_test, reject_copies
from cpsample.core.ddpm import generate
from cpsample.core.demo import DEFAULTS, fit_denoiser, measure, pool
from cpsample.core.guard import GUARDS, UncalibratedGuardWarning, fit_guard, protect
from cpsample.core.images import load_digits, split
from cpsample.core.schedule import make_schedule
from cpsample.workshop.files import provenance, save_json

CHOOSING, REPORTED, N = (100, 101), (0, 1, 2), 1000
GRID = list(itertools.product((0.05, 0.2), (20.0, 40.0, 80.0)))
RECIPES = {  # name: (what to take for the target ½, settings of fit_guard)
    **{f"K={K}, ½ on held-out": ("held-out", dict(K=K)) for K in (1, 2, 4, 8, 16)},
    "K=8, members only": (None, {}),
    "K=8, ½ on generated": ("generated", {}),
    "K=8, ½ on noise": ("noise", {}),
    "member or not": ("held-out", dict(preset="member")),
    "K=8, all t": ("held-out", dict(t_max=1000)),
    "K=8, low t more often": ("held-out", dict(t_power=2.0)),
    "K=8, high t more often": ("held-out", dict(t_power=0.5)),
    "K=1, members only, all t (paper)": (None, dict(preset="paper")),
}


def off_the_members(model, schedule, members, reference, seed):
    "What a guard can be told to stay undecided about: held-out images, the model's own images that are no copies, noise."
    generated = generate(model, schedule, members.shape[1:], 2000, 100, 1000 * seed + 500)
    noise = 2 * torch.rand(reference.shape, generator=torch.Generator().manual_seed(seed)) - 1
    return {
        None: None,
        "held-out": reference,
        "noise": noise,
        "generated": generated[~copy_test(generated, members).copied],
    }


def settings_of(guard, members, held_out):
    "Every (setting's name, guard) to draw from: the grid, what calibration chooses with ½, 1 and 2 times its scale, and the paper's own."
    form = "toward" if guard.form == "away" else guard.form
    yield from (
        ((alpha, scale), replace(guard, alpha=alpha, scale=scale, form=form))
        for alpha, scale in GRID
    )
    if guard.form == "away":
        yield ("preset", guard)
    chosen, refused = replace(guard, form=form), None
    try:
        calibrate(chosen, members, held_out)
    except ValueError as error:
        refused = str(error)
    for times in (0.5, 1.0, 2.0):
        yield (f"calibrated, {times:g} s", refused or replace(chosen, scale=times * chosen.scale))


def one_seed(seed):
    "All numbers of one seed: {(recipe, setting): measures}."
    schedule, (x, _) = make_schedule(), load_digits()
    parts = split(x, {"members": 100, "reference": 697, "held_out": None}, seed)
    members, reference, held_out = (parts.of(x, name) for name in parts.indices)
    model = fit_denoiser(members, schedule, DEFAULTS["train_steps"], seed=seed)

    def images(denoiser, seed=1000 * seed):
        return generate(denoiser, schedule, members.shape[1:], N, 100, seed)

    noises = itertools.count(1000 * seed)
    plain, rejected = (
        images(model),
        reject_copies(lambda: images(model, next(noises)), members, N)[0],
    )
    found, copies = (
        {("unguarded", "-"): measure(plain, members, held_out)},
        plain[copy_test(plain, members).copied],
    )
    for kept in (0, 10, 20, 50, 100, 200, 400):
        found["rejection", kept] = measure(
            torch.cat([rejected[kept:], copies[:kept]]), members, held_out
        )
    off = off_the_members(model, schedule, members, reference, seed)
    for name, (rest, how) in tqdm(RECIPES.items(), desc=f"seed {seed}"):
        start = time.perf_counter()
        guard = fit_guard(
            members, schedule, off[rest], steps=DEFAULTS["guard_steps"], seed=seed, **how
        )
        seconds = time.perf_counter() - start
        for setting, chosen in settings_of(guard, members, held_out):
            if isinstance(chosen, str):
                found[name, setting] = {"refused": chosen}
                continue
            protected = protect(model, chosen)
            found[name, setting] = measure(images(protected), members, held_out) | {
                "certain": protected.rows_pushed / protected.rows_seen,
                "alpha": chosen.alpha,
                "scale": chosen.scale,
                "form": chosen.form,
                "t_max": chosen.t_max,
                "guard_seconds": seconds,
            }
    return found


def pooled(runs, seeds):
    "One row per (recipe, setting): counts added, distances and shares averaged over the seeds."
    rows = []
    for recipe, setting in runs[seeds[0]]:
        each = [runs[seed][recipe, setting] for seed in seeds]
        row = {"recipe": recipe, "setting": setting}
        if any("refused" in r for r in each):
            rows.append(row | {"refused": [r.get("refused") for r in each]})
            continue
        rest = {
            k: [r[k] for r in each]
            for k in ("alpha", "scale", "t_max", "guard_seconds")
            if k in each[0]
        }
        whole = pool(
            [
                r | {"fd_held_out": 0.0, "seconds": 0.0, "certain": r.get("certain", 0.0)}
                for r in each
            ]
        )
        rows.append(
            row
            | {k: v for k, v in whole.items() if k not in ("fd_held_out", "seconds", "settings")}
            | rest
        )
    return rows


if __name__ == "__main__":
    warnings.filterwarnings(
        "ignore", category=UncalibratedGuardWarning
    )  # the grid is drawn without calibrating every point of it
    runs, origin, path = (
        {},
        provenance(),
        Path(__file__).resolve().parent.parent / "data" / "results" / "guards.json",
    )
    for seed in CHOOSING + REPORTED:
        runs[seed] = one_seed(seed)
        parts = {
            name: {"seeds": done, "rows": pooled(runs, done)}
            for name, seeds in (("choosing", CHOOSING), ("reported", REPORTED))
            if (done := [s for s in seeds if s in runs])
        }
        settings = {"n": N, "steps": DEFAULTS["guard_steps"]} | GUARDS["default"]
        save_json(
            path,
            {
                "name": "guards",
                "command": "python tools/guards.py",
                **origin,
                "seeds": list(REPORTED),
                "settings": settings,
                **parts,
            },
        )
