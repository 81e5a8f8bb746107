"""The main experiment on Fashion-MNIST, into data/results/fashion.json: python tools/fashion.py [choosing | reported] [--work FOLDER]

1. base: the configuration `fashion`, trained on all 60,000 training images
2. a fine-tuned model: the base, trained further on MEMBERS images, until it copies
3. its guards: the default one (eight labels, ½ on other images, calibrated) and the paper's (one label, as printed)
4. N samples for each arm: unguarded, exact rejection of copies, the paper's guard, the default guard
5. copies by three tests, distances, compute

`choosing` takes its members from the rows 3,000 to 5,999 of the training part, `reported` from the rows 0 to 2,999, which ship with the
project. Every stage leaves its files in FOLDER (default: the cache) and is not done again; a stage that was killed goes on.
"""
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from cpsample.cli import draw_images
from cpsample.data import atomic, pixels, save_json, split
from cpsample.demo import provenance
from cpsample.memorization import carlini_test, copy_test, cosine_test, reject
from cpsample.protect import load_guard, protect
from cpsample.quality import features, quality
from cpsample.sources import CACHE, load_fashion
from cpsample.training import CONFIGS, load_model, train_denoiser, train_guard

N, MEMBERS, CHUNK = 5000, 200, 500
SPLITS = {"choosing": (range(3000, 6000), 100), "reported": (range(0, 3000), 0)}
CONFIG = CONFIGS["fashion"]
TUNE = replace(CONFIG, steps=3000, warmup=100)
GUARDS = {"default": "guard", "paper": "paper"}


def base(work):
    "The model before fine-tuning, and the seconds that it took when trained in one go."
    folder = work / "base"
    folder.mkdir(parents=True, exist_ok=True)
    return stage(folder / "model.safetensors", lambda: train_denoiser(CONFIG, load_fashion()[0], folder))


def stage(path, make):
    "Run make() unless `path` is there; keep how long it took beside it."
    if not path.exists():
        start = time.perf_counter()
        make()
        save_json(path.with_suffix(".seconds.json"), {"seconds": time.perf_counter() - start})
    clock = path.with_suffix(".seconds.json")
    return json.loads(clock.read_text())["seconds"] if clock.exists() else None


def parts_of(name):
    rows, seed = SPLITS[name]
    pool = load_fashion()[0][rows.start : rows.stop]
    parts = split(pool, {"members": MEMBERS, "others": None}, seed)
    return parts.of(pool, "members"), parts.of(pool, "others"), seed


def kept(path, make):
    "Images from `path`, or from make() and then kept there."
    if not path.exists():
        start = time.perf_counter()
        x, about = make()
        with atomic(path) as tmp: save_file({"x": x.contiguous()}, tmp)
        save_json(path.with_suffix(".json"), about | {"seconds": time.perf_counter() - start})
    return load_file(path)["x"], json.loads(path.with_suffix(".json").read_text())


def arms(work, model, schedule, members, seed):
    "{arm: (images, about)}; unguarded and guarded arms start from the same noise."
    shape, steps = members.shape[1:], CONFIG.sample_steps
    def draw(denoiser, n, seed): return draw_images(denoiser, schedule, shape, n, steps, seed, chunk=CHUNK, progress=True)
    def guarded(name):
        protected = protect(model, load_guard(work / name))
        return draw(protected, N, seed), {"certain": protected.certain / protected.rows, "settings": {k: getattr(protected.guard, k) for k in ("alpha", "scale", "form", "t_max")}}
    def rejection():
        "The unguarded images, and as many more as are needed to have N that are no copies."
        seeds = iter(range(1000 * seed + 1, 1000 * seed + 1000))
        first = [found["unguarded"][0]]
        x, accepted, drawn = reject(lambda: first.pop() if first else draw(model, CHUNK, next(seeds)), lambda x: ~copy_test(x, members).copied, N)
        return x, {"accepted": accepted / drawn}
    found = {"unguarded": kept(work / "samples-unguarded.safetensors", lambda: (draw(model, N, seed), {}))}
    found["rejection"] = kept(work / "samples-rejection.safetensors", rejection)
    for arm, name in (("paper", "paper"), ("guarded", "guard")): found[arm] = kept(work / f"samples-{arm}.safetensors", lambda name=name: guarded(name))
    return found


