"Make what ships in data/ again: python tools/weights.py [digits_encoder] [fashion_encoder] [fashion]; without names, all of it."

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from cpsample.core.ddpm import run, seeded, train
from cpsample.core.digit_features import class_loss, fit_encoder
from cpsample.core.images import load_digits, pixels
from cpsample.practice.datasets import load_fashion, write_idx
from cpsample.practice.encoders import FashionEncoder
from cpsample.workshop.files import atomic, provenance, save_json

DATA = Path(__file__).resolve().parent.parent / "data"


def digits_encoder(seed=0):
    "The feature space `digits-mlp-64` of the Fréchet distances on digits."
    start, (x, y) = time.perf_counter(), load_digits()
    encoder = fit_encoder(x, y, seed=seed)
    accuracy = (encoder(x).argmax(1) == y).float().mean().item()
    ship(
        "digits_encoder",
        encoder.state_dict(),
        {
            "name": "digits-mlp-64",
            "data": "all 1,797 digits of scikit-learn",
            "train_accuracy": accuracy,
        },
        seed,
        start,
    )


def moved(loss, most=2):
    "The loss on a batch that is moved by up to `most` pixels in both directions."

    def move(model, x, *targets, generator=None):
        return loss(
            model,
            x.roll(torch.randint(-most, most + 1, (2,), generator=generator).tolist(), (-2, -1)),
            *targets,
            generator=generator,
        )

    return move


def fashion_encoder(seed=0, steps=4000):
    "The feature space `fashion-conv-64` of the distances on Fashion-MNIST, stored in float16."
    start, (x, y), (u, v) = time.perf_counter(), load_fashion(), load_fashion("test")
    encoder = seeded(seed, FashionEncoder)
    run(
        train(
            encoder,
            moved(class_loss),
            (x, y),
            steps,
            batch_size=128,
            generator=torch.Generator().manual_seed(seed),
        ),
        steps,
    )
    half = {k: w.half() for k, w in encoder.state_dict().items()}
    encoder.load_state_dict(half)
    with torch.no_grad():
        accuracy = (encoder.eval()(pixels(u)).argmax(1) == v).float().mean().item()
    ship(
        "fashion_encoder",
        half,
        {
            "name": "fashion-conv-64",
            "data": "Fashion-MNIST, 60,000 training images",
            "steps": steps,
            "test_accuracy": accuracy,
        },
        seed,
        start,
    )


def ship(name, tensors, record, seed, start):
    with atomic(DATA / "weights" / f"{name}.safetensors") as tmp:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp)
    record = {
        "name": record.pop("name"),
        "command": f"python tools/weights.py {name}",
        **provenance(),
        "seed": seed,
        **record,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    save_json(DATA / "weights" / f"{name}.json", record)
    print(json.dumps(record, indent=1))


def fashion(train=3000, test=2000):
    "The part of Fashion-MNIST in data/fashion: the first images of both parts, in the original format, packed by xz."
    for part, name, n in (("train", "train", train), ("test", "t10k", test)):
        for values, kind in zip(load_fashion(part), ("images-idx3", "labels-idx1")):
            write_idx(DATA / "fashion" / f"{name}-{kind}-ubyte.xz", values[:n])


if __name__ == "__main__":
    for name in sys.argv[1:] or ("digits_encoder", "fashion_encoder", "fashion"):
        globals()[name]()
