"""Every protection in one table: python tools/comparison.py [digits | growth] [--work FOLDER], into data/results/comparison.json.

digits: six settings per method on seed 100, the chosen ones on seeds 0, 1 and 2; the code is that of the cells of nbs/13_comparison.ipynb that begin
        with "# comparison". Every trial is kept in FOLDER (default: the cache), so that a run that was stopped goes on.
growth: seconds and memory per sample as the training set grows from 10² to 10⁶ images, each in a process of its own.
"""
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

from tqdm.auto import tqdm

from cpsample.data import save_json
from cpsample.demo import provenance
from cpsample.sources import CACHE

ROOT = Path(__file__).resolve().parent.parent
CHOOSING, REPORTED = 100, (0, 1, 2)


def chapter():
    "The shared cells of chapter 13, as a namespace."
    space = {}
    for cell in json.loads((ROOT / "nbs" / "13_comparison.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("# comparison"): exec(source, space)
    return space


def digits(work):
    book, worlds = chapter(), {}
    def world(seed):
        if seed not in worlds:
            worlds.clear()                      # one at a time
            worlds[seed] = book["world_of"](seed)
        return worlds[seed]
    def kept(seed, method, k, setting, attack):
        path = work / f"digits-{seed}-{method.replace(' ', '-')}-{k}{'-attacked' if attack else ''}.json"
        if not path.exists(): save_json(path, book["trial"](method, setting, world(seed), attack) | {"world_seconds": world(seed).seconds})
        return json.loads(path.read_text())
    jobs = sum(map(len, book["GRIDS"].values())) + len(REPORTED) * len(book["GRIDS"])
    with tqdm(total=jobs, desc="comparison") as bar:
        tuning, best, reported = {}, {}, {}
        def step(*job):
            found = kept(*job)
            bar.update()
            return found
        for method, grid in book["GRIDS"].items():
            tuning[method] = [step(CHOOSING, method, k, setting, False) for k, setting in enumerate(grid)]
            best[method] = book["chosen"](tuning[method])["setting"]
        for seed in REPORTED:
            for method, setting in best.items(): reported.setdefault(method, []).append(step(seed, method, "best", setting, True) | {"seed": seed})
    return {"seeds": list(REPORTED), "choosing": CHOOSING, "size": vars(book["FULL"]), "tuning": tuning, "chosen": best, "reported": reported}


GROW = """
import json, resource, sys, time
import torch
from cpsample.baselines import similarity_guidance, spell
from cpsample.ddpm import MLPDenoiser, draw, seeded
from cpsample.memorization import copy_test
from cpsample.protect import fit_guard, protect
from cpsample.schedule import make_schedule

method, N = sys.argv[1], int(sys.argv[2])
schedule, model = make_schedule(), seeded(0, lambda: MLPDenoiser((1, 8, 8))).eval().requires_grad_(False)
x = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
guard = fit_guard(x[:100], schedule, steps=1, alpha=0.499) if method == "guard" else None     # all but open: it pushes nearly every row
if guard is not None: del x                                                                    # a guard needs no training set any more
make = {"unguarded": lambda: model, "rejection": lambda: model, "guard": lambda: protect(model, guard), "SPELL": lambda: spell(model, schedule, x, 1.0),
        "similarity guidance": lambda: similarity_guidance(model, schedule, x, 10.0, 1.0)}[method]
def once():
    start, images = time.perf_counter(), draw(make(), schedule, (1, 8, 8), 100, 20, seed=1)
    if method == "rejection": copy_test(images, x)
    return time.perf_counter() - start
once()
times = sorted(once() for _ in range(5 if N < 10**5 else 3))
print(json.dumps({"seconds": times[len(times) // 2], "min": times[0], "max": times[-1], "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""


def growth(work):
    rows = {}
    for method in ("unguarded", "guard", "SPELL", "similarity guidance", "rejection"):
        for N in (10**2, 10**3, 10**4, 10**5, 10**6):
            found = subprocess.run([sys.executable, "-c", GROW, method, str(N)], capture_output=True, text=True, check=True, cwd=ROOT)
            rows.setdefault(method, {})[str(N)] = json.loads(found.stdout)
            print(method, N, rows[method][str(N)], flush=True)
    return {"images_drawn": 100, "steps": 20, "rows": rows}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "nobody has measured")
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "comparison"
    words = [w for w in words if w != "--work"]
    work.mkdir(parents=True, exist_ok=True)
    path, origin = ROOT / "data" / "results" / "comparison.json", provenance()
    for part in (digits, growth):
        if words and part.__name__ not in words: continue
        start, result = time.perf_counter(), part(work)
        parts = {k: v for k, v in json.loads(path.read_text()).items() if k != "name"} if path.exists() else {}
        made = {"command": f"python tools/comparison.py {part.__name__}", **origin, "seconds": time.perf_counter() - start}
        save_json(path, {"name": "comparison"} | parts | {part.__name__: made | result})
