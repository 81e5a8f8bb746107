"""Make what ships in data/ again.

python tools/weights.py              the encoders and the part of the data set
python tools/weights.py NAME …       some of it: digits_encoder, fashion_encoder, fashion
python tools/weights.py fashion_networks    those that `cpsample reproduce fashion` has trained
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cpsample.core.ddpm import run, seeded, train
from cpsample.core.digit_encoder import class_loss, fit_encoder
from cpsample.core.images import load_digits, pixels
from cpsample.practice.datasets import load_fashion, write_idx
from cpsample.practice.encoders import FashionEncoder
from cpsample.practice.fashion_study import ship_weights
from cpsample.workshop.files import CACHE, atomic_together, provenance, write_json, write_tensors

DATA = Path(__file__).resolve().parent.parent / "data"
SEED = 0


def digits_encoder() -> None:
    "The feature space `digits-mlp-64` of the Fréchet distances on digits."
    start = time.perf_counter()
    images, classes = load_digits()
    encoder = fit_encoder(images, classes, seed=SEED)
    details = {
        "data": "all 1,797 digits of scikit-learn",
        "train_accuracy": share_right(encoder, images, classes),
    }
    ship("digits_encoder", "digits-mlp-64", encoder.state_dict(), details=details, start=start)


def fashion_encoder(steps: int = 4000) -> None:
    "The feature space `fashion-conv-64` of the distances on Fashion-MNIST, in half precision."
    start = time.perf_counter()
    training_set = load_fashion()
    generator = torch.Generator().manual_seed(SEED)
    encoder = seeded(SEED, FashionEncoder)
    loss = on_moved_images(class_loss)
    run(train(encoder, loss, training_set, steps, batch_size=128, generator=generator), steps)

    # Rounded first, judged afterwards: the numbers belong to what ships.
    rounded = {name: weight.half() for name, weight in encoder.state_dict().items()}
    encoder.load_state_dict(rounded)
    images, classes = load_fashion("test")
    details = {
        "data": "Fashion-MNIST, 60,000 training images",
        "steps": steps,
        "test_accuracy": share_right(encoder, pixels(images), classes),
    }
    ship("fashion_encoder", "fashion-conv-64", rounded, details=details, start=start)


def fashion(n_train: int = 3000, n_test: int = 2000) -> None:
    "The part of Fashion-MNIST in data/fashion: the first images of both parts, packed by xz."
    for part, name, n in (("train", "train", n_train), ("test", "t10k", n_test)):
        images, classes = load_fashion(part)
        write_idx(DATA / "fashion" / f"{name}-images-idx3-ubyte.xz", images[:n])
        write_idx(DATA / "fashion" / f"{name}-labels-idx1-ubyte.xz", classes[:n])


def on_moved_images(loss: Callable, most: int = 2) -> Callable:
    """The loss on a batch that is moved as a whole, so that the place does not matter.

    most: by so many pixels at most, in both directions.
    """

    def moved_loss(model, x, *targets, generator=None):
        steps = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
        return loss(model, x.roll(steps, (-2, -1)), *targets, generator=generator)

    return moved_loss


@torch.no_grad()
def share_right(encoder: torch.nn.Module, images: Tensor, classes: Tensor) -> float:
    "The share of images [N, ...] whose class the encoder gets right."
    is_right = encoder.eval()(images).argmax(1) == classes
    return is_right.float().mean().item()


def ship(name: str, space: str, tensors: dict[str, Tensor], *, details: dict, start: float) -> None:
    """Write data/weights/NAME.safetensors, and how it was made beside it.

    name: of the files, and of the function here that makes them.
    space: name of the feature space.
    details: further entries of the record.
    start: when the work began, in seconds of `time.perf_counter`.
    """
    # What it is, where it comes from, how long it took.
    record = {
        "name": space,
        "command": f"python tools/weights.py {name}",
        **provenance(),
        "seed": SEED,
        **details,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    pair = [DATA / "weights" / f"{name}.{ending}" for ending in ("safetensors", "json")]
    with atomic_together(pair) as (weights, origin):
        write_tensors(tensors, weights, {})
        write_json(origin, record)
    print(json.dumps(record, indent=1))


def fashion_networks() -> None:
    "The networks of the study on Fashion-MNIST, from its workspace in the cache."
    ship_weights(CACHE / "fashion", DATA / "weights")


WHAT_SHIPS = {
    function.__name__: function for function in (digits_encoder, fashion_encoder, fashion)
}


def main(names: list[str]) -> None:
    "Make what is named, or everything; exits at an unknown name before anything is made."
    known = WHAT_SHIPS | {"fashion_networks": fashion_networks}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"unknown name {unknown[0]}: choose some of {', '.join(known)}")
    for name in names or WHAT_SHIPS:
        known[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
