"""How the demo's settings were chosen, on seeds that no reported number uses: python tools/choose.py

For each tuning seed one denoiser and three guards are trained; every (alpha, scale) is then drawn from the same noise.
Writes data/results/choice.json.
"""
import itertools
from pathlib import Path

from tqdm.auto import tqdm

from cpsample.data import load_images, save_json, split
from cpsample.demo import DEFAULTS, draw, draw_arms, fit_denoiser, measure, provenance
from cpsample.memorization import proportion_ci
from cpsample.protect import Guard, fit_guard, protect
from cpsample.schedule import make_schedule

SEEDS = (100, 101, 102)
TRAINED = {"K=8, ½ on reference images": dict(K=8, reference=True), "K=1, ½ on reference images": dict(K=1, reference=True), "K=8, members only": dict(K=8, reference=False)}
GRID = list(itertools.product((0.05, 0.2), (5.0, 10.0, 20.0, 30.0, 40.0)))


def one_seed(seed):
    "All arms of one tuning seed: {(guard, alpha, scale): measures}, and those of the two arms without a guard."
    schedule, (x, _) = make_schedule(), load_images("digits")
    parts = split(x, {"members": 100, "reference": 697, "held_out": None}, seed)
    members, reference, held_out = (parts.of(x, name) for name in parts.indices)
    model, found = fit_denoiser(members, schedule, DEFAULTS["train_steps"], seed=seed), {}
    for name, how in TRAINED.items():
        guard = fit_guard(members, schedule, reference if how["reference"] else None, steps=DEFAULTS["guard_steps"], seed=seed, K=how["K"])
        if not found:
            arms, _ = draw_arms(model, guard, members, 1000, 100, seed)
            found = {(arm,): measure(arms[arm][0], members, held_out) for arm in ("unguarded", "rejection")}
        for alpha, scale in tqdm(GRID, desc=f"seed {seed}, {name}"):
            guarded = protect(model, Guard(guard.classifier, schedule, alpha, scale, "toward", guard.t_max))
            images = draw(guarded, schedule, (1000, 1, 8, 8), 100, 1000 * seed)
            found[name, alpha, scale] = measure(images, members, held_out)
    return found


if __name__ == "__main__":
    seeds = [one_seed(seed) for seed in SEEDS]
    rows = []
    for key in seeds[0]:
        runs = [s[key] for s in seeds]
        n, copies = sum(r["n"] for r in runs), sum(r["copies"] for r in runs)
        rows.append({"arm": key[0], **dict(zip(("alpha", "scale"), key[1:])), "n": n, "copies": copies, "copy_ci": list(proportion_ci(copies, n)),
                     "fd": sum(r["fd"] for r in runs) / len(runs), "fd_seeds": [r["fd"] for r in runs]})
    path = Path(__file__).resolve().parent.parent / "data" / "results" / "choice.json"
    save_json(path, {"name": "choice", "command": "python tools/choose.py", **provenance(), "seeds": list(SEEDS), "rows": rows})
    for row in rows: print(row)
