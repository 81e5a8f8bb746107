"""The small text-to-image pipeline of chapter 17, into data/collapse, and its numbers, into data/results/stable_diffusion.json:
python tools/stable_diffusion.py [train] [measure] [--work FOLDER]

The code is that of the cells of nbs/17_stable_diffusion.ipynb that begin with "# collapse". Training keeps checkpoints in FOLDER (default: the cache) and goes on from them.
"""
import json
import sys
import time
from pathlib import Path

import torch

from cpsample.data import save_json
from cpsample.demo import provenance
from cpsample.sources import CACHE

ROOT = Path(__file__).resolve().parent.parent


def chapter():
    "The shared cells of chapter 17, as a dict of names."
    space = {}
    for cell in json.loads((ROOT / "nbs" / "17_stable_diffusion.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("# collapse"): exec(source, space)
    return space


def train(book, work, origin):
    "The pipeline at full size, in half precision, as `StableDiffusionPipeline.from_pretrained` reads it."
    start = time.perf_counter()
    pipe, losses = book["make_pipeline"](book["SMALL"], work, True)
    pipe.to(dtype=torch.float16).save_pretrained(ROOT / "data" / "collapse")
    save_json(ROOT / "data" / "collapse" / "made.json", {"command": "python tools/stable_diffusion.py train", **origin, "seed": 0, "size": vars(book["SMALL"]),
              "losses": {name: sum(values[-100:]) / 100 for name, values in zip(("vae", "base", "tuned"), losses)}, "seconds": time.perf_counter() - start})


if __name__ == "__main__":
    words = sys.argv[1:]
    work = Path(words.pop(words.index("--work") + 1)) if "--work" in words else CACHE / "collapse"
    work.mkdir(parents=True, exist_ok=True)
    book, origin = chapter(), provenance()
    for name in [w for w in words if not w.startswith("--")] or ["train"]: {"train": train}[name](book, work, origin)
