"""Every protection in one table, into data/results/comparison.json: python tools/comparison.py [digits] [bags] [costs] [growth] [--seed S] [--work FOLDER]

digits, bags:   six settings per method on seed 100, the chosen ones on seeds 0, 1 and 2. The code is that of the cells of nbs/3_judgement/07_comparison.ipynb that
                begin with "# comparison". Every trial is kept in FOLDER with its samples (default: the cache), so that a run that was stopped goes on. With --seed only
                the trials of that seed are done and no result is written: with 100 done first, the others can run side by side.
costs:           what the chosen settings cost: training in FLOPs, sampling time beside the unguarded model's in interleaved pairs. Run it alone.
growth:          seconds and memory of sampling as the training set grows from 10² to 10⁶ images, each in a process of its own (Linux). Run it alone.
"""

import json
import statistics
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from cpsample.core.guard import UncalibratedGuardWarning
from cpsample.workshop.files import CACHE, atomic, provenance, save_json

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "data" / "results" / "comparison.json"
CHOOSING, REPORTED = 100, (0, 1, 2)


@cache
def chapter():
    "The shared cells of chapter 3.7, as a dict of names."
    space = {}
    for cell in json.loads(
        (ROOT / "nbs" / "3_judgement" / "07_comparison.ipynb").read_text(encoding="utf-8")
    )["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("# comparison"):
            exec(source, space)
    return space


@cache
def world(data, seed, work):
    "One world at full size; only the last one is kept in memory."
    world.cache_clear()
    return chapter()["world_of"](seed, chapter()[data.upper()], work)


def compare(data, work, only=None):
    "The part `data` of the result; with `only` a seed, its trials alone, and None."
    book, origin = chapter(), provenance()

    def kept(seed, method, k, setting, attack):
        path = work / f"{data}-{seed}-{method.replace(' ', '-')}-{k}.json"
        if not path.exists() or json.loads(path.read_text())["setting"] != setting:
            start = time.perf_counter()
            found, x = book["trial"](method, setting, world(data, seed, work), attack)
            with atomic(path.with_suffix(".safetensors")) as tmp:
                save_file({"x": x.contiguous()}, tmp)
            save_json(
                path, found | {"seconds": time.perf_counter() - start, "commit": origin["commit"]}
            )
        bar.update()
        return json.loads(path.read_text())

    grids, seeds = book["GRIDS"][data], [s for s in REPORTED if only in (None, s)]
    with tqdm(total=sum(map(len, grids.values())) + len(seeds) * len(grids), desc=data) as bar:
        tuning = {
            method: [kept(CHOOSING, method, k, setting, False) for k, setting in enumerate(grid)]
            for method, grid in grids.items()
        }
        best = {method: book["chosen"](trials)["setting"] for method, trials in tuning.items()}
        rows = [
            {
                method: kept(seed, method, "best", setting, True) | {"seed": seed}
                for method, setting in best.items()
            }
            for seed in seeds
        ]
    if only is not None:
        return None
    keep_samples(data, work, list(best))
    reported = {method: [r[method] for r in rows] for method in best}
    return {
        "seeds": seeds,
        "choosing": CHOOSING,
        "size": vars(book[data.upper()]),
        "tuning": tuning,
        "chosen": best,
        "reported": reported,
    }


def keep_samples(data, work, methods, n=14):
    "The first samples of every method on the first reported seed, and the members, as bytes, for the page."
    book, path = chapter(), RESULT.with_suffix(".safetensors")
    found = load_file(path) if path.exists() else {}
    rows = {"members": book["images_for"](REPORTED[0], book[data.upper()]).members}
    for method in methods:
        rows[method] = load_file(
            work / f"{data}-{REPORTED[0]}-{method.replace(' ', '-')}-best.safetensors"
        )["x"][:n]
    with atomic(path) as tmp:
        save_file(
            found
            | {
                f"{data}, {name}": x.clamp(-1, 1).add(1).mul(127.5).round().byte().contiguous()
                for name, x in rows.items()
            },
            tmp,
        )


def passes(network, rows=4):
    "FLOPs of one image's way through a network and back (forward and backward)."
    x = torch.zeros(rows, *network.config["shape"])
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        network.train().requires_grad_()(x, torch.zeros(rows, dtype=torch.long)).sum().backward()
    network.eval().requires_grad_(False)
    return counter.get_total_flops() / rows


def training_flops(method, setting, w, z):
    "FLOPs of what this method trains, beside the public model: (the denoiser, what is trained on top)."
    plain = z.train_steps * z.batch * passes(w.start())
    guard = lambda preset: (
        z.guard_steps * z.guard_batch * passes(chapter()["guard_of"](preset, w).classifier)
    )
    if method == "early stopping":
        return setting["share"] * plain, 0
    if method.startswith("ambient"):
        return setting["share"] * z.train_steps * z.batch * passes(w.start(setting["missing"])), 0
    if method.startswith("DP-SGD"):
        network = w.start() if z.data == "bags" else chapter()["new_denoiser"](z, 0, small=True)
        public = (
            z.train_steps * z.batch * passes(network)
            if z.data == "digits" and "public" in method
            else 0
        )  # the bags' public model is everybody's
        return setting["steps"] * z.rate * z.images * z.draws * passes(network), public
    preset = {"CPSample": "default", "member guard": "member", "CPSample as printed": "paper"}.get(
        method
    )
    return plain, guard(preset) if preset else 0


def costs(work, pairs=5):
    "Of the settings chosen, in the world of seed 0."
    book, record, found = chapter(), json.loads(RESULT.read_text()), {}
    for data in [name for name in ("digits", "bags") if name in record]:
        w, z, rows = world(data, 0, work), book[data.upper()], {}
        plain = w.model

        def seconds(method, model):
            start = time.perf_counter()
            book["images_of"](method, model, w)
            return time.perf_counter() - start

        seconds("unguarded", plain)
        for method, setting in record[data]["chosen"].items():
            if method in ("real images", "public model"):
                continue
            model = book["denoiser_of"](method, setting, w)
            ratios = [seconds(method, model) / seconds("unguarded", plain) for _ in range(pairs)]
            denoiser, extra = training_flops(method, setting, w, z)
            rows[method] = {
                "sampling": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "denoiser_flops": denoiser,
                "extra_flops": extra,
            }
            print(data, method, rows[method], flush=True)
        found[data] = {
            "drawn": z.drawn,
            "pairs": pairs,
            "seconds_unguarded": seconds("unguarded", plain),
            "rows": rows,
        }
    return found


GROW = """
import json, re, sys, time
import torch
from cpsample.judgement.baselines import similarity_guidance, spell
from cpsample.core.classifier import MLPClassifier
from cpsample.core.ddpm import MLPDenoiser, generate, seeded
from cpsample.core.copying import copy_test
from cpsample.core.guard import UncalibratedGuardWarning, Guard, protect
from cpsample.core.schedule import make_schedule
from cpsample.practice.unet import UNet, UNetClassifier

data, method, N = sys.argv[1], sys.argv[2], int(sys.argv[3])
shape = {"digits": (1, 8, 8), "bags": (1, 28, 28)}[data]
schedule = make_schedule()
model = seeded(0, lambda: MLPDenoiser(shape) if data == "digits" else UNet(shape, 16)).eval().requires_grad_(False)
x = torch.empty(100 if method in ("unguarded", "guard") else N, *shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
if method == "guard":                                       # open at every level and certain of everything, so that it works on every row in every step
    classifier = (MLPClassifier(shape) if data == "digits" else UNetClassifier(shape, 8, 16, (1, 3))).eval().requires_grad_(False)
    torch.nn.init.ones_(classifier.out.bias)
    guard = Guard(classifier, schedule, alpha=0.499, scale=1.0, form="toward", t_max=1000, made={}, report={"alpha": 0.499})
    protected = protect(model, guard)
    draw(protected, schedule, shape, 10, 20)
    assert protected.rows_pushed == protected.rows_seen
make = {"unguarded": lambda: model, "rejection": lambda: model, "guard": lambda: protect(model, guard), "SPELL": lambda: spell(model, schedule, x, 1.0),
        "similarity guidance": lambda: similarity_guidance(model, schedule, x, 10.0, 1.0)}[method]
def once():
    start, images = time.perf_counter(), draw(make(), schedule, shape, 100, 20, seed=1)
    if method == "rejection": copy_test(images, x)
    return time.perf_counter() - start
once()
times = sorted(once() for _ in range(7 if N < 10**5 else 3))
print(json.dumps({"seconds": times[len(times) // 2], "min": times[0], "max": times[-1], "peak_gb": int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e6}))
"""


def growth(work):
    rows = {}
    for data, sizes in (("digits", (10**2, 10**3, 10**4, 10**5, 10**6)), ("bags", (10**2,))):
        for method in ("unguarded", "guard", "SPELL", "similarity guidance", "rejection"):
            for N in sizes:
                found = subprocess.run(
                    [sys.executable, "-c", GROW, data, method, str(N)],
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                )
                if found.returncode:
                    raise SystemExit(
                        f"growth of {method} at {N} images failed: {found.stderr.strip().splitlines()[-1]}"
                    )
                rows.setdefault(data, {}).setdefault(method, {})[str(N)] = json.loads(found.stdout)
                print(data, method, N, found.stdout.strip(), flush=True)
    return {"drawn": 100, "steps": 20, "rows": rows}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UncalibratedGuardWarning)
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "comparison"
    only = int(words.pop(words.index("--seed") + 1)) if "--seed" in words else None
    names, origin = (
        [w for w in words if not w.startswith("--")] or ["digits", "bags", "costs", "growth"],
        provenance(),
    )
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        last = json.loads(RESULT.read_text()).get(name) if RESULT.exists() else None
        if last:
            print(
                f"{name}: {last['seconds'] / 60:.0f} minutes of one core when last measured, on {last['hardware']}"
            )
        start = time.perf_counter()
        result = (
            {"costs": costs, "growth": growth}[name](work)
            if name in ("costs", "growth")
            else compare(name, work, only)
        )
        if result is None:
            continue
        trials = [
            t
            for group in ("tuning", "reported")
            for rows in result.get(group, {}).values()
            for t in rows
        ]
        made = {
            "command": f"python tools/comparison.py {name}",
            **origin,
            "seconds": sum(t["seconds"] for t in trials) or time.perf_counter() - start,
        }
        parts = (
            {k: v for k, v in json.loads(RESULT.read_text()).items() if k != "name"}
            if RESULT.exists()
            else {}
        )
        save_json(RESULT, {"name": "comparison"} | parts | {name: made | result})
