"""The small text-to-image pipeline of chapter 4.6 and its guard, into data/collapse, and its numbers, into data/results/stable_diffusion.json:
python tools/stable_diffusion.py [train] [guard] [measure] [--work FOLDER]

The code is that of the cells of nbs/4_production/06_stable_diffusion.ipynb that begin with "# collapse". Trainings keep checkpoints in FOLDER (default: the cache) and go on from them.
"""

import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import torch

from cpsample.core.guard_files import load_guard, save_guard
from cpsample.core.images import pixels
from cpsample.practice.datasets import read_idx, write_idx
from cpsample.workshop.files import CACHE, provenance, save_json

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "collapse"
STRENGTHS, CHOOSING, REPORTED, SCALE, STEPS, ANSWERS = (
    (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0),
    100,
    (0, 1, 2),
    7.5,
    50,
    200,
)
GUARDS = {
    "each picture once, below t = 400": (0, 400),
    "each picture once, at all levels": (
        0,
        1000,
    ),  # the repeats that it learns (None: as the chapter says), t_max
    "with repeats, below t = 400": (None, 400),
    "with repeats, at all levels": (None, 1000),
}
SCHEDULERS = {
    "DDPM": {"clip_sample": False},
    "DDIM": {"clip_sample": False},
    "PNDM": {"skip_prk_steps": True},
    "DPMSolverMultistep": {},
    "DPMSolverSinglestep": {},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "HeunDiscrete": {},
    "LMSDiscrete": {},
    "KDPM2Discrete": {},
    "UniPCMultistep": {},
}


def chapter():
    "The shared cells of chapter 4.6, as a dict of names."
    space = {}
    for cell in json.loads(
        (ROOT / "nbs" / "4_production" / "06_stable_diffusion.ipynb").read_text(encoding="utf-8")
    )["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("# collapse"):
            exec(source, space)
    return space


def made(name, book, origin, start, **more):
    "Note how a part of data/collapse was made."
    path = DATA / "made.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    save_json(
        path,
        record
        | {
            name: {
                "command": f"python tools/stable_diffusion.py {name}",
                **origin,
                "seed": 0,
                **more,
                "seconds": time.perf_counter() - start,
            }
        },
    )


def train(book, work, origin):
    "The pipeline at full size, in half precision, as `StableDiffusionPipeline.from_pretrained` reads it, and the pictures that it was fine-tuned on."
    start = time.perf_counter()
    pipe, losses = book["make_pipeline"](book["SMALL"], work, True)
    pipe.to(dtype=torch.float16).save_pretrained(DATA)
    write_idx(
        DATA / "members-idx3-ubyte.xz",
        ((book["pictures"](book["SMALL"])[2]["members"][:, :, 2:30, 2:30] + 1) * 127.5).round(),
    )
    made(
        "train",
        book,
        origin,
        start,
        size=vars(book["SMALL"]),
        losses={
            name: sum(values[-100:]) / 100 for name, values in zip(("vae", "base", "tuned"), losses)
        },
    )


