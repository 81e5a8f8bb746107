"Real pictures to train on: squares with something on them, cut from scikit-learn's photographs."

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 24  # of a square, of which no two overlap


def squares():
    "All squares in an order of their own, uint8 [361, 24, 24, 3]; empty sky is left out."
    found = []
    for photograph in load_sample_images().images:  # [H, W, 3]
        rows, columns = (length // SIDE for length in photograph.shape[:2])
        table = photograph[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
        found.append(table.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3))
    found = np.concatenate(found)
    contrast = found.std(axis=(1, 2)).mean(axis=-1) / 127.5
    found = found[contrast > 0.15]
    return np.random.default_rng(0).permutation(found)


def save_pictures(folder, n, *, first=0):
    "So many of the squares, from number `first` on, as JPEG files of differing sizes."
    folder.mkdir(parents=True)
    for number, square in enumerate(squares()[first : first + n], first):
        random = np.random.default_rng(number)
        width, height = random.integers(20, SIDE + 1, 2)
        scale = random.uniform(2, 8)
        size = int(width * scale), int(height * scale)
        picture = Image.fromarray(square[:height, :width]).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"picture-{number:03d}.jpg", quality=92)
    return folder