def measured(x, members, real, baseline):
    "Copies by three tests and all measures of images x; cosine similarity in the space of the distances, with the paper's threshold."
    tests = {"": copy_test(x, members), "_carlini": carlini_test(x, members), "_cosine": cosine_test(features(x), features(members))}
    counts = {}
    for name, report in tests.items(): counts |= {f"copies{name}": report.copies, f"copy_rate{name}": report.rate, f"copy_ci{name}": list(report.ci)}
    return {"n": len(x)} | counts | quality(x, real, members, baseline)


def flops(network, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        network(x[:1], torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def pair_times(model, schedule, guard, pairs=5, n=250):
    "Sampling time over the unguarded one, median and range of interleaved pairs: the guard as it is, and never resting (every level, every row)."
    always = replace(guard, t_max=schedule.T, alpha=0.999 if guard.one_sided else 0.4999)
    found = {"guarded": [], "always_on": []}
    def seconds(denoiser, seed):
        start = time.perf_counter()
        draw_images(denoiser, schedule, model.config["shape"], n, CONFIG.sample_steps, seed)
        return time.perf_counter() - start
    seconds(model, 0)
    for k in range(pairs):
        for name, g in (("guarded", guard), ("always_on", always)): found[name].append(seconds(protect(model, g), k) / seconds(model, k))
    return {name: {"median": statistics.median(v), "min": min(v), "max": max(v), "pairs": pairs} for name, v in found.items()}


def experiment(name, work):
    seconds = {"base": base(work)}
    members, others, seed = parts_of(name)
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    def tune(): train_denoiser(replace(TUNE, seed=seed), members, folder, start=load_model(work / "base" / "model.safetensors")[0])
    seconds["fine_tuning"] = stage(folder / "model.safetensors", tune)
    model, schedule, _ = load_model(folder / "model.safetensors")
    model = model.to(memory_format=torch.channels_last)
    for preset, file in GUARDS.items():
        def train(preset=preset, file=file): train_guard(replace(CONFIG, seed=seed), members, others, schedule, folder / file, preset)
        seconds[file] = stage(folder / f"{file}.safetensors", train)
    drawn = arms(folder, model, schedule, pixels(members), seed)
    test = pixels(load_fashion("test")[0])
    real, baseline = test[:N], test[N : 2 * N]
    rows = {arm: measured(x, pixels(members), real, baseline) | about for arm, (x, about) in drawn.items()}
    rows["held_out"] = measured(baseline, pixels(members), real, baseline)
    guard = load_guard(folder / "guard")
    cost = {"denoiser": flops(model, real), "guard": flops(guard.classifier, real)}
    trained = {"denoiser": 3 * cost["denoiser"] * CONFIG.batch_size * (CONFIG.steps + TUNE.steps), "guard": 3 * cost["guard"] * CONFIG.guard_batch_size * CONFIG.guard_steps}
    return {"arms": rows, "seconds": seconds, "flops_per_image": cost, "flops_training": trained, "flops_ratio": trained["guard"] / trained["denoiser"],
            "sampling_time": pair_times(model, schedule, guard), "calibration": guard.report}


if __name__ == "__main__":
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "fashion-experiment"
    path, origin = Path(__file__).resolve().parent.parent / "data" / "results" / "fashion.json", provenance()
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"name": "fashion", "command": "python tools/fashion.py", **origin, "feature_space": "fashion-conv-64",
               "settings": {"n": N, "members": MEMBERS, "config": asdict(CONFIG), "tune_steps": TUNE.steps}}
    for name in [w for w in words if w in SPLITS] or list(SPLITS):
        record[name] = experiment(name, work)
        save_json(path, record)