def shipped(book):
    "(the pipeline in data/collapse, its members as it could draw them)."
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(DATA, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, book["as_drawn"](pipe, pixels(read_idx(DATA / "members-idx3-ubyte.xz")[:, None]))


def others(book, pipe, kind):
    "Two thousand pictures of a class as the pipeline could draw them, none of which the guard has seen and none of the two hundred."
    x, y, bags = book["pictures"](book["SMALL"])
    return book["as_drawn"](
        pipe, (bags["rest"] if kind == book["BAG"] else x[y == kind])[:2000, :, 2:30, 2:30]
    )


def guard(book, work, origin):
    """The guard, its weights rounded to half precision. Chosen on the seed that chooses, among guards that learned the pictures in different ways and strengths of the push:
    what comes nearest to other bags while leaving at most one copy in a hundred. Of each way the first ten answers at its best are kept, too."""
    start, (pipe, members) = time.perf_counter(), shipped(book)
    bag, real, tried, made_by, answers = (
        book["BAG"],
        others(book, pipe, book["BAG"])[:1000],
        [],
        {},
        {},
    )
    for way, (repeats, t_max) in GUARDS.items():
        own = made_by[way] = book["make_guard"](
            pipe, book["SMALL"], work / f"guard-{repeats}-{t_max}", repeats, t_max, True
        )
        own.classifier.half().float()
        for strength in STRENGTHS:
            answers[way, strength] = x = book["ask"](
                pipe,
                book["CAPTIONS"][bag],
                ANSWERS,
                CHOOSING,
                STEPS,
                SCALE,
                replace(own, scale=strength * own.scale),
            )
            tried.append(
                {
                    "guard": way,
                    "strength": strength,
                    "s": strength * own.scale,
                    **book["described"](x, bag, members, real),
                }
            )
            print(tried[-1], flush=True)

    def best(rows):
        return min(
            rows, key=lambda t: (0, t["fd"]) if t["copies"] <= 0.01 * t["n"] else (1, t["copies"])
        )

    bests = [best([t for t in tried if t["guard"] == way]) for way in GUARDS]
    chosen = best(bests)
    own = made_by[chosen["guard"]]
    own.scale = chosen["s"]
    own.classifier.half()
    save_guard(own, DATA / "guard")
    for path in (DATA / "guard.safetensors", DATA / "guard.json"):
        path.chmod(0o644)  # these pictures are public
    write_idx(
        DATA / "answers-idx3-ubyte.xz",
        torch.cat([((answers[t["guard"], t["strength"]][:10] + 1) * 127.5).round() for t in bests]),
    )
    made(
        "guard",
        book,
        origin,
        start,
        choosing=CHOOSING,
        tried=tried,
        best=[tried.index(t) for t in bests],
        chosen=tried.index(chosen),
    )


def measure(book, work, origin):
    "Every caption on three seeds, and the collapsed one under each scheduler, unguarded and guarded."
    start, (pipe, members), own = time.perf_counter(), shipped(book), load_guard(DATA / "guard")
    arms, schedulers, real = {"unguarded": {}, "guarded": {}}, {}, others(book, pipe, book["BAG"])
    bags = [
        book["described"](x, book["BAG"], members, real[1000:])
        for x in real[: len(REPORTED) * ANSWERS].split(ANSWERS)
    ]  # what real ones would measure
    for kind, caption in enumerate(book["CAPTIONS"]):
        real = others(book, pipe, kind)[1000:]
        for arm in arms:
            answers = [
                book["ask"](
                    pipe, caption, ANSWERS, seed, STEPS, SCALE, own if arm == "guarded" else None
                )
                for seed in REPORTED
            ]
            arms[arm][caption] = [
                book["described"](x, kind, members, real) | {"seed": seed}
                for x, seed in zip(answers, REPORTED)
            ]
            print(arm, caption, arms[arm][caption], flush=True)
    for name, options in SCHEDULERS.items():
        pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(
            pipe.scheduler.config, **options
        )
        ask = [
            book["ask"](pipe, book["CAPTIONS"][book["BAG"]], 60, 0, STEPS, SCALE, g)
            for g in (None, own)
        ]
        schedulers[name] = {
            arm: book["described"](x, book["BAG"], members) for arm, x in zip(arms, ask)
        }
        print(name, schedulers[name], flush=True)
    record = {
        "seeds": list(REPORTED),
        "scale": SCALE,
        "steps": STEPS,
        "alpha": own.alpha,
        "s": own.scale,
        "real_bags": bags,
        "arms": arms,
        "schedulers": schedulers,
    }
    save_json(
        ROOT / "data" / "results" / "stable_diffusion.json",
        {
            "name": "stable_diffusion",
            "command": "python tools/stable_diffusion.py measure",
            **origin,
            **record,
            "seconds": time.perf_counter() - start,
        },
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "collapse"
    work.mkdir(parents=True, exist_ok=True)
    book, origin = chapter(), provenance()
    for name in [w for w in words if not w.startswith("--")] or ["train", "guard", "measure"]:
        {"train": train, "guard": guard, "measure": measure}[name](book, work, origin)
